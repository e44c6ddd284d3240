from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ps.memory.segment import SegmentReference
from ps.numerics.histogram import BINS
from ps.step.messages import (
    ACTIVATION_SIGNALS,
    RECORD_BYTES,
    Assign,
    Decision,
    Failure,
    LeafResult,
    Printed,
    Push,
    PushedNode,
    Round,
    StepRecord,
)
from ps.step.signals import NAMES, UpdateSignals
from ps.wire import convert
from steepest.v1 import exchange_pb2 as pb

pytestmark = pytest.mark.cluster  # needs the stubs

STEP = st.integers(0, 2**53)
REAL = st.floats(allow_nan=False)
COUNT = st.integers(0, 10_000)
KIND = st.sampled_from(Round)
BYTES = st.one_of(st.none(), st.binary(max_size=20))


@st.composite
def leaves(draw: st.DrawFn) -> tuple[LeafResult, ...]:
    """Each once, with as many metric sums each."""
    num_values = draw(st.integers(0, 3))
    values = st.tuples(*[REAL] * num_values)
    samples = st.lists(COUNT, max_size=3).map(tuple)
    result = st.builds(
        LeafResult, COUNT, REAL, REAL, COUNT, values, st.text(max_size=5), samples, st.binary(max_size=9), REAL
    )
    return tuple(draw(st.lists(result, max_size=4, unique_by=lambda r: r.leaf)))


NODES = st.builds(PushedNode, COUNT, COUNT, st.one_of(st.none(), COUNT))


RANGES = st.lists(st.tuples(COUNT, COUNT), max_size=4).map(tuple)


@given(st.builds(Assign, STEP, KIND, RANGES, BYTES, RANGES, STEP))
def test_assign(it: Assign) -> None:
    assert convert.assign_from_proto(convert.assign_to_proto(it)) == it


@given(
    st.builds(
        Push,
        STEP,
        KIND,
        st.lists(NODES, max_size=4).map(tuple),
        leaves(),
        BYTES,
        REAL,
        RANGES,
        BYTES,
        REAL,
        BYTES,
        st.one_of(st.just(()), st.tuples(REAL, REAL)),
    )
)
def test_push(it: Push) -> None:
    assert convert.push_from_proto(convert.push_to_proto(it)) == it


def test_a_torn_push_is_refused() -> None:
    with pytest.raises(ValueError, match="torn"):
        convert.push_from_proto(pb.Push(kind="train", leaves=b"\0" * 33))
    with pytest.raises(ValueError, match="torn"):
        convert.push_from_proto(pb.Push(kind="train", nodes=b"\0" * 8))
    with pytest.raises(KeyError):
        convert.push_from_proto(pb.Push(kind="senseless"))


SAMPLES = st.lists(COUNT, max_size=3).map(tuple)


@given(st.builds(Failure, STEP, st.integers(-1, 100), st.text(), st.text(), st.text(), KIND, st.text(), SAMPLES))
def test_failure(it: Failure) -> None:
    assert convert.failure_from_proto(convert.failure_to_proto(it)) == it


@given(st.builds(Decision, STEP, KIND, st.booleans(), *[REAL] * 4, st.booleans(), st.binary(max_size=16)))
def test_decision(it: Decision) -> None:
    assert convert.decision_from_proto(convert.decision_to_proto(it)) == it


NORMS = st.lists(REAL, max_size=3).map(lambda values: np.array(values, dtype="<f8").tobytes())
SIGNALS = st.lists(REAL, max_size=2).map(lambda values: np.array(values * len(NAMES), dtype="<f8").tobytes())
ACTIVATIONS = st.lists(REAL, max_size=2).map(lambda values: np.array(values * 2, dtype="<f8").tobytes())
ROWS_OF_TWO = st.integers(0, 4).map(lambda rows: np.arange(2.0 * rows).reshape(rows, 2))
HISTOGRAMS = st.integers(0, 4).map(lambda rows: np.arange(rows * BINS, dtype="<u4").reshape(rows, BINS))
RECORDS = st.builds(
    StepRecord,
    *[STEP, *[REAL] * 4, COUNT, *[REAL] * 3, *[st.booleans()] * 2, COUNT, *[REAL] * 4, NORMS, REAL, NORMS],
    st.integers(-1, 100),
    REAL,
    SIGNALS,
    ACTIVATIONS,
    REAL,
    REAL,
    st.binary(max_size=20),
    st.binary(max_size=20),
    *[REAL] * 2,
)


@given(st.builds(UpdateSignals, st.one_of(st.none(), ROWS_OF_TWO), st.one_of(st.none(), HISTOGRAMS)))
def test_update_signals(it: UpdateSignals) -> None:
    found = convert.update_signals_from_proto(pb.Applied(**convert.update_signals_to_fields(it)))
    for own, back in zip(it, found, strict=True):
        assert (own is None) == (back is None)
        assert own is None or (own.shape == back.shape and own.tobytes() == back.tobytes())


@given(st.lists(RECORDS, max_size=3))
def test_records(records: list[StepRecord]) -> None:
    assert convert.records_from_proto(convert.records_to_proto(records)) == records


@given(RECORDS)
def test_a_client_gets_the_same_record(it: StepRecord) -> None:
    names = ["one", "two", "three"]
    message = convert.record_to_proto(it, names)
    for name in StepRecord._fields:
        if name not in RECORD_BYTES:
            assert getattr(message, name) == getattr(it, name)
    assert np.array(message.parameter_norms, dtype="<f8").tobytes() == it.parameter_norms
    logged = [message.logged[name] for name in names if name in message.logged]
    assert np.array(logged, dtype="<f8").tobytes() == it.logged
    seen = [message.activations[name].values for name in ACTIVATION_SIGNALS if name in message.activations]
    assert np.array(seen, dtype="<f8").tobytes() == it.activations
    signals = [message.signals[name].values for name in NAMES if name in message.signals]
    assert np.array(signals, dtype="<f8").tobytes() == it.signals


@given(st.lists(st.builds(Printed, REAL, st.sampled_from(["stdout", "stderr"]), st.text(), st.text()), max_size=3))
def test_printed(lines: list[Printed]) -> None:
    assert convert.printed_from_proto(convert.printed_to_proto(lines).lines) == lines


@given(st.builds(SegmentReference, st.integers(1, 2**22), COUNT, STEP, st.binary(min_size=16, max_size=16)))
def test_segment(it: SegmentReference) -> None:
    assert convert.segment_from_proto(convert.segment_to_proto(it)) == it


@given(st.lists(st.floats(), max_size=9))
def test_sums_keep_every_bit(values: list[float]) -> None:
    sums = np.array(values)
    assert convert.sums_from_bytes(convert.sums_to_bytes(sums)).tobytes() == sums.tobytes()
