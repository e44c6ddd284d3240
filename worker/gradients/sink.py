"""Where the gradients of a backward pass go: from autograd's own tensors to the places the servers read.

Autograd hands over a fresh tensor for every gradient. A large one is moved when it is finished, while it is in cache;
small ones are moved together after the pass, because a call for each would cost more than the move. A linear layer's
weight gradient is computed in its place (`worker.gradients.linear`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch

from worker.gradients.engine import InPartsError
from worker.gradients.held import as_real
from worker.task.state import Alias

SMALL_NUMEL = 1 << 14


class GradientSink:
    """Takes the gradients of `parameters`, which are numbered in this order.

    aliases: parameters that lie in the memory of another, with the number of that one; it gets their gradients, too.
    together: move large ones, too, after the pass, as on a GPU, where calls cost more than memory that no cache holds.
    """

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        aliases: Sequence[tuple[int, Alias]] = (),
        *,
        together: bool = False,
    ) -> None:
        self._parameters = parameters
        self._aliases = [(index, alias) for index, alias in aliases if alias.tensor.requires_grad]
        tied = {index for index, _ in self._aliases}
        self._indices = {id(p): index for index, p in enumerate(parameters)}
        self._small = [i for i, p in enumerate(parameters) if together or p.numel() < SMALL_NUMEL or i in tied]
        self._large = set(range(len(parameters))) - set(self._small)
        self._on_final: Callable[[int], None] | None = None
        # Of the pass in progress: places, whether to add to them, large gradients still to come, those that came more
        # than once (as from reentrant checkpoints), and places that nothing has been written to.
        self._into: Sequence[torch.Tensor] = []
        self._add = False
        self._missing: set[int] = set()
        self._in_parts: set[int] = set()
        self._free: set[int] = set()
        self._unfinished = True
        self.missed: set[int] = set()  # parameters without a gradient in the last pass
        self._hook(self._large)

    def watch(self, on_final: Callable[[int], None]) -> None:
        """Tell of each parameter, by its number, when its gradient is written; small ones are moved one by one then."""
        self._on_final = on_final
        tied = {index for index, _ in self._aliases}
        alone = [index for index in self._small if index not in tied]
        self._hook(alone)
        self._large.update(alone)
        self._small = sorted(tied)

    def begin(self, into: Sequence[torch.Tensor], *, add: bool) -> None:
        """A backward pass begins. into: a place for each parameter, to write to or to add to."""
        if self._unfinished:  # a pass that failed has left some
            for parameter in self._parameters:
                parameter.grad = None
            for _, alias in self._aliases:
                alias.tensor.grad = None
        self._unfinished = True
        self._in_parts.clear()
        self._into, self._add, self._missing = into, add, set(self._large)
        self._free = set() if add else set(self._large)

    def finish(self) -> None:
        """The pass is over: every place holds its gradient.

        Raises InPartsError when a gradient came in parts and the first was taken for the whole; places hold nothing of
        use then. The next pass waits for the rest of that gradient.
        """
        self._store_small()
        self._unfinished = False
        self.missed = set(self._missing)
        if self._in_parts:
            self._large -= self._in_parts
            self._small += sorted(self._in_parts)
            raise InPartsError
        for index in self._missing:
            # Zeros rather than nothing, and zeros are added too (-0 + 0 is 0): so the bits are the same however the
            # tree is cut.
            if self._add:
                self._into[index].add_(0.0)
            else:
                self._into[index].zero_()
            if self._on_final is not None:
                self._on_final(index)

    def place(self, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        """Where this gradient may be written at once: its place, unless something is there or is to be added to."""
        index = self._indices.get(id(parameter), -1)
        if index not in self._free or self._into[index].dtype != parameter.dtype:
            return None
        self._free.discard(index)
        return self._into[index].detach()

    def _hook(self, indices: Iterable[int]) -> None:
        for index in indices:
            self._parameters[index].register_post_accumulate_grad_hook(partial(self._store, index))  # type: ignore[no-untyped-call]

    def _store(self, index: int, parameter: torch.Tensor) -> None:
        """Move a gradient that autograd has just finished to its place, while it is in cache, and free it."""
        gradient = parameter.grad
        if gradient is None or index not in self._large:  # it got none in this pass; or all of it is moved later
            return
        parameter.grad = None
        if index not in self._missing:
            self._in_parts.add(index)
        self._missing.discard(index)
        into = self._into[index]
        if gradient.is_sparse:
            gradient = gradient.to_dense()
        gradient = as_real(gradient)
        if self._add:
            into.add_(gradient)
        elif gradient.data_ptr() != into.data_ptr():
            into.copy_(gradient)
        if self._on_final is not None and index not in self._in_parts:
            self._on_final(index)

    def _store_small(self) -> None:
        """Move the small gradients to their places in one call, and with them those that come in parts."""
        targets, gradients = [], []
        self._add_aliases()
        for index in self._small:
            parameter = self._parameters[index]
            gradient = parameter.grad
            if gradient is None:
                self._missing.add(index)
                continue
            parameter.grad = None
            targets.append(self._into[index])
            gradients.append(as_real(gradient.to_dense() if gradient.is_sparse else gradient))
        if not targets:
            return
        with torch.no_grad():
            if self._add:
                torch._foreach_add_(targets, gradients)
            else:
                torch._foreach_copy_(targets, gradients)
        if self._on_final is not None:
            for index in set(self._small) - self._missing:
                self._on_final(index)

    def _add_aliases(self) -> None:
        """Add the gradients of aliases to those of the parameters they lie in."""
        for index, alias in self._aliases:
            gradient, alias.tensor.grad = alias.tensor.grad, None
            if gradient is None:
                continue
            parameter = self._parameters[index]
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
            whole = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad.contiguous()
            alias.over(whole).add_(gradient.to_dense() if gradient.is_sparse else gradient)
            parameter.grad = whole
