"""torch.optim on a shard's flat tensors.

All the optimizers here work element by element, so one flat tensor per parameter group gives the values that a tensor
per parameter would. State is exported under parameter names with torch.optim's own state names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ps.layout import Placed, Shard
from steepest.spec import HYPER_PARAMETERS, OptimizerSpec

_CLASSES: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "momentum": torch.optim.SGD,
    "nesterov": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
_FUSED = {"sgd", "momentum", "nesterov", "adagrad", "adam", "adamw"}
DEFAULT_MOMENTUM = 0.9


def torch_options(spec: OptimizerSpec) -> dict[str, Any]:
    """The keyword arguments that give the same optimizer in plain PyTorch, weight decay included."""
    names = ("weight_decay", *HYPER_PARAMETERS[spec.name])
    options = {name: getattr(spec, name) for name in names if getattr(spec, name) is not None}
    if spec.name in ("momentum", "nesterov"):
        options.setdefault("momentum", DEFAULT_MOMENTUM)
    if spec.name == "nesterov":
        options["nesterov"] = True
    return {"lr": spec.base_lr, **options}


def torch_class(spec: OptimizerSpec) -> type[torch.optim.Optimizer]:
    """The class of torch.optim behind a name."""
    return _CLASSES[spec.name]


@dataclass(frozen=True, slots=True)
class StatePart:
    """A piece of one state tensor of one parameter. offset: in elements, from the start of the parameter."""

    parameter: str
    state: str
    offset: int
    values: torch.Tensor


class ShardOptimizer:
    """The optimizer of one shard. `parameters` is the shard's part of the layout, updated in place."""

    def __init__(self, spec: OptimizerSpec, shard: Shard, parameters: torch.Tensor) -> None:
        self._shard = shard
        self._parts = [parameters[g.start - shard.start : g.stop - shard.start] for g in shard.groups]
        # The scale of a gradient goes into the fused kernel's own pass; that takes it as float32.
        self._folds_scale = spec.name in _FUSED and parameters.dtype == torch.float32
        self._scale = torch.ones((), dtype=torch.float32)
        self._optimizer: torch.optim.Optimizer | None = None
        if not self._parts:
            return
        options = torch_options(spec)
        if spec.name in _FUSED:
            options["fused"] = True
        groups: list[dict[str, Any]] = []
        for part, group in zip(self._parts, shard.groups, strict=True):
            groups.append({"params": [part]} if group.decayed else {"params": [part], "weight_decay": 0.0})
        self._optimizer = _CLASSES[spec.name](groups, **options)

    def step(
        self, gradient: torch.Tensor, *, lr: float, divisor: float, coefficient: float, max_value: float | None
    ) -> float:
        """One update from the *sum* `gradient`, shape (shard.numel,), which is overwritten.

        What is used is gradient / divisor, then either scaled by `coefficient` or clamped to [-max_value, max_value].

        Returns the sum of squares of the clamped gradient, 0.0 without `max_value`.
        """
        if self._optimizer is None:
            return 0.0
        clamped = 0.0
        if max_value is not None:
            gradient.mul_(1.0 / divisor).clamp_(-max_value, max_value)
            clamped = float(torch.linalg.vector_norm(gradient, dtype=torch.float64)) ** 2
        elif self._folds_scale:
            self._scale.fill_(divisor / coefficient)
        else:
            gradient.mul_(coefficient / divisor)
        if self._folds_scale:
            # torch.amp's protocol: the fused kernels divide the gradient by this while they read it.
            self._optimizer.grad_scale = None if max_value is not None else self._scale  # type: ignore[attr-defined]
        for part, range_ in zip(self._parts, self._shard.groups, strict=True):
            part.grad = gradient[range_.start - self._shard.start : range_.stop - self._shard.start]
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        return clamped

    def _overlaps(self) -> Iterator[tuple[torch.Tensor, Placed, int, int, int]]:
        """For each flat part and each parameter in it: part, parameter, start in part, start in parameter, length."""
        for part, group in zip(self._parts, self._shard.groups, strict=True):
            for p in self._shard.layout.parameters:
                start, stop = max(p.offset, group.start), min(p.offset + p.numel, group.stop)
                if start < stop:
                    yield part, p, start - group.start, start - p.offset, stop - start

    def export_state(self) -> Iterator[StatePart]:
        """The state by parameter and torch.optim name; a scalar (Adam's step) is repeated for each parameter."""
        if self._optimizer is None:
            return
        for part, p, start, offset, numel in self._overlaps():
            for name, value in self._optimizer.state.get(part, {}).items():
                if not isinstance(value, torch.Tensor):
                    continue
                if value.dim() == 0:
                    if offset == 0:
                        yield StatePart(p.name, name, 0, value.reshape(1))
                else:
                    yield StatePart(p.name, name, offset, value[start : start + numel])

    def import_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take over a whole layout's state: "{parameter}.{name}" -> tensor of the parameter's shape."""
        if self._optimizer is None:
            return
        for part, p, start, offset, numel in self._overlaps():
            own = self._optimizer.state[part]
            prefix = p.name + "."
            names = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            for name, value in names.items():
                if "." in name:  # belongs to another parameter, whose name begins with this one's
                    continue
                if (value.dim() == 0 and p.shape != ()) or name == "step":
                    own[name] = value.clone().reshape(())
                else:
                    if not isinstance(own.get(name), torch.Tensor) or own[name].shape != part.shape:
                        own[name] = torch.zeros_like(part)
                    own[name][start : start + numel] = value.reshape(-1)[offset : offset + numel]
