"""Parameters that the model holds in another type than the layout does.

The layout, and so the optimizer, has float32 or float64 only. A model's bfloat16 or float16 parameters are copies of
float32 ones, rounded anew for each version, so that no update is too small to count (Micikevicius et al. 2018, "Mixed
Precision Training"); complex parameters are views of pairs of real numbers, as torch.optim sees them, too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def as_real(tensor: torch.Tensor) -> torch.Tensor:
    """A parameter's value or gradient as the layout has it: complex numbers as pairs, in a last dimension of two."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


class Held:
    """dtypes: of the model's parameters, in the layout's order."""

    def __init__(self, dtypes: Sequence[torch.dtype]) -> None:
        self._dtypes = dtypes
        self._views: list[torch.Tensor] = []  # of the parameters that are copies
        self._copies: list[torch.Tensor] = []

    def over(self, views: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What the model's parameters are to be, given those of the layout."""
        self._views, self._copies = [], []
        held = []
        for view, dtype in zip(views, self._dtypes, strict=True):
            if dtype.is_complex:
                held.append(torch.view_as_complex(view))
            elif dtype == view.dtype:
                held.append(view)
            else:
                self._views.append(view)
                self._copies.append(view.to(dtype))
                held.append(self._copies[-1])
        return held

    def refresh(self) -> None:
        """Have another version in the copies."""
        if self._copies:
            torch._foreach_copy_(self._copies, self._views)
