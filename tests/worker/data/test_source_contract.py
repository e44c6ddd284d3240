"""What every source of batches keeps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

import steepest
from worker.data.sources import ArraySource, Source, source_of

INPUTS, TARGETS = torch.arange(20.0).view(5, 4), torch.arange(5)


class Rows(Dataset[Any]):
    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Any:
        return INPUTS[index], TARGETS[index]


class BatchedRows(Rows):
    def __getitems__(self, indices: list[int]) -> Any:
        return [self[i] for i in indices]


SOURCES: dict[str, Any] = {
    "arrays": lambda: source_of(steepest.ArrayData(INPUTS, TARGETS)),
    "numpy arrays": lambda: ArraySource((INPUTS.numpy(), TARGETS.numpy()), as_numpy=True),
    "tensor dataset": lambda: source_of(TensorDataset(INPUTS, TARGETS)),
    "dataset": lambda: source_of(Rows()),
    "batched dataset": lambda: source_of(BatchedRows()),
    "subset": lambda: source_of(Subset(Rows(), range(5))),
}


@pytest.fixture(params=list(SOURCES))
def source(request: pytest.FixtureRequest) -> Source:
    made: Source = SOURCES[request.param]()
    return made


@pytest.mark.parametrize("indices", [[3, 0, 2], [4], [1, 1]])
def test_a_batch_holds_the_samples_in_the_order_asked_for(source: Source, indices: list[int]) -> None:
    inputs, targets = source.batch(np.array(indices))
    assert torch.equal(torch.as_tensor(inputs), INPUTS[indices])
    assert torch.equal(torch.as_tensor(targets), TARGETS[indices])


def test_a_batch_is_the_same_again_and_no_view_of_the_data(source: Source) -> None:
    first, _ = source.batch(np.array([0, 1]))
    first[...] = -1.0
    again, _ = source.batch(np.array([0, 1]))
    assert torch.equal(torch.as_tensor(again), INPUTS[:2])


def test_only_user_code_needs_seeds(source: Source) -> None:
    assert source.random == (not isinstance(source, ArraySource))
