"""A process that has imported PyTorch once, and Ray, and forks a host's workers and servers.

Importing them takes a process seconds, and 150 MB that a fork shares with its parent for as long as neither writes to
them. `python -P -m services.cluster.fork_server SOCKET MODULE...` imports the modules and serves until its standard
input ends. It starts no threads and touches no GPU, because neither survives a fork, and draws no random number,
because all forks would share it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import secrets
import select
import shlex
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.cluster import fork_client
from services.cluster.allocator import allocator_environment
from steepest.errors import ServiceUnavailableError

REHEARSAL = "worker.rehearsal.rehearse"
# What a worker, a server or a rehearsal imports in the course of its life. Not the actors: Ray draws an identifier for
# each class, and with that the seed of all identifiers of the process.
PRELOADED = (
    "ps.server.parameter_server",
    "worker.process.loop",
    REHEARSAL,
)
# Of Ray, imported when Ray first asks for a process: it reads its settings, among them who asks, only once.
RAY_WORKER = "ray._private.workers.default_worker"
# Environment of the actor: Ray lowers the priority of its processes, forks too, and must not have lowered it before.
PLAIN_PRIORITY = {"RAY_worker_niceness": "0"}
# Sets of strings have the same order in all processes of a job.
SAME_EVERYWHERE = {"PYTHONHASHSEED": "0"}
REQUEST_SECONDS = 2.0
PIECE_BYTES = 1 << 16
ENDING_SECONDS = 5.0
EXIT_SECONDS = 1.0  # from when Ray misses a process to when its parent knows how it ended
MAX_STATUSES = 10_000


@dataclass(frozen=True, slots=True)
class Request:
    """A Python script to become, or a module after "-m". streams: descriptors of its standard input, output, error."""

    command: list[str]
    environment: dict[str, str]
    directory: str
    streams: list[int]

    @staticmethod
    def receive(connection: socket.socket) -> Request:
        """Raises OSError or ValueError when the client sends no whole request."""
        length, streams, _, _ = socket.recv_fds(connection, fork_client.LENGTH_BYTES, len(fork_client.STANDARD_STREAMS))
        try:
            remaining = int.from_bytes(length, "little")
            data = bytearray()
            while len(data) < remaining and (piece := connection.recv(PIECE_BYTES)):
                data += piece
            raw = json.loads(data)
            if len(streams) != len(fork_client.STANDARD_STREAMS):
                raise ValueError(f"{len(streams)} streams came with the request")
            return Request(list(raw["command"]), dict(raw["environment"]), str(raw["directory"]), streams)
        except (OSError, ValueError, TypeError, KeyError) as error:
            _close(streams)
            raise ValueError(f"this is no request: {error}") from error

    def prepare(self) -> None:
        """Import what all forks for Ray need, before the first of them."""
        if not self.command[0].endswith(RAY_WORKER.replace(".", "/") + ".py") or RAY_WORKER in sys.modules:
            return
        os.environ.update({name: value for name, value in self.environment.items() if name.startswith("RAY_")})
        _preload([RAY_WORKER])

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
        import numpy as np

        np.random.seed()  # all forks have the same state
        script = self.command[0]
        if script == "-m":
            sys.argv = self.command[1:]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
            return
        sys.argv = self.command
        sys.path.insert(0, str(Path(script).parent))
        runpy.run_path(script, run_name="__main__")


def serve(name: str) -> Request | None:
    """Fork a process for each request. Returns the request in each of them, and None here when standard input ends.

    Writes "+PID" to standard output when a process is forked, and "PID STATUS", its wait status, when it has ended.
    """
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("\0" + name)
        listener.listen(128)
        ended, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        _say("ready")
        while True:
            readable, _, _ = select.select([listener, sys.stdin, ended], [], [])
            if sys.stdin in readable:
                return None
            if ended in readable:
                os.read(ended, PIECE_BYTES)
                _report_ended()
            if listener not in readable:
                continue
            with contextlib.suppress(OSError, ValueError):  # a client without an answer does without
                request = _answer(listener)
                if request is not None:
                    signal.set_wakeup_fd(-1)
                    os.close(ended)
                    os.close(wake)
                    return request


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # whoever started this server is gone; its input ends, too
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def _report_ended() -> None:
    """Say how the forks ended that have ended."""
    with contextlib.suppress(ChildProcessError):  # there is no other
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            _say(f"{found[0]} {found[1]}")


def _answer(listener: socket.socket) -> Request | None:
    """Take one call and fork; the request in the fork. Raises OSError or ValueError when nothing comes of it."""
    connection, _ = listener.accept()
    with connection:
        if _caller(connection) != os.getuid():
            return None
        connection.settimeout(REQUEST_SECONDS)
        request = Request.receive(connection)
        request.prepare()
        try:
            pid = os.fork()
        except OSError:
            _close(request.streams)
            raise
        if pid:
            _say(f"+{pid}")
            _close(request.streams)
            return None
        _confirm(connection)
        return request


def _caller(connection: socket.socket) -> int:
    """The user at the other end."""
    credentials = struct.Struct("iII")  # unix(7): pid, uid, gid
    _, uid, _ = credentials.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size))
    return int(uid)


def _confirm(connection: socket.socket) -> None:
    """In a fork. The client may have given up and started on its own: then there is nothing to do for this process."""
    try:
        connection.sendall(os.getpid().to_bytes(fork_client.PID_BYTES, "little"))
        connection.settimeout(None)  # the client's clock counts: it confirms, or hangs up
        if connection.recv(1) == fork_client.GO:
            return
    except OSError:
        pass
    os._exit(1)


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _preload(modules: Iterable[str]) -> None:
    for module in modules:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # a collection would write to what is shared


def main() -> None:
    """Entry point of the process."""
    name, *modules = sys.argv[1:]
    _preload(modules)
    request = serve(name)
    if request is not None:
        request.become()


class ForkServer:
    """Runs a fork server for as long as this process lives. preloaded: modules that all forks have."""

    def __init__(self, preloaded: Sequence[str] = PRELOADED) -> None:
        self._preloaded = preloaded
        self._process: subprocess.Popen[Any] | None = None
        self._is_ready = False
        self._name = ""
        self._starting = threading.Lock()
        self._news = threading.Condition()
        self._statuses: dict[int, int | None] = {}  # of its forks: None while they run
        self._takes_commands = True

    @property
    def pid(self) -> int:
        """Of the process that forks; 0 when there is none."""
        return self._process.pid if self._process else 0

    def interpreter(self) -> str:
        """A shell command that starts a Python script given to it; starts the server if it does not run.

        Raises OSError when it cannot be started.
        """
        self.start()
        return shlex.join([sys.executable, "-I", "-S", fork_client.__file__, self._name])

    def run(self, command: list[str], streams: Sequence[int], timeout_seconds: float) -> int:
        """Run a command (see `fork_client.ask`) in a fork; its wait status. Starts the server if it does not run.

        Raises OSError when it cannot be started, and its subclass TimeoutError when the command, which is killed then,
        does not end in time; ServiceUnavailableError after `end_commands`.
        """
        self.start()
        pid = fork_client.ask(self._name, command, streams)
        if not pid:
            raise OSError("the fork server does not answer")
        with self._news:
            has_ended = self._news.wait_for(
                lambda: self._statuses.get(pid) is not None or not self._takes_commands, timeout_seconds
            )
            status = self._statuses.get(pid)
        if status is not None:
            return status
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        if has_ended:
            raise ServiceUnavailableError("the service is stopping")
        raise TimeoutError(f"process {pid} did not end within {timeout_seconds:g} s")

    def end_commands(self) -> None:
        """Have no more of them, and kill those that run."""
        with self._news:
            self._takes_commands = False
            self._news.notify_all()

    def start_early(self) -> None:
        """Begin to start the server, so that who first needs it waits less."""

        def start() -> None:
            with contextlib.suppress(OSError):  # whoever needs it tries again, and says so
                self.start()

        threading.Thread(target=start, daemon=True).start()

    def start(self) -> None:
        """Start the server if it does not run. Raises OSError when it cannot be started."""
        with self._starting:
            if self._process is None or self._process.poll() is not None:
                self._start()

    def _start(self) -> None:
        self._name, self._is_ready = f"steepest-fork-{secrets.token_hex(16)}", False
        environment = {name: value for name, value in os.environ.items() if name not in PLAIN_PRIORITY}
        process = self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "services.cluster.fork_server", self._name, *self._preloaded],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={
                **environment,
                **SAME_EVERYWHERE,
                **allocator_environment(environment),
                "OMP_NUM_THREADS": "1",  # no BLAS is to have threads before a fork
            },
        )
        assert process.stdout is not None  # noqa: S101  # a pipe
        if process.stdout.readline() != b"ready\n":
            raise OSError(f"the fork server ended with status {process.wait()}")
        self._is_ready = True
        threading.Thread(target=self._listen, args=(process.stdout,), daemon=True).start()

    def _listen(self, lines: Iterable[bytes]) -> None:
        """Note what the server says of its forks, until it ends."""
        for line in lines:
            pid, _, status = line.decode().strip().partition(" ")
            with self._news:
                self._statuses[int(pid.removeprefix("+"))] = int(status) if status else None
                while len(self._statuses) > MAX_STATUSES:
                    del self._statuses[next(iter(self._statuses))]
                self._news.notify_all()

    def exit_status(self, pid: int) -> int | None:
        """The wait status of a fork that has ended or is about to; None when it is not known."""
        with self._news:
            if pid in self._statuses:
                self._news.wait_for(lambda: self._statuses.get(pid) is not None, EXIT_SECONDS)
            return self._statuses.get(pid)

    def close(self) -> None:
        """End the server; what it forked goes on."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None  # noqa: S101  # a pipe
        process.stdin.close()
        if not self._is_ready:  # it imports still
            process.kill()
        try:
            process.wait(ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
