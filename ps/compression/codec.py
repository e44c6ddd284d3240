"""Lossy codecs: what gradients and updates become on the network when a job asks for compression.

A codec takes what it sends out of the tensor it is given, so that what is left there is the residual, which goes into
the next call (error feedback: Seide et al. 2014; Karimireddy et al. 2019, "Error Feedback Fixes SignSGD"). What is sent
and what is left add up to what there was, to one rounding. All of it is deterministic, and works on blocks of the
layout or on whole parameters, so that a cut into shards shows in no bit.
"""

from __future__ import annotations

from typing import Protocol

import torch

from ps.parameters.layout import Layout


class Codec(Protocol):
    """One way to make a tensor over a range of the layout small. Payloads are uint8 tensors of a fixed length."""

    state_numel: int  # elements it keeps of every residual from call to call, besides the residual

    def initial_state(self) -> torch.Tensor:
        """The state before the first call, shape (state_numel,)."""

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """Which bytes of the whole layout's payload the elements [start, stop) need. Both are at blocks' bounds."""

    def encode(self, values: torch.Tensor, payload: torch.Tensor, state: torch.Tensor, start: int = 0) -> None:
        """Write the payload of `values`, which begin at `start`, and leave in them what it does not say.

        payload: shape (bytes of the span,). state: shape (state_numel,), updated.
        """

    def decode(self, payload: torch.Tensor, into: torch.Tensor, start: int = 0) -> None:
        """Add what a payload says to `into`, which begins at `start`."""


class Cast:
    """A shorter floating-point type. What is beyond its range is sent as its largest number."""

    state_numel = 0

    def __init__(self, layout: Layout, dtype: torch.dtype) -> None:
        self._layout = layout
        self._dtype = dtype
        self._largest = torch.finfo(dtype).max

    def initial_state(self) -> torch.Tensor:
        """See Codec."""
        return torch.empty(0, dtype=self._layout.dtype)

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """See Codec."""
        return start * self._dtype.itemsize, stop * self._dtype.itemsize

    def encode(self, values: torch.Tensor, payload: torch.Tensor, state: torch.Tensor, start: int = 0) -> None:
        """See Codec."""
        sent = payload.view(self._dtype)
        sent.copy_(values)
        sent.clamp_(-self._largest, self._largest)
        values.sub_(sent)

    def decode(self, payload: torch.Tensor, into: torch.Tensor, start: int = 0) -> None:
        """See Codec."""
        into.add_(payload.view(self._dtype))
