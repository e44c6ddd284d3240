"""How large weights begin decides whether gradients arrive.

A layer of n inputs multiplies the variance of what it is given by n times that of its weights. Xavier's initialization
keeps that at one for tanh, forwards and backwards (Glorot, Bengio 2010), and He's for ReLU, which loses half (He et al.
2015). Weights of one fixed size fit no width: too small, and signals die out; too large, and tanh saturates.
"""

from __future__ import annotations

from typing import Any

from common import Runs, classifier, times
from torch import nn

import steepest

DEPTH, WIDTH = 12, 64
CASES = {
    "tanh, standard deviation 0.02": ("tanh", "small"),
    "tanh, standard deviation 0.5": ("tanh", "large"),
    "tanh, Xavier": ("tanh", "xavier"),
    "ReLU, Xavier": ("relu", "xavier"),
    "ReLU, He": ("relu", "he"),
}


def network(activation: str = "relu", initialization: str = "he") -> steepest.Task:
    """A perceptron of twelve hidden layers whose weights begin so."""
    layers: list[nn.Module] = []
    for _ in range(DEPTH):
        linear = nn.Linear(WIDTH, WIDTH, bias=False)
        match initialization:
            case "small":
                nn.init.normal_(linear.weight, std=0.02)
            case "large":
                nn.init.normal_(linear.weight, std=0.5)
            case "xavier":
                nn.init.xavier_normal_(linear.weight)
            case _:
                nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        layers += [linear, nn.ReLU() if activation == "relu" else nn.Tanh()]
    return classifier(nn.Sequential(*layers, nn.Linear(WIDTH, 10)))


def draw(runs: Runs, pyplot: Any) -> str:
    """The gradient's norm of every layer before the first step."""
    _, axis = pyplot.subplots(figsize=(6, 3.4))
    cases = [{"activation": activation, "initialization": kind} for activation, kind in CASES.values()]
    ends = {}
    for label, records in zip(CASES, runs.records(network, cases, steps=1), strict=True):
        norms = [records.norms[f"{2 * layer}.weight"][0] for layer in range(DEPTH)]
        ends[label] = norms[0]
        axis.semilogy(range(1, DEPTH + 1), norms, marker="o", label=label)
    axis.set(xlabel="layer", ylabel="‖gradient‖")
    axis.legend(fontsize=8, bbox_to_anchor=(1.02, 1.0))
    return (
        "The gradient of the first layer has a norm of "
        + ", ".join(f"{times(norm)} ({label})" for label, norm in ends.items())
        + "."
    )
