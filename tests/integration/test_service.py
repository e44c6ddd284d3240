"""Jobs through the service: gRPC, Ray actors, live changes, deaths. Bits are compared with a run in one process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from harness.local_job import hashes, job_config, run_here
from services.service import Service
from steepest.client import Client, Job
from steepest.errors import ConflictError, JobFailedError, NotFoundError, SpecError
from steepest.jobs import Event, JobInfo, Progress
from tests.support.choices import full
from tests.support.documented import is_documented
from tests.support.service import EXAMPLES, NUM_CPUS, until

pytestmark = pytest.mark.cluster

SLOW: dict[str, Any] = {"arguments": {"delay": 0.01}, "steps": 60, "data": {"global_batch": 24, "micro_batch": 3}}


@pytest.fixture(scope="module")
def slow_hashes(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Of SLOW, undisturbed, in one process."""
    raw = {**SLOW, "arguments": {"delay": 0.0}}
    return hashes(run_here(job_config(tmp_path_factory.mktemp("expected"), "tests.support.tasks:slow", **raw)))


def found(info: JobInfo) -> tuple[str, str]:
    return info.parameters_sha256, info.state_sha256


def reasons(job: Job) -> str:
    return "\n".join(u.reason for u in job.watch() if isinstance(u, Event))


@pytest.mark.parametrize(
    ("workers", "servers", "transport"),
    [full(1, 1, "auto"), full(3, 2, "auto"), (2, 3, "inline"), full(5, 1, "inline")],
)
def test_the_bits_do_not_depend_on_the_placement(
    client: Client, tmp_path: Path, workers: int, servers: int, transport: str
) -> None:
    raw: dict[str, Any] = {"steps": 8, "clip": {"norm": 0.5}, "schedule": {"name": "cosine", "warmup_steps": 2}}
    expected = hashes(run_here(job_config(tmp_path, "examples.digits:convnet", **raw)))
    placement = {"workers": workers, "servers": servers, "transport": transport}
    info = client.submit(f"{EXAMPLES / 'digits.py'}:convnet", placement=placement, **raw).wait()
    assert found(info) == expected
    assert (info.step, info.samples) == (8, 8 * 64)
    assert len(info.workers) == workers
    assert len(info.servers) == servers
    assert set(info.metrics) == {"accuracy", "loss"}


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def test_a_worker_killed_in_mid_step_leaves_no_trace(submit: Callable[..., Job], slow_hashes: tuple[str, str]) -> None:
    job = submit("slow", placement={"workers": 2, "servers": 2}, **SLOW)
    killed = {0}  # a pid that is not known yet; and a death is reported a moment after it
    for step in (5, 15):
        until(lambda step=step: job.get().step >= step)
        victim = until(lambda: [w for w in job.get().workers if w.state == "running" and w.pid not in killed])[0]
        kill(victim.pid)
        killed.add(victim.pid)
    info = job.wait()
    assert found(info) == slow_hashes
    said = reasons(job)
    assert f"{victim.id} (pid {victim.pid} on {victim.host}) was killed by signal 9 (SIGKILL)" in said
    assert is_documented("a worker is killed", said)
    assert "Ray" not in said
    assert [r["step"] for r in job.history()] == list(range(60))


@pytest.mark.parametrize("server", [full(0), full(1)])
def test_a_killed_server_costs_only_the_steps_since_the_checkpoint(
    submit: Callable[..., Job], slow_hashes: tuple[str, str], server: int
) -> None:
    job = submit("slow", placement={"workers": 2, "servers": 2}, checkpoint_every=10, **SLOW)
    until(lambda: job.get().step >= 15)
    victim = job.get().servers[server]
    kill(victim.pid)
    info = job.wait()
    assert found(info) == slow_hashes
    said = reasons(job)
    assert f"server-{server} (pid {victim.pid} on {victim.host}) was killed by signal 9 (SIGKILL)" in said
    assert is_documented("a server is killed", said)
    assert [r["step"] for r in job.history()] == list(range(60))


@pytest.mark.full
def test_by_default_a_killed_server_costs_no_more_than_the_clock_allows(
    submit: Callable[..., Job], slow_hashes: tuple[str, str]
) -> None:
    job = submit("slow", placement={"workers": 2, "servers": 2}, checkpoint_seconds=0.2, **SLOW)
    until(lambda: len(job.checkpoints()) >= 2)  # written while the job goes on, two servers' parts in each
    kill(job.get().servers[1].pid)
    assert found(job.wait()) == slow_hashes
    assert "; returning to the checkpoint of step " in reasons(job)
    assert [r["step"] for r in job.history()] == list(range(60))
    assert all(not checkpoint.problem for checkpoint in job.checkpoints())


def test_scaling_a_running_job_changes_only_its_speed(submit: Callable[..., Job], slow_hashes: tuple[str, str]) -> None:
    job = submit("slow", **{**SLOW, "arguments": {"delay": 0.03}})
    until(lambda: job.get().step >= 3)
    job.scale(3)
    until(lambda: any(record["workers"] == 3 for record in job.history()))
    job.scale(2)
    until(lambda: len(job.get().workers) == 2)
    info = job.wait()
    assert found(info) == slow_hashes
    assert {r["workers"] for r in job.history()} == {1, 2, 3}
    assert info.spec.placement.workers == 2


