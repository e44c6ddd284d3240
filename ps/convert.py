"""Between `ps.messages` and the wire. Only converters touch *_pb2."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
from numpy.typing import NDArray

from ps.messages import Assign, Decision, Failure, LeafResult, Push, PushedNode, Round, StepRecord
from ps.segment import SegmentReference
from steepest.v1 import exchange_pb2 as pb
from steepest.v1 import training_jobs_pb2 as jobs_pb

_RECORD_FIELDS = tuple(f.name for f in fields(StepRecord))
_ABSENT_SLOT = -1


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
    ranges = [pb.Range(low=low, high=high) for low, high in assign.ranges]
    return pb.Assign(step=assign.step, kind=assign.kind, ranges=ranges, buffers=assign.buffers)


def assign_from_proto(message: pb.Assign) -> Assign:
    """Assign, from the wire."""
    return Assign(
        step=message.step,
        kind=Round(message.kind),
        ranges=tuple((r.low, r.high) for r in message.ranges),
        buffers=message.buffers if message.HasField("buffers") else None,
    )


def push_to_proto(push: Push) -> pb.Push:
    """Push, to the wire."""
    return pb.Push(
        step=push.step,
        kind=push.kind,
        nodes=[
            pb.PushedNode(low=n.low, high=n.high, slot=_ABSENT_SLOT if n.slot is None else n.slot) for n in push.nodes
        ],
        leaves=[
            pb.LeafResult(
                index=leaf.index,
                loss=leaf.loss,
                weight=leaf.weight,
                samples=leaf.samples,
                values=leaf.values,
                nonfinite=leaf.nonfinite,
            )
            for leaf in push.leaves
        ],
        buffers=push.buffers,
        seconds=push.seconds,
    )


def push_from_proto(message: pb.Push) -> Push:
    """Push, from the wire."""
    return Push(
        step=message.step,
        kind=Round(message.kind),
        nodes=tuple(PushedNode(n.low, n.high, None if n.slot == _ABSENT_SLOT else n.slot) for n in message.nodes),
        leaves=tuple(
            LeafResult(leaf.index, leaf.loss, leaf.weight, leaf.samples, tuple(leaf.values), leaf.nonfinite)
            for leaf in message.leaves
        ),
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
        kind=Round(message.kind),
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
        kind=Round(message.kind),
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
    return StepRecord(**{name: getattr(message, name) for name in _RECORD_FIELDS})


def sums_to_bytes(sums: NDArray[np.float64]) -> bytes:
    """Segment sums as little-endian float64."""
    return sums.astype("<f8", copy=False).tobytes()


def sums_from_bytes(data: bytes) -> NDArray[np.float64]:
    """The inverse of `sums_to_bytes`."""
    return np.frombuffer(data, dtype="<f8")
