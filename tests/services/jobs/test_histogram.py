from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.jobs.histogram import BOUNDS_SECONDS, Histogram


@given(st.lists(st.floats(0, 1000)))
def test_buckets_are_cumulative_and_count_everything(values: list[float]) -> None:
    histogram = Histogram()
    for value in values:
        histogram.observe(value)
    buckets = histogram.buckets()
    assert buckets[-1] == ("+Inf", len(values))
    for (bound, count), limit in zip(buckets, BOUNDS_SECONDS, strict=False):
        assert float(bound) == limit
        assert count == sum(v <= limit for v in values)