def test_a_pause_holds_at_a_step_boundary(submit: Callable[..., Job], slow_hashes: tuple[str, str]) -> None:
    job = submit("slow", placement={"workers": 2}, **SLOW)
    until(lambda: job.get().step >= 3)
    assert job.pause().state in ("PAUSING", "PAUSED")
    until(lambda: job.get().state == "PAUSED")
    step = job.get().step
    assert job.pause().state == "PAUSED"
    with pytest.raises(AssertionError, match="did not happen"):
        until(lambda: job.get().step > step, seconds=0.5)
    assert job.resume().state == "RUNNING"
    assert found(job.wait()) == slow_hashes


def test_a_cancelled_job_keeps_a_checkpoint(submit: Callable[..., Job], tmp_path: Path) -> None:
    job = submit("slow", **SLOW)
    with pytest.raises(ConflictError, match="has no checkpoint yet"):
        job.download(tmp_path)
    until(lambda: job.get().step >= 2)
    job.cancel()
    with pytest.raises(JobFailedError, match="CANCELLED"):
        job.wait()
    info = job.get()
    assert info.parameters_sha256
    job.download(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"model.safetensors", "optimizer.safetensors", "manifest.json"}
    assert info.state == "CANCELLED"
    with pytest.raises(ConflictError, match="is CANCELLED; cancel is possible in"):
        job.cancel()


def test_a_job_ends_when_its_time_is_over(submit: Callable[..., Job], service: Service) -> None:
    job = submit("slow", steps=100_000, arguments={"delay": 0.01}, max_seconds=2.0, checkpoint_every=5)
    until(lambda: job.get().step >= 5)
    kill(job.get().servers[0].pid)  # the seconds before a checkpoint count
    info = job.wait()
    assert info.reason == f"stopped at step {info.step} after 2 s of training (max_seconds)"
    assert 2.0 <= sum(record["step_seconds"] for record in job.history()) < 2.5
    assert job.checkpoints()[0].step == info.step


def test_jobs_queue_when_the_cluster_is_full_and_say_what_they_wait_for(submit: Callable[..., Job]) -> None:
    first = submit("slow", name="first", arguments={"delay": 0.05}, steps=10_000, placement={"workers": NUM_CPUS - 1})
    until(lambda: first.get().state == "RUNNING")
    second = submit("regression", steps=2, placement={"workers": 2})
    until(lambda: "waiting for 2 CPUs" in second.get().reason)
    assert is_documented("the cluster is full", second.get().reason)
    third = submit("regression", steps=2)
    until(lambda: "waiting behind" in third.get().reason)
    assert is_documented("a job that waits is behind another", third.get().reason)
    first.cancel()
    assert second.wait().state == "SUCCEEDED"
    assert third.wait().state == "SUCCEEDED"


def test_a_job_larger_than_the_cluster_says_so(submit: Callable[..., Job]) -> None:
    job = submit("regression", steps=2, placement={"workers": 500})
    until(lambda: "add nodes, or use fewer workers" in job.get().reason)
    job.cancel()
    assert until(lambda: job.get().has_ended)


def test_the_same_request_is_one_job_and_a_taken_name_is_refused(client: Client, submit: Callable[..., Job]) -> None:
    one = submit("regression", name="only-one", steps=2, request_id="r-1")
    two = submit("regression", name="other", steps=2, request_id="r-1")
    assert one.name == two.name == "trainingJobs/only-one"
    with pytest.raises(ConflictError, match="'only-one' is taken"):
        submit("regression", name="only-one", steps=2)
    with pytest.raises(SpecError, match="training_job_id"):
        submit("regression", name="Not A Name", steps=2)
    with pytest.raises(NotFoundError, match="trainingJobs/nobody"):
        client.job("nobody").get()
    assert one.wait().state == "SUCCEEDED"
    with pytest.raises(ConflictError, match="pause is possible in"):
        one.pause()
    listed = [info.job for info in client.list()]
    assert listed.count(one.name) == 1


def test_a_watch_shows_all_events_once_and_progress(submit: Callable[..., Job]) -> None:
    job = submit("slow", **{**SLOW, "steps": 20}, eval_every=0)
    updates = list(job.watch())
    events = [u for u in updates if isinstance(u, Event)]
    assert [e.sequence for e in events] == list(range(1, len(events) + 1))
    states = [e.state for e in events]
    assert states[0] == "QUEUED"
    assert states[-1] == "SUCCEEDED"
    progress = [u for u in updates if isinstance(u, Progress)]
    assert progress[-1].step == 20
    assert progress[-1].gradient_norm > 0
    assert isinstance(updates[-1], JobInfo)


def test_health_and_reflection(service: Service) -> None:
    name = "steepest.v1.TrainingJobService"
    with grpc.insecure_channel(f"127.0.0.1:{service.grpc_port}") as channel:
        checked = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name))
        assert checked.status == health_pb2.HealthCheckResponse.SERVING
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (reply,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]))
        assert name in {s.name for s in reply.list_services_response.service}


def test_evaluations_and_checkpoints_on_the_way(submit: Callable[..., Job], service: Service) -> None:
    job = submit("regression", steps=10, eval_every=3, checkpoint_every=2)
    info = job.wait()
    kept = sorted(p.name for p in service.settings.checkpoints_of(job.name.split("/")[1]).iterdir())
    assert kept == ["step-000000000006", "step-000000000008", "step-000000000010"]
    assert set(info.metrics) == {"loss"}


def test_a_client_finds_the_service_that_the_environment_names(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEEPEST_SERVER", client.address)
    with Client() as other:
        assert other.address == client.address
        assert {info.job for info in other.list()} == {info.job for info in client.list()}
