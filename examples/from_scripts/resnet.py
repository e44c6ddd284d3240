"""A residual network (He et al. 2016) on small images. `main` is the script, `task` the job.

`steepest train examples/from_scripts/resnet.py:task --epochs 1`
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import steepest

ROWS = 512


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.around = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.around = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        return torch.relu(self.body(x) + self.around(x))


def resnet():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def images():
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(ROWS) % 10
    return TensorDataset(torch.randn(ROWS, 3, 16, 16, generator=generator) + classes.view(-1, 1, 1, 1) / 10, classes)


def main():
    model, loss = resnet(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for inputs, targets in DataLoader(images(), batch_size=64, shuffle=True):
        value = loss(model(inputs), targets)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(value.item())


def task():
    data = DataLoader(images(), batch_size=64, shuffle=True)
    return steepest.Task(model=resnet(), loss=nn.CrossEntropyLoss(), train_data=data)


if __name__ == "__main__":
    main()
