"""Micro-batches that stand out, and who is to blame, with losses that are known."""

from __future__ import annotations

import numpy as np
import pytest

from worker.gradients.outliers import FACTOR, LEAST, MicroBatch, Outliers

SIZE = 8


def micro_batch(step: int) -> MicroBatch:
    return MicroBatch(step, 0, np.arange(step * SIZE, (step + 1) * SIZE))


class Data:
    """Losses by sample; those not named have 1.0. everywhere: what all are multiplied by."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.everywhere = 1.0
        self.asked: list[MicroBatch] = []
        self.outliers = Outliers(self.mean_loss)

    def mean_loss(self, of: MicroBatch) -> float:
        self.asked.append(of)
        return self.everywhere * float(np.mean([self.losses.get(int(i), 1.0) for i in of.samples]))

    def look(self, step: int) -> tuple[float, tuple[int, ...]] | None:
        own = micro_batch(step)
        return self.outliers.look(own, self.mean_loss(own))


@pytest.fixture
def learned() -> Data:
    data = Data()
    assert [data.look(step) for step in range(LEAST)] == [None] * LEAST
    data.asked.clear()
    return data


@pytest.mark.parametrize("bad", [(0,), (3, 5), tuple(range(SIZE))])
def test_the_samples_are_named(learned: Data, bad: tuple[int, ...]) -> None:
    samples = tuple(LEAST * SIZE + index for index in bad)
    learned.losses = dict.fromkeys(samples, 1000.0)
    found = learned.look(LEAST)
    assert found is not None
    assert found[0] == pytest.approx((1000.0 * len(bad) + SIZE - len(bad)) / SIZE)
    assert found[1] == samples


def test_a_model_that_diverges_is_no_outlier(learned: Data) -> None:
    learned.everywhere = 100.0
    assert [learned.look(LEAST + step) for step in range(3)] == [None] * 3


def test_what_is_not_far_above_is_none(learned: Data) -> None:
    learned.losses = dict.fromkeys(range(LEAST * SIZE, (LEAST + 1) * SIZE), 0.9 * FACTOR)
    assert learned.look(LEAST) is None
    assert len(learned.asked) == 1  # by this test


def test_of_a_job_that_has_learned_much_the_first_losses_count() -> None:
    data = Data()
    for step in range(200):
        data.everywhere = 0.95**step
        assert data.look(step) is None
    data.losses = {200 * SIZE: 2e4}  # far above its neighbours, and below what the job began with
    assert data.look(200) is None


def test_losses_that_are_not_positive_say_nothing() -> None:
    data = Data()
    data.everywhere = -1.0
    assert [data.look(step) for step in range(2 * LEAST)] == [None] * (2 * LEAST)


def test_after_a_look_there_is_a_pause(learned: Data) -> None:
    learned.losses = dict.fromkeys(range(LEAST * SIZE, 1000 * SIZE), 1000.0)
    looks = [learned.look(LEAST + step) is not None for step in range(25)]
    assert looks == [step % 20 == 0 for step in range(25)]


def test_user_code_that_fails_meanwhile_does_no_harm() -> None:
    def fail(of: MicroBatch) -> float:
        raise ValueError(of)

    outliers = Outliers(fail)
    for step in range(LEAST):
        outliers.look(micro_batch(step), 1.0)
    assert outliers.look(micro_batch(LEAST), 1000.0) is None
