from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from ps.numerics.schedule import learning_rate
from steepest.spec import ScheduleSpec

BASE, TOTAL = 0.3, 50


def _torch_rates(make: Any) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=BASE)
    scheduler = make(optimizer)
    rates = []
    for _ in range(TOTAL):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("schedule", "make"),
    [
        (ScheduleSpec(), lambda o: lr_scheduler.ConstantLR(o, factor=1.0)),
        (
            ScheduleSpec(name="linear", final_factor=0.1),
            lambda o: lr_scheduler.LinearLR(o, start_factor=1.0, end_factor=0.1, total_iters=TOTAL),
        ),
        (
            ScheduleSpec(name="cosine", final_factor=0.2),
            lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=TOTAL, eta_min=BASE * 0.2),
        ),
        (
            ScheduleSpec(name="step", step_size=7, gamma=0.5),
            lambda o: lr_scheduler.StepLR(o, step_size=7, gamma=0.5),
        ),
        (ScheduleSpec(name="exponential", gamma=0.9), lambda o: lr_scheduler.ExponentialLR(o, gamma=0.9)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_it_is_the_schedule_of_pytorch(schedule: ScheduleSpec, make: Any) -> None:
    ours = [learning_rate(BASE, schedule, update, TOTAL) for update in range(TOTAL)]
    assert ours == pytest.approx(_torch_rates(make), rel=1e-12)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "step", "exponential"])
def test_warm_up_rises_linearly_and_then_the_schedule_begins(name: str) -> None:
    schedule = ScheduleSpec.model_validate({"name": name, "warmup_steps": 10})
    rates = [learning_rate(BASE, schedule, update, TOTAL) for update in range(TOTAL)]
    assert rates[:10] == pytest.approx([BASE * (k + 1) / 10 for k in range(10)])
    plain = ScheduleSpec.model_validate({"name": name})
    assert rates[10:] == [learning_rate(BASE, plain, update, TOTAL - 10) for update in range(TOTAL - 10)]
