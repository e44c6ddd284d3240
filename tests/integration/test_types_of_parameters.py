"""Models in half precision and with complex parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from harness.local_job import hashes, run_here, run_processes
from ps.checkpoint.files import State
from steepest.spec import DataSpec, TaskReference
from tests.support import brought
from tests.support.choices import full
from tests.support.submission import RefusedError, rehearsed, submitted
from worker.data.sampler import Sampler
from worker.data.sources import source_of
from worker.task.load import load_task

pytestmark = pytest.mark.cluster

BROUGHT = "tests.support.brought"
STEPS, LR = 6, 0.02
SIZE = brought.NUM_SAMPLES
OPTIMIZERS: dict[str, Any] = {
    "sgd": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "adagrad": (torch.optim.Adagrad, {}),
    "rmsprop": (torch.optim.RMSprop, {}),
}


def _config(directory: Path, function: str, optimizer: str, **raw: Any) -> Any:
    options = {"weight_decay": 0.1} if optimizer == "adamw" else {}
    return submitted(
        directory,
        f"{BROUGHT}:{function}",
        **{"steps": STEPS, "optimizer": {"name": optimizer, "lr": LR, **options}, "clip": {"norm": 0.5}, **raw},
    )


def _batches(task: Any) -> Any:
    source, data = source_of(task.train_data), DataSpec(global_batch=SIZE, micro_batch=SIZE)
    sampler = Sampler(SIZE, data, 0)
    return [source.batch(sampler.indices(step, 0)) for step in range(STEPS)]


def _task(function: str, **arguments: Any) -> Any:
    return load_task(TaskReference(module=BROUGHT, function=function, arguments=arguments), None, 0)


@pytest.mark.parametrize("optimizer", ["adamw", *map(full, ("sgd", "momentum", "adagrad", "rmsprop"))])
def test_complex_parameters_are_trained_as_torch_does(optimizer: str, tmp_path: Path) -> None:
    task = _task("complex_layer")
    parameters = list(task.model.parameters())
    make, options = OPTIMIZERS[optimizer]
    torchs = make(parameters, lr=LR, **options)
    for x, y in _batches(task):
        torchs.zero_grad()
        task.loss(task.model(x), y).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        torchs.step()
    here = run_here(_config(tmp_path / "here", "complex_layer", optimizer))
    two = run_processes(_config(tmp_path / "two", "complex_layer", optimizer, placement={"servers": 1}), 2)
    assert hashes(here) == hashes(two)
    for name, value in task.model.state_dict().items():
        assert here.model[name].dtype == value.dtype
        torch.testing.assert_close(here.model[name], value, rtol=2e-5, atol=2e-6)
    names = [name for name, _ in task.model.named_parameters()]
    for name, parameter in zip(names, parameters, strict=True):
        for key, value in torchs.state[parameter].items():
            if isinstance(value, torch.Tensor) and value.dim():
                got = here.optimizer[f"{name}.{key}"]
                assert got.dtype == value.dtype
                torch.testing.assert_close(got, value, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("function", ["complex_layer", full("half_model")])
def test_a_job_goes_on_from_its_checkpoint(function: str, tmp_path: Path) -> None:
    expected = run_here(_config(tmp_path / "whole", function, "adamw"))
    run_here(_config(tmp_path / "cut", function, "adamw", steps=3))
    assert hashes(run_here(_config(tmp_path / "cut", function, "adamw"))) == hashes(expected)


def _with_masters(function: str, dtype: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """The loop of Micikevicius et al. 2018, without a scale of the loss."""
    task = _task(function, dtype=dtype)
    named = dict(task.model.named_parameters())
    masters = {name: p.detach().float().clone() for name, p in named.items()}
    torchs = torch.optim.AdamW(list(masters.values()), lr=LR, weight_decay=0.1)
    for x, y in _batches(task):
        task.model.zero_grad()
        task.loss(task.model(x), y).backward()
        for name, p in named.items():
            assert p.grad is not None
            masters[name].grad = p.grad.float()
        torch.nn.utils.clip_grad_norm_(list(masters.values()), 0.5)
        torchs.step()
        with torch.no_grad():
            for name, p in named.items():
                p.copy_(masters[name])
    return task, masters


@pytest.mark.parametrize("dtype", ["bfloat16", full("float16")])
def test_models_in_half_precision_have_float32_masters(dtype: str, tmp_path: Path) -> None:
    def run(name: str, workers: int, **raw: Any) -> State:
        raw = {"arguments": {"dtype": dtype}, **raw}
        return run_processes(_config(tmp_path / name, "half_model", "adamw", **raw), workers)

    _, masters = _with_masters("half_model", dtype)
    whole = run("whole", 1, data={"micro_batch": SIZE})
    for name, value in masters.items():
        assert whole.model[name].dtype == torch.float32
        torch.testing.assert_close(whole.model[name], value, rtol=1e-3, atol=1e-4)
    parts = [run(f"{n}", n) for n in (1, 3)]
    assert hashes(parts[0]) == hashes(parts[1])
    task = _task("half_model", dtype=dtype)
    task.model.load_state_dict(whole.model)  # into a model of the same type
    assert task.model.body[0].weight.dtype == getattr(torch, dtype)


def test_it_is_said_that_there_are_masters() -> None:
    found = rehearsed(f"{BROUGHT}:half_model", steps=2)
    assert any(code == "float32_masters" and "bfloat16" in text for code, text in found.warnings)


@pytest.mark.parametrize(
    ("function", "raw", "words"),
    [
        ("complex_only_halves", {}, "complex32"),
        ("complex_layer", {"precision": "bf16"}, "complex parameters; allowed: full"),
        ("complex_layer", {"optimizer": {"name": "muon", "lr": 0.1}}, "complex"),
    ],
)
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_what_is_refused(function: str, raw: dict[str, Any], words: str) -> None:
    with pytest.raises(RefusedError, match=words):
        rehearsed(f"{BROUGHT}:{function}", steps=2, **raw)
