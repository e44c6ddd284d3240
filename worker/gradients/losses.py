"""The loss of a batch as a sum and a weight, whichever way a task states it.

Micro-batches are added up by their sums and divided by their weights once, so that a step gives what the whole batch
gives. The mean of a loss is over its samples, except where it is known to be over something else: torch's losses over
classes leave out ignored targets and weigh classes.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from steepest.task import Task
from worker.gradients.engine import LossError


class LossValue(NamedTuple):
    """value * factor is the loss sum: a tensor of one element times a number. outputs: of the model, for metrics.

    targets: what metrics compare the outputs with. logged: values that the loss function returned besides, by name.
    """

    value: torch.Tensor
    factor: float
    weight: float
    outputs: Any
    targets: Any
    logged: Mapping[str, Any] = {}


class LossOf(Protocol):
    """Computes the loss of a batch."""

    def __call__(self, batch: Any, num_samples: int, host: Any = None) -> LossValue:
        """host: the batch as it was before it went to a GPU, if it did: to count there keeps nobody waiting."""


IGNORED = -100  # the label that PyTorch's losses, and with them Hugging Face's models, leave out


def _labels(batch: Any, first: int) -> float:
    return float((batch["labels"][..., first:] != IGNORED).sum())


# What the mean of a model's own loss may be over instead of the samples: the labels that count; of a model that
# predicts the next token, all of those but each sequence's first.
COUNTS: Mapping[str, Callable[[Any], float]] = {
    "labels": lambda batch: _labels(batch, 0),
    "shifted_labels": lambda batch: _labels(batch, 1),
}


def loss_of(task: Task, counts: str = "") -> LossOf:
    """How to compute a task's loss. counts: what its mean is over, of COUNTS; empty for the samples."""
    weigh = _weigher(task, counts)
    if task.loss is not None:
        counted = None if task.loss_weight is not None else _CountedLoss.of(task.loss)
        compute = functools.partial(_pair_loss, task.model, task.loss if counted is None else counted, weigh)
    elif task.batch_loss is not None:
        compute = functools.partial(_batch_loss, task.model, task.batch_loss, weigh)
    else:
        compute = functools.partial(_own_loss, task.model, weigh)

    def of(batch: Any, num_samples: int, host: Any = None) -> LossValue:
        return compute(batch, num_samples, batch if host is None else host)

    return of


Weigher = Callable[[Any, int], float]


def _weigher(task: Task, counts: str) -> Weigher:
    weight_of = task.loss_weight or COUNTS.get(counts)
    if weight_of is None:
        return lambda batch, num_samples: float(num_samples)
    return lambda batch, num_samples: _checked_weight(weight_of(batch), "loss_weight")


def _checked_weight(raw: Any, what: str) -> float:
    try:
        weight = float(raw)
    except (TypeError, ValueError, RuntimeError) as error:
        raise LossError(f"{what} must return a number as the weight; it returned {type(raw).__name__}") from error
    if not weight >= 0:
        raise LossError(f"{what} returned the weight {weight}; it must not be negative")
    return weight


def _pair_loss(model: nn.Module, loss: Any, weigh: Weigher, batch: Any, num_samples: int, host: Any) -> LossValue:
    *inputs, targets = _entries(batch, "loss")
    outputs = model(*inputs)
    if isinstance(loss, _CountedLoss):
        value, weight = loss(outputs, targets, num_samples, host[-1])
        if weight is not None:
            return LossValue(value, 1.0, weight, outputs, targets)
        return _mean(value, "loss", weigh, host, num_samples, outputs, targets)
    value, *more = _parts(loss(outputs, targets))
    found = _mean(value, "loss", weigh, host, num_samples, outputs, targets)
    if not more:
        return found
    if len(more) != 1 or not _is_logged(more[0]):
        raise LossError(
            f"loss returned a tuple of {1 + len(more)}; allowed: a scalar, or (loss, {{name: number}}) to have numbers "
            "logged"
        )
    return found._replace(logged=more[0])


def _batch_loss(
    model: nn.Module, loss: Callable[[Any, Any], Any], weigh: Weigher, batch: Any, num_samples: int, host: Any
) -> LossValue:
    value, *more = _parts(loss(model, batch))
    if not more:
        return _mean(value, "batch_loss", weigh, host, num_samples, None, None)
    *first, last = more
    logged = last if _is_logged(last) else {}
    if (not first and _is_weight(last)) or (first and _is_weight(first[0]) and logged):
        weight = _checked_weight(first[0] if first else last, "batch_loss")
        return LossValue(_scalar(value, "batch_loss"), 1.0, weight, None, None, logged)
    if first or last is None or isinstance(last, str | bytes):
        raise LossError(
            f"batch_loss returned ({', '.join(type(part).__name__ for part in (value, *more))}); allowed: a scalar, "
            "(loss_sum, weight), (loss, outputs), (loss, {name: number}) or (loss_sum, weight, {name: number})"
        )
    outputs = None if logged else last
    found = _mean(value, "batch_loss", weigh, host, num_samples, outputs, _targets(batch))
    return found._replace(logged=logged)


