"""Memory that processes of one host share, without a name that could outlive them.

A segment is an anonymous memory file (`memfd_create(2)`): a peer opens it as /proc/PID/fd/N and checks a nonce in its
first page. The kernel frees it when the last process that maps it ends, however it ends, and the size limit of /dev/shm
does not apply. Pages that nobody touched take no memory.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch

HEADER_BYTES = mmap.PAGESIZE
NONCE_BYTES = 16
FILLED_AT = NONCE_BYTES  # a byte of the header: whether the constant part has been written


def constant_start(nbytes: int) -> int:
    """Where the constant part of a segment begins, behind so many bytes that change."""
    return -(-nbytes // HEADER_BYTES) * HEADER_BYTES


@dataclass(frozen=True, slots=True)
class SegmentReference:
    """What a peer on the same host needs to map a segment. size: bytes, header included."""

    pid: int
    descriptor: int
    size: int
    nonce: bytes


class _Mapping(mmap.mmap):
    """Calls `before_end` before it is unmapped."""

    before_end: list[Callable[[], None]]

    def __del__(self) -> None:
        for end in getattr(self, "before_end", ()):
            end()


_MAPPINGS: weakref.WeakValueDictionary[int, _Mapping] = weakref.WeakValueDictionary()  # by address


def before_unmapping(memory: torch.Tensor, end: Callable[[], None]) -> None:
    """Call `end` before the memory of a tensor is given back: before its segment is unmapped, if it is part of one."""
    address = memory.data_ptr()
    for start, mapping in list(_MAPPINGS.items()):
        with contextlib.suppress(ValueError):  # it has been closed
            if start <= address < start + len(mapping):
                mapping.before_end.append(end)
                return
    weakref.finalize(memory, end)


class Segment:
    """A mapped region, writable by all its peers."""

    def __init__(self, reference: SegmentReference, descriptor: int, *, owned: bool) -> None:
        self.reference = reference
        self._descriptor = descriptor if owned else -1
        self._map = _Mapping(descriptor, reference.size)
        self._map.before_end = []
        _MAPPINGS[torch.frombuffer(self._map, dtype=torch.uint8, count=1).data_ptr()] = self._map

    @classmethod
    def create(cls, nbytes: int, label: str) -> Self:
        """A new segment with `nbytes` of zeros. label: shown by /proc/PID/maps."""
        descriptor = os.memfd_create(f"steepest-{label}")
        size = HEADER_BYTES + max(nbytes, 1)
        os.ftruncate(descriptor, size)
        nonce = secrets.token_bytes(NONCE_BYTES)
        os.pwrite(descriptor, nonce, 0)
        return cls(SegmentReference(os.getpid(), descriptor, size, nonce), descriptor, owned=True)

    @classmethod
    def open(cls, reference: SegmentReference) -> Self | None:
        """Map a peer's segment, or None when it is not on this host."""
        descriptor = cls._opened(reference)
        if descriptor is None:
            return None
        try:
            return cls(reference, descriptor, owned=False)
        finally:
            os.close(descriptor)

    @staticmethod
    def _opened(reference: SegmentReference) -> int | None:
        """A descriptor of a segment, or None for what is no segment, or another."""
        try:
            descriptor = os.open(f"/proc/{reference.pid}/fd/{reference.descriptor}", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return None
        is_it = os.fstat(descriptor).st_size == reference.size
        if is_it and os.pread(descriptor, NONCE_BYTES, 0) == reference.nonce:
            return descriptor
        os.close(descriptor)
        return None

    def tensor(self, dtype: torch.dtype, numel: int, *, offset: int = 0) -> torch.Tensor:
        """A flat tensor over the region. offset: in elements."""
        if not numel:
            return torch.empty(0, dtype=dtype)  # frombuffer refuses an empty range
        return torch.frombuffer(self._map, dtype=dtype, count=numel, offset=HEADER_BYTES + offset * dtype.itemsize)

    def constant(self, start: int, fill: Callable[[memoryview], None]) -> memoryview:
        """The bytes from `start` on, see constant_start, which the first process to ask for them fills.

        They lie in memory once, however many processes have them; what one writes to them is its own from then on.
        Raises ConnectionError when the process that created the segment has ended.
        """
        r = self.reference
        descriptor = self._opened(r)
        if descriptor is None:
            raise ConnectionError("the process that shares its memory here is gone")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # a process that is killed gives it up, too
            try:
                if os.pread(descriptor, 1, FILLED_AT) == b"\0":
                    fill(memoryview(self._map)[HEADER_BYTES + start :])
                    os.pwrite(descriptor, b"\1", FILLED_AT)
            finally:
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # here, since a mapping keeps the descriptor
            size = r.size - HEADER_BYTES - start
            return memoryview(mmap.mmap(descriptor, size, mmap.MAP_PRIVATE, offset=HEADER_BYTES + start))
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Give up the descriptor. The mapping goes with the last tensor over it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
