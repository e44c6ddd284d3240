"""The worker's gradient slots: where sums of micro-batches grow, and where servers read them."""

from __future__ import annotations

import torch

from ps.parameters.layout import Layout
from worker.gradients.backend import Backend


def num_slots(num_leaves: int) -> int:
    """Slots that suffice for any assignment: a node for each leaf, and one per level while they are added."""
    return num_leaves + max(num_leaves - 1, 0).bit_length() + 1


class Slots:
    """The worker's gradient slots, each a whole layout. Sums grow where the backend computes, and are published then.

    shared: shape (num_slots, layout.numel), where servers read.
    """

    def __init__(self, shared: torch.Tensor, layout: Layout, backend: Backend) -> None:
        self._shared = shared.unbind()  # once, for to index a tensor takes microseconds
        self._layout = layout
        self._backend = backend
        self._free: list[int] = []
        self._flats: dict[int, torch.Tensor] = {}
        self._views: dict[int, list[torch.Tensor]] = {}
        self.reset()

    def reset(self) -> None:
        """All slots are free again: a new step has begun, so no server reads them any more."""
        self._free = list(range(len(self._shared) - 1, -1, -1))

    def take(self) -> int:
        """A free slot."""
        return self._free.pop()

    def release(self, slot: int) -> None:
        """Give back a slot that no server was told of."""
        self._free.append(slot)

    def free(self) -> list[int]:
        """The free slots, for `restore`."""
        return self._free.copy()

    def restore(self, free: list[int], but: int | None) -> None:
        """Free what was free then, but for one slot."""
        self._free = [slot for slot in free if slot != but]

    def flat(self, slot: int) -> torch.Tensor:
        """A slot's sum where it grows, shape (layout.numel,)."""
        if slot not in self._flats:
            self._flats[slot] = self._backend.gradient(self._shared[slot])
        return self._flats[slot]

    def views(self, slot: int) -> list[torch.Tensor]:
        """One tensor per parameter over a slot's sum."""
        if slot not in self._views:
            self._views[slot] = self._layout.views(self.flat(slot))
        return self._views[slot]

    def publish(self, slot: int) -> None:
        """Have a slot on its way to where servers see it."""
        shared = self._shared[slot]
        self._backend.publish(self.flat(slot), shared, 0, len(shared))

    def publish_part(self, slot: int, start: int, stop: int) -> None:
        """As `publish`, for the elements [start, stop) alone."""
        self._backend.publish(self.flat(slot), self._shared[slot], start, stop)

    def wait(self) -> None:
        """Return when servers see all that was published."""
        self._backend.wait()

    def shared(self, slot: int) -> torch.Tensor:
        """A published slot, shape (layout.numel,)."""
        return self._shared[slot]
