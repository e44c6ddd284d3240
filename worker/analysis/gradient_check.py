"""Compares derivatives computed in different ways, entry by entry, in float64.

Central differences are extrapolated to a step of zero (Ridders 1982, "Accurate computation of F'(x)", as in Numerical
Recipes, section 5.7): the step that gives the least error is found for every entry. Of a large parameter some entries
are looked at one by one, and all of them together: along random directions, an error of any entry shows, and is found
by halves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from worker.analysis.subject import Subject
from worker.analysis.team import Team, shares
from worker.task.load import TaskError

# First steps of differences, to the entry's size or the parameter's. A derivative that differs by much of the tolerance
# is found again from the next: a large step magnifies rounding less, and the least one avoids a kink that is near.
FIRST_STEPS = (1e-3, 0.05, 1e-5)
SHRINK, LEAST_ROWS, ROWS = 2.0, 3, 11  # of Ridders' tableau; small steps are for functions with kinks
ROUNDING = 4 * float(np.finfo(np.float64).eps)  # of a value of the function, relative
ENOUGH = 1e-9  # relative error at which no more steps are tried
TOLERANCE = 1e-6
MUCH = 0.1  # of the tolerance
KINK = 1e-3  # by how much one-sided derivatives differ at a kink, relative to the larger one
FLOOR = 1e-3  # of the largest derivative: errors of much smaller ones are taken relative to this
ALL_ENTRIES = 2000  # of a parameter are looked at one by one; of a larger one, SOME and the LARGEST
SOME, LARGEST = 64, 16
DIRECTIONS = 2


class Entry(NamedTuple):
    """A derivative by one entry of one parameter, in two ways. unsure: how far both can be told."""

    parameter: int
    entry: int
    expected: float
    got: float
    unsure: float

    def error(self, floor: float) -> float:
        """Relative, to no less than `floor`."""
        if not np.isfinite(self.expected) or not np.isfinite(self.got):
            return np.inf
        return abs(self.expected - self.got) / max(abs(self.expected), abs(self.got), floor)


@dataclass(frozen=True)
class Checked:
    """What a check found. errors: the largest relative one of each parameter, by name. worst: None without entries.

    kinks: how many derivatives are at one, where any value between the one-sided ones is right.
    """

    errors: dict[str, float]
    worst: Entry | None
    looked_at: int
    total: int
    tolerance: float
    kinks: int = 0

    @property
    def largest(self) -> float:
        """Of all relative errors."""
        return max(self.errors.values(), default=0.0)

    @property
    def passed(self) -> bool:
        """Whether all derivatives agree."""
        return self.largest <= self.tolerance


class _Ways:
    """Derivatives of the mean loss over the subject's samples."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._point = subject.flat.clone()
        self.size = abs(self._loss(torch.zeros_like(self._point), 0.0))

    def own(self) -> NDArray[np.float64]:
        """The gradient as training computes it, shape (layout.numel,)."""
        total, weight = torch.zeros_like(self.subject.flat), 0.0
        for leaf in range(len(self.subject.leaves)):
            into = torch.zeros_like(total)
            weight += self.subject.gradient(leaf, into)[1]
            total += into
        return (total / weight).numpy()

    def finite(self, direction: torch.Tensor, first: float) -> Found:
        """The derivative along a direction, by central differences of a first step and smaller ones."""

        def difference(step: float) -> float:
            high, low = self._loss(direction, step), self._loss(direction, -step)
            return (high - low) / (2 * step)

        return ridders(difference, first, self.size)

    def sides(self, direction: torch.Tensor, step: float) -> tuple[float, float]:
        """The derivatives to either side of the point along a direction, the smaller one first."""
        here = self._loss(direction, 0.0)

        def side(sign: float) -> float:
            far, near = ((self._loss(direction, sign * s) - here) / (sign * s) for s in (step, step / 2))
            return 2 * near - far

        low, high = sorted((side(-1.0), side(1.0)))
        return low, high

    def _loss(self, direction: torch.Tensor, step: float) -> float:
        flat = self.subject.flat
        torch.add(self._point, direction, alpha=step, out=flat)
        try:
            sums = [self.subject.loss(leaf) for leaf in range(len(self.subject.leaves))]
        finally:
            flat.copy_(self._point)
        return sum(loss for loss, _ in sums) / sum(weight for _, weight in sums)

    def forward(self, direction: torch.Tensor) -> float:
        """The derivative along a direction, in forward mode."""
        sums = [self.subject.directional(leaf, direction) for leaf in range(len(self.subject.leaves))]
        return sum(derivative for derivative, _ in sums) / sum(weight for _, weight in sums)


class Found(NamedTuple):
    """A derivative, and an estimate of its error."""

    value: float
    error: float = 0.0


