"""A few numbers of a task's initial parameters and data, by which a worker sees that its task is the job's.

They are sums, compared with a tolerance, because another CPU may round the last bits of an initial value differently.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from steepest.task import AnalyticTask, Task
from worker.data.loader import LoaderData
from worker.data.randomness import OwnRandomness
from worker.data.streams import is_stream
from worker.task.state import TaskState

TOLERANCE = 1e-3
NUM_SAMPLES = 3
MAX_ELEMENTS = 1 << 16
_PERIOD = 1009  # a prime: positions of elements count, too

Fingerprint = tuple[tuple[str, float], ...]


def fingerprint(task: Task | AnalyticTask) -> Fingerprint:
    """Numbers by name, the initial parameters' first. Data whose samples are no numbers are left out."""
    found: dict[str, float] = {}
    if isinstance(task, AnalyticTask):
        tensors: Mapping[str, Any] = task.parameters
    else:
        state = TaskState.of(task)
        tensors = {**state.parameters, **state.constants}
        tensors = {**tensors, **{n: place.tensor for n, place in state.buffers.items() if place.tensor is not None}}
    for name, tensor in tensors.items():
        _add(found, f"the initial value of {name}", tensor)
    pairs: list[tuple[str, Any]] = [("train_data", task.train_data), ("eval_data", task.eval_data)]
    for what, data in pairs:
        with contextlib.suppress(Exception):  # the rehearsal says what is wrong with it
            _add_data(found, what, data.dataset if isinstance(data, LoaderData) else data)
    return tuple(found.items())


def _add_data(found: dict[str, float], what: str, data: Any) -> None:
    if data is None:
        return
    if is_stream(data):
        with OwnRandomness(0).used():
            _add(found, f"the first sample of {what}", next(iter(data)))
        return
    length = len(data)
    found[f"the length of {what}"] = float(length)
    for index in sorted({round(i * (length - 1) / (NUM_SAMPLES - 1)) for i in range(NUM_SAMPLES)}):
        with OwnRandomness(0).used():
            _add(found, f"{what}[{index}]", data[index])


def difference(job: Fingerprint, own: Fingerprint) -> str:
    """The first name whose numbers differ, or nothing."""
    ours = dict(own)
    for name, value in job:
        other = ours.get(name, math.nan)
        if not (value == other or math.isclose(value, other, rel_tol=TOLERANCE, abs_tol=TOLERANCE)) and not (
            math.isnan(value) and name in ours and math.isnan(other)
        ):
            return name
    return ""


def _add(found: dict[str, float], name: str, value: Any) -> None:
    """Note a number for all that is numeric in a value."""
    if isinstance(value, torch.Tensor | np.ndarray | bool | int | float | np.generic):
        number = _summary(value)
        if number is not None:
            found[name] = number
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _add(found, f"{name}[{key!r}]", item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value[:16]):
            _add(found, f"{name}[{index}]", item)


def _stride(numel: int) -> int:
    """So many elements that their sum takes no time."""
    return max(1, numel // MAX_ELEMENTS)


def _summary(value: Any) -> float | None:
    """The mean of the elements, or of some of many, each times a weight between 1 and 2 that its place decides."""
    tensor = value.detach() if isinstance(value, torch.Tensor) else None
    if tensor is not None:
        if tensor.layout != torch.strided:
            tensor = tensor.to_dense()
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor)
        array = tensor.reshape(-1)[:: _stride(tensor.numel())].cpu().double().numpy()
    else:
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            return None
        array = array.reshape(-1)[:: _stride(array.size)].astype(np.float64)
    if not array.size:
        return 0.0
    weights = 1.0 + (np.arange(array.size) % _PERIOD) / _PERIOD
    scale = np.abs(array).mean()
    return float((array * weights).mean() / scale) if scale and np.isfinite(scale) else float(scale)
