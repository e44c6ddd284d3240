"""The Ray actor around one server.

What only the process itself needs is imported there: the service, which names this class, starts without PyTorch.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

import ray

from ps.job.config import JobConfig
from ps.job.environment import set_variables
from ps.wire.address import ServerAddress

if TYPE_CHECKING:
    from ps.server.parameter_server import ParameterServer


@ray.remote
class ServerActor:
    """One parameter server shard in a process of its own."""

    def __init__(self, config: JobConfig, index: int, bind: str, code: bytes | None) -> None:
        """code: the job's code bundle, if it has one: its optimizer may come from there."""
        self._server = open_server(config, index, bind, code)

    def describe(self) -> tuple[ServerAddress, int, str]:
        """(address, pid, host name)."""
        return self._server.address, os.getpid(), socket.gethostname()

    def connect(self, addresses: Sequence[ServerAddress]) -> None:
        """Meet the other servers."""
        self._server.connect(addresses)

    def wait(self) -> None:
        """Block for as long as the process lives, so that whoever waits for it sees it die."""
        self._server.wait()


def open_server(config: JobConfig, index: int, bind: str, code: bytes | None) -> ParameterServer:
    """The server of this process; see ServerActor for the arguments."""
    import torch

    from ps.job.code import code_directory, put_first, unpack_code
    from ps.memory.gpu import device_of
    from ps.server.parameter_server import ParameterServer
    from steepest.optimizer_spec import ClassSpec

    torch.set_num_threads(1)
    set_variables(config.spec.environment, config.secrets)
    if code and isinstance(config.spec.optimizer, ClassSpec):
        put_first(unpack_code(code, code_directory()))
    has_shard = index < config.num_servers
    device = device_of(config.spec.placement.server_device) if has_shard else None
    return ParameterServer(config, index, bind or ray.util.get_node_ip_address(), device)