def ridders(difference: Callable[[float], float], first: float, size: float) -> Found:
    """The limit of a central difference as its step goes to zero, from the steps whose error is estimated least.

    size: of the function's values, whose rounding a small step magnifies.
    """
    best, error = 0.0, np.inf
    row: list[float] = []
    for index in range(ROWS):
        step = first / SHRINK**index
        before, row = row, [difference(step)]
        rounding = ROUNDING * size / step
        factor = 1.0
        for column in range(1, index + 1):
            factor *= SHRINK**2
            row.append((row[column - 1] * factor - before[column - 1]) / (factor - 1.0))
            estimate = max(abs(row[column] - row[column - 1]), abs(row[column] - before[column - 1])) + rounding
            if estimate <= error:
                best, error = row[column], estimate
        if index >= LEAST_ROWS and error <= max(ENOUGH * abs(best), 2 * rounding):
            break
    return Found(best, error)


def _derivative(ways: _Ways, method: str, direction: torch.Tensor, step: float) -> Found:
    if method == "finite":
        return ways.finite(direction, step)
    if method == "forward":
        return Found(ways.forward(direction))
    return Found(float(ways.own() @ direction.numpy()))


def _along(subject: Subject, parameter: int, entries: NDArray[np.int64], by: NDArray[np.float64]) -> torch.Tensor:
    direction = torch.zeros_like(subject.flat)
    offset = subject.layout.parameters[parameter].offset
    direction[torch.from_numpy(offset + entries)] = torch.from_numpy(by)
    return direction


def _unit(subject: Subject, parameter: int, entry: int) -> torch.Tensor:
    return _along(subject, parameter, np.array([entry]), np.ones(1))


def _scale(subject: Subject, parameter: int, entry: int | None = None) -> float:
    """What a step is relative to: the entry's size, or where that is small the parameter's."""
    placed = subject.layout.parameters[parameter]
    values = subject.flat[placed.offset : placed.offset + placed.numel]
    usual = float(values.square().mean().sqrt()) or 1.0
    return max(usual, abs(float(values[entry])) if entry is not None else 0.0, 1e-3)


def check_entries(subject: Subject, asked: tuple[str, list[tuple[int, int]], float], _shared: None) -> list[Found]:
    """Derivatives by some entries. asked: the method, (parameter, entry) of each, and one of FIRST_STEPS."""
    method, entries, step = asked
    ways = _Ways(subject)
    if method == "own":
        gradient = ways.own()
        return [Found(float(gradient[subject.layout.parameters[p].offset + entry])) for p, entry in entries]
    return [
        _derivative(ways, method, _unit(subject, p, entry), step * _scale(subject, p, entry)) for p, entry in entries
    ]


def sides_of(subject: Subject, entries: list[tuple[int, int]], _shared: None) -> list[tuple[float, float]]:
    """The one-sided derivatives by some entries, (parameter, entry) of each; the smaller one first."""
    ways, step = _Ways(subject), FIRST_STEPS[-1]
    return [ways.sides(_unit(subject, p, entry), step * _scale(subject, p, entry)) for p, entry in entries]


def search_parameter(subject: Subject, asked: tuple[str, str, int, float], _shared: None) -> list[int]:
    """Entries of one parameter whose derivatives differ, found by halves along random directions.

    asked: two methods, the parameter, and the difference that counts.
    """
    expected, got, parameter, allowed = asked
    ways = _Ways(subject)
    numel = subject.layout.parameters[parameter].numel
    own = ways.own() if got == "own" else None
    generator = np.random.default_rng(parameter)
    found: list[int] = []

    def differ(entries: NDArray[np.int64], by: NDArray[np.float64]) -> bool:
        direction = _along(subject, parameter, entries, by)
        scale = _scale(subject, parameter) / np.sqrt(len(entries))
        for step in FIRST_STEPS if "finite" in (expected, got) else FIRST_STEPS[:1]:
            one = _derivative(ways, expected, direction, step * scale)
            two = (
                Found(float(own @ direction.numpy()))
                if own is not None
                else _derivative(ways, got, direction, step * scale)
            )
            if abs(one.value - two.value) <= max(allowed, one.error + two.error):
                return False
        return True

    def search(entries: NDArray[np.int64], by: NDArray[np.float64]) -> None:
        if len(entries) == 1:
            found.append(int(entries[0]))
            return
        middle = len(entries) // 2
        for half in (slice(None, middle), slice(middle, None)):
            if len(found) < LARGEST and differ(entries[half], by[half]):
                search(entries[half], by[half])

    everything = np.arange(numel, dtype=np.int64)
    for _ in range(DIRECTIONS):
        by = generator.standard_normal(numel)  # errors of the same size do not cancel, as along signs
        if not found and differ(everything, by):
            search(everything, by)
    return found


