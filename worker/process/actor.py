"""The Ray actors around one worker: alone, or with the server that is on its GPU.

What only the process itself needs is imported there: the service, which names these classes, starts without PyTorch.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

import ray

from ps.job.config import JobConfig
from ps.job.environment import set_variables
from ps.server.actor import open_server
from ps.wire.address import ServerAddress

if TYPE_CHECKING:
    from ps.server.parameter_server import ParameterServer

Refusal = tuple[str, str]  # message and traceback


@ray.remote
class WorkerActor:
    """One worker in a process of its own. Its methods run in turn, so `describe` answers before `run` blocks."""

    def describe(self) -> tuple[int, str]:
        """(pid, host name)."""
        return os.getpid(), socket.gethostname()

    def run(
        self, config: JobConfig, worker: str, generation: int, code: bytes, addresses: Sequence[ServerAddress]
    ) -> Refusal | None:
        """Work until dismissed. Returns (message, traceback) when the worker cannot be set up, nor could another."""
        return _work(config, worker, generation, code, addresses)


@ray.remote
class GpuActor:
    """A server on a GPU and the worker there, one after the other if there are several, in one process.

    Two processes would take turns on the GPU, and wait for each other at every step.
    """

    def __init__(self, config: JobConfig, index: int, bind: str, code: bytes | None) -> None:
        """As of ServerActor."""
        self._server = open_server(config, index, bind, code)

    def describe(self) -> tuple[ServerAddress, int, str]:
        """(address, pid, host name)."""
        return self._server.address, os.getpid(), socket.gethostname()

    def connect(self, addresses: Sequence[ServerAddress]) -> None:
        """Meet the other servers."""
        self._server.connect(addresses)

    def wait(self) -> None:
        """Block for as long as the server lives."""
        self._server.wait()

    def run(
        self, config: JobConfig, worker: str, generation: int, code: bytes, addresses: Sequence[ServerAddress]
    ) -> Refusal | None:
        """As of WorkerActor."""
        return _work(config, worker, generation, code, addresses, self._server)


def _work(
    config: JobConfig,
    worker: str,
    generation: int,
    code: bytes,
    addresses: Sequence[ServerAddress],
    server: ParameterServer | None = None,
) -> Refusal | None:
    from ps.job.code import code_directory, unpack_code
    from ps.memory.gpu import DeviceError
    from worker.gradients.backend import backend_of
    from worker.process.loop import WorkerLoop
    from worker.process.output import Output
    from worker.task.load import TaskError, said, user_traceback

    set_variables(config.spec.environment, config.secrets)
    try:
        directory = unpack_code(code, code_directory()) if code else None
        backend = backend_of(config.spec.placement.device)
        loop = WorkerLoop(config, worker, generation, directory, backend, Output())
    except TaskError as error:
        return error.message, error.traceback
    except DeviceError as error:
        return str(error), ""
    except Exception as error:
        return f"the worker could not be set up: {said(error)}", user_traceback(error)
    loop.run(addresses, server)
    return None
