"""What the small tasks that people bring are made of: samples, targets and a linear model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import steepest

NUM_SAMPLES, WIDTH = 64, 4


def inputs(rows: int = NUM_SAMPLES) -> torch.Tensor:
    """Samples."""
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(7))


def sums(rows: int = NUM_SAMPLES) -> torch.Tensor:
    """Their targets."""
    return inputs(rows).sum(1, keepdim=True)


def task_of(model: nn.Module, loss: Any = None, **more: Any) -> steepest.Task:
    """A task of a model, by default on the samples and their sums."""
    more.setdefault("train_data", steepest.ArrayData(inputs(), sums()))
    return steepest.Task(model=model, loss=loss or nn.MSELoss(), **more)


class Line(nn.Module):
    """Has a linear layer `line`."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(WIDTH, 1)
