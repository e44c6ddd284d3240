"""The one interface behind which gradients are computed, whatever by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from ps.memory.segment import Segment
from ps.parameters.layout import Layout
from worker.data.sources import Source
from worker.gradients.activations import Activations


class Pending(NamedTuple):
    """A loss that may still be computed on a GPU: value, of one element, times factor is the loss sum."""

    value: torch.Tensor
    factor: float

    def __float__(self) -> float:
        return float(self.value.item()) * self.factor


class Measured(NamedTuple):
    """A loss sum and its weight, and sums of values: of the metrics, or of what the loss function returned besides.

    pending: the loss sum of training on a GPU; `loss` is 0 then.
    """

    loss: float
    weight: float
    values: tuple[float, ...] = ()
    pending: Pending | None = None


class Rehearsed(NamedTuple):
    """What was found out of a task when it was rehearsed, besides its model.

    evaluates_with_gradients: whether evaluations run with autograd on. caches: names of attributes that passes change.
    logged: names of what the loss function returns besides; None: not known yet. counts: see losses.loss_of.
    """

    evaluates_with_gradients: bool = False
    caches: tuple[str, ...] = ()
    logged: tuple[str, ...] | None = None
    counts: str = ""


class LossError(Exception):
    """The user's loss function returned something that is not a loss. The message says what is wrong."""


class MetricError(LossError):
    """A metric of the user's returned something that is no number."""


class StateError(Exception):
    """User code changed something that a worker must not keep for itself. The message says what, and what to do."""


class InPartsError(Exception):
    """A parameter's gradient came in parts and the first was taken for the whole: compute the sum again.

    Once is enough: the engine waits for the rest of that parameter's gradient from then on.
    """


class Direction(NamedTuple):
    """What second derivatives are multiplied with: those of the Hessian, or of the Gauss-Newton matrix.

    vector: one tensor per parameter, in the layout's order.
    """

    vector: Sequence[torch.Tensor]
    is_gauss_newton: bool = False


class Engine(Protocol):
    """Computes gradients of a task; `AnalyticEngine` and `TorchEngine` are the two."""

    only_torch: bool  # whether no code but torch's own runs in `gradient`
    train_source: Source
    eval_source: Source | None
    logged: tuple[str, ...] | None  # names of what the loss function returns besides, once they are known
    activations: Activations | None  # of the model, where it has any

    def write_initial(self, flat: torch.Tensor) -> None:
        """Write the task's own initial parameters into `flat`, shape (layout.numel,)."""

    def bind(self, flat: torch.Tensor) -> None:
        """Use `flat`, shape (layout.numel,), as the parameters from now on."""

    def refresh(self) -> None:
        """The bound parameters hold another version."""

    def gradient(
        self, batch: Any, num_samples: int, into: list[torch.Tensor], *, add: bool, direction: Direction | None = None
    ) -> Measured:
        """Write (or add) the gradient of the batch's loss sum into one tensor per parameter, in the layout's order.

        direction: the product of the loss sum's second derivatives with it is wanted instead.

        Raises InPartsError; the tensors hold nothing of use then.
        """

    def watch(self, on_final: Callable[[int], None]) -> None:
        """From now on, tell of each parameter of a gradient, by its index, when it is written."""

    def evaluate(self, batch: Any, num_samples: int, *, metrics: bool = True) -> Measured:
        """Loss and metrics, or the loss alone, without gradients."""

    def set_buffers(self, packed: bytes) -> None:
        """Start every micro-batch from these buffers."""

    def buffers(self) -> bytes | None:
        """The buffers as the last micro-batch left them, or None when it changed nothing."""

    def initial_buffers(self) -> bytes:
        """The buffers that the task came with."""

    def constants(self) -> bytes:
        """The frozen parameters that the task came with."""

    def share_constants(self, memory: Segment) -> None:
        """Have the frozen parameters where other workers of this host have them, too: behind the parameters."""


def measure_metrics(
    metrics: Mapping[str, Callable[[Any, Any], Any]], outputs: Any, targets: Any, num_samples: int
) -> tuple[float, ...]:
    """Each metric's sum over the samples. Raises MetricError for one that returns no number."""
    values = []
    for name, metric in metrics.items():
        value = metric(outputs, targets)
        try:
            values.append(float(value) * num_samples)
        except (TypeError, ValueError, RuntimeError) as error:
            kind = f"a tensor of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise MetricError(f"the metric {name!r} must return a number, the mean; it returned {kind}") from error
    return tuple(values)


def finite_parameters(into: list[torch.Tensor], layout: Layout) -> str:
    """The name of the first parameter whose tensor has a non-finite element, or nothing."""
    for placed, tensor in zip(layout.parameters, into, strict=True):
        if not bool(torch.isfinite(tensor).all()):
            return placed.name
    return ""
