"""Tasks whose losses do what a loop over batches may do, and a job may not."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

import steepest
from tests.support.brought_base import WIDTH, inputs, sums


def odd_loss(kind: str) -> steepest.Task:
    """A batch loss, or a metric, that does what a loop over batches may do."""

    def batch_loss(model: nn.Module, batch: Any) -> Any:
        errors = (model(batch[0]) - batch[1]).square()
        loss = errors.mean()
        match kind:
            case "backward":
                model.weight.square().sum().backward()
            case "accuracy":
                return loss, (errors < 1.0).float().mean()
            case "item":
                return loss, loss.item()
            case "unused":
                return loss, {"loss": loss.item()}
            case "drawn":
                counts = torch.rand(errors.shape) < 0.5
                return errors[counts].sum(), counts.sum()
            case "two":
                return loss, errors.abs().mean()
        return loss

    data = steepest.ArrayData(inputs(), sums())
    if kind == "metric":
        metrics = {"error": lambda outputs, targets: (outputs - targets).square()[:, 0]}
        model = nn.Linear(WIDTH, 1)
        return steepest.Task(model=model, loss=nn.MSELoss(), train_data=data, eval_data=data, metrics=metrics)
    metrics = {"error": lambda outputs, targets: 0.0} if kind == "unused" else {}
    return steepest.Task(model=nn.Linear(WIDTH, 1), batch_loss=batch_loss, train_data=data, metrics=metrics)


class _Padded(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Sequences of labels, many of which do not count. noise: of inputs, another one whenever they are fetched."""

    def __init__(self, noise: float) -> None:
        generator = torch.Generator().manual_seed(0)
        self._inputs = torch.randn(256, 6, WIDTH, generator=generator)
        self._labels = torch.randint(0, 3, (256, 6), generator=generator)
        for index, labels in enumerate(self._labels):
            labels[1 + index % 6 :] = -100
        self._noise = noise

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._inputs[index] + self._noise * torch.randn(6, WIDTH), self._labels[index]


def padded(noise: float, counted: bool = False) -> steepest.Task:
    """counted: by a loss whose mean is known to be over the labels that count."""

    def loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs.flatten(0, 1), labels.flatten())

    if counted:
        model = nn.Sequential(nn.Linear(WIDTH, 3), _Classes())
        return steepest.Task(model=model, loss=nn.CrossEntropyLoss(), train_data=_Padded(noise))
    return steepest.Task(model=nn.Linear(WIDTH, 3), loss=loss, train_data=_Padded(noise))


class _Classes(nn.Module):
    def forward(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs.transpose(1, 2)
