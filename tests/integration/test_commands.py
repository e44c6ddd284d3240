"""The command against a running service."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from services.service import Service
from steepest.client import Client, Job
from tests.support.command import Ran, run
from tests.support.documented import is_documented
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


def test_what_is_kept_of_a_job(steepest: Callable[..., Ran], submit: Callable[..., Job], tmp_path: Path) -> None:
    job = submit("regression", steps=6, checkpoint_every=2, eval_every=2, best={"metric": "loss"})
    job.wait()
    happened = json.loads(steepest("events", job.name, "--json").stdout)["events"]
    assert [event["sequence"] for event in happened] == list(range(1, len(happened) + 1))
    assert [happened[0]["state"], happened[-1]["state"]] == ["QUEUED", "SUCCEEDED"]
    assert happened[-1]["reason"] in steepest("events", job.name).stdout
    kept = json.loads(steepest("checkpoints", job.name, "--json").stdout)["checkpoints"]
    assert [checkpoint["step"] for checkpoint in kept] == [6, 4, 2]
    assert kept[0]["state_sha256"] == job.get().state_sha256
    assert [checkpoint["problem"] for checkpoint in kept] == ["", "", ""]
    assert [checkpoint["step"] for checkpoint in kept if checkpoint["best"]] == [job.get().best_step]
    assert steepest("checkpoints", job.name).stdout.count("step ") == 3

    fetched = tmp_path / "fetched"
    assert steepest("download", job.name, "--output", str(fetched)).returncode == 0
    verified = run("verify", str(fetched), "--json")
    assert (verified.returncode, json.loads(verified.stdout)["step"]) == (0, 6)
    with (fetched / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    torn = run("verify", str(fetched))
    assert torn.returncode == 1
    assert is_documented("a checkpoint is damaged", torn.stderr)

    picture, paper, table = tmp_path / "a.png", tmp_path / "a.html", tmp_path / "a.csv"
    assert steepest("plot", job.name, "--output", str(picture)).returncode == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert steepest("report", job.name, "--output", str(paper)).returncode == 0
    assert job.name in paper.read_text()
    assert steepest("export", job.name, "--output", str(table)).returncode == 0
    assert len(table.read_text().splitlines()) == 7
    for refused in (
        steepest("plot", job.name, "--output", str(tmp_path / "a.txt")),
        steepest("export", job.name, "--output", str(tmp_path / "a"), "--to", "excel"),
        steepest("report", "nobody", "--output", str(paper)),
    ):
        assert refused.returncode == 2
    assert "allowed: .png, .svg, .pdf" in steepest("plot", job.name, "--output", "x.txt").stderr

    assert json.loads(steepest("delete", job.name, "--json").stdout) == {"deleted": job.name}
    gone = steepest("get", job.name)
    assert gone.returncode == 2
    assert "there is no job" in gone.stderr


def test_jobs_are_found_by_their_labels(steepest: Callable[..., Ran]) -> None:
    task = f"{TASKS}:regression"
    made = steepest("submit", task, "--steps", "1", "--label", "team=vision", "--label", "for=Ann O.")
    assert made.returncode == 0, made.stderr
    listed = steepest("list", "--filter", 'labels.team = vision AND labels.for = "Ann O."', "--json")
    [job] = json.loads(listed.stdout)["jobs"]
    assert job["labels"] == {"for": "Ann O.", "team": "vision"}
    for label, said in (("Team=x", "labels"), ("team", "--label: 'team' is not of the form KEY=VALUE")):
        refused = steepest("submit", task, "--steps", "1", "--label", label)
        assert refused.returncode == 2
        assert said in refused.stderr
    about = steepest("info")
    assert "1 host" in about.stdout
    assert "you are anybody, admin" in about.stdout
    assert "as many calls as you like, 256 MB of code, packages with it" in about.stdout


def test_a_job_is_followed_for_a_tracker_while_it_runs(
    steepest: Callable[..., Ran], submit: Callable[..., Job], tmp_path: Path
) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    job = submit("slow", arguments={"delay": 0.005}, steps=60)
    ran = steepest("export", job.name, "--to", "tensorboard", "--output", str(tmp_path), "--follow")
    assert ran.returncode == 0, ran.stderr
    assert job.get().state == "SUCCEEDED"
    events = accumulators.EventAccumulator(str(tmp_path / job.name.removeprefix("trainingJobs/")))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(60))
    refused = steepest("export", job.name, "--output", str(tmp_path / "a.csv"), "--follow")
    assert refused.returncode == 2
    assert "allowed: --to tensorboard" in refused.stderr


def test_only_what_has_ended_is_deleted(steepest: Callable[..., Ran], submit: Callable[..., Job]) -> None:
    job = submit("slow", steps=100_000)
    refused = steepest("delete", job.name)
    assert refused.returncode == 2
    assert "delete is possible in" in refused.stderr
    job.cancel()


def test_the_doctor_says_what_works(steepest: Callable[..., Ran]) -> None:
    healthy = steepest("doctor", "--json")
    assert healthy.returncode == 0
    checks = {check["name"]: check for check in json.loads(healthy.stdout)["checks"]}
    assert checks["service"]["status"] == checks["packages"]["status"] == checks["shared memory"]["status"] == "ok"
    lonely = run("doctor", "--server", "127.0.0.1:1", "--ray-address", "127.0.0.1:1")
    assert lonely.returncode == 1
    assert "nothing answers at 127.0.0.1:1" in lonely.stdout
    assert "steepest serve starts one" in lonely.stdout


def test_top_shows_live_jobs_first(steepest: Callable[..., Ran], submit: Callable[..., Job]) -> None:
    done = submit("regression", steps=3)
    done.wait()
    job = submit("slow", steps=100_000)
    until(lambda: job.get().step >= 2)
    shown = steepest("top", "--once")
    assert shown.returncode == 0
    assert "RUNNING" in shown.stdout
    assert "SUCCEEDED" in shown.stdout
    assert job.name.removeprefix("trainingJobs/") in shown.stdout
    assert shown.stdout.index("RUNNING") < shown.stdout.index("SUCCEEDED")
    jobs = json.loads(steepest("top", "--json").stdout)["jobs"]
    assert {done.name, job.name} <= {each["job"] for each in jobs}


@pytest.mark.full
def test_of_jobs_that_wait_the_highest_priority_is_first(
    steepest: Callable[..., Ran], submit: Callable[..., Job], service: Service
) -> None:
    cpus = int(service.cluster.totals()["CPU"])
    holding = submit("slow", steps=100_000, data={"global_batch": 4 * cpus}, placement={"workers": cpus})
    until(lambda: holding.get().state == "RUNNING")
    early, late = (submit("regression", steps=2, placement={"workers": 2}) for _ in range(2))
    until(lambda: "waiting behind" in late.get().reason)
    raised = steepest("priority", late.name, "5", "--json")
    assert (raised.returncode, json.loads(raised.stdout)["priority"]) == (0, 5)
    assert steepest("priority", early.name, "-3").returncode == 0
    until(lambda: late.name in early.get().reason)
    assert any("priority changed from 0 to 5" in event.reason for event in late.events())
    holding.cancel()
    assert {early.wait().state, late.wait().state} == {"SUCCEEDED"}
    begun = [next(e.time for e in job.events() if e.state == "STARTING") for job in (late, early)]
    assert begun == sorted(begun)
    assert steepest("priority", late.name, "1").returncode == 2
    assert "allowed: -1000 to 1000" in steepest("priority", early.name, "5000").stderr
