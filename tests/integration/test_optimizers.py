"""A user's own optimizer class on the servers of a real service: from a file beside the task, through a checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from harness.local_job import hashes, job_config, run_here
from steepest.client import Client
from steepest.errors import SpecError
from tests.support import optimizers

pytestmark = pytest.mark.cluster

TASK = """
import torch
from torch import nn

import steepest


def small():
    inputs = torch.randn(64, 4)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    data = steepest.ArrayData(inputs, inputs.sum(1, keepdim=True))
    return steepest.Task(model=model, loss=nn.MSELoss(), train_data=data)
"""


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A task in a file, with the optimizers in another one that the task does not import."""
    (tmp_path / "own_task.py").write_text(TASK)
    shutil.copy(Path(optimizers.__file__), tmp_path / "own_steps.py")
    monkeypatch.syspath_prepend(tmp_path)
    return f"{tmp_path / 'own_task.py'}:small"


def test_a_class_beside_the_task_trains_it(client: Client, task: str, tmp_path: Path) -> None:
    raw = {
        "steps": 30,
        "data": {"global_batch": 16},
        "optimizer": {"name": "own_steps:RowSigns", "lr": 0.01, "options": {"warmup": 7}},
    }
    info = client.submit(task, placement={"workers": 2, "servers": 2}, **raw).wait()
    assert info.state == "SUCCEEDED", info.error
    here = run_here(job_config(tmp_path / "here", "own_task:small", **raw))
    assert (info.parameters_sha256, info.state_sha256) == hashes(here)
    assert any("@structure" in name for name in here.optimizer), "the state would have been plain tensors"


def test_one_that_cannot_work_is_refused_at_submission(client: Client, task: str) -> None:
    with pytest.raises(SpecError, match=r"optimizer.name: own_steps:Draws gave two results for the same gradients"):
        client.submit(task, steps=5, optimizer={"name": "own_steps:Draws", "lr": 0.01})
    with pytest.raises(SpecError, match=r"optimizer.options.warm: .* takes no argument 'warm'"):
        client.submit(task, steps=5, optimizer={"name": "own_steps:RowSigns", "lr": 0.01, "options": {"warm": 3}})
    with pytest.raises(SpecError, match=r"optimizer.name: there is no module 'own_missing'"):
        client.submit(task, steps=5, optimizer={"name": "own_missing:RowSigns", "lr": 0.01})


def test_what_is_compressed_is_not_whole(client: Client, task: str) -> None:
    with pytest.raises(SpecError, match=r"needs whole parameters.*allowed: compression.name = none, or without clip"):
        client.submit(task, steps=5, optimizer={"name": "muon"}, compression={"name": "topk"})
