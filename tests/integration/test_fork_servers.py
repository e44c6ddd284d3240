"""Workers and servers of a job come from their host's fork server, and outlive it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import psutil
import pytest

from services.service import Service
from steepest.client import Job
from tests.support.service import until

pytestmark = pytest.mark.cluster


def _parents(job: Job) -> set[int]:
    info = job.get()
    return {psutil.Process(member.pid).ppid() for member in (*info.workers, *info.servers)}


def _fork_server(service: Service) -> int:
    [pid] = service.cluster.fork_servers.pids()
    return pid


@pytest.mark.full
def test_a_job_outlives_the_fork_server_and_the_next_gets_another(service: Service, submit: Callable[..., Job]) -> None:
    job = submit("slow", arguments={"delay": 0.02}, steps=60, placement={"workers": 2})
    until(lambda: job.get().step > 2 and all(worker.pid for worker in job.get().workers))
    first = _fork_server(service)
    assert _parents(job) == {first}
    os.kill(first, signal.SIGKILL)
    until(lambda: first not in _parents(job))
    until(lambda: job.get().has_ended)
    assert job.get().state == "SUCCEEDED"
    second = submit("slow", arguments={"delay": 0.02}, steps=100_000, placement={"workers": 2})
    until(lambda: second.get().step > 2 and all(worker.pid for worker in second.get().workers))
    assert _fork_server(service) != first
    assert _parents(second) == {_fork_server(service)}
    second.scale(4)
    until(lambda: [worker.state for worker in second.get().workers].count("running") == 4)
    assert _parents(second) == {_fork_server(service)}
    assert len({psutil.Process(member.pid).nice() for member in second.get().workers}) == 1
    second.cancel()
    until(lambda: second.get().has_ended)
    assert psutil.pid_exists(_fork_server(service))
