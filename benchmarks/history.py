"""How long the history of a long job takes to write and to query.

`python -m benchmarks.history [--steps 1000000] [--parameters 100] [--rounds 5] [--json FILE]`. Writes a job's records
in reports of 250, then reads three series in 2,000 points, the newest record, and the layers of the last 100,000 steps
in 300 columns. Medians of the rounds; the files are in the page cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ps.step.messages import StepRecord
from services.store.history import JobHistory
from services.store.series import bucket_starts, downsample, largest

REPORT = 250
NUMBERS = (0.1, 64.0, 64, 2.0, 1.0, 0.5, True, False, 2, 0.01, 0.008, 0.001, 0.001)
SERIES = ("loss", "gradient_norm", "step_seconds")


def _write(history: JobHistory, steps: int, parameters: int) -> float:
    norms = np.linspace(0.1, 1.0, parameters).astype("<f8").tobytes()
    began = time.perf_counter()
    for first in range(0, steps, REPORT):
        records = [
            StepRecord(
                s,
                s * 0.01,
                1.0 / (1 + s),
                0.1,
                64.0,
                64,
                2.0,
                1.0,
                0.5,
                True,
                False,
                2,
                0.01,
                0.008,
                0.001,
                0.001,
                norms,
            )
            for s in range(first, min(first + REPORT, steps))
        ]
        history.append(1, records)
    return time.perf_counter() - began


def _seconds(work: Callable[[], Any], rounds: int) -> float:
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--parameters", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        history = JobHistory(Path(directory))
        written = _write(history, options.steps, options.parameters)
        values = options.steps * (len(StepRecord._fields) - 2 + options.parameters)

        def layers() -> None:
            _, norms = history.norms(max(0, options.steps - 100_000))
            largest(norms, bucket_starts(len(norms), 300))

        result = {
            "values_written_per_second": values / written,
            "query_ms": 1e3 * _seconds(lambda: downsample(history.columns(SERIES), 2000), options.rounds),
            "last_record_ms": 1e3 * _seconds(history.last, options.rounds),
            "layers_ms": 1e3 * _seconds(layers, options.rounds),
            "bytes": sum(file.stat().st_size for file in Path(directory).rglob("*") if file.is_file()),
        }
    for name, value in result.items():
        print(f"{name:26} {value:,.1f}")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
