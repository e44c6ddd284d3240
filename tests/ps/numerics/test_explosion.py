"""Gradients far above what is usual."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from ps.numerics.explosion import EXPLODING, LEAST, WINDOW, Explosions

NORMS = st.lists(st.floats(1e-6, 1e6), max_size=150)


def test_what_stands_out_from_the_median_explodes() -> None:
    explosions = Explosions()
    assert not any(explosions.take(norm) for norm in [1.0] * (LEAST - 1) + [1e9])  # too few are known
    assert explosions.take(EXPLODING * 1.01)
    assert explosions.usual == 1.0
    assert not explosions.take(EXPLODING * 0.99)


def test_a_gradient_that_stays_large_becomes_usual() -> None:
    explosions = Explosions([1.0] * WINDOW)
    told = [explosions.take(1e6) for _ in range(WINDOW)]
    assert all(told[: WINDOW // 2])
    assert not any(told[WINDOW // 2 + 1 :])


@given(NORMS, NORMS)
def test_its_state_is_all_that_it_knows(before: list[float], after: list[float]) -> None:
    one = Explosions()
    for norm in before:
        one.take(norm)
    other = Explosions(one.state)
    for norm in after:
        assert one.take(norm) == other.take(norm)
        assert one.usual == other.usual or (math.isnan(one.usual) and math.isnan(other.usual))
    assert one.state == other.state
