"""What a task's code prints, and what it returns beside its loss, is seen by its user."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from steepest.client import Client, Job
from steepest.errors import SpecError
from steepest.jobs import LogLine
from tests.support.command import run
from tests.support.service import TASKS

pytestmark = pytest.mark.cluster


def test_lines_are_followed_and_outlive_the_job(client: Client, submit: Callable[..., Job]) -> None:
    job = submit("talkative", steps=3, data={"global_batch": 20, "micro_batch": 10}, placement={"workers": 2})
    lines = list(job.logs(follow=True))
    job.wait()
    rehearsed = [line for line in lines if line.process == "submission"]
    assert rehearsed[0].text == "set up"
    trained = [line for line in lines if line.process.startswith("worker-")]
    assert [line.text for line in trained].count("a pass over 10") == 6
    assert {line.process for line in trained} <= {"worker-0", "worker-1"}
    assert {line.stream for line in trained} == {"stdout"}
    assert list(job.logs()) == lines
    assert list(job.logs(offset=lines[3].offset)) == lines[4:]
    watched = [update for update in job.watch(logs=True) if isinstance(update, LogLine)]
    assert watched == lines
    assert not any(isinstance(update, LogLine) for update in job.watch())
    with pytest.raises(SpecError, match="must not be negative"):
        list(job.logs(offset=-1))


def test_numbers_beside_the_loss_are_means_over_the_step(client: Client, submit: Callable[..., Job]) -> None:
    hashes = set()
    for workers in (1, 2):
        job = submit(
            "talkative",
            steps=6,
            data={"global_batch": 20, "micro_batch": 10, "shuffle": False},
            placement={"workers": workers},
        )
        hashes.add(job.wait().parameters_sha256)
        records = list(job.history())
        assert [set(record["logged"]) for record in records] == [{"largest", "rows"}] * 6
        # The last step of an epoch has one sample.
        assert [record["logged"]["rows"] for record in records] == [10.0] * 5 + [1.0]
        assert all(record["logged"]["largest"] >= record["loss"] for record in records)
        assert all(0 <= record["data_seconds"] <= record["step_seconds"] for record in records)
    assert len(hashes) == 1


def test_the_command_shows_them(client: Client) -> None:
    service = ("--server", client.address)
    done = run("submit", f"{TASKS}:talkative", "--steps", "2", "--watch", "--json", *service)
    assert done.returncode == 0
    job = json.loads(done.stdout.splitlines()[-1])["job"]
    assert "submission |" not in done.stderr
    assert "worker-0 | a pass over" in done.stderr
    assert "  largest " in done.stderr
    shown = run("logs", job, *service)
    assert shown.stdout.startswith("submission | set up\n")
    as_json = [json.loads(line) for line in run("logs", job, "--json", *service).stdout.splitlines()]
    assert [f"{line['process']} | {line['text']}" for line in as_json] == shown.stdout.splitlines()
