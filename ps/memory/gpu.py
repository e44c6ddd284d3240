"""A GPU as the processes that compute on it see it: its memory, copies from and to the host's, and how processes share.

Processes on one GPU read each other's memory there (CUDA IPC). All others meet in memory of the host, which is locked
in place for the GPU, so that copies run on a stream of their own beside computation.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Protocol

import torch

COPY_BYTES = 32 << 20  # a copy is cut in such pieces, so that none holds up another stream for long


@dataclass(frozen=True, slots=True)
class DeviceReference:
    """What another process needs to map a tensor on the same GPU: what PyTorch's storages give each other.

    size, offset: in bytes, of the storage and in the allocation that it lies in. counter: of those who use it. event:
    what was computed before it was shared.
    """

    handle: bytes
    size: int
    offset: int
    counter: bytes
    counter_offset: int
    event: bytes
    awaits_event: bool


class DeviceError(Exception):
    """A GPU, or another process's memory on it, cannot be used. The message says why."""


class Device(Protocol):
    """One GPU. `CudaDevice` is one."""

    torch_device: torch.device
    identity: str  # equal for two processes when they can share memory there

    def share(self, tensor: torch.Tensor) -> DeviceReference:
        """Let one other process map a tensor, which is the whole of its storage. To be called for each process."""

    def open(self, reference: DeviceReference, dtype: torch.dtype, numel: int) -> torch.Tensor:
        """Map what another process shares. Raises DeviceError."""

    def lock(self, host: torch.Tensor) -> None:
        """Keep memory of the host where it is until the process ends, for copies to run beside computation.

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
        self.identity = str(torch.cuda.get_device_properties(self.torch_device).uuid)
        self._copies = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]

    def share(self, tensor: torch.Tensor) -> DeviceReference:
        """See Device."""
        _, handle, size, offset, counter, counter_offset, event, awaits = tensor.untyped_storage()._share_cuda_()  # type: ignore[no-untyped-call]
        return DeviceReference(handle, size, offset, counter, counter_offset, event, awaits)

    def open(self, reference: DeviceReference, dtype: torch.dtype, numel: int) -> torch.Tensor:
        """See Device."""
        if reference.size < numel * dtype.itemsize:
            raise DeviceError(f"{reference.size} bytes are shared, and {numel * dtype.itemsize} are needed")
        try:
            storage = torch.UntypedStorage._new_shared_cuda(
                self.torch_device.index,
                reference.handle,
                reference.size,
                reference.offset,
                reference.counter,
                reference.counter_offset,
                reference.event,
                reference.awaits_event,
            )
        except RuntimeError as error:
            raise DeviceError(f"CUDA IPC: {error}") from error
        return torch.empty(0, dtype=dtype, device=self.torch_device).set_(storage, 0, (numel,), (1,))

    def lock(self, host: torch.Tensor) -> None:
        """See Device."""
        if host.numel() and not host.is_pinned():
            code = torch.cuda.cudart().cudaHostRegister(host.data_ptr(), host.nbytes, 0)  # type: ignore[no-untyped-call]
            if int(code):
                problem = (
                    f"{host.nbytes} bytes of the host's memory cannot be locked for copies (CUDA error {int(code)})"
                )
                raise DeviceError(f"{problem}; allow more with `ulimit -l`")

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


def device_of(name: str) -> Device | None:
    """The GPU behind a device's name in a spec; None for the CPU."""
    return None if name == "cpu" else CudaDevice()
