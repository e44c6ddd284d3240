"""Gradient checks: right gradients pass, one wrong entry is found, in small parameters and in large ones."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import steepest
from ps.parameters.description import ModelDescription
from steepest.spec import spec_from_dict
from tests.support.analysis import local_team
from worker.analysis import gradient_check
from worker.analysis.gradient_check import as_json, check_gradients, ridders
from worker.analysis.question import Question
from worker.analysis.team import Team
from worker.task.load import TaskError, load_task
from worker.task.model import describe_model

TASKS = __name__
SAMPLES = 8


def data(width: int) -> steepest.ArrayData:
    generator = torch.Generator().manual_seed(3)
    return steepest.ArrayData(
        torch.randn(32, width, generator=generator), torch.randint(0, 3, (32,), generator=generator)
    )


def mlp(width: int = 6) -> steepest.Task:
    model = nn.Sequential(nn.Linear(width, 5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 3))
    return steepest.Task(model=model, loss=nn.CrossEntropyLoss(), train_data=data(width))


def convnet() -> steepest.Task:
    model = nn.Sequential(
        nn.Unflatten(1, (1, 6, 6)), nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )
    return steepest.Task(model=model, loss=nn.CrossEntropyLoss(), train_data=data(36))


class Casting(nn.Module):
    """Names types of its own, as code for mixed precision does; way: for the logits."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self._way = way
        self.inner = nn.Linear(6, 3)
        self.raw = nn.Parameter(torch.ones(3))
        self._mask = torch.eye(3)[:, [0, 2, 1]]  # no buffer
        self._table = torch.tensor([1.0, 2.0, 3.0]).view(torch.int32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.inner(x) * torch.softmax(self.raw, 0, dtype=torch.float32) + torch.zeros(3)
        match self._way:
            case "method":
                return torch.tanh(logits.half()).float()
            case "to":
                return torch.fft.ifft(torch.fft.fft(logits.to(torch.bfloat16)).to(torch.complex64)).real
            case "name":
                return logits.type("torch.FloatTensor")
            case "inside":
                return torch.tanh(logits.type("torch.BFloat16Tensor")).double() * 2
            case "kept":
                masked = logits.type_as(self._mask) @ self._mask
                return torch.where(self._mask[0] > 0, masked, masked * self._table.view(torch.float32))
        raise AssertionError(self._way)


def casting(way: str) -> steepest.Task:
    return steepest.Task(model=Casting(way), loss=nn.CrossEntropyLoss(), train_data=data(6))


class _Wrong(torch.autograd.Function):
    """The identity, whose gradient is off by a ten-thousandth in one entry, or has that and the next one swapped."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, entry: int, swaps: bool) -> torch.Tensor:
        ctx.entry, ctx.swaps = entry, swaps
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        wrong = gradients[0].clone()
        if ctx.swaps:
            two = slice(ctx.entry, ctx.entry + 2)
            wrong.view(-1)[two] = gradients[0].reshape(-1)[two].flip(0)
        else:
            wrong.view(-1)[ctx.entry] *= 1 + 1e-4
        return wrong, None, None


class _Planted(nn.Module):
    def __init__(self, inputs: int, outputs: int, entry: int, *, swaps: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / math.sqrt(inputs))
        self._entry = entry
        self._swaps = swaps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ _Wrong.apply(self.weight, self._entry, self._swaps).T


class Unusual(nn.Module):
    """A perceptron that does one thing as few do. way: which."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self._way = way
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
        self.scale: torch.Tensor | None = None
        match way:
            case "rotated":
                self.register_buffer("rotation", torch.polar(torch.ones(3), torch.arange(3.0) + 0.5))
            case "complex":
                self.factor = nn.Parameter(torch.polar(torch.ones(3), torch.arange(3.0)))
            case "transposed" | "stopped":
                self.register_buffer("back", self.first.weight.data.t())
            case "tied":
                self.middle = nn.Linear(6, 6)
                self.middle.weight.data = self.first.weight.data
            case "held":
                self.mask = torch.ones(6, 6).tril()
            case "padded":
                nn.init.zeros_(self.first.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        match self._way:
            case "rotated":
                x = torch.view_as_real(torch.view_as_complex(self.first(x).unflatten(1, (3, 2))) * self.rotation)
                return self.last(torch.tanh(x.flatten(1)))
            case "complex":
                x = torch.view_as_real(torch.view_as_complex(self.first(x).unflatten(1, (3, 2))) * self.factor)
                return self.last(torch.tanh(x.flatten(1)))
            case "stopped":
                return self.last(torch.tanh(self.first(x) @ self.back))
            case "tied":
                return self.last(torch.tanh(self.middle(torch.tanh(self.first(x)))))
            case "held":
                return self.last(torch.tanh(self.first(x) @ self.mask + torch.from_numpy(np.ones(6, np.float32))))
            case "slope":
                point = x.detach().requires_grad_()
                [slope] = torch.autograd.grad(torch.tanh(self.first(point)).sum(), point, create_graph=True)
                return self.last(slope)
            case "cached":
                if self.scale is None:
                    with torch.no_grad():
                        self.scale = self.first.weight.std()
                return self.last(torch.tanh(self.first(x)) * self.scale)
            case "padded":
                keeps = torch.arange(len(x)).unsqueeze(1) > 1
                return self.last(torch.relu(self.first(torch.where(keeps, x, 0.0))))
        return self.last(torch.tanh(self.first(x)))


def unusual(way: str) -> steepest.Task:
    loss: Any = nn.CrossEntropyLoss()
    if way == "weighted":
        loss = functools.partial(nn.functional.cross_entropy, weight=torch.tensor([1.0, 2.0, 3.0]))
    elif way == "large":
        loss = _Beside()
    return steepest.Task(model=Unusual(way), loss=loss, train_data=data(6))


class _Beside(nn.Module):
    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs, targets) + 1e8


def planted(inputs: int = 6, hidden: int = 5, entry: int = 7, swaps: bool = False) -> steepest.Task:
    model = nn.Sequential(_Planted(inputs, hidden, entry, swaps=swaps), nn.Tanh(), nn.Linear(hidden, 3))
    return steepest.Task(model=model, loss=nn.CrossEntropyLoss(), train_data=data(inputs))


def analytic(error: float = 0.0) -> steepest.AnalyticTask:
    x, y = (array.numpy() for array in data(6).arrays)

    def gradient(parameters: Any, batch: Any) -> Any:
        inputs, targets = batch
        logits = inputs @ parameters["w"] + parameters["b"]
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
        chances = shifted / shifted.sum(axis=1, keepdims=True)
        rows = np.arange(len(targets))
        loss = -np.log(chances[rows, targets]).sum()
        chances[rows, targets] -= 1.0
        return loss, len(targets), {"w": inputs.T @ chances * (1 + error), "b": chances.sum(axis=0)}

    parameters = {"w": np.full((6, 3), 0.1, np.float32), "b": np.zeros(3, np.float32)}
    return steepest.AnalyticTask(parameters=parameters, gradient=gradient, train_data=steepest.ArrayData(x, y))


def team(function: str, size: int = 1, *, known: Mapping[str, Any] = MappingProxyType({}), **arguments: Any) -> Team:
    reference = {"module": TASKS, "function": function, "arguments": arguments}
    spec = spec_from_dict({"task": reference, "epochs": 1, "data": {"global_batch": SAMPLES, "micro_batch": SAMPLES}})
    model: ModelDescription = describe_model(load_task(spec.task, None, spec.seed))
    return local_team(Question(spec, model, SAMPLES, **known), size)


def test_ridders_finds_derivatives_to_the_end_of_float64() -> None:
    for function, derivative in ((math.exp, math.exp(0.7)), (math.sin, math.cos(0.7)), (lambda x: x**5, 5 * 0.7**4)):
        found = ridders(lambda h, f=function: (f(0.7 + h) - f(0.7 - h)) / (2 * h), 1e-1, 1.0)
        assert found.value == pytest.approx(derivative, rel=1e-10)


@pytest.mark.parametrize("function", ["mlp", "convnet", "analytic"])
def test_right_gradients_pass(function: str) -> None:
    its = team(function)
    found = check_gradients(its)
    assert found.passed
    assert found.largest < 1e-7
    assert found.looked_at == found.total == sum(p.numel for p in its.subject.layout.parameters)
    assert set(found.errors) == {p.name for p in its.subject.layout.parameters}


@pytest.mark.parametrize("way", ["method", "to", "kept"])
def test_types_that_a_model_names_are_float64_meanwhile(way: str) -> None:
    before = torch.get_default_dtype()
    assert check_gradients(team("casting", way=way)).largest < 1e-7
    assert check_gradients(team("casting", way=way), expected="forward", tolerance=1e-10).passed
    assert torch.get_default_dtype() is before


@pytest.mark.parametrize(("way", "dtype"), [("name", "float32"), ("inside", "bfloat16")])
def test_values_that_are_rounded_all_the_same_are_refused(way: str, dtype: str) -> None:
    with pytest.raises(TaskError, match=rf"has a value of torch\.{dtype} \(ToCopyBackward0\), though") as error:
        check_gradients(team("casting", way=way))
    assert error.value.field == "task.model"


@pytest.mark.parametrize("way", ["rotated", "complex", "transposed", "tied", "held", "slope", "weighted", "padded"])
def test_right_gradients_of_unusual_models_pass(way: str) -> None:
    its = team("unusual", way=way, known={"evaluates_with_gradients": way == "slope"})
    found = check_gradients(its)
    assert found.passed, as_json(found, its.subject)["worst"]
    assert (found.kinks > 0) == (way == "padded")


@pytest.mark.parametrize("way", ["rotated", "complex"])
def test_complex_numbers_stay_complex(way: str) -> None:
    task = unusual(way)
    its = team("unusual", way=way)
    x, y = (array[:SAMPLES] for array in task.train_data.arrays)
    its.subject.flat.copy_(_flat(task.model, its))
    assert its.subject.loss(0)[0] == pytest.approx(task.loss(task.model(x), y).item() * SAMPLES, rel=1e-6)


def _flat(model: nn.Module, its: Team) -> torch.Tensor:
    flat = torch.zeros_like(its.subject.flat)
    named = dict(model.named_parameters())
    for placed, view in zip(its.subject.layout.parameters, its.subject.layout.views(flat), strict=True):
        values = named[placed.name].detach()
        view.copy_(torch.view_as_real(values) if values.is_complex() else values)
    return flat


def test_a_gradient_that_stops_at_a_tensor_in_the_memory_of_a_parameter_is_found() -> None:
    found = check_gradients(team("unusual", way="stopped"))
    assert not found.passed
    assert found.largest > 0.01


def test_a_value_that_a_pass_keeps_does_not_hide_a_gradient_that_stops() -> None:
    assert not check_gradients(team("unusual", way="cached", known={"caches": ("scale",)})).passed


def test_errors_that_cancel_along_signs_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_check, "ALL_ENTRIES", 100)
    monkeypatch.setattr(gradient_check, "SOME", 4)
    monkeypatch.setattr(gradient_check, "LARGEST", 4)
    for entry in range(1000, 1012):
        assert not check_gradients(team("planted", inputs=60, hidden=40, entry=entry, swaps=True)).passed, entry


