"""Activations that are computed again cost time instead of memory, which then grows as the square root of the depth.

Backpropagation needs what every layer returned. Kept, that is as much as the network is deep. Of n layers in √n
segments it is enough to keep what lies between the segments, and to compute each segment again when the gradient
arrives there: one more forward pass, for √n times less memory (Chen et al. 2016).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from common import Runs, classifier
from torch import nn

import steepest

DEPTHS = (16, 32, 64, 128, 256)
WAYS = {"all kept": "", "√n segments": "sqrt"}


def network(depth: int = 16) -> steepest.Task:
    """A perceptron with so many hidden layers."""
    layers = [nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(depth)]
    return classifier(nn.Sequential(*layers, nn.Linear(64, 10)))


def draw(runs: Runs, pyplot: Any) -> str:
    """The peak memory of a micro-batch's pass, by depth."""
    _, axis = pyplot.subplots(figsize=(6, 3.4))
    found = {}
    for label, how in WAYS.items():
        peaks = [_peak(depth, how) for depth in DEPTHS]
        axis.loglog(DEPTHS, peaks, marker="o", label=label)
        found[how] = np.polyfit(np.log(DEPTHS[1:]), np.log(peaks[1:]), 1)[0], peaks[-1]
    axis.minorticks_off()
    megabytes = (3, 10, 30, 100)
    axis.set(xlabel="layers", xticks=DEPTHS, xticklabels=DEPTHS)
    axis.set(ylabel="peak memory of a pass, MB", yticks=megabytes, yticklabels=megabytes)
    axis.legend()
    times = found[""][1] / found["sqrt"][1]
    return (
        f"Kept, the memory grows as n^{found[''][0]:.2f}, with `memory.checkpoint_activations=sqrt` as "
        f"n^{found['sqrt'][0]:.2f}; at {DEPTHS[-1]} layers it is {times:.1f} times smaller."
    )


def _peak(depth: int, how: str) -> float:
    """MB, as they are measured at submission."""
    command = [str(Path(sys.executable).with_name("steepest")), "check", f"{Path(__file__)}:network", "--json"]
    command += ["--arg", f"depth={depth}", "--global-batch", "1024", "--micro-batch", "1024"]
    if how:
        command += ["--set", f"memory.checkpoint_activations={how}"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(ran.stdout)["micro_batch_bytes"]) / 1e6
