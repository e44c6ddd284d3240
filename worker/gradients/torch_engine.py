"""Gradients of one micro-batch by torch autograd, written where the server reads them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from ps.checkpoint.named_state import pack_buffers, unpack_buffers
from ps.parameters.description import ModelDescription
from ps.parameters.layout import Layout
from steepest.task import Task
from worker.data.sources import Source, source_of
from worker.gradients.backend import Backend
from worker.gradients.engine import LossError, Measured, measure_metrics
from worker.gradients.linear import write_directly
from worker.gradients.sink import GradientSink
from worker.task.model import named_state

MAX_FACTORS = 64
_AS_IT_IS = contextlib.nullcontext()

_run_backward = torch.autograd.Variable._execution_engine.run_backward


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
        self._sink = GradientSink(self._parameters)
        if device.type == "cpu":
            write_directly(self._model, self._sink.place)
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
        self._sink.begin(into, add=add)
        batch = self._backend.batch(batch)
        value, factor, weight = self._loss(batch, num_samples)
        if not value.requires_grad:
            raise LossError("the loss does not depend on any trainable parameter")
        # Backward of factor * loss, as value.backward(factor) comes to after 20 us of checks.
        _run_backward(
            (value,), (self._factor(factor, value),), False, False, (), allow_unreachable=True, accumulate_grad=True
        )
        self._sink.finish()
        return Measured(value.item() * factor, weight)

    def watch(self, on_final: Callable[[int], None]) -> None:
        """See Engine."""
        self._sink.watch(on_final)

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
