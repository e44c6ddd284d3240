"""The service with workers and servers on a real GPU, where there is one."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from steepest.client import Client, Job
from steepest.embedded import running_service
from steepest.errors import JobFailedError
from tests.support.service import TASKS

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
ON_GPU = {"device": "cuda", "server_device": "cuda"}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with running_service(tmp_path_factory.mktemp("data"), grpc_port=0, http_port=0) as service:
        service.cluster.wait_ready()
        with Client(f"127.0.0.1:{service.grpc_port}") as client:
            yield client


def _submit(client: Client, steps: int, **spec: Any) -> Job:
    return client.submit(
        f"{TASKS}:regression",
        arguments={"hidden": 25_000},
        steps=steps,
        optimizer={"name": "adamw", "lr": 0.001},
        placement=ON_GPU,
        **spec,
    )


def _wait_for(job: Job, step: int) -> None:
    deadline = time.monotonic() + 60
    while job.get().step < step:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_process_that_is_killed_takes_its_shard_and_the_job_goes_back_to_its_checkpoint(client: Client) -> None:
    steps = 3000
    expected = _submit(client, steps, checkpoint_every=500).wait()
    job = _submit(client, steps, checkpoint_every=500)
    _wait_for(job, 700)
    info = job.get()
    [worker], [server] = info.workers, info.servers
    assert worker.pid == server.pid
    os.kill(server.pid, signal.SIGKILL)
    result = job.wait()
    assert result.state == "SUCCEEDED"
    assert result.parameters_sha256 == expected.parameters_sha256
    assert result.state_sha256 == expected.state_sha256
    reasons = [event.reason for event in job.events() if "signal 9" in event.reason]
    assert any("returning to the checkpoint of step" in reason for reason in reasons), reasons


def test_a_job_is_paused_and_goes_on(client: Client, tmp_path: Path) -> None:
    expected = _submit(client, 1000).wait()
    job = _submit(client, 1000)
    _wait_for(job, 100)
    job.pause()
    job.resume()
    assert job.wait().state_sha256 == expected.state_sha256


def test_user_code_that_raises_fails_the_job_with_its_traceback(client: Client) -> None:
    job = client.submit(f"{TASKS}:failing_dataset", arguments={"after": 500}, steps=500, placement=ON_GPU)
    with pytest.raises(JobFailedError, match="worker-0, micro-batch"):
        job.wait()
    assert _submit(client, 20).wait().state == "SUCCEEDED"  # the GPU is free again
