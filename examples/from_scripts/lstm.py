"""An LSTM whose state is carried from batch to batch (truncated backpropagation through time).

`main` is the script, `task` the job. The state is a buffer, which travels with the work; a step is one micro-batch, for
the next step goes on where it ended: `steepest train examples/from_scripts/lstm.py:task --steps 100 --global-batch 16
--micro-batch 16 --set data.shuffle=false`
"""

from __future__ import annotations

import torch
from torch import nn

import steepest

STREAMS, LENGTH, PIECES, WIDTH = 16, 20, 25, 32


class Carrying(nn.Module):
    """Predicts the next value of each of `STREAMS` series."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(1, WIDTH, batch_first=True), nn.Linear(WIDTH, 1)
        self.register_buffer("hidden", torch.zeros(1, STREAMS, WIDTH))
        self.register_buffer("cell", torch.zeros(1, STREAMS, WIDTH))

    def forward(self, x):
        out, (hidden, cell) = self.lstm(x, (self.hidden, self.cell))
        self.hidden, self.cell = hidden.detach(), cell.detach()
        return self.head(out)


def series():
    """Inputs and targets, a piece of every stream after the other."""
    times = torch.arange(LENGTH * PIECES + 1) * 0.1
    values = torch.sin(times + torch.linspace(0, 6, STREAMS)[:, None])
    return tuple(
        v.reshape(STREAMS, PIECES, LENGTH, 1).transpose(0, 1).reshape(-1, LENGTH, 1)
        for v in (values[:, :-1], values[:, 1:])
    )


def main():
    model, loss = Carrying(), nn.MSELoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x, y = series()
    for inputs, targets in zip(x.split(STREAMS), y.split(STREAMS), strict=True):
        value = loss(model(inputs), targets)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(value.item())


def task():
    return steepest.Task(model=Carrying(), loss=nn.MSELoss(), train_data=steepest.ArrayData(*series()))


if __name__ == "__main__":
    main()
