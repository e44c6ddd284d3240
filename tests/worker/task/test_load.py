from __future__ import annotations

import zipfile
from io import BytesIO
from pathlib import Path

import pytest
import torch
from torch import nn

import steepest
from ps.job.code import unpack_code
from steepest.spec import TaskReference
from worker.task.load import TaskError, load_task
from worker.task.model import describe_model, num_samples


def _load(function: str, module: str = "tests.support.tasks", **arguments: object) -> object:
    return load_task(TaskReference(module=module, function=function, arguments=arguments), None, 3)  # type: ignore[arg-type]


def test_the_function_is_called_right_after_the_seed() -> None:
    task = _load("regression", rows=20)
    assert isinstance(task, steepest.Task)
    assert len(task.train_data) == 20
    torch.manual_seed(3)
    from tests.support.tasks import regression

    expected = regression(rows=20).model.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in task.model.state_dict().items())


@pytest.mark.parametrize(
    ("function", "arguments", "field", "words"),
    [
        ("nothing_here", {}, "task.function", ["nothing_here", "regression"]),
        ("raises", {}, "task.function", ["KeyError", "no such column"]),
        ("returns_nothing", {}, "task.function", ["NoneType", "steepest.Task"]),
        ("exits", {}, "task.function", ["SystemExit", "7"]),
        ("regression", {"depth": 3}, "task.arguments.depth", ["depth", "rows", "hidden"]),
        ("misbehaving", {}, "task.arguments.how", ["needs", "how"]),
    ],
)
def test_what_is_wrong_is_named(function: str, arguments: dict[str, object], field: str, words: list[str]) -> None:
    with pytest.raises(TaskError) as caught:
        _load(function, **arguments)
    assert caught.value.field == field
    assert all(word in caught.value.message for word in words), caught.value.message


def test_the_traceback_is_the_users_own() -> None:
    with pytest.raises(TaskError) as caught:
        _load("raises")
    assert 'raise KeyError("no such column")' in caught.value.traceback
    assert "worker/task/load.py" not in caught.value.traceback


def test_a_module_that_is_not_there() -> None:
    with pytest.raises(TaskError, match="there is no module 'nowhere'"):
        _load("f", module="nowhere")


def test_a_module_that_needs_one_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_more.py").write_text("import surely_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TaskError, match="needs the module 'surely_not_installed'"):
        _load("f", module="needs_more")


def _described(model: nn.Module) -> object:
    return describe_model(steepest.Task(model=model, loss=nn.MSELoss(), train_data=[1]))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.ReLU(), "no trainable parameters"),
        (nn.Linear(2, 2).requires_grad_(False), "no trainable parameters"),
        (nn.LazyLinear(3), "has no shape yet"),
        (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()), "all float32 or all float64"),
        ("no model", "must be a torch.nn.Module"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        _described(model)


def test_tied_parameters_count_once_and_appear_twice() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    description = describe_model(steepest.Task(model=model, loss=nn.MSELoss(), train_data=[1]))
    assert [p.name for p in description.parameters] == ["0.weight"]
    assert description.state_names == (("0.weight", "0.weight"), ("1.weight", "0.weight"))


def test_frozen_parameters_and_buffers_are_state() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].bias.requires_grad_(False)
    description = describe_model(steepest.Task(model=model, loss=nn.MSELoss(), train_data=[1]))
    assert {b.name: b.dtype for b in description.buffers}["1.num_batches_tracked"] == "int64"
    assert [c.name for c in description.constants] == ["0.bias"]


def test_data_without_samples_or_length() -> None:
    with pytest.raises(TaskError, match="eval_data is empty"):
        num_samples([], "eval_data")
    with pytest.raises(TaskError, match="can be read only once"):
        num_samples(iter([1]), "train_data")


def _archive(name: str) -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, "x = 1\n")
    return buffer.getvalue()


def test_a_bundle_is_unpacked_once(tmp_path: Path) -> None:
    first = unpack_code(_archive("train.py"), tmp_path)
    assert (first / "train.py").read_text() == "x = 1\n"
    assert unpack_code(_archive("train.py"), tmp_path) == first
    assert list(tmp_path.iterdir()) == [first]


@pytest.mark.parametrize("name", ["../escape.py", "/tmp/escape.py"])
def test_a_bundle_that_leaves_its_directory_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="leaves its directory"):
        unpack_code(_archive(name), tmp_path)
    assert list(tmp_path.iterdir()) == []
