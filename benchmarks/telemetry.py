"""What the telemetry of a step costs: a job that keeps every step with all its norms against one that keeps few.

`python -m benchmarks.telemetry`. A perceptron of 500 layers, a thousand tensors and about a million parameters trains
with two workers through the service. Off: the record of one step in 50 goes to the history, without norms of
parameters. Norms: that of every step, with the gradient norm of every parameter. Default: as a job
has it that says nothing, with the seven other signals of every parameter in one step of twenty, and histograms in one
of a hundred. All: with the signals in every step. Curvature, only with --sides: the default, and the curvature in one
step of 1,000, for which every round has so many steps. They run in turns; a figure is the mean step of a round between
multiples of 50 steps, which all sides keep, so that none has the moments of going on and of pausing in it; a ratio is
the median over the rounds. Beside the clock stands the processor time of all processes, the service's too, by step.
"""

from __future__ import annotations

import os

os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS, write_report
from benchmarks.step_time import Ours
from benchmarks.tasks import Size
from steepest.client import Client
from steepest.embedded import running_service

SIZE = Size("1 M", 44, 500, 0)
SIDES: dict[str, dict[str, Any]] = {
    "off": {"every": 50, "parameter_norms": False},
    "norms": {"every": 1, "signals_every": 0},
    "default": {},
    "all": {"every": 1, "signals_every": 1},
    "curvature": {"curvature_every": 1000},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11, help="rounds of each side [11]")
    parser.add_argument("--seconds", type=float, default=5.0, help="of a round [5]")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--sides", nargs="+", choices=SIDES, default=list(SIDES)[:-1], help="all but curvature by default"
    )
    parser.add_argument("--json", type=Path, default=RESULTS / "telemetry.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as data, running_service(Path(data), grpc_port=0, http_port=0) as service:
        service.cluster.wait_ready()
        with Client(f"127.0.0.1:{service.grpc_port}") as client:
            jobs = {}
            for side in options.sides:
                jobs[side] = Ours(client, SIZE, 16, options.workers, 1, SIDES[side])
                jobs[side].pause()
            least_steps = (
                SIDES["curvature"]["curvature_every"] if "curvature" in options.sides else 3 * SIDES["off"]["every"]
            )
            means: dict[str, list[float]] = {side: [] for side in options.sides}
            busy: dict[str, list[float]] = {side: [] for side in options.sides}
            for number in range(options.rounds):
                for side in options.sides[:: 1 if number % 2 else -1]:
                    means[side].append(jobs[side].mean_step(options.seconds, least_steps, SIDES["off"]["every"]))
                    busy[side].append(jobs[side].processor_step)
            for job in jobs.values():
                job.close()
    print("| telemetry | step, ms | to off | spread of rounds | processor time, ms | to off |")
    print("|---|---|---|---|---|---|")
    report = {}
    for side, own in means.items():
        ratios = [on / off for on, off in zip(own, means["off"], strict=True)]
        processor = statistics.median(busy[side])
        report[side] = {
            "step": statistics.median(own),
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "processor": processor,
            "processor_ratio": statistics.median(on / off for on, off in zip(busy[side], busy["off"], strict=True)),
        }
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        print(
            f"| {side} | {report[side]['step'] * 1e3:.2f} | {report[side]['ratio']:.3f} | {spread} "
            f"| {processor * 1e3:.2f} | {report[side]['processor_ratio']:.3f} |"
        )
    write_report(options.json, **report)


if __name__ == "__main__":
    main()
