"""What a step with Muon takes to one with AdamW: `python -m benchmarks.muon`.

A transformer of 25 million parameters trains with two workers and two servers, on micro-batches of 8 sequences of 256
tokens; embeddings and output layer are stepped by AdamW in both, as Muon's authors advise. Muon's own work grows with
the parameters, that of the passes with the tokens of a step, so their ratio is printed by tokens. Whole jobs take
turns; a figure is the median of a job's steps after the first, and a ratio the median of the rounds' ratios.
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
from benchmarks.tasks import CONTEXT
from steepest.client import Client
from steepest.embedded import running_service

WIDTH, LAYERS, MICRO_BATCH = 512, 5, 8
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"name": "adamw", "lr": 1e-3},
    "muon": {"name": "muon", "lr": 1e-3, "adamw": ["tokens*", "positions", "head*"]},
}


def median_step(client: Client, optimizer: str, sequences: int, steps: int) -> tuple[float, float]:
    """Seconds of a step of a whole job, and of what the servers do in it."""
    job = client.submit(
        f"{Path(__file__).parent / 'tasks.py'}:transformer",
        arguments={"width": WIDTH, "layers": LAYERS},
        steps=steps + 1,
        data={"global_batch": sequences, "micro_batch": MICRO_BATCH},
        optimizer=OPTIMIZERS[optimizer],
        clip={"norm": 1.0},
        placement={"workers": 2, "servers": 2},
        checkpoint_seconds=0,
    )
    info = job.wait()
    if info.state != "SUCCEEDED":
        raise RuntimeError(f"the job ended: {info.error}")
    records = list(job.history(1))
    return tuple(  # type: ignore[return-value]
        statistics.median(record[name] for record in records) for name in ("step_seconds", "apply_seconds")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="*", default=[16, 64], help="of a step [16 64]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="of a job, after its first [2]")
    parser.add_argument("--json", type=Path, default=RESULTS / "muon.json")
    options = parser.parse_args()
    print("| tokens a step | AdamW, s | Muon, s | ratio | rounds | Muon's update, s |\n|---|---|---|---|---|---|")
    rows = []
    with tempfile.TemporaryDirectory() as data, running_service(Path(data), grpc_port=0, http_port=0) as service:
        service.cluster.wait_ready()
        with Client(f"127.0.0.1:{service.grpc_port}") as client:
            for sequences in options.sequences:
                found: dict[str, list[tuple[float, float]]] = {name: [] for name in OPTIMIZERS}
                for number in range(options.rounds):
                    for name in list(OPTIMIZERS)[:: 1 if number % 2 else -1]:
                        found[name].append(median_step(client, name, sequences, options.steps))
                steps = {name: statistics.median(step for step, _ in own) for name, own in found.items()}
                ratios = [two / one for (one, _), (two, _) in zip(*found.values(), strict=True)]
                update = statistics.median(apply for _, apply in found["muon"])
                rows.append({"tokens": sequences * CONTEXT, **steps, "ratios": ratios, "update": update})
                print(
                    f"| {sequences * CONTEXT:,} | {steps['adamw']:.2f} | {steps['muon']:.2f} "
                    f"| {statistics.median(ratios):.3f} | {min(ratios):.3f} to {max(ratios):.3f} | {update:.2f} |",
                    flush=True,
                )
    write_report(options.json, results=rows)


if __name__ == "__main__":
    main()
