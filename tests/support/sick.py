"""Small jobs, each with one thing wrong with its training, and one with nothing."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

import steepest

ROWS, WIDTH = 256, 8


def data(rows: int = ROWS) -> steepest.ArrayData:
    """A smooth function of a few inputs."""
    x = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(1))
    return steepest.ArrayData(x, torch.tanh(x.sum(1, keepdim=True)))


def network(depth: int = 2, activation: type[nn.Module] = nn.Tanh, width: int = 16) -> nn.Sequential:
    """A perceptron."""
    inner = [layer for _ in range(depth - 1) for layer in (nn.Linear(width, width), activation())]
    return nn.Sequential(nn.Linear(WIDTH, width), activation(), *inner, nn.Linear(width, 1))


def healthy() -> steepest.Task:
    """Nothing is wrong."""
    return steepest.Task(model=network(), loss=nn.MSELoss(), train_data=data(), eval_data=data(64))


def sigmoids(depth: int = 40) -> steepest.Task:
    """Gradients vanish on their way through many sigmoids."""
    return steepest.Task(model=network(depth, nn.Sigmoid), loss=nn.MSELoss(), train_data=data())


def dead() -> steepest.Task:
    """Every unit of the first layer is off for every sample."""
    model = network(2, nn.ReLU)
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    return steepest.Task(model=model, loss=nn.MSELoss(), train_data=data())


class _Slow(Dataset[Any]):
    def __init__(self) -> None:
        self._rows = data()

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> Any:
        time.sleep(0.002)
        return self._rows[index]


def slow_input() -> steepest.Task:
    """Samples take longer than their gradients."""
    return steepest.Task(model=network(), loss=nn.MSELoss(), train_data=_Slow())


def one_bad_sample(row: int = 77) -> steepest.Task:
    """One input is not a number."""
    rows = data()
    rows.arrays[0][row] = torch.nan
    return steepest.Task(model=network(), loss=nn.MSELoss(), train_data=rows)
