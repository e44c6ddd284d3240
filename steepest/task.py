"""What a user writes: a task says what is trained, on what, towards what."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn


class ArrayData:
    """Arrays (NumPy or torch) of equal length whose rows are the samples; the fast path for data that fit in memory.

    A batch is a tuple with the rows of each array, or the rows themselves when there is one array.

    Raises ValueError for no arrays, for scalars, or for arrays of unequal lengths.
    """

    def __init__(self, *arrays: Any) -> None:
        if not arrays:
            raise ValueError("ArrayData needs at least one array")
        if any(getattr(a, "ndim", 0) == 0 for a in arrays):
            raise ValueError("ArrayData takes NumPy arrays or torch tensors with at least one dimension")
        lengths = [len(a) for a in arrays]
        if len(set(lengths)) > 1:
            raise ValueError(f"ArrayData needs arrays of equal length; these have {', '.join(map(str, lengths))} rows")
        self.arrays = arrays

    def __len__(self) -> int:
        return len(self.arrays[0])

    def __getitem__(self, index: int) -> Any:
        rows = tuple(a[index] for a in self.arrays)
        return rows if len(rows) > 1 else rows[0]


def _refuse_loss(metrics: Mapping[str, Any]) -> None:
    if "loss" in metrics:
        raise ValueError("metrics: the name 'loss' is taken by the evaluation's own loss; rename that metric")


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters that are updated in a way of their own.

    names: a pattern of names, as of files: `"backbone.*"`, `"*.bias"`. lr_scale: times the job's learning rate.
    weight_decay: instead of the job's. frozen: not trained at all.

    Raises ValueError for a negative number.
    """

    names: str
    lr_scale: float = 1.0
    weight_decay: float | None = None
    frozen: bool = False

    def __post_init__(self) -> None:
        if self.lr_scale < 0 or (self.weight_decay or 0) < 0:
            raise ValueError(f"ParameterGroup({self.names!r}): lr_scale and weight_decay must not be negative")


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model, its data and its loss.

    model: trained with its parameters that require gradients; float64 and complex128 do not mix with other types.
    loss: `loss(model(inputs), targets)` -> scalar, the mean over the samples of a batch of pairs (inputs, targets), or
        a vector with the loss of each sample. A batch of more entries is (*inputs, targets). A loss that is a module
        is trained, too.
    batch_loss: instead of `loss`: `batch_loss(model, batch)` -> a scalar (mean over the samples), a vector with the
        loss of each, or (sum, weight). Without either, the model takes the batch's entries as arguments and returns its
        loss: an object with `.loss`, a dict with "loss", or a tuple that begins with it.
    loss_weight: `loss_weight(batch)` -> what the mean that the loss returns is over, where that is not the samples: the
        number of targets that count, say. Losses over classes of torch.nn need none.
    train_data, eval_data: a torch Dataset, IterableDataset or DataLoader, ArrayData, ParquetData or TarData.
    metrics: name -> `metric(outputs, targets)` -> mean over the samples, on eval_data. outputs: `model(inputs)`. For a
        model that returns its loss: `metric(what the model returned, batch)`.
    collate: list of samples -> batch; default: torch.utils.data.default_collate. Not for ArrayData.
    evaluation_needs_gradients: whether the loss differentiates, so that evaluations must not run under
        `torch.no_grad()`; None: found out when the job is submitted.
    parameter_groups: parameters with a learning rate or weight decay of their own, or frozen ones; the first group
        whose pattern fits a name counts.
    schedule: `schedule(update)` -> the factor of the job's learning rate, as torch's LambdaLR takes it; instead of the
        spec's. It is called for every step when the job is submitted.

    Raises ValueError when both loss and batch_loss are given.
    """

    model: nn.Module
    train_data: Any
    eval_data: Any = None
    loss: Callable[[Any, Any], Any] | None = None
    batch_loss: Callable[[Any, Any], Any] | None = None
    metrics: Mapping[str, Callable[[Any, Any], Any]] = field(default_factory=dict)
    collate: Callable[[Sequence[Any]], Any] | None = None
    loss_weight: Callable[[Any], Any] | None = None
    evaluation_needs_gradients: bool | None = None
    parameter_groups: Sequence[ParameterGroup] = ()
    schedule: Callable[[int], float] | None = None

    def __post_init__(self) -> None:
        _refuse_loss(self.metrics)
        if self.loss is not None and self.batch_loss is not None:
            raise ValueError("loss, batch_loss: both are given; a Task has at most one of the two")
        if getattr(self.loss, "reduction", "mean") not in ("mean", "batchmean", "none"):
            reduction = getattr(self.loss, "reduction", None)
            raise ValueError(
                f"loss has reduction={reduction!r}; allowed: 'mean', 'none' (for a sum, have batch_loss return "
                "(sum, weight))"
            )


@dataclass(frozen=True, kw_only=True)
class AnalyticTask:
    """A task without torch: NumPy parameters, and a gradient derived by hand.

    parameters: name -> initial value, all float32 or all float64.
    gradient: `gradient(parameters, batch)` -> (loss sum, weight, {name: gradient of the loss sum}).
    train_data, eval_data: ArrayData.
    predict: `predict(parameters, inputs)` -> outputs; needed for metrics.
    metrics: name -> `metric(outputs, targets)` -> mean over the samples.

    Raises ValueError when there are metrics but no `predict`.
    """

    parameters: Mapping[str, NDArray[np.floating[Any]]]
    gradient: Callable[[Mapping[str, Any], Any], tuple[float, float, Mapping[str, Any]]]
    train_data: ArrayData
    eval_data: ArrayData | None = None
    predict: Callable[[Mapping[str, Any], Any], Any] | None = None
    metrics: Mapping[str, Callable[[Any, Any], Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _refuse_loss(self.metrics)
        if self.metrics and self.predict is None:
            raise ValueError("metrics need predict(parameters, inputs), which is not given")
