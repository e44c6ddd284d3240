"""The edges of the gRPC interface: pages, limits, time-outs, a full disk, checkpoints that go while they are read."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grpc
import pytest

from services.jobs.task_probe import TaskProbe
from services.service import Service
from steepest.client import Client, Job
from steepest.errors import ChangedError, SpecError
from steepest.v1 import training_jobs_pb2 as pb
from steepest.v1 import training_jobs_pb2_grpc as pb_grpc
from tests.support.documented import is_documented
from tests.support.service import TASKS, until

pytestmark = pytest.mark.cluster


@pytest.fixture
def stub(service: Service) -> Iterator[pb_grpc.TrainingJobServiceStub]:
    with grpc.insecure_channel(f"127.0.0.1:{service.grpc_port}") as channel:
        yield pb_grpc.TrainingJobServiceStub(channel)


def test_pages_hold_every_job_once(stub: Any, submit: Callable[..., Job]) -> None:
    names = {submit("regression", steps=1).name for _ in range(2)}
    found: list[str] = []
    token = ""
    while True:
        page = stub.ListTrainingJobs(pb.ListTrainingJobsRequest(page_size=1, page_token=token))
        assert len(page.training_jobs) <= 1
        found += [job.name for job in page.training_jobs]
        token = page.next_page_token
        if not token:
            break
    assert len(found) == len(set(found))
    assert names <= set(found)


@pytest.mark.parametrize("request_", [{"page_token": "bm9uc2Vuc2U="}, {"page_token": "%"}, {"page_size": -1}])
def test_a_page_that_cannot_be_is_refused(stub: Any, request_: dict[str, Any]) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.ListTrainingJobs(pb.ListTrainingJobsRequest(**request_))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_code_beyond_the_limit_is_refused(stub: Any, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    piece = b"\0" * (1 << 20)
    limit = service.settings.max_code_bytes >> 20
    with pytest.raises(grpc.RpcError) as caught:
        stub.UploadCode(pb.UploadCodeRequest(data=piece) for _ in range(limit + 1))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert f"the code is larger than {service.settings.max_code_bytes} bytes" in caught.value.details()


def test_records_of_every_third_step(submit: Callable[..., Job]) -> None:
    job = submit("regression", steps=8, telemetry={"every": 3, "parameter_norms": False})
    info = job.wait()
    assert [r["step"] for r in job.history()] == [0, 3, 6]
    assert info.step == 8
    assert info.loss is not None
    assert all(not r["parameter_norms"] for r in job.history())


def test_histograms_are_the_same_at_any_placement(submit: Callable[..., Job]) -> None:
    jobs = [
        submit("regression", steps=8, telemetry={"histograms_every": 3}, placement={"workers": count, "servers": count})
        for count in (1, 2)
    ]
    for job in jobs:
        assert job.wait().state == "SUCCEEDED"
    first, second = (list(job.histograms()) for job in jobs)
    assert [each.step for each in first] == [0, 3, 6]
    assert first == second
    records = {record["step"]: record for record in jobs[0].history(signals=True)}
    for each in first:
        signals = records[each.step]["signals"]
        for name, counts in each.counts.items():
            largest = max(index for index, number in enumerate(counts) if number)
            assert each.edges[largest] <= signals["max_abs"][name] < each.edges[largest + 1]
    [name, *_] = first[0].counts
    assert [each.counts for each in jobs[0].histograms([name], first_step=3)] == [
        {name: each.counts[name]} for each in first[1:]
    ]
    with pytest.raises(SpecError, match="'nowhere' is no parameter"):
        list(jobs[0].histograms(["nowhere"]))


def test_an_etag_is_that_of_the_job_as_it_was_seen(stub: Any, submit: Callable[..., Job]) -> None:
    job = submit("slow", steps=100_000)
    until(lambda: job.get().step > 1)
    seen = job.get()
    assert job.get().etag == seen.etag  # progress is no change
    job.scale(2, etag=seen.etag)
    with pytest.raises(ChangedError, match=r"has changed since you saw it: it is RUNNING now, with 2 workers"):
        job.pause(etag=seen.etag)
    with pytest.raises(grpc.RpcError) as refused:
        stub.CancelTrainingJob(pb.CancelTrainingJobRequest(name=job.name, etag=seen.etag))
    assert refused.value.code() == grpc.StatusCode.ABORTED
    for act in (lambda etag: job.set_priority(3, etag=etag), lambda etag: job.cancel(etag=etag)):
        with pytest.raises(ChangedError):
            act(seen.etag)
        act(job.get().etag)
    until(lambda: job.get().has_ended)
    with pytest.raises(ChangedError):
        job.delete(etag=seen.etag)
    job.delete(etag=job.get().etag)


def test_a_watch_goes_on_without_a_gap_or_is_refused(stub: Any, submit: Callable[..., Job]) -> None:
    job = submit("regression", steps=3)
    job.wait()
    events = [event.sequence for event in job.events()]
    for after in (0, 1, events[-1]):
        request = pb.WatchTrainingJobRequest(name=job.name, after_sequence=after)
        updates = list(stub.WatchTrainingJob(request))
        assert [u.event.sequence for u in updates if u.WhichOneof("update") == "event"] == events[after:]
        assert updates[-1].ended.status.step == 3
    with pytest.raises(grpc.RpcError) as refused:
        list(stub.WatchTrainingJob(pb.WatchTrainingJobRequest(name=job.name, after_sequence=events[-1] + 1)))
    assert refused.value.code() == grpc.StatusCode.OUT_OF_RANGE


def test_many_who_watch_see_the_same(service: Service, stub: Any, submit: Callable[..., Job]) -> None:
    job = submit("slow", arguments={"delay": 0.002}, steps=2000)
    seen: list[list[int]] = [[] for _ in range(300)]  # more than a pool of threads for short calls would hold
    streams = [stub.WatchTrainingJob(pb.WatchTrainingJobRequest(name=job.name)) for _ in seen]

    def follow(index: int) -> None:
        for update in streams[index]:
            if update.WhichOneof("update") == "event":
                seen[index].append(update.event.sequence)

    threads = [threading.Thread(target=follow, args=(index,)) for index in range(len(seen))]
    for thread in threads:
        thread.start()
    assert job.set_priority(2).priority == 2  # others are still answered
    job.wait()
    for thread in threads:
        thread.join(30)
    assert {tuple(own) for own in seen} == {tuple(range(1, len(job.events()) + 1))}


def test_streams_beyond_the_limit_are_refused(
    stub: Any, submit: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit("slow", steps=100_000)
    monkeypatch.setattr("services.api.watches.MAX_STREAMS", 1)
    stream = stub.WatchTrainingJob(pb.WatchTrainingJobRequest(name=job.name))
    next(stream)
    with pytest.raises(grpc.RpcError, match="streams are open here"):
        next(stub.StreamLogs(pb.StreamLogsRequest(name=job.name, follow=True)))
    stream.cancel()


def test_a_service_says_what_it_is(client: Client, service: Service, submit: Callable[..., Job]) -> None:
    submit("regression", steps=1).wait()
    found = client.server_info()
    assert (found.not_ready, found.hosts, found.role, found.needs_token, found.tls) == ("", 1, "admin", False, False)
    assert found.resources["CPU"] >= found.free_resources["CPU"] >= 0
    assert found.jobs["SUCCEEDED"] >= 1
    assert found.version == version("steepest")
    assert time.time() - 3600 < found.started < time.time()
    assert (found.calls_per_second, found.allows_requirements, found.exchange_tls) == (0.0, True, False)
    assert json.loads(json.dumps(found.to_dict()))["max_code_bytes"] == service.settings.max_code_bytes


def test_callbacks_are_told_of_every_step_evaluation_and_checkpoint(submit: Callable[..., Job]) -> None:
    told: dict[str, list[int]] = {"steps": [], "evaluations": [], "checkpoints": []}
    job = submit("evaluated", arguments={"delay": 0.003}, steps=120, eval_every=40, checkpoint_every=60)
    info = job.wait(
        on_step=lambda record: told["steps"].append(record["step"]),
        on_evaluation=lambda evaluation: told["evaluations"].append(evaluation.step),
        on_checkpoint=lambda checkpoint: told["checkpoints"].append(checkpoint.step),
    )
    assert told == {"steps": list(range(120)), "evaluations": [40, 80, 120], "checkpoints": [60, 120]}
    assert job.evaluations(after=80)[0].metrics == info.metrics
    assert [checkpoint.step for checkpoint in job.checkpoints(after=60)] == [120]


def test_what_a_callback_raises_ends_the_wait_and_not_the_job(submit: Callable[..., Job]) -> None:
    job = submit("regression", steps=8)

    def fails(record: dict[str, Any]) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        job.wait(on_step=fails)
    assert job.wait().state == "SUCCEEDED"


@pytest.mark.full
def test_a_download_goes_on_while_checkpoints_are_pruned(
    stub: Any, service: Service, submit: Callable[..., Job]
) -> None:
    job = submit("regression", arguments={"hidden": 200_000}, steps=12, checkpoint_every=1)
    directory = service.settings.checkpoints_of(job.name.removeprefix("trainingJobs/"))
    until(lambda: list(directory.glob("step-*")))
    pieces = stub.DownloadCheckpoint(pb.DownloadCheckpointRequest(name=job.name))
    first = next(pieces)
    job.wait()
    until(lambda: len(list(directory.glob("step-*"))) == 3)
    assert {"step-000000000012"} <= {path.name for path in directory.glob("step-*")}
    files = {first.file} | {piece.file for piece in pieces}
    assert files == {"manifest.json", "model.safetensors", "optimizer.safetensors"}


@contextlib.contextmanager
def small_disk(directory: Path, size: str) -> Iterator[None]:
    """A disk of its own for a directory that is not there yet."""
    if os.geteuid():
        pytest.skip("mounting a file system needs root")
    directory.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
    mounted = subprocess.run(command, check=False, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def test_a_full_disk_is_told_and_the_last_checkpoint_stays(submit: Callable[..., Job], service: Service) -> None:
    name = "on-a-small-disk"
    directory = service.settings.checkpoints_of(name)
    with small_disk(directory, "256k"):
        job = submit("regression", name=name, arguments={"hidden": 1000}, steps=12, checkpoint_every=2)
        info = until(lambda: job.get() if job.get().has_ended else None)
        assert info.state == "FAILED"
        said = "\n".join(event.reason for event in job.events())
        assert "the checkpoint of step 4 could not be written" in said
        assert is_documented("the disk is full", said)
        assert [path.name for path in directory.glob("step-*")] == ["step-000000000002"]
        assert info.parameters_sha256


def test_a_disk_without_room_for_records_costs_records_alone(submit: Callable[..., Job], service: Service) -> None:
    name = "without-records"
    with small_disk(service.settings.history_of(name), "128k"):
        job = submit("regression", name=name, steps=2000)
        assert job.wait().step == 2000
        assert is_documented("there is no room for records", "\n".join(event.reason for event in job.events()))
        assert 0 < len(list(job.history())) < 2000


def test_a_task_that_does_not_return_is_refused_in_time(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    describe = TaskProbe.describe
    monkeypatch.setattr(TaskProbe, "describe", lambda probe, spec, code, *_: describe(probe, spec, code, 1.0))
    with pytest.raises(SpecError, match=r"tasks:sleeps did not return within 1 s"):
        client.submit(f"{TASKS}:sleeps", steps=1)
