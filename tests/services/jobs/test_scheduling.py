"""Who makes room for whom, on plain data."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from services.jobs.scheduling import Holder, Resize, Vacate, Wish, fitting, grow, make_room

CPU = {"CPU": 1.0}
WISH = Wish("new", 0, CPU, 2, 2)
FIXED = Holder("old", 0, 1.0, CPU, 2, 2, 2, 2)
ELASTIC = Holder("elastic", 0, 1.0, CPU, 1, 4, 4, 4)


def test_a_job_starts_with_as_many_workers_as_fit() -> None:
    wish = Wish("new", 0, {"CPU": 2.0, "GPU": 1.0}, 2, 4)
    assert fitting(wish, {"CPU": 16.0, "GPU": 8.0}) == 4
    assert fitting(wish, {"CPU": 7.0, "GPU": 8.0}) == 3
    assert fitting(wish, {"CPU": 16.0, "GPU": 1.0}) == 0
    assert fitting(wish, {"CPU": 16.0}) == 0


def test_elastic_jobs_give_workers_up_down_to_what_they_need() -> None:
    assert make_room(WISH, [ELASTIC], {"CPU": 0.0}, preempts=False) == [Resize("elastic", 2)]
    assert make_room(WISH, [ELASTIC], {"CPU": 1.0}, preempts=False) == [Resize("elastic", 3)]
    assert make_room(replace(WISH, least=3, most=3), [ELASTIC], {}, preempts=False) == [Resize("elastic", 1)]
    # More than it can give, so nothing is taken from it.
    assert make_room(replace(WISH, least=4, most=4), [ELASTIC], {}, preempts=False) == []
    above = replace(ELASTIC, priority=1)
    assert make_room(WISH, [above], {}, preempts=True) == []


def test_a_job_vacates_its_room_only_for_a_higher_priority_and_where_that_is_wanted() -> None:
    urgent = replace(WISH, priority=1)
    assert make_room(urgent, [FIXED], {}, preempts=True) == [Vacate("old")]
    assert make_room(urgent, [FIXED], {}, preempts=False) == []
    assert make_room(WISH, [FIXED], {}, preempts=True) == []
    assert make_room(replace(urgent, least=3), [FIXED], {}, preempts=True) == []  # it would not be enough


def test_the_lowest_priority_goes_first_and_of_equals_the_newest() -> None:
    urgent = replace(WISH, priority=9)
    old, new, low = FIXED, replace(FIXED, job="new", since=5.0), replace(FIXED, job="low", priority=-1, since=0.0)
    assert make_room(urgent, [old, new], {}, preempts=True) == [Vacate("new")]
    assert make_room(urgent, [old, new, low], {}, preempts=True) == [Vacate("low")]


def test_nobody_is_asked_for_more_than_is_needed() -> None:
    urgent = replace(WISH, priority=1, least=3, most=3)
    one = replace(FIXED, job="one", target=1, held=1, least=1, most=1)
    three = replace(FIXED, job="three", held=3, target=3)
    # The newest of equals is the first that is looked at, but the other one is enough alone.
    assert make_room(urgent, [replace(one, since=9.0), three], {}, preempts=True) == [Vacate("three")]


def test_room_that_is_on_its_way_is_waited_for() -> None:
    urgent = replace(WISH, priority=1)
    assert make_room(urgent, [replace(FIXED, leaves=True), replace(FIXED, job="b")], {}, preempts=True) == []
    assert make_room(WISH, [replace(ELASTIC, target=2)], {}, preempts=True) == []
    assert make_room(urgent, [replace(FIXED, is_settled=False)], {}, preempts=True) == []  # it is starting, or paused


def test_elastic_jobs_grow_one_worker_at_a_time() -> None:
    small = replace(ELASTIC, target=1, held=1)
    assert grow([small, FIXED], {"CPU": 2.0}) == Resize("elastic", 2)
    assert grow([small], {"CPU": 0.5}) is None
    assert grow([replace(small, is_settled=False)], {"CPU": 2.0}) is None
    assert grow([replace(small, leaves=True)], {"CPU": 2.0}) is None
    assert grow([ELASTIC, FIXED], {"CPU": 2.0}) is None
    scaled_down_and_up = replace(FIXED, target=1, held=1)
    assert grow([scaled_down_and_up], {"CPU": 2.0}) == Resize("old", 2)
    urgent = replace(small, job="urgent", priority=1, target=3, held=3)
    assert grow([small, urgent], {"CPU": 2.0}) == Resize("urgent", 4)


@st.composite
def holders(draw: st.DrawFn) -> list[Holder]:
    found = []
    for index in range(draw(st.integers(0, 5))):
        least = draw(st.integers(1, 3))
        target = draw(st.integers(least, 5))
        held = target + draw(st.integers(0, 1))
        worker = draw(st.sampled_from([{"CPU": 1.0}, {"CPU": 2.0}, {"CPU": 1.0, "GPU": 1.0}]))
        settled, leaves = draw(st.booleans()), draw(st.booleans())
        priority, since = draw(st.integers(-1, 1)), float(draw(st.integers(0, 3)))
        found.append(Holder(f"job-{index}", priority, since, worker, least, 5, target, held, settled, leaves))
    return found


@given(holders(), st.integers(-1, 1), st.integers(1, 6), st.integers(0, 3), st.booleans())
def test_what_is_asked_for_is_allowed_enough_and_needed(
    running: list[Holder], priority: int, least: int, cpus: int, preempts: bool
) -> None:
    wish, free = Wish("new", priority, CPU, least, least), {"CPU": float(cpus)}
    actions = make_room(wish, running, free, preempts=preempts)
    known = {holder.job: holder for holder in running}
    gains = []
    for action in actions:
        holder = known[action.job]
        assert holder.is_settled
        assert not holder.leaves
        if isinstance(action, Resize):
            assert holder.least <= action.workers < holder.target
            assert holder.priority <= priority
        else:
            assert preempts
            assert holder.priority < priority
        gains.append((holder.target - (action.workers if isinstance(action, Resize) else 0)) * holder.worker["CPU"])
    given_up = sum(gains)
    coming = sum(h.worker["CPU"] * (h.held if h.leaves else h.held - h.target) for h in running)
    if actions:
        assert cpus + coming + given_up >= least
        assert all(cpus + coming + given_up - gain < least for gain in gains)
