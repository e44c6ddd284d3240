"""Logistic regression without torch: NumPy parameters and a gradient derived by hand.

For inputs X (n, d), targets y in {0, 1}, p = sigmoid(X w + b), the loss sum is L = -sum(y log p + (1 - y) log(1 - p)),
and since dL/dz = p - y for z = X w + b, its gradient is dL/dw = X^T (p - y) and dL/db = sum(p - y).

steepest train examples/analytic.py:logistic --epochs 20 --optimizer momentum --lr 0.1
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer

import steepest

Array = NDArray[np.float64]


def _logits(parameters: Mapping[str, Array], inputs: Array) -> Array:
    return inputs @ parameters["weight"] + parameters["bias"]


def gradient(parameters: Mapping[str, Array], batch: tuple[Array, Array]) -> tuple[float, float, dict[str, Any]]:
    """(loss sum, weight, gradient of the loss sum). batch: inputs of shape (n, d), targets of shape (n,)."""
    inputs, targets = batch
    logits = _logits(parameters, inputs)
    # log(1 + exp(z)) - y z, without overflow
    loss = np.sum(np.logaddexp(0.0, logits) - targets * logits)
    residual = 1.0 / (1.0 + np.exp(-logits)) - targets
    return float(loss), float(len(targets)), {"weight": inputs.T @ residual, "bias": residual.sum()}


def accuracy(outputs: Array, targets: Array) -> float:
    """The share of samples on the right side of 0."""
    return float(np.mean((outputs > 0) == targets))


def logistic() -> steepest.AnalyticTask:
    """Breast cancer, malignant or benign, in float64."""
    table = load_breast_cancer()
    order = np.random.default_rng(0).permutation(len(table.target))
    inputs, targets = table.data[order], table.target[order].astype(np.float64)
    cut = len(inputs) * 4 // 5
    inputs = (inputs - inputs[:cut].mean(axis=0)) / inputs[:cut].std(axis=0)
    return steepest.AnalyticTask(
        parameters={"weight": np.zeros(inputs.shape[1]), "bias": np.zeros(())},
        gradient=gradient,
        train_data=steepest.ArrayData(inputs[:cut], targets[:cut]),
        eval_data=steepest.ArrayData(inputs[cut:], targets[cut:]),
        predict=_logits,
        metrics={"accuracy": accuracy},
    )
