"""The optimizers by themselves, on a function whose minimum is known."""

from __future__ import annotations

import pytest
import torch

from ps.numerics.full_batch import FullBatchOptimizer
from ps.parameters.layout import build_layout, shards
from steepest.optimizer_spec import optimizer_spec
from tests.support.models import described

LAYOUT = build_layout(described([(3, 4), (5,)], "float64"), is_whole=True)
(SHARD,) = shards(LAYOUT, 1)
SCALES = torch.linspace(1.0, 50.0, LAYOUT.numel, dtype=torch.float64)
WEIGHT = 4.0  # of a step


KINDS = {
    "lbfgs": optimizer_spec(name="lbfgs", tolerance_grad=1e-12, tolerance_change=1e-30),
    "newton_cg": optimizer_spec(name="newton_cg"),
    "damped": optimizer_spec(name="newton_cg", products="gauss_newton", damping=5.0),
    "differences": optimizer_spec(name="newton_cg", products="differences"),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def _optimizer(kind: str, start: torch.Tensor) -> FullBatchOptimizer:
    return FullBatchOptimizer(KINDS[kind], SHARD, start)


def _start() -> torch.Tensor:
    flat = torch.zeros(LAYOUT.numel, dtype=torch.float64)
    for view in LAYOUT.views(flat):
        view.copy_(torch.arange(1.0, view.numel() + 1).view(view.shape))
    return flat


def _advance(optimizer: FullBatchOptimizer, flat: torch.Tensor, steps: int, *, last: bool = False) -> None:
    for step in range(steps):
        loss = float(0.5 * (SCALES * flat * flat).sum())
        gradient = WEIGHT * SCALES * (flat if optimizer.direction is None else optimizer.direction)
        optimizer.step(gradient, lr=1.0, divisor=WEIGHT, loss=loss, last=last and step == steps - 1)


@kinds
def test_it_comes_to_the_minimum_and_stays_there(kind: str) -> None:
    flat = _start()
    optimizer = _optimizer(kind, flat)
    _advance(optimizer, flat, 150)
    _advance(optimizer, flat, 5, last=True)
    assert float((SCALES * flat).norm()) < 1e-9


@kinds
@pytest.mark.parametrize("steps", [1, 2, 5, 12])
def test_the_last_step_leaves_the_best_point(steps: int, kind: str) -> None:
    def loss(flat: torch.Tensor) -> float:
        return float(0.5 * (SCALES * flat * flat).sum())

    flat, seen = _start(), []
    optimizer = _optimizer(kind, flat)
    for step in range(steps):
        seen += [loss(flat)] if optimizer.direction is None else []
        _advance(optimizer, flat, 1, last=step == steps - 1)
    assert loss(flat) == min(seen)


@kinds
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 6, 11, 40])
def test_it_goes_on_from_its_state(steps: int, kind: str) -> None:
    flat = _start()
    optimizer = _optimizer(kind, flat)
    _advance(optimizer, flat, steps)
    state = {f"{p.parameter}.{p.state}": p.values.clone().view(p.shape or ()) for p in optimizer.export_state()}
    again = flat.clone()
    other = _optimizer(kind, again)
    other.import_state(state)
    assert torch.equal(again, flat)
    for _ in range(10):
        _advance(optimizer, flat, 1)
        _advance(other, again, 1)
        assert torch.equal(again, flat)


@kinds
def test_what_goes_wrong_in_its_thread_is_raised_where_it_is_waited_for(kind: str) -> None:
    flat = _start()
    optimizer = _optimizer(kind, flat)
    _advance(optimizer, flat, 1)
    with pytest.raises((RuntimeError, ValueError)):
        optimizer.step(torch.ones(3, dtype=torch.float64), lr=1.0, divisor=1.0, loss=1.0, last=False)


def test_products_are_asked_for_at_the_point_where_the_iteration_began() -> None:
    flat = _start()
    optimizer = _optimizer("newton_cg", flat)
    _advance(optimizer, flat, 1)
    assert torch.equal(flat, _start())
    assert optimizer.direction is not None
    gradient = SCALES * flat
    assert torch.equal(optimizer.direction, -gradient)


def test_damping_follows_what_the_matrix_foretells() -> None:
    """The loss is quadratic, so every step does as foretold; with a hundredth of its matrix, worse by far."""
    flat = _start()
    optimizer = _optimizer("damped", flat)
    _advance(optimizer, flat, 30)
    assert optimizer._kind.state()["damping"] < 5.0
    flat = _start()
    optimizer = _optimizer("damped", flat)
    for _ in range(20):
        product = optimizer.direction is not None
        loss = float(0.5 * (SCALES * flat * flat).sum())
        what = flat if optimizer.direction is None else 0.01 * optimizer.direction
        optimizer.step(WEIGHT * SCALES * what, lr=1.0, divisor=WEIGHT, loss=loss, last=False)
        if product and optimizer.direction is None:
            break
    _advance(optimizer, flat, 1)
    assert optimizer._kind.state()["damping"] > 5.0


def test_single_precision_comes_as_far_as_its_rounding() -> None:
    layout = build_layout(described([(3, 4), (5,)]), is_whole=True)
    (shard,) = shards(layout, 1)
    scales, flat = SCALES[: layout.numel].float(), _start()[: layout.numel].float()
    optimizer = FullBatchOptimizer(KINDS["newton_cg"], shard, flat)
    for _ in range(150):
        what = flat if optimizer.direction is None else optimizer.direction
        loss = float(0.5 * (scales.double() * flat.double() ** 2).sum())
        optimizer.step(scales * what, lr=1.0, divisor=1.0, loss=loss, last=False)
    assert float((scales * flat).norm()) < 1e-5
