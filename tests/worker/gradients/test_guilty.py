"""Which samples are to blame for a micro-batch that is not finite."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from worker.gradients.guilty import MAX_SAMPLES, guilty


@given(st.sets(st.integers(0, 63), max_size=MAX_SAMPLES))
def test_those_that_are_bad_by_themselves_are_found(bad: set[int]) -> None:
    samples = np.random.default_rng(0).permutation(64)
    assert sorted(guilty(samples, lambda part: bad.isdisjoint(part.tolist()))) == sorted(bad)


def test_when_all_are_bad_it_is_not_the_samples() -> None:
    assert guilty(np.arange(8), lambda part: False) == ()
    assert guilty(np.arange(100), lambda part: False) == ()


def test_a_micro_batch_of_one() -> None:
    assert guilty(np.array([5]), lambda part: False) == (5,)


def test_what_cannot_be_computed_in_parts_is_named_together() -> None:
    def is_finite(part: np.ndarray) -> bool:
        if len(part) == 1:
            raise ValueError("Expected more than 1 value per channel when training")
        return 6 not in part

    assert guilty(np.arange(8), is_finite) == (6, 7)
