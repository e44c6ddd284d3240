"""Signals of parameters from those of segments and micro-batches; the noise scale against what it estimates."""

import numpy as np
import pytest

from ps.parameters.description import ModelDescription, TensorDescription
from ps.parameters.layout import Layout, build_layout
from ps.step.signals import (
    FIRST_STEPS,
    NAMES,
    NOISE,
    StepSignals,
    has_histogram,
    is_measured,
    noise_of,
    parameter_histograms,
    parameter_signals,
)


def layout() -> Layout:
    tensors = (TensorDescription("a", (4,), "float32"), TensorDescription("b", (300, 500), "float32"))
    return build_layout(ModelDescription(tensors, (), (("a", "a"), ("b", "b"))))


def test_segments_become_parameters() -> None:
    whole = layout()
    assert whole.segment_owners.tolist() == [0, 1, 1, 1]
    gradient = np.array([[8.0, 4.0, 1.0], [3.0, 1.0, 5.0], [6.0, 2.0, 5.0], [6.0, 0.5, 0.0]])
    update = np.array([[4.0, 9.0], [1.0, 16.0], [2.0, 0.0], [1.0, 0.0]])
    found = dict(zip(NAMES, parameter_signals(StepSignals(gradient, update, ()), np.ones(2), 2.0, whole), strict=True))
    assert found["mean_abs"].tolist() == [8 / 4 / 2, 15 / 150_000 / 2]
    assert found["max_abs"].tolist() == [2.0, 1.0]
    assert found["zeros"].tolist() == [1 / 4, 10 / 150_000]
    assert found["update_norm"].tolist() == [2.0, 2.0]
    assert found["parameter_norm"].tolist() == [3.0, 4.0]
    assert np.isnan(found["noise_trace"]).all()


def test_histograms_of_segments_become_those_of_parameters() -> None:
    counts = np.arange(8, dtype=np.uint32).reshape(4, 2)
    assert parameter_histograms(layout().segment_owners, counts, 2).tolist() == [[0, 1], [2 + 4 + 6, 3 + 5 + 7]]
    assert [step for step in range(9) if has_histogram(step, 4)] == [0, 4, 8]
    assert not any(has_histogram(step, 0) for step in range(9))


def test_noise_scale_and_cosine_are_what_brute_force_says() -> None:
    """Gradients of single samples are drawn; their covariance and mean are known."""
    whole, generator = layout(), np.random.default_rng(0)
    mean, spread = np.array([0.5, -0.2, 0.1, 0.4]), np.array([1.0, 2.0, 0.5, 3.0])
    micro_batch, leaves, rows = 8, 4, []
    inner, squared = [], []  # products of neighbouring micro-batches' gradients, and their own squares
    empty = np.zeros((4, 3)), np.zeros((4, 2))
    for _ in range(4000):
        sums = generator.normal(mean, spread, (leaves, micro_batch, 4)).sum(axis=1)
        inner.append(sums[0] @ sums[1])
        squared.append(sums[0] @ sums[0])
        whole_mean = sums.sum(axis=0) / (leaves * micro_batch)
        own = [(float(micro_batch), np.array([(sums[i] ** 2).sum(), 0.0]).tobytes()) for i in (0, 2)]
        squares = np.array([(whole_mean**2).sum(), 0.0])
        rows.append(parameter_signals(StepSignals(*empty, own), squares, float(leaves * micro_batch), whole))
    found = np.array(rows)
    signal, trace = (found[:, NAMES.index(name), 0] for name in ("noise_signal", "noise_trace"))
    for estimate, truth in ((signal, (mean**2).sum()), (trace, (spread**2).sum())):
        assert abs(estimate.mean() - truth) < 4 * estimate.std() / np.sqrt(len(estimate))
    places = [NAMES.index(name) for name in NOISE]
    noise = noise_of(found[:, places].sum(axis=2), micro_batch, memory=4000)
    assert noise.scale[-1] == pytest.approx((spread**2).sum() / (mean**2).sum(), rel=0.1)
    assert noise.cosine[-1] == pytest.approx(np.mean(inner) / np.mean(squared), abs=0.03)


def test_one_size_of_batch_says_nothing_of_noise() -> None:
    assert np.isnan(noise_of(np.full((3, 2), np.nan), 8.0)).all()


def test_which_steps_are_measured() -> None:
    measured = [step for step in range(60) if is_measured(step, 10)]
    assert measured == [*range(FIRST_STEPS), 20, 30, 40, 50]
    assert not any(is_measured(step, 0) for step in range(60))
