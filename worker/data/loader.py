"""A torch DataLoader, taken apart: the data set, the order of its sampler, how it collates, and what it asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, default_collate

from worker.data.randomness import OwnRandomness, epoch_seed


class DataError(Exception):
    """Data cannot be used as they are. The message says why, and what to do."""


@dataclass(frozen=True)
class LoaderWishes:
    """What a DataLoader says that a spec says too; it holds where the spec leaves it open."""

    global_batch: int
    shuffle: bool
    drop_last: bool
    readers: int

    def unless_set(self, fields: set[str]) -> dict[str, Any]:
        """Those that none of the spec's own `fields` settles."""
        return {name: value for name, value in vars(self).items() if name not in fields}


class LoaderData:
    """What is in a DataLoader. Raises DataError for one that makes its batches in a way of its own."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        if loader.batch_size is None:
            what = "a batch_sampler of its own" if loader.batch_sampler is not None else "batch_size=None"
            raise DataError(
                f"the DataLoader has {what}; give it a batch_size (and a sampler), or the task the data set itself"
            )
        self.dataset = loader.dataset
        self.collate: Any = None if loader.collate_fn is default_collate else loader.collate_fn
        sampler = None if isinstance(loader.dataset, IterableDataset) else loader.sampler
        draws_all = isinstance(sampler, RandomSampler) and not sampler.replacement
        draws_all = draws_all and len(sampler) == len(loader.dataset)  # type: ignore[arg-type]
        self._sampler: Any = None if draws_all or isinstance(sampler, SequentialSampler) else sampler
        shuffle = draws_all or (sampler is not None and self._sampler is not None)
        self.wishes = LoaderWishes(loader.batch_size, shuffle, loader.drop_last, loader.num_workers)

    def __len__(self) -> int:
        return len(self.dataset if self._sampler is None else self._sampler)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def order(self, seed: int) -> Callable[[int], Sequence[int]] | None:
        """By epoch, the samples in the order of the sampler; None where the order is left to us."""
        sampler = self._sampler
        if sampler is None:
            return None

        def draw(epoch: int) -> Sequence[int]:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
            own = getattr(sampler, "generator", None)
            if own is not None:
                own.manual_seed(epoch_seed(seed, epoch))
            with OwnRandomness(epoch_seed(seed, epoch)).used():
                return [int(index) for index in sampler]

        return draw
