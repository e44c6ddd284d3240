from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from ps.numerics.clip_parameters import AdaGc, Agc, ParameterNorm, parameter_clip_policy, scale_parameters
from ps.numerics.threads import Threads, split
from ps.parameters.layout import BLOCK_NUMEL, build_layout, shards
from steepest.errors import SpecError
from steepest.spec import spec_from_dict
from steepest.step_spec import AdaGcSpec, AgcSpec, ClipSpec
from tests.support.models import described

SHAPES = [(40, 3000), (7,), (), (300, 2, 3), (0,), (BLOCK_NUMEL + 5,)]
TASK = {"task": {"module": "a", "function": "b"}, "steps": 1}


def _norms(steps: int) -> list[np.ndarray[Any, Any]]:
    generator = np.random.default_rng(0)
    norms = np.exp(generator.normal(0.0, 0.3, (steps, 5)))
    norms[:4, 1] = 0.0  # an adapter that has no gradient at first
    norms[60, 2] = 0.0
    norms[70] *= 30
    return list(norms)


def test_adagc_is_the_papers_and_leaves_what_had_no_gradient_alone() -> None:
    spec = AdaGcSpec(warmup_steps=20, absolute=2.0)
    policy, means = AdaGc(spec), [0.0] * 5
    for step, norms in enumerate(_norms(100)):
        found = policy.coefficients(norms)
        for index, norm in enumerate(norms.tolist()):
            if step < 20:
                factor = min(2.0 / float(np.sqrt((norms**2).sum())), 1.0)
            else:
                factor = min(1.05 * means[index] / norm, 1.0) if norm else 1.0
            assert found[index] == pytest.approx(factor, rel=1e-12)
            if norm:
                known = means[index]
                if step < 20:
                    means[index] = min(known or np.inf, factor * norm)
                else:
                    means[index] = 0.98 * known + 0.02 * factor * norm
        if step == 70:
            assert (found < 0.1).all()
    assert policy.state == pytest.approx((100.0, *means), rel=1e-12)


@pytest.mark.parametrize("split_at", [0, 3, 20, 60, 99])
def test_adagc_goes_on_from_its_state(split_at: int) -> None:
    spec = ClipSpec(adagc=AdaGcSpec(warmup_steps=20))
    whole, first = parameter_clip_policy(spec), parameter_clip_policy(spec)
    assert whole is not None
    assert first is not None
    norms = _norms(100)
    expected = [whole.coefficients(n).tolist() for n in norms]
    got = [first.coefficients(n).tolist() for n in norms[:split_at]]
    second = parameter_clip_policy(spec, json.loads(json.dumps(first.state)))
    assert second is not None
    assert got + [second.coefficients(n).tolist() for n in norms[split_at:]] == expected


def test_a_parameter_is_scaled_in_every_shard_it_lies_in() -> None:
    layout = build_layout(described(SHAPES))
    found = np.array([0.5, 1.0, 0.25, 1.0, 0.125, 0.75])
    for number in (1, 2, 3):
        flat = torch.ones(layout.numel)
        for shard in shards(layout, number):
            scale_parameters(flat[shard.start : shard.stop], shard, found)
        for p, factor in zip(layout.parameters, found.tolist(), strict=True):
            assert (flat[p.offset : p.offset + p.numel] == factor).all()


def test_a_coefficient_of_a_parameter_is_pytorchs() -> None:
    gradients = [torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    found = ParameterNorm(6.9).coefficients(np.array([float(g.norm()) for g in gradients]))
    assert 0 < (found < 1).sum() < 4
    for gradient, factor in zip(gradients, found.tolist(), strict=True):
        parameter = torch.nn.Parameter(torch.zeros(50, dtype=torch.float64))
        parameter.grad = gradient.clone()
        torch.nn.utils.clip_grad_norm_([parameter], 6.9)
        torch.testing.assert_close(parameter.grad, gradient * factor, rtol=1e-12, atol=0)


@pytest.mark.parametrize("on_device", [False, True])
def test_units_are_clipped_against_their_weights_with_the_same_bits_in_any_shard(on_device: bool) -> None:
    """On a device with the operations of PyTorch, here on the CPU."""
    layout = build_layout(described(SHAPES), is_whole=True)
    generator = torch.Generator().manual_seed(0)
    gradient, weights = (torch.randn(layout.numel, generator=generator) * s for s in (0.3, 1.0))
    gradient[layout.padding] = 0.0
    spec = AgcSpec(clipping=0.0375, exclude=("p1",))
    assert layout.parameters[1].name == "p1"
    expected = gradient.double() / 8
    for p in layout.parameters:
        if p.name == "p1" or not p.numel:
            continue
        rows = p.shape[0] if len(p.shape) > 1 else 1
        own = expected[p.offset : p.offset + p.numel].view(rows, -1)
        limits = 0.0375 * weights[p.offset : p.offset + p.numel].double().view(rows, -1).norm(dim=1).clamp(min=1e-3)
        factors = (limits / own.norm(dim=1)).clamp(max=1.0)
        assert rows == 1 or 0.1 < float((factors < 1).double().mean()) < 0.9
        own.mul_(factors[:, None])
    results = []
    for number in (1, 2, 3):
        got, total = gradient.clone(), 0.0
        for shard in shards(layout, number):
            here = slice(shard.start, shard.stop)
            if on_device:
                agc = Agc(spec, shard)
            else:
                ranges = split(shard, 2)
                agc = Agc(spec, shard, Threads(len(ranges)), ranges)
            total += agc(got[here], weights[here], 8.0)
        results.append(got)
        torch.testing.assert_close(got.double() / 8, expected, rtol=1e-6 if on_device else 3e-7, atol=0)
        before, after = (float(values.square().sum()) for values in (gradient.double() / 8, expected))
        assert before - total == pytest.approx(after, rel=1e-6)
        assert after < 0.99 * before
    assert all(torch.equal(a, b) for a, b in pairwise(results))


def test_what_cannot_be_clipped_so_is_refused() -> None:
    with pytest.raises(SpecError, match=r"clip\.agc, which needs whole parameters"):
        spec_from_dict({**TASK, "clip": {"agc": {}}, "compression": {"name": "topk"}})
    with pytest.raises(SpecError, match=r"parameter_norm = 1\.0 and agc are both given"):
        spec_from_dict({**TASK, "clip": {"agc": {}, "parameter_norm": 1.0}})
    with pytest.raises(SpecError, match=r"clip.adagc.decay"):
        spec_from_dict({**TASK, "clip": {"adagc": {"decay": 1.0}}})
