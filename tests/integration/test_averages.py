"""Jobs that keep a running average of their parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_optimizer
import torch
from pydantic import ValidationError
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from harness.hosts import Host
from harness.local_job import hashes, job_config, run_here, run_processes, running
from ps.checkpoint.files import State, checkpoints, files_of
from steepest.spec import DataSpec, TaskReference
from steepest.step_spec import AverageSpec
from tests.support import brought
from tests.support.submission import submitted
from tests.support.tasks import arrays, regression
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


EVALUATED = "tests.support.tasks:regression"


def _evaluates(directory: Path, average: dict[str, Any], **raw: Any) -> Any:
    """Evaluations after steps 3 and 6, the second of which is the best."""
    spec = {
        "steps": 6,
        "optimizer": {"name": "adamw", "lr": 0.01},
        "data": {"global_batch": 24, "micro_batch": 3},
        "average": average,
        "eval_every": 3,
        "best": {"metric": "loss"},
    }
    return job_config(directory, EVALUATED, **{**spec, **raw})


def _loss_of(parameters: dict[str, torch.Tensor]) -> float:
    task = regression()
    task.model.load_state_dict(parameters)
    inputs, targets = arrays()
    with torch.no_grad():
        return float(task.loss(task.model(inputs[:50]), targets[:50]))


@pytest.mark.parametrize("average", [*AVERAGES, {"name": "lookahead", "every": 4}], ids=str)
def test_evaluations_are_of_the_average_and_leave_no_trace(average: dict[str, Any], tmp_path: Path) -> None:
    state = run_here(_evaluates(tmp_path / "average", average))
    best = state.standing.best
    assert best.step == 6
    assert best.value == pytest.approx(_loss_of(state.average), rel=1e-6)
    trained = run_here(_evaluates(tmp_path / "trained", {**average, "evaluate": False}))
    assert trained.standing.best.value == pytest.approx(_loss_of(state.model), rel=1e-6)
    assert abs(_loss_of(state.average) - _loss_of(state.model)) > 1e-4  # else nothing would have been told apart
    assert hashes(trained)[0] == hashes(state)[0]
    for placement in ({"servers": 2}, {"transport": "inline"}, {"servers": 3, "transport": "inline"}):
        again = run_processes(_evaluates(tmp_path / str(placement), average, placement=placement), 2)
        assert again.standing.best == best
        assert hashes(again)[0] == hashes(state)[0]


def test_evaluations_are_of_the_average_between_hosts(tmp_path: Path, three: list[Host]) -> None:
    average = AVERAGES[0]
    here = run_here(_evaluates(tmp_path / "here", average))
    for name, servers, workers in (("each", [0, 1], [0, 1, 2]), ("home", [0, 1, 2], [1, 2])):
        config = _evaluates(tmp_path / name, average, placement={"servers": 2})
        with running(config, len(workers), [three[i] for i in servers], [three[i] for i in workers]) as job:
            state = job.finish()
        assert state.standing.best == here.standing.best
        assert hashes(state) == hashes(here)


@pytest.mark.parametrize("transport", ["auto", "inline"])
def test_evaluations_are_of_the_average_where_updates_are_lossy(transport: str, tmp_path: Path) -> None:
    raw = {"compression": {"name": "twobit"}, "placement": {"transport": transport, "servers": 2}}
    state = run_processes(_evaluates(tmp_path / "average", AVERAGES[0], **raw), 2)
    assert state.standing.best.value == pytest.approx(_loss_of(state.average), rel=1e-6)
    trained = run_processes(_evaluates(tmp_path / "trained", {**AVERAGES[0], "evaluate": False}, **raw), 2)
    assert trained.standing.best.value != state.standing.best.value
    assert hashes(trained)[0] == hashes(state)[0]


def test_a_schedule_free_optimizer_is_evaluated_as_it_asks_for(tmp_path: Path) -> None:
    optimizer = {"name": "pytorch_optimizer:ScheduleFreeAdamW", "lr": 0.02, "decay_biases_and_norms": True}
    raw = {"optimizer": optimizer, "data": {"global_batch": 24, "micro_batch": 24}}
    state = run_here(_evaluates(tmp_path / "here", {"name": "none"}, **raw))
    task: Any = load_task(TaskReference(module="tests.support.tasks", function="regression"), None, 0)
    plain = pytorch_optimizer.ScheduleFreeAdamW(task.model.parameters(), lr=0.02)
    plain.train()
    source, sampler = source_of(task.train_data), Sampler(101, DataSpec(global_batch=24, micro_batch=24), 0)
    for step in range(6):
        x, y = source.batch(sampler.indices(step, 0))
        plain.zero_grad()
        task.loss(task.model(x), y).backward()
        plain.step()
    for name, parameter in task.model.named_parameters():
        torch.testing.assert_close(state.model[name], parameter.detach(), rtol=1e-5, atol=1e-6)
    plain.eval()
    for name, parameter in task.model.named_parameters():
        torch.testing.assert_close(state.average[name], parameter.detach(), rtol=1e-5, atol=1e-6)
    assert state.standing.best.value == pytest.approx(_loss_of(state.average), rel=1e-6)
    assert abs(_loss_of(state.average) - _loss_of(state.model)) > 1e-4
    trained = run_here(_evaluates(tmp_path / "trained", {"name": "none", "evaluate": False}, **raw))
    assert trained.standing.best.value == pytest.approx(_loss_of(trained.model), rel=1e-6)
    raw = {**raw, "placement": {"servers": 2}, "steps": 3}
    run_processes(_evaluates(tmp_path / "cut", {"name": "none"}, **raw), 2)
    again = run_processes(_evaluates(tmp_path / "cut", {"name": "none"}, **{**raw, "steps": 6}), 2)
    assert again.standing.best == state.standing.best
    assert hashes(again)[0] == hashes(state)[0]
    assert all(torch.equal(value, state.average[name]) for name, value in again.average.items())
