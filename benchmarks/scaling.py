"""What a step costs as a job grows: workers 1 to 16, servers 1 to 8, parameters 10 thousand to 300 million.

`python -m benchmarks.scaling`. The jobs of a row stay alive and take turns, a round each, through one service; a figure
is the median over the rounds of each round's median step. Workers share one global batch, so that more of them than
there are cores show what a worker costs, and not what it computes. A batch is 16 micro-batches, or one where
parameters grow.
"""

from __future__ import annotations

import os

os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import RESULTS, write_report
from benchmarks.step_time import Ours
from benchmarks.tasks import SIZES, Size
from steepest.client import Client
from steepest.embedded import running_service

GLOBAL_BATCH = 64
NUM_CPUS = 40  # of Ray's counting: workers take turns on what there is
LARGEST = Size("300 M", 6900, 7, 3)
BY_NAME = {size.name: size for size in (*SIZES, LARGEST)}


@dataclass(frozen=True)
class Point:
    """A job to measure. value: what varies in its row."""

    value: int
    size: Size
    workers: int
    servers: int
    micro_batches: int = 16


def points() -> dict[str, list[Point]]:
    """All of them, by row."""
    small, middle = BY_NAME["1 M"], BY_NAME["25 M"]
    sizes = {10_000: "10 k", 1_000_000: "1 M", 25_000_000: "25 M", 100_000_000: "100 M", 300_000_000: "300 M"}
    return {
        "workers": [Point(n, small, n, 1) for n in (1, 2, 4, 8, 16)],
        "servers": [Point(n, middle, 2, n) for n in (1, 2, 4, 8)],
        "parameters": [Point(n, BY_NAME[name], 1, 1, 1) for n, name in sizes.items()],
    }


def measure(client: Client, row: Sequence[Point], rounds: int, seconds: float) -> list[tuple[float, ...]]:
    """For each point, the median step of every round, in seconds."""
    jobs: list[Ours] = []
    try:
        for point in row:
            batch, count = GLOBAL_BATCH // point.micro_batches, point.micro_batches
            jobs.append(Ours(client, point.size, batch, count, point.servers, workers_started=point.workers))
            jobs[-1].pause()
        times = [[statistics.median(job.round(seconds, 3)) for job in jobs] for _ in range(rounds)]
        return list(zip(*times, strict=True))
    finally:
        for job in jobs:
            job.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=list(points()), choices=list(points()))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a round [2]")
    parser.add_argument("--json", type=Path, default=RESULTS / "scaling.json")
    options = parser.parse_args()
    results = []
    with (
        tempfile.TemporaryDirectory() as data,
        running_service(Path(data), grpc_port=0, http_port=0, num_cpus=NUM_CPUS) as service,
        Client(f"127.0.0.1:{service.grpc_port}") as client,
    ):
        service.cluster.wait_ready()
        for name in options.rows:
            row = points()[name]
            print(f"| {name} | model | workers | servers | step, ms | against the first |\n|---|---|---|---|---|---|")
            found = measure(client, row, options.rounds, options.seconds)
            for point, times in zip(row, found, strict=True):
                ratio = statistics.median(own / first for own, first in zip(times, found[0], strict=True))
                middle = statistics.median(times)
                place = f"{point.size.name} | {point.workers} | {point.servers}"
                print(f"| {point.value} | {place} | {middle * 1e3:.2f} | {ratio:.2f} |", flush=True)
                results.append({"row": name, "value": point.value, "seconds": list(times), "ratio": ratio})
    write_report(options.json, results=results)


if __name__ == "__main__":
    main()
