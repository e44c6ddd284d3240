"""Small tasks as people bring them: each keeps or writes something in a way of its own."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import nn

import steepest
from tests.support.brought_base import NUM_SAMPLES, WIDTH, Line, inputs, sums, task_of


class Rebinding(Line):
    """Keeps a running mean by binding another tensor each time."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.line(x - self.center)
        self.center = torch.lerp(self.center, x.detach().mean(0), 0.25)
        return out


def rebound_buffer() -> steepest.Task:
    """A buffer that forward binds anew."""
    return task_of(Rebinding())


class ThroughData(Line):
    """Keeps a large running mean by writing past its version."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(5000, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.line(x - self.center[0])
        self.center.data.lerp_(x.detach().mean(0).expand(5000, WIDTH), 0.25)
        return out


def buffer_through_data() -> steepest.Task:
    """A large buffer that forward writes to through `.data`."""
    return task_of(ThroughData())


class Growing(Line):
    """Its buffer grows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = torch.cat([self.seen, x.detach().mean().view(1)])
        return self.line(x)


def growing_buffer() -> steepest.Task:
    """A buffer of another shape after every pass."""
    return task_of(Growing())


class Counting(Line):
    """Warms up by a counter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.line(x) * min(1.0, self.calls / 10)


def counter() -> steepest.Task:
    """A counter in Python."""
    return task_of(Counting())


class Carrying(Line):
    """Carries what it computed into the next pass, outside of a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.line(x)
        if self.hidden is not None:
            out = out + 0.1 * self.hidden
        self.hidden = out.detach().mean(0)
        return out


def carried_state() -> steepest.Task:
    """A state between passes that is no buffer."""
    return task_of(Carrying())


def counter_in_a_closure() -> steepest.Task:
    """A loss that counts."""
    calls = [0]

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return (outputs - targets).square().mean() * calls[0]

    return task_of(nn.Linear(WIDTH, 1), loss)


class Caching(Line):
    """Keeps a table of the size of the largest batch so far."""

    def __init__(self) -> None:
        super().__init__()
        self.table: torch.Tensor | None = None
        self.tables: dict[int, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.table is None or len(self.table) < len(x):
            self.table = torch.linspace(0.9, 1.1, len(x)).unsqueeze(1)
        self.tables.setdefault(len(x), self.table)
        return self.line(x * self.table[: len(x)])


def cache() -> steepest.Task:
    """A cache that depends on the batches so far, those of evaluations too."""
    return task_of(Caching(), eval_data=steepest.ArrayData(inputs(), sums()))


class Expanded(Line):
    """A buffer whose elements share memory."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.arange(float(WIDTH)).expand(3, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.line(x + self.shift[0])


def expanded_buffer() -> steepest.Task:
    """A buffer that was made by expand."""
    return task_of(Expanded())


class Unordered(Line):
    """Registers buffers in an order of its own in every process."""

    def __init__(self) -> None:
        super().__init__()
        values = {"one": 1.0, "two": 2.0, "three": 3.0}
        for name in sorted(values, key=lambda name: random.Random(f"{id(self)}{name}").random()):
            self.register_buffer(name, torch.full((WIDTH,), values[name]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.line(x * self.two)


def buffers_in_any_order() -> steepest.Task:
    """Constant buffers in another order in each process."""
    return task_of(Unordered())


class HalfFrozen(nn.Module):
    """A frozen body in evaluation mode under a head that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.5))
        self.body.requires_grad_(False).eval()
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def frozen_in_evaluation_mode() -> steepest.Task:
    """Submodules that the task left in evaluation mode."""
    return task_of(HalfFrozen(), eval_data=steepest.ArrayData(inputs(), sums()))


class _WritesInForward(Line):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "in place":
            with torch.no_grad():
                self.line.weight.clamp_(-0.1, 0.1)
        elif self.how == "through data":
            self.line.weight.data.clamp_(-0.1, 0.1)
        elif self.how == "other memory":
            self.line.weight.data = self.line.weight.data.clone()
        return self.line(x)


def writes_to_a_parameter(how: str) -> steepest.Task:
    """A forward pass that changes a parameter."""
    if how == "max_norm":
        words = torch.randint(20, (NUM_SAMPLES, 3), generator=torch.Generator().manual_seed(1))
        model = nn.Sequential(nn.Embedding(20, 4, max_norm=0.5), nn.Flatten(), nn.Linear(12, 1))
        return task_of(model, train_data=steepest.ArrayData(words, words.float().mean(1, keepdim=True)))
    return task_of(_WritesInForward(how))


class _WritesLater(Line):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        if self.passes > 3:
            with torch.no_grad():
                self.line.weight.clamp_(-0.1, 0.1)
        return self.line(x)


def writes_to_a_parameter_later() -> steepest.Task:
    """A forward pass that changes a parameter from the fourth step on."""
    return task_of(_WritesLater())


class Tied(nn.Module):
    """An encoder, and a decoder over its memory."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(WIDTH, 2, bias=False)
        self.decoder = nn.Linear(2, WIDTH, bias=False)
        self.decoder.weight.data = self.encoder.weight.data.t()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder(x))


def tied_by_memory() -> steepest.Task:
    """Two parameters over one storage."""
    return task_of(Tied(), train_data=steepest.ArrayData(inputs(), inputs()))


def overlapping_parameters() -> steepest.Task:
    """Two parameters that share a part of their memory."""
    model = nn.Module()
    memory = torch.zeros(6)
    model.one, model.two = nn.Parameter(memory[:4]), nn.Parameter(memory[2:])
    return task_of(model)


def _without_bias(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    del state[prefix + "bias"]


class Hiding(nn.Linear):
    """Its state_dict does not show the bias."""

    def __init__(self) -> None:
        super().__init__(WIDTH, 1)
        self.register_state_dict_post_hook(_without_bias)


def hidden_parameter() -> steepest.Task:
    """A model whose state_dict hides a trained parameter."""
    return task_of(Hiding())


class Uncertainty(nn.Module):
    """A loss that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.register_buffer("floor", torch.tensor(0.1))

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return ((outputs - targets).square() + self.floor).mean() * (-self.log_scale).exp() + self.log_scale


def loss_that_learns() -> steepest.Task:
    """A loss with a parameter and a buffer of its own."""
    return task_of(nn.Linear(WIDTH, 1), Uncertainty())


def complex_buffer() -> steepest.Task:
    """A buffer that no checkpoint holds."""
    model = nn.Linear(WIDTH, 1)
    model.register_buffer("turn", torch.ones(2, dtype=torch.complex128))
    return task_of(model)
