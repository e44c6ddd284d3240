"""What is stored, as the page wants it: plain values that become JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ps.checkpoint.files import checkpoints, step_of
from ps.numerics.histogram import edges
from ps.numerics.stability import stable_sharpness
from ps.step.messages import ACTIVATION_SIGNALS, StepRecord
from ps.step.signals import NAMES, noise_of
from services.jobs.job_log import JobLog
from services.jobs.task_probe import TaskDescription, parameter_names
from services.settings import Settings
from services.store.history import JobHistory
from services.store.lifecycle import ENDED, JobState
from services.store.row_layout import SCALARS
from services.store.series import bucket_starts, downsample, largest
from services.store.store import JobRow, Newest, Store
from steepest.bottleneck import COLUMNS, RECENT_STEPS, bottleneck
from steepest.errors import SpecError, Violation
from steepest.spec import TrainingJobSpec, spec_from_dict

SPARK_POINTS, MAX_POINTS = 40, 5000
SPARK_STEPS = 2000  # that a spark line of a long job is drawn from
MAX_LAYERS = 500  # rows of the view of all layers, which is not higher on the page
FRESH_SECONDS = 0.25  # for which pages share the summary of a job that has not changed
FORGET_SECONDS = 60.0  # after which what was last said of a job that nobody looks at is dropped
LIVE_RECORDS, LIVE_LINES = 1000, 500
GRADIENT_NORM, UPDATE_RATIO = "gradient_norm", "update_ratio"
LAYER_SIGNALS = (GRADIENT_NORM, UPDATE_RATIO, *NAMES, *ACTIVATION_SIGNALS)


class Cursor(NamedTuple):
    """What a page has seen: the next step, the last event, the log's offset."""

    step: int = 0
    event: int = 0
    offset: int = 0


class _Live(NamedTuple):
    """What was last said of a job that has not ended: when, of which row and history, and what."""

    time: float
    row: JobRow
    history: JobHistory
    summary: dict[str, Any]


