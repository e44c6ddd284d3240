"""Running averages against torch.optim.swa_utils."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ps.numerics.average import RunningAverage
from ps.parameters.layout import BLOCK_NUMEL
from steepest.step_spec import AverageSpec

NUMEL = 2 * BLOCK_NUMEL + 48
CASES = [{"name": "ema", "decay": 0.9}, {"name": "swa"}, {"name": "swa", "start": 3, "every": 2}]


def _versions(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(NUMEL, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_average_is_torchs(case: dict[str, Any]) -> None:
    spec = AverageSpec(**case)
    module = nn.ParameterList([nn.Parameter(torch.zeros(NUMEL))])
    averaged = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.9) if spec.name == "ema" else None)
    flat = torch.zeros(NUMEL)
    own = RunningAverage(spec, flat, 0)
    for step, version in enumerate(_versions(9)):
        flat.copy_(version)
        own.advance()
        if step >= spec.start and (step - spec.start) % spec.every == 0:
            module[0].data.copy_(version)
            averaged.update_parameters(module)
        expected = version if step < spec.start else averaged.module[0]
        torch.testing.assert_close(own.values, expected.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("cut", [16, BLOCK_NUMEL, BLOCK_NUMEL + 80])
def test_no_cut_shows_nor_a_restart(case: dict[str, Any], cut: int) -> None:
    spec = AverageSpec(**case)
    whole, parts = torch.zeros(NUMEL), [torch.zeros(cut), torch.zeros(NUMEL - cut)]
    own = RunningAverage(spec, whole, 0)
    cuts = [RunningAverage(spec, part, 0) for part in parts]
    for step, version in enumerate(_versions(7)):
        whole.copy_(version)
        own.advance()
        for part, piece, average in zip(parts, version.split([cut, NUMEL - cut]), cuts, strict=True):
            part.copy_(piece)
            average.advance()
        held = [average.values.clone() for average in cuts]
        assert torch.equal(torch.cat(held), own.values)
        cuts = [RunningAverage(spec, part, step + 1) for part in parts]
        for average, values in zip(cuts, held, strict=True):
            average.restore(values)
