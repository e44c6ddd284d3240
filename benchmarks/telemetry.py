"""What the telemetry of a step costs: a job that keeps every step with all its norms against one that keeps few.

`python -m benchmarks.telemetry`. A perceptron of 200 layers and about a million parameters trains with two workers
through the service. On: the record of every step, with the gradient norm of every parameter, goes to the history. Off:
that of one step in 50, without these norms. Both run in turns; a figure is the mean step of a round, a ratio the
median over the rounds.
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

SIZE = Size("1 M", 70, 200, 0)
ON: dict[str, Any] = {"every": 1, "parameter_norms": True}
OFF: dict[str, Any] = {"every": 50, "parameter_norms": False}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11, help="rounds of each side [11]")
    parser.add_argument("--seconds", type=float, default=5.0, help="of a round [5]")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, default=RESULTS / "telemetry.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as data, running_service(Path(data), grpc_port=0, http_port=0) as service:
        service.cluster.wait_ready()
        with Client(f"127.0.0.1:{service.grpc_port}") as client:
            jobs = []
            for telemetry in (ON, OFF):
                jobs.append(Ours(client, SIZE, 16, options.workers, 1, telemetry))
                jobs[-1].pause()
            pairs = []
            for number in range(options.rounds):
                turns = jobs if number % 2 else jobs[::-1]
                means = {id(job): job.mean_step(options.seconds, 3 * OFF["every"]) for job in turns}
                pairs.append((means[id(jobs[0])], means[id(jobs[1])]))
            for job in jobs:
                job.close()
    ratios = [on / off for on, off in pairs]
    on, off = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(ratios)
    print("| telemetry on, ms | off, ms | ratio | spread of rounds |")
    print("|---|---|---|---|")
    print(f"| {on * 1e3:.2f} | {off * 1e3:.2f} | {ratio:.3f} | {min(ratios):.3f} to {max(ratios):.3f} |")
    write_report(options.json, on=on, off=off, ratio=ratio, ratios=ratios)


if __name__ == "__main__":
    main()
