"""What can be asked of a task, in a form that the service sends to processes; free of PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ps.parameters.description import ModelDescription
from steepest.spec import TrainingJobSpec

METHODS = OWN, FORWARD, FINITE = ("own", "forward", "finite")
MATRICES = HESSIAN, GAUSS_NEWTON = ("hessian", "gauss_newton")


@dataclass(frozen=True)
class Question:
    """A task at one point.

    model: as a rehearsal described it. num_samples: of the training data that are looked at, from the first one on.
    weights: a model.safetensors to take the parameters from; nothing: the task's own. evaluates_with_gradients, caches,
    loss_counts: as a JobConfig has them. freezes: dropout is off, and batch statistics are constant.
    """

    freezes: ClassVar[bool] = False
    spec: TrainingJobSpec
    model: ModelDescription
    num_samples: int
    weights: str = ""
    evaluates_with_gradients: bool = False
    caches: tuple[str, ...] = ()
    loss_counts: str = ""


@dataclass(frozen=True, kw_only=True)
class CheckQuestion(Question):
    """Whether two ways to a gradient, of METHODS, agree. tolerance: the largest relative error that passes."""

    got: str
    expected: str
    tolerance: float


@dataclass(frozen=True, kw_only=True)
class CurvatureQuestion(Question):
    """What a matrix of second derivatives, of MATRICES, is like there.

    top: how many of the largest eigenvalues. jacobian: for how many samples the Jacobian of the outputs is looked at.
    """

    freezes: ClassVar[bool] = True
    top: int
    matrix: str
    jacobian: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why there is no answer. field: of the spec. traceback: of the user's code, if it raised."""

    field: str
    message: str
    traceback: str = ""
