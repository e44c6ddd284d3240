"""Which numbers the rows of a job's history have, and records from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_type_hints

import numpy as np
from numpy.typing import NDArray

from ps.numerics.histogram import BINS
from ps.step.messages import RECORD_BYTES, StepRecord

_TYPES = {int: "<i8", float: "<f8", bool: "?"}
_KINDS = get_type_hints(StepRecord)
SCALARS = tuple(name for name in StepRecord._fields if name not in RECORD_BYTES)
TOTAL = "total_samples"  # of this incarnation so far, so that throughput takes two rows


def activation_row(functions: int) -> np.dtype[Any]:
    """A row of `activations` with so many activation functions."""
    return np.dtype([("step", "<i8"), ("values", "<f8", (2, functions))])


@dataclass(frozen=True)
class RowLayout:
    """Of one incarnation's rows. begins: the first step that it counts for; 0 parameters: norms are not kept."""

    begins: int
    scalars: tuple[str, ...] = ()
    num_parameters: int = 0
    num_logged: int = 0
    signals: tuple[str, ...] = ()

    @cached_property
    def row(self) -> np.dtype[Any]:
        """A row of `rows`."""
        numbers = [(name, _TYPES[_KINDS[name]]) for name in self.scalars]
        return np.dtype([*numbers, (TOTAL, "<i8"), ("logged", "<f8", (self.num_logged,))])

    @cached_property
    def norm_row(self) -> np.dtype[Any]:
        """A row of `norms`."""
        return np.dtype(("<f8", (self.num_parameters,)))

    @cached_property
    def block_row(self) -> np.dtype[Any]:
        """A row of `blocks`."""
        return np.dtype(("<f4", (self.num_parameters,)))

    @cached_property
    def signal_row(self) -> np.dtype[Any]:
        """A row of `signals`."""
        return np.dtype([("step", "<i8"), ("values", "<f8", (len(self.signals), self.num_parameters))])

    @cached_property
    def histogram_row(self) -> np.dtype[Any]:
        """A row of `histograms`."""
        return np.dtype([("step", "<i8"), ("values", "<u4", (self.num_parameters, BINS))])


def numbers(data: bytes, count: int) -> NDArray[np.float64]:
    """Little-endian float64 of a known count; not-a-numbers when there are none."""
    values = np.frombuffer(data, "<f8")
    return values if len(values) == count else np.full(count, np.nan)


def column(rows: NDArray[Any], name: str) -> NDArray[Any]:
    """One number of some rows: a field, or "logged.N"; not-a-numbers where an older version has none."""
    field, _, index = name.partition(".")
    if index:
        logged = rows["logged"]
        return logged[:, int(index)] if int(index) < logged.shape[1] else np.full(len(rows), np.nan)
    names = rows.dtype.names or ()
    return rows[field] if field in names else np.full(len(rows), np.nan)


def to_records(rows: NDArray[Any], norms: NDArray[np.float64]) -> list[StepRecord]:
    """The records that rows, and those of norms beside them, were made from."""
    names = rows.dtype.names or ()
    scalars = [name for name in SCALARS if name in names]
    columns = [rows[name].tolist() for name in scalars]
    logged = [b"" if np.isnan(values).all() else values.tobytes() for values in rows["logged"]]
    packed = [values.tobytes() for values in norms]
    missing: dict[str, Any] = {name: math.nan for name in SCALARS if name not in names}  # in those of an older version
    return [
        StepRecord(**missing, **dict(zip(scalars, row, strict=True)), parameter_norms=own, logged=beside)
        for row, own, beside in zip(zip(*columns, strict=True), packed, logged, strict=True)
    ]
