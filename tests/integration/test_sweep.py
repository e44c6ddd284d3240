"""Sweeps on a real service."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.local_job import hashes, job_config, run_here
from services.service import Service
from steepest.client import Job
from tests.support.command import run
from tests.support.service import EXAMPLES, TASKS

pytestmark = pytest.mark.cluster


@pytest.mark.full
def test_a_grid_runs_once_and_its_best_trial_is_first(service: Service, tmp_path: Path) -> None:
    server = ["--server", f"127.0.0.1:{service.grpc_port}"]
    command = [
        "sweep", f"{EXAMPLES / 'digits.py'}:mlp", "--steps", "20", "--name", "grid",
        "--metric", "accuracy", "--maximize",
        "--grid", "optimizer.lr=1e-5,1e-2", "--grid", "arg.hidden=16,32", *server,
    ]  # fmt: skip
    ran = run(*command, "--json", "--output", str(tmp_path / "sweep.json"))
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert json.loads((tmp_path / "sweep.json").read_text()) == found
    assert [trial["job"] for trial in found["trials"]] == [f"trainingJobs/grid-{n}" for n in range(4)]
    tried = {(t["parameters"]["optimizer.lr"], t["parameters"]["arg.hidden"]) for t in found["trials"]}
    assert tried == {(lr, hidden) for lr in (1e-5, 1e-2) for hidden in (16, 32)}
    best = found["best"]
    assert best["value"] == max(trial["value"] for trial in found["trials"])
    assert best["parameters"]["optimizer.lr"] == 1e-2
    # A trial is the job that it would be by itself.
    arguments = {"hidden": best["parameters"]["arg.hidden"]}
    config = job_config(tmp_path / "here", "examples.digits:mlp", arguments=arguments, steps=20, optimizer={"lr": 1e-2})
    got = json.loads(run("get", best["job"], "--json", *server).stdout)
    assert (got["parameters_sha256"], got["state_sha256"]) == hashes(run_here(config))
    again = run(*command)
    assert again.returncode == 0, again.stderr
    assert "the best so far" in again.stderr
    assert again.stdout.split()[5].startswith("trainingJobs/grid-")
    listed = json.loads(run("list", "--json", *server).stdout)["jobs"]
    assert sum(job["job"].startswith("trainingJobs/grid-") for job in listed) == 4  # none was made twice


@pytest.mark.full
def test_hopeless_trials_are_given_up(service: Service) -> None:
    ran = run(
        "sweep", f"{EXAMPLES / 'digits.py'}:mlp", "--steps", "1500", "--eval-every", "50", "--name", "hopeless",
        "--grid", "optimizer.lr=1e-2,2e-2,5e-3,3e-2,1e-7,1e-8", "--give-up", "--parallel", "1",
        "--server", f"127.0.0.1:{service.grpc_port}", "--json",
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    trials = json.loads(ran.stdout)["trials"]
    assert [trial["given_up"] for trial in trials] == [False, False, False, False, True, True]
    assert {trial["state"] for trial in trials[4:]} == {"CANCELLED"}


@pytest.mark.full
def test_a_task_that_is_refused_ends_the_sweep_at_once(service: Service, submit: Callable[..., Job]) -> None:
    ran = run(
        "sweep", f"{TASKS}:without_parameters", "--steps", "5", "--grid", "optimizer.lr=1,2",
        "--server", f"127.0.0.1:{service.grpc_port}",
    )  # fmt: skip
    assert ran.returncode == 2
    assert "no trainable parameters" in ran.stderr
