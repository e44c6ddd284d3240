"""What an optimizer that is named by its class may be, and what is said of one that cannot be."""

from __future__ import annotations

from typing import Any

import pytest

from ps.parameters.layout import build_layout
from steepest.spec import spec_from_dict
from tests.support.models import described
from worker.rehearsal.optimizer import check_optimizer
from worker.task.load import TaskError

OWN = "tests.support.optimizers"
MODEL = described([(40, 50), (50,), (3, 4, 5), ()])
LAYOUT = build_layout(MODEL, decay_biases_and_norms=False, is_whole=True)


def _check(name: str, **raw: Any) -> None:
    optimizer = {"name": name, "lr": 0.01, "decay_biases_and_norms": False, **raw}
    spec = spec_from_dict({"task": {"module": "m", "function": "f"}, "steps": 3, "optimizer": optimizer})
    check_optimizer(spec, MODEL, LAYOUT, 64)


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("muon", {}),
        ("adafactor", {"weight_decay": 0.1}),
        ("adamw", {}),
        ("adafactor", {"d": 1.5}),
        (f"{OWN}:RowSigns", {"weight_decay": 0.1, "options": {"warmup": 5}}),
        ("torch.optim:SGD", {"options": {"momentum": 0.9, "nesterov": True}}),
        ("pytorch_optimizer:SOAP", {}),
        ("pytorch_optimizer:ScheduleFreeAdamW", {"options": {"warmup_steps": 3}}),
        (f"{OWN}:TwoModes", {}),
    ],
)
def test_what_treats_every_parameter_by_itself_is_taken(name: str, raw: dict[str, Any]) -> None:
    _check(name, **raw)


@pytest.mark.parametrize(
    ("name", "raw", "field", "said"),
    [
        (f"{OWN}:NeedsClosure", {}, "optimizer.name", r"needs closure, to compute losses.*take an optimizer"),
        ("torch.optim:LBFGS", {}, "optimizer.name", r"needs closure"),
        (f"{OWN}:LosesMomentum", {}, "optimizer.name", r"another way after eval\(\) and train\(\).*in place"),
        (f"{OWN}:Draws", {}, "optimizer.name", r"two results for the same gradients.*random"),
        (f"{OWN}:Couples", {}, "optimizer.name", r"in another way when it has other parameters beside it"),
        ("pytorch_optimizer:Prodigy", {}, "optimizer.name", r"other parameters beside it"),
        (f"{OWN}:KeepsElsewhere", {}, "optimizer.name", r"another way from a checkpoint.*self.state"),
        (f"{OWN}:KeepsAFunction", {}, "optimizer.name", r"cannot be kept in a checkpoint.*function.*'hook'"),
        (f"{OWN}:MatricesOnly", {}, "optimizer", r"a step of .*MatricesOnly raised ValueError: only matrices"),
        (f"{OWN}:ChecksRate", {"options": {"rank": 9}}, "optimizer", r"raised ValueError: rank = 9; allowed"),
        (f"{OWN}:ChecksRate", {}, "optimizer.options.rank", r"is required"),
        (f"{OWN}:RowSigns", {"options": {"warm": 9}}, "optimizer.options.warm", r"no argument 'warm'.*warmup"),
        (f"{OWN}:Missing", {}, "optimizer.name", r"'Missing' of the module .* is not there"),
        ("nowhere:Missing", {}, "optimizer.name", r"there is no module 'nowhere'"),
        ("tests.support.broken_on_import:X", {}, "optimizer.name", r"importing .* raised ZeroDivisionError"),
    ],
)
def test_what_cannot_work_is_refused_with_cause_and_cure(name: str, raw: dict[str, Any], field: str, said: str) -> None:
    with pytest.raises(TaskError, match=said) as caught:
        _check(name, **raw)
    assert caught.value.field == field


def test_one_average_is_enough() -> None:
    optimizer = {"name": "pytorch_optimizer:ScheduleFreeAdamW", "lr": 0.01}
    raw = {"task": {"module": "m", "function": "f"}, "steps": 3, "optimizer": optimizer, "average": {"name": "ema"}}
    with pytest.raises(TaskError, match=r"averages parameters itself, with its eval\(\).*leave average out") as caught:
        check_optimizer(spec_from_dict(raw), MODEL, LAYOUT, 64)
    assert caught.value.field == "average.name"
