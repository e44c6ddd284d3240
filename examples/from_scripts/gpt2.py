"""A causal language model of Hugging Face, from a configuration. `main` is the script, `task` the job.

`steepest train examples/from_scripts/gpt2.py:task --epochs 1`
"""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import GPT2Config, GPT2LMHeadModel

import steepest

ROWS, LENGTH, WORDS = 512, 32, 500
CONFIG = GPT2Config(
    n_layer=2, n_head=2, n_embd=64, vocab_size=WORDS, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    bos_token_id=0, eos_token_id=0,
)  # fmt: skip


class Tokens(Dataset):
    """Sequences in which a token is often followed by the next higher one."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        steps = torch.randint(1, 3, (ROWS, LENGTH), generator=generator)
        self.tokens = (torch.randint(WORDS, (ROWS, 1), generator=generator) + steps.cumsum(1)) % WORDS

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def main():
    model = GPT2LMHeadModel(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for batch in DataLoader(Tokens(), batch_size=64, shuffle=True):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(loss.item())


def task():
    return steepest.Task(model=GPT2LMHeadModel(CONFIG), train_data=Tokens())


if __name__ == "__main__":
    main()
