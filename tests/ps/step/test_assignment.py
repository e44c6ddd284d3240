from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from ps.numerics.ranges import ranges
from ps.step.assignment import Dealer

LEAVES = st.sets(st.integers(0, 300)).map(sorted)
SPEEDS = st.dictionaries(st.text(min_size=1, max_size=3), st.floats(0.01, 100), max_size=12)


@given(LEAVES, SPEEDS.filter(bool))
def test_every_leaf_goes_to_one_worker(leaves: list[int], speeds: dict[str, float]) -> None:
    dealt = [leaf for parts in Dealer()(leaves, speeds).values() for low, high in parts for leaf in range(low, high)]
    assert dealt == leaves


@given(st.integers(1, 400), SPEEDS.filter(bool), st.data())
def test_no_other_deal_is_done_sooner(count: int, speeds: dict[str, float], data: st.DataObject) -> None:
    deal = Dealer()
    deal(range(count), data.draw(st.fixed_dictionaries(dict.fromkeys(speeds, st.floats(0.01, 100)))))
    dealt = deal(range(count), speeds)
    got = {worker: sum(high - low for low, high in dealt.get(worker, [])) for worker in speeds}
    last = max(got[worker] / speed for worker, speed in speeds.items())
    # Whoever took one more, to relieve the slowest part, would not be done before that part is now.
    assert all(last <= (got[worker] + 1) / speed * (1 + 1e-12) for worker, speed in speeds.items())


def test_nobody_there_or_nothing_to_do() -> None:
    assert Dealer()([1, 2], {}) == {}
    assert Dealer()([], {"a": 1.0}) == {}


def test_a_deal_is_kept_while_it_is_as_good_as_any() -> None:
    deal = Dealer()
    first = deal(range(8), {"a": 1.0, "b": 1.0})
    assert deal(range(8), {"a": 1.05, "b": 0.95}) == first
    assert deal(range(8), {"a": 3.0, "b": 1.0}) == {"a": [(0, 6)], "b": [(6, 8)]}


@given(LEAVES)
def test_ranges_are_the_same_numbers_with_no_two_adjacent(leaves: list[int]) -> None:
    found = ranges(leaves)
    assert [n for low, high in found for n in range(low, high)] == leaves
    assert all(a[1] < b[0] for a, b in itertools.pairwise(found))
