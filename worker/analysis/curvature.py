"""The Hessian of a task's loss from its products with vectors: eigenvalues, trace, spectral density, kind of point.

Eigenvalues by Lanczos with restarts (ARPACK, through SciPy); the trace by Hutch++ (Meyer, Musco, Musco, Woodruff 2021);
the density by stochastic Lanczos quadrature (Ghorbani, Krishnan, Xiao 2019, "An investigation into neural net
optimization via Hessian eigenvalue density"). Whatever is drawn comes from the seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

from worker.task.load import TaskError

Vector = NDArray[np.float64]
Product = Callable[[Vector], Vector]

DENSE_NUMEL = 64  # up to here the whole matrix is made
TOP_TOLERANCE = 1e-5  # of eigenvalues, relative
SAME_SIGN = 1e-4  # of the largest magnitude: eigenvalues below that count as zero
FLAT = 1e-12  # magnitudes below that, all of them, are no curvature
LEAST_PRODUCTS, MOST_PRODUCTS, PRODUCTS_NUMEL = 150, 1000, 50_000_000  # for the trace: fewer for large models
LEAST_ESTIMATES = 10  # of the part of the trace that is estimated
GRID = 200  # points of the density
BROADENING = 0.01  # of the spectrum's width: the standard deviation of what stands for one eigenvalue


@dataclass(frozen=True)
class Curvature:
    """What was measured. eigenvalues: the largest ones, largest first; smallest: the least one.

    trace_error: a standard error of the trace. grid, values: the density of all eigenvalues, whose integral is 1.
    gradient_norm: how far from a critical point this is.
    """

    eigenvalues: tuple[float, ...]
    smallest: float
    trace: float
    trace_error: float
    grid: tuple[float, ...]
    values: tuple[float, ...]
    loss: float
    gradient_norm: float

    @property
    def point(self) -> str:
        """minimum, maximum, saddle or flat: what the eigenvalues say, were this a critical point."""
        return kind_of_point(self.smallest, self.eigenvalues[0])

    def to_dict(self) -> dict[str, Any]:
        """What --json prints."""
        return {
            "eigenvalues": list(self.eigenvalues),
            "smallest_eigenvalue": self.smallest,
            "sharpness": self.eigenvalues[0],
            "trace": self.trace,
            "trace_error": self.trace_error,
            "density": {"grid": list(self.grid), "values": list(self.values)},
            "point": self.point,
            "loss": self.loss,
            "gradient_norm": self.gradient_norm,
        }


def kind_of_point(smallest: float, largest: float) -> str:
    """minimum, maximum, saddle or flat, by the extreme eigenvalues."""
    size = max(abs(smallest), abs(largest))
    if size < FLAT:
        return "flat"
    up, down = largest > SAME_SIGN * size, smallest < -SAME_SIGN * size
    return "saddle" if up and down else "minimum" if up else "maximum"


class Compact:
    """Products without the padding of the layout. positions: of the parameters' elements in it."""

    def __init__(self, product: Product, numel: int, positions: NDArray[np.int64]) -> None:
        self._product = product
        self._whole = np.zeros(numel)
        self._positions = positions
        self.size = len(positions)

    def __call__(self, vector: Vector) -> Vector:
        """The matrix times a vector, shape (size,)."""
        self._whole[self._positions] = vector
        return self._product(self._whole)[self._positions]


