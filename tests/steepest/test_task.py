from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import steepest

DATA = steepest.ArrayData(np.zeros((2, 2)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": nn.MSELoss(), "batch_loss": lambda m, b: m(b)}, "both are given"),
        ({"loss": nn.MSELoss(reduction="sum")}, "reduction='sum'"),
    ],
)
def test_losses_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        steepest.Task(model=nn.Linear(2, 2), train_data=DATA, **changes)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [((), "at least one"), ((np.zeros(3), np.zeros(4)), "3, 4 rows"), ((torch.tensor(1),), "one dimension")],
)
def test_arrays_that_are_no_samples(arrays: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        steepest.ArrayData(*arrays)


def test_array_data_is_a_map_style_dataset() -> None:
    data = steepest.ArrayData(np.arange(6).reshape(3, 2), torch.arange(3))
    assert len(data) == 3
    inputs, target = data[1]
    assert inputs.tolist() == [2, 3]
    assert int(target) == 1


def test_metrics_of_an_analytic_task_need_predict() -> None:
    with pytest.raises(ValueError, match="predict"):
        steepest.AnalyticTask(parameters={}, gradient=lambda p, b: (0.0, 0.0, {}), train_data=DATA, metrics={"m": max})
