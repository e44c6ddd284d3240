"""Which worker holds the residual of which part of a step, as a deterministic state machine.

A part is some neighbouring micro-batches that are compressed together. Its residual stays with the worker that computes
it, so a part changes hands only when the workers change.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def redeal(owners: Sequence[str | None], workers: Sequence[str]) -> list[str | None]:
    """Who is to have each part: an equal share for every one of `workers`, with as few changes as that allows.

    owners: who has it now, None for nobody. Without workers, nothing changes.
    """
    if not workers:
        return list(owners)
    held = {worker: [part for part, owner in enumerate(owners) if owner == worker] for worker in workers}
    least, more = divmod(len(owners), len(workers))
    by_holding = sorted(workers, key=lambda worker: -len(held[worker]))
    share = {worker: least + (rank < more) for rank, worker in enumerate(by_holding)}
    kept = {part for worker in workers for part in held[worker][: share[worker]]}
    free = [part for part in range(len(owners)) if part not in kept]
    after = [owner if part in kept else None for part, owner in enumerate(owners)]
    for worker in workers:
        wanted = share[worker] - len(held[worker][: share[worker]])
        for part in free[:wanted]:
            after[part] = worker
        del free[:wanted]
    return after


class Parts:
    """The parts of every step of a job; a job that does not compress has none.

    leaves: the micro-batches of each, as bits. kept: parts whose residuals lie with the servers, as after a restart.
    """

    def __init__(self, leaves: Sequence[int], kept: Iterable[int]) -> None:
        self._leaves = leaves
        self._owners: list[str | None] = [None] * len(leaves)
        self._kept = set(kept)
        self._moving: dict[int, str] = {}

    @property
    def any(self) -> bool:
        """Whether the job compresses, so that steps have parts."""
        return bool(self._leaves)

    @property
    def owners(self) -> dict[int, str]:
        """Part -> the worker that has its residual."""
        return {part: owner for part, owner in enumerate(self._owners) if owner is not None}

    def is_owner(self, worker: str) -> bool:
        """Whether a worker has a residual."""
        return worker in self._owners

    def begin_step(self, workers: Sequence[str]) -> dict[int, str]:
        """What must change hands before a step of these workers: part -> who has it now.

        If there is anything, `settle` is to follow when the servers have it.
        """
        after = redeal(self._owners, workers)
        self._moving = {part: owner for part, owner in self.owners.items() if owner != after[part]}
        if not self._moving:
            self._owners = after
        return self._moving

    def settle(self) -> None:
        """What is to change hands lies with the servers now."""
        for part in self._moving:
            self._owners[part] = None
        self._kept.update(self._moving)
        self._moving = {}

    def deal(self, workers: Sequence[str]) -> None:
        """Deal the parts without an owner to these workers."""
        if None in self._owners:
            dealt = zip(self._owners, redeal(self._owners, workers), strict=True)
            self._owners = [new if owner is None else owner for owner, new in dealt]

    def leaves_of(self, worker: str) -> int:
        """The micro-batches of a worker's parts, as bits."""
        return sum(leaves for leaves, owner in zip(self._leaves, self._owners, strict=True) if owner == worker)

    def hand_over(self, worker: str) -> tuple[int, ...]:
        """The parts of a worker whose residuals lie with the servers; they are with the worker from now on."""
        handed = tuple(part for part, owner in self.owners.items() if owner == worker and part in self._kept)
        self._kept.difference_update(handed)
        return handed
