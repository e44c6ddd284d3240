"""Between `ps.messages` and the wire. Only converters touch *_pb2."""

from __future__ import annotations

from dataclasses import fields
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from ps.messages import Assign, Decision, Failure, LeafResult, Push, PushedNode, Round, StepRecord
from ps.segment import SegmentReference
from steepest.v1 import exchange_pb2 as pb
from steepest.v1 import training_jobs_pb2 as jobs_pb

_RECORD_FIELDS = tuple(f.name for f in fields(StepRecord))
_ABSENT_SLOT = -1
_ROUNDS = {str(kind): kind for kind in Round}  # a lookup takes a tenth of what Round(kind) does


def segment_to_proto(reference: SegmentReference) -> pb.SegmentReference:
    """SegmentReference, to the wire."""
    return pb.SegmentReference(
        pid=reference.pid, descriptor=reference.descriptor, size=reference.size, nonce=reference.nonce
    )


def segment_from_proto(message: pb.SegmentReference) -> SegmentReference:
    """SegmentReference, from the wire."""
    return SegmentReference(message.pid, message.descriptor, message.size, message.nonce)


def assign_to_proto(assign: Assign) -> pb.Assign:
    """Assign, to the wire."""
    return pb.Assign(step=assign.step, kind=assign.kind, bounds=chain(*assign.ranges), buffers=assign.buffers)


def assign_from_proto(message: pb.Assign) -> Assign:
    """Assign, from the wire."""
    bounds = message.bounds[:]
    return Assign(
        step=message.step,
        kind=_ROUNDS[message.kind],
        ranges=tuple(zip(bounds[::2], bounds[1::2], strict=True)),
        buffers=message.buffers if message.HasField("buffers") else None,
    )


def push_to_proto(push: Push) -> pb.Push:
    """Push, to the wire."""
    leaves, losses, weights, samples, values, nonfinite = zip(*push.leaves, strict=True) if push.leaves else [()] * 6
    return pb.Push(
        step=push.step,
        kind=push.kind,
        nodes=[n for low, high, slot in push.nodes for n in (low, high, _ABSENT_SLOT if slot is None else slot)],
        leaves=leaves,
        losses=losses,
        weights=weights,
        samples=samples,
        values=chain(*values),
        nonfinite={leaf: name for leaf, name in zip(leaves, nonfinite, strict=True) if name},
        buffers=push.buffers,
        seconds=push.seconds,
    )


def push_from_proto(message: pb.Push) -> Push:
    """Push, from the wire. Raises ValueError for columns of unequal length, KeyError for another kind."""
    leaves, losses, weights, samples = message.leaves[:], message.losses[:], message.weights[:], message.samples[:]
    if not len(leaves) == len(losses) == len(weights) == len(samples):
        raise ValueError("a push whose columns are of unequal length")
    if message.values or message.nonfinite:
        values = map(tuple, np.reshape(message.values, (len(leaves), -1)).tolist())
        nonfinite = [message.nonfinite.get(leaf, "") for leaf in leaves]
        results = tuple(map(LeafResult, leaves, losses, weights, samples, values, nonfinite))
    else:
        results = tuple(map(LeafResult, leaves, losses, weights, samples))
    nodes = message.nodes[:]
    slots = [None if slot == _ABSENT_SLOT else slot for slot in nodes[2::3]]
    return Push(
        step=message.step,
        kind=_ROUNDS[message.kind],
        nodes=tuple(map(PushedNode, nodes[::3], nodes[1::3], slots)),
        leaves=results,
        buffers=message.buffers if message.HasField("buffers") else None,
        seconds=message.seconds,
    )


def failure_to_proto(failure: Failure) -> pb.Failure:
    """Failure, to the wire."""
    return pb.Failure(
        step=failure.step,
        micro_batch=failure.micro_batch,
        reason=failure.reason,
        message=failure.message,
        traceback=failure.traceback,
        kind=failure.kind,
    )


def failure_from_proto(message: pb.Failure) -> Failure:
    """Failure, from the wire."""
    return Failure(
        step=message.step,
        micro_batch=message.micro_batch,
        reason=message.reason,
        message=message.message,
        traceback=message.traceback,
        kind=_ROUNDS[message.kind],
    )


def decision_to_proto(decision: Decision) -> pb.Decision:
    """Decision, to the wire."""
    return pb.Decision(
        step=decision.step,
        kind=decision.kind,
        apply=decision.apply,
        divisor=decision.divisor,
        coefficient=decision.coefficient,
        lr=decision.lr,
    )


def decision_from_proto(message: pb.Decision) -> Decision:
    """Decision, from the wire."""
    return Decision(
        step=message.step,
        kind=_ROUNDS[message.kind],
        apply=message.apply,
        divisor=message.divisor,
        coefficient=message.coefficient,
        lr=message.lr,
    )


def record_to_proto(record: StepRecord) -> jobs_pb.StepRecord:
    """StepRecord, to the wire."""
    return jobs_pb.StepRecord(**{name: getattr(record, name) for name in _RECORD_FIELDS})


def record_from_proto(message: jobs_pb.StepRecord) -> StepRecord:
    """StepRecord, from the wire."""
    values = {name: getattr(message, name) for name in _RECORD_FIELDS}
    return StepRecord(**{**values, "parameter_norms": tuple(message.parameter_norms)})


def sums_to_bytes(sums: NDArray[np.float64]) -> bytes:
    """Segment sums as little-endian float64."""
    return sums.astype("<f8", copy=False).tobytes()


def sums_from_bytes(data: bytes) -> NDArray[np.float64]:
    """The inverse of `sums_to_bytes`."""
    return np.frombuffer(data, dtype="<f8")
