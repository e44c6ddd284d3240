"""A recurrent network stands before cliffs; a clipped gradient does not fall down them.

Where the recurrent matrix stretches, the gradient grows with every step of the sequence, and one step of SGD throws the
weights far away. Scaling a gradient down to a largest norm keeps its direction (Pascanu, Mikolov, Bengio 2013); cutting
each element keeps only its sign where it counts most, and turns it.
"""

from __future__ import annotations

from typing import Any

import torch
from common import Runs
from torch import nn

import steepest

LENGTH, STEPS = 40, 200
CLIPS: dict[str, dict[str, Any]] = {"no clip": {}, "norm ≤ 1": {"norm": 1.0}, "values ≤ 0.05": {"value": 0.05}}


class Adder(nn.Module):
    """Adds up a sequence with linear rectifiers whose recurrent matrix begins a little above the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.RNN(1, 32, nonlinearity="relu", batch_first=True)
        with torch.no_grad():
            self.cell.weight_hh_l0.copy_(1.03 * torch.eye(32))
        self.head = nn.Linear(32, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.cell(x)[0][:, -1])[:, 0]


def mean() -> steepest.Task:
    """The mean of sequences of numbers between 0 and 1, told one by one."""
    x = torch.rand(1024, LENGTH, 1, generator=torch.Generator().manual_seed(0))
    return steepest.Task(model=Adder(), loss=nn.MSELoss(), train_data=steepest.ArrayData(x, x.mean((1, 2))))


def draw(runs: Runs, pyplot: Any) -> str:
    """Loss and gradient norm with each clip."""
    _, axes = pyplot.subplots(1, 2, figsize=(9, 3.4))
    said = []
    specs = [
        {
            "steps": STEPS,
            "data": {"global_batch": 32, "micro_batch": 32},
            "optimizer": {"name": "sgd", "lr": 0.01},
            "clip": clip,
        }
        for clip in CLIPS.values()
    ]
    for label, (info, records) in zip(CLIPS, runs.all(mean, [({}, spec) for spec in specs]), strict=True):
        axes[0].semilogy(records.columns["loss"], label=label)
        axes[1].semilogy(records.columns["gradient_norm"], label=label)
        end = f"ends at a loss of {records.columns['loss'][-20:].mean():.2g}"
        if info.state != "SUCCEEDED":
            end = f"fails at step {info.step}, for a loss that is no number"
        rules = sorted({finding.rule for finding in info.findings})
        said.append(f"{label}: it {end}, and the health rules say {', '.join(rules) or 'nothing'}")
    axes[0].set(xlabel="step", ylabel="loss")
    axes[1].set(xlabel="step", ylabel="‖gradient‖ before the clip")
    axes[0].legend()
    return "; ".join(said) + "."
