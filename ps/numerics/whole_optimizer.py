"""Optimizers that need whole parameters: each parameter, in its own shape, has a torch.optim.Optimizer of its own.

So no update depends on which parameters share a server or a thread, and none on how many of these there are: every
parameter is updated by one thread.
"""

from __future__ import annotations

import heapq
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import nn

from ps.numerics.optimizer import StatePart, leave_out_dynamo, scale_gradient
from ps.numerics.threads import Threads
from ps.parameters.layout import GroupRange, Placed, Shard, grouped
from steepest.optimizer_base import OptimizerSpec
from steepest.optimizer_spec import AdafactorSpec, ClassSpec, MuonSpec
from steepest.optimizer_state import counted, pack_state, unpack_state
from steepest.step_spec import AverageSpec


class OptimizerClassError(Exception):
    """There is no such class, or it does not take what it is given. The message says what; field: of the spec."""

    def __init__(self, field: str, message: str) -> None:
        self.field = field
        self.message = message
        super().__init__(message)


def class_named(name: str) -> type[torch.optim.Optimizer]:
    """The class behind "module:Class". Raises OptimizerClassError, and what importing the module raises."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise
        raise OptimizerClassError("optimizer.name", f"there is no module {error.name!r}") from error
    if not isinstance(found, type) or not issubclass(found, torch.optim.Optimizer):
        problem = "is no subclass of torch.optim.Optimizer" if found is not None else "is not there"
        raise OptimizerClassError("optimizer.name", f"{attribute!r} of the module {module} {problem}")
    return found


def whole_class(
    spec: OptimizerSpec, name: str, shape: tuple[int, ...]
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The class that updates a parameter, and its arguments besides the parameter: what plain PyTorch would be given.

    Raises OptimizerClassError.
    """
    given = spec.hyper_parameters
    match spec:
        case MuonSpec():
            matrices, betas = given.pop("adamw"), given.pop("betas", None)
            if len(shape) == 2 and not any(fnmatchcase(name, pattern) for pattern in matrices):
                return torch.optim.Muon, {"lr": spec.base_lr, **given}
            own = {"weight_decay": spec.weight_decay, "betas": betas}
            given = {key: value for key, value in own.items() if value is not None}
            return torch.optim.AdamW, {"lr": spec.base_lr, **given}
        case AdafactorSpec():
            return torch.optim.Adafactor, {"lr": spec.base_lr, **given}
        case ClassSpec():
            found = class_named(spec.name)
            _check_arguments(found, spec)
            return found, {"lr": spec.base_lr, **given}
    raise ValueError(f"{spec.name} works element by element")


def averages_itself(spec: OptimizerSpec) -> bool:
    """Whether an optimizer has two modes, so that it evaluates with other parameters than it trains with.

    As schedule-free ones do (Defazio et al. 2024). Raises as class_named.
    """
    return isinstance(spec, ClassSpec) and has_two_modes(class_named(spec.name))


def evaluates_average(average: AverageSpec, optimizer: OptimizerSpec) -> bool:
    """Whether evaluations are of other parameters than are trained. Raises as class_named."""
    return average.evaluate and (average.is_on or averages_itself(optimizer))


def has_two_modes(found: type[torch.optim.Optimizer]) -> bool:
    """Whether a class has train() and eval()."""
    return callable(getattr(found, "train", None)) and callable(getattr(found, "eval", None))


