"""Describes the task that the user's function returned, and checks that it can be trained as the spec wants."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.parameter import is_lazy

from ps.parameters.description import ModelDescription, TensorDescription
from ps.parameters.layout import build_layout
from steepest.task import AnalyticTask, Task
from worker.task.load import TaskError, said, user_traceback


def named_state(model: torch.nn.Module) -> tuple[dict[str, torch.nn.Parameter], dict[str, torch.Tensor]]:
    """(trainable parameters, buffers and frozen parameters), each tensor once, in the model's own order."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    buffers: dict[str, torch.Tensor] = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    buffers.update(model.named_buffers())
    return parameters, buffers


def _describe(name: str, tensor: torch.Tensor) -> TensorDescription:
    return TensorDescription(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def describe_model(task: Task | AnalyticTask) -> ModelDescription:
    """What the servers need to know of the model. Raises TaskError for one that cannot be trained here."""
    if isinstance(task, AnalyticTask):
        tensors = {name: torch.as_tensor(value) for name, value in task.parameters.items()}
        description = ModelDescription(
            tuple(_describe(n, t) for n, t in tensors.items()), (), tuple((n, n) for n in tensors)
        )
    else:
        if not isinstance(task.model, torch.nn.Module):
            raise TaskError("task.model", f"model is {type(task.model).__name__}; it must be a torch.nn.Module")
        lazy = [n for n, p in task.model.named_parameters() if is_lazy(p)]
        if lazy:
            raise TaskError("task.model", f"{lazy[0]} has no shape yet: run one batch through lazy modules in the task")
        parameters, buffers = named_state(task.model)
        names = {id(t): n for n, t in [*buffers.items(), *parameters.items()]}
        shown = []
        for key, value in task.model.state_dict(keep_vars=True).items():
            if id(value) not in names:
                raise TaskError("task.model", f"state_dict entry {key!r} is neither a parameter nor a buffer")
            shown.append((key, names[id(value)]))
        description = ModelDescription(
            tuple(_describe(n, t) for n, t in parameters.items()),
            tuple(_describe(n, t) for n, t in buffers.items()),
            tuple(shown),
        )
    try:
        build_layout(description)
    except ValueError as error:
        raise TaskError("task.model", str(error)) from error
    return description


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
    if any(p.dtype != "float32" for p in model.parameters):
        problem = f"{precision!r} is for models of float32; this one has float64 parameters; allowed: full"
        raise TaskError("precision", problem)


def num_samples(data: Any, field: str) -> int:
    """The length of a data set. Raises TaskError when it has none, or when it is 0."""
    try:
        length = len(data)
    except BaseException as error:
        raise TaskError(f"task.{field}", f"{field} has no length: {said(error)}", user_traceback(error)) from error
    if length == 0:
        raise TaskError(f"task.{field}", f"{field} is empty; it needs at least one sample")
    return length
