"""What gradient checks and measurements of curvature find."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from steepest.v1 import training_jobs_pb2 as pb


@dataclass(frozen=True, slots=True)
class Derivative:
    """The derivative of the mean loss by one entry of a parameter, in two ways. index: along each axis."""

    parameter: str
    index: tuple[int, ...]
    expected: float
    got: float


@dataclass(frozen=True, slots=True)
class GradientCheck:
    """Whether two ways to a gradient agree.

    max_relative_error: the largest; of each parameter in `parameters`. worst: where that is; None without parameters.
    entries_compared: one by one; of the `entries` of large parameters all were compared along random directions. kinks:
    derivatives where the loss has one, and any value between the one-sided ones is right.
    """

    passed: bool
    max_relative_error: float
    tolerance: float
    worst: Derivative | None
    parameters: dict[str, float]
    entries_compared: int
    entries: int
    kinks: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that --json prints."""
        return asdict(self)


def check_from_proto(message: pb.GradientCheck) -> GradientCheck:
    """What was found, from the wire."""
    values = {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}
    worst = message.worst
    derivative = Derivative(worst.parameter, tuple(worst.index), worst.expected, worst.got)
    values["worst"] = derivative if message.HasField("worst") else None
    return GradientCheck(**{**values, "parameters": dict(message.parameters)})


@dataclass(frozen=True, slots=True)
class Curvature:
    """The Hessian of a job's mean loss at a checkpoint, or its Gauss-Newton matrix.

    eigenvalues: the largest, largest first. trace_error: the standard error of `trace`. density_grid, density_values:
    the density of all eigenvalues. point: minimum, maximum, saddle or flat, by the eigenvalues. matrix: hessian or
    gauss_newton. jacobian_singular_values: of the outputs for some samples by all parameters, largest first.
    """

    eigenvalues: tuple[float, ...]
    smallest_eigenvalue: float
    trace: float
    trace_error: float
    density_grid: tuple[float, ...]
    density_values: tuple[float, ...]
    point: str
    loss: float
    gradient_norm: float
    step: int
    samples: int
    parameters: int
    matrix: str = "hessian"
    jacobian_singular_values: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that --json prints."""
        own = {name: getattr(self, name) for name in self.__slots__ if not name.startswith("density")}
        own["jacobian_singular_values"] = list(self.jacobian_singular_values)
        density = {"grid": list(self.density_grid), "values": list(self.density_values)}
        return {**own, "eigenvalues": list(self.eigenvalues), "sharpness": self.eigenvalues[0], "density": density}


def curvature_from_proto(message: pb.Curvature) -> Curvature:
    """What was measured, from the wire."""
    values = {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}
    for name in ("eigenvalues", "density_grid", "density_values", "jacobian_singular_values"):
        values[name] = tuple(values[name])
    return Curvature(**values)
