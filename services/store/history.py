"""The records of a job's steps: files of fixed-size rows beside its checkpoints, appended to and mapped to be read.

Each incarnation of the job has a folder of its own. `layout.json` says which numbers a row has, and from which step on
this incarnation counts: what earlier ones recorded of that step and later was computed again, so it is hidden. `rows`
has the numbers of a step, `norms` those of its parameters, and, for the steps that they are measured in, `signals` what
`ps.step.signals` names, `histograms` what `ps.numerics.histogram` counts and `activations` what comes out of activation
functions. `blocks` has the largest norms of every
BLOCK rows, so that a view of a long job need not read them all, and `noise` what the noise estimates of all parameters
come to. A row that is not whole, as after a full disk, is not there.
"""

from __future__ import annotations

import copy
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ps.numerics.histogram import BINS
from ps.step.messages import RECORD_BYTES, StepRecord
from ps.step.signals import NAMES, NOISE
from services.store.row_layout import SCALARS, TOTAL, RowLayout, activation_row, column, numbers, to_records
from services.store.rows import append, append_measured, bounds, joined, mapped, measured_rows, size
from services.store.series import bucket_starts, largest

LAYOUT, ROWS, NORMS, SIGNALS, HISTOGRAMS, BLOCKS = "layout.json", "rows", "norms", "signals", "histograms", "blocks"
NOISES, ACTIVATIONS = "noise", "activations"
NOISE_ROW = np.dtype([("step", "<i8"), ("values", "<f8", (len(NOISE),))])
BLOCK = 16


