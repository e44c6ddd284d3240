"""torch.optim on a shard's flat tensors.

All the optimizers here work element by element, so one flat tensor per parameter group gives the values that a tensor
per parameter would. State is exported under parameter names with torch.optim's own state names.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ps.numerics.threads import Threads
from ps.parameters.layout import Placed, Shard
from steepest.spec import OptimizerSpec

_CLASSES: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "momentum": torch.optim.SGD,
    "nesterov": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adadelta": torch.optim.Adadelta,
    "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rprop": torch.optim.Rprop,
    "asgd": torch.optim.ASGD,
}
SCALAR_STATES = frozenset({"step", "mu_product", "eta", "mu"})  # states of a whole parameter, one number each
DEFAULT_MOMENTUM = 0.9
_FUSED_ON_GPU = ("sgd", "momentum", "nesterov", "adam", "adamw")


def torch_options(spec: OptimizerSpec) -> dict[str, Any]:
    """The keyword arguments that give the same optimizer in plain PyTorch, weight decay included."""
    options = spec.hyper_parameters
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
    """A piece of one state tensor of one parameter. offset: in elements, from the start of that tensor.

    shape: of the whole state tensor; None: the parameter's.
    """

    parameter: str
    state: str
    offset: int
    values: torch.Tensor
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class _Piece:
    """One thread's part of one group, as the fused kernels take it.

    start, stop: in elements from the start of the shard. state: torch.optim's, cut likewise. count: its number of
    updates. options: the group's hyper-parameters.
    """

    start: int
    stop: int
    parameters: list[torch.Tensor]
    state: dict[str, list[torch.Tensor]]
    count: list[torch.Tensor]
    options: dict[str, Any]


def _adam(kernel: Callable[..., None]) -> _Kernel:
    def update(piece: _Piece, gradient: list[torch.Tensor], lr: float, scale: torch.Tensor | None) -> None:
        state, options = piece.state, piece.options
        beta1, beta2 = options["betas"]
        kernel(
            piece.parameters,
            gradient,
            state["exp_avg"],
            state["exp_avg_sq"],
            state.get("max_exp_avg_sq", []),
            piece.count,
            amsgrad=options["amsgrad"],
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=options["weight_decay"],
            eps=options["eps"],
            maximize=False,
            grad_scale=scale,
            found_inf=None,
        )

    return update


def _sgd(piece: _Piece, gradient: list[torch.Tensor], lr: float, scale: torch.Tensor | None) -> None:
    options = piece.options
    torch._fused_sgd_(
        piece.parameters,
        gradient,
        piece.state.get("momentum_buffer", []),
        weight_decay=options["weight_decay"],
        momentum=options["momentum"],
        lr=lr,
        dampening=options["dampening"],
        nesterov=options["nesterov"],
        maximize=False,
        is_first_step=False,
        grad_scale=scale,
        found_inf=None,
    )


def _adagrad(piece: _Piece, gradient: list[torch.Tensor], lr: float, scale: torch.Tensor | None) -> None:
    options = piece.options
    torch._fused_adagrad_(
        piece.parameters,
        gradient,
        piece.state["sum"],
        piece.count,
        lr=lr,
        lr_decay=options["lr_decay"],
        weight_decay=options["weight_decay"],
        eps=options["eps"],
        maximize=False,
        grad_scale=scale,
        found_inf=None,
    )


_Kernel = Callable[[_Piece, list[torch.Tensor], float, torch.Tensor | None], None]
_KERNELS: dict[str, _Kernel] = {
    "sgd": _sgd,
    "momentum": _sgd,
    "nesterov": _sgd,
    "adagrad": _adagrad,
    "adam": _adam(torch._fused_adam_),
    "adamw": _adam(torch._fused_adamw_),
}


def leave_out_dynamo(method: Callable[..., Any] = torch.optim.Optimizer.add_param_group) -> None:
    """Keep a method of torch's from importing torch._dynamo, which takes seconds and 100 MB.

    It does so only to say that it is not to be compiled, and nothing here is. Where PyTorch does it some other way,
    this has no effect.
    """
    own = inspect.unwrap(method)
    own.__dict__.setdefault("__dynamo_disable", own)


def scale_gradient(gradient: torch.Tensor, divisor: float, coefficient: float, max_value: float | None) -> float:
    """Make a sum what the optimizer is given, in place; see ShardOptimizer.step for the arguments and the result."""
    if max_value is None:
        gradient.mul_(coefficient / divisor)
        return 0.0
    gradient.mul_(1.0 / divisor).clamp_(-max_value, max_value)
    return float(torch.linalg.vector_norm(gradient, dtype=torch.float64)) ** 2


class ShardOptimizer:
    """The optimizer of one shard.

    parameters: the shard's part of the layout, updated in place. on_gpu: they are on a GPU.
    """

    def __init__(self, spec: OptimizerSpec, shard: Shard, parameters: torch.Tensor, *, on_gpu: bool = False) -> None:
        self._shard = shard
        self._threads = Threads(1)
        self._ranges: Sequence[tuple[int, int]] = [(0, shard.numel)]
        self._parts = [parameters[g.start - shard.start : g.stop - shard.start] for g in shard.groups]
        self._kernel = None if on_gpu and spec.name not in _FUSED_ON_GPU else _KERNELS.get(spec.name)
        self._is_fused = self._kernel is not None
        # The scale of a gradient goes into the fused kernel's own pass; that takes it as float32.
        self._folds_scale = self._is_fused and parameters.dtype == torch.float32
        self._scale = torch.ones((), dtype=torch.float32, device=parameters.device)
        # To set it at a tenth of what fill_ takes.
        self._scale_view = None if on_gpu else self._scale.numpy()
        self._pieces: list[list[_Piece]] = []  # for each thread
        self._counts: list[NDArray[np.float32]] = []  # numbers of updates, to be counted up
        self._device_counts: list[torch.Tensor] = []  # the same on a GPU
        self._gradient = torch.empty(0)
        self._work: list[list[tuple[_Piece, list[torch.Tensor]]]] = []  # for each thread, with the part of `_gradient`
        self._optimizer: torch.optim.Optimizer | None = None
        self._whole_step: Callable[..., Any] = torch.optim.Optimizer.step
        if not self._parts:
            return
        options = torch_options(spec)
        if self._is_fused:
            options["fused"] = True
        groups: list[dict[str, Any]] = []
        for part, group in zip(self._parts, shard.groups, strict=True):
            groups.append({"params": [part], "lr_scale": group.lr_scale, **group.options})
        leave_out_dynamo()
        self._optimizer = _CLASSES[spec.name](groups, **options)
        self._whole_step = inspect.unwrap(type(self._optimizer).step)

    def use_threads(self, threads: Threads, ranges: Sequence[tuple[int, int]], num_threads: int) -> None:
        """Spread the work, before the first step.

        ranges: of the shard's elements, one for each of `threads`. num_threads: how many there may be at most.
        """
        self._threads, self._ranges = threads, ranges

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
        scale = None
        if max_value is None and self._folds_scale:
            scale = self._scale
            if self._scale_view is None:
                self._scale.fill_(divisor / coefficient)
            else:
                self._scale_view[...] = divisor / coefficient
        else:
            clamped = scale_gradient(gradient, divisor, coefficient, max_value)
        if self._pieces:
            self._step_pieces(gradient, lr, scale)
        else:
            self._step_whole(self._optimizer, gradient, lr, scale)
        return clamped

    def _step_whole(
        self, optimizer: torch.optim.Optimizer, gradient: torch.Tensor, lr: float, scale: torch.Tensor | None
    ) -> None:
        """torch.optim's own step. The first one makes the state; later ones go the short way if there is one."""
        if self._folds_scale:
            # torch.amp's protocol: the fused kernels divide the gradient by this while they read it.
            optimizer.grad_scale = scale  # type: ignore[attr-defined]
        for part, group in zip(self._parts, self._shard.groups, strict=True):
            part.grad = gradient[group.start - self._shard.start : group.stop - self._shard.start]
        for options in optimizer.param_groups:
            options["lr"] = lr * options["lr_scale"]
        with torch.no_grad():
            self._whole_step(optimizer)
        for part in self._parts:
            part.grad = None
        if self._kernel is not None:
            self._pieces = [self._cut(optimizer, low, high) for low, high in self._ranges]
            counts = {id(count): count for pieces in self._pieces for p in pieces for count in p.count}
            self._counts = [count.numpy() for count in counts.values() if count.device.type == "cpu"]
            self._device_counts = [count for count in counts.values() if count.device.type != "cpu"]

    def _cut(self, optimizer: torch.optim.Optimizer, low: int, high: int) -> list[_Piece]:
        """The pieces in the elements [low, high) of the shard."""
        pieces = []
        for part, group, options in zip(self._parts, self._shard.groups, optimizer.param_groups, strict=True):
            first = group.start - self._shard.start
            start, stop = max(low, first), min(high, group.stop - self._shard.start)
            if start < stop:
                cut = slice(start - first, stop - first)
                own = {n: v for n, v in optimizer.state.get(part, {}).items() if isinstance(v, torch.Tensor)}
                state = {name: [value[cut]] for name, value in own.items() if value.dim()}
                count = [own["step"]] if "step" in own else []
                pieces.append(_Piece(start, stop, [part[cut]], state, count, options))
        return pieces

    def _step_pieces(self, gradient: torch.Tensor, lr: float, scale: torch.Tensor | None) -> None:
        """What torch.optim's step comes down to, without the way there, and on all threads."""
        kernel = self._kernel
        assert kernel is not None  # noqa: S101  # there are no pieces without one
        for count in self._counts:
            np.add(count, 1.0, out=count)
        if self._device_counts:
            torch._foreach_add_(self._device_counts, 1.0)
        if gradient is not self._gradient:  # mostly it lies where it lay in the last step
            self._gradient = gradient
            self._work = [[(p, [gradient[p.start : p.stop]]) for p in pieces] for pieces in self._pieces]

        def update(work: list[tuple[_Piece, list[torch.Tensor]]]) -> None:
            for piece, part in work:
                kernel(piece, part, lr * piece.options["lr_scale"], scale)

        self._threads.run([partial(update, work) for work in self._work])

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
                        yield StatePart(p.name, name, 0, value.reshape(1).cpu(), ())
                else:
                    yield StatePart(p.name, name, offset, value[start : start + numel].cpu())

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
                if name in SCALAR_STATES:
                    own[name] = value.to(part.device if self._is_fused else "cpu", copy=True).reshape(())
                else:
                    if not isinstance(own.get(name), torch.Tensor) or own[name].shape != part.shape:
                        own[name] = torch.zeros_like(part)
                    own[name][start : start + numel] = value.reshape(-1)[offset : offset + numel]
