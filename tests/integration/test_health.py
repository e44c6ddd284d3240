"""What is wrong with a real job is named soon, and nothing is said of a healthy one."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import pytest

from steepest.client import Client, Job
from steepest.errors import JobFailedError, SpecError
from steepest.jobs import Finding
from tests.support.choices import full
from tests.support.documented import is_documented
from tests.support.service import until

pytestmark = pytest.mark.cluster

SICK = "tests/support/sick.py"
BASE: dict[str, Any] = {"steps": 60, "optimizer": {"name": "sgd", "lr": 0.05}, "data": {"global_batch": 32}}


def findings(client: Client, function: str, **spec: Any) -> tuple[Job, tuple[Finding, ...]]:
    job = client.submit(f"{SICK}:{function}", **{**BASE, **spec})
    for _ in job.watch():
        pass  # until it has ended, well or not
    return job, job.get().findings


@pytest.mark.parametrize(
    ("function", "spec", "rule", "layer", "by"),
    [
        full("sigmoids", {}, "vanishing", "0.weight", 15),
        ("dead", {}, "dead_units", "0.weight", 15),
        full("healthy", {"optimizer": {"name": "momentum", "lr": 5.0}}, "diverging", None, 15),
        full("slow_input", {}, "input_bound", None, 30),
        ("large_weights", {}, "initialization", "6.weight", 0),
        full("large_weights", {}, "saturated", "5", 15),
        full("healthy", {"optimizer": {"name": "momentum", "lr": 50.0}}, "update_ratio", "2.weight", 15),
        full("healthy", {"optimizer": {"name": "sgd", "lr": 5e-6}}, "update_ratio", None, 15),
        full("recurrent", {"optimizer": {"name": "sgd", "lr": 1e-12}}, "exploding", "cell.weight_hh_l0", 40),
    ],
)
def test_a_fault_is_named_within_some_steps(
    client: Client, function: str, spec: dict[str, Any], rule: str, layer: str | None, by: int
) -> None:
    job, found = findings(client, function, **spec)
    [finding] = [each for each in found if each.rule == rule]
    assert finding.layer == layer
    assert finding.step <= by
    as_dict = job.get().to_dict()["findings"]
    assert [each["rule"] for each in as_dict] == [each.rule for each in found]


@pytest.mark.full
def test_a_worker_that_is_slower_than_the_others_is_named(client: Client, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    job = client.submit(
        f"{SICK}:straggler", arguments={"mark": str(mark)}, **{**BASE, "steps": 100, "placement": {"workers": 2}}
    )
    job.wait()
    info = job.get()
    [finding] = [each for each in info.findings if each.rule == "straggler"]
    [lame] = [worker.id for worker in info.workers if str(worker.pid) == mark.read_text()]
    assert finding.worker == lame


def test_a_sample_that_is_not_a_number_is_blamed_by_its_number(client: Client) -> None:
    job = client.submit(f"{SICK}:one_bad_sample", **BASE)
    with pytest.raises(JobFailedError, match="not finite"):
        job.wait()
    [finding] = job.get().findings
    assert (finding.rule, finding.severity, finding.worker) == ("nonfinite", "critical", "worker-0")
    assert finding.micro_batch in (0, 1)
    assert finding.samples == (77,)


def test_a_corrupt_shard_of_data_is_blamed_by_its_samples(client: Client) -> None:
    spec = {**BASE, "data": {"global_batch": 16, "micro_batch": 8, "shuffle": False}, "steps": 40}
    spec["telemetry"] = {"every": 7}  # the step that stands out is kept all the same
    hashes = set()
    for workers in (1, 2):
        job = client.submit(f"{SICK}:corrupt_shard", **spec, placement={"workers": workers})
        hashes.add(job.wait().parameters_sha256)
        [finding] = [each for each in job.get().findings if each.rule == "outlier"]
        assert finding.step == 10  # samples 160 to 175
        assert finding.samples in (tuple(range(160, 168)), tuple(range(168, 176)))
        assert finding.micro_batch == (finding.samples[0] - 160) // 8
        assert (finding.worker or "").startswith("worker-")
    assert len(hashes) == 1  # to look at a micro-batch again leaves nothing behind


def test_a_rule_acts_as_the_spec_says(client: Client) -> None:
    actions = {"dead_units": "pause", "update_ratio": "ignore"}
    job = client.submit(f"{SICK}:dead", **{**BASE, "steps": 100_000}, health={"actions": actions})
    until(lambda: job.get().state == "PAUSED" or job.get().has_ended)
    info = job.get()
    assert info.state == "PAUSED"
    assert "update_ratio" not in {finding.rule for finding in info.findings}
    reasons = [event.reason for event in job.events() if event.state == "PAUSING"]
    assert "pause asked for by the rule dead_units (health.actions.dead_units)" in reasons[0]
    job.resume()
    job.cancel()
    until(lambda: job.get().has_ended)
    with pytest.raises(SpecError, match=r"health\.actions\.diverging.*'explode'"):
        client.submit(f"{SICK}:healthy", **BASE, health={"actions": {"diverging": "explode"}})


@pytest.mark.full
def test_a_job_that_diverges_goes_back_with_a_smaller_rate_until_it_does_not(client: Client) -> None:
    base = {**BASE, "optimizer": {"name": "momentum", "lr": 40.0}, "steps": 400, "checkpoint_every": 20}
    rules = dict.fromkeys(("diverging", "exploding", "nonfinite", "update_ratio"), "rollback")
    job = client.submit(
        f"{SICK}:healthy",
        **base,
        schedule={"name": "constant", "warmup_steps": 100},
        health={"actions": rules, "rollback_factor": 0.05, "max_rollbacks": 4},
    )
    info = job.wait()
    reasons = [event.reason for event in job.events() if event.state == "RECOVERING"]
    assert reasons
    assert is_documented("a job goes back for the learning rate", reasons[0])
    records = list(job.history())
    assert [record["step"] for record in records] == list(range(400))
    assert records[-1]["lr"] == pytest.approx(40.0 * 0.05 ** len(reasons))
    assert records[-1]["loss"] < records[0]["loss"]
    assert info.state == "SUCCEEDED"
    assert [change.lr_scale for change in info.changes] == [0.05] * len(reasons)
    replayed = client.replay(job.name, workers=2)
    assert replayed.wait().state_sha256 == info.state_sha256


def test_a_job_goes_back_and_leaves_out_the_samples_that_are_to_blame(client: Client) -> None:
    spec = {**BASE, "checkpoint_every": 2, "steps": 30}
    job = client.submit(f"{SICK}:one_bad_sample", **spec, health={"actions": {"nonfinite": "rollback"}})
    info = job.wait()
    [finding] = info.findings
    [change] = info.changes
    assert (change.skip_samples, change.lr_scale) == ((77,), 1.0)
    assert finding.step - 2 < change.step <= finding.step
    [reason] = [event.reason for event in job.events() if event.state == "RECOVERING"]
    assert is_documented("a job goes back for a sample", reason)
    records = {record["step"]: record for record in job.history()}
    assert list(records) == list(range(30))
    assert records[finding.step]["samples"] == 31  # of 32
    assert {record["lr"] for record in records.values()} == {0.05}
    again = client.replay(job.name, name="again", workers=2)
    replayed = again.wait()
    assert replayed.state_sha256 == info.state_sha256
    assert (replayed.findings, replayed.incarnation, len(replayed.workers)) == ((), 1, 2)
    assert replayed.spec.changes == info.changes
    assert replayed.to_dict()["changes"] == info.to_dict()["changes"]


@pytest.mark.full
def test_a_corrupt_shard_of_data_is_left_out(client: Client) -> None:
    spec = {
        **BASE,
        "data": {"global_batch": 16, "micro_batch": 8, "shuffle": False},
        "steps": 60,
        "checkpoint_every": 5,
    }
    job = client.submit(f"{SICK}:corrupt_shard", **spec, health={"actions": {"outlier": "rollback"}})
    info = job.wait()
    left_out = {sample for change in info.changes for sample in change.skip_samples}
    assert left_out <= set(range(160, 176))
    assert len(left_out) >= 12  # by chance, a target times a thousand may still be small
    assert {change.lr_scale for change in info.changes} == {1.0}
    records = {record["step"]: record for record in job.history()}
    empty = [step for step, record in records.items() if record["samples"] == 0]
    assert set(empty) <= {10, 26, 42, 58}  # nothing is left of them; when the last was found is up to the worker
    assert empty[-1] == 58
    assert all(records[step]["skipped"] for step in empty)
    for workers in (1, 2):
        assert client.replay(job.name, workers=workers).wait().state_sha256 == info.state_sha256


def test_steps_whose_gradient_explodes_are_not_taken(client: Client) -> None:
    spec = {**BASE, "optimizer": {"name": "sgd", "lr": 1e-12}, "health": {"actions": {"exploding": "skip"}}}
    hashes, steps = set(), set()
    for workers in (1, 2):
        job = client.submit(f"{SICK}:recurrent", **spec, checkpoint_every=15, placement={"workers": workers})
        info = job.wait()
        [finding] = [each for each in info.findings if each.rule == "exploding"]
        assert "and the step was not taken" in finding.message
        records = {record["step"]: record for record in job.history()}
        skipped = [step for step, record in records.items() if record["skipped"]]
        assert skipped[0] == finding.step
        assert len(skipped) > 3  # once an epoch
        usual = 100 * median(record["gradient_norm"] for record in records.values())
        assert skipped == [step for step, record in records.items() if step >= 10 and record["gradient_norm"] > usual]
        assert all(records[step]["clip_coefficient"] == 0 for step in skipped)
        hashes.add(info.state_sha256)
        steps.add(tuple(skipped))
    assert len(hashes) == len(steps) == 1
    with pytest.raises(SpecError, match=r"actions\.stalled = 'skip'.*allowed for exploding and nonfinite"):
        client.submit(f"{SICK}:recurrent", **BASE, health={"actions": {"stalled": "skip"}})


def test_samples_that_are_not_there_cannot_be_left_out(client: Client) -> None:
    with pytest.raises(SpecError, match=r"changes\.1\.skip_samples: 256 is not there; allowed: 0 to 255"):
        client.submit(f"{SICK}:healthy", **BASE, changes=[{"lr_scale": 0.5}, {"skip_samples": [3, 256]}])
    with pytest.raises(SpecError, match=r"changes: of 256 samples they leave 0, and a step has 32"):
        client.submit(f"{SICK}:healthy", **BASE, changes=[{"skip_samples": list(range(256))}])
    nothing_first = [{"skip_samples": list(range(16))}]  # of the first micro-batch
    data = {"global_batch": 32, "micro_batch": 16, "shuffle": False}
    assert client.submit(f"{SICK}:healthy", **{**BASE, "data": data}, changes=nothing_first).wait().step == 60
    with pytest.raises(SpecError, match=r"changes\.0\.rate: no such field; allowed: step, lr_scale, skip_samples"):
        client.submit(f"{SICK}:healthy", **BASE, changes=[{"rate": 0.5}])


def test_rollbacks_that_do_not_help_end_the_job(client: Client) -> None:
    health = {"actions": {"nonfinite": "rollback"}, "max_rollbacks": 2}
    job = client.submit(f"{SICK}:breaks_down", **BASE, health=health)
    with pytest.raises(JobFailedError) as raised:
        job.wait()
    assert is_documented("rollbacks have not helped", str(raised.value))
    info = job.get()
    assert [finding.samples for finding in info.findings] == [None] * 3
    assert "rollbacks have not helped" in job.events()[-1].reason


def test_a_job_that_is_stuck_says_so(client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.jobs.staleness.LEAST_SECONDS", 1.5)
    arguments = {"mark": str(tmp_path / "mark"), "seconds": 6.0}
    job = client.submit(f"{SICK}:stuck", **BASE, arguments=arguments, health={"actions": {"staleness": "pause"}})
    until(lambda: job.get().state == "PAUSED")
    [finding] = [each for each in job.get().findings if each.rule == "staleness"]
    assert finding.step > 10
    assert is_documented("a job is stuck", "\n".join(event.reason for event in job.events()))
    job.resume()
    assert job.wait().step == BASE["steps"]


@pytest.mark.full
def test_nothing_is_said_of_a_healthy_job(client: Client) -> None:
    job, found = findings(client, "healthy", steps=1500, eval_every=100)
    assert found == ()
    assert job.get().to_dict()["findings"] == []
