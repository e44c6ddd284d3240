"""A GPU's place taken by memory of this process, for what of its use does not need one.

Copies are made as late as a GPU may make them. PyTorch sees memory of the host all the same, so a server takes what
lies there as it is, where on a GPU it would copy it.
"""

from __future__ import annotations

import torch

from ps.memory.segment import before_unmapping


class StandInDevice:
    """copied: bytes, so far. waits: how often it was waited for. locked: how many regions of the host's memory are."""

    torch_device = torch.device("cpu")

    def __init__(self) -> None:
        self.copied = self.waits = self.locked = 0
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []

    def lock(self, host: torch.Tensor) -> None:
        if host.numel():
            self.locked += 1
            before_unmapping(host, self._unlock)

    def _unlock(self) -> None:
        self.locked -= 1

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        assert target.shape == source.shape
        self.copied += target.nbytes
        self._copies.append((target, source))

    def await_copies(self) -> None:
        copies, self._copies = self._copies, []
        for target, source in copies:
            target.copy_(source)

    def synchronize(self) -> None:
        self.waits += 1
        self.await_copies()

    def seed(self, value: int) -> None:
        pass
