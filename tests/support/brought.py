"""Small tasks as people bring them: each keeps, writes, draws or weighs something in a way of its own."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler

import steepest
from tests.support.brought_base import NUM_SAMPLES, WIDTH, Line, inputs, sums, task_of
from tests.support.brought_losses import *  # noqa: F403
from tests.support.brought_parameters import *  # noqa: F403  # all are found under this module's name
from tests.support.brought_state import *  # noqa: F403
from tests.support.brought_types import *  # noqa: F403


def _classes() -> torch.Tensor:
    return torch.arange(NUM_SAMPLES) % 3


def _some_ignored() -> torch.Tensor:
    targets = _classes()
    targets[torch.arange(NUM_SAMPLES) % 5 < 3] = -100
    targets[16:24] = -100
    return targets


def ignored_targets(kind: str = "module") -> steepest.Task:
    """Cross entropy with targets that do not count: as a module, a function, or one of the user's."""

    def own(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(outputs, targets)

    losses = {"module": nn.CrossEntropyLoss(label_smoothing=0.1), "function": functional.cross_entropy, "own": own}
    data = steepest.ArrayData(inputs(), _some_ignored())
    return steepest.Task(model=nn.Linear(WIDTH, 3), loss=losses[kind], train_data=data)


def weighed_classes() -> steepest.Task:
    """Classes of different weight."""
    data = steepest.ArrayData(inputs(), _classes())
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 5.0]))
    return steepest.Task(model=nn.Linear(WIDTH, 3), loss=loss, train_data=data)


def said_weight() -> steepest.Task:
    """A loss of the user's whose weight the task states."""
    data = steepest.ArrayData(inputs(), _some_ignored())
    return steepest.Task(
        model=nn.Linear(WIDTH, 3),
        loss=lambda outputs, targets: functional.cross_entropy(input=outputs, target=targets),
        loss_weight=lambda batch: (batch[1] != -100).sum(),
        train_data=data,
    )


