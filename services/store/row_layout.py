"""Which numbers the rows of a job's history have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_type_hints

import numpy as np

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

    @property
    def row(self) -> np.dtype[Any]:
        """A row of `rows`."""
        numbers = [(name, _TYPES[_KINDS[name]]) for name in self.scalars]
        return np.dtype([*numbers, (TOTAL, "<i8"), ("logged", "<f8", (self.num_logged,))])

    @property
    def norm_row(self) -> np.dtype[Any]:
        """A row of `norms`."""
        return np.dtype(("<f8", (self.num_parameters,)))

    @property
    def block_row(self) -> np.dtype[Any]:
        """A row of `blocks`."""
        return np.dtype(("<f4", (self.num_parameters,)))

    @property
    def signal_row(self) -> np.dtype[Any]:
        """A row of `signals`."""
        return np.dtype([("step", "<i8"), ("values", "<f8", (len(self.signals), self.num_parameters))])

    @property
    def histogram_row(self) -> np.dtype[Any]:
        """A row of `histograms`."""
        return np.dtype([("step", "<i8"), ("values", "<u4", (self.num_parameters, BINS))])
