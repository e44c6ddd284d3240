"""A recommender with sparse embeddings (after DLRM, Naumov et al. 2019). `main` is the script, `task` the job.

`steepest train examples/from_scripts/recommender.py:task --epochs 2 --optimizer sgd --lr 0.1`
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import steepest

ROWS, FIELDS, WORDS, WIDTH = 1024, 3, 1000, 16


class Recommender(nn.Module):
    """Dot products between embeddings of categories and of dense features."""

    def __init__(self):
        super().__init__()
        self.tables = nn.ModuleList([nn.EmbeddingBag(WORDS, WIDTH, sparse=True) for _ in range(FIELDS)])
        self.dense = nn.Sequential(nn.Linear(8, WIDTH), nn.ReLU())
        self.top = nn.Linear(WIDTH + FIELDS, 1)

    def forward(self, dense, categories):
        features = self.dense(dense)
        products = [(features * table(categories[:, i : i + 1])).sum(1) for i, table in enumerate(self.tables)]
        return self.top(torch.cat([features, torch.stack(products, 1)], 1)).squeeze(1)


def clicks():
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(ROWS, 8, generator=generator)
    categories = torch.randint(WORDS, (ROWS, FIELDS), generator=generator)
    return TensorDataset(dense, categories, ((dense.sum(1) + categories[:, 0] % 3) > 1).float())


def main():
    model, loss = Recommender(), nn.BCEWithLogitsLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for dense, categories, targets in DataLoader(clicks(), batch_size=64, shuffle=True):
        value = loss(model(dense, categories), targets)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(value.item())


def task():
    return steepest.Task(model=Recommender(), loss=nn.BCEWithLogitsLoss(), train_data=clicks())


if __name__ == "__main__":
    main()
