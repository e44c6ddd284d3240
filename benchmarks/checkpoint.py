"""How long a job stands still for a checkpoint: one that is waited for, and one that is written while it goes on.

`python -m benchmarks.checkpoint [--size "25 M"] [--rounds 5]`. A perceptron with AdamW trains with one worker through
the service; each round is a job of each kind, in turns. The stall is the time from one step's end to the next one's
around a checkpoint, less the median step of that job.
"""

from __future__ import annotations

import os

os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

import argparse
import statistics
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS, write_report
from benchmarks.tasks import SIZES, Size
from steepest.client import Client
from steepest.embedded import running_service

STEPS = 30
SIDES: dict[str, dict[str, Any]] = {
    "waited for": {"checkpoint_every": 10, "checkpoint_seconds": 0},
    "written behind": {"checkpoint_every": 0},
}


def stalls(client: Client, size: Size, **when: Any) -> tuple[list[float], float]:
    """(stalls of one job's checkpoints but the last, its median step), in seconds."""
    job = client.submit(
        f"{Path(__file__).with_name('tasks.py')}:mlp",
        arguments={"width": size.width, "layers": size.layers},
        steps=STEPS,
        data={"global_batch": 16},
        **when,
    )
    job.wait()
    times = [record["time"] for record in job.history()]
    gaps = {step: after - before for step, (before, after) in enumerate(pairwise(times), 1)}
    step = statistics.median(gaps.values())
    saved = [checkpoint.step for checkpoint in job.checkpoints() if checkpoint.step in gaps]
    job.delete()
    return [gaps[step_] - step for step_ in saved], step


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="25 M", choices=[size.name for size in SIZES])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=RESULTS / "checkpoint.json")
    options = parser.parse_args()
    [size] = [size for size in SIZES if size.name == options.size]
    found: dict[str, list[float]] = {side: [] for side in SIDES}
    steps: list[float] = []
    with tempfile.TemporaryDirectory() as data, running_service(Path(data), grpc_port=0, http_port=0) as service:
        service.cluster.wait_ready()
        with Client(f"127.0.0.1:{service.grpc_port}") as client:
            _, step = stalls(client, size, checkpoint_seconds=0)
            SIDES["written behind"]["checkpoint_seconds"] = max(1.0, 9 * step)
            for _ in range(options.rounds):
                for side, when in SIDES.items():
                    own, step = stalls(client, size, **when)
                    found[side] += own
                    steps.append(step)
    step = statistics.median(steps)
    print(f"| {size.name}, median step {step * 1e3:.0f} ms | stall, ms | to a step |")
    print("|---|---|---|")
    for side, own in found.items():
        print(f"| {side} ({len(own)}) | {statistics.median(own) * 1e3:.0f} | {statistics.median(own) / step:.2f} |")
    write_report(options.json, size=size.name, step=step, stalls=found)


if __name__ == "__main__":
    main()
