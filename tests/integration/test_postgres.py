"""The service with its jobs in PostgreSQL."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from steepest.client import Client
from tests.support.postgres import Postgres, postgres_server
from tests.support.service import COMMAND, TASKS, free_port, serving, until

pytestmark = [pytest.mark.cluster, pytest.mark.full]

SPEC = {"steps": 60, "checkpoint_every": 5, "arguments": {"delay": 0.02}}


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    with postgres_server() as server:
        yield server


def test_jobs_survive_the_service_and_the_database(postgres: Postgres, tmp_path: Path) -> None:
    url, data = postgres.database(), tmp_path / "data"
    options = ("--database-url", url, "--port", str(free_port()))
    with serving(data, *options, ending=signal.SIGKILL) as address, Client(address) as client:
        job = client.submit(f"{TASKS}:slow", name="a", **SPEC)
        until(lambda: job.get().step >= 11)
        other = ["serve", "--port", "0", "--http-port", "0", "--data-dir", str(tmp_path / "other")]
        second = subprocess.run([*COMMAND, *other, "--database-url", url], capture_output=True, text=True, timeout=60)
        assert second.returncode == 2
        assert "another service uses this database" in second.stderr
    assert not (data / "steepest.db").exists()
    with serving(data, *options) as address, Client(address) as client:
        job = client.job("a")
        until(lambda: job.get().step >= 15)
        postgres.stop()
        postgres.start()
        info = job.wait()
        assert info.state == "SUCCEEDED"
        assert [record["step"] for record in job.history()] == list(range(60))
        events = job.events()
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        assert [found.job for found in client.list(filter="state = SUCCEEDED")] == ["trainingJobs/a"]
