"""The buffers of a model: every micro-batch starts from the same values, and what it leaves can be read.

A forward pass may write to a buffer in place or bind another tensor under its name, so buffers are looked up by name
after each pass. Small ones are compared and restored by value. To do so with large ones (the masks of a transformer,
say) would cost more than the pass: they are compared while they are new, and after that when their version says so.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from worker.gradients.engine import StateError
from worker.task.state import Place

SMALL_NUMEL = 1 << 12
NEW_PASSES = 4  # in which a large buffer that is written to past its version, through `.data`, shows that it is


class _Large:
    """A buffer that is restored only when it may have changed."""

    def __init__(self, own: torch.Tensor, start: torch.Tensor) -> None:
        self.own = own
        self.start = start
        self._version = own._version
        self._passes = 0
        self._always = False

    def restore(self) -> None:
        """Have the value it starts from again, after a pass."""
        self._passes += 1
        if not self.differs(self.own):
            return
        self.own.copy_(self.start)
        self._version = self.own._version

    def replace(self, start: torch.Tensor) -> None:
        """Start from another value."""
        self.start = start
        self.own.copy_(start)
        self._version = self.own._version

    def differs(self, now: torch.Tensor) -> bool:
        """Whether a pass left another value than it started from. now: what is there under its name."""
        is_own = now is self.own
        moved = not is_own or self.own._version != self._version
        if not (moved or self._always or self._passes <= NEW_PASSES) or torch.equal(now, self.start):
            return False
        self._always |= not moved
        return True


class Buffers:
    """places: of the buffers, by name, in the order in which they are packed."""

    def __init__(self, places: Mapping[str, Place]) -> None:
        self._names = list(places)
        self._places = list(places.values())
        self._own: list[torch.Tensor] = []
        for place in self._places:
            tensor = place.tensor
            assert tensor is not None  # noqa: S101  # it was described
            if any(stride == 0 for stride in tensor.stride()):  # expanded: one element in many places
                tensor = tensor.contiguous()
                place.bind(tensor)
            self._own.append(tensor)
        starts = [own.detach().clone() for own in self._own]
        self._small = [i for i, own in enumerate(self._own) if own.numel() <= SMALL_NUMEL]
        self._small_own = [self._own[i] for i in self._small]
        self._small_start = [starts[i] for i in self._small]
        self._small_host = together(self._small_start, torch.device("cpu"))
        self._large = {i: _Large(self._own[i], starts[i]) for i in range(len(self._own)) if i not in set(self._small)}

    def start(self) -> None:
        """Before a pass: every buffer has the value it starts from."""
        if not self._own:
            return
        for place, own in zip(self._places, self._own, strict=True):
            if place.tensor is not own:
                place.bind(own)
        with torch.no_grad():
            if self._small:
                torch._foreach_copy_(self._small_own, self._small_start)
            for large in self._large.values():
                large.restore()

    def changed(self) -> list[torch.Tensor] | None:
        """The buffers as a pass left them, or None when it changed nothing.

        Raises StateError for one that is not there any more, or has another shape or type.
        """
        if not self._own:
            return None
        now = [place.tensor for place in self._places]
        for name, own, tensor in zip(self._names, self._own, now, strict=True):
            if tensor is not own:
                _check_same_kind(name, own, tensor)
        found: list[torch.Tensor] = [
            own if tensor is None else tensor for own, tensor in zip(self._own, now, strict=True)
        ]
        with torch.no_grad():
            small = together([found[i] for i in self._small], torch.device("cpu"))
            for i, tensor in zip(self._small, small, strict=True):
                found[i] = tensor
            small_same = all(map(torch.equal, small, self._small_host))
            differ = [large.differs(found[i]) for i, large in self._large.items()]  # each takes note
        if small_same and not any(differ):
            return None
        return [tensor.detach() for tensor in found]

    def replace(self, named: Mapping[str, torch.Tensor]) -> None:
        """Have every pass start from these values."""
        with torch.no_grad():
            values = [named[self._names[index]] for index in self._small]
            if values:
                torch._foreach_copy_(self._small_host, values)
                if self._small_host[0] is not self._small_start[0]:
                    torch._foreach_copy_(self._small_start, together(values, self._small_start[0].device))
            for index, large in self._large.items():
                value = named[self._names[index]].to(large.own.device)
                if not torch.equal(value, large.start):
                    large.replace(value)

    def starts(self) -> list[torch.Tensor]:
        """The values that passes start from."""
        small = dict(zip(self._small, self._small_start, strict=True))
        return [small[i] if i in small else self._large[i].start for i in range(len(self._own))]


def _check_same_kind(name: str, own: torch.Tensor, tensor: torch.Tensor | None) -> None:
    if tensor is None:
        raise StateError(f"forward removed the buffer {name!r}; have it write to the buffer instead")
    if tensor.shape != own.shape or tensor.dtype != own.dtype:
        raise StateError(
            f"forward changed the buffer {name!r} from {_kind(own)} to {_kind(tensor)}; a buffer keeps its shape and "
            "type: give it room from the start, or keep what varies in size out of the buffers"
        )


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def together(tensors: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Tensors on another device, all of one type in one copy; the same ones if they are there already."""
    if all(tensor.device == device for tensor in tensors):
        return tensors
    moved: dict[int, torch.Tensor] = {}
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        own = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
        flat = torch.cat([tensors[i].reshape(-1) for i in own]).to(device)
        parts = flat.split([tensors[i].numel() for i in own])  # type: ignore[no-untyped-call]
        moved.update((i, part.view(tensors[i].shape)) for i, part in zip(own, parts, strict=True))
    return [moved[i] for i in range(len(tensors))]
