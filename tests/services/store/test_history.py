from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.numerics.histogram import BINS
from ps.step.messages import StepRecord
from ps.step.signals import NAMES
from services.store.history import NORMS, ROWS, SIGNALS, JobHistory


def record(
    step: int, time: float = 0.0, loss: float = 1.0, norms: bytes = b"", logged: bytes = b"", signals: bytes = b""
) -> StepRecord:
    numbers = (0.1, 4.0, 4, 2.0, 1.0, 0.5, True, False, 1, 0.1, 0.1, 0.0, 0.0)
    return StepRecord(
        step, time, loss, *numbers, norms, 0.05, logged, 1, 1.5, signals, sharpness=2.0, smallest_eigenvalue=-0.5
    )


def packed(*values: float) -> bytes:
    return np.array(values, "<f8").tobytes()


@pytest.fixture
def history(tmp_path: Path) -> JobHistory:
    return JobHistory(tmp_path / "history")


def test_a_job_without_a_step_has_an_empty_history(history: JobHistory) -> None:
    assert history.records() == []
    assert history.last() is None
    assert history.samples_per_second() is None
    assert len(history.columns(["loss"])["loss"]) == 0
    assert history.norms()[1].shape == (0, 0)
    history.begin(1, 0)
    assert history.records() == []
    assert len(history.columns(["loss"])["step"]) == 0


def test_every_bit_of_a_record_comes_back(history: JobHistory, tmp_path: Path) -> None:
    records = [
        record(0, 1.5, math.pi, packed(0.1, math.inf), packed(math.nan, 7.0)),
        record(1, 2.5, math.nan, packed(-0.0, 5e-324), packed(1.0, 2.0)),
    ]
    history.append(1, records)
    for reader in (history, JobHistory(tmp_path / "history")):
        assert repr(reader.records()) == repr(records)
        assert repr(reader.last()) == repr(records[-1])
        assert reader.norms()[1].tobytes() == b"".join(r.parameter_norms for r in records)
        assert reader.columns(["logged.1", "loss"])["logged.1"].tolist() == [7.0, 2.0]
        assert np.isnan(reader.columns(["logged.9"])["logged.9"]).all()
    # A step that was skipped has nothing beside its loss.
    history.append(1, [record(2, norms=packed(1.0, 1.0))])
    assert history.records(2)[0].logged == b""


def test_activations_are_kept_from_whenever_there_are_some(history: JobHistory, tmp_path: Path) -> None:
    def made(step: int) -> StepRecord:
        seen = packed(0.5, math.nan, step, 2.0) if step in (3, 5) else b""
        return record(step)._replace(activations=seen)

    for step in range(5):
        history.append(1, [made(step)])
    history.begin(2, 4)
    history.append(2, [made(step) for step in range(4, 8)])
    for reader in (history, JobHistory(tmp_path / "history")):
        steps, values = reader.activations()
        assert steps.tolist() == [3, 5]
        assert values[:, 1].tolist() == [[3.0, 2.0], [5.0, 2.0]]
        assert reader.activations(4)[0].tolist() == [5]
        found = reader.records(signals=True)
        assert [r.activations for r in found] == [made(step).activations for step in range(8)]
    assert history.records()[3].activations == b""


def test_signals_are_kept_of_the_steps_that_have_them(history: JobHistory) -> None:
    def made(step: int) -> StepRecord:
        own = [100.0 * step + i for i in range(2 * len(NAMES))]
        return record(step, norms=packed(1.0, 2.0), signals=packed(*own) if step % 3 == 0 else b"")

    history.begin(1, 0)
    history.append(1, [made(step) for step in range(8)])
    history.append(1, [made(step) for step in range(8, 10)])
    steps, values = history.signals()
    assert steps.tolist() == [0, 3, 6, 9]
    assert values.shape == (4, len(NAMES), 2)
    assert values[1].ravel().tolist() == [300.0 + i for i in range(2 * len(NAMES))]
    assert history.records(signals=True) == [made(step) for step in range(10)]
    assert not any(record.signals for record in history.records())
    history.begin(2, 6)  # back to step 6: what came after is hidden until it is made again
    assert history.signals()[0].tolist() == [0, 3]
    history.append(2, [made(6)])
    assert history.signals(1)[0].tolist() == [3, 6]
    assert history.signals(1, 5)[0].tolist() == [3]


