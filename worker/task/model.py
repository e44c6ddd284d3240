"""Describes the task that the user's function returned, and checks that it can be trained as the spec wants."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from ps.parameters.description import GroupDescription, ModelDescription, TensorDescription
from ps.parameters.layout import build_layout
from steepest.task import AnalyticTask, ParameterGroup, Task
from worker.data.loader import DataError, LoaderData
from worker.data.streams import count, is_stream
from worker.task.load import TaskError, said, user_traceback
from worker.task.state import TaskState, UnusableError, roots

STORABLE = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8,
}  # fmt: skip


def _describe(name: str, tensor: torch.Tensor) -> TensorDescription:
    return TensorDescription(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def _describe_parameter(name: str, tensor: torch.Tensor) -> TensorDescription:
    """A trainable one, as the servers have it."""
    held = _describe(name, tensor)
    if tensor.dtype in (torch.bfloat16, torch.float16):
        return TensorDescription(name, held.shape, "float32", held.dtype)
    if tensor.dtype in _REAL:
        return TensorDescription(name, (*held.shape, 2), _REAL[tensor.dtype], held.dtype)
    return held


_REAL = {torch.complex64: "float32", torch.complex128: "float64"}


@dataclass(frozen=True)
class Conduct:
    """How tensors behave in a pass, by name.

    moving: frozen parameters that forward changes, as a momentum encoder does; they are treated as buffers.
    unreached: parameters that the loss does not depend on; they stay as they are, as in plain PyTorch, where they have
    no gradient.
    """

    moving: frozenset[str] = frozenset()
    unreached: frozenset[str] = frozenset()


def describe_model(task: Task | AnalyticTask, conduct: Conduct | None = None) -> ModelDescription:
    """What the servers need to know of the model. Raises TaskError for one that cannot be trained here."""
    if isinstance(task, AnalyticTask):
        tensors = {name: torch.as_tensor(value) for name, value in task.parameters.items()}
        description = ModelDescription(
            tuple(_describe(n, t) for n, t in tensors.items()), (), tuple((n, n) for n in tensors)
        )
    else:
        if not isinstance(task.model, torch.nn.Module):
            raise TaskError("task.model", f"model is {type(task.model).__name__}; it must be a torch.nn.Module")
        lazy = [n for prefix, root in roots(task) for n, p in root.named_parameters(prefix[:-1]) if is_lazy(p)]
        if lazy:
            raise TaskError("task.model", f"{lazy[0]} has no shape yet: run one batch through lazy modules in the task")
        description = _describe_state(task, conduct or Conduct())
    halved = next((p for p in description.parameters if p.dtype == "complex32"), None)
    if halved is not None:
        raise TaskError("task.model", f"{halved.name} is complex32; make it complex64 (model.to(torch.complex64))")
    try:
        build_layout(description)
    except ValueError as error:
        raise TaskError("task.model", str(error)) from error
    return description


def freeze(task: Task) -> None:
    """Freeze what the task's parameter groups say. Raises TaskError for a group that fits no parameter."""
    named = {n: p for prefix, root in roots(task) for n, p in root.named_parameters(prefix[:-1])}
    for group in task.parameter_groups:
        if not any(fnmatchcase(name, group.names) for name in named):
            some = ", ".join(list(named)[:4])
            raise TaskError("task.parameter_groups", f"no parameter is called {group.names!r}; there are {some}, ...")
    for name, parameter in named.items():
        own = _group_of(task, name)
        if own is not None and own.frozen:
            parameter.requires_grad_(False)


def _group_of(task: Task, name: str) -> ParameterGroup | None:
    return next((group for group in task.parameter_groups if fnmatchcase(name, group.names)), None)


def _describe_groups(task: Task, names: Iterable[str]) -> tuple[GroupDescription, ...]:
    members: dict[tuple[float, float | None], list[str]] = {}
    for name in names:
        group = _group_of(task, name)
        if group is not None and (group.lr_scale, group.weight_decay) != (1.0, None):
            members.setdefault((group.lr_scale, group.weight_decay), []).append(name)
    return tuple(GroupDescription(tuple(names), *rate) for rate, names in members.items())


