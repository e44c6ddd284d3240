"""The server's inner loops, compiled: gradients are added along the canonical tree and measured in one pass.

A tile of all the gradients is in cache while it is added and squared. Sums of squares go to LANES float64 lanes by
position in the segment, and the lanes are added pairwise: the order of additions is fixed, so neither the threads, nor
the shards, nor the width of the processor's vectors show in the bits.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from ps.numerics.histogram import BINS, LOWEST_POWER

LANES = 128
TILE_NUMEL = 4096  # a multiple of LANES; two tiles of float32 fit a first-level cache of 32 KiB


@intrinsic
def _pointer(typing_context, address):
    """An address as a pointer."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


@njit(nogil=True, cache=True)
def _add(target, source):
    for i in range(target.size):
        target[i] += source[i]


@njit(nogil=True, cache=True)
def _measure(values, lanes):
    for start in range(0, values.size, LANES):
        part = values[start : start + LANES]
        for i in range(part.size):
            value = np.float64(part[i])
            lanes[i] += value * value


@njit(nogil=True, cache=True)
def _add_and_measure(target, source, lanes):
    for start in range(0, target.size, LANES):
        to, from_ = target[start : start + LANES], source[start : start + LANES]
        for i in range(to.size):
            added = to[i] + from_[i]
            to[i] = added
            value = np.float64(added)
            lanes[i] += value * value


@njit(nogil=True, cache=True)
def _folded(lanes):
    """The sum of all lanes, pairwise; they are used up."""
    half = LANES // 2
    while half:
        for i in range(half):
            lanes[i] += lanes[i + half]
        half //= 2
    return lanes[0]


# With signatures it is compiled, or found in the cache, on import: no step waits for it.
@njit(
    [
        f"void({real}[::1], int64[::1], int64, int64[:,::1], int64, int64[:,::1], float64[::1])"
        for real in ("float32", "float64")
    ],
    nogil=True,
    cache=True,
)
def reduce_and_measure(
    like: NDArray[np.floating],
    addresses: NDArray[np.int64],
    numel: int,
    additions: NDArray[np.int64],
    root: int,
    segments: NDArray[np.int64],
    sums: NDArray[np.float64],
) -> None:
    """Add gradients up, in place, and write the sum of squares of each segment of the result to `sums`.

    like: of the gradients' dtype. addresses: of the gradients, each of `numel` elements. additions: shape (k, 2), read
    in order as `gradient[to] += gradient[from]`; the last one makes gradient[root]. segments: shape (s, 2), half-open
    ranges of elements; what lies in none is left alone. sums: shape (s,).

    A sum is non-finite exactly when an element is (or, in float64, when its square is beyond range).
    """
    lanes = np.empty(LANES)
    last = len(additions) - 1
    for s in range(len(segments)):
        lanes[:] = 0.0
        for start in range(segments[s, 0], segments[s, 1], TILE_NUMEL):
            stop = min(start + TILE_NUMEL, segments[s, 1])
            for k in range(last):
                target = carray(_pointer(addresses[additions[k, 0]]), numel, like.dtype)
                source = carray(_pointer(addresses[additions[k, 1]]), numel, like.dtype)
                _add(target[start:stop], source[start:stop])
            result = carray(_pointer(addresses[root]), numel, like.dtype)[start:stop]
            if last >= 0:
                source = carray(_pointer(addresses[additions[last, 1]]), numel, like.dtype)
                _add_and_measure(result, source[start:stop], lanes)
            else:
                _measure(result, lanes)
        sums[s] = _folded(lanes)


@njit(
    [f"void({real}[::1], int64[:,::1], float64[::1])" for real in ("float32", "float64")],
    nogil=True,
    cache=True,
)
def sums_of_squares(values: NDArray[np.floating], segments: NDArray[np.int64], sums: NDArray[np.float64]) -> None:
    """Write the sum of squares of each segment to `sums`. segments, sums: as for `reduce_and_measure`."""
    lanes = np.empty(LANES)
    for s in range(len(segments)):
        lanes[:] = 0.0
        _measure(values[segments[s, 0] : segments[s, 1]], lanes)
        sums[s] = _folded(lanes)


