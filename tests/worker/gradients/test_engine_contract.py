"""What every engine keeps, whatever computes its gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import steepest
from ps.parameters.layout import Layout, build_layout
from tests.support import tasks
from worker.gradients.analytic import AnalyticEngine
from worker.gradients.backend import CpuBackend
from worker.gradients.engine import Engine
from worker.gradients.torch_engine import TorchEngine
from worker.task.model import describe_model


def _torch_least_squares() -> steepest.Task:
    """tests.support.tasks.least_squares, by autograd."""
    inputs, targets = tasks.arrays(dtype=torch.float64)
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(tasks.NUM_INPUTS, tasks.NUM_OUTPUTS, dtype=torch.float64))

    def batch_loss(model: Any, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, float]:
        residual = batch[0] @ model.weight - batch[1]
        return 0.5 * residual.square().sum(), float(len(residual))

    return steepest.Task(model=model, batch_loss=batch_loss, train_data=steepest.ArrayData(inputs, targets))


def _analytic() -> tuple[Engine, Layout]:
    task = tasks.least_squares()
    layout = build_layout(describe_model(task))
    return AnalyticEngine(task, layout), layout


def _torch() -> tuple[Engine, Layout]:
    task = _torch_least_squares()
    description = describe_model(task)
    layout = build_layout(description)
    return TorchEngine(task, description, layout, CpuBackend()), layout


@pytest.fixture(params=[_analytic, _torch], ids=["analytic", "torch"])
def made(request: pytest.FixtureRequest) -> tuple[Engine, Layout]:
    make: Callable[[], tuple[Engine, Layout]] = request.param
    return make()


def _bound(made: tuple[Engine, Layout]) -> tuple[Engine, Layout, torch.Tensor]:
    engine, layout = made
    flat = torch.full((layout.numel,), torch.nan, dtype=layout.dtype)
    engine.write_initial(flat)
    for view in layout.views(flat):
        view.add_(0.25)  # where the gradient is not that of the initial parameters
    engine.bind(flat)
    engine.refresh()
    return engine, layout, flat


def _gradient(engine: Engine, layout: Layout, rows: range, into: torch.Tensor, *, add: bool) -> Any:
    batch = engine.train_source.batch(torch.tensor(rows).numpy())
    return engine.gradient(batch, len(rows), layout.views(into), add=add)


def _expected(rows: range) -> tuple[float, torch.Tensor]:
    inputs, targets = (a[list(rows)] for a in tasks.arrays(dtype=torch.float64))
    weight = torch.full((tasks.NUM_INPUTS, tasks.NUM_OUTPUTS), 0.25, dtype=torch.float64)
    residual = inputs @ weight - targets
    return float(0.5 * residual.square().sum()), inputs.T @ residual


def test_it_writes_the_gradient_of_the_loss_sum_at_the_bound_parameters(made: tuple[Engine, Layout]) -> None:
    engine, layout, _ = _bound(made)
    into = torch.full((layout.numel,), torch.nan, dtype=layout.dtype)
    measured = _gradient(engine, layout, range(10), into, add=False)
    loss, gradient = _expected(range(10))
    assert measured.loss == pytest.approx(loss, rel=1e-12)
    assert measured.weight == 10.0
    torch.testing.assert_close(layout.views(into)[0], gradient, rtol=1e-12, atol=1e-12)


def test_it_adds_where_it_is_told_to(made: tuple[Engine, Layout]) -> None:
    engine, layout, _ = _bound(made)
    into = torch.zeros(layout.numel, dtype=layout.dtype)
    _gradient(engine, layout, range(4), into, add=False)
    first = layout.views(into)[0].clone()
    _gradient(engine, layout, range(4, 9), into, add=True)
    torch.testing.assert_close(layout.views(into)[0], first + _expected(range(4, 9))[1], rtol=1e-12, atol=1e-12)


def test_it_sees_parameters_that_change_in_place(made: tuple[Engine, Layout]) -> None:
    engine, layout, flat = _bound(made)
    into = torch.zeros(layout.numel, dtype=layout.dtype)
    before = _gradient(engine, layout, range(5), into, add=False).loss
    layout.views(flat)[0].sub_(0.25)
    engine.refresh()
    assert _gradient(engine, layout, range(5), into, add=False).loss != before


def test_every_parameter_of_a_pass_is_told_once(made: tuple[Engine, Layout]) -> None:
    engine, layout, _ = _bound(made)
    told: list[int] = []
    engine.watch(told.append)
    into = torch.zeros(layout.numel, dtype=layout.dtype)
    for _ in range(2):
        told.clear()
        _gradient(engine, layout, range(5), into, add=False)
        assert sorted(told) == list(range(len(layout.parameters)))


def test_an_evaluation_is_the_loss_without_a_gradient(made: tuple[Engine, Layout]) -> None:
    engine, _, _ = _bound(made)
    measured = engine.evaluate(engine.train_source.batch(torch.arange(6).numpy()), 6)
    assert measured.loss == pytest.approx(_expected(range(6))[0], rel=1e-12)
    assert measured.weight == 6.0


def test_without_buffers_there_is_nothing_to_send(made: tuple[Engine, Layout]) -> None:
    engine, layout, _ = _bound(made)
    assert engine.initial_buffers() == b""
    engine.set_buffers(b"")
    _gradient(engine, layout, range(3), torch.zeros(layout.numel, dtype=layout.dtype), add=False)
    assert engine.buffers() is None