@dataclass(frozen=True)
class _Part:
    """The rows of an incarnation that are not hidden. norms: shape (rows, parameters).

    blocks: of all rows of the incarnation. start: the number of the first row here among them.
    """

    rows: NDArray[Any]
    norms: NDArray[np.float64]
    blocks: NDArray[np.float32]
    start: int = 0

    def between(self, first: int, last: int | None) -> _Part:
        """Those of the steps from `first` to `last`."""
        low, high = bounds(self.rows["step"], first, last)
        return _Part(self.rows[low:high], self.norms[low:high], self.blocks, self.start + low)

    def largest(self) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """(first step, the largest norms) of pieces of at most BLOCK rows."""
        stop = self.start + len(self.rows)
        edges = np.arange(-(-self.start // BLOCK) * BLOCK, stop, BLOCK) - self.start
        starts = edges if len(edges) and edges[0] == 0 else np.concatenate([[0], edges])
        found = np.empty((len(starts), self.norms.shape[1]), np.float32)
        for place, low in enumerate(starts.tolist()):
            block, is_whole = divmod(self.start + low, BLOCK)
            if not is_whole and low + BLOCK <= len(self.rows) and block < len(self.blocks):
                found[place] = self.blocks[block]
            else:
                until = starts[place + 1] if place + 1 < len(starts) else len(self.rows)
                found[place] = np.fmax.reduce(self.norms[low:until], axis=0)
        return self.rows["step"][starts], found


class JobHistory:
    """The history of one job. Safe to use from many threads; one process writes."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._layouts: dict[int, RowLayout] = {}  # by incarnation, those that cannot change any more
        self._still: list[_Part] | None = None

    # -- writing ------------------------------------------------------------------------------------------------------

    def begin(self, incarnation: int, step: int) -> None:
        """An incarnation computes `step` and later; what there is of them is hidden from now on. Raises OSError."""
        with self._lock:
            self._write_layout(incarnation, RowLayout(step))

    def append(self, incarnation: int, records: Sequence[StepRecord]) -> None:
        """Add the records of steps, in order; those that are there already are left out. Raises OSError."""
        with self._lock:
            layout = self._layout(incarnation) or RowLayout(0)
            before = self._read(incarnation, layout)
            last = before.rows["step"][-1] if len(before.rows) else layout.begins - 1
            records = [record for record in records if record.step > last]
            if not records:
                return
            if not layout.scalars:
                widths = {name: max(len(getattr(r, name)) for r in records) // 8 for name in RECORD_BYTES}
                layout = RowLayout(layout.begins, SCALARS, widths["parameter_norms"], widths["logged"], NAMES)
                self._write_layout(incarnation, layout)
            rows = np.zeros(len(records), layout.row)
            for name in layout.scalars:
                rows[name] = [getattr(record, name) for record in records]
            total = int(before.rows[TOTAL][-1]) if len(before.rows) else 0
            rows[TOTAL] = total + np.cumsum(rows["samples"])
            rows["logged"] = [numbers(record.logged, layout.num_logged) for record in records]
            folder = self._folder(incarnation)
            append_measured(folder / SIGNALS, layout.signal_row, [(r.step, r.signals) for r in records])
            self._append_noise(folder, layout, records)
            self._append_activations(folder, records)
            append_measured(folder / HISTOGRAMS, layout.histogram_row, [(r.step, r.histograms) for r in records])
            if layout.num_parameters:
                norms = np.array([numbers(r.parameter_norms, layout.num_parameters) for r in records])
                append(folder / NORMS, norms, len(before.rows))
                self._append_blocks(folder, layout, len(before.rows), len(before.rows) + len(rows))
            append(folder / ROWS, rows, len(before.rows))

    def _append_activations(self, folder: Path, records: Sequence[StepRecord]) -> None:
        """The name of the file says how many functions a row has: the first rows of an incarnation may have none."""
        functions = max(len(record.activations) for record in records) // 16
        if functions:
            measured = [(record.step, record.activations) for record in records]
            append_measured(folder / f"{ACTIVATIONS}.{functions}", activation_row(functions), measured)

    def _append_noise(self, folder: Path, layout: RowLayout, records: Sequence[StepRecord]) -> None:
        whole = [r for r in records if len(r.signals) == layout.signal_row.itemsize - 8 > 0]
        if whole:
            values = np.array([np.frombuffer(r.signals, "<f8").reshape(len(NAMES), -1) for r in whole])
            packed = [row.tobytes() for row in _noise_totals(values)]
            append_measured(folder / NOISES, NOISE_ROW, zip([r.step for r in whole], packed, strict=True))

    def _append_blocks(self, folder: Path, layout: RowLayout, before: int, now: int) -> None:
        """With rows up to `now`, some blocks are whole that were not with those up to `before`."""
        first, last = before // BLOCK, now // BLOCK
        written = size(folder / BLOCKS) // layout.block_row.itemsize
        first = min(first, written)  # an older version wrote none
        if first == last:
            return
        norms = mapped(folder / NORMS, layout.norm_row, last * BLOCK)[first * BLOCK :]
        append(folder / BLOCKS, np.fmax.reduceat(norms, np.arange(0, len(norms), BLOCK)).astype("<f4"), first)

    # -- reading ------------------------------------------------------------------------------------------------------

    def still(self) -> JobHistory:
        """The history as it is now, for several questions that need to look at its rows' files only once."""
        other = copy.copy(self)
        other._still = None
        other._still = list(other._parts())
        return other

    def records(
        self, first: int = 0, limit: int | None = None, *, signals: bool = False, norms: bool = True
    ) -> list[StepRecord]:
        """The records of `first` and later steps, in order; with those of parameters' signals only if asked for."""
        found: list[StepRecord] = []
        for part in self._parts():
            there = part.between(first, None)
            stop = None if limit is None else limit - len(found)
            found += to_records(there.rows[:stop], there.norms[:stop] if norms else there.norms[:stop, :0])
        if not signals or not found:
            return found
        measured = dict(zip(*self.signals(first, found[-1].step), strict=True))
        seen = dict(zip(*self.activations(first, found[-1].step), strict=True))

        def whole(record: StepRecord) -> StepRecord:
            signals, activations = measured.get(record.step), seen.get(record.step)
            return record._replace(
                signals=b"" if signals is None else signals.tobytes(),
                activations=b"" if activations is None else activations.tobytes(),
            )

        return list(map(whole, found))

    def last(self) -> StepRecord | None:
        """The newest record."""
        for part in reversed(list(self._parts())):
            if len(part.rows):
                return to_records(part.rows[-1:], part.norms[-1:])[0]
        return None

    def columns(
        self, names: Sequence[str], first: int = 0, last: int | None = None, *, about: int | None = None
    ) -> dict[str, NDArray[Any]]:
        """Numbers of the steps from `first` to `last`, each of shape (steps,); "step" is always there.

        names: fields of StepRecord that are numbers, or "logged.N" for the N-th number beside the loss. about: how many
        steps are enough, spread evenly over those there are.
        """
        parts = [part.between(first, last).rows for part in self._parts()]
        if about is not None:
            every = max(1, sum(map(len, parts)) // about)
            parts = [rows[::every] for rows in parts]
        return {name: joined([column(rows, name) for rows in parts]) for name in dict.fromkeys(["step", *names])}

    def norms(
        self, first: int = 0, last: int | None = None, parameter: int | None = None
    ) -> tuple[NDArray[Any], NDArray[np.float64]]:
        """(steps, norm of each parameter's gradient, shape (steps, parameters)); empty when norms are not kept.

        parameter: the number of the only one that is wanted; the shape is then (steps,).
        """
        parts = [part.between(first, last) for part in self._parts()]
        kept = [part for part in parts if part.norms.shape[1]]
        if not kept:
            return np.empty(0, np.int64), np.empty((0, 0) if parameter is None else 0)
        norms = [part.norms if parameter is None else part.norms[:, parameter] for part in kept]
        return joined([part.rows["step"] for part in kept]), joined(norms)

    def largest_norms(
        self, first: int = 0, last: int | None = None, points: int = 300
    ) -> tuple[NDArray[Any], NDArray[np.floating]]:
        """(first step of each bucket, the largest norm of each parameter in it, shape (buckets, parameters)).

        points: at most so many buckets, of nearly the same number of steps.
        """
        parts = [part for part in self._parts() if part.norms.shape[1]]
        cut = [part.between(first, last) for part in parts]
        if sum(len(part.rows) for part in cut) < BLOCK * points:
            steps, norms = self.norms(first, last)
            starts = bucket_starts(len(steps), points)
            return steps[starts], largest(norms, starts)
        pieces = [part.largest() for part in cut if len(part.rows)]
        steps, norms = joined([steps for steps, _ in pieces]), np.concatenate([norms for _, norms in pieces])
        starts = bucket_starts(len(steps), points)
        return steps[starts], largest(norms, starts)

    def signals(self, first: int = 0, last: int | None = None) -> tuple[NDArray[Any], NDArray[np.float64]]:
        """(steps that were measured, their signals, shape (steps, signals, parameters)); see ps.step.signals."""
        steps, parts = measured_rows(self._signal_files(), first, last)
        return steps, joined(parts) if parts else np.empty((0, len(NAMES), 0))

    def signal(
        self, name: str, first: int = 0, last: int | None = None, parameter: int | None = None
    ) -> tuple[NDArray[Any], NDArray[np.float64]]:
        """(steps that were measured, one signal of all parameters or of one, shaped as norms are)."""
        steps, parts = measured_rows(self._signal_files(), first, last)
        own = [values[:, NAMES.index(name)] for values in parts]
        if parameter is not None:
            return steps, joined([values[:, parameter] for values in own])
        return steps, joined(own) if own else np.empty((0, 0))

    def activations(self, first: int = 0, last: int | None = None) -> tuple[NDArray[Any], NDArray[np.float64]]:
        """(steps that have them, shares and sizes of activation functions, shape (steps, 2, functions)).

        See worker.gradients.activations.
        """
        files = [
            (path, activation_row(int(path.suffix[1:])), hidden)
            for incarnation, _, hidden in self._visible()
            for path in self._folder(incarnation).glob(f"{ACTIVATIONS}.*")
        ]
        steps, parts = measured_rows(files, first, last)
        return steps, joined(parts) if parts else np.empty((0, 2, 0))

    def noise(self, last: int | None = None) -> tuple[NDArray[Any], NDArray[np.float64]]:
        """(steps that were measured, totals of the noise estimates, shape (steps, 2)); see ps.step.signals.noise_of."""
        files = [(path.with_name(NOISES), NOISE_ROW, hidden) for path, _, hidden in self._signal_files()]
        if not all(path.exists() for path, _, _ in files):  # an older version wrote none
            steps, values = self.signals(0, last)
            return steps, _noise_totals(values)
        steps, parts = measured_rows(files, 0, last)
        return steps, joined(parts) if parts else np.empty((0, 2))

    def _signal_files(self) -> list[tuple[Path, np.dtype[Any], int | None]]:
        """Those of this version; see measured_rows."""
        found = [
            (self._folder(incarnation) / SIGNALS, layout.signal_row, hidden)
            for incarnation, layout, hidden in self._visible()
            if layout.signals == NAMES
        ]
        return [each for each in found if each[0].exists()]

    def histograms(
        self, first: int = 0, last: int | None = None, *, limit: int | None = None
    ) -> tuple[NDArray[Any], NDArray[np.uint32]]:
        """(steps that have them, shape (steps,); counts, shape (steps, parameters, BINS)); see ps.numerics.histogram.

        limit: no more than so many steps, the first ones.
        """
        files = [
            (self._folder(incarnation) / HISTOGRAMS, layout.histogram_row, hidden)
            for incarnation, layout, hidden in self._visible()
        ]
        steps, parts = measured_rows(files, first, last)
        counts = joined(parts) if parts else np.empty((0, 0, BINS), np.uint32)
        return steps[:limit], counts[:limit]

    def samples_per_second(self) -> float | None:
        """Over the last half of the steps; None when there are fewer than two in it."""
        parts = [part.rows for part in self._parts() if len(part.rows)]
        if not parts:
            return None
        half = int(parts[-1]["step"][-1]) // 2
        samples, ends = 0, []
        for rows in parts:
            low, high = bounds(rows["step"], half, None)
            if high > low:
                ends += [rows[low], rows[high - 1]]
                samples += int(rows[high - 1][TOTAL] - rows[low][TOTAL] + rows[low]["samples"])
        if not ends or ends[-1]["time"] <= ends[0]["time"]:
            return None
        return float((samples - ends[0]["samples"]) / (ends[-1]["time"] - ends[0]["time"]))

    # -- files --------------------------------------------------------------------------------------------------------

    def _folder(self, incarnation: int) -> Path:
        return self._directory / f"{incarnation:06d}"

    def _incarnations(self) -> list[int]:
        try:
            return sorted(int(entry.name) for entry in os.scandir(self._directory) if entry.name.isdecimal())
        except FileNotFoundError:
            return []

    def _layout(self, incarnation: int) -> RowLayout | None:
        if incarnation not in self._layouts:
            try:
                raw: Mapping[str, Any] = json.loads((self._folder(incarnation) / LAYOUT).read_text())
                layout = RowLayout(
                    raw["begins"],
                    tuple(raw["scalars"]),
                    raw["num_parameters"],
                    raw["num_logged"],
                    tuple(raw.get("signals", ())),
                )
            except (OSError, ValueError, KeyError):
                return None
            if not layout.scalars:
                return layout
            self._layouts[incarnation] = layout
        return self._layouts[incarnation]

    def _write_layout(self, incarnation: int, layout: RowLayout) -> None:
        folder = self._folder(incarnation)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{LAYOUT}"
        temporary.write_text(json.dumps(asdict(layout)))
        temporary.rename(folder / LAYOUT)

    def _read(self, incarnation: int, layout: RowLayout) -> _Part:
        """All whole rows, hidden ones too."""
        folder, width = self._folder(incarnation), layout.num_parameters
        row = layout.row
        count = size(folder / ROWS) // row.itemsize if layout.scalars else 0
        if width:
            count = min(count, size(folder / NORMS) // (8 * width))
        if not count:
            return _Part(np.empty(0, row), np.empty((0, width)), np.empty((0, width), np.float32))
        norms = mapped(folder / NORMS, layout.norm_row, count) if width else np.empty((count, 0))
        blocks = mapped(folder / BLOCKS, layout.block_row) if width else np.empty((0, 0), np.float32)
        return _Part(mapped(folder / ROWS, row, count), norms, blocks)

    def _visible(self) -> Iterator[tuple[int, RowLayout, int | None]]:
        """The incarnations that have rows, in order, each with the first of its steps that is hidden."""
        layouts = {i: layout for i in self._incarnations() if (layout := self._layout(i)) is not None}
        for incarnation, layout in layouts.items():
            if layout.scalars:
                hidden = min((later.begins for i, later in layouts.items() if i > incarnation), default=None)
                yield incarnation, layout, hidden

    def _parts(self) -> Iterator[_Part]:
        """What is not hidden, in the order of steps."""
        if self._still is not None:
            yield from self._still
            return
        for incarnation, layout, hidden in self._visible():
            part = self._read(incarnation, layout)
            yield part if hidden is None else part.between(0, hidden - 1)


def _noise_totals(signals: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of all parameters together, shape (steps, 2). signals: shape (steps, signals, parameters)."""
    totals: NDArray[np.float64] = signals[:, [NAMES.index(name) for name in NOISE]].sum(axis=2)
    return totals
