from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from services.store.series import bucket_starts, downsample

NUMBERS = st.lists(st.floats(width=32), max_size=60)


@given(NUMBERS, st.integers(1, 80))
def test_no_number_is_lost_at_any_zoom(values: list[float], points: int) -> None:
    steps = np.arange(10, 10 + 3 * len(values), 3)
    found = downsample({"step": steps, "loss": np.array(values)}, points)
    least, largest, mean = found.series["loss"]
    assert len(found.steps) == len(least) == min(points, len(values))
    real = [value for value in values if not math.isnan(value)]
    if real:
        assert np.nanmin(least) == min(real)
        assert np.nanmax(largest) == max(real)
    starts = bucket_starts(len(values), points)
    for index, (low, high) in enumerate(pairwise([*starts, len(values)])):
        finite = [value for value in values[low:high] if math.isfinite(value)]
        assert found.steps[index] == steps[low]
        if finite:
            assert math.isclose(
                mean[index], math.fsum(finite) / len(finite), rel_tol=1e-6, abs_tol=1e-30 + 1e-9 * max(map(abs, finite))
            )
        else:
            assert math.isnan(mean[index])


@given(st.integers(0, 500), st.integers(1, 100))
def test_buckets_are_as_even_as_can_be(length: int, points: int) -> None:
    sizes = np.diff([*bucket_starts(length, points), length])
    assert sizes.sum() == length
    assert len(sizes) == 0 or sizes.max() - sizes.min() <= 1