def check_gradients(
    team: Team,
    *,
    expected: str = "finite",
    got: str = "own",
    tolerance: float = TOLERANCE,
    say: Callable[[str], None] = lambda text: None,
) -> Checked:
    """Compare two ways to the gradient, of worker.analysis.question.METHODS. Raises TaskError."""
    subject = team.subject
    gradient = _Ways(subject).own()
    parameters = subject.layout.parameters
    views = [np.abs(gradient[p.offset : p.offset + p.numel]) for p in parameters]
    largest = max((float(view.max()) for view in views if len(view)), default=0.0)
    floor = FLOOR * largest or 1e-12
    entries: list[tuple[int, int]] = []
    large = [index for index, p in enumerate(parameters) if p.numel > ALL_ENTRIES]
    for index, placed in enumerate(parameters):
        if placed.numel <= ALL_ENTRIES:
            entries += [(index, entry) for entry in range(placed.numel)]
            continue
        generator = np.random.default_rng([index, placed.numel])
        some = {*generator.choice(placed.numel, SOME, replace=False).tolist()}
        some |= {*np.argsort(views[index])[-LARGEST:].tolist()}
        entries += [(index, entry) for entry in sorted(some)]
    limits = {index: MUCH * tolerance * max(float(views[index].max()), FLOOR * largest) for index in large}
    searches = team.map(search_parameter, [(expected, got, index, limit) for index, limit in limits.items()])
    for done, (index, found) in enumerate(zip(large, searches, strict=True), start=1):
        say(f"searched {done} of {len(large)} large parameters")
        entries += [(index, entry) for entry in found if (index, entry) not in entries]
    nearest: dict[tuple[int, int], Entry] = {}
    doubtful = entries
    for step in FIRST_STEPS if "finite" in (expected, got) else FIRST_STEPS[:1]:
        for found in _compare(team, doubtful, (expected, got), say, step):
            place = found.parameter, found.entry
            nearest[place] = min(nearest.get(place, found), found, key=lambda pair: pair.error(floor))
        doubtful = [place for place in doubtful if nearest[place].error(floor) > MUCH * tolerance]
    doubtful = [place for place, pair in nearest.items() if pair.error(floor) > tolerance]
    kinks = 0
    if "finite" in (expected, got) and doubtful:
        kinks = _smooth_over(team, nearest, doubtful, floor, is_expected=expected == "finite")
        doubtful = [place for place in doubtful if nearest[place].error(floor) > tolerance]
        if doubtful and all(_is_unsure(nearest[place]) for place in doubtful):
            p, entry = doubtful[0]
            problem = (
                f"central differences of a loss of {_Ways(subject).size:.3g} do not tell the derivative by "
                f"{parameters[p].name}{subject.index_of(p, entry).tolist()} to {tolerance:g}"
            )
            raise TaskError(
                "tolerance", f"{problem}, only to {nearest[doubtful[0]].unsure:.1g}; compare with forward mode"
            )
    errors = {p.name: 0.0 for p in parameters}
    for pair in nearest.values():
        name = parameters[pair.parameter].name
        errors[name] = max(errors[name], pair.error(floor))
    worst = max(nearest.values(), key=lambda pair: pair.error(floor), default=None)
    return Checked(errors, worst, len(entries), sum(p.numel for p in parameters), tolerance, kinks)


def _is_unsure(pair: Entry) -> bool:
    return abs(pair.expected - pair.got) <= pair.unsure


def _smooth_over(
    team: Team,
    nearest: dict[tuple[int, int], Entry],
    doubtful: list[tuple[int, int]],
    floor: float,
    *,
    is_expected: bool,
) -> int:
    """Take for right what lies between the one-sided derivatives at a kink; how many there are."""
    parts = shares(doubtful, max(1, min(len(doubtful), 8 * team.size)))
    kinks = 0
    for part, found in zip(parts, team.map(sides_of, [list(part) for part in parts]), strict=True):
        for place, (low, high) in zip(part, found, strict=True):
            pair = nearest[place]
            other = pair.got if is_expected else pair.expected
            width = high - low
            if width > KINK * max(abs(low), abs(high), floor) and low - KINK * width <= other <= high + KINK * width:
                nearest[place] = pair._replace(expected=other, got=other)
                kinks += 1
    return kinks


def _compare(
    team: Team,
    entries: list[tuple[int, int]],
    methods: tuple[str, str],
    say: Callable[[str], None],
    step: float,
) -> list[Entry]:
    parts = shares(entries, max(1, min(len(entries), 8 * team.size)))
    ways = (team.map(check_entries, [(method, list(part), step) for part in parts]) for method in methods)
    found: list[Entry] = []
    for part, one, two in zip(parts, *ways, strict=True):
        found += [
            Entry(p, entry, e.value, g.value, e.error + g.error)
            for (p, entry), e, g in zip(part, one, two, strict=True)
        ]
        say(f"compared {len(found)} of {len(entries)} derivatives")
    return found


def as_json(checked: Checked, subject: Subject) -> dict[str, Any]:
    """What --json prints."""
    worst = checked.worst
    return {
        "passed": checked.passed,
        "max_relative_error": checked.largest,
        "tolerance": checked.tolerance,
        "worst": None
        if worst is None
        else {
            "parameter": subject.layout.parameters[worst.parameter].name,
            "index": subject.index_of(worst.parameter, worst.entry).tolist(),
            "expected": worst.expected,
            "got": worst.got,
        },
        "parameters": checked.errors,
        "entries_compared": checked.looked_at,
        "entries": checked.total,
        "kinks": checked.kinks,
    }
