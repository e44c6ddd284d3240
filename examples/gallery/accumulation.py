"""A large batch in pieces is the large batch, bit for bit.

The gradient of a sum is the sum of gradients, so a batch that does not fit is computed in micro-batches and added up.
Floating-point addition depends on its order. Here the order belongs to the micro-batches and not to who computes them:
one worker that accumulates eight and three workers that share them end with the same bits.
"""

from __future__ import annotations

from typing import Any

from common import Runs, classifier
from torch import nn

import steepest

WAYS = (1, 2, 3)
MICRO_BATCHES = (8, 16, 32, 64)


def network() -> steepest.Task:
    """A small perceptron."""
    return classifier(nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)))


def draw(runs: Runs, pyplot: Any) -> str:
    """The first digits of the SHA-256 of all parameters after 50 steps, by micro-batch and workers."""
    base = {"steps": 50, "optimizer": {"name": "adamw", "lr": 0.01}}
    cells, losses = [], []
    for micro_batch in MICRO_BATCHES:
        data = {"global_batch": 64, "micro_batch": micro_batch}
        cases = [({}, {**base, "data": data, "placement": {"workers": workers}}) for workers in WAYS]
        found = runs.all(network, cases)
        cells.append([info.parameters_sha256[:8] for info, _ in found])
        losses.append(found[0][0].loss)
    _, axis = pyplot.subplots(figsize=(6, 2))
    axis.axis("off")
    axis.table(
        cells,
        rowLabels=[f"{64 // size} batches of {size}" for size in MICRO_BATCHES],
        colLabels=[f"{workers} worker{'s' if workers > 1 else ''}" for workers in WAYS],
        loc="center",
    )
    same = all(len(set(row)) == 1 for row in cells)
    spread = max(losses) - min(losses)
    return (
        f"{'Each' if same else 'Not each'} row has one hash, whoever computes. Between rows the products of a layer "
        f"are rounded in other places, and the last losses differ by at most {spread:.1g}."
    )
