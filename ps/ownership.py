"""Which worker holds the residual of which part of a step, as pure arithmetic.

A part is some neighbouring micro-batches that are compressed together. Its residual stays with the worker that computes
it, so a part changes hands only when the workers change.
"""

from __future__ import annotations

from collections.abc import Sequence


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
