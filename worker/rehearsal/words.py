"""Values and functions in words, and whether two values are the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def name_of(function: Any) -> str:
    """What a callable is called."""
    return getattr(function, "__qualname__", type(function).__name__)


def some(indices: NDArray[np.int64]) -> str:
    """The first few."""
    return ", ".join(map(str, indices[:4].tolist())) + (", ..." if len(indices) > 4 else "")


def same(one: Any, other: Any) -> bool:
    """Whether two samples or batches have the same values."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.shape == other.shape and _equal_with_nan(one, other)
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and np.array_equal(one, other, equal_nan=one.dtype.kind in "fc")
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, bool | int | float | str | bytes | None.__class__):
        return bool(one == other)
    return True  # of a kind that cannot be compared


def _equal_with_nan(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.layout != torch.strided:
        one, other = one.to_dense(), other.to_dense()
    return torch.equal(one, other) or bool(torch.isclose(one, other, rtol=0, atol=0, equal_nan=True).all())


def shape_of(batch: Any) -> str:
    """A batch in words: types and shapes."""
    if isinstance(batch, torch.Tensor | np.ndarray):
        return f"{str(batch.dtype).removeprefix('torch.')}{list(batch.shape)}"
    if isinstance(batch, dict):
        return "{" + ", ".join(f"{key}: {shape_of(value)}" for key, value in batch.items()) + "}"
    if isinstance(batch, tuple | list):
        return "(" + ", ".join(map(shape_of, batch)) + ")"
    return type(batch).__name__
