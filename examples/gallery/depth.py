"""Gradients vanish through many sigmoids, and less through what replaced them.

Backpropagation multiplies by the derivative of every activation on its way. A sigmoid's is at most 1/4, so a gradient
that went through forty of them is next to nothing (Hochreiter 1991; Glorot, Bengio 2010). A tanh passes 1 at its
middle, a ReLU passes 1 or 0, and with He's initialization the norm stays what it was.
"""

from __future__ import annotations

from typing import Any

from common import Runs, classifier, times
from torch import nn

import steepest

DEPTHS = (2, 5, 10, 20, 30, 40)
ACTIVATIONS = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU}


def network(activation: str = "sigmoid", depth: int = 40, width: int = 32) -> steepest.Task:
    """A perceptron with so many hidden layers; Xavier's initialization, for ReLU He's."""
    layers: list[nn.Module] = []
    for layer in range(depth):
        linear = nn.Linear(width if layer else 64, width)
        if activation == "relu":
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        else:
            nn.init.xavier_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, ACTIVATIONS[activation]()]
    return classifier(nn.Sequential(*layers, nn.Linear(width, 10)))


def draw(runs: Runs, pyplot: Any) -> str:
    """The first hidden layer's gradient over the last one's, by depth."""
    _, axis = pyplot.subplots(figsize=(6, 3.4))
    found = {}
    for activation in ACTIVATIONS:
        cases = [{"activation": activation, "depth": depth} for depth in DEPTHS]
        ratios = []
        for depth, records in zip(DEPTHS, runs.records(network, cases, steps=1), strict=True):
            first, last = records.norms["0.weight"][0], records.norms[f"{2 * depth - 2}.weight"][0]
            ratios.append(first / last)
        found[activation] = ratios[-1]
        axis.semilogy(DEPTHS, ratios, marker="o", label=activation)
    axis.set(xlabel="hidden layers", ylabel="‖gradient‖, first layer / last")
    axis.legend()
    return (
        f"At 40 layers the first layer's gradient is {times(found['sigmoid'])} of the last one's behind sigmoids, "
        f"{times(found['tanh'])} behind tanh and {times(found['relu'])} behind ReLU with He's initialization."
    )
