"""Jobs that keep a running average of their parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from harness.local_job import hashes, run_here, run_processes
from ps.checkpoint.files import State, checkpoints, files_of
from steepest.spec import DataSpec, TaskReference
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
