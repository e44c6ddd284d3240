"""The noise of a mini-batch's gradient falls with the batch.

The mean gradient of B samples has the squared norm |G|² + tr(Σ) / B in expectation: the true gradient's, and a share of
the covariance of one sample's that shrinks as 1 / B. Their ratio tr(Σ) / |G|², the gradient noise scale, is the batch
from which on more samples bring little (McCandlish et al. 2018).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from common import Runs, classifier
from torch import nn

import steepest

BATCHES = (4, 16, 64, 256)
SAMPLES = 1797


def network() -> steepest.Task:
    """A small perceptron, that stays where it is at a learning rate of next to nothing."""
    return classifier(nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)))


def draw(runs: Runs, pyplot: Any) -> str:
    """Mean squared norm of the gradient without the true one's, by batch."""
    standing = {"name": "sgd", "lr": 1e-12}
    whole = {"steps": 1, "data": {"global_batch": SAMPLES, "micro_batch": SAMPLES}, "optimizer": standing}
    cases = [
        {
            "steps": 200,
            "data": {"global_batch": batch, "micro_batch": batch // 2, "drop_last": True},
            "optimizer": standing,
        }
        for batch in BATCHES
    ]
    (_, exact), *found = runs.all(network, [({}, spec) for spec in (whole, *cases)])
    truth = exact.columns["gradient_norm"][0] ** 2
    excess = [(records.columns["gradient_norm"] ** 2).mean() - truth for _, records in found]
    # Batches are drawn without replacement, and vary less than independent ones by that factor.
    own = np.array(excess) / (1 - np.array(BATCHES) / SAMPLES)
    slope = np.polyfit(np.log(BATCHES), np.log(own), 1)[0]
    _, axis = pyplot.subplots(figsize=(6, 3.4))
    axis.loglog(BATCHES, own, marker="o", label="measured")
    axis.loglog(BATCHES, own[0] * BATCHES[0] / np.array(BATCHES), linestyle=":", color="grey", label="falls as 1 / B")
    axis.set(xlabel="samples in a batch B", ylabel="tr(Σ) / B, from E‖g‖² without ‖G‖²")
    axis.legend()
    scale = own[0] * BATCHES[0] / truth
    return f"The noise falls as B^{slope:.2f}; at this point the noise scale is {scale:.0f} samples."
