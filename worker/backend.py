"""All that differs between a worker on a CPU and one on a CUDA device: where tensors live, and how they get there.

Servers read gradients, and write parameters, in the host's memory. On a CPU that is where they are computed; from a GPU
they are copied, on a stream of their own and from and to memory that is locked in place, so that copies of one sum run
beside the computation of the next.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from worker.data import to_device

BUCKET_BYTES = 32 << 20  # a copy is cut in such pieces, so that none holds up another stream for long


class Backend(Protocol):
    """The device of a worker. `CpuBackend` and `CudaBackend` are the two."""

    device: torch.device

    def parameters(self, shared: torch.Tensor) -> torch.Tensor:
        """Where the model's parameters are to lie: shape and dtype as `shared`, which the servers write."""

    def refresh(self, parameters: torch.Tensor, shared: torch.Tensor) -> None:
        """Have the version that is in `shared` in `parameters`."""

    def gradient(self, shared: torch.Tensor) -> torch.Tensor:
        """Where a gradient sum is to grow that servers will read in `shared`."""

    def publish(self, gradient: torch.Tensor, shared: torch.Tensor) -> None:
        """Begin to bring a sum to `shared`."""

    def wait(self) -> None:
        """Return when all that was published is there."""

    def batch(self, batch: Any) -> Any:
        """A batch where the model can use it."""

    def seed(self, value: int) -> None:
        """Seed the device's own random generator."""


class CpuBackend:
    """Everything is where the servers see it."""

    device = torch.device("cpu")

    def parameters(self, shared: torch.Tensor) -> torch.Tensor:
        """See Backend."""
        return shared

    def refresh(self, parameters: torch.Tensor, shared: torch.Tensor) -> None:
        """See Backend."""

    def gradient(self, shared: torch.Tensor) -> torch.Tensor:
        """See Backend."""
        return shared

    def publish(self, gradient: torch.Tensor, shared: torch.Tensor) -> None:
        """See Backend."""

    def wait(self) -> None:
        """See Backend."""

    def batch(self, batch: Any) -> Any:
        """See Backend."""
        return batch

    def seed(self, value: int) -> None:
        """See Backend: torch's default generator is the CPU's."""


class CudaBackend:
    """A copy of the parameters and of every sum on one GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def parameters(self, shared: torch.Tensor) -> torch.Tensor:
        """See Backend."""
        _lock(shared)
        return torch.empty_like(shared, device=self.device)

    def refresh(self, parameters: torch.Tensor, shared: torch.Tensor) -> None:
        """See Backend."""
        self._copy(parameters, shared)
        torch.cuda.current_stream(self.device).wait_stream(self._copies)

    def gradient(self, shared: torch.Tensor) -> torch.Tensor:
        """See Backend."""
        _lock(shared)
        return torch.zeros_like(shared, device=self.device)

    def publish(self, gradient: torch.Tensor, shared: torch.Tensor) -> None:
        """See Backend."""
        self._copy(shared, gradient)

    def wait(self) -> None:
        """See Backend."""
        self._copies.synchronize()

    def batch(self, batch: Any) -> Any:
        """See Backend."""
        return to_device(batch, self.device)

    def seed(self, value: int) -> None:
        """See Backend."""
        torch.cuda.manual_seed(value)

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """On the stream for copies, after what has been computed so far, and in buckets."""
        numel = BUCKET_BYTES // target.itemsize
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copies):
            for to, from_ in zip(target.split(numel), source.split(numel), strict=True):  # type: ignore[no-untyped-call]
                to.copy_(from_, non_blocking=True)


def backend_of(device: str) -> Backend:
    """The backend of a spec's placement.device."""
    return CpuBackend() if device == "cpu" else CudaBackend(torch.device(device, 0))


def _lock(shared: torch.Tensor) -> None:
    """Keep memory where it is, for copies to run beside computation; without that they are only slower."""
    if shared.numel() and not shared.is_pinned():
        torch.cuda.cudart().cudaHostRegister(shared.data_ptr(), shared.nbytes, 0)  # type: ignore[no-untyped-call]
