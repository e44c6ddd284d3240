"""The steps of a job as a trace in the format of chrome://tracing, which https://ui.perfetto.dev opens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from steepest.bottleneck import COLUMNS, step_parts
from steepest.records import Records

STEPS, WORKERS, SERVERS = 1, 2, 3
PARTS = {
    "data": (WORKERS, "waiting for data"),
    "compute": (WORKERS, "forward and backward"),
    "straggler": (WORKERS, "waiting for the slowest"),
    "network": (WORKERS, "messages"),
    "reduce": (SERVERS, "reduce"),
    "apply": (SERVERS, "apply"),
}
LANES = {STEPS: "steps", WORKERS: "workers", SERVERS: "servers"}


def trace_events(records: Records, title: str) -> list[dict[str, Any]]:
    """The events: each step, and in it what workers and servers did; times in microseconds from the first step on.

    A record says how long each part took and when the step was over, so that parts of one lane follow each other: where
    workers and servers work side by side, as they do on large models, the parts are longer than they look here.
    """
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": 1, "args": {"name": title}}]
    events += [{"ph": "M", "name": "thread_name", "pid": 1, "tid": t, "args": {"name": n}} for t, n in LANES.items()]
    times, wholes = records.column("time"), np.nan_to_num(records.column("step_seconds"))
    parts = step_parts({name: records.column(name) for name in COLUMNS})
    numbers = {name: v for name, v in records.columns.items() if name != "time" and name not in COLUMNS}
    origin = float(times[0] - wholes[0]) if len(records) else 0.0

    def add(lane: int, name: str, start: float, seconds: float, **shown: Any) -> float:
        """An event, unless it takes no time; when it ends."""
        if seconds > 0 or lane == STEPS:
            place = {"pid": 1, "tid": lane, "ts": round(1e6 * (start - origin), 3), "dur": round(1e6 * seconds, 3)}
            events.append({"ph": "X", "name": name, **place, "args": shown})
        return start + seconds

    for row, (end, whole) in enumerate(zip(times.tolist(), wholes.tolist(), strict=True)):
        shown = {name: float(values[row]) for name, values in numbers.items() if np.isfinite(values[row])}
        now = end - whole
        add(STEPS, f"step {int(records.columns['step'][row])}", now, whole, **shown)
        for name, (lane, text) in PARTS.items():
            now = add(lane, text, now, float(parts[name][row]))
    return events


def write_trace(records: Records, path: Path, title: str) -> None:
    """Write such a file."""
    path.write_text(json.dumps({"traceEvents": trace_events(records, title), "displayTimeUnit": "ms"}))
