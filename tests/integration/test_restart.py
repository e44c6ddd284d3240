"""The service dies and comes back on the same data directory."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from harness.local_job import hashes, job_config, run_here
from steepest.client import Client
from steepest.jobs import Event, JobInfo, Progress
from tests.support.documented import is_documented
from tests.support.service import COMMAND, TASKS, free_port, serving, until

pytestmark = pytest.mark.cluster

SPEC = {"steps": 40, "data": {"global_batch": 24, "micro_batch": 3}, "checkpoint_every": 5}


@pytest.mark.full
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_jobs_go_on_from_their_last_checkpoint_and_paused_ones_stay_paused(
    ending: signal.Signals, tmp_path: Path
) -> None:
    expected = hashes(
        run_here(job_config(tmp_path / "here", "tests.support.tasks:slow", arguments={"delay": 0.0}, **SPEC))  # type: ignore[arg-type]
    )
    data, port = tmp_path / "data", ("--port", str(free_port()))
    updates: list[Event | Progress | JobInfo] = []
    with serving(data, *port, ending=ending) as address, Client(address) as client:
        held = client.submit(f"{TASKS}:slow", name="held", arguments={"delay": 0.01}, **SPEC)
        until(lambda: held.get().step >= 6)
        held.pause()
        until(lambda: held.get().state == "PAUSED")
        second = subprocess.run(
            [*COMMAND, "serve", "--port", "0", "--http-port", "0", "--data-dir", str(data)],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert second.returncode == 2
        assert "another service uses the data directory" in second.stderr
        running = client.submit(f"{TASKS}:slow", name="running", arguments={"delay": 0.02}, **SPEC)
        watching = Client(address)
        watcher = threading.Thread(target=lambda: updates.extend(watching.job("running").watch()), daemon=True)
        watcher.start()
        until(lambda: running.get().step >= 11)
    with serving(data, *port, ending=signal.SIGTERM) as address, Client(address) as client:
        watcher.join(60)
        assert not watcher.is_alive(), "the watch was not resumed"
        watching.close()
        events = [update for update in updates if isinstance(update, Event)]
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        assert is_documented("the service was away, with a Ray of its own", "\n".join(e.reason for e in events))
        info = updates[-1]
        assert isinstance(info, JobInfo)
        assert info.state == "SUCCEEDED"
        assert (info.parameters_sha256, info.state_sha256) == expected
        steps = [r["step"] for r in client.job("running").history()]
        assert steps == sorted(set(steps))
        if ending == signal.SIGTERM:  # a job whose service was killed makes steps that nobody records
            assert steps == list(range(40))
        held = client.job("held")
        assert held.get().state == "PAUSED"
        assert held.resume().state == "RECOVERING"
        info = held.wait()
        assert (info.parameters_sha256, info.state_sha256) == expected


def test_ctrl_c_ends_a_service_that_a_script_has_started_in_the_background(tmp_path: Path) -> None:
    program = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); from steepest.cli import main; main()"
    command = [sys.executable, "-c", program, "serve", "--port", "0", "--http-port", "0", "--data-dir", str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = [process.stderr.readline(), process.stderr.readline()]
    process.send_signal(signal.SIGINT)
    try:
        process.wait(60)
    finally:
        process.kill()
    lines += process.stderr.readlines()
    assert process.returncode == 0, lines
    assert lines[1] == "ready\n"
    assert lines[2].startswith("stopping")
