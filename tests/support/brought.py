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

NUM_SAMPLES, WIDTH = 64, 4


def inputs(rows: int = NUM_SAMPLES) -> torch.Tensor:
    """Samples."""
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(7))


def sums(rows: int = NUM_SAMPLES) -> torch.Tensor:
    """Their targets."""
    return inputs(rows).sum(1, keepdim=True)


def _task(model: nn.Module, loss: Any = None, **more: Any) -> steepest.Task:
    more.setdefault("train_data", steepest.ArrayData(inputs(), sums()))
    return steepest.Task(model=model, loss=loss or nn.MSELoss(), **more)


class _Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(WIDTH, 1)


# -- state ------------------------------------------------------------------------------------------------------------


class Rebinding(_Line):
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
    return _task(Rebinding())


class ThroughData(_Line):
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
    return _task(ThroughData())


class Growing(_Line):
    """Its buffer grows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = torch.cat([self.seen, x.detach().mean().view(1)])
        return self.line(x)


def growing_buffer() -> steepest.Task:
    """A buffer of another shape after every pass."""
    return _task(Growing())


class Counting(_Line):
    """Warms up by a counter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.line(x) * min(1.0, self.calls / 10)


def counter() -> steepest.Task:
    """A counter in Python."""
    return _task(Counting())


class Carrying(_Line):
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
    return _task(Carrying())


def counter_in_a_closure() -> steepest.Task:
    """A loss that counts."""
    calls = [0]

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return (outputs - targets).square().mean() * calls[0]

    return _task(nn.Linear(WIDTH, 1), loss)


class Caching(_Line):
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
    return _task(Caching(), eval_data=steepest.ArrayData(inputs(), sums()))


class Expanded(_Line):
    """A buffer whose elements share memory."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.arange(float(WIDTH)).expand(3, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.line(x + self.shift[0])


def expanded_buffer() -> steepest.Task:
    """A buffer that was made by expand."""
    return _task(Expanded())


class Unordered(_Line):
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
    return _task(Unordered())


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
    return _task(HalfFrozen(), eval_data=steepest.ArrayData(inputs(), sums()))


class _WritesInForward(_Line):
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
        return _task(model, train_data=steepest.ArrayData(words, words.float().mean(1, keepdim=True)))
    return _task(_WritesInForward(how))


class _WritesLater(_Line):
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
    return _task(_WritesLater())


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
    return _task(Tied(), train_data=steepest.ArrayData(inputs(), inputs()))


def overlapping_parameters() -> steepest.Task:
    """Two parameters that share a part of their memory."""
    model = nn.Module()
    memory = torch.zeros(6)
    model.one, model.two = nn.Parameter(memory[:4]), nn.Parameter(memory[2:])
    return _task(model)


def _without_bias(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    del state[prefix + "bias"]


class Hiding(nn.Linear):
    """Its state_dict does not show the bias."""

    def __init__(self) -> None:
        super().__init__(WIDTH, 1)
        self.register_state_dict_post_hook(_without_bias)


def hidden_parameter() -> steepest.Task:
    """A model whose state_dict hides a trained parameter."""
    return _task(Hiding())


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
    return _task(nn.Linear(WIDTH, 1), Uncertainty())


def complex_buffer() -> steepest.Task:
    """A buffer that no checkpoint holds."""
    model = nn.Linear(WIDTH, 1)
    model.register_buffer("turn", torch.ones(2, dtype=torch.complex128))
    return _task(model)


# -- means ------------------------------------------------------------------------------------------------------------


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

    return _task(nn.Linear(WIDTH, WIDTH), in_batch, train_data=steepest.ArrayData(inputs(), inputs()))


def loss_of_each_sample() -> steepest.Task:
    """A loss that returns a vector."""
    return _task(nn.Linear(WIDTH, 1), lambda outputs, targets: (outputs - targets).square().mean(1))


def clamped_gradients() -> steepest.Task:
    """A hook that is not linear in the gradient, so that micro-batches do not add up."""
    model = nn.Linear(WIDTH, 1)
    model.weight.register_hook(lambda gradient: gradient.sign())
    return _task(model)


# -- randomness -------------------------------------------------------------------------------------------------------


def draws_in_numpy() -> steepest.Task:
    """A split that NumPy and random draw."""
    rows = np.random.permutation(NUM_SAMPLES)[:48].tolist()
    random.shuffle(rows)
    return _task(nn.Linear(WIDTH, 1), train_data=steepest.ArrayData(inputs()[rows], sums()[rows]))


def another_in_every_process() -> steepest.Task:
    """Data that nothing seeds."""
    rows = np.random.default_rng().permutation(NUM_SAMPLES)
    return _task(nn.Linear(WIDTH, 1), train_data=steepest.ArrayData(inputs()[rows], sums()[rows]))


class _OwnGenerator(Dataset[Any]):
    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> Any:
        return inputs()[index] + torch.randn(WIDTH, generator=self.generator), sums()[index]


def data_with_a_generator() -> steepest.Task:
    """A dataset that draws from a generator of its own."""
    return _task(nn.Linear(WIDTH, 1), train_data=_OwnGenerator())


def noisy_hook() -> steepest.Task:
    """torch's own modules, with a hook that draws."""
    model = nn.Linear(WIDTH, 1)
    model.weight.register_hook(lambda gradient: gradient * (1 + 0.1 * random.random()))
    return _task(model)


