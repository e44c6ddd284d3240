"""Logistic regression with a penalty, in float64: a convex problem with one optimum."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
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
