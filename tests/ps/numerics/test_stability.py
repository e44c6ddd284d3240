"""The largest stable curvature, against torch.optim on a quadratic."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ps.numerics.stability import stable_sharpness
from steepest.spec import spec_from_dict

LR = 0.1


@pytest.mark.parametrize(
    ("optimizer", "of_torch"),
    [
        ({"name": "sgd"}, {}),
        ({"name": "sgd", "momentum": 0.5}, {"momentum": 0.5}),
        ({"name": "momentum"}, {"momentum": 0.9}),
        ({"name": "nesterov"}, {"momentum": 0.9, "nesterov": True}),
        ({"name": "nesterov", "momentum": 0.3}, {"momentum": 0.3, "nesterov": True}),
    ],
)
def test_steps_converge_below_it_and_diverge_above(optimizer: dict[str, Any], of_torch: dict[str, Any]) -> None:
    spec = spec_from_dict({"task": {"module": "m", "function": "f"}, "steps": 1, "optimizer": optimizer})
    limit = stable_sharpness(spec.optimizer) / LR

    def after(curvature: float) -> float:
        x = torch.ones(1, dtype=torch.float64, requires_grad=True)
        steps = torch.optim.SGD([x], LR, **of_torch)
        for _ in range(2000):
            steps.zero_grad()
            (0.5 * curvature * x**2).sum().backward()
            steps.step()
            if abs(x.item()) > 1e6:
                break
        return abs(x.item())

    assert after(0.99 * limit) < 1e-3
    assert after(1.01 * limit) > 1e3


def test_of_other_optimizers_it_is_not_known() -> None:
    for optimizer in ({"name": "adam"}, {"name": "momentum", "dampening": 0.5}):
        spec = spec_from_dict({"task": {"module": "m", "function": "f"}, "steps": 1, "optimizer": optimizer})
        assert math.isnan(stable_sharpness(spec.optimizer))
