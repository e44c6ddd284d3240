"""What a sweep tries, and what it refuses before anything has run."""

from __future__ import annotations

from typing import Any

import pytest

from steepest.errors import SpecError
from steepest.sweep import Choice, Outcome, Plan, Range, Sweep, Trial, combinations, parse_choice, parse_range, varied


def test_values_are_json_or_text() -> None:
    assert parse_choice("optimizer.lr=1e-3,1e-2") == Choice("optimizer.lr", (1e-3, 1e-2))
    assert parse_choice("optimizer.betas=[0.9,0.95],[0.8,0.9]").values == ([0.9, 0.95], [0.8, 0.9])
    assert parse_choice("optimizer.name=sgd,adamw").values == ("sgd", "adamw")
    assert parse_range("arg.hidden=16:64") == Range("arg.hidden", 16, 64)
    assert parse_range("arg.hidden=16:64").is_integer
    assert parse_range("optimizer.lr=1e-4:1e-1:log") == Range("optimizer.lr", 1e-4, 1e-1, is_log=True)


@pytest.mark.parametrize("text", ["lr", "=1", "lr=", "lr=1:2"])
def test_what_is_no_choice(text: str) -> None:
    if text == "lr=1:2":
        assert parse_choice(text).values == ("1:2",)
        return
    with pytest.raises(SpecError, match="--grid"):
        parse_choice(text)


@pytest.mark.parametrize("text", ["lr", "lr=1", "lr=2:1", "lr=0:1:log", "lr=a:b", "=1:2", "lr=1:2:3", "lr=1:2:log:log"])
def test_what_is_no_range(text: str) -> None:
    with pytest.raises(SpecError, match="--range"):
        parse_range(text)


def test_a_grid_has_all_combinations_once() -> None:
    choices = [Choice("a", (1, 2, 3)), Choice("b", ("x", "y"))]
    found = [tuple(numbers[c.path] for c in choices) for numbers in combinations(choices)]
    assert sorted(found) == [(a, b) for a in range(3) for b in range(2)]
    assert Plan(choices=tuple(choices)).size == 6


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "nothing to vary"),
        ({"ranges": (Range("a", 0, 1),)}, "a grid has no ranges"),
        ({"choices": (Choice("a", (1,)), Choice("a", (2,)))}, "varied twice"),
        ({"choices": tuple(Choice(str(i), (0, 1)) for i in range(20))}, "1,048,576 combinations"),
    ],
)
def test_plans_that_cannot_be(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        Plan(**settings)


def test_a_field_that_no_job_may_have_is_refused_before_any_runs() -> None:
    plan = Plan(choices=(Choice("optimizer.lr", (0.1, -1.0)),))
    sweep = Sweep(None, "s", plan, "train.py:task", {}, {"steps": 10})  # type: ignore[arg-type]  # it gets no further
    with pytest.raises(SpecError, match=r"optimizer\.lr"):
        sweep.run()
    assert sweep.outcome().trials == ()


def test_parameters_go_to_the_spec_and_to_the_arguments() -> None:
    spec, arguments = {"optimizer": {"name": "sgd"}}, {"hidden": 8}
    own, given = varied(spec, arguments, {"optimizer.lr": 0.5, "arg.hidden": 16, "seed": 3})
    assert own == {"optimizer": {"name": "sgd", "lr": 0.5}, "seed": 3}
    assert given == {"hidden": 16}
    assert (spec, arguments) == ({"optimizer": {"name": "sgd"}}, {"hidden": 8})
    with pytest.raises(SpecError, match="seed is not a table"):
        varied({"seed": 1}, {}, {"seed.deep": 1})


def test_the_best_is_first_and_what_was_given_up_is_not_ranked() -> None:
    values = [0.3, None, 0.1, float("nan"), 0.2]
    trials = [Trial(n, f"trainingJobs/s-{n}", {}, "SUCCEEDED", value) for n, value in enumerate(values)]
    trials.append(Trial(5, "trainingJobs/s-5", {}, "CANCELLED", 0.0, given_up=True))
    plan = Plan(choices=(Choice("seed", (1, 2)),))
    assert [t.number for t in Outcome("s", plan, tuple(trials)).ranked] == [2, 4, 0]
    up = Outcome("s", Plan(choices=plan.choices, maximize=True), tuple(trials))
    assert [t.number for t in up.ranked] == [0, 4, 2]
    assert up.to_dict()["best"]["number"] == 0
