from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import steepest
from worker.gradients.engine import LossError
from worker.gradients.losses import LossValue, loss_of

BATCH = (torch.ones(4, 3), torch.zeros(4, 1))


def found(batch: Any = BATCH, **task: Any) -> LossValue:
    data = steepest.ArrayData(torch.zeros(2))
    return loss_of(steepest.Task(model=nn.Linear(3, 1), train_data=data, **task))(batch, 4)


def mean(model: nn.Module, batch: Any) -> torch.Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def test_a_scalar_is_a_mean_over_the_samples() -> None:
    value = found(batch_loss=mean)
    assert (value.factor, value.weight, value.logged) == (4.0, 4.0, {})


@pytest.mark.parametrize("weight", [10, 10.0, np.float32(10), torch.tensor(10)])
def test_a_number_beside_the_loss_is_its_weight(weight: Any) -> None:
    value = found(batch_loss=lambda model, batch: (mean(model, batch), weight))
    assert (value.factor, value.weight) == (1.0, 10.0)
    logged = {"margin": torch.tensor(0.5)}
    value = found(batch_loss=lambda model, batch: (mean(model, batch), weight, logged))
    assert (value.factor, value.weight, value.logged) == (1.0, 10.0, logged)


def test_numbers_by_name_are_logged_and_anything_else_is_the_outputs() -> None:
    value = found(batch_loss=lambda model, batch: (mean(model, batch), {"margin": 0.5}))
    assert (value.factor, value.weight, value.logged, value.outputs) == (4.0, 4.0, {"margin": 0.5}, None)
    value = found(batch_loss=lambda model, batch: (mean(model, batch), model(batch[0])))
    assert value.outputs.shape == (4, 1)
    assert value.targets is BATCH[1]
    value = found(batch_loss=lambda model, batch: (mean(model, batch), {"logits": model(batch[0])}))
    assert value.outputs["logits"].shape == (4, 1)
    assert value.logged == {}
    value = found(loss=lambda outputs, targets: ((outputs - targets).square().mean(), {"largest": outputs.max()}))
    assert set(value.logged) == {"largest"}


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda loss: (loss, torch.ones(1)), "may be a weight or the output"),
        (lambda loss: (loss, "words"), "allowed: a scalar"),
        (lambda loss: (loss, None), "allowed: a scalar"),
        (lambda loss: (loss, 1.0, 2.0), "allowed: a scalar"),
        (lambda loss: (loss, -1.0), "must not be negative"),
        (lambda loss: (loss, {"a": 1.0}, 1.0), "allowed: a scalar"),
    ],
)
def test_what_is_no_loss_is_refused_with_what_is_allowed(returned: Any, message: str) -> None:
    with pytest.raises(LossError, match=message):
        found(batch_loss=lambda model, batch: returned(mean(model, batch)))


def test_a_tuple_of_a_plain_loss_may_have_numbers_only() -> None:
    with pytest.raises(LossError, match=r"\(loss, \{name: number\}\)"):
        found(loss=lambda outputs, targets: (outputs.mean(), outputs))


def test_entries_of_a_batch_become_arguments_by_name() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(3, 1)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": (self.line(x) - y).square().mean()}

    pair = namedtuple("pair", "y x")
    data = steepest.ArrayData(torch.zeros(2))
    of = loss_of(steepest.Task(model=Own(), train_data=data))
    x, y = BATCH
    assert of({"y": y, "x": x}, 4).value == of(pair(y, x), 4).value == of((x, y), 4).value
