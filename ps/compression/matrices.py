"""Parameters as matrices, for codecs that need them."""

from __future__ import annotations

from ps.parameters.layout import Placed


def thin_shape(placed: Placed, rank: int) -> tuple[int, int]:
    """(rows, columns) of a parameter as a matrix; (0, 0) when two thin ones of this rank would not be smaller."""
    rows = placed.shape[0] if len(placed.shape) > 1 and placed.numel else 0
    columns = placed.numel // rows if rows else 0
    return (rows, columns) if rank * (rows + columns) < placed.numel else (0, 0)
