"""Samples a second of a data set that makes each sample wait, read by a job and by a torch DataLoader.

`python -m benchmarks.reading [--readers 8] [--rounds 5] [--json FILE]`. The job is a whole one with one worker; the
loader only collates. Medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import steepest
from harness.local_job import job_config, running

SAMPLES, SECONDS, BATCH = 4096, 0.001, 64


class Waiting(Dataset[Any]):
    """Each sample takes a millisecond, as from a disk or a network.

    Linux ends a sleep up to 50 us late, to save power, unless it is told not to: prctl(2), PR_SET_TIMERSLACK.
    """

    def __init__(self) -> None:
        self._reader = 0

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        if self._reader != os.getpid():
            self._reader = os.getpid()
            ctypes.CDLL(None).prctl(29, 1, 0, 0, 0)
        time.sleep(SECONDS)
        return torch.full((4,), index / SAMPLES), torch.ones(1)


def task() -> steepest.Task:
    """A linear model over it."""
    return steepest.Task(model=nn.Linear(4, 1), loss=nn.MSELoss(), train_data=Waiting())


def ours(readers: int) -> float:
    """Samples a second of a job, from its 20th step on."""
    steps = 20 + 4 * SAMPLES // BATCH
    with tempfile.TemporaryDirectory() as directory:
        config = job_config(
            Path(directory), "benchmarks.reading:task", steps=steps, data={"global_batch": BATCH, "readers": readers},
            optimizer={"name": "sgd", "lr": 0.01},
        )  # fmt: skip
        with running(config, 1) as job:
            while job.step < 20:
                time.sleep(0.005)
            first, began = job.step, time.perf_counter()
            while job.step < steps - 10:
                time.sleep(0.005)
            done, ended = job.step, time.perf_counter()
            job.finish()
    return (done - first) * BATCH / (ended - began)


def loader(readers: int) -> float:
    """Samples a second of a DataLoader, from its 20th batch on."""
    batches = iter(DataLoader(Waiting(), batch_size=BATCH, num_workers=readers, prefetch_factor=4))
    for _ in range(20):
        next(batches)
    began, count = time.perf_counter(), 0
    for _ in batches:
        count += 1
    return count * BATCH / (time.perf_counter() - began)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, list[float]] = {"job": [], "DataLoader": []}
    for _ in range(options.rounds):
        found["job"].append(ours(options.readers))
        found["DataLoader"].append(loader(options.readers))
    medians = {name: statistics.median(values) for name, values in found.items()}
    for name, value in medians.items():
        print(f"{name:12} {value:8.0f} samples/s")
    print(f"ratio        {medians['job'] / medians['DataLoader']:8.2f}")
    if options.json:
        options.json.write_text(json.dumps({"rates": found, "medians": medians}))


if __name__ == "__main__":
    main()
