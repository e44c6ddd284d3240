"""Gradients of one micro-batch by torch autograd, written where the server reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ps.layout import Layout
from ps.model import ModelDescription
from ps.state import pack_buffers, unpack_buffers
from steepest.task import Task
from worker.data import Source, source_of, to_device
from worker.load import named_state


class Measured(NamedTuple):
    """A loss sum and its weight; in an evaluation, also the metrics' sums over the samples."""

    loss: float
    weight: float
    values: tuple[float, ...] = ()


class LossError(Exception):
    """What the user's loss returned is no loss. The message says why."""


class Engine(Protocol):
    """Computes gradients of a task; `AnalyticEngine` and `TorchEngine` are the two."""

    device: torch.device
    train_source: Source
    eval_source: Source | None

    def write_initial(self, flat: torch.Tensor) -> None:
        """Write the task's own initial parameters into `flat`, shape (layout.numel,)."""

    def bind(self, flat: torch.Tensor) -> None:
        """Use `flat`, shape (layout.numel,), as the parameters from now on."""

    def refresh(self) -> None:
        """The bound parameters hold another version."""

    def gradient(self, batch: Any, num_samples: int, into: list[torch.Tensor], *, add: bool) -> Measured:
        """Write (or add) the gradient of the batch's loss sum into one tensor per parameter, in the layout's order."""

    def evaluate(self, batch: Any, num_samples: int) -> Measured:
        """Loss and metrics, without gradients."""

    def set_buffers(self, packed: bytes) -> None:
        """Start every micro-batch from these buffers."""

    def buffers(self) -> bytes | None:
        """The buffers as the last micro-batch left them, or None when it changed nothing."""

    def initial_buffers(self) -> bytes:
        """The buffers that the task came with."""


