"""Gradients from derivatives along directions, against backpropagation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import steepest
from ps.parameters.layout import Layout, build_layout
from steepest.spec import ESTIMATE, FINITE, FORWARD, REVERSE
from tests.worker.gradients.test_curvature import WIDTH, Attending
from tests.worker.gradients.test_products import Tied, Unused
from worker.gradients.backend import CpuBackend
from worker.gradients.engine import LossError, Measured
from worker.gradients.slopes import SlopeEngine, engine_of
from worker.gradients.torch_engine import TorchEngine
from worker.task.model import describe_model


class Shared(nn.Module):
    """One parameter under two names, with random numbers of the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(WIDTH, WIDTH)
        self.again = nn.Linear(WIDTH, WIDTH)
        self.again.weight = self.into.weight
        self.out = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.again(torch.tanh(self.into(x[:, 0]))))
        return self.out(hidden * torch.randn_like(hidden))


class _NoForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return 2.0 * gradient


class Backward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _NoForward.apply(self.line(x[:, 0]))


def engines(model: Callable[[], nn.Module], *ways: str) -> tuple[list[TorchEngine], Layout, Any]:
    """At the same point, on the same batch."""
    torch.manual_seed(0)
    batch = torch.randn(8, 4, WIDTH, dtype=torch.float64), torch.randint(0, 3, (8,))
    found = []
    for way in ways:
        torch.manual_seed(1)
        task = steepest.Task(model=model().double(), loss=nn.CrossEntropyLoss(), train_data=steepest.ArrayData(*batch))
        description = describe_model(task)
        layout = build_layout(description)
        engine = engine_of(way)(task, description, layout, CpuBackend())
        flat = torch.zeros(layout.numel, dtype=torch.float64)
        engine.write_initial(flat)
        engine.bind(flat)
        found.append(engine)
    return found, layout, batch


def passed(engine: TorchEngine, layout: Layout, batch: Any, seed: int = 2) -> tuple[torch.Tensor, Measured]:
    flat = torch.full((layout.numel,), 7.0, dtype=torch.float64)
    torch.manual_seed(seed)
    measured = engine.gradient(batch, 8, layout.views(flat), add=False)
    return torch.cat([view.reshape(-1) for view in layout.views(flat)]), measured


@pytest.mark.parametrize("model", [Attending, Tied, Shared, Unused])
@pytest.mark.parametrize(("way", "tolerance"), [(FORWARD, 1e-12), (FINITE, 1e-8)])
def test_a_gradient_is_that_of_backpropagation(model: Callable[[], nn.Module], way: str, tolerance: float) -> None:
    (own, reverse), layout, batch = engines(model, way, REVERSE)
    found, measured = passed(own, layout, batch)
    expected, known = passed(reverse, layout, batch)
    assert float((found - expected).norm()) <= tolerance * float(expected.norm())
    assert (measured.loss, measured.weight) == (pytest.approx(known.loss, rel=1e-14), known.weight)
    assert own.buffers() == reverse.buffers()
    again = layout.views(torch.zeros(layout.numel, dtype=torch.float64))
    torch.manual_seed(2)
    own.gradient(batch, 8, again, add=True)
    assert torch.equal(torch.cat([view.reshape(-1) for view in again]), found)


def test_an_estimate_is_along_other_numbers_than_the_pass_draws() -> None:
    """E[(g v) v] is the gradient only where v is independent of g."""
    (own, reverse), layout, batch = engines(Shared, ESTIMATE, REVERSE)
    shares = []
    for seed in range(600):
        gradient, _ = passed(reverse, layout, batch, seed)
        shares.append(float(passed(own, layout, batch, seed)[0] @ gradient / gradient.dot(gradient)))
    found = torch.tensor(shares)
    assert float(found.mean()) == pytest.approx(1.0, abs=4 * float(found.std()) / len(shares) ** 0.5)


def test_an_estimate_is_the_gradient_in_expectation() -> None:
    (own, reverse), layout, batch = engines(Tied, ESTIMATE, REVERSE)
    gradient, _ = passed(reverse, layout, batch)
    draws = torch.stack([passed(own, layout, batch, seed)[0] for seed in range(1000)])
    shares = draws @ gradient / gradient.dot(gradient)
    assert float(shares.mean()) == pytest.approx(1.0, abs=4 * float(shares.std()) / len(shares) ** 0.5)
    assert 1.0 < float(shares.std()) < 2.0  # of a squared normal number: the root of 2
    assert isinstance(own, SlopeEngine)
    torch.manual_seed(5)
    vector = torch.cat([direction.reshape(-1) for direction in own.directions()])
    torch.testing.assert_close(passed(own, layout, batch, 5)[0], gradient.dot(vector) * vector, rtol=1e-9, atol=1e-12)


def test_every_parameter_is_told_of() -> None:
    (own,), layout, batch = engines(Unused, FORWARD)
    told: list[int] = []
    own.watch(told.append)
    passed(own, layout, batch)
    assert told == list(range(len(layout.parameters)))


def test_what_has_no_forward_derivative_says_so() -> None:
    (own,), layout, batch = engines(Backward, FORWARD)
    with pytest.raises(LossError, match=r"no forward derivative.*derivative=reverse"):
        passed(own, layout, batch)


class Last(nn.Module):
    """A buffer that follows the parameters, behind them all."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(WIDTH, 3)
        self.register_buffer("seen", torch.zeros(3, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.line(x[:, 0])
        self.seen += out.detach().mean(0)
        return out


@pytest.mark.parametrize("way", [FORWARD, FINITE, ESTIMATE])
def test_buffers_are_those_of_the_point(way: str) -> None:
    (own, reverse), layout, batch = engines(Last, way, REVERSE)
    for engine in (own, reverse):
        passed(engine, layout, batch)
    assert own.buffers() == reverse.buffers() is not None


def test_a_micro_batch_that_weighs_nothing_counts_as_in_reverse() -> None:
    (own, reverse), layout, _ = engines(Unused, FORWARD, REVERSE)
    nothing = torch.zeros(0, 4, WIDTH, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
    for engine in (own, reverse):
        flat = torch.ones(layout.numel, dtype=torch.float64)
        measured = engine.gradient(nothing, 0, layout.views(flat), add=True)
        assert (measured.loss, measured.weight) == (0.0, 0.0)
        assert all(torch.equal(view, torch.ones_like(view)) for view in layout.views(flat))
