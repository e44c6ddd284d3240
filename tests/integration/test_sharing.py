"""Jobs that share a small cluster: they give room up for others, and take it again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from steepest.client import Client, Job
from tests.support.service import TASKS, serving, until

pytestmark = pytest.mark.cluster
CPUS = 3


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    directory = tmp_path_factory.mktemp("shared")
    with serving(directory, "--cpus", str(CPUS), "--preemption") as address, Client(address) as connected:
        yield connected


def submit(client: Client, delay: float = 0.0, priority: int = 0, **spec: Any) -> Job:
    data = {"global_batch": 24, "micro_batch": 3}
    return client.submit(f"{TASKS}:slow", arguments={"delay": delay}, data=data, **spec)


def undisturbed(client: Client, **spec: Any) -> str:
    return submit(client, **spec).wait().state_sha256


def reasons(job: Job) -> str:
    return "\n".join(event.reason for event in job.events())


def workers(job: Job) -> int:
    return sum(worker.state == "running" for worker in job.get().workers)


def test_a_job_gives_its_room_to_one_of_higher_priority_and_goes_on_later(client: Client) -> None:
    spec: dict[str, Any] = {"steps": 60, "checkpoint_seconds": 0, "placement": {"workers": 3}}
    expected = undisturbed(client, **spec)
    early = submit(client, delay=0.01, **spec)
    until(lambda: early.get().step > 5)
    urgent = submit(client, steps=5, placement={"workers": 2})
    until(lambda: "waiting for 2 CPUs" in urgent.get().reason)
    urgent.set_priority(7)
    assert urgent.wait().state == "SUCCEEDED"
    assert early.get().state in ("RECOVERING", "RUNNING")
    ended = early.wait()
    assert ended.state_sha256 == expected
    assert [record["step"] for record in early.history()] == list(range(60))
    said = reasons(early)
    whom = f"{urgent.name}, which has priority 7"
    assert f"makes room for {whom} at the next step boundary, with a checkpoint" in said
    assert f"made room for {whom} at step {ended.began_at_step}; it goes on from there when there is room" in said
    assert ended.began_at_step > 5


def test_an_elastic_job_begins_small_shrinks_for_others_and_grows_again(client: Client) -> None:
    spec: dict[str, Any] = {"steps": 200, "placement": {"workers": 3, "min_workers": 1}}
    expected = undisturbed(client, **spec)
    first = submit(client, delay=0.01, steps=400, placement={"workers": 2})
    until(lambda: first.get().state == "RUNNING")
    elastic = submit(client, delay=0.01, **spec)
    until(lambda: workers(elastic) == 1)
    assert "begins with 1 of 3 workers" in reasons(elastic)
    first.cancel()
    until(lambda: workers(elastic) == 3)
    assert "3 workers instead of 2: there is room, and nobody waits" in reasons(elastic)
    second = submit(client, steps=5, placement={"workers": 2})
    assert second.wait().state == "SUCCEEDED"
    assert f"1 worker instead of 3: to make room for {second.name}" in reasons(elastic)
    until(lambda: workers(elastic) == 3 or elastic.get().has_ended)
    assert elastic.wait().state_sha256 == expected
    assert elastic.get().incarnation == 1  # nothing was computed again


def test_an_elastic_job_keeps_to_what_it_is_scaled_to(client: Client) -> None:
    elastic = submit(client, delay=0.05, steps=1000, placement={"workers": 3, "min_workers": 2})
    until(lambda: workers(elastic) == 3)
    elastic.scale(1)
    until(lambda: workers(elastic) == 1)
    elastic.scale(2)
    until(lambda: workers(elastic) == 2)
    elastic.cancel()
    until(lambda: elastic.get().has_ended)