# -- what is found too late -------------------------------------------------------------------------------------------


def metric_that_raises() -> steepest.Task:
    """A metric with a mistake."""

    def accuracy(outputs: Any, targets: Any) -> float:
        raise KeyError("acuracy")

    return _task(nn.Linear(WIDTH, 1), eval_data=steepest.ArrayData(inputs(), sums()), metrics={"accuracy": accuracy})


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

    return _task(model, eval_data=steepest.ArrayData(inputs(), sums()), metrics={"late": late})


def last_batch_of_one() -> steepest.Task:
    """The last micro-batch has one sample, which batch norm cannot use."""
    model = nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    rows = NUM_SAMPLES + 1
    return _task(model, train_data=steepest.ArrayData(inputs(rows), sums(rows)))


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


# -- batches ----------------------------------------------------------------------------------------------------------


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


class OwnLoss(_Line):
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


class TwoInputs(_Line):
    """Takes two inputs."""

    def forward(self, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return self.line(x + shift)


def three_entries() -> steepest.Task:
    """Batches of two inputs and a target."""
    return _task(TwoInputs(), train_data=steepest.ArrayData(inputs(), torch.ones(NUM_SAMPLES, 1), sums()))


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
    return _task(nn.Linear(WIDTH, 1), train_data=DataLoader(data, **chosen[kind]))


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
    return _task(nn.Linear(WIDTH, 1), train_data=data, eval_data=Stream(noise=False))


def plain_line() -> steepest.Task:
    """A line."""
    return _task(nn.Linear(WIDTH, 1))


def frozen_backbone(width: int = 512) -> steepest.Task:
    """A frozen layer under one that learns."""
    model = nn.Sequential(nn.Linear(WIDTH, width).requires_grad_(False), nn.ReLU(), nn.Linear(width, 1))
    return _task(model)


# -- how parameters behave --------------------------------------------------------------------------------------------


class MomentumEncoder(nn.Module):
    """A frozen copy that follows the encoder in every forward pass, as in MoCo."""

    def __init__(self, *, rebinds: bool) -> None:
        super().__init__()
        self.encoder = nn.Linear(WIDTH, WIDTH)
        self.teacher = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.rebinds = rebinds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            for own, theirs in zip(self.teacher.parameters(), self.encoder.parameters(), strict=True):
                if self.rebinds:
                    own.data = own.data * 0.9 + theirs.data * 0.1
                else:
                    own.mul_(0.9).add_(theirs, alpha=0.1)
            wanted = self.teacher(x)
        return (self.encoder(x) - wanted).square().mean(1, keepdim=True)


def momentum_encoder(*, rebinds: bool = False) -> steepest.Task:
    """Frozen parameters that forward changes."""
    return _task(MomentumEncoder(rebinds=rebinds))


class PartlyUsed(_Line):
    """Has a layer that no output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.pooler = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.line(x)


def unreached_parameters() -> steepest.Task:
    """Parameters that the loss does not depend on."""
    return _task(PartlyUsed())


class UsedLater(PartlyUsed):
    """Uses its other layer from the fourth step on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return self.line(self.pooler(x) if self.passes > 3 else x)


def parameters_used_later() -> steepest.Task:
    """Parameters that the loss depends on later."""
    return _task(UsedLater())


class CreatesParameters(_Line):
    """Makes a parameter in its first pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "shift"):
            self.shift = nn.Parameter(torch.zeros(1))
        return self.line(x) + self.shift


def created_parameter() -> steepest.Task:
    """A parameter that is created in forward."""
    return _task(CreatesParameters())


def grouped() -> steepest.Task:
    """Groups of parameters: a slow one, one without decay, a frozen one."""
    model = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    groups = [
        steepest.ParameterGroup(names="0.*", frozen=True),
        steepest.ParameterGroup(names="*.bias", weight_decay=0.0),
        steepest.ParameterGroup(names="2.*", lr_scale=0.1),
    ]
    return _task(model, parameter_groups=groups)


def groups_that_fit_nothing() -> steepest.Task:
    """A group with a mistake in its pattern."""
    return _task(nn.Linear(WIDTH, 1), parameter_groups=[steepest.ParameterGroup(names="backbone.*")])


def own_schedule(kind: str = "steps") -> steepest.Task:
    """A schedule of the task's."""
    schedules: dict[str, Any] = {
        "steps": lambda step: [1.0, 0.5, 0.25][min(step // 2, 2)],
        "negative": lambda step: 1.0 - step,
        "raising": lambda step: {0: 1.0}[step],
    }
    return _task(nn.Linear(WIDTH, 1), schedule=schedules[kind])


# -- data sets of Hugging Face ----------------------------------------------------------------------------------------


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
    return _task(nn.Linear(WIDTH, 1))