def evaluated_with(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> torch.Tensor:
    """What an optimizer with two modes evaluates with in the place of its parameter.

    The parameter's memory is not written to: it may be on its way to workers.
    """
    trained = parameter.data
    parameter.data = trained.clone()
    try:
        optimizer.eval()  # type: ignore[attr-defined]
        found = parameter.data.clone()
        optimizer.train()  # type: ignore[attr-defined]
    finally:
        parameter.data = trained
    return found


def _check_arguments(found: type[torch.optim.Optimizer], spec: ClassSpec) -> None:
    """Raises OptimizerClassError for an argument that the class does not take, or lacks."""
    parameters = dict(inspect.signature(found).parameters)
    first, *_ = parameters or [""]
    parameters.pop(first, None)
    takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    named = {name: p for name, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    given = {"lr": "optimizer.lr", **{name: f"optimizer.options.{name}" for name in spec.options}}
    if spec.weight_decay is not None:
        given["weight_decay"] = "optimizer.weight_decay"
    for name, field in given.items():
        if name not in named and not takes_all:
            allowed = ", ".join(named) or "none"
            raise OptimizerClassError(field, f"{spec.name} takes no argument {name!r}; it takes: {allowed}")
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in given:
            raise OptimizerClassError(f"optimizer.options.{name}", f"is required: {spec.name} has no default for it")


@dataclass(frozen=True, slots=True)
class _Own:
    """One parameter with its optimizer. start: of the parameter's group in the optimizer, as it was made."""

    placed: Placed
    tensor: nn.Parameter
    optimizer: torch.optim.Optimizer
    lr_scale: float
    start: Mapping[str, Any]

    def step(self, gradient: torch.Tensor, lr: float) -> None:
        """gradient: shape (numel,)."""
        self.tensor.grad = gradient.view(self.placed.shape)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * self.lr_scale
        self.optimizer.step()
        self.tensor.grad = None


def make_group(
    found: type[torch.optim.Optimizer], tensors: Sequence[nn.Parameter], group: GroupRange
) -> dict[str, Any]:
    """The parameter group of some tensors, as an optimizer of that class takes it."""
    taken = inspect.signature(found).parameters
    return {"params": list(tensors), **{name: value for name, value in group.options.items() if name in taken}}


class WholeOptimizer:
    """The optimizer of one shard that is cut between parameters; see ShardOptimizer."""

    def __init__(self, spec: OptimizerSpec, shard: Shard, parameters: torch.Tensor) -> None:
        self._shard = shard
        self._parameters = parameters
        leave_out_dynamo()
        self._own = [
            self._made(spec, placed, group, parameters) for placed, group in grouped(shard.layout, shard.groups)
        ]
        self.use_threads(Threads(1), [(0, shard.numel)], 1)

    def _made(self, spec: OptimizerSpec, placed: Placed, group: GroupRange, parameters: torch.Tensor) -> _Own:
        start = placed.offset - self._shard.start
        tensor = nn.Parameter(parameters[start : start + placed.numel].view(placed.shape))
        found, arguments = whole_class(spec, placed.name, placed.shape)
        optimizer = found([make_group(found, [tensor], group)], **arguments)
        if has_two_modes(found):
            optimizer.train()  # type: ignore[attr-defined]
        return _Own(placed, tensor, optimizer, group.lr_scale, dict(optimizer.param_groups[0]))

    def use_threads(self, threads: Threads, ranges: Sequence[tuple[int, int]], num_threads: int) -> None:
        """See ShardOptimizer; the parameters are dealt to threads of their own, the largest first."""
        bins: list[tuple[int, int, list[_Own]]] = [(0, index, []) for index in range(max(1, num_threads))]
        for own in sorted(self._own, key=lambda own: -own.placed.numel):
            load, index, dealt = heapq.heappop(bins)
            dealt.append(own)
            heapq.heappush(bins, (load + own.placed.numel, index, dealt))
        self._dealt = [dealt for _, _, dealt in sorted(bins) if dealt]
        self._threads = Threads(len(self._dealt))

    def step(
        self, gradient: torch.Tensor, *, lr: float, divisor: float, coefficient: float, max_value: float | None
    ) -> float:
        """See ShardOptimizer."""
        if not self._own:
            return 0.0
        clamped = scale_gradient(gradient, divisor, coefficient, max_value)

        def update(dealt: Sequence[_Own]) -> None:
            for own in dealt:
                start = own.placed.offset - self._shard.start
                own.step(gradient[start : start + own.placed.numel], lr)

        calls: list[Callable[[], None]] = [partial(update, dealt) for dealt in self._dealt]
        self._threads.run(calls)
        return clamped

    def averaged(self) -> torch.Tensor | None:
        """What the optimizers evaluate with, shape (shard.numel,); None for those that have one mode only."""
        if not self._own or not has_two_modes(type(self._own[0].optimizer)):
            return None
        found = self._parameters.clone()
        for own in self._own:
            if not own.optimizer.state.get(own.tensor):
                continue  # it has not stepped yet
            start = own.placed.offset - self._shard.start
            view = found[start : start + own.placed.numel].view(own.placed.shape)
            view.copy_(evaluated_with(own.optimizer, own.tensor))
        return found

    def export_state(self) -> Iterator[StatePart]:
        """See ShardOptimizer. Raises StateKindError for what cannot be written down."""
        for own in self._own:
            group = counted(own.start, own.optimizer.param_groups[0])
            for name, value in pack_state(own.optimizer.state.get(own.tensor, {}), group).items():
                shape = None if value.shape == own.placed.shape and value.dim() else tuple(value.shape)
                yield StatePart(own.placed.name, name, 0, value.detach().reshape(-1).cpu(), shape)

    def import_state(self, state: dict[str, torch.Tensor]) -> None:
        """See ShardOptimizer."""
        for own in self._own:
            prefix = own.placed.name + "."
            named = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            here = {name: _placed_like(value, own.tensor) for name, value in named.items() if "." not in name}
            if here:
                found, group = unpack_state(here)
                own.optimizer.state[own.tensor] = found
                own.optimizer.param_groups[0].update(group)


def _placed_like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A copy where torch.optim would have it: numbers on the host."""
    return value.to("cpu" if value.dim() == 0 else parameter.device, copy=True)
