"""The steps of a job as a trace in the format of chrome://tracing, which https://ui.perfetto.dev opens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from steepest.records import Records

STEPS, WORKERS, SERVERS = 1, 2, 3
LANES = {STEPS: "steps", WORKERS: "workers (the one with most to do)", SERVERS: "servers"}


def trace_events(records: Records, title: str) -> list[dict[str, Any]]:
    """The events: each step, and in it what workers and servers did; times in microseconds from the first step on.

    A record says how long each part took and when the step was over, so that parts of one lane follow each other: where
    workers and servers work side by side, as they do on large models, the parts are longer than they look here.
    """
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": 1, "args": {"name": title}}]
    events += [{"ph": "M", "name": "thread_name", "pid": 1, "tid": t, "args": {"name": n}} for t, n in LANES.items()]
    names = (
        "time",
        "step_seconds",
        "data_seconds",
        "compute_seconds",
        "worker_seconds",
        "reduce_seconds",
        "apply_seconds",
    )
    columns = [np.nan_to_num(records.column(name)) for name in names]
    numbers = {name: values for name, values in records.columns.items() if name not in names}
    origin = float(columns[0][0] - columns[1][0]) if len(records) else 0.0

    def part(lane: int, name: str, start: float, seconds: float, **shown: Any) -> None:
        if seconds > 0 or lane == STEPS:
            place = {"pid": 1, "tid": lane, "ts": round(1e6 * (start - origin), 3), "dur": round(1e6 * seconds, 3)}
            events.append({"ph": "X", "name": name, **place, "args": shown})

    for row, (end, whole, data, computing, worker, reduce, apply) in enumerate(zip(*columns, strict=True)):
        began = end - whole
        shown = {name: float(values[row]) for name, values in numbers.items() if np.isfinite(values[row])}
        busy = min(worker, computing) or computing
        part(STEPS, f"step {int(records.columns['step'][row])}", began, whole, **shown)
        part(WORKERS, "waiting for data", began, min(data, busy))
        part(WORKERS, "forward and backward", began + min(data, busy), busy - min(data, busy))
        part(WORKERS, "messages", began + busy, computing - busy)
        part(SERVERS, "reduce", began + computing, reduce)
        part(SERVERS, "apply", began + computing + reduce, apply)
    return events


def write_trace(records: Records, path: Path, title: str) -> None:
    """Write such a file."""
    path.write_text(json.dumps({"traceEvents": trace_events(records, title), "displayTimeUnit": "ms"}))
