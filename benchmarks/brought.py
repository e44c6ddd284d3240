"""Code as people bring it: a job with the default settings against the loop that anybody would write.

`python -m benchmarks.brought [--rounds 5] [--tasks gpt2 bert resnet backbone] [--json FILE]`; needs transformers. Steps
of 64 samples, one thread a process, AdamW. A round runs the loop, one worker and two workers in turn, each in new
processes, for seconds; figures are medians over rounds. Processes of jobs have jemalloc, as a service gives it to them,
and the loop has the system's allocator. For `backbone`, the comparison is with the same job without the frozen layers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

import steepest
from harness.local_job import job_config, running
from services.cluster.allocator import allocator_environment
from steepest.spec import TaskReference
from worker.data.sources import source_of
from worker.gradients.losses import loss_of
from worker.task.load import load_task

BATCH, WARM_UP, SECONDS, ROWS = 64, 5, 2.0, 512
TASKS = {name: f"examples.from_scripts.{name}:task" for name in ("gpt2", "bert", "resnet")}
TASKS["backbone"] = "benchmarks.brought:backbone"


class Backbone(nn.Module):
    """Frozen layers that cost memory, not time, under some that learn."""

    def __init__(self, millions: int) -> None:
        super().__init__()
        self.body = nn.ModuleList([nn.Linear(1024, 1024) for _ in range(millions)]).requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x)


def backbone(millions: int = 25) -> steepest.Task:
    """A head on a frozen backbone."""
    x = torch.randn(ROWS, 64, generator=torch.Generator().manual_seed(0))
    data = steepest.ArrayData(x, x.sum(1, keepdim=True))
    return steepest.Task(model=Backbone(millions), loss=nn.MSELoss(), train_data=data)


def _loop(name: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    task = load_task(TaskReference(module=TASKS[name].partition(":")[0], function="task"), None, 0)
    assert isinstance(task, steepest.Task)
    task.model.train()
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=1e-3, fused=True)
    source, loss_in = source_of(task.train_data), loss_of(task)
    times = []
    ends = time.perf_counter() + 1e9
    step = 0
    while time.perf_counter() < ends:
        began = time.perf_counter()
        batch = source.batch((torch.randint(ROWS, (BATCH,))).numpy())
        optimizer.zero_grad()
        loss_in(batch, BATCH).value.backward()
        optimizer.step()
        step += 1
        if step == WARM_UP:
            ends = time.perf_counter() + SECONDS
        elif step > WARM_UP:
            times.append(time.perf_counter() - began)
    pipe.send(statistics.median(times))


def loop(name: str) -> float:
    """Seconds of a step of the plain loop."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_loop, args=(name, theirs))
    process.start()
    found = ours.recv()
    process.join()
    return float(found)


@contextlib.contextmanager
def _preloading() -> Iterator[None]:
    """Processes that are started meanwhile have the allocator that a service gives those of jobs."""
    before = dict(os.environ)
    os.environ.update(allocator_environment(os.environ))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def job(name: str, workers: int, **raw: Any) -> float:
    """Seconds of a step of a job."""
    with tempfile.TemporaryDirectory() as directory:
        config = job_config(
            Path(directory), TASKS[name], steps=1_000_000, optimizer={"lr": 1e-3},
            placement={"workers": workers}, **raw,
        )  # fmt: skip
        with _preloading(), running(config, workers) as started:
            while started.step < WARM_UP + 5:
                time.sleep(0.01)
            first, began = started.step, time.perf_counter()
            time.sleep(SECONDS)
            return (time.perf_counter() - began) / (started.step - first)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tasks", nargs="+", default=["gpt2", "bert", "resnet", "backbone"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(options.rounds):
        for name in options.tasks:
            row = found.setdefault(name, {})
            if name == "backbone":
                row.setdefault("without", []).append(job(name, 1, arguments={"millions": 0}))
                row.setdefault("with", []).append(job(name, 1))
                continue
            row.setdefault("loop", []).append(loop(name))
            row.setdefault("one worker", []).append(job(name, 1))
            row.setdefault("two workers", []).append(job(name, 2))
    for name, row in found.items():
        medians = {what: statistics.median(times) * 1000 for what, times in row.items()}
        base, *others = medians
        ratios = ", ".join(f"{what} {medians[what]:.1f} ms ({medians[what] / medians[base]:.2f})" for what in others)
        print(f"{name:9} {base} {medians[base]:.1f} ms, {ratios}")
    if options.json:
        options.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
