"""Counts of magnitudes against NumPy's histogram in float64, compiled and in operations of PyTorch."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ps.numerics.histogram import BINS, count_by_segment, edges
from ps.numerics.kernel import count_magnitudes
from tests.ps.numerics.test_signals import layout, numbers, shards, signals

DIVISORS = st.floats(0.1, 1e6)


def compiled(values: torch.Tensor, divisor: float, segments: NDArray[np.int64]) -> NDArray[np.uint32]:
    out = np.zeros((len(segments), BINS), np.uint32)
    count_magnitudes(values.numpy(), divisor, segments, out)
    return out


def expected(values: torch.Tensor, divisor: float) -> list[int]:
    sizes = np.abs(values.double().numpy() / divisor)
    wide = [0.0, *edges()[1:-1], np.inf]
    return [int(((sizes >= low) & (sizes < high) & (sizes > 0)).sum()) for low, high in pairwise(wide)]


@pytest.mark.parametrize("count", [compiled, count_by_segment])
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=600),
    DIVISORS,
    st.sampled_from(["float32", "float64"]),
)
def test_as_numpy_counts(count: object, values: list[float], divisor: float, dtype: str) -> None:
    flat = torch.tensor(values, dtype=getattr(torch, dtype))
    middle = len(values) // 2
    segments = np.array([[0, middle], [min(middle + 3, len(values)), len(values)]], np.int64)
    before = flat.clone()
    found = compiled(flat, divisor, segments) if count is compiled else count_by_segment(flat, divisor, segments)
    assert torch.equal(flat, before)
    assert found.tolist() == [expected(flat[start:stop], divisor) for start, stop in segments]


def test_edges_are_powers_of_four() -> None:
    assert len(edges()) == BINS + 1
    assert all(high == 4 * low for low, high in pairwise(edges()))
    one = compiled(torch.tensor([1.0, 3.99, 4.0]), 1.0, np.array([[0, 3]]))
    assert {edges()[i]: int(n) for i, n in enumerate(one[0]) if n} == {1.0: 2, 4.0: 1}


@pytest.mark.parametrize("kind", ["cpu", "device"])
def test_of_any_number_of_shards(kind: str) -> None:
    whole = layout()
    gradient = numbers(whole, 1)

    def counted(count: int) -> NDArray[np.uint32]:
        parts = [signals(s, kind).histogram(gradient[s.start : s.stop], 7.0) for s in shards(whole, count)]
        return np.concatenate(parts)

    assert all((counted(count) == counted(1)).all() for count in (2, 3))
    assert counted(1).sum() == sum(int((view != 0).sum()) for view in whole.views(gradient))
