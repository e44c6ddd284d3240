"""The workers of a job as the leader sees them: their speed, and the micro-batches each has been dealt.

Sets of micro-batches are the bits of an integer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from ps.numerics.ranges import bits_of, leaves_of, ranges
from ps.step.messages import Push, Round

SPEED_MEMORY = 0.8  # weight of the past in a worker's measured speed
WARM_UP_PUSHES = 3  # a worker's first answers are slow, and say nothing of its speed
KNOWN_PUSHES = 10  # after which a worker's speed is known well enough to be told
PATIENCE_STEPS = 8  # a worker that got no work is tried again after so many steps, then after twice as many, ...
MAX_PATIENCE_STEPS = 512
STRAGGLER_FACTOR = 4.0  # a range this many times over its expected time is given to an idle worker too
STRAGGLER_SECONDS = 5.0  # but never sooner than this


@dataclass(slots=True)
class Member:
    """A worker. in_flight: rounds assigned and not answered. taken, leaves: what it was given in the present round,
    and what of it is still to come.
    """

    host: str = ""
    speed: float = 1.0
    pushes: int = 0
    guessed: bool = True  # whether its speed is not known, or known too long ago
    idle_steps: int = 0
    patience_steps: int = PATIENCE_STEPS
    in_flight: int = 0
    leaves: int = 0
    taken: int = 0
    since: float = 0.0
    retiring: bool = False
    duplicated: bool = False
    hung: bool = False  # reported, and not gone yet
    buffers: bytes | None = None  # the newest it was sent

    @property
    def is_idle(self) -> bool:
        """Whether it can be given work."""
        return not self.in_flight and not self.retiring

    def waited(self, now: float) -> float:
        """For how many seconds it has not answered."""
        return now - self.since if self.leaves else 0.0

    def is_straggling(self, now: float) -> bool:
        """Whether it takes so long that somebody idle should do its work too."""
        expected = math.inf if self.guessed else self.leaves.bit_count() / self.speed
        return self.waited(now) > max(STRAGGLER_SECONDS, STRAGGLER_FACTOR * expected)

    def give(self, leaves: int, now: float) -> None:
        """It has been assigned these."""
        self.leaves |= leaves
        self.taken |= leaves
        self.in_flight += 1
        self.since = now

    def measure(self, push: Push) -> None:
        """Learn its speed from an answer."""
        if push.kind != Round.TRAIN or push.seconds <= 0.0 or not push.leaves:
            return
        speed = len(push.leaves) / push.seconds
        self.pushes += 1
        if self.pushes <= WARM_UP_PUSHES:
            return
        old = speed if self.guessed else self.speed
        self.speed, self.guessed = SPEED_MEMORY * old + (1 - SPEED_MEMORY) * speed, False


class Members(dict[str, Member]):
    """All workers by name: host by host, and in the order in which they joined."""

    def __init__(self) -> None:
        super().__init__()
        self._has_hosts = False  # more than one, that is

    def join(self, name: str, host: str) -> None:
        """One more, in place of one of the same name if there was."""
        self[name] = Member(host)
        order = {h: place for place, h in enumerate(dict.fromkeys(m.host for m in self.values()))}
        self._has_hosts = len(order) > 1
        if self._has_hosts:
            sorted_members = sorted(self.items(), key=lambda item: order[item[1].host])
            self.clear()
            self.update(sorted_members)

    def host_ranges(self, dealt: Mapping[str, Sequence[tuple[int, int]]]) -> dict[str, tuple[tuple[int, int], ...]]:
        """What each host's workers were dealt together; nothing when all are on one host."""
        if not self._has_hosts:
            return {}
        bits: dict[str, int] = {}
        for name, parts in dealt.items():
            host = self[name].host
            bits[host] = bits.get(host, 0) | bits_of(parts)
        return {host: tuple(ranges(leaves_of(own))) for host, own in bits.items()}

    def begin_round(self) -> None:
        """What was given for the round before counts no more."""
        for member in self.values():
            member.leaves = member.taken = 0
            member.duplicated = False

    def idle(self) -> list[str]:
        """Those that can be given work."""
        return [name for name, member in self.items() if member.is_idle]

    def hanging(self, now: float, timeout: float) -> list[str]:
        """Those that have not answered for so many seconds, each once: the next of its name is not to blame."""
        found = [name for name, member in self.items() if member.waited(now) > timeout and not member.hung]
        for name in found:
            self[name].hung = True
        return found

    def duplicate_straggler(self, now: float) -> int:
        """What one that straggles is to deliver yet, for somebody else to compute too, once; 0 without one."""
        for member in self.values():
            if not member.hung and not member.duplicated and member.is_straggling(now):
                member.duplicated = True
                return member.leaves
        return 0

    def staying(self) -> list[str]:
        """Those that are not to leave."""
        return [name for name, member in self.items() if not member.retiring]

    def retired(self) -> list[str]:
        """Those that are to leave and have answered everything."""
        return [name for name, member in self.items() if member.retiring and member.in_flight <= 0]

    def speeds(self, names: list[str]) -> dict[str, float]:
        """How fast these are; whoever is not known yet is taken for as fast as the fastest."""
        fastest = max((m.speed for m in self.values() if not m.guessed), default=1.0)
        return {name: fastest if self[name].guessed else self[name].speed for name in names}

    def slowest(self) -> tuple[int, float]:
        """The number of the slowest worker, and its time for a micro-batch to the median of the others'.

        (-1, 1.0) where there are no others.
        """
        speeds = {name: member.speed for name, member in self.items() if member.pushes > KNOWN_PUSHES}
        if len(speeds) < 2:
            return -1, 1.0
        name = min(speeds, key=lambda name: speeds[name])
        slow = speeds.pop(name)
        number = name.rpartition("-")[2]
        return int(number) if number.isdecimal() else -1, median(speeds.values()) / slow

    def favour_idle(self) -> None:
        """A worker without work is not measured: try it again now and then."""
        for member in self.values():
            if member.taken:
                member.idle_steps = 0
                continue
            member.idle_steps += 1
            if member.idle_steps >= member.patience_steps:
                member.guessed, member.idle_steps = True, 0
                member.patience_steps = min(2 * member.patience_steps, MAX_PATIENCE_STEPS)

    def taken_by_any(self) -> int:
        """All that anybody was given in the present round."""
        taken = 0
        for member in self.values():
            taken |= member.taken
        return taken