def test_histograms_are_kept_of_the_steps_that_have_them(history: JobHistory) -> None:
    def made(step: int) -> StepRecord:
        counts = (step * 100 + np.arange(2 * BINS)).astype("<u4").tobytes()
        return record(step, norms=packed(1.0, 2.0))._replace(histograms=counts if step % 3 == 0 else b"")

    history.begin(1, 0)
    history.append(1, [made(step) for step in range(8)])
    history.append(1, [made(step) for step in range(7, 10)])
    steps, counts = history.histograms()
    assert steps.tolist() == [0, 3, 6, 9]
    assert counts.shape == (4, 2, BINS)
    assert counts[1].ravel().tolist() == (300 + np.arange(2 * BINS)).tolist()
    assert history.histograms(1, limit=2)[0].tolist() == [3, 6]
    history.begin(2, 6)
    assert history.histograms()[0].tolist() == [0, 3]
    history.append(2, [made(6)])
    assert history.histograms(1)[1][:, 0, 0].tolist() == [300, 600]


def test_a_torn_row_of_signals_is_not_there(history: JobHistory, tmp_path: Path) -> None:
    signals = packed(*range(2 * len(NAMES)))
    history.append(1, [record(step, norms=packed(1.0, 2.0), signals=signals) for step in range(3)])
    path = tmp_path / "history" / "000001" / SIGNALS
    path.write_bytes(path.read_bytes()[:-5])
    assert history.signals()[0].tolist() == [0, 1]
    history.append(1, [record(3, norms=packed(1.0, 2.0), signals=signals)])
    assert history.signals()[0].tolist() == [0, 1, 3]


Lives = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 12)), max_size=6)


