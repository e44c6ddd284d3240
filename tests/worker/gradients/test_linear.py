"""Gradients that are written where they are to lie: the same bits as autograd's, and autograd's rules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from worker.gradients.linear import MIN_NUMEL, write_directly

WIDTH = 384  # its square is large enough
assert WIDTH**2 >= MIN_NUMEL


class Places:
    """A place for each large weight, given out once a pass. taken: how often."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = {id(p): torch.full_like(p, torch.nan) for p in model.parameters() if p.numel() >= MIN_NUMEL}
        self.free = set(self.tensors)
        self.taken = 0

    def __call__(self, parameter: nn.Parameter) -> torch.Tensor | None:
        if id(parameter) not in self.free:
            return None
        self.free.discard(id(parameter))
        self.taken += 1
        return self.tensors[id(parameter)].detach()

    def holds(self, parameter: nn.Parameter) -> bool:
        place = self.tensors[id(parameter)]
        return parameter.grad is not None and parameter.grad.data_ptr() == place.data_ptr()


class Twice(nn.Module):
    """Uses one layer two times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.layer(torch.relu(self.layer(inputs)))
        return outputs


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, 3))


def attention() -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 4, 512, dropout=0.0, batch_first=True)


def _gradients(model: nn.Module, inputs: torch.Tensor) -> list[torch.Tensor]:
    for parameter in model.parameters():
        parameter.grad = None
    model(inputs).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("make", [plain, Twice, attention])
@pytest.mark.parametrize("shape", [(5, WIDTH), (2, 3, WIDTH)])
def test_the_bits_are_autograds(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = make()
    inputs = torch.randn(shape, requires_grad=True)
    expected = _gradients(model, inputs)
    of_inputs = inputs.grad
    inputs.grad = None
    places = Places(model)
    write_directly(model, places)
    found = _gradients(model, inputs)
    assert places.taken > 0
    assert all(map(torch.equal, found, expected))
    assert of_inputs is not None
    assert inputs.grad is not None
    assert torch.equal(inputs.grad, of_inputs)


def test_the_gradient_lies_in_its_place_and_was_not_moved() -> None:
    model = plain()
    places = Places(model)
    write_directly(model, places)
    _gradients(model, torch.randn(5, WIDTH))
    assert places.holds(model[0].weight)
    assert places.holds(model[2].weight)


def test_a_second_use_is_added_and_hooks_of_the_user_run() -> None:
    model = Twice()
    seen: list[torch.Tensor] = []
    model.layer.weight.register_hook(lambda g: seen.append(g.clone()) or 2 * g)
    inputs = torch.randn(5, WIDTH)
    expected = _gradients(model, inputs)
    write_directly(model, Places(model))
    found = _gradients(model, inputs)
    assert all(map(torch.equal, found, expected))
    assert torch.equal(seen[0], seen[1])


def test_a_gradient_of_a_gradient_goes_the_ordinary_way() -> None:
    model = plain()
    inputs = torch.randn(4, WIDTH, requires_grad=True)

    def penalty() -> list[torch.Tensor]:
        model.zero_grad()
        (gradient,) = torch.autograd.grad(model(inputs).square().sum(), inputs, create_graph=True)
        gradient.square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = penalty()
    places = Places(model)
    write_directly(model, places)
    found = penalty()
    assert len(found) == len(expected)
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch.func.jvp calls it
def test_modes_that_need_the_layer_as_it_is_get_it() -> None:
    model = plain()
    inputs = torch.randn(4, WIDTH)
    expected = model(inputs)
    places = Places(model)
    write_directly(model, places)
    with torch.no_grad():
        assert torch.equal(model(inputs), expected)
    parameters = dict(model.named_parameters())
    gradient = torch.func.grad(lambda p: torch.func.functional_call(model, p, (inputs,)).square().sum())(parameters)
    assert gradient["0.weight"].shape == (WIDTH, WIDTH)
    tangents = {n: torch.ones_like(p) for n, p in parameters.items()}
    torch.func.jvp(lambda p: torch.func.functional_call(model, p, (inputs,)), (parameters,), (tangents,))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(inputs).dtype == torch.bfloat16
    assert places.taken == 0


def test_small_frozen_and_derived_layers_are_left_alone() -> None:
    class Own(nn.Linear):
        pass

    frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
    model = nn.Sequential(nn.Linear(3, WIDTH), Own(WIDTH, WIDTH), frozen)
    places = Places(model)
    write_directly(model, places)
    _gradients(model, torch.randn(2, 3))
    assert places.taken == 0
    assert "forward" not in vars(model[0])
    assert "forward" not in vars(model[1])
    assert torch.equal(
        frozen(torch.ones(1, WIDTH)), functional.linear(torch.ones(1, WIDTH), frozen.weight, frozen.bias)
    )
