"""A graph convolutional network (Kipf and Welling 2017) that classifies nodes. `main` is the script, `task` the job.

`steepest train examples/from_scripts/gcn.py:task --steps 100`
"""

from __future__ import annotations

import torch
from torch import nn

import steepest

NODES, CLASSES = 200, 4


def graph():
    """(normalized adjacency, features, classes) of nodes that mostly know nodes of their own class."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(NODES) % CLASSES
    near = torch.where(classes[:, None] == classes, 0.1, 0.01)
    edges = (torch.rand(NODES, NODES, generator=generator) < near).triu(1)
    adjacency = (edges | edges.t()).float() + torch.eye(NODES)
    root = adjacency.sum(1).rsqrt()
    return root[:, None] * adjacency * root, torch.randn(NODES, 16, generator=generator), classes


class GCN(nn.Module):
    """Two layers; the graph is part of the model. Takes nodes, returns their logits."""

    def __init__(self, adjacency, features):
        super().__init__()
        self.register_buffer("adjacency", adjacency)
        self.register_buffer("features", features)
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, CLASSES)

    def forward(self, nodes):
        hidden = torch.relu(self.adjacency @ self.first(self.features))
        return (self.adjacency @ self.second(hidden))[nodes]


def main():
    adjacency, features, classes = graph()
    model, loss = GCN(adjacency, features), nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(100):
        value = loss(model(torch.arange(NODES)), classes)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(value.item())


def task():
    adjacency, features, classes = graph()
    data = steepest.ArrayData(torch.arange(NODES), classes)
    return steepest.Task(model=GCN(adjacency, features), loss=nn.CrossEntropyLoss(), train_data=data)


if __name__ == "__main__":
    main()
