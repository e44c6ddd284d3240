"""Training and evaluation mode, with submodules that the task left in evaluation mode staying there."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


class Modes:
    """roots: the model, and the loss if it is a module. Starts in training mode.

    A model that is in evaluation mode as a whole, as one that was loaded from a file often is, is put into training
    mode as a whole, as the first line of a training loop does.
    """

    def __init__(self, roots: Sequence[nn.Module]) -> None:
        self._roots = roots
        modules = [module for root in roots for module in root.modules()]
        frozen = [module for module in modules if not module.training]
        self.frozen = [] if all(not module.training for module in roots[0].modules()) else frozen
        self._training = False
        self.set(training=True)

    def set(self, *, training: bool) -> None:
        """Change to this mode, if it is another."""
        if training == self._training:
            return
        self._training = training
        for root in self._roots:
            root.train(training)
        for module in self.frozen:
            module.training = False
