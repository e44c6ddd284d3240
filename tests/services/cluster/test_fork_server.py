"""A fork server: what it starts is as if started plainly, and nothing depends on it."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from services.cluster import fork_client
from services.cluster.fork_server import ForkServer
from steepest.errors import ServiceUnavailableError
from tests.support.service import until

pytestmark = pytest.mark.cluster

SCRIPT = """
import json, os, signal, sys
print(json.dumps({
    "name": __name__, "argv": sys.argv, "path": sys.path[0], "directory": os.getcwd(),
    "variable": os.environ.get("VARIABLE"), "parent": os.getppid(),
    "group": os.getpgrp() == os.getpid(), "has_torch": "torch" in sys.modules,
    "input": sys.stdin.read(), "sigchld": signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL,
    "status": os.waitstatus_to_exitcode(os.system("exit 3")),
}))
sys.exit("the end")
"""


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    server = ForkServer(["numpy", "torch"])
    yield server
    server.close()


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "a script.py"
    path.write_text(SCRIPT)
    return path


def _run(interpreter: str, script: Path) -> tuple[dict[str, Any], str]:
    """What the script said of itself, and its standard error."""
    done = subprocess.run(
        [*shlex.split(interpreter), script, "one", "t wo"],
        input="typed",
        capture_output=True,
        text=True,
        check=False,
        cwd=script.parent,
        env={**os.environ, "VARIABLE": "välue"},
    )
    return json.loads(done.stdout), done.stderr


def test_a_fork_is_as_a_plain_start(server: ForkServer, script: Path) -> None:
    forked, errors = _run(server.interpreter(), script)
    plain, plain_errors = _run(sys.executable, script)
    assert forked.pop("parent") == server.pid
    assert plain.pop("parent") == os.getpid()
    assert (forked.pop("has_torch"), plain.pop("has_torch")) == (True, False)
    assert (forked.pop("group"), plain.pop("group")) == (True, False)
    assert forked == plain
    assert errors == plain_errors == "the end\n"
    assert plain["argv"] == [str(script), "one", "t wo"]
    assert plain["variable"] == "välue"


def test_the_server_has_one_thread_and_leaves_no_zombies(server: ForkServer, script: Path) -> None:
    _run(server.interpreter(), script)
    process = psutil.Process(server.pid)
    assert process.num_threads() == 1
    until(lambda: not process.children())


def test_without_a_server_it_starts_plainly_and_the_next_comes_back(server: ForkServer, script: Path) -> None:
    interpreter = server.interpreter()
    os.kill(server.pid, signal.SIGKILL)
    until(lambda: psutil.Process(server.pid).status() == psutil.STATUS_ZOMBIE)
    said, _ = _run(interpreter, script)
    assert said["parent"] == os.getpid()
    assert not said["has_torch"]
    said, _ = _run(server.interpreter(), script)
    assert said["parent"] == server.pid


def test_what_is_no_request_harms_nothing(server: ForkServer, script: Path) -> None:
    interpreter = server.interpreter()
    before = psutil.Process(server.pid).num_fds()
    wrong = [b"{]", b"[]", b"{}", json.dumps({"command": 1, "environment": {}, "directory": ""}).encode()]
    for data in (
        b"",
        b"abc",
        (1 << 40).to_bytes(8, "little") + b"{",
        *(len(w).to_bytes(8, "little") + w for w in wrong),
    ):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect("\0" + shlex.split(interpreter)[-1])
            if data:
                socket.send_fds(connection, [data], [0, 1, 2])
    said, _ = _run(interpreter, script)
    assert said["parent"] == server.pid
    until(lambda: psutil.Process(server.pid).num_fds() == before)


def test_no_other_user_is_answered(server: ForkServer) -> None:
    if os.getuid():
        pytest.skip("only root can be somebody else")
    name = shlex.split(server.interpreter())[-1]
    code = (
        "import socket\n"
        "connection = socket.socket(socket.AF_UNIX)\n"
        f"connection.connect('\\0' + {name!r})\n"
        "connection.settimeout(30)\n"
        "assert connection.recv(1) == b''\n"
    )
    subprocess.run(["/usr/bin/env", "python3", "-c", code], check=True, user=65534, group=65534, cwd="/")


def test_forks_draw_numbers_of_their_own(server: ForkServer, tmp_path: Path) -> None:
    script = tmp_path / "draw.py"
    script.write_text(
        "import random, threading, numpy, ray\n"
        "drawn = [ray.UniqueID.from_random().hex(), random.random(), numpy.random.random()]\n"
        "thread = threading.Thread(target=lambda: drawn.append(ray.UniqueID.from_random().hex()))\n"
        "thread.start(), thread.join(), print(*drawn)\n"
    )
    command = [*shlex.split(server.interpreter()), str(script)]
    draws = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() for _ in range(3)]
    assert len(draws[0]) == 4
    assert all(len(set(same)) == 3 for same in zip(*draws, strict=True)), draws


def test_who_gave_up_waiting_is_not_started_twice(
    server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = shlex.split(server.interpreter())[-1]
    monkeypatch.setattr(fork_client, "ANSWER_SECONDS", 0.2)
    (tmp_path / "late.py").write_text(f"open({str(tmp_path / 'late')!r}, 'w')")
    (tmp_path / "after.py").write_text(f"open({str(tmp_path / 'after')!r}, 'w')")
    os.kill(server.pid, signal.SIGSTOP)
    assert not fork_client.ask(name, [str(tmp_path / "late.py")])
    os.kill(server.pid, signal.SIGCONT)
    monkeypatch.setattr(fork_client, "ANSWER_SECONDS", 30.0)
    assert fork_client.ask(name, [str(tmp_path / "after.py")])
    until((tmp_path / "after").exists)
    until(lambda: not psutil.Process(server.pid).children())
    assert not (tmp_path / "late").exists()


def test_it_ends_with_its_owner() -> None:
    code = (
        "from services.cluster.fork_server import ForkServer\n"
        "server = ForkServer(['numpy'])\n"
        "server.interpreter()\n"
        "print(server.pid, flush=True)\n"
        "input()\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    owner.kill()
    owner.communicate()
    until(lambda: not psutil.pid_exists(pid))


def test_a_server_that_cannot_start_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONHOME", str(tmp_path))
    with pytest.raises(OSError, match="the fork server ended with status 1"):
        ForkServer().interpreter()


def test_a_module_runs_in_a_fork_and_its_end_is_told(server: ForkServer, tmp_path: Path) -> None:
    """As the probe of tasks does."""
    with (tmp_path / "out").open("wb") as out, Path(os.devnull).open("rb") as nothing:
        streams = (nothing.fileno(), out.fileno(), out.fileno())
        assert server.run(["-m", "json.tool", "--help"], streams, 30.0) == 0
        assert os.waitstatus_to_exitcode(server.run(["-m", "json.tool", "/nowhere"], streams, 30.0)) != 0
        began = time.monotonic()
        with pytest.raises(TimeoutError, match=r"did not end within 0\.5 s"):
            server.run([str(_sleeper(tmp_path))], streams, 0.5)
        assert time.monotonic() - began < 20
    assert "usage" in (tmp_path / "out").read_text()
    until(lambda: not psutil.Process(server.pid).children())


def test_commands_end_with_the_service_that_waits_for_them(tmp_path: Path) -> None:
    server = ForkServer([])
    try:
        with Path(os.devnull).open("r+b") as nothing:
            streams = (nothing.fileno(),) * 3
            with ThreadPoolExecutor() as pool:
                waiting = pool.submit(server.run, [str(_sleeper(tmp_path))], streams, 600.0)
                until(lambda: server.pid and psutil.Process(server.pid).children())
                server.end_commands()
                with pytest.raises(ServiceUnavailableError, match="the service is stopping"):
                    waiting.result(20)
            until(lambda: not psutil.Process(server.pid).children())
            with pytest.raises(ServiceUnavailableError):
                server.run([str(_sleeper(tmp_path))], streams, 600.0)
    finally:
        server.close()


def _sleeper(directory: Path) -> Path:
    (directory / "sleeper.py").write_text("import time\ntime.sleep(600)\n")
    return directory / "sleeper.py"
