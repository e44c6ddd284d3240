"""Every optimizer walks in its own way.

On an ill-conditioned quadratic plain gradient descent swings across the valley; momentum (Polyak 1964) and Nesterov's
(1983) damp the swings; AdaGrad (Duchi et al. 2011), RMSProp (Hinton 2012) and Adam (Kingma, Ba 2015) scale each
coordinate by itself. Second-order steps go straight: L-BFGS builds curvature from gradients (Liu, Nocedal 1989),
Newton-CG asks for it (Martens 2010). Rosenbrock's ravine (1960) bends, which is harder for all.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from common import Runs, classifier, times
from torch import nn

import steepest

STEPS = 400
STARTS = {"quadratic": (-1.8, 1.2), "rosenbrock": (-1.5, 1.5)}
OPTIMIZERS: dict[str, dict[str, dict[str, Any]]] = {
    "quadratic": {
        "sgd": {"lr": 0.036},
        "momentum": {"lr": 0.02, "momentum": 0.8},
        "nesterov": {"lr": 0.02, "momentum": 0.8},
        "adagrad": {"lr": 0.5},
        "rmsprop": {"lr": 0.03},
        "adam": {"lr": 0.1},
        "lbfgs": {},
        "newton_cg": {},
    },
    "rosenbrock": {
        "sgd": {"lr": 0.0015},
        "momentum": {"lr": 0.001, "momentum": 0.9},
        "nesterov": {"lr": 0.001, "momentum": 0.9},
        "adagrad": {"lr": 0.5},
        "rmsprop": {"lr": 0.03},
        "adam": {"lr": 0.1},
        "lbfgs": {},
        "newton_cg": {},
    },
}


def value(surface: str, x: Any, y: Any) -> Any:
    """The height of a surface."""
    if surface == "quadratic":
        return 0.5 * (x * x + 50.0 * y * y)
    return (1.0 - x) ** 2 + 100.0 * (y - x * x) ** 2


class Point(nn.Module):
    """A point in the plane."""

    def __init__(self, surface: str) -> None:
        super().__init__()
        self.surface = surface
        self.at = nn.Parameter(torch.tensor(STARTS[surface], dtype=torch.float64))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return value(self.surface, self.at[0], self.at[1]) + 0.0 * rows.sum()


def descent(surface: str = "quadratic") -> steepest.Task:
    """Goes downhill, and logs where it is."""

    def loss(model: Point, batch: torch.Tensor) -> Any:
        return model(batch), {"x": model.at[0], "y": model.at[1]}

    data = steepest.ArrayData(torch.zeros(1, 1, dtype=torch.float64))
    return steepest.Task(model=Point(surface), batch_loss=loss, train_data=data)


def digits() -> steepest.Task:
    """A perceptron on the digits."""
    return classifier(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)))


def draw(runs: Runs, pyplot: Any) -> str:
    """Paths over level lines, and the loss on the digits."""
    _, axes = pyplot.subplots(1, 3, figsize=(13, 4))
    said = []
    for axis, surface in zip(axes, STARTS, strict=False):
        names = OPTIMIZERS[surface]
        specs = [
            {
                "steps": STEPS,
                "data": {"global_batch": 1, "micro_batch": 1},
                "optimizer": {"name": name, **options},
            }
            for name, options in names.items()
        ]
        xs, ys = np.meshgrid(np.linspace(-2, 2, 100), np.linspace(-1.5, 2.2, 100))
        heights = value(surface, xs, ys)
        axis.contour(xs, ys, heights, levels=np.geomspace(0.05, heights.max(), 14), colors="lightgrey", linewidths=0.7)
        reached = {}
        for name, (info, records) in zip(
            names, runs.all(descent, [({"surface": surface}, s) for s in specs]), strict=True
        ):
            if info.state != "SUCCEEDED":
                raise RuntimeError(f"{name}: {info.error}")
            axis.plot(
                records.columns["logged.x"],
                records.columns["logged.y"],
                marker=".",
                markevery=8,
                markersize=3,
                linewidth=1,
                label=name,
            )
            reached[name] = float(records.columns["loss"][-1])
        axis.plot(*((0, 0) if surface == "quadratic" else (1, 1)), marker="*", color="black", markersize=10)
        axis.set(title=surface, xlim=(-2, 2), ylim=(-1.5, 2.2))
        said.append(f"on the {surface} " + ", ".join(f"{name} {times(height)}" for name, height in reached.items()))
    names = [name for name in OPTIMIZERS["quadratic"] if name not in ("lbfgs", "newton_cg")] + ["adamw", "muon"]
    rates = {"sgd": 0.1, "momentum": 0.05, "nesterov": 0.05, "adagrad": 0.03, "rmsprop": 0.002, "muon": 0.01}
    specs = [
        {
            "steps": 150,
            "data": {"global_batch": 64, "micro_batch": 64},
            "optimizer": {"name": name, "lr": rates.get(name, 0.003)},
        }
        for name in names
    ]
    for name, (_, records) in zip(names, runs.all(digits, [({}, spec) for spec in specs]), strict=True):
        axes[2].semilogy(np.convolve(records.columns["loss"], np.ones(10) / 10, "valid"), label=name)
    axes[2].set(title="digits", xlabel="step", ylabel="loss")
    axes[0].legend(fontsize=7)
    axes[2].legend(fontsize=7)
    return f"Heights above the minimum after {STEPS} steps or less: " + "; ".join(said) + "."
