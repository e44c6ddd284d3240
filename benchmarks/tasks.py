"""The models that are timed, on random data: perceptrons from 10 thousand to 100 million parameters, and for GPUs a
residual network and a transformer."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn

import steepest

NUM_INPUTS, NUM_CLASSES, NUM_SAMPLES = 64, 10, 4096


@dataclass(frozen=True)
class Size:
    """A model to time. steps: of one round. kind: which function of this module makes it.

    batch, precision: what it is timed with; 0: what is asked for.
    """

    name: str
    width: int
    layers: int
    steps: int
    kind: str = "mlp"
    batch: int = 0
    precision: str = "full"


SIZES = (Size("10 k", 64, 2, 1000), Size("1 M", 576, 4, 150), Size("25 M", 2048, 7, 6), Size("100 M", 4096, 7, 3))


LARGE = (
    Size("convnet", 64, 2, 30, "convnet", 256, "bf16"),
    Size("transformer", 1024, 12, 15, "transformer", 64, "bf16"),
)
VOCABULARY, CONTEXT = 8192, 256


def _mlp(width: int, layers: int) -> nn.Module:
    """An MLP with `layers` hidden layers."""
    parts: list[nn.Module] = [nn.Linear(NUM_INPUTS, width), nn.ReLU()]
    for _ in range(layers - 1):
        parts += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(width, NUM_CLASSES))


class _Residual(nn.Module):
    """Two convolutions beside a shortcut, as in He et al. 2015."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def _convnet(width: int, layers: int) -> nn.Module:
    """A residual network for images of 32 x 32 in four stages of `layers` blocks: ResNet-18 for 64 and 2."""
    parts: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    for stage in range(4):
        outputs = width << stage
        parts += [_Residual(max(outputs // 2, width), outputs, 1 if stage == 0 else 2)]
        parts += [_Residual(outputs, outputs, 1) for _ in range(layers - 1)]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width << 3, NUM_CLASSES))


class _Transformer(nn.Module):
    """A decoder as GPT-2's: 168 M parameters for 1024 and 12. Returns logits as CrossEntropyLoss takes them."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        block = nn.TransformerEncoderLayer(
            width, width // 64, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.tokens(tokens) + self.positions
        return self.head(self.blocks(hidden, mask=self.mask, is_causal=True)).flatten(0, 1)


class _PerToken(nn.Module):
    """Cross entropy over all tokens of a batch."""

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs, targets.flatten())


def model(size: Size) -> nn.Module:
    """The module of a size."""
    make = {"mlp": _mlp, "convnet": _convnet, "transformer": _Transformer}[size.kind]
    return make(size.width, size.layers)


def criterion(kind: str) -> nn.Module:
    """The loss of a kind of model."""
    return _PerToken() if kind == "transformer" else nn.CrossEntropyLoss()


def arrays(kind: str = "mlp") -> tuple[torch.Tensor, torch.Tensor]:
    """(inputs, targets), the same in every process."""
    generator = torch.Generator().manual_seed(0)
    if kind == "transformer":
        tokens = torch.randint(VOCABULARY, (256, CONTEXT + 1), generator=generator)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    shape = (3, 32, 32) if kind == "convnet" else (NUM_INPUTS,)
    inputs = torch.randn(NUM_SAMPLES, *shape, generator=generator)
    return inputs, torch.randint(NUM_CLASSES, (NUM_SAMPLES,), generator=generator)


def _task(kind: str, width: int, layers: int) -> steepest.Task:
    module = model(Size("", width, layers, 0, kind))
    return steepest.Task(model=module, loss=criterion(kind), train_data=steepest.ArrayData(*arrays(kind)))


def mlp(width: int, layers: int) -> steepest.Task:
    """A perceptron, as the service trains it."""
    return _task("mlp", width, layers)


def convnet(width: int, layers: int) -> steepest.Task:
    """A residual network, as the service trains it."""
    return _task("convnet", width, layers)


def transformer(width: int, layers: int) -> steepest.Task:
    """A transformer, as the service trains it."""
    return _task("transformer", width, layers)


SLEEP_SECONDS = 0.25


def waiting() -> steepest.Task:
    """A small model, each of whose steps waits, as for a device that computes."""

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        time.sleep(SLEEP_SECONDS)
        return model(batch).square().mean()

    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
    return steepest.Task(model=model, batch_loss=loss, train_data=steepest.ArrayData(torch.randn(256, 16)))


class Wide(nn.Module):
    """A sum of many small parameters."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.parts = nn.ParameterList([torch.full((4,), 0.01) for _ in range(count)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ torch.stack(list(self.parts)).sum(0)


def wide(count: int) -> steepest.Task:
    """A task of `count` parameters."""
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    return steepest.Task(model=Wide(count), loss=nn.MSELoss(), train_data=steepest.ArrayData(x, x.sum(1)))


def digits(hidden: int) -> steepest.Task:
    """A perceptron with one hidden layer on the handwritten digits of scikit-learn."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    data = steepest.ArrayData(torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y))
    model = nn.Sequential(nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, 10))
    return steepest.Task(model=model, loss=nn.CrossEntropyLoss(), train_data=data)
