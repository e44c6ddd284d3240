"""A GPU as the process that computes on it sees it: its memory, and copies from and to the host's.

A worker and the server on its GPU are in one process and on one stream, so what one has begun comes before what the
other begins, and neither waits. All others meet in memory of the host, which is locked in place for the GPU, so that
copies run on a stream of their own beside computation.
"""

from __future__ import annotations

import contextlib
import socket
from typing import Protocol

import torch

from ps.memory.segment import before_unmapping

COPY_BYTES = 32 << 20  # a copy is cut in such pieces, so that none holds up another stream for long


class DeviceError(Exception):
    """A GPU, or another process's memory on it, cannot be used. The message says why."""


class Device(Protocol):
    """One GPU. `CudaDevice` is one."""

    torch_device: torch.device

    def lock(self, host: torch.Tensor) -> None:
        """Keep memory of the host where it is for as long as it is mapped, for copies to run beside computation.

        Raises DeviceError. Copies of memory that is not locked take their time in the caller's thread.
        """

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Begin to copy, between host and GPU or on it, when what has been computed so far is done."""

    def await_copies(self) -> None:
        """Have what is computed from now on wait for all copies."""

    def synchronize(self) -> None:
        """Return when all that was begun, computation and copies, is done."""

    def seed(self, value: int) -> None:
        """Seed the GPU's random generator."""


class CudaDevice:
    """The first GPU that CUDA shows this process: Ray shows an actor the one that it was given. Raises DeviceError."""

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise DeviceError(
                f"PyTorch {torch.__version__} finds no CUDA device on {socket.gethostname()}, where Ray counts a GPU; "
                "install a PyTorch with CUDA and a driver there, or use placement.device = cpu"
            )
        self.torch_device = torch.device("cuda", 0)
        self._copies = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]

    def lock(self, host: torch.Tensor) -> None:
        """See Device."""
        if host.numel() and not host.is_pinned():
            address = host.data_ptr()
            code = torch.cuda.cudart().cudaHostRegister(address, host.nbytes, 0)  # type: ignore[no-untyped-call]
            if int(code):
                problem = (
                    f"{host.nbytes} bytes of the host's memory cannot be locked for copies (CUDA error {int(code)})"
                )
                raise DeviceError(f"{problem}; allow more with `ulimit -l`")
            before_unmapping(host, lambda: _unlock(address))

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """See Device."""
        numel = COPY_BYTES // target.itemsize
        self._copies.wait_stream(torch.cuda.current_stream(self.torch_device))
        with torch.cuda.stream(self._copies):
            for to, from_ in zip(target.split(numel), source.split(numel), strict=True):  # type: ignore[no-untyped-call]
                to.copy_(from_, non_blocking=True)

    def await_copies(self) -> None:
        """See Device."""
        torch.cuda.current_stream(self.torch_device).wait_stream(self._copies)

    def synchronize(self) -> None:
        """See Device."""
        torch.cuda.synchronize(self.torch_device)

    def seed(self, value: int) -> None:
        """See Device."""
        torch.cuda.manual_seed(value)


def _unlock(address: int) -> None:
    """Undo a lock: the next mapping may lie at the same address, and would count as locked."""
    with contextlib.suppress(Exception):  # at the end of the process CUDA may be gone already
        torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]


def device_of(name: str) -> Device | None:
    """The GPU behind a device's name in a spec; None for the CPU."""
    return None if name == "cpu" else CudaDevice()
