"""Files of rows of a fixed size: appended to, mapped to be read. A row that is not whole is not there."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def bounds(steps: NDArray[Any], first: int, last: int | None) -> tuple[int, int]:
    """Where rows of the steps from `first` to `last` begin and end."""
    low = int(np.searchsorted(steps, first))
    return low, len(steps) if last is None else max(low, int(np.searchsorted(steps, last, "right")))


def joined(parts: list[NDArray[Any]]) -> NDArray[Any]:
    """One after the other; a single one is not copied."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.empty(0)


def mapped(path: Path, row: np.dtype[Any], count: int | None = None) -> NDArray[Any]:
    """The whole rows of a file, as it is now: the first ones, or all."""
    if count is None:
        count = size(path) // row.itemsize if row.itemsize else 0
    if not count:
        return np.empty(0, row)
    with path.open("rb") as file:  # not np.memmap, which takes several times as long to make and to cut
        mapped = mmap.mmap(file.fileno(), count * row.itemsize, access=mmap.ACCESS_READ)
    return np.ndarray((count,), row, mapped)


def measured_rows(
    files: Iterable[tuple[Path, np.dtype[Any], int | None]], first: int, last: int | None
) -> tuple[NDArray[Any], list[NDArray[Any]]]:
    """(steps from `first` to `last` that were measured, values of them by file). files: each with what is hidden."""
    found = []
    for path, row, hidden in files:
        rows = mapped(path, row)
        until = last if hidden is None else min(hidden - 1, hidden - 1 if last is None else last)
        low, high = bounds(rows["step"], first, until)
        if high > low:
            found.append(rows[low:high])
    steps = joined([rows["step"] for rows in found]) if found else np.empty(0, np.int64)
    return steps, [rows["values"] for rows in found]


def append_measured(path: Path, row: np.dtype[Any], measured: Iterable[tuple[int, bytes]]) -> None:
    """Add (step, values) to a file; those of another size, none for example, are left out."""
    whole = [(step, values) for step, values in measured if values and len(values) == row.itemsize - 8]
    if not whole:
        return
    rows = np.frombuffer(b"".join(step.to_bytes(8, "little") + values for step, values in whole), row)
    append(path, rows, int(np.searchsorted(mapped(path, row)["step"], whole[0][0])))


def size(path: Path) -> int:
    """In bytes; 0 of a file that is not there."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def append(path: Path, rows: NDArray[Any], count: int) -> None:
    """Write rows after the first `count`, and have them on disk."""
    with path.open("r+b" if path.exists() else "wb") as file:
        file.seek(count * rows.dtype.itemsize * (rows.shape[1] if rows.ndim == 2 else 1))
        file.write(rows.tobytes())
        file.truncate()
        file.flush()
        os.fsync(file.fileno())
