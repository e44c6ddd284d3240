"""Who starts next, with how many workers, and who makes room for it. Decides only: `services.jobs.admission` acts.

Jobs that wait are taken by priority; among equals that of the owner who holds least is first (fair share), then the
oldest. A job may say that it runs with fewer workers than it would like (*elastic*: placement.min_workers): it starts
with as many as there is room for, grows when nobody waits, and gives workers up, down to that number, to waiting jobs
of its own priority or above. Where the service preempts, a running job also *vacates* all its room, at a step boundary
and with a checkpoint, for a waiting one of higher priority.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Resources = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Wish:
    """What a waiting job needs: the resources of one worker, and from `least` to `most` of them."""

    job: str
    priority: int
    worker: Resources
    least: int
    most: int


@dataclass(frozen=True, slots=True)
class Holder:
    """A job that holds room. since: when it was created. worker: the resources of one worker.

    target: how many workers it is to have, of which it needs `least` and would like `most`. held: how many it has room
    for now, those that are leaving among them. is_settled: it trains, and all its workers have joined. leaves: it is
    vacating its room.
    """

    job: str
    priority: int
    since: float
    worker: Resources
    least: int
    most: int
    target: int
    held: int
    is_settled: bool = True
    leaves: bool = False


@dataclass(frozen=True, slots=True)
class Resize:
    """Have a job go on with another number of workers."""

    job: str
    workers: int


@dataclass(frozen=True, slots=True)
class Vacate:
    """Have a job give its room back, and wait."""

    job: str


def fitting(wish: Wish, free: Resources) -> int:
    """With how many workers a job can start now; 0: with too few."""
    return next((n for n in range(wish.most, wish.least - 1, -1) if _fits(wish.worker, n, free)), 0)


def make_room(wish: Wish, holders: Sequence[Holder], free: Resources, *, preempts: bool) -> list[Resize | Vacate]:
    """What lets a job start that has too little room: nothing if that is on its way, or cannot be had."""
    left = dict(free)
    for holder in holders:
        _add(left, holder.worker, holder.held if holder.leaves else max(0, holder.held - holder.target))
    if _fits(wish.worker, wish.least, left):
        return []
    # The lowest priority first, and of equals the newest.
    able = sorted((h for h in holders if h.is_settled and not h.leaves), key=lambda h: (h.priority, -h.since))
    actions: dict[str, Resize | Vacate] = {}
    for holder in able:
        if holder.priority <= wish.priority:
            spare = max(0, holder.target - holder.least)
            needed = next(
                (n for n in range(1, spare + 1) if _fits(wish.worker, wish.least, _with(left, holder, n))), spare
            )
            if needed:
                actions[holder.job] = Resize(holder.job, holder.target - needed)
                _add(left, holder.worker, needed)
        if _fits(wish.worker, wish.least, left):
            return list(actions.values())
    for holder in able if preempts else ():
        if holder.priority < wish.priority:
            given = actions.get(holder.job)
            remaining = given.workers if isinstance(given, Resize) else holder.target
            actions[holder.job] = Vacate(holder.job)
            _add(left, holder.worker, remaining)
            if _fits(wish.worker, wish.least, left):
                return _needed(wish, able, actions, left)
    return []


def grow(holders: Sequence[Holder], free: Resources) -> Resize | None:
    """One more worker for an elastic job, when nobody waits; none while the last one is still starting."""
    elastic = [h for h in holders if h.least < h.most or h.target < h.most]
    if any(not h.is_settled for h in elastic):
        return None
    for holder in sorted(elastic, key=lambda h: (-h.priority, h.target, h.since)):
        if holder.target < holder.most and not holder.leaves and _fits(holder.worker, 1, free):
            return Resize(holder.job, holder.target + 1)
    return None


def _needed(
    wish: Wish, able: Sequence[Holder], actions: Mapping[str, Resize | Vacate], left: dict[str, float]
) -> list[Resize | Vacate]:
    """Without those whose room turned out not to be needed."""
    kept = dict(actions)
    for holder in able:
        action = kept.get(holder.job)
        if action is None:
            continue
        gain = holder.target - (action.workers if isinstance(action, Resize) else 0)
        without = _with(left, holder, -gain)
        if _fits(wish.worker, wish.least, without):
            left = without
            del kept[holder.job]
    return list(kept.values())


def _fits(worker: Resources, count: int, free: Resources) -> bool:
    return all(free.get(name, 0.0) >= count * amount for name, amount in worker.items())


def _with(free: Resources, holder: Holder, workers: int) -> dict[str, float]:
    found = dict(free)
    _add(found, holder.worker, workers)
    return found


def _add(free: dict[str, float], worker: Resources, count: int) -> None:
    for name, amount in worker.items():
        free[name] = free.get(name, 0.0) + count * amount
