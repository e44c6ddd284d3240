"""State that user code keeps where no checkpoint sees it: attributes of modules, globals, closures.

A value that is the same after a second pass over the same batch is a cache, and harmless. One that differs counts or
accumulates: every worker would have its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from ps.memory.raw import raw_bytes
from steepest.task import Task
from worker.task.state import roots

MAX_DEPTH = 4
MAX_ITEMS = 1000
_OF_TORCH = set(vars(nn.Module())) | {"_is_full_backward_hook"}
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def hidden_state(task: Task, known: set[int], code: Path | None) -> dict[str, str]:
    """A digest of every such value, by where it is.

    known: ids of the tensors that are the servers' or travel with the work. code: where the user's modules lie, whose
    globals are looked at, too.
    """
    found: dict[str, str] = {}
    for prefix, root in roots(task):
        for path, module in root.named_modules(prefix=prefix.removesuffix(".")):
            name = f"{path}."
            own = {key: value for key, value in vars(module).items() if key not in _OF_TORCH}
            own.update(module._buffers)
            _note(found, name, own, known)
    for what, function in _functions(task):
        _note(found, f"{what}: ", _kept_by(function), known)
    for module_name, globals_ in _modules_in(code):
        _note(found, f"{module_name}.", globals_, known)
    return found


def differences(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Where values differ."""
    return [name for name in after if before.get(name) != after[name]]


def _note(found: dict[str, str], prefix: str, values: Mapping[str, Any], known: set[int]) -> None:
    for key, value in values.items():
        digest = hashlib.sha256()
        if _add(digest.update, value, known, MAX_DEPTH, set()):
            found[prefix + key] = digest.hexdigest()


def _add(add: Callable[[bytes], None], value: Any, known: set[int], depth: int, inside: set[int]) -> bool:
    """Feed a value to a digest; whether it is of a kind that can be compared."""
    if id(value) in known or id(value) in inside or depth < 0:
        return False
    if isinstance(value, _PLAIN):
        add(repr(value).encode())
        return True
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or isinstance(value, nn.Parameter):
            return False
        add(str(value.dtype).encode() + str(tuple(value.shape)).encode() + bytes(raw_bytes(value.detach())))
        return True
    if isinstance(value, np.ndarray):
        if value.dtype == object:
            return False
        add(str(value.dtype).encode() + str(value.shape).encode() + np.ascontiguousarray(value).tobytes())
        return True
    if isinstance(value, np.generic):
        add(repr(value).encode())
        return True
    inside = {*inside, id(value)}
    items: Iterator[tuple[Any, Any]]
    if isinstance(value, Mapping):
        items = iter(value.items())
    elif isinstance(value, list | tuple | deque):
        items = enumerate(value)
    elif isinstance(value, torch.Generator):
        add(bytes(raw_bytes(value.get_state())))
        return True
    elif isinstance(value, np.random.Generator):
        add(repr(value.bit_generator.state).encode())
        return True
    elif isinstance(value, np.random.RandomState):
        add(repr(value.get_state()).encode())
        return True
    elif isinstance(value, ModuleType | type | FunctionType | MethodType | nn.Module) or not hasattr(value, "__dict__"):
        return False
    else:
        items = iter(vars(value).items())
    add(type(value).__name__.encode())
    for number, (key, item) in enumerate(items):
        if number >= MAX_ITEMS:
            break
        add(repr(key).encode() if isinstance(key, _PLAIN) else b"?")
        _add(add, item, known, depth - 1, inside)
    return True


def _functions(task: Task) -> list[tuple[str, Any]]:
    named = [("loss", task.loss), ("batch_loss", task.batch_loss), ("loss_weight", task.loss_weight)]
    named += [(f"metric {name!r}", metric) for name, metric in task.metrics.items()]
    return [
        (name, function) for name, function in named if function is not None and not isinstance(function, nn.Module)
    ]


def _kept_by(function: Any) -> dict[str, Any]:
    """What a callable keeps between calls: attributes, and the variables of its closure."""
    kept: dict[str, Any] = {}
    if isinstance(function, MethodType):
        kept.update(getattr(function.__self__, "__dict__", {}))
        function = function.__func__
    kept.update(getattr(function, "__dict__", {}))
    if isinstance(function, FunctionType):
        with contextlib.suppress(ValueError):  # a variable that is not set yet
            kept.update(inspect.getclosurevars(function).nonlocals)
    return kept


def _modules_in(code: Path | None) -> Iterator[tuple[str, dict[str, Any]]]:
    if code is None:
        return
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and Path(file).is_relative_to(code):
            own = {key: value for key, value in vars(module).items() if not key.startswith("__")}
            yield name, own
