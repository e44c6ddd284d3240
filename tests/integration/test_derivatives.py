"""Jobs whose gradients come from forward mode, estimates or differences, against plain PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from harness.local_job import hashes, run_here, run_processes
from steepest.spec import ESTIMATE, TaskReference
from tests.support.choices import full
from tests.support.submission import RefusedError, rehearsed, submitted
from worker.task.load import load_task

pytestmark = pytest.mark.cluster

TASK = "tests.support.tasks:regression"
SMALL: dict[str, Any] = {"hidden": 4, "dtype": "float64"}
BASE: dict[str, Any] = {
    "optimizer": {"name": "sgd", "lr": 0.05},
    "data": {"global_batch": 101, "micro_batch": 20, "shuffle": False},
}


def _trained(steps: int) -> dict[str, torch.Tensor]:
    """By plain PyTorch."""
    task = load_task(TaskReference(module=TASK.partition(":")[0], function="regression", arguments=SMALL), None, 0)
    inputs, targets = task.train_data.arrays
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        task.loss(task.model(inputs), targets).backward()
        optimizer.step()
    return dict(task.model.state_dict())


@pytest.mark.parametrize(("way", "tolerance"), [("forward", 1e-12), full("finite", 1e-8)])
def test_a_job_goes_the_way_of_backpropagation(way: str, tolerance: float, tmp_path: Path) -> None:
    config = submitted(tmp_path, TASK, steps=100, derivative=way, arguments=SMALL, **BASE)
    found = run_here(config).model
    for name, value in _trained(100).items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("way", [ESTIMATE, full("forward")])
def test_the_bits_are_the_same_at_any_placement(way: str, tmp_path: Path) -> None:
    raw = {"steps": 12, "derivative": way, "arguments": {"hidden": 4}, **BASE, "optimizer": {"name": "sgd", "lr": 1e-3}}
    here = run_here(submitted(tmp_path / "here", TASK, **raw))
    assert hashes(run_processes(submitted(tmp_path / "three", TASK, **raw, placement={"servers": 2}), 3)) == hashes(
        here
    )


@pytest.mark.parametrize("way", ["forward", ESTIMATE])
@pytest.mark.parametrize("how", ["no_grad", "held"])
def test_a_gradient_that_is_not_that_of_backpropagation_is_refused(how: str, way: str) -> None:
    with pytest.raises(RefusedError, match=r"gives a gradient that is \d+\.\d% off from backpropagation's") as refused:
        rehearsed("tests.support.logistic:bootstrapped", steps=2, derivative=way, arguments={"how": how})
    assert refused.value.field == "derivative"


def test_parameters_that_the_loss_does_not_reach_stay_as_they_are(tmp_path: Path) -> None:
    raw = {"steps": 3, "optimizer": {"name": "adamw", "lr": 0.1, "weight_decay": 0.5}, "data": {"global_batch": 101}}
    task = "tests.support.logistic:partly_used"
    states = [
        run_here(submitted(tmp_path / way, task, derivative=way, **raw)).model
        for way in ("reverse", "forward", ESTIMATE)
    ]
    first = load_task(
        TaskReference(module=TASK.replace("tasks:regression", "logistic"), function="partly_used"), None, 0
    )
    for state in states:
        assert torch.equal(state["unused.weight"], first.model.state_dict()["unused.weight"])
        assert not torch.equal(state["line.weight"], first.model.state_dict()["line.weight"])


@pytest.mark.parametrize(
    ("task", "raw", "said"),
    [
        (TASK, {"derivative": "forward", "arguments": {"hidden": 400}}, "at most 2,000 may: take reverse"),
        (TASK, {"derivative": "finite"}, r"use float64 \(model\.double\(\)\)"),
        ("tests.support.tasks:least_squares", {"derivative": "forward"}, "an AnalyticTask has a gradient of its own"),
        (TASK, {"derivative": "forward", "compile": True}, "leave one of the two out"),
        (TASK, {"derivative": "forward", "memory": {"checkpoint_activations": "all"}}, "leave one of the two out"),
        (TASK, {"derivative": ESTIMATE, "optimizer": {"name": "lbfgs"}}, "an estimate is none"),
        (TASK, {"derivative": "forward", "optimizer": {"name": "newton_cg"}}, "optimizer.products=differences"),
    ],
)
def test_ways_that_do_not_go_with_a_task_are_refused(task: str, raw: dict[str, Any], said: str) -> None:
    with pytest.raises(RefusedError, match=said) as refused:
        rehearsed(task, steps=2, **{"data": {"global_batch": 101}, "arguments": {}, **raw})
    assert refused.value.field == "derivative"
