"""Handwritten digits (scikit-learn's own copy, 8 x 8 pixels): three models for the same data.

steepest train examples/digits.py:mlp --steps 200
"""

from __future__ import annotations

from itertools import pairwise

import torch
from sklearn.datasets import load_digits
from torch import nn

import steepest

NUM_TRAIN = 1437  # of 1797: four fifths


def data() -> tuple[steepest.ArrayData, steepest.ArrayData]:
    """(train, test); inputs of shape (64,) in [0, 1], targets the digit."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    inputs = torch.tensor(digits.data, dtype=torch.float32)[order] / 16
    targets = torch.tensor(digits.target)[order]
    return (
        steepest.ArrayData(inputs[:NUM_TRAIN], targets[:NUM_TRAIN]),
        steepest.ArrayData(inputs[NUM_TRAIN:], targets[NUM_TRAIN:]),
    )


def accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The share of samples whose largest output is the target."""
    return (outputs.argmax(dim=1) == targets).float().mean()


def _task(model: nn.Module) -> steepest.Task:
    train, test = data()
    return steepest.Task(
        model=model, loss=nn.CrossEntropyLoss(), train_data=train, eval_data=test, metrics={"accuracy": accuracy}
    )


def logistic() -> steepest.Task:
    """Multinomial logistic regression."""
    return _task(nn.Linear(64, 10))


def mlp(hidden: int = 64, layers: int = 1) -> steepest.Task:
    """A perceptron with hidden layers."""
    sizes = [64] + [hidden] * layers
    parts: list[nn.Module] = []
    for size, following in pairwise(sizes):
        parts += [nn.Linear(size, following), nn.ReLU()]
    return _task(nn.Sequential(*parts, nn.Linear(sizes[-1], 10)))


def convnet(channels: int = 16) -> steepest.Task:
    """Two convolutions with batch norm."""
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(channels, 2 * channels, 3, padding=1),
        nn.BatchNorm2d(2 * channels),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * channels, 10),
    )
    return _task(model)
