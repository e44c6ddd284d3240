"""Beyond some depth a plain network trains worse than a shallow one; with shortcuts, depth does no harm.

A shortcut adds a block's input to its output, so the gradient reaches every block undiminished, whatever the block
does (He et al. 2015, whose deepest network had 152 layers; blocks here are in the order of He et al. 2016). In a plain
network batch normalization makes the gradient grow from block to block on its way back (Yang et al. 2019).
"""

from __future__ import annotations

from typing import Any

import torch
from common import Runs, classifier, times
from torch import nn

import steepest

LAYERS = (8, 20, 56, 110, 152)
STEPS = 100


class Block(nn.Module):
    """Two layers with batch normalization, with or without a shortcut around them."""

    def __init__(self, width: int, shortcut: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, width, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, width, bias=False),
        )
        self.shortcut = shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x) if self.shortcut else self.body(x)


def network(layers: int = 56, shortcut: bool = True, width: int = 32) -> steepest.Task:
    """A network of so many linear layers."""
    blocks = [Block(width, shortcut) for _ in range((layers - 2) // 2)]
    return classifier(
        nn.Sequential(nn.Linear(64, width), *blocks, nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 10))
    )


def draw(runs: Runs, pyplot: Any) -> str:
    """The loss after some steps, and the first block's gradient over the last one's, by depth."""
    _, axes = pyplot.subplots(1, 2, figsize=(9, 3.4))
    said = []
    spec = {
        "steps": STEPS,
        "data": {"global_batch": 64, "micro_batch": 64},
        "optimizer": {"name": "momentum", "lr": 0.05},
        "clip": {"norm": 1.0},
    }
    for shortcut in (False, True):
        cases = [{"layers": layers, "shortcut": shortcut} for layers in LAYERS]
        losses, ratios = [], []
        for layers, records in zip(LAYERS, runs.records(network, cases, **spec), strict=True):
            losses.append(float(records.columns["loss"][-10:].mean()))
            last = (layers - 2) // 2
            ratios.append(records.norms["1.body.2.weight"][0] / records.norms[f"{last}.body.2.weight"][0])
        label = "with shortcuts" if shortcut else "plain"
        axes[0].plot(LAYERS, losses, marker="o", label=label)
        axes[1].semilogy(LAYERS, ratios, marker="o", label=label)
        said.append(
            f"{label}, {losses[0]:.2f} at {LAYERS[0]} layers and {losses[-1]:.2f} at {LAYERS[-1]}, where the first "
            f"block's gradient is {times(ratios[-1])} times the last one's"
        )
    axes[0].set(xlabel="layers", ylabel=f"loss after {STEPS} steps")
    axes[1].set(xlabel="layers", ylabel="‖gradient‖ before step 1, first block / last")
    axes[0].legend()
    return "The loss is, " + "; ".join(said) + "."