def _parts(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _is_weight(value: Any) -> bool:
    """Raises LossError for a tensor that may be a weight or the output for one sample."""
    if not isinstance(value, torch.Tensor):
        return isinstance(value, numbers.Number | np.generic)
    if value.numel() == 1 and value.requires_grad:
        raise LossError(
            "batch_loss returned two values that depend on parameters, and the second would be the weight of the "
            "first: return their sum, or the second as a number to be logged, (loss, {name: value.item()})"
        )
    if value.dim() == 1 and value.numel() == 1:
        raise LossError(
            "batch_loss returned a tensor of shape (1,) beside the loss, which may be a weight or the output for one "
            "sample: make a weight a number (.item()), and an output two-dimensional"
        )
    return value.dim() == 0


def _is_logged(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str)
        and (isinstance(v, numbers.Number | np.generic) or (isinstance(v, torch.Tensor) and v.numel() == 1))
        for name, v in value.items()
    )


def _targets(batch: Any) -> Any:
    """What metrics compare outputs with: the last entry of a pair, or the batch."""
    return batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else batch


def _own_loss(model: nn.Module, weigh: Weigher, batch: Any, num_samples: int, host: Any) -> LossValue:
    """Of a model that returns its loss, as those of Hugging Face do."""
    outputs = call_with(model, batch)
    value = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if value is None and isinstance(outputs, tuple) and outputs:
        value = outputs[0]
    if value is None:
        raise LossError(
            f"the task has neither loss nor batch_loss, and the model returned {type(outputs).__name__} without a loss "
            "(an object with .loss, a dict with 'loss', or a tuple that begins with it): give the task a loss"
        )
    return _mean(value, "the model", weigh, host, num_samples, outputs, batch)


def call_with(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch whose entries are its arguments, by name where they have names."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if dataclasses.is_dataclass(batch):
        return model(**{f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)})
    if isinstance(batch, tuple) and hasattr(batch, "_asdict"):
        return model(**batch._asdict())
    if isinstance(batch, tuple | list):
        return model(*batch)
    return model(batch)


def _mean(value: Any, what: str, weigh: Weigher, host: Any, num_samples: int, outputs: Any, targets: Any) -> LossValue:
    """A scalar is a mean; a vector has the loss of each sample. host: the batch, for the weight."""
    if isinstance(value, torch.Tensor) and value.dim() == 1 and value.numel() == num_samples > 1:
        return LossValue(_scalar(value.sum(), what), 1.0, float(num_samples), outputs, targets)
    weight = weigh(host, num_samples)
    return LossValue(_scalar(value, what), weight, weight, outputs, targets)


def _scalar(value: Any, what: str) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        got = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise LossError(f"{what} must return a scalar tensor; it returned {got}")
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value  # these have no room for factors


def _entries(batch: Any, what: str) -> list[Any]:
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        raise LossError(
            f"{what} needs batches of pairs (inputs, targets); this one is {type(batch).__name__}: use batch_loss, "
            "which gets the whole batch"
        )
    return list(batch)


class _CountedLoss:
    """Cross entropy or negative log-likelihood: its mean is over the targets that count, by the weight of their class.

    Called with outputs, targets, the number of samples, and the targets as they came from the data; returns
    (sum, weight), or (mean over the samples, None).
    """

    def __init__(self, mean: Callable[..., Any], total: Callable[..., Any], ignore_index: int, weight: Any) -> None:
        self._mean = mean
        self._total = total
        self._ignore_index = ignore_index
        self._weight = weight

    @staticmethod
    def of(loss: Any) -> _CountedLoss | None:
        """How to count with this loss; None when its mean is not known to be over anything but samples."""
        if type(loss) in (nn.CrossEntropyLoss, nn.NLLLoss) and not loss._forward_hooks and not loss._forward_pre_hooks:
            options: dict[str, Any] = {"ignore_index": loss.ignore_index}
            if isinstance(loss, nn.CrossEntropyLoss):
                options["label_smoothing"] = loss.label_smoothing
                function: Any = functional.cross_entropy
            else:
                function = functional.nll_loss

            def total(outputs: Any, targets: Any) -> Any:
                return function(outputs, targets, weight=loss.weight, reduction="sum", **options)

            return _CountedLoss(loss, total, loss.ignore_index, lambda: loss.weight)
        function, options = loss, {}
        while isinstance(function, functools.partial):
            if function.args:
                return None
            function, options = function.func, {**function.keywords, **options}
        if (
            function not in (functional.cross_entropy, functional.nll_loss)
            or options.get("reduction", "mean") != "mean"
        ):
            return None
        total = functools.partial(function, **{**options, "reduction": "sum"})
        return _CountedLoss(loss, total, options.get("ignore_index", -100), lambda: options.get("weight"))

    def __call__(self, outputs: Any, targets: Any, num_samples: int, host: Any) -> tuple[Any, float | None]:
        if not isinstance(targets, torch.Tensor) or targets.is_floating_point():  # probabilities: over the samples
            return self._mean(outputs, targets), None
        class_weight = self._weight()
        if class_weight is not None:
            weight = float(class_weight.double()[targets[targets != self._ignore_index]].sum())
        else:
            weight = float(_count(host, self._ignore_index))
            if targets.dim() == 1 and weight == len(targets) == num_samples:
                return self._mean(outputs, targets), None
        return self._total(outputs, targets), weight


def _count(targets: torch.Tensor, ignored: int) -> int:
    """How many targets count. NumPy takes a third of the time for a batch of a few hundred on the host."""
    if targets.device.type == "cpu":
        return int(np.count_nonzero(targets.numpy() != ignored))
    return int(torch.count_nonzero(targets != ignored))
