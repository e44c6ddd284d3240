"""Small models that return their own loss over labels, some of which are left out, as those of Hugging Face do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset

import steepest

SAMPLES, LENGTH, TOKENS = 64, 12, 11


class Sequences(Dataset[Any]):
    """Sequences of tokens; of the labels, those after a length that differs are left out if `padded` says so."""

    def __init__(self, *, padded: bool) -> None:
        generator = torch.Generator().manual_seed(3)
        self._ids = torch.randint(0, TOKENS, (SAMPLES, LENGTH), generator=generator)
        self._labels = self._ids.clone()
        lengths = torch.randint(2, LENGTH + 1, (SAMPLES,), generator=generator)
        if padded:
            self._labels[torch.arange(LENGTH) >= lengths[:, None]] = -100

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        return {"input_ids": self._ids[index], "labels": self._labels[index]}


class Tagger(nn.Module):
    """A label for each token: as it is, the next token's, or a mean of each sequence's own mean."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._kind = kind
        self.embed = nn.Embedding(TOKENS, 8)
        self.out = nn.Linear(8, TOKENS)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        logits = self.out(self.embed(input_ids)).transpose(1, 2)
        if self._kind == "next":
            logits, labels = logits[..., :-1], labels[..., 1:]
        if self._kind != "sequence":
            return SimpleNamespace(loss=functional.cross_entropy(logits, labels))
        each = functional.cross_entropy(logits, labels, reduction="none")
        return SimpleNamespace(loss=(each.sum(1) / (labels != -100).sum(1)).mean())


def tagged(kind: str = "own", padded: bool = True) -> steepest.Task:  # an argument of a job
    """A task of it. kind: own, next or sequence."""
    return steepest.Task(model=Tagger(kind), train_data=Sequences(padded=padded))
