"""Logistic regression with a penalty, in float64: a convex problem with one optimum."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

import steepest

PENALTY = 1 / 569  # as scikit-learn has it with C = 1


def breast_cancer() -> steepest.Task:
    """Is a tumour malignant? Features are standardized."""
    from sklearn.datasets import load_breast_cancer

    loaded: Any = load_breast_cancer()
    x = torch.from_numpy(loaded.data)
    x = (x - x.mean(0)) / x.std(0)
    y = torch.from_numpy(loaded.target).double()

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        inputs, targets = batch
        penalty = sum(p.square().sum() for p in model.parameters())
        return functional.binary_cross_entropy_with_logits(model(inputs)[:, 0], targets) + PENALTY / 2 * penalty

    return steepest.Task(model=nn.Linear(x.shape[1], 1).double(), batch_loss=loss, train_data=steepest.ArrayData(x, y))


def by_hand() -> steepest.AnalyticTask:
    """The same, with its gradient derived by hand."""
    x, y = (array.numpy() for array in breast_cancer().train_data.arrays)

    def gradient(parameters: Any, batch: Any) -> Any:
        inputs, targets = batch
        chances = 1.0 / (1.0 + np.exp(-(inputs @ parameters["weight"])))
        loss = -(targets * np.log(chances) + (1 - targets) * np.log(1 - chances)).sum()
        return loss, len(targets), {"weight": inputs.T @ (chances - targets)}

    return steepest.AnalyticTask(
        parameters={"weight": np.zeros(x.shape[1])}, gradient=gradient, train_data=steepest.ArrayData(x, y)
    )


class _Doubled(torch.autograd.Function):
    """A gradient that has none itself."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return 2.0 * gradient


def once() -> steepest.Task:
    """As breast_cancer, and it cannot be differentiated twice."""
    task = breast_cancer()

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return functional.binary_cross_entropy_with_logits(_Doubled.apply(outputs)[:, 0], targets)

    return steepest.Task(model=task.model, loss=loss, train_data=task.train_data)


def small_network() -> steepest.Task:
    """A regression by a network with batch normalization, in single precision."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(101, 4, generator=generator)
    y = torch.sin(2 * x[:, :1]) * x[:, 1:2]
    model = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1))
    return steepest.Task(model=model, loss=nn.MSELoss(), train_data=steepest.ArrayData(x, y))


def with_dropout() -> steepest.Task:
    """As small_network, with dropout instead of batch normalization."""
    task = small_network()
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 1))
    return steepest.Task(model=model, loss=task.loss, train_data=task.train_data)


class Bootstrapped(nn.Module):
    """Its loss is against what it says itself, through which no gradient is to go."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(4, 1)


def bootstrapped(how: str = "no_grad") -> steepest.Task:
    """A loss whose gradient is stopped, or has a penalty on parameters that it holds itself."""
    model, data = Bootstrapped(), small_network().train_data
    held = list(model.parameters())

    def loss(model: Any, batch: Any) -> torch.Tensor:
        inputs, targets = batch
        said = model.line(inputs)
        if how == "held":
            return functional.mse_loss(said, targets) + sum(p.square().sum() for p in held)
        with torch.no_grad():
            target = targets + 0.9 * model.line(inputs.flip(1))
        return functional.mse_loss(said, target)

    return steepest.Task(model=model, batch_loss=loss, train_data=data)


class _PartlyUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line, self.unused = nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.line(x)


def partly_used() -> steepest.Task:
    """Some of its parameters are not used."""
    return steepest.Task(model=_PartlyUsed(), loss=nn.MSELoss(), train_data=small_network().train_data)
