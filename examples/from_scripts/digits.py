"""The usual first script: a small network on images of digits. `main` is the script, `task` the job.

`steepest train examples/from_scripts/digits.py:task --epochs 10`
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset, random_split

import steepest


class Digits(Dataset):
    def __init__(self):
        self.images, self.classes = load_digits(return_X_y=True)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return torch.tensor(self.images[index] / 16, dtype=torch.float32), int(self.classes[index])


def network():
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 10))


def accuracy(outputs, targets):
    return (outputs.argmax(1) == targets).float().mean()


def main():
    torch.manual_seed(0)
    train, test = random_split(Digits(), [1500, 297])
    model, loss = network(), nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(10):
        for images, classes in DataLoader(train, batch_size=64, shuffle=True):
            optimizer.zero_grad()
            loss(model(images), classes).backward()
            optimizer.step()
    model.eval()
    images, classes = next(iter(DataLoader(test, batch_size=len(test))))
    print(accuracy(model(images), classes).item())


def task():
    train, test = random_split(Digits(), [1500, 297])
    return steepest.Task(
        model=network(),
        loss=nn.CrossEntropyLoss(),
        train_data=DataLoader(train, batch_size=64, shuffle=True),
        eval_data=test,
        metrics={"accuracy": accuracy},
    )


if __name__ == "__main__":
    main()
