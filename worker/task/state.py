"""All tensors of a task's model, and of its loss if that is a module, by name and by what becomes of them.

Trainable parameters are the servers'; buffers travel with the assignments; constants (frozen parameters) stay as the
task made them; an alias lies in the memory of a trainable parameter and follows it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ps.parameters.description import AliasDescription
from steepest.task import Task

LOSS_PREFIX = "loss."


class UnusableError(Exception):
    """The tensors of a task are such that it cannot be trained. The message says why, and what to do."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a module holds a buffer, or a frozen parameter: looked up by name, since a pass may bind another tensor."""

    module: nn.Module
    key: str

    @property
    def tensor(self) -> torch.Tensor | None:
        """What is there now."""
        return self.module._buffers.get(self.key, self.module._parameters.get(self.key))

    def bind(self, tensor: torch.Tensor) -> None:
        """Have this tensor there."""
        if self.key in self.module._parameters:
            self.module._parameters[self.key] = nn.Parameter(tensor, requires_grad=False)
        else:
            self.module._buffers[self.key] = tensor


@dataclass(frozen=True, slots=True)
class Alias:
    """A parameter or buffer over the memory of a trainable parameter. place: of a buffer."""

    description: AliasDescription
    tensor: torch.Tensor
    place: Place | None = None

    def over(self, base: torch.Tensor) -> torch.Tensor:
        """The same view of another tensor that has the shape of the parameter."""
        d = self.description
        return base.as_strided(d.shape, d.stride, base.storage_offset() + d.offset)


@dataclass(frozen=True)
class TaskState:
    """Each tensor once, in the modules' own order. `of` makes it."""

    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    constants: dict[str, nn.Parameter] = field(default_factory=dict)
    buffers: dict[str, Place] = field(default_factory=dict)
    aliases: dict[str, Alias] = field(default_factory=dict)

    @staticmethod
    def of(task: Task) -> TaskState:
        """The state of a task. Raises UnusableError for parameters whose memory overlaps in part."""
        state = TaskState()
        seen: set[int] = set()
        memory = _Memory()
        rest: list[tuple[str, nn.Parameter]] = []
        for name, parameter in _named(task):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            # A parameter that fills its memory in order is the one that others are views of.
            if parameter.requires_grad and _fills_its_memory(parameter):
                if not memory.add(name, parameter):
                    rest.append((name, parameter))
                    continue
                state.parameters[name] = parameter
            else:
                rest.append((name, parameter))
        for name, parameter in rest:
            alias = memory.alias(name, parameter)
            if alias is not None:
                state.aliases[name] = Alias(alias, parameter)
            elif parameter.requires_grad:
                memory.claim(name, parameter)
                state.parameters[name] = parameter
            else:
                state.constants[name] = parameter
        order = {name: index for index, (name, _) in enumerate(_named(task))}
        in_order = sorted(state.parameters.items(), key=lambda item: order[item[0]])
        state.parameters.clear()
        state.parameters.update(in_order)
        for prefix, root in roots(task):
            for path, module in root.named_modules(prefix=prefix.removesuffix(".")):
                for key, buffer in module._buffers.items():
                    if buffer is None or id(buffer) in seen:
                        continue
                    seen.add(id(buffer))
                    name = f"{path}.{key}" if path else key
                    alias = memory.alias(name, buffer)
                    if alias is None:
                        state.buffers[name] = Place(module, key)
                    else:
                        state.aliases[name] = Alias(alias, buffer, Place(module, key))
        return state

    def place(self, task: Task, name: str) -> Place:
        """Where a buffer or a frozen parameter is."""
        if name in self.buffers:
            return self.buffers[name]
        wanted = self.constants[name]
        for _, root in roots(task):
            for module in root.modules():
                for key, parameter in module._parameters.items():
                    if parameter is wanted:
                        return Place(module, key)
        raise KeyError(name)

    def names(self) -> dict[int, str]:
        """The name of each tensor, by its id."""
        named: dict[int, str] = {id(t): n for n, t in [*self.parameters.items(), *self.constants.items()]}
        named.update((id(place.tensor), name) for name, place in self.buffers.items())
        named.update((id(alias.tensor), name) for name, alias in self.aliases.items())
        return named


def roots(task: Task) -> list[tuple[str, nn.Module]]:
    """The model, and the loss if that is a module of its own; each with the prefix of the names in it."""
    found: list[tuple[str, nn.Module]] = [("", task.model)]
    loss = task.loss if task.loss is not None else task.batch_loss
    if isinstance(loss, nn.Module) and all(module is not loss for module in task.model.modules()):
        prefix = LOSS_PREFIX
        while hasattr(task.model, prefix.removesuffix(".")):
            prefix = f"task_{prefix}"
        found.append((prefix, loss))
    return found


def _named(task: Task) -> Iterator[tuple[str, nn.Parameter]]:
    for prefix, root in roots(task):
        yield from root.named_parameters(prefix=prefix.removesuffix("."))


def _fills_its_memory(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


class _Memory:
    """Which trainable parameter lies where."""

    def __init__(self) -> None:
        self._owners: dict[int, list[tuple[str, torch.Tensor]]] = {}

    def add(self, name: str, parameter: torch.Tensor) -> bool:
        """Enter one that fills its storage; False when another does, too."""
        return self._owners.setdefault(_storage(parameter), [(name, parameter)])[0][1] is parameter

    def claim(self, name: str, parameter: torch.Tensor) -> None:
        """Enter one that has a part of a storage for itself. Raises UnusableError when it does not."""
        others = self._owners.setdefault(_storage(parameter), [])
        for other, tensor in others:
            if parameter.numel() and tensor.numel() and _overlap(_span(parameter), _span(tensor)):
                raise UnusableError(
                    f"the parameters {other!r} and {name!r} share a part of their memory, which cannot be trained as "
                    "one; give each its own (parameter.data.clone()), or use one nn.Parameter in both places"
                )
        others.append((name, parameter))

    def alias(self, name: str, tensor: torch.Tensor) -> AliasDescription | None:
        """How a tensor lies in a parameter that fills its storage; None when it does not lie in any."""
        if not tensor.numel() or tensor.layout != torch.strided:
            return None
        for owner, base in self._owners.get(_storage(tensor), ()):
            if _fills_its_memory(base) and base.dtype == tensor.dtype:
                if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
                    raise UnusableError(
                        f"{name!r} repeats elements of the parameter {owner!r} (it was made by expand); expand it in "
                        "forward instead"
                    )
                offset = int(tensor.storage_offset() - base.storage_offset())
                return AliasDescription(name, owner, tuple(tensor.shape), tuple(tensor.stride()), offset)
        return None


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided and tensor.numel() else id(tensor)


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset())
    return start, start + reach + 1


def _overlap(one: Sequence[int], other: Sequence[int]) -> bool:
    return one[0] < other[1] and other[0] < one[1]
