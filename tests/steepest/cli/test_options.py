from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from steepest.cli.options import FLAG_OF_PATH, JobOptions, explain, submission
from steepest.errors import SpecError
from steepest.spec import spec_from_dict


def test_options_become_a_spec() -> None:
    options = JobOptions(
        name="a",
        arg=["hidden=3", "kind=wide"],
        set=["optimizer.betas=[0.8,0.9]", "placement.transport=inline"],
        spec={
            "placement.workers": "3",
            "steps": "5",
            "optimizer.lr": "0.1",
            "optimizer.name": "adam",
            "clip.norm": "2",
        },
    )
    it = submission("train.py:f", options)
    assert (it.task, it.name, it.arguments) == ("train.py:f", "a", {"hidden": 3, "kind": "wide"})
    spec = spec_from_dict({**it.spec, "task": {"module": "train", "function": "f"}})
    assert spec.placement.workers == 3
    assert spec.placement.transport == "inline"
    assert spec.optimizer.betas == (0.8, 0.9)
    assert spec.clip.norm == 2.0


def test_every_option_of_the_contract_is_there() -> None:
    names = {*FLAG_OF_PATH.values(), "--arg", "--set"}
    contract = [
        "--name",
        "--workers",
        "--servers",
        "--threads",
        "--device",
        "--steps",
        "--epochs",
        "--seed",
        "--global-batch",
        "--micro-batch",
        "--optimizer",
        "--lr",
        "--momentum",
        "--weight-decay",
        "--schedule",
        "--warmup-steps",
        "--clip-norm",
        "--clip-value",
        "--sync",
        "--staleness",
        "--checkpoint-every",
        "--eval-every",
        "--arg",
        "--set",
    ]
    added = {"--compression", "--precision", "--server-device", "--accumulate", "--init-from", "--patience"}
    assert names == {*contract, *added}


def test_a_job_file_holds_the_whole_spec_and_options_win(tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text('task = "train.py:f"\nsteps = 7\n[optimizer]\nname = "sgd"\nlr = 0.5\n[placement]\nworkers = 2\n')
    it = submission(str(file), JobOptions(spec={"optimizer.lr": "0.25"}))
    assert it.task == f"{tmp_path / 'train.py'}:f"
    assert it.spec["optimizer"] == {"name": "sgd", "lr": "0.25"}
    assert it.spec["steps"] == 7


def test_a_job_file_may_give_arguments(tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text('steps = 7\n[task]\nfunction = "pkg.mod:f"\narguments = {hidden = 3}\n')
    it = submission(str(file), JobOptions(arg=["depth=2"]))
    assert (it.task, it.arguments) == ("pkg.mod:f", {"hidden": 3, "depth": 2})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"set": ["optimizer"]}, ["--set", "PATH=VALUE"]),
        ({"arg": ["=3"]}, ["--arg", "KEY=VALUE"]),
        ({"set": ["steps.x=1"], "spec": {"steps": "3"}}, ["steps"]),
    ],
)
def test_a_bad_pair_is_named(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        submission("train.py:f", JobOptions(**changes))
    assert all(word in explain(caught.value) for word in words)


@pytest.mark.parametrize(
    ("text", "words"), [("steps = ", ["no TOML"]), ("steps = 3", ["has no task", "task = "]), (None, ["no file"])]
)
def test_a_bad_job_file_is_named(tmp_path: Path, text: str | None, words: list[str]) -> None:
    file = tmp_path / "job.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SpecError) as caught:
        submission(str(file), JobOptions())
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_violation_shows_the_flag_that_sets_its_field() -> None:
    with pytest.raises(SpecError) as caught:
        spec_from_dict({"task": {"module": "m", "function": "f"}, "steps": 1, "placement": {"workers": 0}})
    assert explain(caught.value).startswith("--workers (placement.workers): 0")
