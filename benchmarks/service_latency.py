"""How long a person waits: from a submission to its first step, from a request to pause until the job is paused.

`python -m benchmarks.service_latency [--rounds 7] [--json FILE]`, on a service of its own that has run one job before.
A submission includes the upload of the code and the rehearsal; the first step is seen by a watch. A pause is compared
with the job's own step time.
"""

from __future__ import annotations

import os

os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import steepest
from benchmarks.report import RESULTS, write_report
from steepest.client import Job
from steepest.jobs import Progress

TASK = "benchmarks/tasks.py:mlp"
SPEC: dict[str, Any] = {"epochs": 1000, "arguments": {"width": 64, "layers": 3}, "data": {"global_batch": 64}}


def _first_step(job: Job) -> float:
    """When it was seen to have ended."""
    for update in job.watch():
        if isinstance(update, Progress):
            return time.perf_counter()
    raise SystemExit(f"{job.name} made no step")


def _until(job: Job, state: str) -> float:
    """When a watch told of a state."""
    for update in job.watch():
        if getattr(update, "state", "") == state:
            return time.perf_counter()
    raise SystemExit(f"{job.name} never was {state}")


def measure(client: steepest.Client, rounds: int) -> dict[str, Any]:
    """Seconds of each round: created, first step, paused beyond a step, running again, cancelled."""
    found: dict[str, list[float]] = {name: [] for name in ("create", "first_step", "pause", "step", "resume", "cancel")}
    for number in range(rounds + 1):
        began = time.perf_counter()
        job = client.submit(TASK, **SPEC)
        created = time.perf_counter()
        first = _first_step(job)
        time.sleep(1.0)
        asked = time.perf_counter()
        job.pause()
        paused = _until(job, "PAUSED")
        step = statistics.median(r["step_seconds"] for r in job.history())
        resumed = time.perf_counter()
        job.resume()
        step_before = job.get().step
        while job.get().step <= step_before:
            time.sleep(0.005)
        running = time.perf_counter()
        job.cancel()
        cancelled = _until(job, "CANCELLED")
        if number:  # the first one warms the service up
            for name, value in (
                ("create", created - began), ("first_step", first - began), ("pause", paused - asked), ("step", step),
                ("resume", running - resumed), ("cancel", cancelled - running),
            ):  # fmt: skip
                found[name].append(value)
    return {name: [round(value, 4) for value in values] for name, values in found.items()}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, default=RESULTS / "service_latency.json")
    options = parser.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from steepest.embedded import running_service

    with (
        tempfile.TemporaryDirectory() as directory,
        running_service(Path(directory), grpc_port=0, http_port=0) as service,
        steepest.Client(f"127.0.0.1:{service.grpc_port}") as client,
    ):
        service.cluster.wait_ready()
        seconds = measure(client, options.rounds)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in medians.items():
        print(f"{name:12} {value:.3f} s  ({min(seconds[name]):.3f} to {max(seconds[name]):.3f})")
    write_report(options.json, rounds=options.rounds, seconds=seconds, medians=medians)


if __name__ == "__main__":
    main()