@njit(
    [f"void({real}[::1], int64[:,::1], float64[:,::1])" for real in ("float32", "float64")],
    nogil=True,
    cache=True,
)
def measure_magnitudes(values: NDArray[np.floating], segments: NDArray[np.int64], out: NDArray[np.float64]) -> None:
    """Of each segment, write the sum of magnitudes, the largest one, and the number of zeros. out: shape (s, 3)."""
    sums, most, zeros = np.empty(LANES), np.empty(LANES, values.dtype), np.empty(LANES, np.int32)
    for s in range(len(segments)):
        sums[:], most[:], zeros[:] = 0.0, 0.0, 0
        for start in range(segments[s, 0], segments[s, 1], LANES):
            part = values[start : min(start + LANES, segments[s, 1])]
            # Loops of their own, and fmax, for only so are they compiled to vectors.
            for i in range(part.size):
                sums[i] += np.float64(abs(part[i]))
            for i in range(part.size):
                most[i] = np.fmax(most[i], abs(part[i]))
            for i in range(part.size):
                zeros[i] += part[i] == 0
        largest, count = most[0], zeros[0]
        for i in range(1, LANES):
            largest = np.fmax(largest, most[i])
            count += zeros[i]
        out[s, 0], out[s, 1], out[s, 2] = _folded(sums), largest, count


@njit(
    [f"void({real}[::1], {real}[::1], int64[:,::1], float64[:,::1])" for real in ("float32", "float64")],
    nogil=True,
    cache=True,
)
def measure_update(
    before: NDArray[np.floating], after: NDArray[np.floating], segments: NDArray[np.int64], out: NDArray[np.float64]
) -> None:
    """Of each segment, write the sum of squares of `after - before` and that of `before`. out: shape (s, 2)."""
    updates, squares = np.empty(LANES), np.empty(LANES)
    for s in range(len(segments)):
        updates[:], squares[:] = 0.0, 0.0
        for start in range(segments[s, 0], segments[s, 1], LANES):
            stop = min(start + LANES, segments[s, 1])
            old, new = before[start:stop], after[start:stop]
            for i in range(old.size):
                value = np.float64(old[i])
                update = np.float64(new[i]) - value
                updates[i] += update * update
                squares[i] += value * value
        out[s, 0], out[s, 1] = _folded(updates), _folded(squares)


@njit(
    [f"void({real}[::1], float64, int64[:,::1], uint32[:,::1])" for real in ("float32", "float64")],
    nogil=True,
    cache=True,
)
def count_magnitudes(
    values: NDArray[np.floating], divisor: float, segments: NDArray[np.int64], out: NDArray[np.uint32]
) -> None:
    """Of each segment, count the magnitudes of `values / divisor` by powers of four. out: shape (s, BINS).

    What lies below or above all bins is in the first or last one; zeros are in none.
    """
    tile = np.empty(LANES)
    bits = tile.view(np.int64)
    counts = np.empty((4, BINS + 1), np.uint32)  # of every fourth element: additions to one bin wait for each other
    for s in range(len(segments)):
        counts[:] = 0
        for start in range(segments[s, 0], segments[s, 1], LANES):
            part = values[start : min(start + LANES, segments[s, 1])]
            for i in range(part.size):
                tile[i] = abs(np.float64(part[i]) / divisor)
            for i in range(part.size):
                exponent = bits[i] >> 52  # plus 1023; 0 for zero
                place = min(max(((exponent + 1) >> 1) - 512 - LOWEST_POWER, 0), BINS - 1)
                bits[i] = place if exponent else BINS
            for i in range(part.size):
                counts[i & 3, bits[i]] += np.uint32(1)
        for i in range(BINS):
            out[s, i] = counts[0, i] + counts[1, i] + counts[2, i] + counts[3, i]
