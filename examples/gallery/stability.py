"""Full-batch gradient descent sharpens the loss until its steps are as long as they can be.

Steps of length η converge in a direction whose curvature is below 2 / η and diverge in one above it. The largest
eigenvalue of the Hessian, the sharpness, rises while a network trains, and where it meets 2 / η it stays: the edge of
stability, where the loss goes up and down from step to step and falls all the same (Cohen et al. 2021).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from common import Runs, digits
from torch import nn
from torch.nn import functional

import steepest

RATES = (0.08, 0.1, 0.15)
SAMPLES = 1797
STEPS = 3000


def network() -> steepest.Task:
    """A perceptron that is told digits apart by squared errors."""

    def squared(model: nn.Module, batch: Any) -> Any:
        inputs, classes = batch
        return 0.5 * (model(inputs) - functional.one_hot(classes, 10)).square().sum(1).mean()

    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    return steepest.Task(model=model, batch_loss=squared, train_data=digits())


def draw(runs: Runs, pyplot: Any) -> str:
    """The sharpness over the steps, for some learning rates, and 2 / η."""
    whole = {"global_batch": SAMPLES, "micro_batch": SAMPLES}
    telemetry = {"curvature_every": 20}
    cases = [
        ({}, {"steps": STEPS, "data": whole, "optimizer": {"name": "sgd", "lr": rate}, "telemetry": telemetry})
        for rate in RATES
    ]
    _, axis = pyplot.subplots(figsize=(6, 3.4))
    found = []
    for index, (rate, (_, records)) in enumerate(zip(RATES, runs.all(network, cases), strict=True)):
        sharpness = records.columns["sharpness"]
        measured = np.isfinite(sharpness)
        axis.plot(records.columns["step"][measured], sharpness[measured], color=f"C{index}", label=f"η = {rate}")
        axis.axhline(2 / rate, color=f"C{index}", linestyle=":")
        late = sharpness[measured][-20:].mean() * rate / 2
        found.append(f"{late:.2f} of 2 / η at η = {rate}")
    axis.set(xlabel="step", ylabel="sharpness (dotted: 2 / η)", ylim=(0, None))
    axis.legend()
    return f"At the end the sharpness is {', '.join(found)}."
