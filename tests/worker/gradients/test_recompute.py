"""Activations that are computed again: the same gradients and buffers, and less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import steepest
from ps.parameters.layout import build_layout
from worker.gradients.backend import CpuBackend
from worker.gradients.recompute import RecomputeError, checkpoint_activations
from worker.gradients.torch_engine import TorchEngine
from worker.task.model import describe_model


class Residual(nn.Module):
    """A layer with batch norm and dropout, added to its input. rebinds: its batch counter is a new tensor each time."""

    def __init__(self, width: int, rebinds: bool = False) -> None:
        super().__init__()
        self.line = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(0.3)
        self._rebinds = rebinds
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self._rebinds:
            self.calls = self.calls + 1
        return inputs + self.drop(torch.relu(self.norm(self.line(inputs))))


class Blocks(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(6, width)
        self.blocks = nn.ModuleList(Residual(width, rebinds=True) for _ in range(5))
        self.last = nn.Linear(width, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.first(inputs)
        for block in self.blocks:
            hidden = block(hidden)
        return self.last(hidden)  # type: ignore[no-any-return]


def _sequence(width: int, layers: int = 9) -> nn.Module:
    return nn.Sequential(nn.Linear(6, width), *(Residual(width) for _ in range(layers)), nn.Linear(width, 1))


def _pass(model: nn.Module, how: str) -> tuple[torch.Tensor, bytes | None, float]:
    """(gradient, buffers, loss) of one pass."""
    inputs = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
    task = steepest.Task(model=model, loss=nn.MSELoss(), train_data=steepest.ArrayData(inputs, inputs[:, :1]))
    description = describe_model(task)
    layout = build_layout(description)
    engine = TorchEngine(task, description, layout, CpuBackend())
    if how:
        checkpoint_activations(model, how)
    flat, gradient = torch.zeros(2, layout.numel)
    engine.write_initial(flat)
    engine.bind(flat)
    for _ in range(2):  # the second starts from the buffers that it was given
        torch.manual_seed(7)
        measured = engine.gradient((inputs, inputs[:, :1]), 32, layout.views(gradient), add=False)
    return gradient, engine.buffers(), measured.loss


@pytest.mark.parametrize("width", [8, 400])  # of the larger, weight gradients are written in their place
@pytest.mark.parametrize(
    ("model", "how", "names"),
    [
        (_sequence, "sqrt", [""]),
        (_sequence, "all", [str(number) for number in range(11)]),
        (_sequence, "[2-4]", ["2", "3", "4"]),
        (Blocks, "all", [f"blocks.{number}" for number in range(5)]),
        (Blocks, "blocks.*", [f"blocks.{number}" for number in range(5)]),
    ],
)
def test_gradients_and_buffers_have_the_same_bits(model: Any, how: str, names: list[str], width: int) -> None:
    torch.manual_seed(0)
    plain = model(width)
    torch.manual_seed(0)
    again = model(width)
    expected = _pass(plain, "")
    found = _pass(again, how)
    assert torch.equal(found[0], expected[0])
    assert found[1:] == expected[1:]
    assert checkpoint_activations(model(width), how) == names


def test_what_is_computed_again_is_not_kept() -> None:
    kept: dict[str, int] = {}
    inputs = torch.randn(32, 6)
    for how in ("", "sqrt"):
        model = _sequence(64, layers=25)
        if how:
            checkpoint_activations(model, how)
        seen: dict[int, int] = {}

        def pack(tensor: torch.Tensor, seen: dict[int, int] = seen) -> torch.Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = model(inputs)
        kept[how] = sum(seen.values())
        assert outputs.requires_grad
    assert kept["sqrt"] * 3 < kept[""]


def test_a_sequence_within_a_sequence_is_computed_again_with_it() -> None:
    inner = nn.Sequential(*(nn.Linear(6, 6) for _ in range(5)))
    assert checkpoint_activations(nn.Sequential(inner, *(nn.Linear(6, 6) for _ in range(4))), "sqrt") == [""]


def test_without_gradients_nothing_is_different() -> None:
    model = _sequence(8)
    checkpoint_activations(model, "sqrt")
    with torch.no_grad():
        assert model(torch.randn(3, 6)).grad_fn is None


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("sqrt", r"sqrt needs an nn.Sequential of 4 or more layers.*allowed: all, or"),
        ("encoder.*", r"no module is called 'encoder.\*'; the model has first, blocks, blocks.0"),
    ],
)
def test_what_is_not_there_is_said(how: str, said: str) -> None:
    with pytest.raises(RecomputeError, match=said):
        checkpoint_activations(Blocks(4), how)
    with pytest.raises(RecomputeError, match=r"no nn.Sequential or nn.ModuleList of 4"):
        checkpoint_activations(nn.Linear(2, 2), "all")
