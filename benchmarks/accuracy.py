"""What compression costs in accuracy: the digits and the character model, trained with and without it.

`python -m benchmarks.accuracy`. Whole jobs of two workers, over several seeds; the accuracy is that of the model in the
last checkpoint on the test data, in per cent: of digits, or of next characters.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.report import RESULTS, write_report

HERE = Path(__file__).parent

from examples import charlm, digits  # the repository is not a package that can be installed
from harness.local_job import job_config, run_processes

MAX_SECONDS = 1800.0
PARTS = 2  # one for each worker
COMPRESSIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "powersgd 32": {"name": "powersgd", "rank": 32, "parts": PARTS},
    "powersgd 16": {"name": "powersgd", "rank": 16, "parts": PARTS},
    "topk 1 %": {"name": "topk", "ratio": 0.01, "parts": PARTS},
    "twobit": {"name": "twobit", "parts": PARTS},
}


def _of_digits(model: nn.Module) -> float:
    inputs, targets = digits.data()[1].arrays
    return float(digits.accuracy(model(inputs), targets))


def _of_characters(model: nn.Module) -> float:
    (tokens,) = charlm.data()[1].arrays
    targets = tokens[:, 1:]
    counts = targets != charlm.PADDING
    return float((model(tokens[:, :-1]).argmax(-1) == targets)[counts].float().mean())


@dataclass(frozen=True)
class Job:
    """task, steps, lr: of the job. accuracy: of its model on the test data."""

    task: str
    steps: int
    lr: float
    make: Callable[[], Any]
    accuracy: Callable[[nn.Module], float]


JOBS = {
    "digits mlp": Job("examples.digits:mlp", 600, 0.003, digits.mlp, _of_digits),
    "digits convnet": Job("examples.digits:convnet", 300, 0.003, digits.convnet, _of_digits),
    "charlm transformer": Job("examples.charlm:transformer", 1000, 0.003, charlm.transformer, _of_characters),
}


def train(job: Job, compression: dict[str, Any], seed: int) -> float:
    """The accuracy after one job, in per cent."""
    with tempfile.TemporaryDirectory() as directory:
        config = job_config(
            Path(directory),
            job.task,
            steps=job.steps,
            seed=seed,
            optimizer={"lr": job.lr},
            clip={"norm": 1.0},
            compression=compression,
        )
        state = run_processes(config, 2, MAX_SECONDS)
    model = job.make().model
    model.load_state_dict(state.model)
    model.eval()
    with torch.inference_mode():
        return 100 * job.accuracy(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(COMPRESSIONS), choices=list(COMPRESSIONS))
    parser.add_argument("--jobs", nargs="*", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--json", type=Path, default=RESULTS / "accuracy.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| job | compression | accuracy of each seed, % | mean | against none, points |\n|---|---|---|---|---|")
    results = []
    for name in options.jobs:
        baseline = None
        for compression in options.only:
            found = [train(JOBS[name], COMPRESSIONS[compression], seed) for seed in range(options.seeds)]
            mean = statistics.mean(found)
            baseline = mean if baseline is None else baseline
            shown = ", ".join(f"{value:.2f}" for value in found)
            print(f"| {name} | {compression} | {shown} | {mean:.2f} | {mean - baseline:+.2f} |", flush=True)
            results.append({"job": name, "compression": compression, "accuracies": found})
    write_report(options.json, results=results)


if __name__ == "__main__":
    main()
