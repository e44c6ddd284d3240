"""A classifier of sequences of Hugging Face, from a configuration. `main` is the script, `task` the job.

`steepest train examples/from_scripts/bert.py:task --epochs 1`
"""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import BertConfig, BertForSequenceClassification

import steepest

ROWS, LENGTH, WORDS = 512, 32, 500
CONFIG = BertConfig(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, vocab_size=WORDS,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=2,
)  # fmt: skip


class Reviews(Dataset):
    """Sequences that are positive when they begin with an even token."""

    def __init__(self):
        self.tokens = torch.randint(WORDS, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        return {"input_ids": self.tokens[index], "labels": self.tokens[index, 0] % 2}


def main():
    model = BertForSequenceClassification(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for batch in DataLoader(Reviews(), batch_size=64, shuffle=True):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(loss.item())


def accuracy(outputs, batch):
    return (outputs.logits.argmax(1) == batch["labels"]).float().mean()


def task():
    return steepest.Task(
        model=BertForSequenceClassification(CONFIG),
        train_data=Reviews(),
        eval_data=Reviews(),
        metrics={"accuracy": accuracy},
    )


if __name__ == "__main__":
    main()
