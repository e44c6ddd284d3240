"""Products of second derivatives with a direction, as a step computes them, against differences of gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import steepest
from ps.parameters.layout import Layout, build_layout
from tests.worker.gradients.test_curvature import WIDTH, Attending, Once, Wide
from worker.gradients.backend import CpuBackend
from worker.gradients.engine import Direction, InPartsError
from worker.gradients.products import CurvatureError
from worker.gradients.torch_engine import TorchEngine
from worker.task.model import describe_model

STEP = 1e-5


class Tied(nn.Module):
    """One weight in the memory of another."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)  # to convert it later would untie it
        self.out = nn.Linear(WIDTH, 3, dtype=torch.float64)
        self.out.weight = nn.Parameter(self.into.weight.data[:3])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.into(x[:, 0])))


class Unused(nn.Module):
    """A parameter that the loss does not bend by, beside one that it does."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(WIDTH, 3)
        self.shift = nn.Parameter(torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.line(x[:, 0]) + 0 * self.shift


def engine_of(model: Callable[[], nn.Module], loss: nn.Module | None = None) -> tuple[TorchEngine, Layout, Any]:
    torch.manual_seed(0)
    x, y = torch.randn(32, 4, WIDTH, dtype=torch.float64), torch.randint(0, 3, (32,))
    task = steepest.Task(
        model=model().double(), loss=loss or nn.CrossEntropyLoss(), train_data=steepest.ArrayData(x, y)
    )
    description = describe_model(task)
    layout = build_layout(description)
    engine = TorchEngine(task, description, layout, CpuBackend())
    flat = torch.zeros(layout.numel, dtype=torch.float64)
    engine.write_initial(flat)
    engine.bind(flat)
    return engine, layout, (x, y)


def passed(engine: TorchEngine, layout: Layout, batch: Any, direction: Direction | None = None) -> torch.Tensor:
    """What a pass writes, with the same random numbers every time."""
    flat = torch.full((layout.numel,), 7.0, dtype=torch.float64)  # to be written over
    for _ in range(2):
        torch.manual_seed(1)
        try:
            engine.gradient(batch, 32, layout.views(flat), add=False, direction=direction)
        except InPartsError:
            continue
        return flat
    raise AssertionError("in parts twice")


def _of_parameters(layout: Layout, flat: torch.Tensor) -> torch.Tensor:
    return torch.cat([view.reshape(-1) for view in layout.views(flat)])


@pytest.mark.parametrize("model", [Wide, Attending, Tied, Unused])
def test_a_product_is_the_derivative_of_the_gradient(model: Callable[[], nn.Module]) -> None:
    engine, layout, batch = engine_of(model)
    vector = torch.randn(layout.numel, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    product = passed(engine, layout, batch, Direction(layout.views(vector)))
    before = engine._flat.clone()
    sides = []
    for sign in (1, -1):
        engine._flat.copy_(before + sign * STEP * vector)
        engine.refresh()
        engine._versions, engine._addresses = engine._marks()
        sides.append(passed(engine, layout, batch))
    expected = (sides[0] - sides[1]) / (2 * STEP)
    found, known = _of_parameters(layout, product), _of_parameters(layout, expected)
    assert float((found - known).norm()) <= 1e-6 * float(known.norm())
    assert float(known.norm()) > 0


def test_it_is_added_to_what_is_there() -> None:
    engine, layout, batch = engine_of(Wide)
    vector = torch.randn(layout.numel, dtype=torch.float64)
    direction = Direction(layout.views(vector))
    once = passed(engine, layout, batch, direction)
    twice = once.clone()
    engine.gradient(batch, 32, layout.views(twice), add=True, direction=direction)
    torch.testing.assert_close(_of_parameters(layout, twice), 2 * _of_parameters(layout, once), rtol=1e-12, atol=1e-14)


def test_the_gauss_newton_matrix_is_the_hessian_of_a_linear_model() -> None:
    engine, layout, batch = engine_of(Unused)
    vector = torch.randn(layout.numel, dtype=torch.float64)
    hessian = passed(engine, layout, batch, Direction(layout.views(vector)))
    gauss_newton = passed(engine, layout, batch, Direction(layout.views(vector), is_gauss_newton=True))
    torch.testing.assert_close(
        _of_parameters(layout, gauss_newton), _of_parameters(layout, hessian), rtol=1e-10, atol=1e-14
    )


def test_what_has_no_second_derivative_says_so() -> None:
    engine, layout, batch = engine_of(Once)
    vector = torch.ones(layout.numel, dtype=torch.float64)
    with pytest.raises(CurvatureError, match="differentiated twice"):
        engine.gradient(batch, 32, layout.views(torch.zeros_like(vector)), add=False, direction=Direction([vector]))


def test_a_tied_model_has_no_single_hessian() -> None:
    engine, _, _ = engine_of(Tied)
    with pytest.raises(CurvatureError, match="memory of others"), engine.differentiable_twice():
        pass


class Features(nn.Module):
    """Returns its last features beside what it computes from them."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(WIDTH, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = torch.tanh(self.into(x[:, 0]))
        return self.out(features), features


class OfFirst(nn.Module):
    def forward(self, outputs: tuple[torch.Tensor, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs[0], targets)


def test_outputs_that_depend_on_each_other_have_no_gauss_newton_matrix() -> None:
    engine, layout, batch = engine_of(Features, OfFirst())
    vector = torch.ones(layout.numel, dtype=torch.float64)
    into = layout.views(torch.zeros_like(vector))
    with pytest.raises(CurvatureError, match="computed from another"):
        engine.gradient(batch, 32, into, add=False, direction=Direction(layout.views(vector), is_gauss_newton=True))
    engine.gradient(batch, 32, into, add=False, direction=Direction(layout.views(vector)))  # the Hessian is as ever
