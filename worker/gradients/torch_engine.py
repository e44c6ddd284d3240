"""Gradients of one micro-batch by torch autograd, written where the server reads them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ps.checkpoint.named_state import pack_buffers, unpack_buffers
from ps.parameters.description import ModelDescription
from ps.parameters.layout import Layout
from steepest.task import Task
from worker.data.sources import Source, source_of
from worker.gradients.backend import Backend
from worker.gradients.linear import write_directly
from worker.task.load import named_state

SMALL_NUMEL = 1 << 14
MAX_FACTORS = 64
_AS_IT_IS = contextlib.nullcontext()

_run_backward = torch.autograd.Variable._execution_engine.run_backward


class Measured(NamedTuple):
    """A loss sum and its weight; in an evaluation, also the metrics' sums over the samples."""

    loss: float
    weight: float
    values: tuple[float, ...] = ()


class LossError(Exception):
    """What the user's loss returned is no loss. The message says why."""


class InPartsError(Exception):
    """A parameter's gradient came in parts, and the first was taken for the whole: the sum is to be made again.

    Once is enough: the engine waits for the rest of that parameter's gradient from then on.
    """


class Engine(Protocol):
    """Computes gradients of a task; `AnalyticEngine` and `TorchEngine` are the two."""

    only_torch: bool  # whether no code but torch's own runs in `gradient`
    train_source: Source
    eval_source: Source | None

    def write_initial(self, flat: torch.Tensor) -> None:
        """Write the task's own initial parameters into `flat`, shape (layout.numel,)."""

    def bind(self, flat: torch.Tensor) -> None:
        """Use `flat`, shape (layout.numel,), as the parameters from now on."""

    def refresh(self) -> None:
        """The bound parameters hold another version."""

    def gradient(self, batch: Any, num_samples: int, into: list[torch.Tensor], *, add: bool) -> Measured:
        """Write (or add) the gradient of the batch's loss sum into one tensor per parameter, in the layout's order.

        Raises InPartsError; the tensors hold nothing of use then.
        """

    def watch(self, on_final: Callable[[int], None]) -> None:
        """From now on, tell of each parameter of a gradient, by its index, when it is written."""

    def evaluate(self, batch: Any, num_samples: int) -> Measured:
        """Loss and metrics, without gradients."""

    def set_buffers(self, packed: bytes) -> None:
        """Start every micro-batch from these buffers."""

    def buffers(self) -> bytes | None:
        """The buffers as the last micro-batch left them, or None when it changed nothing."""

    def initial_buffers(self) -> bytes:
        """The buffers that the task came with."""


