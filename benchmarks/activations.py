"""Memory and time of activation checkpointing: `python -m benchmarks.activations`.

A residual net of n layers, one step of it as a worker computes it, with all activations kept and with
memory.checkpoint_activations = sqrt: a perceptron's layers, or convolutions with batch norm in blocks of two. Each
measurement is a process of its own, and the two ways take turns. Memory is how far the process's peak goes beyond what
it had before the step, gradients not counted; how it grows with depth is told by the tensors alone, byte for byte.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import statistics
import time
from collections.abc import Sequence
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import steepest
from benchmarks.report import RESULTS, write_report
from ps.parameters.layout import build_layout
from services.cluster.allocator import allocator_environment
from worker.gradients.backend import CpuBackend
from worker.gradients.peak_memory import PeakMemory
from worker.gradients.recompute import checkpoint_activations
from worker.gradients.torch_engine import TorchEngine
from worker.process.loop import keep_freed_memory, return_freed_memory
from worker.task.model import describe_model

WIDTH, BATCH = 64, 2048
CHANNELS, SIDE, IMAGES = 32, 16, 32


class Residual(nn.Module):
    """A layer of a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs + torch.tanh(self.line(inputs))


class Block(nn.Module):
    """Two convolutions beside a shortcut, in the order of He et al. 2016 ("Identity mappings")."""

    def __init__(self) -> None:
        super().__init__()
        parts = [
            (nn.BatchNorm2d(CHANNELS), nn.ReLU(), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False))
            for _ in range(2)
        ]
        self.body = nn.Sequential(*parts[0], *parts[1])

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs + self.body(inputs)


def network(kind: str, layers: int) -> tuple[nn.Module, torch.Tensor]:
    """(model, a micro-batch of inputs)."""
    if kind == "perceptron":
        return nn.Sequential(*(Residual() for _ in range(layers))), torch.randn(BATCH, WIDTH)
    return nn.Sequential(*(Block() for _ in range(layers // 2))), torch.randn(IMAGES, CHANNELS, SIDE, SIDE)


def _status(name: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


class Measured(NamedTuple):
    """Of a step. peak: of the process, in bytes. tensors: those of the pass at their peak, in bytes."""

    peak: int
    tensors: int
    seconds: float


def measure(kind: str, layers: int, how: str) -> Measured:
    """Of three steps: the largest peak, and the median of the seconds."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    import_module("torch._dynamo")  # as torch's checkpointing does on its first call
    model, inputs = network(kind, layers)
    task = steepest.Task(model=model, loss=nn.MSELoss(), train_data=steepest.ArrayData(inputs, inputs))
    description = describe_model(task)
    layout = build_layout(description)
    engine = TorchEngine(task, description, layout, CpuBackend())
    if how:
        checkpoint_activations(model, how)
    flat, gradient = torch.ones(2, layout.numel)  # not zeros, whose pages would come with the first step
    engine.write_initial(flat)
    engine.bind(flat)
    seconds = []
    (return_freed_memory if how else keep_freed_memory)()
    before, peak = _status("VmRSS"), 0
    for _ in range(3):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        began = time.perf_counter()
        engine.gradient((inputs, inputs), len(inputs), layout.views(gradient), add=False)
        seconds.append(time.perf_counter() - began)
        peak = max(peak, _status("VmHWM") - before)
    with PeakMemory() as memory:
        engine.gradient((inputs, inputs), len(inputs), layout.views(gradient), add=False)
    return Measured(peak, memory.peak, statistics.median(seconds))


def power(layers: Sequence[int], nbytes: Sequence[float]) -> float:
    """p of nbytes = a + b * layers^p, where a is what a pass takes at any depth.

    By the first, the middle and the last of depths that grow by one factor.
    """
    first, middle, last = (nbytes[i] for i in (0, len(nbytes) // 2, -1))
    return math.log((last - middle) / (middle - first)) / math.log(layers[len(layers) // 2] / layers[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=["perceptron", "convolutions"], default="perceptron")
    parser.add_argument(
        "--layers", type=int, nargs="*", default=[32, 128, 512], help="depths that grow by one factor [32 128 512]"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=RESULTS / "activations.json")
    options = parser.parse_args()
    print("| layers | kept, MB | sqrt, MB | times smaller | tensors kept, MB | sqrt, MB | time, sqrt / kept | spread |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    os.environ.update(allocator_environment(os.environ))  # of the processes that measure, as workers have it
    for layers in options.layers:
        found: dict[str, list[Measured]] = {"": [], "sqrt": []}
        for _ in range(options.rounds):
            for how, own in found.items():
                with get_context("spawn").Pool(1) as pool:
                    own.append(pool.apply(measure, (options.kind, layers, how)))
        kept, again = (statistics.median(step.peak for step in own) for own in found.values())
        tensors = [statistics.median(step.tensors for step in own) for own in found.values()]
        ratios = [two.seconds / one.seconds for one, two in zip(*found.values(), strict=True)]
        row = {"layers": layers, "kept": kept, "sqrt": again, "kept_tensors": tensors[0], "sqrt_tensors": tensors[1]}
        rows.append({**row, "time": statistics.median(ratios)})
        print(
            f"| {layers} | {kept / 1e6:.1f} | {again / 1e6:.1f} | {kept / again:.1f} | {tensors[0] / 1e6:.2f} "
            f"| {tensors[1] / 1e6:.2f} | {statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} |",
            flush=True,
        )
    depths = [row["layers"] for row in rows]
    powers = {how: power(depths, [row[f"{how}_tensors"] for row in rows]) for how in ("kept", "sqrt")}
    print(f"what depends on n of the tensors grows as n^{powers['kept']:.2f} kept, n^{powers['sqrt']:.2f} with sqrt")
    write_report(options.json, kind=options.kind, results=rows, powers=powers)


if __name__ == "__main__":
    main()