class TorchEngine:
    """A `Task` on one device. The model's parameters become views of the bound flat tensor."""

    def __init__(self, task: Task, model: ModelDescription, layout: Layout, device: torch.device) -> None:
        self.device = device
        self.train_source: Source = source_of(task.train_data, task.collate)
        self.eval_source: Source | None = None if task.eval_data is None else source_of(task.eval_data, task.collate)
        self._task = task
        self._description = model
        self._layout = layout
        self._model = task.model.to(device)
        parameters, buffers = named_state(self._model)
        self._parameters = [parameters[p.name] for p in layout.parameters]
        self._initial = [p.detach().cpu().clone() for p in self._parameters]
        self._buffers = list(buffers.values())
        self._snapshot = [b.detach().clone() for b in self._buffers]
        self._training = True
        self._flat = torch.empty(0)
        self._on_device = torch.empty(0)
        self._model.train()
        # Where the backward pass in progress puts its gradients.
        self._into: list[torch.Tensor] = []
        self._add = False
        self._missing: set[int] = set()
        for index, parameter in enumerate(self._parameters):
            parameter.register_post_accumulate_grad_hook(partial(self._store, index))  # type: ignore[no-untyped-call]

    def write_initial(self, flat: torch.Tensor) -> None:
        """See Engine."""
        for view, value in zip(self._layout.views(flat), self._initial, strict=True):
            view.copy_(value)

    def bind(self, flat: torch.Tensor) -> None:
        """See Engine."""
        self._flat = flat
        self._initial = []  # from here on the servers have them
        self._on_device = flat if self.device.type == "cpu" else torch.empty_like(flat, device=self.device)
        for parameter, view in zip(self._parameters, self._layout.views(self._on_device), strict=True):
            parameter.data = view

    def refresh(self) -> None:
        """See Engine."""
        if self._on_device is not self._flat:
            self._on_device.copy_(self._flat)

    def gradient(self, batch: Any, num_samples: int, into: list[torch.Tensor], *, add: bool) -> Measured:
        """See Engine. Raises LossError."""
        self._start(training=True)
        for parameter in self._parameters:
            parameter.grad = None
        self._into, self._add, self._missing = into, add, set(range(len(into)))
        value, factor, weight = self._loss(to_device(batch, self.device), num_samples)
        if not value.requires_grad:
            raise LossError("the loss does not depend on any trainable parameter")
        # Backward of factor * loss; `_store` takes each gradient when it is ready.
        value.backward(torch.full_like(value, factor))  # type: ignore[no-untyped-call]
        for index in self._missing:
            # Zeros rather than nothing, and zeros are added too (-0 + 0 is 0): so the bits are the same however the
            # tree is cut.
            if add:
                into[index].add_(0.0)
            else:
                into[index].zero_()
        return Measured(float(value.detach()) * factor, weight)

    def evaluate(self, batch: Any, num_samples: int) -> Measured:
        """See Engine. Raises LossError."""
        self._start(training=False)
        batch = to_device(batch, self.device)
        with torch.inference_mode():
            value, factor, weight = self._loss(batch, num_samples)
            values: tuple[float, ...] = ()
            if self._task.metrics:
                inputs, targets = _pair(batch, "metrics")
                outputs = self._model(inputs)
                values = measure_metrics(self._task.metrics, outputs, targets, num_samples)
            return Measured(float(value) * factor, weight, values)

    def set_buffers(self, packed: bytes) -> None:
        """See Engine."""
        named = unpack_buffers(self._description, packed)
        self._snapshot = [named[b.name].to(self.device) for b in self._description.buffers]

    def buffers(self) -> bytes | None:
        """See Engine."""
        if all(map(torch.equal, self._buffers, self._snapshot)):
            return None
        return pack_buffers(self._buffers)

    def initial_buffers(self) -> bytes:
        """See Engine."""
        return pack_buffers(self._snapshot)

    def _start(self, *, training: bool) -> None:
        if training != self._training:
            self._model.train(training)
            self._training = training
        if self._buffers:
            with torch.no_grad():
                torch._foreach_copy_(self._buffers, self._snapshot)

    def _loss(self, batch: Any, num_samples: int) -> tuple[torch.Tensor, float, float]:
        """(value, factor, weight): value * factor is the loss sum, a tensor of one element times a number."""
        if self._task.loss is not None:
            inputs, targets = _pair(batch, "loss")
            value, what = self._task.loss(self._model(inputs), targets), "loss"
        else:
            assert self._task.batch_loss is not None  # noqa: S101  # Task has one of the two
            value, what = self._task.batch_loss(self._model, batch), "batch_loss"
        if what == "batch_loss" and isinstance(value, tuple):
            if len(value) != 2:
                raise LossError(
                    f"batch_loss returned a tuple of {len(value)}; allowed: a scalar, or (loss_sum, weight)"
                )
            value, raw_weight = value
            weight = float(raw_weight)
            if weight < 0:
                raise LossError(f"batch_loss returned the weight {weight}; it must not be negative")
            factor = 1.0
        else:
            weight = factor = float(num_samples)
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            got = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise LossError(f"{what} must return a scalar tensor; it returned {got}")
        return value, factor, weight

    def _store(self, index: int, parameter: torch.Tensor) -> None:
        """Move a gradient that autograd has just finished to its place, while it is in cache, and free it."""
        gradient = parameter.grad
        assert gradient is not None  # noqa: S101  # autograd calls this after it has set it
        parameter.grad = None
        self._missing.discard(index)
        if gradient.is_sparse:
            gradient = gradient.to_dense()
        if self._add:
            self._into[index].add_(gradient)
        else:
            self._into[index].copy_(gradient)


def _pair(batch: Any, what: str) -> tuple[Any, Any]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise LossError(f"{what} needs batches of pairs (inputs, targets); this one is {type(batch).__name__}")
    return batch[0], batch[1]


def measure_metrics(
    metrics: Mapping[str, Callable[[Any, Any], Any]], outputs: Any, targets: Any, num_samples: int
) -> tuple[float, ...]:
    """Each metric's sum over the samples. Raises LossError for one that returns no number."""
    values = []
    for name, metric in metrics.items():
        value = metric(outputs, targets)
        try:
            values.append(float(value) * num_samples)
        except (TypeError, ValueError, RuntimeError) as error:
            raise LossError(f"the metric {name!r} must return a number; it returned {type(value).__name__}") from error
    return tuple(values)


def finite_parameters(into: list[torch.Tensor], layout: Layout) -> str:
    """The name of the first parameter whose tensor has a non-finite element, or nothing."""
    for placed, tensor in zip(layout.parameters, into, strict=True):
        if not bool(torch.isfinite(tensor).all()):
            return placed.name
    return ""


def as_indices(low: int, high: int) -> NDArray[np.int64]:
    """The samples [low, high)."""
    return np.arange(low, high, dtype=np.int64)
