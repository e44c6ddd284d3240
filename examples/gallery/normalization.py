"""Batch normalization lets a network train at learning rates that ruin it otherwise.

Normalizing each unit over the batch keeps the scale of the signals whatever the weights do, so the loss stays smooth
along the gradient for longer steps (Ioffe, Szegedy 2015; Santurkar et al. 2018).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from common import Runs, classifier
from torch import nn

import steepest

RATES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
STEPS = 150


def network(normalized: bool = True) -> steepest.Task:
    """A perceptron of six hidden layers."""
    layers: list[nn.Module] = []
    for _ in range(6):
        linear = nn.Linear(64, 64, bias=not normalized)
        layers += [linear, *([nn.BatchNorm1d(64)] if normalized else []), nn.ReLU()]
    return classifier(nn.Sequential(*layers, nn.Linear(64, 10)))


def draw(runs: Runs, pyplot: Any) -> str:
    """The loss after some steps of SGD, by learning rate."""
    _, axis = pyplot.subplots(figsize=(6, 3.4))
    best = {}
    for normalized in (False, True):
        specs = [
            {"steps": STEPS, "data": {"global_batch": 64, "micro_batch": 64}, "optimizer": {"name": "sgd", "lr": lr}}
            for lr in RATES
        ]
        losses = []
        for info, records in runs.all(network, [({"normalized": normalized}, spec) for spec in specs]):
            failed = info.state != "SUCCEEDED"  # the loss was not a number any more
            losses.append(np.nan if failed else float(records.columns["loss"][-20:].mean()))
        label = "with batch normalization" if normalized else "without"
        best[label] = [lr for lr, loss in zip(RATES, losses, strict=True) if loss < 0.5]
        axis.loglog(RATES, losses, marker="o", label=label)
    axis.axhline(np.log(10), color="grey", linestyle=":", label="a guess")
    axis.set(xlabel="learning rate", ylabel=f"loss after {STEPS} steps")
    axis.legend(fontsize=8)
    ranges = (
        f"{label} at rates from {min(rates):g} to {max(rates):g}" if rates else f"{label} at none of these rates"
        for label, rates in best.items()
    )
    return f"In {STEPS} steps the loss falls below 0.5 {'; '.join(ranges)}."
