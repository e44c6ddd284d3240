"""What holds a job's steps up, in one word, and how much sooner they would be over without it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

COLUMNS = (
    "step_seconds", "data_seconds", "compute_seconds", "reduce_seconds", "apply_seconds", "worker_seconds",
    "mean_worker_seconds", "workers",
)  # fmt: skip
PARTS = ("data", "compute", "straggler", "network", "reduce", "apply")
NOTABLE = 0.25  # share of a step from which on something other than computing holds it up
RECENT_STEPS = 200
REMEDIES = {
    "input-bound": "read ahead in processes of their own (data.readers), or keep the data nearer",
    "straggler-bound": "look at what else runs on the slowest worker's host, or use more and smaller micro-batches",
    "network-bound": "use larger steps (data.global_batch), fewer hosts, or compressed messages (compression.name)",
    "server-bound": "use more servers (placement.servers), or leave the servers more cores",
    "compute-bound": "use more workers, or bf16",
}


class Bottleneck(NamedTuple):
    """Of a job's last steps. word: input-, straggler-, network-, server- or compute-bound.

    seconds: of a step, medians. saves: of them, what a step would be shorter by without what it is bound by; for
    compute-bound, with one worker more. shares: of a step, by `step_parts`.
    """

    word: str
    seconds: float
    saves: float
    shares: dict[str, float]

    @property
    def saves_share(self) -> float:
        """`saves` as a share of a step."""
        return self.saves / self.seconds

    @property
    def remedy(self) -> str:
        """What to try."""
        return REMEDIES[self.word]


def step_parts(columns: Mapping[str, Any]) -> dict[str, NDArray[np.float64]]:
    """The parts of steps in seconds, one after another, by PARTS. columns: those of COLUMNS, arrays or numbers.

    data: waiting for samples; compute; straggler: waiting for the worker with most to do; network: messages, gradients
    and parameters on their way; reduce; apply. Reading may be part of the workers' own time, or have gone before it.
    Where that time was not measured, all is taken for theirs.
    """
    computing = np.nan_to_num(columns["compute_seconds"])
    worker, mean = np.nan_to_num(columns["worker_seconds"]), np.nan_to_num(columns["mean_worker_seconds"])
    data = np.minimum(np.nan_to_num(columns["data_seconds"]), computing)
    rest = computing - data
    busy = np.where(worker > 0, np.minimum(worker, rest), rest)
    waits = np.where(mean > 0, np.clip(worker - mean, 0.0, busy), 0.0)
    servers = (np.nan_to_num(columns[name]) for name in ("reduce_seconds", "apply_seconds"))
    return dict(zip(PARTS, (data, busy - waits, waits, rest - busy, *servers), strict=True))


def bottleneck(columns: Mapping[str, NDArray[Any]]) -> Bottleneck | None:
    """Of the records of some steps; None when there are none. columns: those of COLUMNS, by name."""
    if not len(columns["step_seconds"]):
        return None
    table = np.nan_to_num([columns[name] for name in COLUMNS])
    medians = dict(zip(COLUMNS, np.median(table, axis=1).tolist(), strict=True))
    whole = medians["step_seconds"]
    if not whole > 0:
        return None
    parts = {name: float(seconds) for name, seconds in step_parts(medians).items()}
    saves = {
        "input-bound": parts["data"],
        "straggler-bound": parts["straggler"],
        "network-bound": parts["network"],
        "server-bound": parts["reduce"] + parts["apply"],
    }
    word, most = max(saves.items(), key=lambda item: item[1])
    if most < NOTABLE * whole:
        word, most = "compute-bound", parts["compute"] / (medians["workers"] + 1)
    return Bottleneck(word, whole, most, {name: seconds / whole for name, seconds in parts.items()})
