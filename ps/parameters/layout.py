"""The flat order of all parameters, cut in blocks; shards own whole blocks.

Every parameter starts on a 64-byte line. Each decay group starts and ends on a 256-byte line, so that no vectorized
kernel ever has a scalar tail: where a shard ends can then not show in the bits. All offsets count elements.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise, product

import numpy as np
import torch
from numpy.typing import NDArray

from ps.parameters.description import ModelDescription

BLOCK_NUMEL = 65_536
PARAMETER_ALIGNMENT_BYTES = 64
GROUP_ALIGNMENT_BYTES = 256
SPREAD_BYTES = 16 << 20

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def align(offset: int, multiple: int) -> int:
    """The smallest multiple that is not below `offset`."""
    return -(-offset // multiple) * multiple


@dataclass(frozen=True, slots=True)
class Placed:
    """A parameter at its place."""

    name: str
    shape: tuple[int, ...]
    offset: int
    numel: int
    decayed: bool

    @property
    def blocks(self) -> range:
        """The blocks it lies in; none when it has no elements."""
        return (
            range(self.offset // BLOCK_NUMEL, -(-(self.offset + self.numel) // BLOCK_NUMEL)) if self.numel else range(0)
        )


@dataclass(frozen=True, slots=True)
class GroupRange:
    """The range of one optimizer parameter group, or a shard's part of it.

    lr_scale: times the job's learning rate. weight_decay: instead of the job's; None: the job's, if `decayed`.
    """

    decayed: bool
    start: int
    stop: int
    lr_scale: float = 1.0
    weight_decay: float | None = None

    @property
    def options(self) -> dict[str, float]:
        """What an optimizer's parameter group has of its own, under torch.optim's names; else the job's holds."""
        if self.weight_decay is None and self.decayed:
            return {}
        return {"weight_decay": self.weight_decay or 0.0}


@dataclass(frozen=True)
class Layout:
    """Where every parameter lies. Depends on the model and on which parameters decay, never on placement."""

    dtype: torch.dtype
    parameters: tuple[Placed, ...]
    groups: tuple[GroupRange, ...]
    numel: int
    is_whole: bool = False  # whether a parameter may not be spread over several shards

    @property
    def itemsize(self) -> int:
        """Bytes an element."""
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the whole layout."""
        return self.numel * self.itemsize

    @property
    def num_blocks(self) -> int:
        """Number of blocks; the last may be short."""
        return -(-self.numel // BLOCK_NUMEL)

    @cached_property
    def segment_owners(self) -> NDArray[np.int64]:
        """For every segment of the layout in order, the index of its parameter in `parameters`."""
        return np.repeat(np.arange(len(self.parameters)), [len(p.blocks) for p in self.parameters])

    @cached_property
    def padding(self) -> torch.Tensor:
        """The elements that belong to no parameter, in order: int64."""
        is_padding = np.ones(self.numel, dtype=bool)
        for p in self.parameters:
            is_padding[p.offset : p.offset + p.numel] = False
        return torch.from_numpy(np.flatnonzero(is_padding))

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Each parameter's own shape over `flat`, which holds the whole layout."""
        return [flat[p.offset : p.offset + p.numel].view(p.shape) for p in self.parameters]


