from __future__ import annotations

import itertools
from collections import namedtuple
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

import steepest
from worker.data import streams
from worker.data.loader import DataError
from worker.data.sources import ArraySource, DatasetSource, source_of, to_device

INDICES = np.array([3, 0, 2])
INPUTS, TARGETS = torch.arange(20.0).view(5, 4), torch.arange(5)


class Plain(Dataset[Any]):
    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Any:
        return INPUTS[index], TARGETS[index]


class Batched(Plain):
    calls = 0

    def __getitems__(self, indices: list[int]) -> Any:
        self.calls += 1
        return [self[i] for i in indices]


def test_all_kinds_of_data_give_the_same_batch() -> None:
    expected = INPUTS[INDICES], TARGETS[INDICES]
    kinds: list[Any] = [
        steepest.ArrayData(INPUTS, TARGETS),
        steepest.ArrayData(INPUTS.numpy(), TARGETS.numpy()),
        TensorDataset(INPUTS, TARGETS),
        Plain(),
        Batched(),
        Subset(Plain(), range(5)),
    ]
    for data in kinds:
        inputs, targets = source_of(data).batch(INDICES)
        assert torch.equal(inputs, expected[0])
        assert torch.equal(targets, expected[1])


def test_arrays_are_gathered_whole_and_datasets_by_getitems() -> None:
    assert isinstance(source_of(steepest.ArrayData(INPUTS)), ArraySource)
    assert isinstance(source_of(TensorDataset(INPUTS, TARGETS)), ArraySource)
    data = Batched()
    source_of(data).batch(INDICES)
    assert data.calls == 1


def test_a_single_array_gives_rows_not_tuples() -> None:
    assert torch.equal(source_of(steepest.ArrayData(INPUTS)).batch(INDICES), INPUTS[INDICES])
    (rows,) = source_of(TensorDataset(INPUTS)).batch(INDICES)
    assert torch.equal(rows, INPUTS[INDICES])


def test_a_collate_function_of_the_users_own() -> None:
    batch = source_of(Plain(), collate=len).batch(INDICES)
    assert batch == 3
    assert isinstance(source_of(TensorDataset(INPUTS, TARGETS), collate=len), DatasetSource)


def test_any_nesting_moves_to_a_device() -> None:
    Pair = namedtuple("Pair", "x y")
    batch = {"a": [INPUTS, "text"], "b": Pair(TARGETS, (INPUTS,))}
    moved = to_device(batch, torch.device("meta"))
    assert moved["a"][0].device.type == "meta"
    assert moved["a"][1] == "text"
    assert isinstance(moved["b"], Pair)
    assert moved["b"].y[0].device.type == "meta"


def test_a_stream_without_an_end_is_not_counted_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return itertools.count()

    monkeypatch.setattr(streams, "COUNT_SECONDS", 0.05)
    with pytest.raises(DataError, match=r"has not ended after [\d,]+ samples.*give the job steps instead of epochs"):
        streams.count(Endless(), None)
    assert streams.count(Endless(), 5) == 5
