"""Between `ps.step.messages` and the wire. Only converters touch *_pb2."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from ps.memory.segment import SegmentReference
from ps.numerics.histogram import BINS
from ps.step.messages import (
    ACTIVATION_SIGNALS,
    Assign,
    Decision,
    Failure,
    LeafResult,
    Printed,
    Push,
    PushedNode,
    Ready,
    Round,
    StepRecord,
)
from ps.step.signals import NAMES, UpdateSignals
from steepest.v1 import exchange_pb2 as pb
from steepest.v1 import training_jobs_pb2 as jobs_pb

_NODE, _LEAF = struct.Struct("<qqq"), struct.Struct("<qddq")
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
    return pb.Assign(
        step=assign.step,
        kind=assign.kind,
        bounds=chain(*assign.ranges),
        buffers=assign.buffers,
        host_bounds=chain(*assign.host_ranges),
        version=assign.version,
        direction=assign.direction,
    )


def assign_from_proto(message: pb.Assign) -> Assign:
    """Assign, from the wire."""
    return Assign(
        step=message.step,
        kind=_ROUNDS[message.kind],
        ranges=_ranges(message.bounds[:]),
        buffers=message.buffers if message.HasField("buffers") else None,
        host_ranges=_ranges(message.host_bounds[:]),
        version=message.version,
        direction=message.direction,
    )


def _ranges(bounds: list[int]) -> tuple[tuple[int, int], ...]:
    return tuple(zip(bounds[::2], bounds[1::2], strict=True))


def push_to_proto(push: Push) -> pb.Push:
    """Push, to the wire."""
    message = pb.Push(
        step=push.step,
        kind=push.kind,
        nodes=b"".join([_NODE.pack(n.low, n.high, _ABSENT_SLOT if n.slot is None else n.slot) for n in push.nodes]),
        leaves=b"".join([_LEAF.pack(*r[:4]) for r in push.leaves]),
        buffers=push.buffers,
        constants=push.constants,
        seconds=push.seconds,
        data_seconds=push.data_seconds,
        activations=push.activations,
        curvature=push.curvature,
        host_bounds=chain(*push.host_ranges),
    )
    for result in push.leaves:
        if result.values:
            message.values.extend(result.values)
        if result.nonfinite:
            message.nonfinite[result.leaf] = result.nonfinite
        if result.bad_samples:
            message.bad_samples[result.leaf].indices.extend(result.bad_samples)
        if result.times_usual:
            message.times_usual[result.leaf] = result.times_usual
        if result.squares:
            message.squares[result.leaf] = result.squares
    return message


def push_from_proto(message: pb.Push) -> Push:
    """Push, from the wire. Raises ValueError for rows that are torn, KeyError for another kind."""
    try:
        nodes = [
            PushedNode(low, high, None if slot == _ABSENT_SLOT else slot)
            for low, high, slot in _NODE.iter_unpack(message.nodes)
        ]
        leaves = [LeafResult(*row) for row in _LEAF.iter_unpack(message.leaves)]
    except struct.error as error:
        raise ValueError(f"a push is torn: {error}") from error
    if message.values or message.nonfinite or message.bad_samples or message.squares or message.times_usual:
        values = np.reshape(message.values, (len(leaves), -1)).tolist()
        nonfinite, bad, squares = message.nonfinite, message.bad_samples, message.squares
        leaves = [
            LeafResult(
                *r[:4],
                tuple(own),
                nonfinite.get(r.leaf, ""),
                tuple(bad[r.leaf].indices) if r.leaf in bad else (),
                squares.get(r.leaf, b""),
                message.times_usual.get(r.leaf, 0.0),
            )
            for r, own in zip(leaves, values, strict=True)
        ]
    return Push(
        step=message.step,
        kind=_ROUNDS[message.kind],
        nodes=tuple(nodes),
        leaves=tuple(leaves),
        buffers=message.buffers if message.HasField("buffers") else None,
        seconds=message.seconds,
        host_ranges=_ranges(message.host_bounds[:]),
        constants=message.constants if message.HasField("constants") else None,
        data_seconds=message.data_seconds,
        activations=message.activations if message.HasField("activations") else None,
        curvature=tuple(message.curvature),
    )


def ready_to_proto(ready: Ready) -> pb.Ready:
    """Ready, to the wire."""
    return pb.Ready(
        step=ready.step,
        low=ready.low,
        high=ready.high,
        slot=ready.slot,
        start=ready.start,
        stop=ready.stop,
        host_bounds=chain(*ready.host_ranges),
    )


def ready_from_proto(message: pb.Ready) -> Ready:
    """Ready, from the wire."""
    return Ready(
        step=message.step,
        low=message.low,
        high=message.high,
        slot=message.slot,
        start=message.start,
        stop=message.stop,
        host_ranges=_ranges(message.host_bounds[:]),
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
        layer=failure.layer,
        samples=failure.samples,
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
        layer=message.layer,
        samples=tuple(message.samples),
    )


def printed_to_proto(lines: Iterable[Printed]) -> pb.Printed:
    """Lines, to the wire."""
    return pb.Printed(lines=[pb.PrintedLine(**line._asdict()) for line in lines])


def printed_from_proto(lines: Iterable[pb.PrintedLine]) -> list[Printed]:
    """Lines, from the wire."""
    return [Printed(line.time, line.stream, line.text, line.worker) for line in lines]


def decision_to_proto(decision: Decision) -> pb.Decision:
    """Decision, to the wire."""
    return pb.Decision(
        step=decision.step,
        kind=decision.kind,
        apply=decision.apply,
        divisor=decision.divisor,
        coefficient=decision.coefficient,
        lr=decision.lr,
        loss=decision.loss,
        last=decision.last,
        coefficients=decision.coefficients,
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
        loss=message.loss,
        last=message.last,
        coefficients=message.coefficients,
    )


def record_to_proto(record: StepRecord, logged_names: Sequence[str]) -> jobs_pb.StepRecord:
    """StepRecord, to clients."""
    norms, logged = sums_from_bytes(record.parameter_norms), sums_from_bytes(record.logged)
    values = record._asdict()
    values["parameter_norms"] = norms
    values["logged"] = dict(zip(logged_names, logged.tolist(), strict=False))  # a step that was skipped has none
    signals = sums_from_bytes(values.pop("signals"))
    activations = sums_from_bytes(values.pop("activations"))
    del values["histograms"], values["outlier"]
    message = jobs_pb.StepRecord(**values)
    if len(signals):
        for name, row in zip(NAMES, signals.reshape(len(NAMES), -1), strict=True):
            message.signals[name].values.extend(row)
    if len(activations):
        for name, row in zip(ACTIVATION_SIGNALS, activations.reshape(2, -1), strict=True):
            message.activations[name].values.extend(row)
    return message


def records_to_proto(records: Sequence[StepRecord]) -> pb.StepRecords:
    """StepRecords, to the controller."""
    return pb.StepRecords(**dict(zip(StepRecord._fields, zip(*records, strict=True), strict=False)))


def records_from_proto(message: pb.StepRecords) -> list[StepRecord]:
    """StepRecords, from the leader."""
    return list(map(StepRecord, *[getattr(message, name)[:] for name in StepRecord._fields]))


def sums_to_bytes(sums: NDArray[np.float64]) -> bytes:
    """Segment sums as little-endian float64."""
    return sums.astype("<f8", copy=False).tobytes()


def signals_to_bytes(signals: NDArray[np.float64] | None) -> bytes | None:
    """Signals of segments, row by row, as little-endian float64."""
    return None if signals is None else sums_to_bytes(signals)


def signals_from_bytes(data: bytes | None, width: int) -> NDArray[np.float64] | None:
    """The inverse of `signals_to_bytes`. width: how many there are of each segment."""
    return None if data is None else sums_from_bytes(data).reshape(-1, width)


def update_signals_to_fields(signals: UpdateSignals) -> dict[str, bytes | None]:
    """UpdateSignals, as fields of Applied."""
    counts = signals.histogram
    return {
        "signals": signals_to_bytes(signals.squares),
        "histogram": None if counts is None else counts.astype("<u4", copy=False).tobytes(),
    }


def update_signals_from_proto(message: pb.Applied) -> UpdateSignals:
    """The inverse of `update_signals_to_fields`."""
    squares = signals_from_bytes(message.signals if message.HasField("signals") else None, 2)
    return UpdateSignals(squares, histograms_from_bytes(message.histogram) if message.HasField("histogram") else None)


def histograms_from_bytes(data: bytes) -> NDArray[np.uint32]:
    """Histograms, row by row, from little-endian uint32: shape (rows, BINS)."""
    return np.frombuffer(data, "<u4").reshape(-1, BINS)


def sums_from_bytes(data: bytes) -> NDArray[np.float64]:
    """The inverse of `sums_to_bytes`."""
    return np.frombuffer(data, dtype="<f8")
