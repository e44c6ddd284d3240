"""What users do wrong: refused at once with one clear message, or FAILED with the cause and nothing else harmed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from services.service import Service
from steepest.client import Client, Job
from steepest.errors import SpecError
from steepest.jobs import Event, JobInfo
from tests.support.choices import full
from tests.support.documented import is_documented
from tests.support.service import BROUGHT, EXAMPLES, NUM_CPUS, TASKS, until

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize(
    ("function", "arguments", "field", "words"),
    [
        (
            "raises",
            {},
            "task.function",
            ["KeyError", "Traceback", 'raise KeyError("no such column")'],
        ),
        full("returns_nothing", {}, "task.function", ["returned NoneType", "steepest.Task"]),
        full("exits", {}, "task.function", ["SystemExit"]),
        full("without_parameters", {}, "task.model", ["no trainable parameters"]),
        full("vector_loss", {}, "task.loss", ["loss must return a scalar tensor", "shape (2, 3)"]),
        full("without_data", {}, "task.train_data", ["is empty"]),
        ("regression", {"depth": 2}, "task.arguments.depth", ["'depth'", "rows, hidden, dtype"]),
    ],
)
def test_a_task_that_cannot_be_used_is_refused_before_anything_starts(
    client: Client, function: str, arguments: dict[str, Any], field: str, words: list[str]
) -> None:
    before = [info.job for info in client.list()]
    with pytest.raises(SpecError) as caught:
        client.submit(f"{TASKS}:{function}", arguments=arguments, steps=2)
    (violation,) = caught.value.violations
    assert violation.field == field
    assert all(word in violation.problem for word in words), violation.problem
    assert [info.job for info in client.list()] == before


@pytest.mark.full
def test_a_module_that_is_not_installed(client: Client) -> None:
    with pytest.raises(SpecError, match="there is no module 'surely_not_there'"):
        client.submit("surely_not_there:f", steps=2)


def test_a_device_that_is_not_there(client: Client) -> None:
    with pytest.raises(SpecError, match=r"placement\.device: 'cuda' is not there"):
        client.submit(f"{TASKS}:regression", steps=2, placement={"device": "cuda"})


def test_a_warm_up_longer_than_the_job(client: Client) -> None:
    with pytest.raises(SpecError, match=r"schedule\.warmup_steps: 50 leaves nothing of the 4 steps"):
        client.submit(f"{TASKS}:regression", epochs=2, schedule={"warmup_steps": 50})


@pytest.fixture(scope="module")
def bystander(client: Client) -> Iterator[Job]:
    """A job that goes on all the while."""
    job = client.submit(f"{TASKS}:slow", arguments={"delay": 0.05}, steps=100_000)
    until(lambda: job.get().state == "RUNNING")
    yield job
    job.cancel()
    until(lambda: job.get().has_ended)


def _free_cpus() -> float:
    return float(ray.available_resources().get("CPU", 0.0))


@pytest.mark.parametrize(
    ("function", "spec", "failure"),
    [
        full("nonfinite_loss", {}, "a loss is not finite"),
        ("nonfinite_gradient", {}, "a gradient is not finite"),
        ("failing_dataset", {}, "user code raises"),
        full("misbehaving", {"arguments": {"how": "exit"}}, "user code exits"),
        (
            "misbehaving",
            {"arguments": {"how": "die"}, "placement": {"max_worker_restarts": 1}},
            "a worker is killed again and again",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_job_that_fails_says_why_and_frees_everything(
    submit: Callable[..., Job], bystander: Job, service: Service, function: str, spec: dict[str, Any], failure: str
) -> None:
    spec = {"steps": 50, "data": {"global_batch": 64}, **spec}
    spec["placement"] = {"workers": 2, **spec.get("placement", {})}
    job = submit(function, **spec)
    info = until(lambda: job.get() if job.get().has_ended else None)
    assert info.state == "FAILED"
    assert info.error is not None
    assert is_documented(failure, info.error)
    until(lambda: _free_cpus() == NUM_CPUS - 1)
    until(lambda: len(service.running.all()) == 1)
    pids = [m.pid for m in (*info.workers, *info.servers) if m.pid]
    until(lambda: not any(psutil.pid_exists(pid) for pid in pids))
    step = bystander.get().step
    until(lambda: bystander.get().step > step)


def test_a_parameter_that_is_written_to_in_mid_training_fails_the_job(client: Client) -> None:
    job = client.submit(f"{BROUGHT}:writes_to_a_parameter_later", steps=10)
    assert is_documented("the forward pass writes to a parameter", str(_failed(job).error))


def test_a_metric_that_fails_in_the_end_does_not_lose_the_model(client: Client, tmp_path: Path) -> None:
    job = client.submit(f"{BROUGHT}:metric_that_raises_later", steps=5)
    info = _failed(job)
    assert "KeyError: 5" in str(info.error)
    assert info.step == 5
    job.download(tmp_path)
    assert (tmp_path / "model.safetensors").exists()


def _failed(job: Job) -> JobInfo:
    info = until(lambda: job.get() if job.get().has_ended else None)
    assert info.state == "FAILED"
    return info


def test_a_step_that_is_not_finite_can_be_skipped(submit: Callable[..., Job]) -> None:
    job = submit("nonfinite_loss", steps=4, data={"global_batch": 64}, on_nonfinite="skip")
    assert job.wait().state == "SUCCEEDED"
    skipped = [record["skipped"] for record in job.history()]
    assert len(skipped) == 4
    assert any(skipped)
    assert not all(skipped)


@pytest.mark.parametrize("how", [full("print"), "threads"])
def test_noise_and_threads_of_user_code_do_no_harm(submit: Callable[..., Job], how: str) -> None:
    job = submit("misbehaving", arguments={"how": how}, steps=5)
    info = job.wait()
    assert info.step == 5
    pids = [m.pid for m in info.workers]
    until(lambda: not any(psutil.pid_exists(pid) for pid in pids))


def test_a_worker_that_hangs_is_replaced(submit: Callable[..., Job], tmp_path: Path) -> None:
    job = submit(
        "misbehaving",
        arguments={"how": "hang", "marker": str(tmp_path / "hung")},
        steps=8,
        placement={"worker_timeout_seconds": 5.0},
    )
    assert job.wait().step == 8
    said = "\n".join(u.reason for u in job.watch() if isinstance(u, Event))
    assert is_documented("a worker hangs", said)


def _segments(job: Job) -> list[str]:
    """Shared segments of a job that any process still maps."""
    mark = job.name.removeprefix("trainingJobs/")
    found = []
    for process in psutil.process_iter():
        try:
            found += [m.path for m in process.memory_maps(grouped=False) if "steepest-" in m.path and mark in m.path]
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


@pytest.mark.full
def test_ten_thousand_steps_leave_no_growth_and_no_segment(client: Client) -> None:
    placement = {"workers": 2, "servers": 2}
    # No checkpoint in between: the pages of the code that writes it would count as shared.
    job = client.submit(f"{EXAMPLES / 'digits.py'}:mlp", steps=10_000, placement=placement, checkpoint_seconds=0)
    until(lambda: job.get().step >= 2_000, 120)
    members = (*job.get().workers, *job.get().servers)
    processes = [psutil.Process(m.pid) for m in members] + [psutil.Process()]
    early = [p.memory_info() for p in processes]
    step = until(lambda: job.get().step >= 9_000 and job.get().step, 240)
    assert step < 10_000, "the job ended before it was measured"
    late = [p.memory_info() for p in processes]
    assert _segments(job)
    assert job.wait().step == 10_000
    for process, before, after in zip(processes, early, late, strict=True):
        grown = after.rss - before.rss
        assert grown < 12 << 20, f"{process.pid} grew by {grown} bytes over {step - 2000} steps"
        assert after.shared - before.shared < 1 << 20
    until(lambda: not _segments(job))
