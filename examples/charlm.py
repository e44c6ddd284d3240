"""A character model of the Python standard library's own source files, as an LSTM, a GRU or a transformer.

Documents end where files end: characters beyond the end are padding and weigh nothing, so tokens weigh the loss.

steepest train examples/charlm.py:transformer --steps 300 --lr 0.003 --clip-norm 1
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

import steepest

PADDING = 0  # as a token; ASCII characters are 1 to 127, anything else is 127
VOCABULARY = 128
LENGTH = 64
NUM_FILES = 60


def data(length: int = LENGTH) -> tuple[steepest.ArrayData, steepest.ArrayData]:
    """(train, test): windows of shape (length + 1,), padded at the end of each file; each tenth is for the test."""
    library = Path(sysconfig.get_paths()["stdlib"])
    windows = []
    for path in sorted(library.glob("*.py"))[:NUM_FILES]:
        characters = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).clamp(1, 127).long()
        count = max(1, -(-(len(characters) - 1) // length))
        padded = torch.full((count * length + 1,), PADDING)
        padded[: len(characters)] = characters
        windows.append(padded.unfold(0, length + 1, length))
    tokens = torch.cat(windows)
    held_out = torch.arange(len(tokens)) % 10 == 0
    return steepest.ArrayData(tokens[~held_out]), steepest.ArrayData(tokens[held_out][:500])


def batch_loss(model: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of the cross-entropies, number of characters that count). batch: shape (samples, length + 1)."""
    inputs, targets = batch[:, :-1], batch[:, 1:]
    logits = model(inputs)
    total = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PADDING, reduction="sum")
    return total, (targets != PADDING).sum()


class Recurrent(nn.Module):
    """Embedding, a recurrent layer (nn.LSTM or nn.GRU), projection."""

    def __init__(self, layer: type[nn.LSTM | nn.GRU], width: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.recurrent = layer(width, width, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of the next character: (samples, length) -> (samples, length, VOCABULARY)."""
        hidden, _ = self.recurrent(self.embedding(tokens))
        logits: torch.Tensor = self.head(self.dropout(hidden))
        return logits


class Transformer(nn.Module):
    """A causal transformer whose output projection is the embedding itself (tied)."""

    def __init__(self, width: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.position = nn.Parameter(torch.zeros(LENGTH, width))
        block = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.head.weight = self.embedding.weight
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of the next character: (samples, length) -> (samples, length, VOCABULARY)."""
        length = tokens.shape[1]
        hidden = self.embedding(tokens) + self.position[:length]
        hidden = self.blocks(hidden, mask=self.mask[:length, :length], is_causal=True)
        logits: torch.Tensor = self.head(self.norm(hidden))
        return logits


def _task(model: nn.Module) -> steepest.Task:
    train, test = data()
    return steepest.Task(model=model, batch_loss=batch_loss, train_data=train, eval_data=test)


def lstm(width: int = 64, dropout: float = 0.1) -> steepest.Task:
    """Long short-term memory."""
    return _task(Recurrent(nn.LSTM, width, dropout))


def gru(width: int = 64, dropout: float = 0.1) -> steepest.Task:
    """Gated recurrent units."""
    return _task(Recurrent(nn.GRU, width, dropout))


def transformer(width: int = 64, layers: int = 2, heads: int = 4, dropout: float = 0.1) -> steepest.Task:
    """A small causal transformer with dropout and tied embeddings."""
    return _task(Transformer(width, layers, heads, dropout))
