"""The extreme eigenvalues of a Hessian in a few products, against the whole matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import steepest
from ps.parameters.layout import Layout, build_layout
from tests.support.models import DifferentiableOnce
from worker.gradients.backend import CpuBackend
from worker.gradients.curvature import PRODUCTS, CurvatureError, Hessian, measure_curvature
from worker.gradients.torch_engine import TorchEngine
from worker.task.model import describe_model

WIDTH = 6


class Attending(nn.Module):
    """Attention, whose fast kernel has no second derivative, with dropout and batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.MultiheadAttention(WIDTH, 2, dropout=0.5, batch_first=True)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.out = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen, _ = self.heads(x, x, x, need_weights=False)
        return self.out(self.norm(seen.mean(1)))


class Wide(nn.Module):
    """A linear layer that is large enough to have its gradient written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x[:, 0])


class Once(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.line(DifferentiableOnce.apply(torch.tanh(self.line.weight.sum()) * x[:, 0]))


def engine_of(model: Callable[[], nn.Module], loss: nn.Module | None = None) -> tuple[TorchEngine, Layout, Any]:
    torch.manual_seed(0)
    x, y = torch.randn(32, 4, WIDTH), torch.randint(0, 3, (32,))
    task = steepest.Task(model=model(), loss=loss or nn.CrossEntropyLoss(), train_data=steepest.ArrayData(x, y))
    description = describe_model(task)
    layout = build_layout(description)
    engine = TorchEngine(task, description, layout, CpuBackend())
    flat = torch.zeros(layout.numel)
    engine.write_initial(flat)
    engine.bind(flat)
    return engine, layout, (x, y)


def dense(engine: TorchEngine, batch: Any) -> np.ndarray:
    """The Hessian of the mean loss, column by column."""
    parameters = engine.parameters
    sizes = [p.numel() for p in parameters]
    columns = []
    with engine.differentiable_twice():
        found = engine.forward(batch, len(batch[1]))
        hessian = Hessian(found, parameters)
        for unit in torch.eye(sum(sizes)):
            vector = [v.view_as(p) for v, p in zip(unit.split(sizes), parameters, strict=True)]
            parts = hessian.times(vector, again=True)
            whole = [torch.zeros_like(p) if h is None else h for h, p in zip(parts, parameters, strict=True)]
            columns.append(torch.cat([each.flatten() for each in whole]).double().numpy() * found.factor / found.weight)
    matrix = np.array(columns)
    return (matrix + matrix.T) / 2


def test_extreme_eigenvalues_are_those_of_the_whole_matrix() -> None:
    engine, layout, batch = engine_of(Attending)
    values = np.linalg.eigvalsh(dense(engine, batch))
    found = measure_curvature(engine, batch, 32, layout, seed=1, products=60)
    assert found.sharpness == pytest.approx(values[-1], rel=1e-3)
    assert found.smallest == pytest.approx(values[0], rel=1e-2)
    for seed in range(5):
        few = measure_curvature(engine, batch, 32, layout, seed, products=PRODUCTS)
        assert 0.9 * values[-1] < few.sharpness < 1.0001 * values[-1]
        assert few.smallest > 1.0001 * values[0]


def test_the_same_bits_again_and_nothing_left_behind() -> None:
    engine, layout, batch = engine_of(Wide)
    before = [p.detach().clone() for p in engine.parameters]
    one = measure_curvature(engine, batch, 32, layout, seed=1)
    into = [torch.zeros_like(p) for p in engine.parameters]
    engine.gradient(batch, 32, into, add=False)  # the layer's gradient goes to its place
    assert measure_curvature(engine, batch, 32, layout, seed=1) == one
    assert all(torch.equal(p, b) for p, b in zip(engine.parameters, before, strict=True))
    assert all(p.grad is None for p in engine.parameters)
    assert one.sharpness > 0


def test_a_loss_without_curvature_and_one_of_a_single_parameter() -> None:
    class Line(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slope = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.slope * x[:, 0, 0]

    class Linear(nn.Module):
        def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return outputs.mean()

    class Square(nn.Module):
        def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return outputs.square().mean()

    engine, layout, batch = engine_of(Line, Linear())
    assert measure_curvature(engine, batch, 32, layout, seed=0) == (0.0, 0.0)
    engine, layout, batch = engine_of(Line, Square())
    exact = 2 * float(batch[0][:, 0, 0].square().mean())
    assert measure_curvature(engine, batch, 32, layout, seed=0) == pytest.approx((exact, exact))


def test_what_is_not_finite_is_not_measured() -> None:
    engine, layout, (x, y) = engine_of(Wide)
    found = measure_curvature(engine, (torch.full_like(x, math.inf), y), 32, layout, seed=0)
    assert np.isnan(found).all()


def test_what_cannot_be_differentiated_twice_is_named() -> None:
    engine, layout, batch = engine_of(Once)
    with pytest.raises(CurvatureError, match=r"cannot be differentiated twice.*DifferentiableOnce|once_differentiable"):
        measure_curvature(engine, batch, 32, layout, seed=0)