def contrastive() -> steepest.Task:
    """A loss that compares the samples of a batch."""

    def in_batch(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(outputs @ targets.t(), torch.arange(len(outputs)))

    return task_of(nn.Linear(WIDTH, WIDTH), in_batch, train_data=steepest.ArrayData(inputs(), inputs()))


def loss_of_each_sample() -> steepest.Task:
    """A loss that returns a vector."""
    return task_of(nn.Linear(WIDTH, 1), lambda outputs, targets: (outputs - targets).square().mean(1))


def clamped_gradients() -> steepest.Task:
    """A hook that is not linear in the gradient, so that micro-batches do not add up."""
    model = nn.Linear(WIDTH, 1)
    model.weight.register_hook(lambda gradient: gradient.sign())
    return task_of(model)


def draws_in_numpy() -> steepest.Task:
    """A split that NumPy and random draw."""
    rows = np.random.permutation(NUM_SAMPLES)[:48].tolist()
    random.shuffle(rows)
    return task_of(nn.Linear(WIDTH, 1), train_data=steepest.ArrayData(inputs()[rows], sums()[rows]))


def another_in_every_process() -> steepest.Task:
    """Data that nothing seeds."""
    rows = np.random.default_rng().permutation(NUM_SAMPLES)
    return task_of(nn.Linear(WIDTH, 1), train_data=steepest.ArrayData(inputs()[rows], sums()[rows]))


class _OwnGenerator(Dataset[Any]):
    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> Any:
        return inputs()[index] + torch.randn(WIDTH, generator=self.generator), sums()[index]


def data_with_a_generator() -> steepest.Task:
    """A dataset that draws from a generator of its own."""
    return task_of(nn.Linear(WIDTH, 1), train_data=_OwnGenerator())


def noisy_hook() -> steepest.Task:
    """torch's own modules, with a hook that draws."""
    model = nn.Linear(WIDTH, 1)
    model.weight.register_hook(lambda gradient: gradient * (1 + 0.1 * random.random()))
    return task_of(model)


def metric_that_raises() -> steepest.Task:
    """A metric with a mistake."""

    def accuracy(outputs: Any, targets: Any) -> float:
        raise KeyError("acuracy")

    return task_of(nn.Linear(WIDTH, 1), eval_data=steepest.ArrayData(inputs(), sums()), metrics={"accuracy": accuracy})


def metric_that_raises_later() -> steepest.Task:
    """A metric that fails when the job is almost over."""

    class Model(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                self.passes += 1
            return super().forward(x)

    model = Model(WIDTH, 1)
    model.register_buffer("passes", torch.zeros(()))

    def late(outputs: Any, targets: Any) -> float:
        return {0: 1.0}[int(model.passes)]

    return task_of(model, eval_data=steepest.ArrayData(inputs(), sums()), metrics={"late": late})


def last_batch_of_one() -> steepest.Task:
    """The last micro-batch has one sample, which batch norm cannot use."""
    model = nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    rows = NUM_SAMPLES + 1
    return task_of(model, train_data=steepest.ArrayData(inputs(rows), sums(rows)))


def loss_that_differentiates() -> steepest.Task:
    """A physics-informed loss, in evaluations too."""

    def residual(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        x = batch.clone().requires_grad_(True)
        u = model(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return (slope.sum(1, keepdim=True) + u).square().mean()

    model = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 1))
    data = steepest.ArrayData(inputs())
    return steepest.Task(model=model, batch_loss=residual, train_data=data, eval_data=data)


class Record(NamedTuple):
    """A sample with names."""

    inputs: torch.Tensor
    labels: torch.Tensor


class _Records(Dataset[Any]):
    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> Any:
        x, y = inputs()[index], sums()[index]
        return {"dict": {"inputs": x, "labels": y}, "named tuple": Record(x, y), "tuple": (x, y)}[self.kind]


class OwnLoss(Line):
    """Takes the batch's entries as arguments and returns its loss."""

    def __init__(self, returns: str) -> None:
        super().__init__()
        self.returns = returns

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> Any:
        outputs = self.line(inputs)
        loss = (outputs - labels).square().mean()
        match self.returns:
            case "object":
                return SimpleNamespace(loss=loss, logits=outputs)
            case "dict":
                return {"loss": loss, "logits": outputs}
        return loss, outputs


def own_loss(kind: str = "dict", returns: str = "object") -> steepest.Task:
    """A model that returns its loss."""
    return steepest.Task(model=OwnLoss(returns), train_data=_Records(kind))


class TwoInputs(Line):
    """Takes two inputs."""

    def forward(self, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return self.line(x + shift)


def three_entries() -> steepest.Task:
    """Batches of two inputs and a target."""
    return task_of(TwoInputs(), train_data=steepest.ArrayData(inputs(), torch.ones(NUM_SAMPLES, 1), sums()))


def loader(kind: str = "shuffled") -> steepest.Task:
    """A DataLoader."""
    data = TensorDataset(inputs(), sums())
    weights = torch.linspace(0.1, 1.0, NUM_SAMPLES).tolist()
    chosen: dict[str, Any] = {
        "shuffled": {"shuffle": True, "batch_size": 16, "drop_last": True},
        "weighted": {"sampler": WeightedRandomSampler(weights, 40), "batch_size": 8},
        "collated": {"batch_size": 16, "collate_fn": lambda rows: tuple(map(torch.stack, zip(*rows, strict=True)))},
        "batches": {"batch_sampler": [[0, 1], [2, 3]]},
    }
    return task_of(nn.Linear(WIDTH, 1), train_data=DataLoader(data, **chosen[kind]))


class Stream(IterableDataset[Any]):
    """Samples in order, each with noise."""

    def __init__(self, *, noise: bool = True) -> None:
        self.noise = noise

    def __iter__(self) -> Any:
        for x, y in zip(inputs(), sums(), strict=True):
            yield x + (torch.randn(WIDTH) * 0.1 if self.noise else 0.0), y


def stream(kind: str = "plain") -> steepest.Task:
    """Data that can only be iterated."""
    data: Any = Stream()
    if kind == "loader":
        data = DataLoader(Stream(noise=False), batch_size=16)
    elif kind == "generator":
        data = iter(Stream())
    elif kind == "bare":
        data = Stream(noise=False)
    return task_of(nn.Linear(WIDTH, 1), train_data=data, eval_data=Stream(noise=False))


def plain_line() -> steepest.Task:
    """A line."""
    return task_of(nn.Linear(WIDTH, 1))


def frozen_backbone(width: int = 512) -> steepest.Task:
    """A frozen layer under one that learns."""
    model = nn.Sequential(nn.Linear(WIDTH, width).requires_grad_(False), nn.ReLU(), nn.Linear(width, 1))
    return task_of(model)


def hugging_face(kind: str = "map") -> steepest.Task:
    """A data set whose batches are dicts: `map` is indexed, `stream` is read in order."""
    from datasets import Dataset as Table

    rows = {"x": inputs().tolist(), "y": sums().tolist()}
    table: Any = Table.from_dict(rows).with_format("torch")
    if kind == "stream":
        table = table.to_iterable_dataset(num_shards=4)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return functional.mse_loss(model(batch["x"]), batch["y"])

    return steepest.Task(model=nn.Linear(WIDTH, 1), batch_loss=loss, train_data=table)


def arrays_of_pairs() -> steepest.Task:
    """The rows of `hugging_face`."""
    return task_of(nn.Linear(WIDTH, 1))


class NumPyNoise(nn.Module):
    """Every layer scales by what NumPy draws."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Scaled() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.sum(1, keepdim=True)


class _Scaled(Line):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.line(x * float(np.random.rand()))


def deep(layers: int = 16, kind: str = "sequence") -> steepest.Task:
    """Many layers of a sequence, or of a list."""
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Tanh()) for _ in range(layers)]
    if kind == "sequence":
        return task_of(nn.Sequential(*blocks, nn.Linear(WIDTH, 1)))

    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.last = nn.ModuleList(blocks), nn.Linear(WIDTH, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return self.last(x)

    return task_of(Listed())


def numpy_noise() -> steepest.Task:
    """A forward pass with NumPy's random numbers, which a second pass draws anew."""
    return task_of(NumPyNoise())
