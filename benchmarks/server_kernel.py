"""What a server does in a step against memory bandwidth, measured by a triad on the same threads.

`python -m benchmarks.server_kernel`. A step: add two gradients, measure every segment of the sum, clip by the global
norm and apply AdamW, all in float32. It must move 40 bytes a parameter: two gradients read and their sum written, then
sum, parameters and both moments read, and three of them written. The triad `c = a + 3 b` moves 12. They take turns.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.report import RESULTS, write_report
from ps.numerics.clip import clip_coefficient
from ps.numerics.optimizer import ShardOptimizer
from ps.numerics.reduce_cpu import Reducer
from ps.numerics.threads import Threads, split
from ps.numerics.tree import Node
from ps.parameters.description import ModelDescription, TensorDescription
from ps.parameters.layout import Shard, build_layout, shards
from steepest.optimizer_spec import optimizer_spec

STEP_BYTES, TRIAD_BYTES = 40, 12
LAYERS = 24


def shard_of(numel: int) -> Shard:
    """A shard with `LAYERS` square weights and their biases, of about `numel` parameters."""
    width = math.isqrt(numel // LAYERS)
    parameters = [
        TensorDescription(f"{layer}.{name}", shape, "float32")
        for layer in range(LAYERS)
        for name, shape in (("weight", (width, width)), ("bias", (width,)))
    ]
    (whole,) = shards(build_layout(ModelDescription(tuple(parameters), (), ())), 1)
    return whole


def step_of(shard: Shard, num_threads: int) -> Callable[[], None]:
    """One step of a server."""
    ranges = split(shard, num_threads)
    threads = Threads(len(ranges))
    reducer = Reducer(shard, threads, ranges)
    optimizer = ShardOptimizer(optimizer_spec(name="adamw"), shard, torch.randn(shard.numel))
    optimizer.use_threads(threads, ranges, num_threads)
    left, right = Node(0, 1), Node(1, 2)
    gradients = {node: torch.randn(shard.numel) for node in (left, right)}

    def step() -> None:
        sums = reducer([(left, right)], left, gradients)
        coefficient = clip_coefficient(math.sqrt(math.fsum(sums)) / 2.0, 1.0)
        optimizer.step(gradients[left], lr=1e-4, divisor=2.0, coefficient=coefficient, max_value=None)

    return step


def triad_of(shard: Shard, num_threads: int) -> Callable[[], None]:
    """One triad."""
    ranges = split(shard, num_threads)
    threads = Threads(len(ranges))
    a, b, c = (torch.randn(shard.numel) for _ in range(3))
    calls = [partial(torch.add, a[i:j], b[i:j], alpha=3.0, out=c[i:j]) for i, j in ranges]
    return lambda: threads.run(calls)  # type: ignore[arg-type]


def seconds_of(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=float, nargs="*", default=[1e6, 25e6, 100e6], help="parameters [1e6 25e6 1e8]")
    parser.add_argument("--threads", type=int, nargs="*", default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--rounds", type=int, default=9, help="of each side [9]")
    parser.add_argument("--json", type=Path, default=RESULTS / "server_kernel.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| parameters | threads | step, ms | GB/s | triad, GB/s | of the triad's |")
    print("|---|---|---|---|---|---|")
    results = []
    for numel in map(int, options.numel):
        shard = shard_of(numel)
        for num_threads in options.threads:
            step, triad = step_of(shard, num_threads), triad_of(shard, num_threads)
            for _ in range(2):
                step()
                triad()
            pairs = [(seconds_of(step), seconds_of(triad)) for _ in range(options.rounds)]
            ours = statistics.median(STEP_BYTES * shard.numel / s / 1e9 for s, _ in pairs)
            theirs = statistics.median(TRIAD_BYTES * shard.numel / t / 1e9 for _, t in pairs)
            ratio = statistics.median(STEP_BYTES / s / (TRIAD_BYTES / t) for s, t in pairs)
            seconds = statistics.median(s for s, _ in pairs)
            results.append({"numel": shard.numel, "threads": num_threads, "seconds": seconds, "ratio": ratio})
            row = (
                f"{shard.numel:11,} | {num_threads} | {seconds * 1e3:8.2f} | {ours:5.1f} | {theirs:5.1f} | {ratio:.2f}"
            )
            print(f"| {row} |", flush=True)
    write_report(options.json, results=results)


if __name__ == "__main__":
    main()
