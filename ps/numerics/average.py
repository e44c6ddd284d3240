"""A running average of a shard's parameters: exponential (EMA), the mean of versions (SWA, Izmailov et al. 2018), or
the slow parameters of Lookahead (Zhang, Lucas, Hinton, Ba 2019), to which the others go back whenever it is updated.

As torch.optim.swa_utils has the first two, but for the last bits: each operation here rounds alike wherever a shard is
cut.
"""

from __future__ import annotations

import torch

from ps.parameters.layout import BLOCK_NUMEL
from steepest.step_spec import AverageSpec

GPU_CHUNK_NUMEL = 128 * BLOCK_NUMEL


class RunningAverage:
    """parameters: the shard's, shape (shard.numel,), which it averages. step: how many steps are done."""

    def __init__(self, spec: AverageSpec, parameters: torch.Tensor, step: int) -> None:
        self._spec = spec
        self._parameters = parameters
        self._values = parameters.clone()
        self._step = step
        chunk = BLOCK_NUMEL if parameters.device.type == "cpu" else GPU_CHUNK_NUMEL
        self._pieces = list(zip(parameters.split(chunk), self._values.split(chunk), strict=True))  # type: ignore[no-untyped-call]
        self._scratch = torch.empty(min(chunk, len(parameters)), dtype=parameters.dtype, device=parameters.device)

    @property
    def values(self) -> torch.Tensor:
        """The average, shape (shard.numel,); the parameters until it begins."""
        begun = self._spec.is_lookahead or self._spec.updates(self._step - 1)
        return self._values if begun else self._parameters

    def begin(self) -> None:
        """The parameters have their initial values."""
        self._values.copy_(self._parameters)

    def restore(self, values: torch.Tensor) -> None:
        """Go on from an average of a checkpoint."""
        self._values.copy_(values)

    def advance(self) -> bool:
        """Another step is done. Returns whether the parameters were changed."""
        if self._spec.is_lookahead:
            self._step += 1
            is_due = self._step % self._spec.every == 0
            if is_due:
                self._move(self._spec.pull)
                self._parameters.copy_(self._values)
            return is_due
        spec, count = self._spec, self._spec.updates(self._step)
        is_due = count > self._spec.updates(self._step - 1)
        self._step += 1
        if is_due and count == 1:
            self._values.copy_(self._parameters)
        elif is_due:
            self._move(1.0 / count if spec.name == "swa" else 1.0 - spec.decay)
        return False

    def _move(self, weight: float) -> None:
        """Bring the average this share of the way to the parameters."""
        for parameters, values in self._pieces:
            difference = torch.sub(parameters, values, out=self._scratch[: len(values)])
            values.add_(difference.mul_(weight))
