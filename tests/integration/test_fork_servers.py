"""Workers and servers of a job come from their host's fork server, and outlive it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from services.cluster.allocator import allocator_environment
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


def test_processes_of_jobs_use_the_allocator_that_ray_brings(service: Service) -> None:
    mapped = Path(f"/proc/{_fork_server(service)}/maps").read_text()
    assert "libjemalloc" in mapped


def test_an_allocator_that_the_user_preloads_stays() -> None:
    assert allocator_environment({"LD_PRELOAD": "libtcmalloc.so"}) == {}
    found = allocator_environment({"MALLOC_CONF": "narenas:1"})
    assert found["MALLOC_CONF"] == "narenas:1"
    assert Path(found["LD_PRELOAD"]).is_file()
