"""The records of a job's steps as columns: from a service, or from what `steepest train --output` left."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steepest.errors import SpecError, Violation
from steepest.jobs import Evaluation, StepHistograms

HISTORY, SIGNALS = "history.parquet", "signals.parquet"


@dataclass(frozen=True)
class Records:
    """One job's. columns: a number of each step, shape (steps,), by name, "step" among them.

    norms: of each parameter's gradient, by name. signals: of each parameter, in the steps that they are measured in: a
    row for each step and parameter, with the keys "step" and "parameter". evaluations, histograms: in order.
    """

    columns: Mapping[str, NDArray[np.float64]]
    norms: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    signals: tuple[Mapping[str, Any], ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    histograms: tuple[StepHistograms, ...] = ()

    def __len__(self) -> int:
        return len(self.columns["step"])

    def between(self, first: int, last: int | None) -> Records:
        """Those of the steps from `first` to `last`, without signals and evaluations."""
        steps = self.columns["step"]
        chosen = (steps >= first) & (steps <= (np.inf if last is None else last))
        columns, norms = (
            {name: values[chosen] for name, values in found.items()} for found in (self.columns, self.norms)
        )
        return Records(columns, norms)

    def column(self, name: str) -> NDArray[np.float64]:
        """A column; not a number where there is none of that name."""
        found = self.columns.get(name)
        return np.full(len(self), np.nan) if found is None else found


def records_of(
    rows: Iterable[Mapping[str, Any]],
    evaluations: Iterable[Evaluation] = (),
    histograms: Iterable[StepHistograms] = (),
) -> Records:
    """Those of `Job.history`, `Job.evaluations` and `Job.histograms`."""
    kept = list(rows)
    names = [name for name in kept[0] if name not in _NESTED] if kept else ["step"]
    logged = dict.fromkeys(name for row in kept for name in row["logged"])
    parameters = list(kept[0]["parameter_norms"]) if kept else []
    columns = {name: np.array([row[name] for row in kept], np.float64) for name in names}
    for name in logged:
        columns[f"logged.{name}"] = np.array([row["logged"].get(name, np.nan) for row in kept], np.float64)
    norms = {
        name: np.array([row["parameter_norms"].get(name, np.nan) for row in kept], np.float64) for name in parameters
    }
    signals = tuple(signal for row in kept for signal in signal_rows(row))
    return Records(columns, norms, signals, tuple(evaluations), tuple(histograms))


_NESTED = ("parameter_norms", "logged", "signals", "activations")


def signal_rows(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The signals in one record, a row for each parameter."""
    signals = row["signals"]
    return [
        {"step": row["step"], "parameter": name, **{signal: own[name] for signal, own in signals.items()}}
        for name in next(iter(signals.values()), ())
    ]


def read_directory(directory: Path) -> Records:
    """Those that `steepest train --output` left. Raises SpecError when there are none."""
    from pyarrow import parquet

    path = directory / HISTORY
    try:
        rows = parquet.read_table(path).to_pylist()
        measured = directory / SIGNALS
        signals = parquet.read_table(measured).to_pylist() if measured.exists() else []
    except (OSError, ValueError) as error:
        raise SpecError([Violation("JOB", f"{path} cannot be read: {error}")]) from None
    columns: dict[str, list[Any]] = {}
    norms: dict[str, list[Any]] = {}
    for row in rows:
        for name, value in (row.pop("parameter_norms", None) or {}).items():
            norms.setdefault(name, []).append(value)
        for name, value in row.items():
            columns.setdefault(name, []).append(np.nan if value is None else value)
    return Records(
        {name: np.array(values, np.float64) for name, values in (columns or {"step": []}).items()},
        {name: np.array(values, np.float64) for name, values in norms.items()},
        tuple(signals),
    )


def write_parquet(records: Records, path: Path) -> None:
    """One row a step; the norms of parameters are a column of their own. Beside it, SIGNALS if there are any."""
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table(_whole(records)), path)
    if records.signals:
        parquet.write_table(pa.Table.from_pylist(list(records.signals)), path.with_name(SIGNALS))


def write_csv(records: Records, path: Path) -> None:
    """One row a step; the norm of a parameter's gradient is the column norm.NAME."""
    import csv

    columns = _typed(records) | {f"norm.{name}": values for name, values in records.norms.items()}
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*(values.tolist() for values in columns.values()), strict=True))


_INTEGERS = frozenset({"step", "samples", "workers", "slowest_worker"})
_FLAGS = frozenset({"clipped", "skipped"})


def _typed(records: Records) -> dict[str, NDArray[Any]]:
    def typed(name: str, values: NDArray[np.float64]) -> NDArray[Any]:
        if name in _FLAGS:
            flags: NDArray[np.bool_] = values != 0
            return flags
        return values.astype(np.int64) if name in _INTEGERS and np.isfinite(values).all() else values

    return {name: typed(name, values) for name, values in records.columns.items()}


def _whole(records: Records) -> dict[str, Any]:
    import pyarrow as pa

    whole: dict[str, Any] = {name: pa.array(values) for name, values in _typed(records).items()}
    if records.norms:
        parts = [pa.array(values) for values in records.norms.values()]
        whole["parameter_norms"] = pa.StructArray.from_arrays(parts, names=list(records.norms))
    return whole
