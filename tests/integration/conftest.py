"""One service, with embedded Ray, for all the tests of this folder that need one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, sync_playwright

from harness.hosts import Host, hosts
from services.service import Service
from steepest.client import Client, Job
from steepest.embedded import running_service
from steepest.errors import ConflictError
from tests.support.programs import need_program
from tests.support.service import NUM_CPUS, TASKS, until

SECRET = "correct-horse-battery"  # noqa: S105  # the service has it as `hub`
CHROMIUM = next((path for path in ("/usr/bin/chromium", "/usr/bin/google-chrome") if Path(path).exists()), "")


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    directory, secrets = tmp_path_factory.mktemp("service"), tmp_path_factory.mktemp("secrets")
    (secrets / "hub").write_text(f"{SECRET}\n")
    settings = {"grpc_port": 0, "http_port": 0, "num_cpus": NUM_CPUS, "secrets_directory": secrets}
    with running_service(directory, **settings) as started:
        started.cluster.wait_ready()
        yield started


@pytest.fixture(scope="session")
def client(service: Service) -> Iterator[Client]:
    with Client(f"127.0.0.1:{service.grpc_port}") as connected:
        yield connected


@pytest.fixture
def submit(client: Client) -> Iterator[Callable[..., Job]]:
    """Submit a function of tests/support/tasks.py; what still runs at the end of the test is cancelled."""
    jobs: list[Job] = []

    def call(function: str, **spec: Any) -> Job:
        jobs.append(client.submit(f"{TASKS}:{function}", **spec))
        return jobs[-1]

    yield call
    there = {info.job for info in client.list()}  # a test may have deleted some
    jobs = [job for job in jobs if job.name in there]
    for job in jobs:
        if not job.get().has_ended:
            with suppress(ConflictError):  # it ended just now
                job.cancel()
    for job in jobs:
        until(lambda job=job: job.get().has_ended)


@pytest.fixture(scope="module")
def three() -> Iterator[list[Host]]:
    """Network namespaces, joined by a switch."""
    need_program("ip", "iproute2")
    if os.geteuid():
        pytest.skip("network namespaces need root")
    with hosts(3) as made:
        yield made


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM and not os.environ.get("CI"):
        pytest.skip("Chromium is not installed (Debian: apt install chromium)")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()
