"""The Ray actor around one worker.

What only the process itself needs is imported there: the service, which names this class, starts without PyTorch.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

import ray

from ps.job.config import JobConfig
from ps.wire.address import ServerAddress


@ray.remote
class WorkerActor:
    """One worker in a process of its own. Its methods run in turn, so `describe` answers before `run` blocks."""

    def describe(self) -> tuple[int, str]:
        """(pid, host name)."""
        return os.getpid(), socket.gethostname()

    def run(
        self, config: JobConfig, worker: str, generation: int, code: bytes, addresses: Sequence[ServerAddress]
    ) -> tuple[str, str] | None:
        """Work until dismissed. Returns (message, traceback) when the worker cannot be set up, nor could another."""
        from ps.job.code import code_directory, unpack_code
        from ps.memory.gpu import DeviceError
        from worker.gradients.backend import backend_of
        from worker.process.loop import WorkerLoop
        from worker.process.output import Output
        from worker.task.load import TaskError, said, user_traceback

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
        loop.run(addresses)
        return None
