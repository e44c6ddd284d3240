"""steepest: distributed training whose result never depends on placement.

The names here load on first use, so that `import steepest` costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steepest.asynchronous import AsyncClient
    from steepest.client import Client, Job
    from steepest.data import ParquetData, TarData
    from steepest.errors import SteepestError
    from steepest.interop import load_optimizer_state
    from steepest.spec import TrainingJobSpec
    from steepest.task import AnalyticTask, ArrayData, ParameterGroup, Task

__version__ = "0.1.0"

_HOME = {
    "AnalyticTask": "steepest.task",
    "AsyncClient": "steepest.asynchronous",
    "ArrayData": "steepest.task",
    "ParameterGroup": "steepest.task",
    "ParquetData": "steepest.data",
    "TarData": "steepest.data",
    "Client": "steepest.client",
    "Job": "steepest.client",
    "SteepestError": "steepest.errors",
    "Task": "steepest.task",
    "TrainingJobSpec": "steepest.spec",
    "load_optimizer_state": "steepest.interop",
}

__all__ = [
    "AnalyticTask",
    "ArrayData",
    "AsyncClient",
    "ParameterGroup",
    "ParquetData",
    "Client",
    "Job",
    "SteepestError",
    "TarData",
    "Task",
    "TrainingJobSpec",
    "__version__",
    "load_optimizer_state",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'steepest' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
