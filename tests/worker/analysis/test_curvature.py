"""Curvature against dense Hessians, and the same bits with any number of processes."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import steepest
from steepest.spec import spec_from_dict
from tests.support.choices import full
from worker.analysis.curvature import Compact, hutch_plus_plus, kind_of_point, lanczos, measure, spectral_density
from worker.analysis.subject import Question
from worker.analysis.team import Team
from worker.task.load import TaskError, load_task
from worker.task.model import describe_model

TASKS = __name__


def digits(hidden: int = 4) -> steepest.Task:
    x, y = load_digits(return_X_y=True)
    inputs, targets = torch.tensor(x[:200] / 16, dtype=torch.float32), torch.tensor(y[:200])
    model = nn.Sequential(nn.Linear(64, hidden), nn.Tanh(), nn.Dropout(0.5), nn.Linear(hidden, 10))
    return steepest.Task(model=model, loss=nn.CrossEntropyLoss(), train_data=steepest.ArrayData(inputs, targets))


def valley() -> steepest.Task:
    """0.5 (3 a^2 + b^2) whatever the data."""

    class Point(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.at = nn.Parameter(torch.zeros(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 0.5 * (self.at**2 * torch.tensor([3.0, 1.0])).sum() + 0.0 * x.mean()

    rows = steepest.ArrayData(torch.zeros(8, 1), torch.zeros(8, 1))
    return steepest.Task(model=Point(), batch_loss=lambda model, batch: model(batch[0]), train_data=rows)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0]


def once() -> steepest.Task:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(1, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return _Once.apply(self.inner(x)) ** 2

    rows = steepest.ArrayData(torch.ones(8, 1), torch.zeros(8, 1))
    return steepest.Task(model=Net(), loss=nn.MSELoss(), train_data=rows)


def team(function: str, samples: int, processes: int = 1, micro_batch: int = 32, **arguments: Any) -> Team:
    reference = {"module": TASKS, "function": function, "arguments": arguments}
    data = {"global_batch": micro_batch, "micro_batch": micro_batch}
    spec = spec_from_dict({"task": reference, "epochs": 1, "data": data})
    model = describe_model(load_task(spec.task, None, spec.seed))
    return Team(Question(spec, None, model, samples, freezes=True), processes)


def product_of(its: Team) -> Compact:
    layout = its.subject.layout
    positions = np.concatenate([np.arange(p.offset, p.offset + p.numel) for p in layout.parameters])
    return Compact(its.hessian_product, layout.numel, positions)


def test_products_are_those_of_the_dense_hessian() -> None:
    with team("digits", 200) as its:
        task = digits()
        product, layout = product_of(its), its.subject.layout
        model = task.model.double().eval()
        x, y = (array[:200] for array in task.train_data.arrays)
        names = [p.name for p in layout.parameters]
        views = dict(zip(names, layout.views(its.subject.flat), strict=True))

        def loss(flat: torch.Tensor) -> torch.Tensor:
            parts = torch.split(flat, [p.numel for p in layout.parameters])
            own = {p.name: part.view(p.shape) for p, part in zip(layout.parameters, parts, strict=True)}
            return nn.functional.cross_entropy(torch.func.functional_call(model, own, (x.double(),)), y)

        point = torch.cat([views[name].reshape(-1) for name in names])
        dense = torch.func.hessian(loss)(point).numpy()
        vector = np.random.default_rng(0).standard_normal(len(point))
        assert product(vector) == pytest.approx(dense @ vector, rel=1e-9, abs=1e-12)
        found = measure(product, *_at(its, product))
        exact = np.linalg.eigvalsh(dense)[::-1]
        assert found.eigenvalues == pytest.approx(exact[:5], rel=1e-2)
        assert found.smallest == pytest.approx(exact[-1], rel=1e-2)
        assert found.trace == pytest.approx(np.trace(dense), rel=0.03)
        assert found.point == "saddle"
        assert np.trapezoid(found.values, found.grid) == pytest.approx(1.0, abs=1e-3)


def _at(its: Team, product: Compact) -> tuple[float, np.ndarray]:
    loss, gradient = its.gradient()
    return loss, gradient[product._positions]


@pytest.mark.cluster
@pytest.mark.parametrize("most", [2, full(3)])
def test_the_bits_are_the_same_with_any_number_of_processes(most: int) -> None:
    products = []
    for processes in (1, most):
        with team("digits", 200, processes, micro_batch=20) as its:
            product = product_of(its)
            vector = np.random.default_rng(0).standard_normal(product.size)
            products.append((product(vector).tobytes(), its.gradient()[1].tobytes()))
    assert len(set(products)) == 1


def test_a_valley_is_a_minimum() -> None:
    with team("valley", 8) as its:
        product = product_of(its)
        found = measure(product, *_at(its, product))
        assert found.eigenvalues == (3.0, 1.0)
        assert (found.trace, found.trace_error, found.point, found.gradient_norm) == (4.0, 0.0, "minimum", 0.0)


def test_what_cannot_be_differentiated_twice_is_refused() -> None:
    with team("once", 8) as its, pytest.raises(TaskError, match="differentiated twice"):
        its.hessian_product(np.ones(its.subject.layout.numel))


@pytest.mark.parametrize(
    ("smallest", "largest", "kind"),
    [
        (0.0, 0.0, "flat"),
        (0.1, 2.0, "minimum"),
        (-1e-5, 2.0, "minimum"),
        (-2.0, -0.1, "maximum"),
        (-1.0, 1.0, "saddle"),
    ],
)
def test_kinds_of_points(smallest: float, largest: float, kind: str) -> None:
    assert kind_of_point(smallest, largest) == kind


class _Matrix(Compact):
    def __init__(self, matrix: np.ndarray) -> None:
        super().__init__(lambda vector: matrix @ vector, len(matrix), np.arange(len(matrix)))


def spectrum(values: np.ndarray) -> _Matrix:
    rotation, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((len(values), len(values))))
    return _Matrix(rotation @ np.diag(values) @ rotation.T)


def test_the_trace_of_a_matrix_with_few_large_eigenvalues() -> None:
    values = np.concatenate([[100.0, 50.0, -20.0], np.full(297, 0.1)])
    traces = [hutch_plus_plus(spectrum(values), np.random.default_rng(seed), rank=20, most=60) for seed in range(20)]
    assert np.mean([trace for trace, _ in traces]) == pytest.approx(values.sum(), rel=1e-3)
    inside = [abs(trace - values.sum()) <= 3 * error + 1e-9 for trace, error in traces]
    assert np.mean(inside) > 0.8


def test_lanczos_gives_the_extreme_eigenvalues_of_a_known_spectrum() -> None:
    values = np.concatenate([[10.0, -4.0], np.linspace(0, 1, 98)])
    start = np.ones(100) / 10
    diagonal, beside = lanczos(spectrum(values), start, 60)
    own = np.linalg.eigvalsh(np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1))
    assert (own[0], own[-1]) == (pytest.approx(-4.0, rel=1e-8), pytest.approx(10.0, rel=1e-8))


def test_the_density_has_its_weight_where_the_eigenvalues_are() -> None:
    values = np.concatenate([np.full(70, 0.0), np.full(30, 5.0)])
    grid, density = spectral_density(spectrum(values), 20, 20, np.random.default_rng(0))
    near = [np.trapezoid(density[mask], grid[mask]) for mask in (grid < 2.5, grid >= 2.5)]
    assert near == pytest.approx([0.7, 0.3], abs=0.06)
    assert all(low <= high for low, high in itertools.pairwise(grid))
