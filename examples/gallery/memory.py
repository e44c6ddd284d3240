"""A plain recurrent network forgets; gated ones carry a number over a long time.

The gradient of an early input goes through one Jacobian for every step since, and shrinks with each (Bengio, Simard,
Frasconi 1994). An LSTM's cell and a GRU's state are added to rather than multiplied, and their gates learn when
(Hochreiter, Schmidhuber 1997; Cho et al. 2014).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from common import Runs
from torch import nn

import steepest

LENGTH, STEPS = 100, 500
CELLS = {"RNN": nn.RNN, "LSTM": nn.LSTM, "GRU": nn.GRU}


class Recall(nn.Module):
    """Says at the end of a sequence which of two marks it began with."""

    def __init__(self, cell: str) -> None:
        super().__init__()
        self.cell = CELLS[cell](2, 24, batch_first=True)
        if cell == "LSTM":  # a forget gate that begins open (Gers et al. 2000)
            nn.init.constant_(self.cell.bias_ih_l0[24:48], 2.0)
        if cell == "GRU":  # and an update gate that begins by keeping
            nn.init.constant_(self.cell.bias_ih_l0[24:48], 2.0)
        self.head = nn.Linear(24, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.cell(x)[0][:, -1])[:, 0]


def recall(cell: str = "LSTM") -> steepest.Task:
    """Sequences that begin with +1 or -1 and go on with noise in another channel."""
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(1024, LENGTH, 2)
    x[:, :, 1] = torch.randn(1024, LENGTH, generator=generator)
    marks = torch.randint(2, (1024,), generator=generator).float()
    x[:, 0, 0] = 2 * marks - 1
    return steepest.Task(model=Recall(cell), loss=nn.BCEWithLogitsLoss(), train_data=steepest.ArrayData(x, marks))


def draw(runs: Runs, pyplot: Any) -> str:
    """The loss of each kind of cell."""
    _, axis = pyplot.subplots(figsize=(6, 3.4))
    spec = {
        "steps": STEPS,
        "data": {"global_batch": 64, "micro_batch": 64},
        "optimizer": {"name": "adam", "lr": 0.005},
        "clip": {"norm": 1.0},
    }
    ends = {}
    for cell, records in zip(CELLS, runs.records(recall, [{"cell": cell} for cell in CELLS], **spec), strict=True):
        loss = np.convolve(records.columns["loss"], np.ones(10) / 10, "valid")
        ends[cell] = loss[-1]
        axis.plot(loss, label=cell)
    axis.axhline(np.log(2), color="grey", linestyle=":", label="a guess")
    axis.set(xlabel="step", ylabel="loss")
    axis.legend()
    return (
        f"After {STEPS} steps on sequences of {LENGTH}, where a guess costs 0.69, the loss is "
        + ", ".join(f"{loss:.2g} ({cell})" for cell, loss in ends.items())
        + "."
    )
