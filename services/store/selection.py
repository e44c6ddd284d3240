"""Which jobs a list shows, and in what order: the filters and orders of AIP-160 and AIP-132, for the few fields here.

A filter is made of comparisons, such as `state = RUNNING` or `owner != "ci"`, joined by AND and OR; as in AIP-160, OR
binds more closely than AND.
"""

from __future__ import annotations

import base64
import hashlib
import json
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from services.store.lifecycle import JobState
from services.store.schema import jobs, labels
from steepest.errors import SpecError, Violation

_TOKEN = re.compile(r'\s*(?:"((?:[^"\\]|\\.)*)"|(AND\b|OR\b|!=|<=|>=|=|<|>)|([^\s"=!<>]+))')
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "=": operator.eq, "!=": operator.ne, "<": operator.lt, ">": operator.gt, "<=": operator.le, ">=": operator.ge,
}  # fmt: skip
MAX_LENGTH, MAX_TERMS = 1000, 20


def _state(text: str) -> str:
    if text not in list(JobState):
        raise ValueError(f"allowed: {', '.join(JobState)}")
    return text


def _time(text: str) -> float:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise ValueError("allowed: a time such as 2026-11-27T08:00:00Z") from None


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("allowed: a whole number") from None


# Field -> (its column, how to read a value, what it may be compared by).
_FIELDS: dict[str, tuple[sa.Column[Any], Callable[[str], Any], tuple[str, ...]]] = {
    "state": (jobs.c.state, _state, ("=", "!=")),
    "owner": (jobs.c.owner, str, ("=", "!=")),
    "priority": (jobs.c.priority, _number, tuple(_COMPARE)),
    "create_time": (jobs.c.created, _time, tuple(_COMPARE)),
    "name": (jobs.c.id, lambda text: text.removeprefix("trainingJobs/"), tuple(_COMPARE)),
}
LABELS = "labels."  # labels.KEY
ORDERS = ("create_time", "priority", "name", "state")


@dataclass(frozen=True)
class Selection:
    """A filter and an order. text: of both, for page tokens to be checked against. order: (column, is descending)."""

    where: sa.ColumnElement[bool] | None
    order: tuple[tuple[sa.Column[Any], bool], ...]
    text: str

    @staticmethod
    def of(filter_: str = "", order_by: str = "") -> Selection:
        """Raises SpecError."""
        order = _order(order_by)
        return Selection(_where(filter_), order, f"{filter_.strip()}\n{order_by.strip()}")

    @property
    def digest(self) -> str:
        """Of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    def token(self, row: Any) -> str:
        """A page token: where in the order a row is."""
        values = [getattr(row, column.name) for column, _ in self.order]
        return base64.urlsafe_b64encode(json.dumps([self.digest, values]).encode()).decode()

    def read_token(self, token: str) -> list[Any] | None:
        """What `token` has made; None for an empty one. Raises SpecError."""
        if not token:
            return None
        try:
            digest, values = json.loads(base64.urlsafe_b64decode(token))
            if digest == self.digest and len(values) == len(self.order):
                return list(values)
        except (ValueError, TypeError):
            pass
        problem = f"{token!r} does not come from this service with the same filter and order_by"
        raise SpecError([Violation("page_token", problem)])

    def query(self, limit: int, after: Sequence[Any] | None) -> sa.Select[Any]:
        """Up to `limit` jobs. after: the values of the order's columns of the last job of the page before."""
        query = sa.select(jobs).limit(limit)
        query = query.order_by(*(column.desc() if down else column.asc() for column, down in self.order))
        if self.where is not None:
            query = query.where(self.where)
        if after is not None:
            query = query.where(self._beyond(after))
        return query

    def _beyond(self, after: Sequence[Any]) -> sa.ColumnElement[bool]:
        """Later in the order: by one column, where those before it are equal."""
        found = []
        for index, (column, down) in enumerate(self.order):
            equal = [c == value for (c, _), value in zip(self.order[:index], after, strict=False)]
            found.append(sa.and_(*equal, column < after[index] if down else column > after[index]))
        return sa.or_(*found)


