"""Models as people bring them, small: GPT-2 and BERT of Hugging Face, a ResNet, a head on a large frozen backbone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

import steepest

ROWS, LENGTH, WORDS = 512, 32, 500


class Tokens(Dataset[Any]):
    """Rows of tokens as dicts, for models that take a batch's entries by name."""

    def __init__(self, labels: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(WORDS, (ROWS, LENGTH), generator=generator)
        self.labels = self.tokens if labels == "tokens" else self.tokens[:, 0] % 2

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> Any:
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


def gpt2() -> steepest.Task:
    """A causal language model from a configuration."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=2, n_head=2, n_embd=64, vocab_size=WORDS, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    return steepest.Task(model=GPT2LMHeadModel(config), train_data=Tokens("tokens"))


def bert() -> steepest.Task:
    """A classifier of sequences."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, vocab_size=WORDS,
        hidden_dropout_prob=0, attention_probs_dropout_prob=0, num_labels=2,
    )  # fmt: skip
    return steepest.Task(model=BertForSequenceClassification(config), train_data=Tokens("class"))


class Block(nn.Module):
    """Two convolutions and a way around them (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.around: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.around = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.around(x))


def resnet() -> steepest.Task:
    """Three blocks on images of 16 x 16."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(ROWS, 3, 16, 16, generator=generator)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    targets = torch.arange(ROWS) % 10
    return steepest.Task(model=model, loss=nn.CrossEntropyLoss(), train_data=steepest.ArrayData(images, targets))


class Backbone(nn.Module):
    """Frozen layers that cost memory, not time, under one that learns."""

    def __init__(self, millions: int) -> None:
        super().__init__()
        self.body = nn.ModuleList([nn.Linear(1024, 1024) for _ in range(millions)]).requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x)


def backbone(millions: int = 25) -> steepest.Task:
    """A head on a frozen backbone."""
    x = torch.randn(ROWS, 64, generator=torch.Generator().manual_seed(0))
    data = steepest.ArrayData(x, x.sum(1, keepdim=True))
    return steepest.Task(model=Backbone(millions), loss=nn.MSELoss(), train_data=data)