def build_layout(model: ModelDescription, *, decay_biases_and_norms: bool = True, is_whole: bool = False) -> Layout:
    """Place every parameter.

    decay_biases_and_norms: False puts parameters of fewer than two dimensions in a group of their own, without
    weight decay. is_whole: see Layout.

    Raises ValueError for a model without parameters or with a dtype that is not float32 or float64, or mixed ones.
    """
    if not any(p.numel for p in model.parameters):
        raise ValueError("the model has no trainable parameters")
    dtypes = {p.dtype for p in model.parameters}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        raise ValueError(f"parameters must be all float32 or all float64; the model has {', '.join(sorted(dtypes))}")
    dtype = DTYPES[dtypes.pop()]
    parameter_alignment = PARAMETER_ALIGNMENT_BYTES // dtype.itemsize
    group_alignment = GROUP_ALIGNMENT_BYTES // dtype.itemsize
    placed: list[Placed] = []
    groups: list[GroupRange] = []
    offset = 0
    own = {name: (group.lr_scale, group.weight_decay) for group in model.groups for name in group.names}
    rates = [(1.0, None), *dict.fromkeys(rate for rate in own.values() if rate != (1.0, None))]
    for (lr_scale, weight_decay), decayed in product(rates, (True, False)):
        start = offset
        for p in model.parameters:
            if own.get(p.name, (1.0, None)) != (lr_scale, weight_decay):
                continue
            if (decay_biases_and_norms or len(p.shape) >= 2 or weight_decay is not None) == decayed:
                placed.append(Placed(p.name, p.shape, offset, p.numel, decayed))
                offset = align(offset + p.numel, parameter_alignment)
        offset = align(offset, group_alignment)
        if offset > start:
            groups.append(GroupRange(decayed, start, offset, lr_scale, weight_decay))
    return Layout(dtype, tuple(placed), tuple(groups), offset, is_whole)


def grouped(layout: Layout, groups: Iterable[GroupRange]) -> Iterator[tuple[Placed, GroupRange]]:
    """The parameters that begin in one of the groups and have elements, each with its group."""
    for group in groups:
        for placed in layout.parameters:
            if placed.numel and group.start <= placed.offset < group.stop:
                yield placed, group


@dataclass(frozen=True)
class Shard:
    """What one server owns: elements [start, stop) of the layout; whole blocks or, in a whole layout, parameters."""

    layout: Layout
    index: int
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.stop - self.start

    @cached_property
    def groups(self) -> tuple[GroupRange, ...]:
        """The shard's part of each optimizer group, in layout offsets."""
        parts = (replace(g, start=max(g.start, self.start), stop=min(g.stop, self.stop)) for g in self.layout.groups)
        return tuple(g for g in parts if g.start < g.stop)

    @cached_property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """The (start, stop) of each segment, in elements from the start of the shard.

        A segment is one parameter's part of one block; it runs over zero padding to the end of its 64-byte line.
        """
        return self._segments(PARAMETER_ALIGNMENT_BYTES // self.layout.itemsize)

    @cached_property
    def bare_segments(self) -> tuple[tuple[int, int], ...]:
        """As `segments`, without padding."""
        return self._segments(1)

    def _segments(self, alignment: int) -> tuple[tuple[int, int], ...]:
        segments = []
        for p in self.layout.parameters:
            stop = align(p.offset + p.numel, alignment)
            for block in p.blocks:
                start = max(p.offset, block * BLOCK_NUMEL)
                if self.start <= start < self.stop:
                    segments.append((start - self.start, min(stop, (block + 1) * BLOCK_NUMEL) - self.start))
        return tuple(segments)


def shards(layout: Layout, num_servers: int) -> tuple[Shard, ...]:
    """Cut the layout for `num_servers`; with fewer blocks, or parameters, than servers, some own nothing."""
    # Rounded up, so that the empty shards come last and server 0, which leads, is never one of them.
    if layout.is_whole:
        starts = sorted({p.offset for p in layout.parameters if p.offset} | {layout.numel})
        ideal = [layout.numel * i // num_servers for i in range(1, num_servers)]
        cuts = sorted({starts[bisect_left(starts, offset)] for offset in ideal} - {layout.numel})
        bounds = [0, *cuts, *[layout.numel] * (num_servers - len(cuts))]
    else:
        blocks = [-(-layout.num_blocks * i // num_servers) for i in range(num_servers + 1)]
        bounds = [min(block * BLOCK_NUMEL, layout.numel) for block in blocks]
    return tuple(Shard(layout, i, start, stop) for i, (start, stop) in enumerate(pairwise(bounds)))


def choose_num_servers(layout: Layout, num_hosts: int) -> int:
    """How many servers a job gets when its spec leaves that open.

    On one host a single server uses all the cores that waiting workers leave idle, and more of them only add messages.
    On several, one a host shares the traffic between their links, when there is enough of it to care.
    """
    most = len(layout.parameters) if layout.is_whole else layout.num_blocks
    return 1 if layout.nbytes < SPREAD_BYTES else min(num_hosts, most)
