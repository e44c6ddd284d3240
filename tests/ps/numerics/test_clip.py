from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ps.numerics.clip import clip_coefficient

NORMS = st.floats(0, 1e30)
BOUNDS = st.floats(1e-6, 1e6)


@given(NORMS, BOUNDS)
def test_the_clipped_norm_is_within_the_bound(norm: float, bound: float) -> None:
    assert norm * clip_coefficient(norm, bound) <= math.nextafter(bound, math.inf)  # one rounding


@given(NORMS, BOUNDS)
def test_clipping_twice_changes_nothing_more(norm: float, bound: float) -> None:
    clipped = norm * clip_coefficient(norm, bound)
    assert clipped * clip_coefficient(clipped, bound) == pytest.approx(clipped, rel=2e-6 / bound + 1e-12)


@given(st.floats(0, 1e6))
def test_without_a_bound_nothing_changes(norm: float) -> None:
    assert clip_coefficient(norm, None) == 1.0


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=20), BOUNDS)
def test_it_is_the_coefficient_of_pytorch(values: list[float], bound: float) -> None:
    parameter = torch.nn.Parameter(torch.zeros(len(values), dtype=torch.float64))
    parameter.grad = torch.tensor(values, dtype=torch.float64)
    norm = float(parameter.grad.norm())
    torch.nn.utils.clip_grad_norm_([parameter], bound)
    expected = [v * clip_coefficient(norm, bound) for v in values]
    assert parameter.grad.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-300)


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_is_refused(norm: float) -> None:
    with pytest.raises(ValueError, match="cannot be clipped"):
        clip_coefficient(norm, 1.0)
