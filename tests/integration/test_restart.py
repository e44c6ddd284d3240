"""The service dies and comes back on the same data directory."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from steepest.client import Client
from tests.integration.conftest import TASKS, until
from tests.local_job import hashes, job_config, run_here

pytestmark = pytest.mark.cluster

COMMAND = [sys.executable, "-c", "from steepest.cli import main; main()"]
SPEC = {"steps": 40, "data": {"global_batch": 24}, "checkpoint_every": 5}


@contextlib.contextmanager
def serving(directory: Path, ending: signal.Signals) -> Iterator[Client]:
    """A service in a process of its own that gets the signal at the end."""
    process = subprocess.Popen(
        [*COMMAND, "serve", "--port", "0", "--http-port", "0", "--data-dir", str(directory)],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    address = process.stderr.readline().split()[1]
    assert process.stderr.readline() == "ready\n"
    try:
        with Client(address) as client:
            yield client
    finally:
        process.send_signal(ending)
        process.communicate(timeout=60)


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_jobs_go_on_from_their_last_checkpoint_and_paused_ones_stay_paused(
    ending: signal.Signals, tmp_path: Path
) -> None:
    expected = hashes(
        run_here(job_config(tmp_path / "here", "tests.tasks:slow", arguments={"delay": 0.0}, **SPEC))  # type: ignore[arg-type]
    )
    data = tmp_path / "data"
    with serving(data, ending) as client:
        held = client.submit(f"{TASKS}:slow", name="held", arguments={"delay": 0.02}, **SPEC)
        until(lambda: held.get().step >= 6)
        held.pause()
        until(lambda: held.get().state == "PAUSED")
        running = client.submit(f"{TASKS}:slow", name="running", arguments={"delay": 0.02}, **SPEC)
        until(lambda: running.get().step >= 11)
        second = subprocess.run(
            [*COMMAND, "serve", "--port", "0", "--http-port", "0", "--data-dir", str(data)],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert second.returncode == 2
        assert "another service uses the data directory" in second.stderr
    with serving(data, signal.SIGTERM) as client:
        info = client.job("running").wait()
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
