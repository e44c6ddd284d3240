"""How the loss curves: products of a loss's Hessian with vectors, and what a few of them say of its spectrum.

Products are exact: the gradient is itself differentiated (Pearlmutter 1994, "Fast exact multiplication by the
Hessian"). A few steps of Lanczos' method from a random vector find the extreme eigenvalues, which stand apart from the
others in a neural network (Ghorbani, Krishnan, Xiao 2019): with 15 products the largest to 5 % and the smallest to a
quarter at worst, for a small perceptron from its first step to its end. What is found lies inside the spectrum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ps.parameters.layout import Layout
from worker.gradients.batches import Batches
from worker.gradients.losses import LossValue
from worker.gradients.products import CurvatureError, check_twice, errors_named
from worker.gradients.seeding import mix
from worker.gradients.torch_engine import TorchEngine

PRODUCTS = 15  # of the Hessian with a vector, in one look at a loss
SMALL = 1e-6  # of the largest entry of Lanczos' matrix: a vector that short is rounding error


class Hessian:
    """The Hessian of a loss's value by some parameters. Keeps the graph of a gradient. Raises CurvatureError."""

    def __init__(self, found: LossValue, parameters: Sequence[torch.Tensor]) -> None:
        self._parameters = parameters
        with errors_named():
            self._first = torch.autograd.grad(found.value, parameters, create_graph=True, allow_unused=True)
        check_twice(self._first)

    def times(self, vector: Sequence[torch.Tensor], *, again: bool = False) -> list[torch.Tensor | None]:
        """The Hessian times a vector, with one tensor for each parameter; None for zeros. Raises CurvatureError.

        again: whether another product follows.
        """
        kept = [
            (g, v.to(g.dtype)) for g, v in zip(self._first, vector, strict=True) if g is not None and g.requires_grad
        ]
        if not kept:  # the loss is linear
            return [None] * len(self._parameters)
        with errors_named():
            return list(
                torch.autograd.grad(
                    [g for g, _ in kept],
                    self._parameters,
                    [v for _, v in kept],
                    retain_graph=again,
                    allow_unused=True,
                )
            )


class Curvature(NamedTuple):
    """Of a mean loss: the largest and the smallest eigenvalue of its Hessian."""

    sharpness: float
    smallest: float


def measure_curvature(
    engine: TorchEngine, batch: Any, num_samples: int, layout: Layout, seed: int, *, products: int = PRODUCTS
) -> Curvature:
    """Look at the mean loss of a batch, without dropout and with constant batch statistics.

    seed: of the vector that Lanczos' method begins with. Takes about twice as many passes as products, and the memory
    of two. Raises CurvatureError, LossError, StateError.
    """
    with engine.differentiable_twice():
        found = engine.forward(batch, num_samples)
        scale = found.factor / found.weight if found.weight > 0 else 0.0
        if not scale:
            return Curvature(math.nan, math.nan)
        size = sum(p.numel for p in layout.parameters)
        matrix = _lanczos(Hessian(found, engine.parameters), engine.parameters, seed, min(products, size))
    engine.check_parameters()
    if not bool(torch.isfinite(matrix).all()):
        return Curvature(math.nan, math.nan)
    values = torch.linalg.eigvalsh(matrix) * scale
    return Curvature(float(values[-1]), float(values[0]))


def _lanczos(hessian: Hessian, parameters: Sequence[torch.Tensor], seed: int, steps: int) -> torch.Tensor:
    """The tridiagonal matrix of Lanczos' method, float64, without orthogonalizing again: few steps need none."""
    sizes = [p.numel() for p in parameters]

    def product_of(vector: torch.Tensor, *, again: bool) -> torch.Tensor:
        views = [v.view(p.shape) for v, p in zip(torch.split(vector, sizes), parameters, strict=True)]
        parts = zip(hessian.times(views, again=again), parameters, strict=True)
        whole = [torch.zeros_like(p) if part is None else part for part, p in parts]
        return torch.cat([part.reshape(-1) for part in whole]).to(vector.dtype)

    vector = before = _random_unit(parameters, seed)
    diagonal: list[float] = []
    beside: list[float] = []
    for number in range(1, steps + 1):
        rest = product_of(vector, again=number < steps)
        diagonal.append(float(torch.dot(vector, rest)))
        rest.sub_(vector, alpha=diagonal[-1])
        if beside:
            rest.sub_(before, alpha=beside[-1])
        length = float(torch.linalg.vector_norm(rest))
        if number == steps or not length > SMALL * max(map(abs, [*diagonal, *beside])):
            break
        beside.append(length)
        before, vector = vector, rest.div_(length)
    between = torch.tensor(beside, dtype=torch.float64)
    return torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + torch.diag(between, 1) + torch.diag(between, -1)


class CurvatureSignal:
    """Looks at micro-batch 0 of some steps. every: of the spec's telemetry. seed: of the job."""

    def __init__(self, engine: TorchEngine, layout: Layout, batches: Batches, every: int, seed: int) -> None:
        self._engine = engine
        self._layout = layout
        self._batches = batches
        self._every = every
        self._seed = seed

    def look(self, step: int) -> Curvature | None:
        """Of a step that is due, None of others. What fails here is printed, and no failure of the job."""
        samples = self._batches.indices(step, 0)
        if step % self._every or not len(samples):
            return None
        try:
            batch = self._batches.some(step, 0, samples)
            return measure_curvature(self._engine, batch, len(samples), self._layout, mix(self._seed, step))
        except CurvatureError as error:
            print(f"the curvature at step {step} could not be measured: {error}", flush=True)
            return None


def _random_unit(like: Sequence[torch.Tensor], seed: int) -> torch.Tensor:
    """A vector of length 1 with entries of one magnitude, the same on every device."""
    size = sum(each.numel() for each in like)
    signs = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(seed)).mul_(2).sub_(1)
    dtype = torch.promote_types(like[0].dtype, torch.float32)
    return signs.to(like[0].device, dtype).div_(math.sqrt(size))
