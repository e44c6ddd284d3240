from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ps.numerics.clip import AutoClip, ZClip, clip_coefficient, clip_policy
from steepest.step_spec import AutoClipSpec, ZClipSpec

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


def _norms(count: int, *spikes: int) -> list[float]:
    generator = np.random.default_rng(0)
    norms = np.exp(generator.normal(0.0, 0.2, count))
    norms[list(spikes)] *= 20
    return [float(norm) for norm in norms]


def test_autoclip_is_a_percentile_of_the_norms_so_far() -> None:
    norms = _norms(300)
    policy = AutoClip(AutoClipSpec(percentile=25.0, window=100))
    for step, norm in enumerate(norms):
        assert policy.max_norm(norm) == np.percentile(norms[max(0, step - 99) : step + 1], 25.0)
    assert policy.state == tuple(norms[-100:])


def test_zclip_is_the_papers() -> None:
    """Against its formulas, written out: warm-up, z-score, reciprocal adjustment, running mean and variance."""
    norms = _norms(200, 60, 61, 150)
    policy = ZClip(ZClipSpec(threshold=2.5, decay=0.97, warmup_steps=25))
    assert [policy.max_norm(norm) for norm in norms[:25]] == [None] * 25
    mean, variance = float(np.mean(norms[:25])), float(np.var(norms[:25]))
    clipped = []
    for step, norm in enumerate(norms[25:], 25):
        z = (norm - mean) / (math.sqrt(variance) + 1e-6)
        taken = mean + 2.5**2 / z * math.sqrt(variance) if norm > mean + 2.5 * math.sqrt(variance) else norm
        limit = policy.max_norm(norm)
        if taken != norm:
            clipped.append(step)
            assert limit == pytest.approx(taken, rel=1e-12)
            assert limit < norm
        else:
            assert limit is None
        mean = 0.97 * mean + 0.03 * taken
        variance = 0.97 * variance + 0.03 * (taken - mean) ** 2
    assert {60, 61, 150} <= set(clipped)


@pytest.mark.parametrize("spec", [AutoClipSpec(window=40), ZClipSpec(warmup_steps=30)], ids=["autoclip", "zclip"])
@pytest.mark.parametrize("split", [0, 1, 29, 30, 31, 90])
def test_a_policy_goes_on_from_its_state(spec: AutoClipSpec | ZClipSpec, split: int) -> None:
    norms = _norms(100, 45)
    whole, first = clip_policy(spec), clip_policy(spec)
    assert whole is not None
    assert first is not None
    expected = [whole.max_norm(norm) for norm in norms]
    got = [first.max_norm(norm) for norm in norms[:split]]
    second = clip_policy(spec, json.loads(json.dumps(first.state)))
    assert second is not None
    got += [second.max_norm(norm) for norm in norms[split:]]
    assert got == expected
    assert second.state == whole.state