@settings(deadline=None)
@given(Lives, st.integers(0, 40), st.integers(0, 40))
def test_what_was_rewound_is_hidden(
    tmp_path_factory: pytest.TempPathFactory, lives: Lives, first: int, limit: int
) -> None:
    history = JobHistory(tmp_path_factory.mktemp("history"))
    expected: dict[int, float] = {}
    done = 0
    for incarnation, (back, steps) in enumerate(lives, start=1):
        begins = max(0, done - back)
        history.begin(incarnation, begins)
        expected = {step: loss for step, loss in expected.items() if step < begins}
        made = [record(begins + i, loss=float(incarnation)) for i in range(steps)]
        expected |= {r.step: r.loss for r in made}
        history.append(incarnation, made[: steps // 2])
        history.append(incarnation, made)  # what is there already is left out
        done = begins + steps
    kept = [(step, expected[step]) for step in sorted(expected)]
    assert [(r.step, r.loss) for r in history.records()] == kept
    assert [(r.step, r.loss) for r in history.records(first, limit)] == [r for r in kept if r[0] >= first][:limit]
    columns = history.columns(["loss"], first, first + limit)
    assert list(zip(columns["step"].tolist(), columns["loss"].tolist(), strict=True)) == [
        r for r in kept if first <= r[0] <= first + limit
    ]
    last = history.last()
    assert (last and (last.step, last.loss)) == (kept[-1] if kept else None)


@settings(deadline=None)
@given(Lives, st.integers(0, 40), st.one_of(st.none(), st.integers(0, 40)), st.integers(1, 4), st.integers(1, 7))
def test_the_largest_norms_of_many_steps_come_from_blocks(
    tmp_path_factory: pytest.TempPathFactory, lives: Lives, first: int, last: int | None, points: int, report: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("services.store.history.BLOCK", 3)
        history = JobHistory(tmp_path_factory.mktemp("history"))
        expected: dict[int, float] = {}
        for incarnation, (wanted, count) in enumerate(lives, 1):
            begins = min(wanted, max(expected, default=-1) + 1)
            expected = {step: norm for step, norm in expected.items() if step < begins}
            history.begin(incarnation, begins)
            made = [record(begins + i, norms=packed((7 * i + incarnation) % 11, 1.0)) for i in range(count)]
            for start in range(0, count, report):
                history.append(incarnation, made[start : start + report])
            expected |= {begins + i: float((7 * i + incarnation) % 11) for i in range(count)}
        chosen = {s: n for s, n in expected.items() if first <= s and (last is None or s <= last)}
        steps, norms = history.largest_norms(first, last, points)
        assert len(steps) == min(points, len(chosen))
        for low, high, row in zip(steps, [*steps, 10**9][1:], norms, strict=True):
            assert row[0] == max(n for s, n in chosen.items() if low <= s < high)
        assert steps.tolist()[:1] == sorted(chosen)[:1]


@pytest.mark.parametrize("file", [ROWS, NORMS])
@pytest.mark.parametrize("torn", [1, 100])
def test_a_torn_row_is_not_there_and_is_written_again(
    history: JobHistory, tmp_path: Path, file: str, torn: int
) -> None:
    records = [record(step, norms=packed(*range(40))) for step in range(5)]
    history.append(1, records)
    path = tmp_path / "history" / "000001" / file
    path.write_bytes(path.read_bytes()[:-torn])
    assert history.records() == records[:4]
    history.append(1, records)
    assert history.records() == records
    assert JobHistory(tmp_path / "history").records() == records


def test_another_version_may_have_other_numbers(history: JobHistory, tmp_path: Path) -> None:
    history.append(1, [record(0)])
    layout = tmp_path / "history" / "000001" / "layout.json"
    rows = layout.parent / ROWS
    older = np.dtype([("step", "<i8"), ("loss", "<f8"), ("total_samples", "<i8"), ("logged", "<f8", (0,))])
    layout.write_text('{"begins": 0, "scalars": ["step", "loss"], "num_parameters": 0, "num_logged": 0}')
    rows.write_bytes(np.array([(0, 2.0, 4, []), (1, 1.0, 8, [])], older).tobytes())
    again = JobHistory(tmp_path / "history")
    again.begin(2, 1)
    again.append(2, [record(1)])
    assert again.columns(["loss", "lr"])["loss"].tolist() == [2.0, 1.0]
    assert np.isnan(again.columns(["lr"])["lr"]).tolist() == [True, False]
    assert [(r.step, r.loss) for r in again.records()] == [(0, 2.0), (1, 1.0)]


def test_a_history_held_still_has_what_it_had(history: JobHistory) -> None:
    history.append(1, [record(step, loss=step) for step in range(6)])
    still = history.still()
    history.append(1, [record(6)])
    history.begin(2, 3)
    history.append(2, [record(3, loss=30.0)])
    assert still.columns(["loss"])["loss"].tolist() == [0, 1, 2, 3, 4, 5]
    assert still.records(4)[0].step == 4
    assert still.still().columns(["loss"])["loss"].tolist() == [0, 1, 2, 30]


def test_a_sketch_of_a_long_history_is_spread_over_it(history: JobHistory) -> None:
    history.append(1, [record(step, loss=step) for step in range(700)])
    history.begin(2, 600)
    history.append(2, [record(step, loss=step) for step in range(600, 1000)])
    assert history.columns(["loss"], about=100)["loss"].tolist() == list(range(0, 1000, 10))
    assert len(history.columns(["loss"], about=5000)["loss"]) == 1000


def test_throughput_is_over_the_last_half(history: JobHistory) -> None:
    times = [0.0, 10.0, 20.0, 30.0, 31.0, 32.0, 33.0]
    history.append(1, [record(i, t) for i, t in enumerate(times[:5])])
    history.begin(2, 4)
    history.append(2, [record(i + 4, t) for i, t in enumerate(times[4:])])
    assert history.samples_per_second() == 12 / 3