class Views:
    """Reads the store and the files of jobs."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._settings = settings
        self._of_ended: dict[tuple[str, float], dict[str, Any]] = {}  # by id and creation; they do not change any more
        self._of_live: dict[str, _Live] = {}  # by id

    def jobs(self) -> dict[str, Any]:
        """All jobs, newest first."""
        return {"jobs": [self._summary(row) for row in self._store.page(1000)[0]], "now": time.time()}

    def job(self, job: str) -> dict[str, Any]:
        """One job with all that does not grow with its steps. Raises NotFoundError."""
        row = self._store.get(job)
        spec = spec_from_dict(json.loads(row.spec))
        description = TaskDescription.from_json(row.description)
        layout = description.layout(spec)
        directory = self._settings.checkpoints_of(job)
        return {
            "job": self._summary(row),
            "spec": spec.model_dump(mode="json", exclude_none=True),
            "defaults": _defaults(spec).model_dump(mode="json", exclude_none=True),
            "model": description.model_class,
            "micro_batch_bytes": description.peak_bytes,
            "activations": description.activations,
            "parameters": [{"name": p.name, "shape": p.shape} for p in layout.parameters],
            "logged": description.logged_names,
            "evaluations": _evaluations(self._store.newest(job)),
            "checkpoints": [_checkpoint(path) for path in checkpoints(directory)],
            "result": {
                "metrics": row.result.metrics,
                "best_step": row.result.best_step,
                "parameters_sha256": row.result.parameters_sha256,
                "state_sha256": row.result.state_sha256,
                "error": row.result.error,
            },
        }

    def series(self, job: str, names: Sequence[str], first: int, last: int | None, points: int) -> dict[str, Any]:
        """Some series of a job in at most `points` buckets. Raises NotFoundError, SpecError."""
        logged = TaskDescription.from_json(self._store.get(job).description).logged_names
        allowed = {*SCALARS, *(f"logged.{name}" for name in logged)}
        unknown = [name for name in names if name not in allowed]
        if unknown or not names:
            problem = f"{unknown[0]!r} is no series" if unknown else "no series is named"
            raise SpecError([Violation("names", f"{problem}; there are: {', '.join(sorted(allowed))}")])
        columns = {f"logged.{name}": f"logged.{index}" for index, name in enumerate(logged)}
        raw = self._history(job).columns([columns.get(name, name) for name in names], first, last)
        found = downsample(raw, min(points, MAX_POINTS))
        return {
            "steps": found.steps,
            "count": len(raw["step"]),
            "series": {
                name: dict(zip(("min", "max", "mean"), found.series[columns.get(name, name)], strict=True))
                for name in names
                if name != "step"
            },
        }

    def layers(
        self, job: str, first: int, last: int | None, points: int, signal: str = GRADIENT_NORM
    ) -> dict[str, Any]:
        """The largest value of each parameter in each bucket, as powers of ten. Raises NotFoundError, SpecError.

        signal: one of LAYER_SIGNALS. Of more than MAX_LAYERS parameters, some neighbours share a row, whose largest
        value counts: names are of the first of each, and sizes say how many there are.
        """
        names = self._names(job, signal)
        points = min(points, MAX_POINTS)
        values: NDArray[np.floating]
        if signal == GRADIENT_NORM:
            steps, values = self._history(job).largest_norms(first, last, points)
        else:
            measured, norms = self._layer_signal(job, signal, first, last)
            starts = bucket_starts(len(measured), points)
            steps, values = measured[starts], largest(norms, starts)
        rows = bucket_starts(len(names), MAX_LAYERS)
        if len(rows) < len(names) and len(steps):
            values = np.fmax.reduceat(values, rows, axis=1)
        with np.errstate(divide="ignore"):
            powers = np.log10(values)
        return {
            "names": [names[row] for row in rows],
            "sizes": np.diff([*rows, len(names)]),
            "steps": steps,
            "values": np.ascontiguousarray(np.round(powers.T, 3)),
        }

    def _names(self, job: str, signal: str) -> Sequence[str]:
        """Of what has the signal: the activation functions, or the parameters. Raises NotFoundError."""
        row = self._store.get(job)
        of_functions = signal in ACTIVATION_SIGNALS
        return TaskDescription.from_json(row.description).activations if of_functions else parameter_names(row)

    def _number(self, job: str, name: str, signal: str = GRADIENT_NORM) -> int:
        """The number of a parameter or an activation function. Raises NotFoundError, SpecError."""
        names = self._names(job, signal)
        if name not in names:
            kind = "activation function" if signal in ACTIVATION_SIGNALS else "parameter"
            raise SpecError([Violation("name", f"{name!r} is no {kind} of trainingJobs/{job}")])
        return names.index(name)

    def _layer_signal(
        self, job: str, signal: str, first: int, last: int | None, parameter: int | None = None
    ) -> tuple[NDArray[Any], NDArray[np.float64]]:
        """(steps, values of shape (steps, parameters), or (steps,) of one). Raises SpecError."""
        history = self._history(job)
        if signal == GRADIENT_NORM:
            return history.norms(first, last, parameter)
        if signal not in LAYER_SIGNALS:
            raise SpecError([Violation("signal", f"{signal!r} is none; there are: {', '.join(LAYER_SIGNALS)}")])
        if signal in ACTIVATION_SIGNALS:
            steps, values = history.activations(first, last)
            own = values[:, ACTIVATION_SIGNALS.index(signal)]
            if parameter is None:
                return steps, own
            seen = np.isfinite(own[:, parameter]) if len(own) else slice(0)
            return steps[seen], own[seen, parameter]
        if signal == UPDATE_RATIO:
            steps, updates = history.signal("update_norm", first, last, parameter)
            with np.errstate(divide="ignore", invalid="ignore"):
                return steps, updates / history.signal("parameter_norm", first, last, parameter)[1]
        return history.signal(signal, first, last, parameter)

    def noise(self, job: str, first: int, last: int | None, points: int) -> dict[str, Any]:
        """The gradient noise scale of the whole network, in samples, and the cosine between its micro-batches.

        Both from running means. Raises NotFoundError.
        """
        data = spec_from_dict(json.loads(self._store.get(job).spec)).data
        history = self._history(job)
        steps, totals = history.noise(last)
        newest = history.last()
        weight = 1.0
        if newest is not None and newest.samples:
            weight = data.micro_batch_size * newest.weight / newest.samples
        low = int(np.searchsorted(steps, first))
        noise = noise_of(totals, weight)
        raw = {"step": steps[low:], "noise": noise.scale[low:], "cosine": noise.cosine[low:]}
        found = downsample(raw, min(points, MAX_POINTS))
        return {
            "steps": found.steps,
            **{
                name: dict(zip(("min", "max", "mean"), found.series[name], strict=True)) for name in ("noise", "cosine")
            },
        }

    def curvature(self, job: str, first: int, last: int | None, points: int) -> dict[str, Any]:
        """Sharpness and smallest eigenvalue of the steps that they are measured in, and what is stable at their lr.

        Raises NotFoundError.
        """
        stable = stable_sharpness(spec_from_dict(json.loads(self._store.get(job).spec)).optimizer)
        raw = self._history(job).columns(["sharpness", "smallest_eigenvalue", "lr"], first, last)
        measured = np.isfinite(raw["sharpness"])
        kept = {name: values[measured] for name, values in raw.items()}
        with np.errstate(divide="ignore"):
            kept["stable"] = stable / kept.pop("lr")
        found = downsample(kept, min(points, MAX_POINTS))
        series = {name: dict(zip(("min", "max", "mean"), own, strict=True)) for name, own in found.series.items()}
        return {"steps": found.steps, **series}

    def layer(
        self, job: str, name: str, first: int, last: int | None, points: int, signal: str = GRADIENT_NORM
    ) -> dict[str, Any]:
        """One signal of one parameter. Raises NotFoundError, SpecError."""
        steps, values = self._layer_signal(job, signal, first, last, self._number(job, name, signal))
        found = downsample({"step": steps, "norm": values}, min(points, MAX_POINTS))
        return {"steps": found.steps, **dict(zip(("min", "max", "mean"), found.series["norm"], strict=True))}

    def histograms(self, job: str, name: str, first: int, last: int | None, points: int) -> dict[str, Any]:
        """How the magnitudes of one parameter's gradient are distributed: shares by bin, a column for some steps.

        powers: of ten, of the edges of the bins that anything is in. Raises NotFoundError, SpecError.
        """
        parameter = self._number(job, name)
        steps, counts = self._history(job).histograms(first, last)
        starts = bucket_starts(len(steps), min(points, MAX_POINTS))
        if not len(starts):
            return {"steps": [], "powers": [], "values": []}
        own = np.add.reduceat(counts[:, parameter], starts, axis=0, dtype=np.float64)
        used = np.flatnonzero(own.any(axis=0))
        low, high = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 0)
        with np.errstate(invalid="ignore"):
            shares = own[:, low:high] / own.sum(axis=1, keepdims=True)
        powers = np.log10(edges()[low : high + 1]) if high else np.empty(0)
        return {
            "steps": steps[starts],
            "powers": np.round(powers, 2),
            "values": np.ascontiguousarray(np.round(np.nan_to_num(shares).T, 4)),
        }

    def news(self, job: str, cursor: Cursor) -> tuple[dict[str, Any], Cursor]:
        """What a page has not seen yet, and the cursor after it. Raises NotFoundError."""
        row = self._store.get(job)
        newest = self._store.newest(job)
        events = self._store.events_after(job, cursor.event) if newest.event > cursor.event else []
        lines = self._log(job).read(cursor.offset)[:LIVE_LINES]
        history = self._live_history(row)
        records = history.records(cursor.step, LIVE_RECORDS, norms=False)
        logged = TaskDescription.from_json(row.description).logged_names if records else ()
        following = Cursor(
            records[-1].step + 1 if records else cursor.step,
            events[-1].sequence if events else cursor.event,
            lines[-1].offset if lines else cursor.offset,
        )
        news = {
            "job": self._summary(row, history),
            "events": [{"time": e.time, "state": e.state, "reason": e.reason} for e in events],
            "lines": [{"time": s.line.time, "process": s.line.worker, "text": s.line.text} for s in lines],
            "records": [_record(record, logged) for record in records],
            "evaluations": _evaluations(newest),
            "cursor": ":".join(map(str, following)),
        }
        return news, following

    def has_ended(self, job: str) -> bool:
        """Whether nothing more will come. Raises NotFoundError."""
        return self._store.get(job).state in ENDED

    def _history(self, job: str) -> JobHistory:
        return JobHistory(self._settings.history_of(job))

    def _log(self, job: str) -> JobLog:
        return JobLog(self._settings.log_of(job), self._settings.max_log_bytes)

    def _live_history(self, row: JobRow) -> JobHistory:
        """That of a job as it is now. Of one that runs, what cannot change any more was read before."""
        kept = self._of_live.get(row.id)
        if kept is not None and kept.row.created == row.created:
            return kept.history.still()
        return self._history(row.id).still()

    def _summary(self, row: JobRow, history: JobHistory | None = None) -> dict[str, Any]:
        if row.state not in ENDED:
            now = time.monotonic()
            kept = self._of_live.get(row.id)
            if kept is None or now - kept.time > FRESH_SECONDS or kept.row != row:
                history = history or self._live_history(row)
                if kept is None:  # those of jobs that nobody looks at any more, or that are gone
                    for job, old in list(self._of_live.items()):
                        if now - old.time > FORGET_SECONDS:
                            self._of_live.pop(job, None)
                kept = self._of_live[row.id] = _Live(now, row, history, self._summarize(row, history))
            return kept.summary
        self._of_live.pop(row.id, None)
        key = row.id, row.created
        if key not in self._of_ended:
            self._of_ended[key] = self._summarize(row, history or self._history(row.id).still())
        return self._of_ended[key]

    def _summarize(self, row: JobRow, history: JobHistory) -> dict[str, Any]:
        result = row.result
        recent = history.columns(["time", *COLUMNS], max(0, result.step - RECENT_STEPS))
        spark = downsample(history.columns(["loss"], about=SPARK_STEPS), SPARK_POINTS)
        return {
            "id": row.id,
            "state": row.state,
            "reason": row.reason,
            "step": result.step,
            "total_steps": row.total_steps,
            "loss": result.loss,
            "metrics": result.metrics,
            "samples": result.samples,
            "samples_per_second": history.samples_per_second(),
            "created": row.created,
            "ended": row.ended,
            "eta_seconds": _eta(row, recent),
            "workers": [_member(m) for m in result.members if m[0] == "worker"],
            "servers": [_member(m) for m in result.members if m[0] == "server"],
            "wanted_workers": row.workers,
            "error": result.error,
            "findings": [finding._asdict() for finding in result.findings],
            "spark": spark.series["loss"][2],
            "shares": _shares(recent),
        }


def _defaults(spec: TrainingJobSpec) -> TrainingJobSpec:
    """A job that has the same task, length and optimizer, and leaves the rest as it is."""
    length = {"steps": spec.steps} if spec.steps is not None else {"epochs": spec.epochs}
    return spec_from_dict(
        {"task": spec.task.model_dump(), "optimizer": {"name": spec.optimizer.name}, "seed": spec.seed, **length}
    )


def _evaluations(newest: Newest) -> list[dict[str, Any]]:
    return [{"step": step, "metrics": metrics} for step, metrics in newest.evaluations]


def _member(member: tuple[str, str, int, str, str]) -> dict[str, Any]:
    _, name, pid, host, state = member
    return {"id": name, "pid": pid, "host": host, "state": state}


def _checkpoint(path: Path) -> dict[str, Any]:
    files = [file.stat() for file in path.iterdir()]
    return {
        "step": step_of(path),
        "bytes": sum(file.st_size for file in files),
        "time": max((file.st_mtime for file in files), default=0.0),
    }


def _record(record: StepRecord, logged: Sequence[str]) -> dict[str, Any]:
    values = np.frombuffer(record.logged, "<f8").tolist()
    own = {f"logged.{name}": value for name, value in zip(logged, values, strict=False)}
    return {**{name: getattr(record, name) for name in SCALARS}, **own}


def _eta(row: JobRow, recent: dict[str, NDArray[Any]]) -> float | None:
    """Seconds to the last step, by the speed of the last ones; None when it cannot be told."""
    times = recent["time"]
    if row.state != JobState.RUNNING or len(times) < 2 or times[-1] <= times[0]:
        return None
    done = recent["step"][-1] - recent["step"][0]
    return float((row.total_steps - row.result.step) * (times[-1] - times[0]) / max(done, 1))


def _shares(recent: dict[str, NDArray[Any]]) -> dict[str, Any] | None:
    """Where a step's time goes: shares of the last steps, one word for it, and what to try."""
    found = bottleneck(recent)
    if found is None:
        return None
    return {
        **found.shares,
        "step_seconds": found.seconds,
        "word": found.word,
        "saves_seconds": found.saves,
        "remedy": found.remedy,
    }
