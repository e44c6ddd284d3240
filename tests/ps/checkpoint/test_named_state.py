from __future__ import annotations

import pytest
import torch
from torch import nn

import steepest
from ps.checkpoint.named_state import assemble, pack_buffers, restore, unpack_buffers
from ps.numerics.optimizer import StatePart
from ps.parameters.layout import build_layout
from ps.step.best import Standing
from worker.task.model import describe_model
from worker.task.state import TaskState


def _task() -> steepest.Task:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3, bias=False))
    model[2].weight = nn.Parameter(model[2].weight)
    model[0].bias.requires_grad_(False)
    model.register_buffer("mask", torch.arange(5), persistent=False)
    return steepest.Task(model=model, loss=nn.MSELoss(), train_data=steepest.ArrayData(torch.zeros(2, 3)))


def test_a_state_goes_flat_and_comes_back() -> None:
    task = _task()
    description = describe_model(task)
    layout = build_layout(description)
    own = TaskState.of(task)
    flat = torch.zeros(layout.numel)
    for placed, view in zip(layout.parameters, layout.views(flat), strict=True):
        view.copy_(own.parameters[placed.name].detach())
    packed = _packed(task)
    constants = pack_buffers(constant.detach() for constant in own.constants.values())
    parts = [StatePart("0.weight", "exp_avg", 5, torch.ones(7)), StatePart("0.weight", "step", 0, torch.ones(1))]
    state = assemble(description, layout, flat, packed, constants, parts, standing=Standing(3, 2))
    expected = task.model.state_dict()
    assert state.model.keys() == expected.keys()
    assert all(torch.equal(state.model[k], expected[k]) for k in expected)
    assert set(state.extra) == {"mask"}
    assert state.optimizer["0.weight.exp_avg"].shape == (4, 3)
    assert state.optimizer["0.weight.exp_avg"].view(-1).tolist() == [0.0] * 5 + [1.0] * 7
    back = restore(description, layout, state)
    assert torch.equal(back.flat, flat)
    assert (back.buffers, back.constants) == (packed, constants)


def test_buffers_of_another_length_are_refused() -> None:
    description = describe_model(_task())
    with pytest.raises(ValueError, match="bytes"):
        unpack_buffers(description, b"\0" * 3 + pack_buffers(unpack_buffers(description, _packed(_task())).values()))


def _packed(task: steepest.Task) -> bytes:
    return pack_buffers(place.tensor for place in TaskState.of(task).buffers.values() if place.tensor is not None)


def test_a_checkpoint_of_another_model_is_refused_by_name() -> None:
    description = describe_model(_task())
    layout = build_layout(description)
    state = assemble(
        description, layout, torch.zeros(layout.numel), _packed(_task()), b"\0" * 16, [], standing=Standing()
    )
    state.model["0.weight"] = torch.zeros(9, 9)
    with pytest.raises(ValueError, match=r"0\.weight has shape \(9, 9\)"):
        restore(description, layout, state)