def _describe_state(task: Task, conduct: Conduct) -> ModelDescription:
    freeze(task)
    try:
        state = TaskState.of(task)
    except UnusableError as error:
        raise TaskError("task.model", str(error)) from error
    buffers = {name: place.tensor for name, place in state.buffers.items()}
    for name, tensor in [*state.constants.items(), *buffers.items()]:
        if tensor is not None and tensor.dtype not in STORABLE:
            raise TaskError(
                "task.model",
                f"{name} is {str(tensor.dtype).removeprefix('torch.')}, which a checkpoint cannot hold; keep it as "
                "another type (of a complex tensor, torch.view_as_real)",
            )
    names = state.names()
    shown = []
    for prefix, root in roots(task):
        if prefix and not any(name.startswith(prefix) for name in state.parameters):
            continue  # a loss that learns nothing is no part of what is exported
        for key, value in root.state_dict(keep_vars=True).items():
            if id(value) not in names:
                raise TaskError("task.model", f"state_dict entry {key!r} is neither a parameter nor a buffer")
            shown.append((prefix + key, names[id(value)]))
    moving = [(n, t) for n, t in state.constants.items() if n in conduct.moving]
    unreached = [(n, t) for n, t in state.parameters.items() if n in conduct.unreached]
    return ModelDescription(
        tuple(_describe_parameter(n, t) for n, t in state.parameters.items() if n not in conduct.unreached),
        tuple(_describe(n, t) for n, t in [*buffers.items(), *moving] if t is not None),
        tuple(shown),
        tuple(_describe(n, t) for n, t in [*state.constants.items(), *unreached] if n not in conduct.moving),
        tuple(alias.description for alias in state.aliases.values()),
        _describe_groups(task, [n for n in state.parameters if n not in conduct.unreached]),
    )


def conduct_of(model: ModelDescription, task: Task | AnalyticTask) -> Conduct:
    """The conduct that a description has taken into account."""
    if isinstance(task, AnalyticTask):
        return Conduct()
    state = TaskState.of(task)
    return Conduct(
        frozenset(b.name for b in model.buffers if b.name in state.constants),
        frozenset(c.name for c in model.constants if c.name in state.parameters),
    )


def check_fits(task: Task | AnalyticTask, model: ModelDescription, precision: str, device: str) -> None:
    """Raises TaskError when a task cannot be computed as a spec wants it."""
    if isinstance(task, AnalyticTask) and device != "cpu":
        problem = f"{device!r} is not for an AnalyticTask, which computes in NumPy; allowed: cpu"
        raise TaskError("placement.device", problem)
    if precision == "full":
        return
    if isinstance(task, AnalyticTask):
        problem = f"{precision!r} is not for an AnalyticTask, which computes in NumPy; allowed: full"
        raise TaskError("precision", problem)
    if any(p.dtype != "float32" or p.is_complex for p in model.parameters):
        found = "complex" if any(p.is_complex for p in model.parameters) else "float64"
        problem = f"{precision!r} is for models of float32; this one has {found} parameters; allowed: full"
        raise TaskError("precision", problem)


def num_samples(data: Any, field: str, most: int | None = None) -> int:
    """The length of a data set. most: no more are read of a stream to find out.

    Raises TaskError when it cannot be used, or when it is empty.
    """
    inner = data.dataset if isinstance(data, LoaderData) else data
    if type(inner).__module__.startswith("ray.data."):
        raise TaskError(
            f"task.{field}",
            f"{field} is a data set of Ray Data, whose rows have no fixed order: write it once, with "
            "ray.data.Dataset.write_parquet(folder), and give steepest.ParquetData(folder)",
        )
    try:
        length = count(inner, most) if is_stream(inner) else len(data)
    except DataError as error:
        raise TaskError(f"task.{field}", f"{field}: {error}") from error
    except BaseException as error:
        raise TaskError(f"task.{field}", f"{field} has no length: {said(error)}", user_traceback(error)) from error
    if length == 0:
        raise TaskError(f"task.{field}", f"{field} is empty; it needs at least one sample")
    return length


def fan_in(task: Task | AnalyticTask) -> dict[str, int]:
    """How many inputs a unit of each layer has, by the name of the layer's weight; torch's own layers only."""
    if isinstance(task, AnalyticTask):
        return {}
    found = {}
    for prefix, root in roots(task):
        for name, module in root.named_modules(prefix=prefix[:-1]):
            dot = f"{name}." if name else ""
            for own, weight in module.named_parameters(recurse=False):
                if isinstance(module, _WITH_FAN_IN) and weight.dim() > 1 and "weight" in own:
                    transposed = isinstance(module, torch.nn.modules.conv._ConvTransposeNd)
                    found[dot + own] = weight.numel() // weight.shape[1 if transposed else 0]
    return found


_WITH_FAN_IN = (
    torch.nn.Linear,
    torch.nn.modules.conv._ConvNd,
    torch.nn.RNNBase,
    torch.nn.RNNCellBase,
    torch.nn.MultiheadAttention,
)
