"""The rule for all code: what plain PyTorch gives, and the same bits at any placement."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harness.local_job import hashes, run_here, run_processes, running
from ps.checkpoint.files import State, newest_valid
from ps.numerics.schedule import learning_rate
from steepest.spec import TaskReference
from steepest.task import Task
from tests.support import brought
from tests.support.choices import full
from tests.support.submission import RefusedError, spec_of, submitted
from worker.data.sampler import Sampler
from worker.data.sources import source_of
from worker.gradients.losses import call_with
from worker.process.loop import WorkerLoop
from worker.task.load import TaskError, load_task

pytestmark = pytest.mark.cluster

BROUGHT = "tests.support.brought"
STEPS, LR = 5, 0.05
SPEC: dict[str, Any] = {"steps": STEPS, "optimizer": {"name": "sgd", "lr": LR}}
WHOLE = {"data": {"micro_batch": brought.NUM_SAMPLES}}

KINDS: dict[str, dict[str, Any]] = {
    "rebound_buffer": {**WHOLE},
    "buffer_through_data": {**WHOLE},
    "expanded_buffer": {},
    "frozen_in_evaluation_mode": {"eval_every": 2},
    "tied_by_memory": {},
    "hidden_parameter": {},
    "loss_that_learns": {},
    "ignored_targets": {},
    "weighed_classes": {},
    "said_weight": {},
    "contrastive": {**WHOLE},
    "loss_of_each_sample": {},
    "loss_that_differentiates": {"eval_every": 2},
    "draws_in_numpy": {"data": {"global_batch": 48}},
    "own_loss": {},
    "three_entries": {},
    "frozen_backbone": {},
    "momentum_encoder": {**WHOLE},
    "unreached_parameters": {"optimizer": {"name": "adamw", "lr": LR, "weight_decay": 0.5}},
}


def _run(directory: Path, function: str, workers: int, **raw: Any) -> State:
    config = submitted(directory / f"{workers}", f"{BROUGHT}:{function}", **{**SPEC, **raw})
    return run_processes(config, workers)


def _run_here(directory: Path, function: str, **raw: Any) -> State:
    return run_here(submitted(directory / "here", f"{BROUGHT}:{function}", **{**SPEC, **raw}))


def _plain(function: str, arguments: dict[str, Any] | None = None) -> dict[str, torch.Tensor]:
    """The loop that anybody would write, over the same order of the samples."""
    task = load_task(TaskReference(module=BROUGHT, function=function, arguments=arguments or {}), None, 0)
    assert isinstance(task, Task)
    model, loss = task.model, task.loss
    modes = {module: module.training for module in model.modules()}
    roots = [model, *([loss] if isinstance(loss, nn.Module) else [])]
    parameters = [p for root in roots for p in root.parameters() if p.requires_grad]
    optimizer: Any = torch.optim.SGD(parameters, lr=LR)
    if KINDS[function].get("optimizer", {}).get("name") == "adamw":
        optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.5)
    size = len(task.train_data)
    data = whole_steps(size)
    source, sampler = source_of(task.train_data), Sampler(size, data, 0)
    for step in range(STEPS):
        batch = source.batch(sampler.indices(step, 0))
        if task.batch_loss is not None:
            value = task.batch_loss(model, batch)
        elif loss is None:
            value = call_with(model, batch).loss
        else:
            *inputs, targets = batch
            value = loss(model(*inputs), targets).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert modes == {module: module.training for module in model.modules()}
    return {**model.state_dict(), **{n: p.detach() for n, p in model.named_parameters()}}


def whole_steps(size: int) -> Any:
    """A step over all samples."""
    from steepest.spec import DataSpec

    return DataSpec(global_batch=size, micro_batch=size)


QUICK = ("rebound_buffer", "frozen_in_evaluation_mode", "tied_by_memory", "loss_that_learns", "ignored_targets")


@pytest.mark.parametrize("function", [*QUICK, *(full(name) for name in KINDS if name not in QUICK)])
def test_a_job_gives_what_plain_pytorch_gives(function: str, tmp_path: Path) -> None:
    state = _run(tmp_path, function, 2, **KINDS[function])
    assert hashes(_run_here(tmp_path, function, **KINDS[function])) == hashes(state)
    expected = _plain(function)
    got = {**state.extra, **state.model}
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=2e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "function",
    ["cache", "stream", "loader", *map(full, ("buffers_in_any_order", "rebound_buffer in parts", "noisy_hook"))],
)
def test_the_bits_are_the_same_at_any_placement(function: str, tmp_path: Path) -> None:
    name = function.partition(" ")[0]
    raw = {"eval_every": 2} if name == "cache" else KINDS.get(function, {})
    if name != function:
        raw = {}
    assert hashes(_run_here(tmp_path, name, **raw)) == hashes(_run(tmp_path, name, 2, **raw))


@pytest.mark.parametrize(("kind", "returns"), [("named tuple", "dict"), ("tuple", "tuple"), ("dict", "dict")])
def test_batches_and_losses_as_they_come(kind: str, returns: str, tmp_path: Path) -> None:
    state = _run_here(tmp_path, "own_loss", arguments={"kind": kind, "returns": returns})
    expected = _plain("own_loss")
    torch.testing.assert_close(state.model["line.weight"], expected["line.weight"], rtol=2e-5, atol=2e-6)


def test_a_momentum_encoder_may_bind_anew(tmp_path: Path) -> None:
    in_place, anew = (_run_here(tmp_path, "momentum_encoder", arguments={"rebinds": r}, **WHOLE) for r in (False, True))
    torch.testing.assert_close(in_place.model["teacher.weight"], anew.model["teacher.weight"])


@pytest.mark.parametrize("optimizer", ["adamw", "momentum"])
def test_groups_of_parameters_are_torchs(optimizer: str, tmp_path: Path) -> None:
    raw: dict[str, Any] = {
        "optimizer": {"name": optimizer, "lr": LR, "weight_decay": 0.3},
        "schedule": {"name": "cosine"},
    }
    state = _run(tmp_path, "grouped", 2, **raw)
    assert hashes(_run_here(tmp_path, "grouped", placement={"servers": 2}, **raw)) == hashes(state)
    task = load_task(TaskReference(module=BROUGHT, function="grouped"), None, 0)
    assert isinstance(task, Task)
    model = task.model
    named = dict(model.named_parameters())
    frozen = {n: p.detach().clone() for n, p in named.items() if n.startswith("0.")}
    options: dict[str, Any] = {"lr": LR, "weight_decay": 0.3}
    biases = [p for n, p in named.items() if n in ("2.bias", "4.bias")]
    groups = [{"params": [named["4.weight"]]}, {"params": biases, "weight_decay": 0.0}]
    groups.append({"params": [named["2.weight"]], "lr": LR * 0.1})
    make: Any = torch.optim.AdamW if optimizer == "adamw" else partial(torch.optim.SGD, momentum=0.9)
    torchs = make(groups, **options)
    first = [group["lr"] for group in torchs.param_groups]
    source, sampler = source_of(task.train_data), Sampler(brought.NUM_SAMPLES, whole_steps(brought.NUM_SAMPLES), 0)
    for step in range(STEPS):
        factor = learning_rate(1.0, spec_of(f"{BROUGHT}:grouped", steps=STEPS, **raw).schedule, step, STEPS)
        for group, lr in zip(torchs.param_groups, first, strict=True):
            group["lr"] = lr * factor
        x, y = source.batch(sampler.indices(step, 0))
        torchs.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        torchs.step()
    for name, value in {**named, **frozen}.items():
        torch.testing.assert_close(state.model[name], value.detach(), rtol=2e-5, atol=2e-6)


def test_a_schedule_of_the_tasks_is_torchs(tmp_path: Path) -> None:
    state = _run(tmp_path, "own_schedule", 2)
    with pytest.raises(RefusedError, match="the task has a schedule of its own"):
        submitted(tmp_path / "two", f"{BROUGHT}:own_schedule", schedule={"name": "linear"}, steps=3)
    task = load_task(TaskReference(module=BROUGHT, function="own_schedule"), None, 0)
    assert isinstance(task, Task)
    assert task.schedule is not None
    optimizer = torch.optim.SGD(task.model.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, task.schedule)
    source, sampler = source_of(task.train_data), Sampler(brought.NUM_SAMPLES, whole_steps(brought.NUM_SAMPLES), 0)
    for step in range(STEPS):
        x, y = source.batch(sampler.indices(step, 0))
        optimizer.zero_grad()
        nn.functional.mse_loss(task.model(x), y).backward()
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(state.model["weight"], task.model.state_dict()["weight"], rtol=2e-5, atol=2e-6)


def test_a_job_begins_with_the_weights_of_another(tmp_path: Path) -> None:
    first = _run_here(tmp_path / "first", "grouped")
    written, _ = newest_valid(tmp_path / "first" / "here") or pytest.fail("no checkpoint")
    file = str(written.path / "model.safetensors")
    again = _run_here(tmp_path / "again", "grouped", init_from=file, optimizer={"name": "sgd", "lr": 1e-12})
    for name, value in first.model.items():
        torch.testing.assert_close(again.model[name], value, rtol=0, atol=1e-9)
    torch.save(first.model, tmp_path / "state.pt")
    as_state_dict = _run_here(tmp_path / "pt", "grouped", init_from=str(tmp_path / "state.pt"))
    assert hashes(as_state_dict) == hashes(_run_here(tmp_path / "safetensors", "grouped", init_from=file))
    with pytest.raises(RefusedError, match=r"has nothing for .* and has what the model has not.*init_strict = false"):
        submitted(tmp_path / "other", f"{BROUGHT}:plain_line", init_from=file, steps=1)
    with pytest.raises(RefusedError, match=r"nothing in .* has a name of the model's"):
        submitted(tmp_path / "other", f"{BROUGHT}:plain_line", init_from=file, init_strict=False, steps=1)
    with pytest.raises(RefusedError, match="cannot be loaded: FileNotFoundError"):
        submitted(tmp_path / "none", f"{BROUGHT}:plain_line", init_from="/nowhere.safetensors", steps=1)


def test_what_shares_memory_stays_so(tmp_path: Path) -> None:
    state = _run(tmp_path, "tied_by_memory", 2)
    assert torch.equal(state.model["decoder.weight"], state.model["encoder.weight"].t())


def test_a_loss_that_learns_is_exported(tmp_path: Path) -> None:
    state = _run(tmp_path, "loss_that_learns", 2)
    assert state.model["loss.log_scale"] != 0
    assert "loss.floor" in {**state.extra, **state.model}


def test_frozen_parameters_are_in_the_checkpoint_and_stay_what_they_were(tmp_path: Path) -> None:
    state = _run(tmp_path, "frozen_backbone", 2)
    task = load_task(TaskReference(module=BROUGHT, function="frozen_backbone"), None, 0)
    assert isinstance(task, Task)
    assert torch.equal(state.model["0.weight"], task.model.state_dict()["0.weight"])


def test_the_workers_of_a_host_have_frozen_parameters_in_memory_once(tmp_path: Path) -> None:
    """20 MiB of them: little of what two workers have mapped there is of their own."""
    config = submitted(tmp_path, f"{BROUGHT}:frozen_backbone", **{**SPEC, "steps": 4000}, arguments={"width": 1 << 20})
    nbytes = (1 << 20) * (brought.WIDTH + 1) * 4
    assert sum(constant.nbytes for constant in config.model.constants) == nbytes
    with running(config, 2) as job:
        job.wait_for_step(3)
        for process in job.workers.values():
            mapped = _of_mappings(process.pid, "steepest-parameters")
            assert mapped["Rss"] >= nbytes
            assert mapped["Anonymous"] < nbytes / 8


def _of_mappings(pid: int, label: str) -> dict[str, int]:
    """Bytes of a process's mappings of that name, by what smaps calls them."""
    found: dict[str, int] = {}
    counts = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        what, *rest = line.split()
        if not what.endswith(":"):
            counts = label in line
        elif counts and rest[-1] == "kB":
            found[what[:-1]] = found.get(what[:-1], 0) + int(rest[0]) * 1024
    return found


@pytest.mark.parametrize(
    "function", ["hidden_parameter", *map(full, ("frozen_backbone", "tied_by_memory", "loss_that_learns"))]
)
def test_a_job_goes_on_from_a_checkpoint_with_what_state_dict_hides(function: str, tmp_path: Path) -> None:
    at_once = _run_here(tmp_path / function / "a", function, steps=6)
    directory = tmp_path / function / "b"
    first = submitted(directory, f"{BROUGHT}:{function}", **{**SPEC, "steps": 3})
    run_here(first)
    second = submitted(directory, f"{BROUGHT}:{function}", **{**SPEC, "steps": 6})
    assert hashes(run_processes(second, 2)) == hashes(at_once)


def test_another_task_in_every_process_is_refused_by_name(tmp_path: Path) -> None:
    config = submitted(tmp_path, f"{BROUGHT}:another_in_every_process", **SPEC)
    from worker.gradients.backend import CpuBackend

    with pytest.raises(TaskError, match=r"train_data\[\d+\]\[0\] is not as it was when the job was submitted.*seeded"):
        WorkerLoop(config, "worker-0", 0, None, CpuBackend())
