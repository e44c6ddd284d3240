"""A process that has imported PyTorch and Ray once, and forks a host's workers and servers.

Importing them takes a process seconds, and 150 MB that a fork shares with its parent for as long as neither writes to
them. `python -P -m worker.fork_server SOCKET` serves until its standard input ends. Nothing in it starts threads or
touches a GPU, for neither survives a fork.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker import fork_client

# What a worker or server imports in the course of its life; optimizers of PyTorch import torch._dynamo.
PRELOADED = ("ray._private.workers.default_worker", "ps.actor", "worker.actor", "torch._dynamo")
REQUEST_SECONDS = 10.0
PIECE_BYTES = 1 << 16
ENDING_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Request:
    """A Python script to become. streams: descriptors of its standard input, output and error."""

    command: list[str]
    environment: dict[str, str]
    directory: str
    streams: list[int]

    @staticmethod
    def receive(connection: socket.socket) -> Request:
        """Raises OSError when the client sends no whole request."""
        length, streams, _, _ = socket.recv_fds(connection, fork_client.LENGTH_BYTES, len(fork_client.STANDARD_STREAMS))
        remaining = int.from_bytes(length, "little")
        data = bytearray()
        while len(data) < remaining and (piece := connection.recv(PIECE_BYTES)):
            data += piece
        if not data or len(data) < remaining or len(streams) != len(fork_client.STANDARD_STREAMS):
            for stream in streams:
                os.close(stream)
            raise ConnectionError("the request ended early")
        return Request(**json.loads(data), streams=streams)

    def become(self) -> None:
        """Run the script in this process, as if a new interpreter did."""
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setpgrp()
        for stream, number in zip(self.streams, fork_client.STANDARD_STREAMS, strict=True):
            os.dup2(stream, number)
            os.close(stream)
        os.environ.clear()
        os.environ.update(self.environment)
        os.chdir(self.directory)
        script = self.command[0]
        sys.argv = self.command
        sys.path.insert(0, str(Path(script).parent))
        runpy.run_path(script, run_name="__main__")


def serve(path: Path) -> Request | None:
    """Fork a process for each request. Returns the request in each of them, and None here when standard input ends."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(128)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that end
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while True:
            readable, _, _ = select.select([listener, sys.stdin], [], [])
            if sys.stdin in readable:
                return None
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):  # a client without an answer does without
                connection.settimeout(REQUEST_SECONDS)
                request = Request.receive(connection)
                if os.fork() == 0:
                    _confirm(connection)
                    return request
                for stream in request.streams:
                    os.close(stream)


def _confirm(connection: socket.socket) -> None:
    """The client may have given up and started on its own: then there is nothing to do for this process."""
    try:
        connection.sendall(b"1")
    except OSError:
        os._exit(1)


def main() -> None:
    """Entry point of the process."""
    for module in PRELOADED:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # a collection would write to what is shared
    path = Path(sys.argv[1])
    request = serve(path)
    if request is not None:
        request.become()
    else:
        shutil.rmtree(path.parent)


class ForkServer:
    """Runs a fork server for as long as this process lives."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[Any] | None = None
        self._socket = Path()

    @property
    def pid(self) -> int:
        """Of the process that forks; 0 when there is none."""
        return self._process.pid if self._process else 0

    def interpreter(self) -> str:
        """A shell command that starts a Python script given to it; starts the server if it does not run.

        Raises OSError when it cannot be started.
        """
        if self._process is None or self._process.poll() is not None:
            self._start()
        return shlex.join([sys.executable, "-I", "-S", fork_client.__file__, str(self._socket)])

    def _start(self) -> None:
        self._socket = Path(tempfile.mkdtemp(prefix="steepest-fork-")) / "socket"
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "worker.fork_server", str(self._socket)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # No BLAS is to have threads before a fork. And Ray, which made this process nice, is to make no fork nicer.
            env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"},
        )
        assert self._process.stdout is not None  # noqa: S101  # a pipe
        if self._process.stdout.readline() != b"ready\n":
            raise OSError(f"the fork server ended with status {self._process.wait()}")

    def close(self) -> None:
        """End the server; what it forked goes on."""
        if self._process is None:
            return
        assert self._process.stdin is not None  # noqa: S101  # a pipe
        self._process.stdin.close()
        self._process.wait(ENDING_SECONDS)
        self._process = None


if __name__ == "__main__":
    main()
