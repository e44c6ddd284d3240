"""All that differs between a worker on a CPU and one on a GPU: where tensors live, and how they get there.

Servers read gradients, and write parameters, in the host's memory. On a CPU that is where they are computed; from a GPU
they are copied, beside the computation of the next sum. What the server in the worker's own process owns stays there.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from ps.memory.gpu import Device, device_of
from ps.numerics.ranges import gaps
from worker.data.sources import to_device


class Backend(Protocol):
    """The device of a worker. `CpuBackend` and `DeviceBackend` are the two."""

    device: torch.device
    gpu: Device | None  # the GPU, if it is one

    def share(self, parameters: torch.Tensor, start: int, stop: int) -> None:
        """Compute with `parameters`, shape (layout.numel,), where the server in this process writes [start, stop).

        To be called before anything else, if at all.
        """

    @property
    def publishes(self) -> bool:
        """Whether a sum takes a while to be where the servers see it, so that it pays to begin early."""

    def parameters(self, shared: torch.Tensor) -> torch.Tensor:
        """Where the model's parameters are to lie: shape and dtype as `shared`, which the servers write."""

    def refresh(self, parameters: torch.Tensor, shared: torch.Tensor) -> None:
        """Have the version that is in `shared` in `parameters`."""

    def gradient(self, shared: torch.Tensor) -> torch.Tensor:
        """Where a gradient sum is to grow that servers will read in `shared`."""

    def publish(self, gradient: torch.Tensor, shared: torch.Tensor, start: int, stop: int) -> None:
        """Begin to bring the elements [start, stop) of a sum to `shared`. Both have shape (layout.numel,)."""

    def wait(self) -> None:
        """Return when all that was published is there."""

    def batch(self, batch: Any) -> Any:
        """A batch where the model can use it."""

    def seed(self, value: int) -> None:
        """Seed the device's own random generator."""


class CpuBackend:
    """Everything is where the servers see it."""

    device = torch.device("cpu")
    gpu: Device | None = None
    publishes = False

    def share(self, parameters: torch.Tensor, start: int, stop: int) -> None:
        """See Backend: no server is on a GPU."""

    def parameters(self, shared: torch.Tensor) -> torch.Tensor:
        """See Backend."""
        return shared

    def refresh(self, parameters: torch.Tensor, shared: torch.Tensor) -> None:
        """See Backend."""

    def gradient(self, shared: torch.Tensor) -> torch.Tensor:
        """See Backend."""
        return shared

    def publish(self, gradient: torch.Tensor, shared: torch.Tensor, start: int, stop: int) -> None:
        """See Backend."""

    def wait(self) -> None:
        """See Backend."""

    def batch(self, batch: Any) -> Any:
        """See Backend."""
        return batch

    def seed(self, value: int) -> None:
        """See Backend: torch's default generator is the CPU's."""


class DeviceBackend:
    """A copy of the parameters and of every sum on one GPU."""

    def __init__(self, gpu: Device) -> None:
        self.gpu: Device | None = gpu
        self._gpu = gpu
        self.device = gpu.torch_device
        self._parameters: torch.Tensor | None = None
        self._here: list[tuple[int, int]] = []  # elements that the server in this process owns
        self._has_rest = True

    def share(self, parameters: torch.Tensor, start: int, stop: int) -> None:
        """See Backend."""
        self._parameters = parameters
        self._here = [(start, stop)] if start < stop else []
        self._has_rest = bool(gaps(0, len(parameters), self._here))

    @property
    def publishes(self) -> bool:
        """See Backend."""
        return self._has_rest

    def parameters(self, shared: torch.Tensor) -> torch.Tensor:
        """See Backend."""
        if self._has_rest:
            self._gpu.lock(shared)
        return torch.empty_like(shared, device=self.device) if self._parameters is None else self._parameters

    def refresh(self, parameters: torch.Tensor, shared: torch.Tensor) -> None:
        """See Backend."""
        if self._has_rest:
            for start, stop in gaps(0, len(shared), self._here):
                self._gpu.copy(parameters[start:stop], shared[start:stop])
            self._gpu.await_copies()

    def gradient(self, shared: torch.Tensor) -> torch.Tensor:
        """See Backend."""
        if self._has_rest:
            self._gpu.lock(shared)
        return torch.zeros_like(shared, device=self.device)

    def publish(self, gradient: torch.Tensor, shared: torch.Tensor, start: int, stop: int) -> None:
        """See Backend."""
        for first, last in gaps(start, stop, self._here):
            self._gpu.copy(shared[first:last], gradient[first:last])

    def wait(self) -> None:
        """See Backend: the server in this process comes after what was begun here, without waiting."""
        if self._has_rest:
            self._gpu.synchronize()

    def batch(self, batch: Any) -> Any:
        """See Backend."""
        return to_device(batch, self.device)

    def seed(self, value: int) -> None:
        """See Backend."""
        self._gpu.seed(value)


def backend_of(name: str) -> Backend:
    """The backend of a spec's placement.device."""
    device = device_of(name)
    return CpuBackend() if device is None else DeviceBackend(device)
