"""What workers, servers and the controller say to each other, as plain values; `ps.wire.convert` encodes them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

PROTOCOL = 11


class Round(StrEnum):
    """What a round of work is for."""

    INITIALIZE = "initialize"  # one worker sends the initial parameters
    TRAIN = "train"
    EVALUATE = "evaluate"
    DIAGNOSE = "diagnose"  # recompute a step whose sum was not finite, to find the micro-batch
    SHOW = "show"  # servers show workers the average, or the parameters again; it begins with its decision


class Outcome(StrEnum):
    """What became of a push."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"  # every node of it was held already
    LATE = "late"  # of a round that is over
    AHEAD = "ahead"  # of a round this shard has not reached: a fault of the sender


class PushedNode(NamedTuple):
    """A node of the canonical tree and the slot its sum lies in; None: it had no samples."""

    low: int
    high: int
    slot: int | None


class LeafResult(NamedTuple):
    """What a worker measured in one micro-batch: the loss sum, its weight, and sums of values.

    values: in an evaluation, of the metrics; in training, of what the loss function returned besides, by weight.
    nonfinite: the first parameter with a non-finite gradient; bad_samples: those that make it so, or the loss, by their
    numbers in the data, which a diagnosis looks for. times_usual: the mean loss to that of other micro-batches, of one
    that is far above them; bad_samples are then those that make it so. squares: see StepSignals.leaves.
    """

    leaf: int
    loss: float
    weight: float
    samples: int
    values: tuple[float, ...] = ()
    nonfinite: str = ""
    bad_samples: tuple[int, ...] = ()
    squares: bytes = b""
    times_usual: float = 0.0


class Outlier(NamedTuple):
    """A micro-batch whose mean loss is far above what is usual. samples: those to blame, where they are known."""

    micro_batch: int
    worker: str
    loss: float
    times_usual: float
    samples: tuple[int, ...] = ()

    def to_bytes(self) -> bytes:
        """For a StepRecord."""
        return json.dumps(self).encode()

    @staticmethod
    def from_bytes(data: bytes) -> Outlier:
        """The inverse of `to_bytes`."""
        micro_batch, worker, loss, times_usual, samples = json.loads(data)
        return Outlier(micro_batch, worker, loss, times_usual, tuple(samples))


class Assign(NamedTuple):
    """Ranges of micro-batches to compute in a step. buffers: None when they are as in the last assignment.

    host_ranges: those of all workers on this one's host, when a job has several hosts. version: of the parameters to
    compute with; see ShardState. direction: instead of gradients, products of the loss's second derivatives with this
    vector, as bytes of the layout's elements, are wanted; empty: gradients.
    """

    step: int
    kind: Round
    ranges: tuple[tuple[int, int], ...]
    buffers: bytes | None = None
    host_ranges: tuple[tuple[int, int], ...] = ()
    version: int = 0
    direction: bytes = b""


class Push(NamedTuple):
    """A worker's answer to one Assign. buffers: as micro-batch 0 left them, if it is among the leaves.

    host_ranges: as in the Assign. constants: the frozen parameters, once, when parameters are initialized.
    data_seconds: spent reading samples since the last push, while the servers worked or after that.
    activations: of micro-batch 0, in some steps; see StepRecord. curvature: of micro-batch 0 in some steps: the largest
    and the smallest eigenvalue of its mean loss's Hessian.
    """

    step: int
    kind: Round
    nodes: tuple[PushedNode, ...]
    leaves: tuple[LeafResult, ...]
    buffers: bytes | None = None
    seconds: float = 0.0
    host_ranges: tuple[tuple[int, int], ...] = ()
    constants: bytes | None = None
    data_seconds: float = 0.0
    activations: bytes | None = None
    curvature: tuple[float, ...] = ()


class Ready(NamedTuple):
    """Of a sum that is still computed, the elements [start, stop) of the layout, which stay as they are.

    low, high: the node it will be pushed as, of a training round; slot: where it lies. host_ranges: as in the Assign.
    """

    step: int
    low: int
    high: int
    slot: int
    start: int
    stop: int
    host_ranges: tuple[tuple[int, int], ...] = ()


class Printed(NamedTuple):
    """A line that user code printed in a worker. time: in seconds since the epoch. stream: stdout or stderr."""

    time: float
    stream: str
    text: str
    worker: str = ""


@dataclass(frozen=True, slots=True)
class Failure:
    """User code or data failed in a way that ends the job. `reason` is a stable word, `message` a sentence.

    layer: the parameter whose gradient is not finite, if that is what is wrong. samples: those to blame, by their
    numbers in the data, where they are known.
    """

    step: int
    micro_batch: int
    reason: str
    message: str
    traceback: str = ""
    kind: Round = Round.TRAIN
    layer: str = ""
    samples: tuple[int, ...] = ()


class Decision(NamedTuple):
    """One decision for all shards: apply sum / divisor * coefficient as the gradient, with `lr`, or nothing.

    Of a round that shows: whether workers are to see the average; there is no sum. loss: the mean. last: whether the
    job ends with this step. coefficients: for each parameter besides, if every one is clipped by itself; float64,
    little-endian.
    """

    step: int
    kind: Round
    apply: bool
    divisor: float = 1.0
    coefficient: float = 1.0
    lr: float = 0.0
    loss: float = 0.0
    last: bool = False
    coefficients: bytes = b""


class StepRecord(NamedTuple):
    """What the leader saw in one step. Norms are of the mean gradient; times are in seconds.

    data_seconds: of the worker that waited longest for samples; reading beside the servers' work is no waiting.
    worker_seconds: that the worker with most to do spent on its micro-batches; mean_worker_seconds:
    of all that had something to do.
    slowest_worker: the number of the one that took longest for a micro-batch, and slowest_ratio: its time to the median
    of the others'; -1 and 1 where there are no others.
    parameter_norms: of each parameter's gradient before the clip, in the layout's order; logged: means of what the loss
    function returned besides, in the order of JobConfig.logged_names; signals: see ps.step.signals, row by row, where
    they are measured; activations: of each of the model's activation functions, in the order of its description, the
    share of saturated outputs, or of units that were off for all samples of micro-batch 0, then of each the root mean
    square of its outputs. All are float64, little-endian. histograms: of each parameter, where they are counted, in
    uint32; see ps.numerics.histogram. outlier: the worst Outlier of the step, if there is one. sharpness,
    smallest_eigenvalue: of the mean loss's Hessian in micro-batch 0, see worker.gradients.curvature; not a number where
    they are not measured.
    """

    step: int
    time: float
    loss: float
    lr: float
    weight: float
    samples: int
    gradient_norm: float
    clipped_norm: float
    clip_coefficient: float
    clipped: bool
    skipped: bool
    workers: int
    step_seconds: float
    compute_seconds: float
    reduce_seconds: float
    apply_seconds: float
    parameter_norms: bytes = b""
    data_seconds: float = 0.0
    logged: bytes = b""
    slowest_worker: int = -1
    slowest_ratio: float = 1.0
    signals: bytes = b""
    activations: bytes = b""
    worker_seconds: float = 0.0
    mean_worker_seconds: float = 0.0
    histograms: bytes = b""
    outlier: bytes = b""
    sharpness: float = math.nan
    smallest_eigenvalue: float = math.nan


# What is measured of activation functions, in order.
ACTIVATION_SIGNALS = ("activation_share", "activation_rms")
# Those fields of a StepRecord.
RECORD_BYTES = ("parameter_norms", "logged", "signals", "activations", "histograms", "outlier")
