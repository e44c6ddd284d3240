"""The service dies while jobs run on a cluster of others; they go on, and the next service goes on with them."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.local_job import hashes, job_config, run_here
from steepest.client import Client
from steepest.jobs import Event
from tests.support.choices import full
from tests.support.documented import is_documented
from tests.support.service import TASKS, raylets, serving, until

pytestmark = pytest.mark.cluster

SPEC: dict[str, Any] = {"data": {"global_batch": 24, "micro_batch": 3}, "checkpoint_every": 200, "eval_every": 50}


@pytest.mark.parametrize("ending", [signal.SIGKILL, full(signal.SIGTERM)])
def test_jobs_go_on_without_a_service_and_with_the_next(ending: signal.Signals, tmp_path: Path) -> None:
    spec: dict[str, Any] = {**SPEC, "steps": 400}
    expected = hashes(
        run_here(job_config(tmp_path / "here", "tests.support.tasks:evaluated", arguments={"delay": 0.0}, **spec))
    )
    with raylets([{"num_cpus": 8}]) as cluster:
        serve = (tmp_path / "data", "--ray-address", cluster)
        with serving(*serve, ending=ending) as address, Client(address) as client:
            arguments = {"delay": 0.005}
            job = client.submit(
                f"{TASKS}:evaluated", name="kept", arguments=arguments, **spec, placement={"workers": 2}
            )
            held = client.submit(f"{TASKS}:evaluated", name="held", arguments=arguments, **spec)
            until(lambda: job.get().step >= 20 and held.get().step >= 5)
            held.pause()
            until(lambda: held.get().state == "PAUSED")
            pids = {member.pid for member in [*job.get().workers, *job.get().servers]}
        time.sleep(0.5)
        with serving(*serve) as address, Client(address) as client:
            job, held = client.job("kept"), client.job("held")
            assert held.get().state == "PAUSED"
            job.scale(1)
            info = job.wait()
            assert (info.parameters_sha256, info.state_sha256) == expected
            assert info.incarnation == 1
            assert {member.pid for member in info.servers} <= pids
            records = list(job.history())
            assert [record["step"] for record in records] == list(range(400))
            assert [evaluation.step for evaluation in job.evaluations()] == list(range(50, 401, 50))
            reasons = [event.reason for event in job.events()]
            assert is_documented("the service was away, on an existing cluster", "\n".join(reasons))
            assert not [reason for reason in reasons if "restarted" in reason or "checkpoint" in reason]
            held.resume()
            assert held.wait().state_sha256 == expected[1]
            assert held.get().incarnation == 1
            until(lambda: client.server_info().free_resources["CPU"] == 8)


def test_what_ended_without_a_service_is_told_to_the_next(tmp_path: Path) -> None:
    spec: dict[str, Any] = {**SPEC, "steps": 150}
    with raylets([{"num_cpus": 4}]) as cluster:
        serve = (tmp_path / "data", "--ray-address", cluster)
        with serving(*serve, ending=signal.SIGKILL) as address, Client(address) as client:
            job = client.submit(f"{TASKS}:evaluated", name="short", arguments={"delay": 0.002}, **spec)
            until(lambda: job.get().step >= 5)
        time.sleep(3.0)
        with serving(*serve) as address, Client(address) as client:
            info = client.job("short").wait()
            assert (info.state, info.step, info.incarnation) == ("SUCCEEDED", 150, 1)
            assert [record["step"] for record in client.job("short").history()] == list(range(150))
            until(lambda: client.server_info().free_resources["CPU"] == 4)


@pytest.mark.full
def test_a_service_that_is_killed_again_and_again_changes_nothing(tmp_path: Path) -> None:
    """Five jobs; STEEPEST_KILLS is how often (5)."""
    kills = int(os.environ.get("STEEPEST_KILLS", "5"))
    steps, names = 250 * (kills // 2), [f"job-{number}" for number in range(5)]
    spec: dict[str, Any] = {"data": {"global_batch": 24, "micro_batch": 3}, "eval_every": 250, "steps": steps}
    expected = hashes(
        run_here(job_config(tmp_path / "here", "tests.support.tasks:evaluated", arguments={"delay": 0.0}, **spec))
    )
    draw = random.Random(0)
    seen: dict[str, list[Event]] = {name: [] for name in names}
    with raylets([{"num_cpus": 8}]) as cluster:
        serve = (tmp_path / "data", "--ray-address", cluster)
        for number in range(kills + 1):
            ending = signal.SIGKILL if number < kills else signal.SIGINT
            with serving(*serve, ending=ending) as address, Client(address) as client:
                if number == 0:
                    for name in names:
                        job = client.submit(f"{TASKS}:evaluated", name=name, arguments={"delay": 0.008}, **spec)
                    until(lambda: all(client.job(name).get().state == "RUNNING" for name in names))
                for name in names:
                    after = seen[name][-1].sequence if seen[name] else 0
                    seen[name] += [event for event in client.job(name).events() if event.sequence > after]
                if number < kills:
                    time.sleep(draw.uniform(0.0, 2.0))
                    continue
                for name in names:
                    job = client.job(name)
                    info = job.wait()
                    assert (info.parameters_sha256, info.state_sha256) == expected
                    assert info.incarnation == 1
                    assert [record["step"] for record in job.history()] == list(range(steps))
                    assert [evaluation.step for evaluation in job.evaluations()] == list(range(250, steps + 1, 250))
                    events = job.events()
                    assert events[: len(seen[name])] == seen[name]
                    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
                    told = [event.reason for event in events if not event.reason.startswith("a service is back")]
                    assert len(told) == len(set(told))


@pytest.mark.full
def test_a_service_of_another_version_ends_what_it_does_not_understand(tmp_path: Path) -> None:
    spec: dict[str, Any] = {**SPEC, "steps": 4000, "checkpoint_every": 20}
    other = "import importlib.metadata as m; real = m.version; m.version = lambda n: '9' if n[0] == 's' else real(n)"
    with raylets([{"num_cpus": 4}]) as cluster:
        serve = (tmp_path / "data", "--ray-address", cluster)
        with serving(*serve, ending=signal.SIGKILL) as address, Client(address) as client:
            job = client.submit(f"{TASKS}:evaluated", name="old", arguments={"delay": 0.005}, **spec)
            until(lambda: job.get().step >= 50)
            pids = [member.pid for member in [*job.get().workers, *job.get().servers]]
        with serving(*serve, first=other) as address, Client(address) as client:
            job = client.job("old")
            until(lambda: job.get().state == "RECOVERING" and "version 9" in job.get().reason)
            assert is_documented("the cluster has another version", job.get().reason)
            until(lambda: not any(psutil.pid_exists(pid) for pid in pids))
            job.cancel()


@pytest.mark.full
def test_jobs_return_to_their_checkpoint_when_what_keeps_them_dies(tmp_path: Path) -> None:
    spec: dict[str, Any] = {**SPEC, "steps": 400, "checkpoint_every": 20}
    task = "tests.support.tasks:evaluated"
    expected = hashes(run_here(job_config(tmp_path / "here", task, arguments={"delay": 0.0}, **spec)))
    with (
        raylets([{"num_cpus": 4}]) as cluster,
        serving(tmp_path / "data", "--ray-address", cluster) as address,
        Client(address) as client,
    ):
        job = client.submit(f"{TASKS}:evaluated", arguments={"delay": 0.005}, **spec)
        until(lambda: job.get().step >= 50)
        [keeper] = [p for p in psutil.process_iter(["name", "cmdline"]) if "ray::KeptRooms" in str(p.info)]
        keeper.kill()
        info = job.wait()
        assert (info.parameters_sha256, info.state_sha256) == expected
        assert info.incarnation == 2
        [reason] = [event.reason for event in job.events() if event.state == "RECOVERING"][:1]
        assert is_documented("what keeps jobs on an existing cluster is killed", reason)
        assert [record["step"] for record in job.history()] == list(range(400))
