"""What is wrong with a real job is named soon, and nothing is said of a healthy one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from steepest.client import Client, Job
from steepest.errors import JobFailedError, SpecError
from steepest.jobs import Finding
from tests.support.choices import full
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
    assert "with 0.05 times the learning rate of the spec" in reasons[0]
    records = list(job.history())
    assert [record["step"] for record in records] == list(range(400))
    assert records[-1]["lr"] == pytest.approx(40.0 * 0.05 ** len(reasons))
    assert records[-1]["loss"] < records[0]["loss"]
    assert info.state == "SUCCEEDED"


def test_rollbacks_that_do_not_help_end_the_job(client: Client) -> None:
    health = {"actions": {"nonfinite": "rollback"}, "max_rollbacks": 2}
    job = client.submit(f"{SICK}:one_bad_sample", **BASE, health=health)
    with pytest.raises(JobFailedError, match=r"after 2 rollbacks; health\.max_rollbacks = 2"):
        job.wait()
    info = job.get()
    assert [finding.samples for finding in info.findings] == [(77,)] * 3
    assert "rollbacks have not helped" in job.events()[-1].reason


@pytest.mark.full
def test_nothing_is_said_of_a_healthy_job(client: Client) -> None:
    job, found = findings(client, "healthy", steps=1500, eval_every=100)
    assert found == ()
    assert job.get().to_dict()["findings"] == []