def measure(
    product: Compact,
    loss: float,
    gradient: Vector,
    *,
    top: int = 5,
    density_vectors: int = 4,
    lanczos_steps: int = 60,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> Curvature:
    """All of it. product: of the Hessian of the mean loss. gradient: of the mean loss, shape (size,)."""
    generator = np.random.default_rng(seed)
    size = product.size
    top = min(top, size)
    if size <= DENSE_NUMEL:
        matrix = np.array([product(row) for row in np.eye(size)])
        values = np.linalg.eigvalsh((matrix + matrix.T) / 2)
        largest, smallest = values[::-1][:top], float(values[0])
        trace, error = float(np.trace(matrix)), 0.0
        grid, density = broadened(values, np.full(size, 1 / size))
    else:
        say(f"the {top} largest eigenvalues")
        largest, smallest = extremes(product, top, generator)
        say("the trace")
        most = min(MOST_PRODUCTS, max(LEAST_PRODUCTS, PRODUCTS_NUMEL // size))
        trace, error = hutch_plus_plus(product, generator, most=most)
        say("the spectral density")
        grid, density = spectral_density(product, density_vectors, min(lanczos_steps, size), generator)
    return Curvature(
        tuple(map(float, largest)),
        smallest,
        trace,
        error,
        tuple(grid.tolist()),
        tuple(density.tolist()),
        loss,
        float(np.linalg.norm(gradient)),
    )


def extremes(product: Compact, top: int, generator: np.random.Generator) -> tuple[Vector, float]:
    """(the `top` largest eigenvalues, largest first, the smallest one). Raises ValueError when they are not found."""

    def find(operator: Product, count: int) -> Vector:
        start = generator.standard_normal(product.size)
        try:
            found: Vector = eigsh(
                LinearOperator((product.size, product.size), matvec=operator, dtype=np.float64),
                count,
                which="LA",
                v0=start,
                ncv=min(product.size, max(4 * count + 1, 40)),
                tol=TOP_TOLERANCE,
                return_eigenvectors=False,
            )
        except ArpackNoConvergence as error:
            raise TaskError("task", f"the eigenvalues were not found in {product.size} dimensions: {error}") from error
        return np.sort(found)[::-1]

    largest = find(product, min(top, product.size - 1))
    # ARPACK's tolerance is relative, and the smallest eigenvalue may be 0: so it is looked for from the largest one on.
    shift = max(float(largest[0]), FLAT)
    return largest, shift - float(find(lambda vector: shift * vector - product(vector), 1)[0])


def hutch_plus_plus(
    product: Compact, generator: np.random.Generator, *, rank: int = 60, most: int = 1000, error: float = 0.005
) -> tuple[float, float]:
    """(estimate of the trace, its standard error).

    `rank` products find where the matrix is large, whose part of the trace is exact; the rest is estimated by
    Hutchinson's method until the standard error is `error` of the estimate, with at most so many products in all. With
    as many as dimensions, it is exact.
    """
    size = product.size
    if size <= most:
        unit = np.zeros(size)
        diagonal = []
        for index in range(size):
            unit[index] = 1.0
            diagonal.append(float(product(unit)[index]))
            unit[index] = 0.0
        return math.fsum(diagonal), 0.0
    sketch = np.array([product(row) for row in generator.choice([-1.0, 1.0], (rank, size))]).T
    basis, _ = np.linalg.qr(sketch)
    exact = sum(float(column @ product(column)) for column in basis.T)
    rest: list[float] = []
    while True:
        row = generator.choice([-1.0, 1.0], size)
        outside = row - basis @ (basis.T @ row)
        rest.append(float(outside @ product(outside)))
        if len(rest) < LEAST_ESTIMATES:
            continue
        trace = exact + float(np.mean(rest))
        deviation = float(np.std(rest, ddof=1) / math.sqrt(len(rest)))
        if deviation <= error * abs(trace) or 2 * rank + len(rest) >= most:
            return trace, deviation


def spectral_density(
    product: Compact, num_vectors: int, steps: int, generator: np.random.Generator
) -> tuple[Vector, Vector]:
    """(grid, density of the eigenvalues on it)."""
    values, weights = [], []
    for _ in range(num_vectors):
        start = generator.standard_normal(product.size)
        diagonal, beside = lanczos(product, start / np.linalg.norm(start), steps)
        own, vectors = eigh_tridiagonal(diagonal, beside)
        values.append(own)
        weights.append(vectors[0] ** 2 / num_vectors)
    return broadened(np.concatenate(values), np.concatenate(weights))


def lanczos(product: Product, start: Vector, steps: int) -> tuple[Vector, Vector]:
    """The tridiagonal matrix of Lanczos' method, as (diagonal, beside it), with full orthogonalization."""
    basis = [start]
    diagonal: list[float] = []
    beside: list[float] = []
    for _ in range(steps):
        vector = product(basis[-1])
        diagonal.append(float(basis[-1] @ vector))
        known = np.array(basis)
        for _ in range(2):  # once is not enough in floating point
            vector = vector - known.T @ (known @ vector)
        length = float(np.linalg.norm(vector))
        if length < 1e-10 * max(map(abs, diagonal)) or len(basis) == steps:
            break
        beside.append(length)
        basis.append(vector / length)
    return np.array(diagonal), np.array(beside[: len(diagonal) - 1])


def broadened(values: Vector, weights: Vector) -> tuple[Vector, Vector]:
    """(grid, density): a Gaussian of its weight for each value."""
    low, high = float(values.min()), float(values.max())
    width = max(high - low, 1e-9 * max(abs(low), abs(high)), 1e-12)
    sigma = BROADENING * width
    grid = np.linspace(low - 5 * sigma, high + 5 * sigma, GRID)
    bells = np.exp(-0.5 * ((grid[:, None] - values[None, :]) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
    return grid, bells @ weights