def _order(text: str) -> tuple[tuple[sa.Column[Any], bool], ...]:
    found: list[tuple[sa.Column[Any], bool]] = []
    for part in (part.split() for part in text.split(",") if part.strip()):
        if part[0] not in ORDERS or part[1:] not in ([], ["asc"], ["desc"]):
            problem = f"{' '.join(part)!r}; allowed: {', '.join(ORDERS)}, each perhaps with desc, joined by commas"
            raise SpecError([Violation("order_by", problem)])
        found.append((_FIELDS[part[0]][0], part[1:] == ["desc"]))
    found = found or [(jobs.c.created, True)]
    if all(column is not jobs.c.id for column, _ in found):
        found.append((jobs.c.id, found[-1][1]))  # so that no two jobs have the same place
    return tuple(found)


def _where(text: str) -> sa.ColumnElement[bool] | None:
    if len(text) > MAX_LENGTH:
        raise SpecError([Violation("filter", f"it has {len(text)} characters; allowed: {MAX_LENGTH}")])
    tokens = _tokens(text)
    if not tokens:
        return None
    terms: list[list[sa.ColumnElement[bool]]] = [[]]
    position = 0
    while True:
        terms[-1].append(_term(tokens[position : position + 3]))
        position += 3
        if position == len(tokens):
            break
        joint = tokens[position]
        if joint not in (("operator", "AND"), ("operator", "OR")):
            raise SpecError([Violation("filter", f"before {joint[1]!r}, AND or OR is missing")])
        if joint[1] == "AND":
            terms.append([])
        position += 1
    if sum(map(len, terms)) > MAX_TERMS:
        raise SpecError([Violation("filter", f"it has more than {MAX_TERMS} comparisons")])
    return sa.and_(*(sa.or_(*either) for either in terms))


def _tokens(text: str) -> list[tuple[str, str]]:
    """(kind, text) of each word, operator and quoted value."""
    found, position = [], 0
    text = text.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise SpecError([Violation("filter", f"{text[position:]!r} cannot be read; is a quotation mark missing?")])
        quoted, symbol, word = match.groups()
        if quoted is not None:
            found.append(("value", re.sub(r"\\(.)", r"\1", quoted)))
        else:
            found.append(("operator", symbol) if symbol else ("word", word))
        position = match.end()
    return found


def _term(tokens: Sequence[tuple[str, str]]) -> sa.ColumnElement[bool]:
    kinds = [kind for kind, _ in tokens]
    if kinds not in (["word", "operator", "word"], ["word", "operator", "value"]) or tokens[1][1] not in _COMPARE:
        said = " ".join(text for _, text in tokens)
        problem = f"{said!r} is no comparison; write, for example: state = RUNNING AND priority >= 10"
        raise SpecError([Violation("filter", problem)])
    (_, name), (_, symbol), (_, value) = tokens
    if name.startswith(LABELS):
        return _label(name.removeprefix(LABELS), symbol, value)
    if name not in _FIELDS:
        raise SpecError([Violation("filter", f"{name!r} is no field; allowed: {', '.join(_FIELDS)}, {LABELS}KEY")])
    column, read, symbols = _FIELDS[name]
    if symbol not in symbols:
        raise SpecError([Violation("filter", f"{name} {symbol}; allowed: {' '.join(symbols)}")])
    try:
        compared: sa.ColumnElement[bool] = _COMPARE[symbol](column, read(value))
    except ValueError as error:
        raise SpecError([Violation("filter", f"{name} {symbol} {value!r}; {error}")]) from None
    return compared


def _label(key: str, symbol: str, value: str) -> sa.ColumnElement[bool]:
    """Jobs that have a label, or that have not."""
    if symbol not in ("=", "!="):
        raise SpecError([Violation("filter", f"{LABELS}{key} {symbol}; allowed: = !=")])
    same = sa.exists().where(labels.c.job == jobs.c.id, labels.c.key == key, labels.c.value == value)
    return same if symbol == "=" else sa.not_(same)


NEWEST = Selection.of()
