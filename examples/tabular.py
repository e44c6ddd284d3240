"""Tables from scikit-learn: breast cancer (classification) and diabetes (regression), inputs standardized.

steepest train examples/tabular.py:breast_cancer --epochs 20
"""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_breast_cancer, load_diabetes
from torch import nn

import steepest


def _split(table: Any, targets: torch.Tensor) -> tuple[steepest.ArrayData, steepest.ArrayData]:
    """Four fifths to train on; mean and spread come from those alone."""
    inputs = torch.tensor(table.data, dtype=torch.float32)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    inputs, targets = inputs[order], targets[order]
    cut = len(inputs) * 4 // 5
    inputs = (inputs - inputs[:cut].mean(dim=0)) / inputs[:cut].std(dim=0)
    return steepest.ArrayData(inputs[:cut], targets[:cut]), steepest.ArrayData(inputs[cut:], targets[cut:])


def accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The share of samples on the right side of 0."""
    return ((outputs > 0).float() == targets).float().mean()


def absolute_error(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean absolute error, in units of the standardized target."""
    return (outputs - targets).abs().mean()


def _perceptron(num_inputs: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(num_inputs, hidden), nn.ReLU(), nn.Linear(hidden, 1), nn.Flatten(0))


def breast_cancer(hidden: int = 32) -> steepest.Task:
    """Malignant or benign, from 30 measurements of 569 tumours."""
    table = load_breast_cancer()
    train, test = _split(table, torch.tensor(table.target, dtype=torch.float32))
    return steepest.Task(
        model=_perceptron(30, hidden),
        loss=nn.BCEWithLogitsLoss(),
        train_data=train,
        eval_data=test,
        metrics={"accuracy": accuracy},
    )


def diabetes(hidden: int = 32) -> steepest.Task:
    """Progression of the disease after a year, from 10 measurements of 442 patients."""
    table = load_diabetes()
    targets = torch.tensor(table.target, dtype=torch.float32)
    train, test = _split(table, (targets - targets.mean()) / targets.std())
    return steepest.Task(
        model=_perceptron(10, hidden),
        loss=nn.MSELoss(),
        train_data=train,
        eval_data=test,
        metrics={"absolute_error": absolute_error},
    )
