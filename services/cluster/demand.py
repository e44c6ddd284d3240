"""What workers take of a cluster, in Ray's resources."""

from __future__ import annotations

from steepest.spec import PlacementSpec


def demand(placement: PlacementSpec, num_workers: int) -> dict[str, float]:
    """Ray's resources for so many workers."""
    needed = {"CPU": float(placement.threads_per_worker * num_workers)}
    if placement.device == "cuda":
        needed["GPU"] = float(num_workers)
    return needed
