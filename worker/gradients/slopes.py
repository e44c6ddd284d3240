"""Gradients from derivatives along directions, in forward mode or by central differences. No backward pass is made.

A derivative along a direction costs a few forward passes and keeps nothing for later; a gradient takes one for each
entry of each parameter, so this is for few of them. An estimate takes a single one, whatever their number: the
derivative along a random direction, times that direction, is the gradient in expectation (Baydin, Pearlmutter, Syme,
Wood, Torr 2022, "Gradients without backpropagation").
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.autograd import forward_ad

from ps.parameters.description import ModelDescription
from ps.parameters.layout import Layout
from steepest.spec import ESTIMATE, FINITE, REVERSE
from steepest.task import Task
from worker.gradients.backend import Backend
from worker.gradients.engine import Direction, LossError, Measured, Rehearsed
from worker.gradients.losses import LossValue
from worker.gradients.seeding import mix
from worker.gradients.torch_engine import TorchEngine, plain_kernels

ALONG = 0x51  # keeps the seed of a direction apart from that of its pass
DIFFERENCE = float(np.finfo(np.float64).eps) ** (1 / 3)  # of an entry: best for central differences, to its size


class SlopeEngine(TorchEngine):
    """As TorchEngine, with gradients from derivatives along directions. way: of the spec, but REVERSE."""

    def __init__(
        self,
        way: str,
        task: Task,
        model: ModelDescription,
        layout: Layout,
        backend: Backend,
        precision: str = "full",
        known: Rehearsed = Rehearsed(),  # noqa: B008  # immutable
    ) -> None:
        super().__init__(task, model, layout, backend, precision, known)
        self._way = way
        self._tell: Callable[[int], None] | None = None

    def watch(self, on_final: Callable[[int], None]) -> None:
        """See Engine: all of a gradient comes at once."""
        self._tell = on_final

    def gradient(
        self, batch: Any, num_samples: int, into: list[torch.Tensor], *, add: bool, direction: Direction | None = None
    ) -> Measured:
        """See Engine. Raises LossError, StateError."""
        if direction is not None:
            return super().gradient(batch, num_samples, into, add=add, direction=direction)
        with torch.set_grad_enabled(self.evaluates_with_gradients):
            draws = _Draws(is_on_host=self._is_on_host)

            def loss() -> LossValue:
                draws.again()
                return self.forward(batch, num_samples)

            slopes = self._estimate(loss) if self._way == ESTIMATE else self._entries(loss)
            found = loss()  # last, so that buffers are those of this point
        self.check_parameters()
        empty = found.weight == 0 and (found.factor == 0 or not bool(torch.isfinite(found.value)))
        for index, (place, slope) in enumerate(zip(into, slopes, strict=True)):
            total = torch.zeros_like(slope) if empty else slope.mul_(found.factor)
            place.add_(total.to(place.dtype)) if add else place.copy_(total)
            if self._tell is not None:
                self._tell(index)
        if empty:  # the mean of nothing
            return Measured(0.0, 0.0, (0.0,) * len(self.logged or ()))
        return Measured(found.value.item() * found.factor, found.weight, self._logged(found))

    def _entries(self, loss: Callable[[], LossValue]) -> list[torch.Tensor]:
        """The derivative by each entry."""
        along = self._difference if self._way == FINITE else self._forward
        slopes = []
        for index, parameter in enumerate(self.parameters):
            slope = torch.zeros_like(parameter)
            for entry in np.ndindex(parameter.shape):
                slope[entry] = along(loss, index, entry)
            slopes.append(slope)
        return slopes

    def _forward(self, loss: Callable[[], LossValue], index: int, entry: tuple[int, ...]) -> float:
        unit = torch.zeros_like(self.parameters[index])
        unit[entry] = 1.0
        return slope_of(self, loss, {index: unit})

    def _difference(self, loss: Callable[[], LossValue], index: int, entry: tuple[int, ...]) -> float:
        moved = self.parameters[index].detach().clone()
        at = float(moved[entry])
        step = DIFFERENCE * max(1.0, abs(at))
        sides = []
        for to in (at + step, at - step):
            moved[entry] = to
            with self.with_parameters({index: moved}):
                sides.append((loss().value.item(), float(moved[entry])))
        (high, upper), (low, lower) = sides
        return (high - low) / (upper - lower)

    def _estimate(self, loss: Callable[[], LossValue]) -> list[torch.Tensor]:
        directions = self.directions()
        slope = slope_of(self, loss, dict(enumerate(directions)))
        return [direction.mul_(slope) for direction in directions]

    def directions(self) -> list[torch.Tensor]:
        """What an estimate is along, of each parameter: from the seed of the pass, but by other random numbers."""
        generator = torch.Generator().manual_seed(mix(torch.initial_seed(), ALONG))
        return [
            torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.device, p.dtype)
            for p in self.parameters
        ]


def engine_of(way: str) -> Callable[..., TorchEngine]:
    """What makes the engine that computes gradients in one of the spec's ways, of the arguments of a TorchEngine."""
    return TorchEngine if way == REVERSE else partial(SlopeEngine, way)


def slope_of(engine: TorchEngine, loss: Callable[[], LossValue], directions: dict[int, torch.Tensor]) -> float:
    """The derivative of a loss's value along directions, by parameter, in forward mode. Raises LossError."""
    try:
        with forward_ad.dual_level(), _with_forward_derivatives():
            parameters = engine.parameters
            duals = {
                index: forward_ad.make_dual(parameters[index].detach(), direction)  # type: ignore[no-untyped-call]
                for index, direction in directions.items()
            }
            with engine.with_parameters(duals):
                tangent = forward_ad.unpack_dual(loss().value).tangent  # type: ignore[no-untyped-call]
            return 0.0 if tangent is None else float(tangent)
    except NotImplementedError as error:
        if not re.search(r"forward (mode )?AD", str(error)):  # the user's own
            raise
        problem = f"an operation of the model has no forward derivative: {error}"
        raise LossError(f"{problem}; derivative=reverse needs none") from error


@contextmanager
def _with_forward_derivatives() -> Iterator[None]:
    """Operations have them where torch has faster ones that have none."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(value=False)
    try:
        with plain_kernels():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(value=fast)


class _Draws:
    """What random generators are to draw, again and again."""

    def __init__(self, *, is_on_host: bool) -> None:
        self._torch = torch.get_rng_state()
        self._gpu = None if is_on_host else torch.cuda.get_rng_state()
        self._others = random.getstate(), np.random.get_state()  # which user code may draw from

    def again(self) -> None:
        torch.set_rng_state(self._torch)
        if self._gpu is not None:
            torch.cuda.set_rng_state(self._gpu)
        random.setstate(self._others[0])
        np.random.set_state(self._others[1])
