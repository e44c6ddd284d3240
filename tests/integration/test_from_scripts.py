"""The examples that come from scripts: after 100 steps a job is where the script's own loop is."""

from __future__ import annotations

import inspect
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.local_job import run_here
from steepest.spec import TaskReference
from steepest.task import Task
from tests.support.choices import full
from tests.support.submission import submitted
from worker.data.sampler import Sampler
from worker.data.sources import source_of
from worker.gradients.backend import CpuBackend
from worker.gradients.losses import loss_of
from worker.gradients.seeding import COMPUTE, DATA, seed_all
from worker.task.load import load_task

pytestmark = pytest.mark.cluster

STEPS = 100
SPECS: dict[str, dict[str, Any]] = {
    "digits": {},
    "gpt2": {},
    "bert": {},
    "resnet": {"optimizer": {"name": "momentum", "lr": 0.05}},
    "gcn": {"data": {"global_batch": 200}},
    "vae": {},
    "lstm": {"data": {"global_batch": 16, "shuffle": False}},
    "recommender": {"optimizer": {"name": "sgd", "lr": 0.1}},
    "lora": {},
    "lightning_module": {},
}
QUICK = ("vae", "recommender")


def _loaded(name: str) -> Task:
    task = load_task(TaskReference(module=f"examples.from_scripts.{name}", function="task"), None, 0)
    assert isinstance(task, Task)
    return task


@pytest.mark.parametrize("name", [*QUICK, *(full(name) for name in SPECS if name not in QUICK)])
def test_a_job_is_where_the_loop_is(name: str, tmp_path: Path) -> None:
    raw = {"optimizer": {"name": "adamw", "lr": 1e-3}, **SPECS[name]}
    config = submitted(tmp_path, f"examples.from_scripts.{name}:task", steps=STEPS, placement={"max_workers": 1}, **raw)
    state = run_here(config)
    task, spec, backend = _loaded(name), config.spec, CpuBackend()
    trained = [p for p in task.model.parameters() if p.requires_grad]
    make: dict[str, Any] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
    make["momentum"] = partial(torch.optim.SGD, momentum=0.9)
    optimizer = make[spec.optimizer.name](trained, lr=spec.optimizer.base_lr)
    source, loss = source_of(task.train_data, task.collate), loss_of(task)
    sampler = Sampler(config.num_samples, spec.data, spec.seed, source.order(spec.seed))
    task.model.train()
    for step in range(STEPS):
        indices = sampler.indices(step, 0)
        seed_all(spec.seed, DATA, step, 0, backend=backend)
        batch = source.batch(indices)
        seed_all(spec.seed, COMPUTE, step, 0, backend=backend)
        found = loss(batch, len(indices))
        optimizer.zero_grad()
        (found.value * found.factor / found.weight).backward()
        optimizer.step()
    after = _loaded(name)
    after.model.load_state_dict(state.model)
    batch = source.batch(sampler.indices(0, 0))
    values = []
    for model in (task, after):
        model.model.eval()
        seed_all(0, COMPUTE, 0, 0, backend=backend)
        measured = loss_of(model)(batch, len(sampler.indices(0, 0)))
        values.append(float(measured.value.detach()) * measured.factor / measured.weight)
    assert values[1] == pytest.approx(values[0], rel=1e-5)


@pytest.mark.parametrize("name", SPECS)
def test_what_is_added_to_a_script_is_short(name: str) -> None:
    module = import_module(f"examples.from_scripts.{name}")
    assert callable(module.main)
    assert len(inspect.getsourcelines(module.task)[0]) <= 15