def test_what_differences_cannot_tell_is_no_wrong_gradient() -> None:
    words = r"of a loss of 1e\+08 do not tell the derivative by .*compare with forward mode"
    with pytest.raises(TaskError, match=words):
        check_gradients(team("unusual", way="large"))
    assert check_gradients(team("unusual", way="large"), expected="forward").passed


@pytest.mark.parametrize("function", ["mlp", "convnet"])
def test_forward_mode_agrees_with_backpropagation(function: str) -> None:
    its = team(function)
    assert check_gradients(its, expected="forward", tolerance=1e-10).passed


def test_one_wrong_entry_is_named() -> None:
    its = team("planted")
    found = check_gradients(its)
    assert not found.passed
    worst = as_json(found, its.subject)["worst"]
    assert (worst["parameter"], worst["index"]) == ("0.weight", [1, 1])
    assert worst["got"] / worst["expected"] == pytest.approx(1 + 1e-4, rel=1e-6)
    assert found.errors["2.weight"] < 1e-7


def test_one_wrong_entry_of_a_large_parameter_is_found_by_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_check, "ALL_ENTRIES", 100)
    monkeypatch.setattr(gradient_check, "SOME", 4)
    monkeypatch.setattr(gradient_check, "LARGEST", 4)
    its = team("planted", inputs=60, hidden=40, entry=1234)
    found = check_gradients(its)
    assert found.looked_at < 300
    worst = as_json(found, its.subject)["worst"]
    assert (worst["parameter"], worst["index"]) == ("0.weight", [1234 // 60, 1234 % 60])


def test_a_wrong_derivation_by_hand_is_named() -> None:
    its = team("analytic", error=1e-3)
    found = check_gradients(its)
    assert [name for name, error in found.errors.items() if error > found.tolerance] == ["w"]


def test_processes_do_not_change_the_result() -> None:
    assert check_gradients(team("mlp")) == check_gradients(team("mlp", 2)) == check_gradients(team("mlp", 3))
