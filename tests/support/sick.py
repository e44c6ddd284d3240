"""Small jobs, each with one thing wrong with its training, and one with nothing."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
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


class _BreaksDown(nn.Module):
    """Its outputs are no numbers from the thirtieth pass on, whatever the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes = self.passes + 1
        return self.inner(x) * torch.where(self.passes >= 30, torch.nan, 1.0)


def breaks_down() -> steepest.Task:
    """No sample is to blame for what is not a number."""
    return steepest.Task(model=_BreaksDown(), loss=nn.MSELoss(), train_data=data())


def corrupt_shard(first: int = 160, last: int = 175) -> steepest.Task:
    """A stretch of the data has targets in another unit; the model draws numbers, and has buffers."""
    rows = data()
    rows.arrays[1][first : last + 1] *= 1000.0
    model = nn.Sequential(nn.Linear(WIDTH, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 1))
    return steepest.Task(model=model, loss=nn.MSELoss(), train_data=rows)


def large_weights() -> steepest.Task:
    """Weights begin thirty times too large, which drives every tanh to its end."""
    model = network(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 8.0)
    return steepest.Task(model=model, loss=nn.MSELoss(), train_data=data())


def recurrent() -> steepest.Task:
    """A recurrent net whose gradient explodes at a sample that is far out."""
    cell = nn.RNN(1, 32, nonlinearity="relu", batch_first=True)
    with torch.no_grad():
        cell.weight_hh_l0.copy_(1.1 * torch.eye(32))
    head = nn.Linear(32, 1)
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(ROWS, 40, 1, generator=generator)
    x[100] *= 400.0  # one of them is far out

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = cell, head

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.cell(x)[0][:, -1])

    return steepest.Task(model=Net(), loss=nn.MSELoss(), train_data=steepest.ArrayData(x, x.mean(1)))


class _Lame(nn.Module):
    """Slow in the first process that comes to 40 passes, which a rehearsal does not."""

    def __init__(self, mark: str) -> None:
        super().__init__()
        self.inner = network()
        self._mark = Path(mark)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = str(os.getpid())
        calls = self._mark.with_suffix(f".{own}")  # counted in a file, for a module may keep nothing
        with calls.open("a") as file:
            file.write(".")
        lame = False
        if calls.stat().st_size >= 40:
            with contextlib.suppress(FileExistsError), self._mark.open("x") as file:
                file.write(own)
            lame = self._mark.read_text() == own
        time.sleep(0.03 if lame else 0.005)
        return self.inner(x)


def straggler(mark: str) -> steepest.Task:
    """One worker is slower than the others. mark: a file that does not exist yet."""
    return steepest.Task(model=_Lame(mark), loss=nn.MSELoss(), train_data=data())


class _Stuck(nn.Module):
    """Sleeps for a while in one pass, after some that make the mark."""

    def __init__(self, mark: str, seconds: float) -> None:
        super().__init__()
        self.inner = network()
        self._mark = Path(mark)
        self._seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self._mark.open("a") as file:
            file.write(".")
        if self._mark.stat().st_size == 60:
            time.sleep(self._seconds)
        return self.inner(x)


def stuck(mark: str, seconds: float) -> steepest.Task:
    """One step takes long. mark: a file that does not exist yet."""
    return steepest.Task(model=_Stuck(mark, seconds), loss=nn.MSELoss(), train_data=data())
