"""Filters and orders against plain Python, and every text a clear refusal or a query."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.store.lifecycle import JobState
from services.store.selection import ORDERS, Selection
from services.store.store import JobRow, Store
from steepest.errors import SpecError
from tests.support.rows import job_row

ROWS = [
    replace(
        job_row(f"job-{n:02}", created=1_700_000_000.0 + n // 3),
        state=list(JobState)[n % 4],
        owner=("", "ci", 'o"brien')[n % 3],
        priority=(n * 7) % 5 - 2,
    )
    for n in range(30)
]


LABELS: list[dict[str, str]] = [{}, {"team": "vision", "tier": "1"}, {"team": 'n "l" p'}]  # of every third


@pytest.fixture(scope="module")
def store(new_url: Callable[[], str]) -> Iterator[Store]:
    made = Store(new_url())
    for n, row in enumerate(ROWS):
        made.create(row, (), LABELS[n % 3])
    yield made
    made.close()


def _labels(row: JobRow) -> dict[str, str]:
    return LABELS[int(row.id[-2:]) % 3]


def test_labels_go_with_their_job(new_url: Callable[[], str]) -> None:
    made = Store(new_url())
    for _ in range(2):
        made.create(job_row("one"), (), {"team": "vision"})
        assert [row.id for row in made.page(9, Selection.of("labels.team = vision"))[0]] == ["one"]
        made.delete("one")
        assert made.page(9, Selection.of("labels.team = vision"))[0] == []
    made.close()


def _listed(store: Store, filter_: str = "", order_by: str = "", size: int = 4) -> list[str]:
    """All pages."""
    selection, token, found = Selection.of(filter_, order_by), "", []
    while True:
        rows, token = store.page(size, selection, token)
        assert len(rows) <= size
        found += [row.id for row in rows]
        if not token:
            return found


@pytest.mark.parametrize(
    ("filter_", "holds"),
    [
        ("", lambda row: True),
        ("state = STARTING", lambda row: row.state == "STARTING"),
        ('owner="ci"', lambda row: row.owner == "ci"),
        (r'owner = "o\"brien" AND priority>=1', lambda row: row.owner == 'o"brien' and row.priority >= 1),
        (
            'owner != "" AND state = QUEUED OR state = RUNNING',
            lambda row: row.owner and row.state in ("QUEUED", "RUNNING"),
        ),
        ("name < trainingJobs/job-05 OR name >= job-28", lambda row: row.id < "job-05" or row.id >= "job-28"),
        ("create_time > 2023-11-14T22:13:25Z", lambda row: row.created > 1_700_000_005.0),
        ("create_time <= 2023-11-14T23:13:25+01:00", lambda row: row.created <= 1_700_000_005.0),
        ("priority = -2", lambda row: row.priority == -2),
        ("labels.team = vision", lambda row: _labels(row).get("team") == "vision"),
        (r'labels.team = "n \"l\" p" OR labels.tier = 1', lambda row: bool(_labels(row))),
        ("labels.team != vision AND state = QUEUED", lambda row: "tier" not in _labels(row) and row.state == "QUEUED"),
        ("labels.none = 1", lambda row: False),
    ],
)
def test_a_filter_keeps_what_it_says(store: Store, filter_: str, holds: Any) -> None:
    newest = sorted(ROWS, key=lambda row: (row.created, row.id), reverse=True)
    assert _listed(store, filter_) == [row.id for row in newest if holds(row)]


@pytest.mark.parametrize(
    "order_by", ["name", "name desc", "priority desc, name", "state, priority desc", "create_time"]
)
def test_an_order_holds_over_pages(store: Store, order_by: str) -> None:
    keys = {"name": "id", "priority": "priority", "state": "state", "create_time": "created"}
    expected = list(ROWS)
    parts = [part.split() for part in order_by.split(",")]
    if parts[-1][0] != "name":
        parts.append(["name", *parts[-1][1:]])
    for name, *down in reversed(parts):
        expected.sort(key=operator.attrgetter(keys[name]), reverse=bool(down))
    assert _listed(store, order_by=order_by) == [row.id for row in expected]


@pytest.mark.parametrize(
    ("filter_", "order_by", "said"),
    [
        ("state", "", "'state' is no comparison"),
        ("state = ", "", "is no comparison"),
        ("state = RUNING", "", "allowed: QUEUED, STARTING"),
        ("stat = RUNNING", "", "allowed: state, owner, priority, create_time, name"),
        ("state > RUNNING", "", "state >; allowed: = !="),
        ("priority = high", "", "allowed: a whole number"),
        ("create_time > yesterday", "", "a time such as"),
        ("state = RUNNING owner = ci", "", "before 'owner', AND or OR is missing"),
        ("state = RUNNING AND", "", "is no comparison"),
        ('owner = "ci', "", "quotation mark"),
        (" OR ".join(["priority = 1"] * 21), "", "more than 20"),
        ("x" * 1001, "", "1001 characters"),
        ("", "loss", "'loss'; allowed: create_time, priority, name, state"),
        ("", "name down", "'name down'"),
    ],
)
def test_what_makes_no_sense_is_refused(filter_: str, order_by: str, said: str) -> None:
    with pytest.raises(SpecError) as refused:
        Selection.of(filter_, order_by)
    assert said in str(refused.value)


def test_a_token_belongs_to_its_filter_and_order(store: Store) -> None:
    _, token = store.page(3, Selection.of("", "name"))
    assert [row.id for row in store.page(1, Selection.of("", "name"), token)[0]] == ["job-03"]
    for other in (Selection.of("", "name desc"), Selection.of("priority = 1", "name")):
        with pytest.raises(SpecError, match="page_token"):
            store.page(3, other, token)


WORDS = st.sampled_from(
    ["state", "owner", "priority", "=", "!=", "<", "AND", "OR", "RUNNING", '"', '"a"', "7", "\\", "(", "é"]
)


@given(st.one_of(st.text(max_size=60), st.lists(WORDS, max_size=9).map(" ".join)), st.sampled_from(["", *ORDERS]))
def test_any_text_is_a_query_or_a_refusal(filter_: str, order_by: str) -> None:
    try:
        selection = Selection.of(filter_, order_by)
    except SpecError:
        return
    assert "SELECT" in str(selection.query(3, None))


@given(st.text(max_size=80))
def test_any_token_is_refused_or_its_own(token: str) -> None:
    try:
        assert Selection.of().read_token(token) is None
    except SpecError:
        assert token


def test_the_store_gives_rows(store: Store) -> None:
    rows, token = store.page(100)
    assert (len(rows), token) == (30, "")
    assert all(isinstance(row, JobRow) for row in rows)
