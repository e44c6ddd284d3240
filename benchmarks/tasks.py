"""The models that are timed: perceptrons from 10 thousand to 100 million parameters, on random data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

import steepest

NUM_INPUTS, NUM_CLASSES, NUM_SAMPLES = 64, 10, 4096


@dataclass(frozen=True)
class Size:
    """A model to time. steps: of one round."""

    name: str
    width: int
    layers: int
    steps: int


SIZES = (Size("10 k", 64, 2, 1000), Size("1 M", 576, 4, 150), Size("25 M", 2048, 7, 6), Size("100 M", 4096, 7, 3))


def model(width: int, layers: int) -> nn.Module:
    """An MLP with `layers` hidden layers."""
    parts: list[nn.Module] = [nn.Linear(NUM_INPUTS, width), nn.ReLU()]
    for _ in range(layers - 1):
        parts += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(width, NUM_CLASSES))


def arrays() -> tuple[torch.Tensor, torch.Tensor]:
    """(inputs, targets), the same in every process."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(NUM_SAMPLES, NUM_INPUTS, generator=generator)
    return inputs, torch.randint(NUM_CLASSES, (NUM_SAMPLES,), generator=generator)


def mlp(width: int, layers: int) -> steepest.Task:
    """The task that the service trains."""
    return steepest.Task(
        model=model(width, layers), loss=nn.CrossEntropyLoss(), train_data=steepest.ArrayData(*arrays())
    )
