"""The command against a running service."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from steepest.client import Client, Job
from tests.support.command import Ran, run
from tests.support.service import TASKS, until

pytestmark = pytest.mark.cluster


@pytest.fixture
def steepest(client: Client) -> Callable[..., Ran]:
    return lambda *arguments: run(*arguments, "--server", client.address)


def test_pause_resume_scale_and_wait(steepest: Callable[..., Ran], submit: Callable[..., Job]) -> None:
    job = submit("slow", arguments={"delay": 0.01}, steps=60, data={"global_batch": 24})
    name = job.name.removeprefix("trainingJobs/")
    until(lambda: job.get().step >= 2)
    paused = steepest("pause", name)
    assert (paused.returncode, paused.stdout.split()[0]) == (0, job.name)
    until(lambda: job.get().state == "PAUSED")
    assert steepest("pause", job.name, "--json").stdout.count("PAUSED") == 1
    scaled = steepest("scale", name, "2", "--json")
    assert scaled.returncode == 0
    assert json.loads(scaled.stdout)["job"] == job.name
    assert job.get().spec.placement.workers == 2
    assert steepest("resume", name).stdout == f"{job.name} RUNNING\n"
    waited = steepest("wait", name, "--json")
    assert waited.returncode == 0
    result = json.loads(waited.stdout.splitlines()[-1])
    assert (result["state"], result["step"]) == ("SUCCEEDED", 60)
    assert "error" in result
    refused = steepest("pause", name)
    assert refused.returncode == 2
    assert "is SUCCEEDED; pause is possible in" in refused.stderr


@pytest.mark.full
def test_scale_to_nothing_is_refused(steepest: Callable[..., Ran], submit: Callable[..., Job]) -> None:
    job = submit("slow", steps=100_000)
    refused = steepest("scale", job.name, "0")
    assert refused.returncode == 2
    assert "at least 1" in refused.stderr


def test_submit_list_get_watch_and_a_failure(steepest: Callable[..., Ran], client: Client) -> None:
    submitted = steepest("submit", f"{TASKS}:regression", "--steps", "3", "--watch")
    assert submitted.returncode == 0
    name = submitted.stdout.strip()
    assert name.startswith("trainingJobs/regression-")
    assert "step 3/3" in submitted.stderr
    listed = json.loads(steepest("list", "--json").stdout)
    assert name in [job["job"] for job in listed["jobs"]]
    shown: dict[str, Any] = json.loads(steepest("get", name, "--json").stdout)
    assert shown["state"] == "SUCCEEDED"
    lines = [json.loads(line) for line in steepest("watch", name, "--json").stdout.splitlines()]
    assert [line["event"]["state"] for line in lines if "event" in line][-1] == "SUCCEEDED"
    assert lines[-1]["parameters_sha256"] == shown["parameters_sha256"]
    failed = steepest("submit", f"{TASKS}:failing_dataset", "--steps", "50", "--watch", "--json")
    assert failed.returncode == 1
    result = json.loads(failed.stdout.splitlines()[-1])
    assert result["state"] == "FAILED"
    assert "is torn" in result["error"]
    refused = steepest("submit", f"{TASKS}:without_parameters", "--epochs", "1")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "no trainable parameters" in refused.stderr
    assert steepest("get", "nobody").returncode == 2
