"""Jobs that keep a running average of their parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from harness.local_job import hashes, run_here, run_processes
from ps.checkpoint.files import State, checkpoints, files_of
from steepest.spec import DataSpec, TaskReference
from steepest.step_spec import AverageSpec
from tests.support import brought
from tests.support.submission import submitted
from worker.data.sampler import Sampler
from worker.data.sources import source_of
from worker.task.load import load_task

pytestmark = pytest.mark.cluster

TASK = "tests.support.brought:rebound_buffer"
STEPS, LR, SIZE = 8, 0.05, brought.NUM_SAMPLES
AVERAGES: list[dict[str, Any]] = [{"name": "ema", "decay": 0.8}, {"name": "swa", "start": 2, "every": 3}]


def _config(directory: Path, average: dict[str, Any], **raw: Any) -> Any:
    optimizer = {"name": "adamw", "lr": LR}
    spec = {"steps": STEPS, "optimizer": optimizer, "average": average, "data": {"micro_batch": SIZE}, **raw}
    return submitted(directory, TASK, **spec)


def _plain(average: dict[str, Any]) -> dict[str, torch.Tensor]:
    task: Any = load_task(TaskReference(module="tests.support.brought", function="rebound_buffer"), None, 0)
    averaged = AveragedModel(
        task.model, multi_avg_fn=get_ema_multi_avg_fn(average["decay"]) if average["name"] == "ema" else None
    )
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=LR)
    source, sampler = source_of(task.train_data), Sampler(SIZE, DataSpec(global_batch=SIZE, micro_batch=SIZE), 0)
    for step in range(STEPS):
        x, y = source.batch(sampler.indices(step, 0))
        optimizer.zero_grad()
        task.loss(task.model(x), y).backward()
        optimizer.step()
        start, every = average.get("start", 0), average.get("every", 1)
        if step >= start and (step - start) % every == 0:
            averaged.update_parameters(task.model)
    return {name: p.detach() for name, p in averaged.module.named_parameters()}


@pytest.mark.parametrize("average", AVERAGES, ids=str)
def test_a_checkpoint_has_the_average_that_plain_pytorch_has(average: dict[str, Any], tmp_path: Path) -> None:
    config = _config(tmp_path / "here", average)
    state = run_here(config)
    for name, value in _plain(average).items():
        torch.testing.assert_close(state.average[name], value, rtol=1e-5, atol=1e-6)
    assert state.average.keys() == state.model.keys()
    assert hashes(state) == hashes(run_here(_config(tmp_path / "none", {"name": "none"})))  # training goes as without
    (newest, *_) = checkpoints(tmp_path / "here")
    assert "average.safetensors" in {file.name for file in files_of(newest)}
    task: Any = load_task(TaskReference(module="tests.support.brought", function="rebound_buffer"), None, 0)
    task.model.load_state_dict(state.average)


@pytest.mark.parametrize("average", AVERAGES, ids=str)
def test_it_is_the_same_at_any_placement_and_after_a_restart(average: dict[str, Any], tmp_path: Path) -> None:
    def same(one: State, other: State) -> bool:
        return all(torch.equal(value, other.average[name]) for name, value in one.average.items())

    data = {"micro_batch": 16}
    here = run_here(_config(tmp_path / "here", average, data=data))
    assert same(here, run_processes(_config(tmp_path / "two", average, data=data), 2))
    run_here(_config(tmp_path / "cut", average, data=data, steps=5))
    assert same(here, run_here(_config(tmp_path / "cut", average, data=data)))


def _slow_and_fast(pull: float, every: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Algorithm 1 of Zhang et al. 2019, with AdamW inside: (slow, fast) parameters."""
    task: Any = load_task(TaskReference(module="tests.support.brought", function="rebound_buffer"), None, 0)
    slow = {name: p.detach().clone() for name, p in task.model.named_parameters()}
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=LR)
    source, sampler = source_of(task.train_data), Sampler(SIZE, DataSpec(global_batch=SIZE, micro_batch=SIZE), 0)
    for step in range(1, STEPS + 1):
        x, y = source.batch(sampler.indices(step - 1, 0))
        optimizer.zero_grad()
        task.loss(task.model(x), y).backward()
        optimizer.step()
        if step % every == 0:
            for name, p in task.model.named_parameters():
                slow[name] += pull * (p.detach() - slow[name])
                p.data.copy_(slow[name])
    return slow, {name: p.detach() for name, p in task.model.named_parameters()}


def test_lookahead_is_that_of_the_paper_at_any_placement_and_after_a_restart(tmp_path: Path) -> None:
    average = {"name": "lookahead", "every": 3, "pull": 0.3}
    state = run_here(_config(tmp_path / "here", average))
    slow, fast = _slow_and_fast(0.3, 3)
    for name, value in fast.items():
        torch.testing.assert_close(state.model[name], value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(state.average[name], slow[name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(slow[name], value)
    data = {"micro_batch": 16}
    here = hashes(run_here(_config(tmp_path / "whole", average, data=data)))
    assert hashes(run_processes(_config(tmp_path / "two", average, data=data, placement={"servers": 2}), 2)) == here
    run_here(_config(tmp_path / "cut", average, data=data, steps=4))
    assert hashes(run_here(_config(tmp_path / "cut", average, data=data))) == here


def test_lookahead_has_a_default_of_its_own_and_no_start() -> None:
    assert AverageSpec(name="lookahead").every == 5
    assert AverageSpec(name="lookahead", every=1).every == 1
    with pytest.raises(ValidationError, match="begins with the first step"):
        AverageSpec(name="lookahead", start=3)


def test_the_average_of_a_parameter_that_state_dict_hides_goes_on_too(tmp_path: Path) -> None:
    def run(name: str, steps: int) -> State:
        spec = {"steps": steps, "optimizer": {"name": "adamw", "lr": LR}, "average": AVERAGES[0]}
        return run_here(submitted(tmp_path / name, "tests.support.brought:hidden_parameter", **spec))

    whole = run("whole", 8)
    hidden = [name for name in whole.extra if name.startswith("average.")]
    assert hidden
    run("cut", 5)
    again = run("cut", 8)
    assert all(torch.equal(again.extra[name], whole.extra[name]) for name in hidden)
    assert all(torch.equal(again.average[name], value) for name, value in whole.average.items())
