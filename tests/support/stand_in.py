"""A GPU's place taken by memory of this process, for what of its use does not need one.

Copies are made as late as a GPU may make them. PyTorch sees memory of the host all the same, so a server takes what
lies there as it is, where on a GPU it would copy it.
"""

from __future__ import annotations

import secrets

import torch

from ps.memory.gpu import DeviceError, DeviceReference

_SHARED: dict[bytes, torch.Tensor] = {}


class StandInDevice:
    """One process's view of the GPU that is called `identity`. copied: bytes, so far."""

    torch_device = torch.device("cpu")

    def __init__(self, identity: str = "gpu-0") -> None:
        self.identity = identity
        self.copied = 0
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []

    def share(self, tensor: torch.Tensor) -> DeviceReference:
        assert tensor.storage_offset() == 0
        assert tensor.numel(), "CUDA has no handle for nothing"
        handle = self.identity.encode() + b"/" + secrets.token_bytes(8)
        _SHARED[handle] = tensor
        return DeviceReference(handle, tensor.untyped_storage().nbytes(), 0, b"counter", 0, b"event", awaits_event=True)

    def open(self, reference: DeviceReference, dtype: torch.dtype, numel: int) -> torch.Tensor:
        if reference.size < numel * dtype.itemsize:
            raise DeviceError(f"{reference.size} bytes are shared, and {numel * dtype.itemsize} are needed")
        if not reference.handle.startswith(self.identity.encode() + b"/"):
            raise DeviceError("CUDA IPC: invalid device context")
        return _SHARED.pop(reference.handle)[:numel]  # a reference is for one process

    def lock(self, host: torch.Tensor) -> None:
        pass

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        assert target.shape == source.shape
        self.copied += target.nbytes
        self._copies.append((target, source))

    def await_copies(self) -> None:
        copies, self._copies = self._copies, []
        for target, source in copies:
            target.copy_(source)

    def synchronize(self) -> None:
        self.await_copies()

    def seed(self, value: int) -> None:
        pass
