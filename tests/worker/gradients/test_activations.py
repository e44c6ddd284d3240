"""Shares of units that are off or at their bounds, in one pass."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from worker.gradients.activations import AT_ONCE, Activations


def measured(model: nn.Module, *inputs: torch.Tensor) -> tuple[dict[str, float], dict[str, float]]:
    """(shares, root mean squares) by module."""
    watched = Activations([("", model)])
    with watched.observed():
        for each in inputs:
            model(each)
    model(torch.zeros_like(inputs[0]))  # nobody looks any more
    both = np.frombuffer(watched.measured(), "<f8").reshape(2, -1).tolist()
    return dict(zip(watched.names, both[0], strict=True)), dict(zip(watched.names, both[1], strict=True))


def shares(model: nn.Module, *inputs: torch.Tensor) -> dict[str, float]:
    return measured(model, *inputs)[0]


def test_the_size_of_what_comes_out() -> None:
    values = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.GELU(), nn.Tanh())
    off, sizes = measured(model, values, 2 * values)
    expected = [nn.functional.gelu(each).square().mean().sqrt().item() for each in (values, 2 * values)]
    assert sizes["0"] == pytest.approx(sum(expected) / 2, rel=1e-6)
    assert 0 < sizes["1"] < 1
    assert math.isnan(off["0"])  # of a GELU, nothing is quite off
    assert 0.0 < off["1"] < 0.2


def test_bounded_functions_are_saturated_at_their_ends() -> None:
    values = torch.tensor([[-9.0, 0.0, 9.0, 0.5]])
    assert shares(nn.Sequential(nn.Tanh()), values) == {"0": 0.5}
    assert shares(nn.Sequential(nn.Sigmoid()), values) == {"0": 0.5}


def test_a_unit_is_off_when_it_is_so_for_all_samples() -> None:
    values = torch.tensor([[-1.0, 2.0, -1.0, 3.0], [-1.0, -2.0, 1.0, 3.0]])
    assert shares(nn.Sequential(nn.ReLU()), values.repeat(8, 1)) == {"0": 0.25}
    assert math.isnan(shares(nn.Sequential(nn.ReLU()), values)["0"])  # two samples say little
    channels = torch.zeros(16, 3, 4, 4)
    channels[1, 0, 2, 2] = 1.0
    assert shares(nn.Sequential(nn.ReLU()), channels) == {"0": 2 / 3}


def test_many_modules_take_turns() -> None:
    model = nn.Sequential(*[nn.Tanh() for _ in range(2 * AT_ONCE + 1)])
    watched = Activations([("", model)])
    seen = []
    for turn in range(5, 8):
        with watched.observed(turn):
            model(torch.zeros(3, 4))
        both = np.frombuffer(watched.measured(), "<f8").reshape(2, -1)
        assert (np.isnan(both[0]) == np.isnan(both[1])).all()
        seen.append(np.flatnonzero(~np.isnan(both[1])))
    assert all(len(one) <= AT_ONCE for one in seen)
    assert sorted(np.concatenate(seen)) == list(range(len(model)))


def test_a_module_that_is_used_twice_or_not_at_all() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Tanh(), nn.Tanh()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(100 * (self.used(x) + 2))

    found = shares(Odd(), torch.zeros(3, 4))
    assert found["used"] == 0.5
    assert math.isnan(found["unused"])
