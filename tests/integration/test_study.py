"""Gradient checks and curvature, from the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from steepest.client import Client, Job
from tests.support.command import Ran, run
from tests.support.service import TASKS

pytestmark = pytest.mark.cluster

WRONG = """
import numpy as np
import steepest

def task(error: float = 0.0):
    x = np.random.default_rng(0).standard_normal((64, 3)).astype(np.float32)
    y = x @ np.array([1.0, -2.0, 0.5], np.float32)

    def gradient(parameters, batch):
        inputs, targets = batch
        rest = inputs @ parameters["w"] - targets
        slope = inputs.T @ rest
        slope[1] *= 1 + error
        return 0.5 * (rest**2).sum(), len(targets), {"w": slope}

    return steepest.AnalyticTask(
        parameters={"w": np.zeros(3, np.float32)}, gradient=gradient, train_data=steepest.ArrayData(x, y)
    )
"""


@pytest.fixture
def steepest(client: Client) -> Callable[..., Ran]:
    return lambda *arguments: run(*arguments, "--server", client.address)


def test_a_gradient_check_says_which_entry_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "by_hand.py").write_text(WRONG)
    task = f"{tmp_path / 'by_hand.py'}:task"
    right = run("check-gradients", task, "--json")
    assert right.returncode == 0, right.stderr
    found = json.loads(right.stdout.splitlines()[-1])
    assert found["passed"]
    assert found["max_relative_error"] < 1e-9
    assert set(found["parameters"]) == {"w"}
    wrong = run("check-gradients", task, "--arg", "error=1e-4", "--json")
    assert wrong.returncode == 1
    found = json.loads(wrong.stdout.splitlines()[-1])
    assert (found["passed"], found["worst"]["parameter"], found["worst"]["index"]) == (False, "w", [1])
    assert found["max_relative_error"] == pytest.approx(1e-4, rel=1e-3)
    assert run("check-gradients", task, "--got", "guessing").returncode == 2


@pytest.mark.full
def test_a_gradient_check_for_people_and_one_that_is_refused(tmp_path: Path) -> None:
    (tmp_path / "by_hand.py").write_text(WRONG)
    task = f"{tmp_path / 'by_hand.py'}:task"
    for_people = run("check-gradients", task, "--arg", "error=1e-4")
    assert "worst: w[1]" in for_people.stdout
    assert "do NOT agree" in for_people.stdout
    refused = run("check-gradients", task, "--expected", "forward", "--json")
    assert refused.returncode == 2
    assert "needs a task of torch" in refused.stderr


@pytest.mark.full
def test_curvature_of_a_job(steepest: Callable[..., Ran], client: Client) -> None:
    job = client.submit(f"{TASKS}:regression", steps=20)
    job.wait()
    ran = steepest("curvature", job.name, "--samples", "100", "--json")
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert (found["job"], found["step"], found["samples"]) == (job.name, 20, 100)
    assert found["eigenvalues"] == sorted(found["eigenvalues"], reverse=True)
    assert found["point"] in ("minimum", "saddle")
    assert found["smallest_eigenvalue"] <= found["eigenvalues"][-1] <= found["sharpness"]
    assert len(found["density"]["grid"]) == len(found["density"]["values"])
    for refused, word in (
        (["--step", "7"], "no checkpoint of step 7"),
        (["--samples", "100000"], "allowed: 1 to"),
        (["--matrix", "fisher"], "allowed: hessian, gauss_newton"),
        (["--jacobian", "100000"], "jacobian: 100000; allowed: 1 to"),
    ):
        answer = steepest("curvature", job.name, *refused)
        assert answer.returncode == 2
        assert word in answer.stderr


@pytest.mark.full
def test_curvature_is_the_same_with_two_processes(steepest: Callable[..., Ran], submit: Callable[..., Job]) -> None:
    job = submit("regression", steps=5)
    job.wait()
    one = steepest("curvature", job.name, "--samples", "100", "--json")
    found = json.loads(one.stdout.splitlines()[-1])
    again = steepest("curvature", job.name, "--samples", "100", "--processes", "2", "--json")
    assert json.loads(again.stdout.splitlines()[-1]) == found
    for_people = steepest("curvature", job.name, "--samples", "64", "--top", "2", "--jacobian", "3")
    assert f"kind of point         {found['point']}" in for_people.stdout
    assert "Jacobian of outputs   9 singular values" in for_people.stdout  # three outputs a sample
    options = ("--samples", "100", "--matrix", "gauss_newton", "--jacobian", "3", "--json")
    newton = steepest("curvature", job.name, *options)
    about = json.loads(newton.stdout.splitlines()[-1])
    assert (about["matrix"], found["matrix"], about["point"]) == ("gauss_newton", "hessian", "minimum")
    assert about["jacobian_singular_values"] == sorted(about["jacobian_singular_values"], reverse=True)
    assert len(about["jacobian_singular_values"]) == 9


@pytest.mark.full
def test_a_job_without_torch_has_no_curvature(steepest: Callable[..., Ran], submit: Callable[..., Job]) -> None:
    job = submit("least_squares", steps=3)
    job.wait()
    answer = steepest("curvature", job.name)
    assert answer.returncode == 2
    assert "needs a task of torch" in answer.stderr