class TorchEngine:
    """A `Task` on one device. The model's parameters become views of the bound flat tensor.

    precision: of the spec.
    """

    def __init__(
        self, task: Task, model: ModelDescription, layout: Layout, backend: Backend, precision: str = "full"
    ) -> None:
        device = backend.device
        self._backend = backend
        self._autocasts = precision == "bf16"
        self.train_source: Source = source_of(task.train_data, task.collate)
        self.eval_source: Source | None = None if task.eval_data is None else source_of(task.eval_data, task.collate)
        self.only_torch = _is_torchs_own(task)
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
        # Where the backward pass in progress puts its gradients, and which of them are still to come.
        self._into: list[torch.Tensor] = []
        self._add = False
        self._missing: set[int] = set()
        self._indices = {id(p): index for index, p in enumerate(self._parameters)}
        self._small = [i for i, p in enumerate(self._parameters) if p.numel() < SMALL_NUMEL]
        self._large = set(self._indices.values()) - set(self._small)
        self._in_parts: set[int] = (
            set()
        )  # what of `_large` came more than once in this pass, as by reentrant checkpoints
        self._on_final: Callable[[int], None] | None = None
        self._hook(self._large)
        self._unfinished = True
        self._free: set[int] = set()  # whose place nothing has been written to
        if device.type == "cpu":
            write_directly(self._model, self._place)
        self._factors: dict[tuple[float, torch.dtype, torch.Size], torch.Tensor] = {}

    def write_initial(self, flat: torch.Tensor) -> None:
        """See Engine."""
        for view, value in zip(self._layout.views(flat), self._initial, strict=True):
            view.copy_(value)

    def bind(self, flat: torch.Tensor) -> None:
        """See Engine."""
        self._flat = flat
        self._initial = []  # from here on the servers have them
        self._on_device = self._backend.parameters(flat)
        for parameter, view in zip(self._parameters, self._layout.views(self._on_device), strict=True):
            parameter.data = view

    def refresh(self) -> None:
        """See Engine."""
        self._backend.refresh(self._on_device, self._flat)

    def gradient(self, batch: Any, num_samples: int, into: list[torch.Tensor], *, add: bool) -> Measured:
        """See Engine. Raises LossError, InPartsError."""
        self._start(training=True)
        if self._unfinished:  # a pass that failed has left some
            for parameter in self._parameters:
                parameter.grad = None
        self._unfinished = True
        self._in_parts.clear()
        self._into, self._add, self._missing = into, add, set(self._large)
        self._free = set() if add else set(self._large)
        batch = self._backend.batch(batch)
        value, factor, weight = self._loss(batch, num_samples)
        if not value.requires_grad:
            raise LossError("the loss does not depend on any trainable parameter")
        # Backward of factor * loss, as value.backward(factor) comes to after 20 us of checks; `_store` takes each large
        # gradient when it is ready.
        _run_backward(
            (value,), (self._factor(factor, value),), False, False, (), allow_unreachable=True, accumulate_grad=True
        )
        self._store_small()
        self._unfinished = False
        if self._in_parts:
            self._large -= self._in_parts
            self._small += sorted(self._in_parts)
            raise InPartsError
        for index in self._missing:
            # Zeros rather than nothing, and zeros are added too (-0 + 0 is 0): so the bits are the same however the
            # tree is cut.
            if add:
                into[index].add_(0.0)
            else:
                into[index].zero_()
            if self._on_final is not None:
                self._on_final(index)
        return Measured(value.item() * factor, weight)

    def watch(self, on_final: Callable[[int], None]) -> None:
        """See Engine. Small gradients are moved one by one then, too."""
        self._on_final = on_final
        self._hook(self._small)
        self._large.update(self._small)
        self._small = []

    def evaluate(self, batch: Any, num_samples: int) -> Measured:
        """See Engine. Raises LossError."""
        self._start(training=False)
        batch = self._backend.batch(batch)
        with torch.inference_mode():
            value, factor, weight = self._loss(batch, num_samples)
            values: tuple[float, ...] = ()
            if self._task.metrics:
                inputs, targets = _pair(batch, "metrics")
                with self._precision():
                    outputs = self._model(inputs)
                values = measure_metrics(self._task.metrics, outputs, targets, num_samples)
            return Measured(float(value) * factor, weight, values)

    def set_buffers(self, packed: bytes) -> None:
        """See Engine."""
        named = unpack_buffers(self._description, packed)
        self._snapshot = [named[b.name].to(self._backend.device) for b in self._description.buffers]

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
        with self._precision():
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
        if value.dtype == torch.bfloat16:  # which has no room for a factor above 256
            value = value.float()
        return value, factor, weight

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        """What the forward pass runs in; gradients and parameters keep the model's own type."""
        if not self._autocasts:
            return _AS_IT_IS
        return torch.autocast(self._backend.device.type, torch.bfloat16)

    def _factor(self, factor: float, value: torch.Tensor) -> torch.Tensor:
        """A tensor like the loss with this number in it."""
        key = factor, value.dtype, value.shape
        if key not in self._factors:
            if len(self._factors) > MAX_FACTORS:  # weights that are different every time
                self._factors.clear()
            self._factors[key] = torch.full_like(value, factor, requires_grad=False)
        return self._factors[key]

    def _hook(self, indices: Iterable[int]) -> None:
        for index in indices:
            self._parameters[index].register_post_accumulate_grad_hook(partial(self._store, index))  # type: ignore[no-untyped-call]

    def _place(self, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        """Where this gradient may be written at once: its place, unless something is there or is to be added to."""
        index = self._indices.get(id(parameter), -1)
        if index not in self._free:
            return None
        self._free.discard(index)
        return self._into[index].detach()

    def _store(self, index: int, parameter: torch.Tensor) -> None:
        """Move a gradient that autograd has just finished to its place, while it is in cache, and free it."""
        gradient = parameter.grad
        if gradient is None or index not in self._large:  # nothing came of it in this pass; or all of it is moved later
            return
        parameter.grad = None
        if index not in self._missing:
            self._in_parts.add(index)
        self._missing.discard(index)
        into = self._into[index]
        if gradient.is_sparse:
            gradient = gradient.to_dense()
        if self._add:
            into.add_(gradient)
        elif gradient.data_ptr() != into.data_ptr():
            into.copy_(gradient)
        if self._on_final is not None and index not in self._in_parts:
            self._on_final(index)

    def _store_small(self) -> None:
        """Move the small gradients to their places, all in one call: a call for each would cost more than the move.

        With them, those that come in parts.
        """
        targets, gradients = [], []
        for index in self._small:
            parameter = self._parameters[index]
            gradient = parameter.grad
            if gradient is None:
                self._missing.add(index)
                continue
            parameter.grad = None
            targets.append(self._into[index])
            gradients.append(gradient.to_dense() if gradient.is_sparse else gradient)
        if not targets:
            return
        with torch.no_grad():
            if self._add:
                torch._foreach_add_(targets, gradients)
            else:
                torch._foreach_copy_(targets, gradients)
        if self._on_final is not None:
            for index in set(self._small) - self._missing:
                self._on_final(index)


def _is_torchs_own(task: Task) -> bool:
    """Whether model and loss are made of torch's own modules, with no code of the user in between."""
    if not isinstance(task.loss, torch.nn.Module):
        return False
    modules = [*task.model.modules(), *task.loss.modules()]
    own = all(type(m).__module__.startswith("torch.nn.modules.") for m in modules)
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return own and not any(getattr(m, name) for m in modules for name in hooks)


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
