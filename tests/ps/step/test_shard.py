from __future__ import annotations

import pytest
import torch

from ps.numerics.tree import Node
from ps.parameters.layout import build_layout, shards
from ps.step.messages import Decision, Outcome, Round
from ps.step.shard import ShardState
from steepest.optimizer_spec import optimizer_spec
from steepest.step_spec import AverageSpec
from tests.support.models import described
from tests.support.stand_in import StandInDevice


@pytest.fixture
def shard() -> ShardState:
    (whole,) = shards(build_layout(described([(64,)])), 1)
    return ShardState(
        whole,
        torch.zeros(whole.numel),
        optimizer_spec(name="sgd", lr=1.0),
        num_leaves=2,
        initialized=True,
    )


def ones(shard: ShardState) -> torch.Tensor:
    return torch.ones(shard.shard.numel)


def test_a_step(shard: ShardState) -> None:
    assert shard.accept(0, Round.TRAIN, [(Node(0, 1), ones(shard))]) == Outcome.ACCEPTED
    assert not shard.is_complete
    assert shard.accept(0, Round.TRAIN, [(Node(1, 2), ones(shard))]) == Outcome.ACCEPTED
    assert shard.is_complete
    assert shard.reduce().sum() == 4.0 * shard.shard.numel
    shard.apply(Decision(0, Round.TRAIN, apply=True, divisor=4.0, lr=1.0))
    assert torch.equal(shard.parameters, -ones(shard) / 2)
    assert shard.step == 1


def test_outcomes_are_named_and_change_nothing(shard: ShardState) -> None:
    assert shard.accept(1, Round.TRAIN, [(Node(0, 1), ones(shard))]) == Outcome.AHEAD
    assert shard.accept(0, Round.INITIALIZE, [(Node(0, 1), ones(shard))]) == Outcome.LATE
    shard.accept(0, Round.TRAIN, [(Node(0, 2), ones(shard))])
    assert shard.accept(0, Round.TRAIN, [(Node(0, 1), ones(shard))]) == Outcome.DUPLICATE
    shard.reduce()
    assert shard.accept(0, Round.TRAIN, [(Node(0, 1), ones(shard))]) == Outcome.LATE
    shard.apply(Decision(0, Round.TRAIN, apply=True, lr=1.0))
    assert torch.equal(shard.parameters, -ones(shard))
    assert shard.accept(0, Round.TRAIN, [(Node(0, 1), ones(shard))]) == Outcome.LATE


def test_a_skipped_step_counts_but_changes_no_bit(shard: ShardState) -> None:
    shard.accept(0, Round.TRAIN, [(Node(0, 2), ones(shard) * torch.nan)])
    shard.reduce()
    shard.apply(Decision(0, Round.TRAIN, apply=False))
    assert torch.equal(shard.parameters, torch.zeros_like(shard.parameters))
    assert shard.step == 1
    assert list(shard.optimizer.export_state()) == []


def test_a_decision_of_another_round_is_refused(shard: ShardState) -> None:
    with pytest.raises(ValueError, match="cannot apply"):
        shard.apply(Decision(0, Round.TRAIN, apply=True))
    shard.accept(0, Round.TRAIN, [(Node(0, 2), ones(shard))])
    shard.reduce()
    with pytest.raises(ValueError, match="cannot apply"):
        shard.apply(Decision(1, Round.TRAIN, apply=True))
    assert torch.equal(shard.parameters, torch.zeros_like(shard.parameters))


def test_a_step_without_samples_is_not_applied(shard: ShardState) -> None:
    shard.accept(0, Round.TRAIN, [(Node(0, 2), None)])
    assert shard.reduce().tolist() == [0.0]
    shard.apply(Decision(0, Round.TRAIN, apply=True))
    assert shard.step == 1


def test_on_a_gpu_what_lies_in_the_hosts_memory_is_copied() -> None:
    (shard,) = shards(build_layout(described([(64,)])), 1)
    device = StandInDevice()
    device.torch_device = torch.device("meta")  # another one than the host's, which is all that is asked here
    server = ShardState(
        shard,
        torch.zeros(shard.numel),
        optimizer_spec(name="rmsprop"),
        num_leaves=2,
        initialized=True,
        device=device,
    )
    server.accept(0, Round.TRAIN, [(Node(0, 1), torch.ones(shard.numel))])
    assert device.copied == shard.numel * 4
    server.accept(0, Round.TRAIN, [(Node(1, 2), torch.ones(shard.numel, device="meta"))])
    assert device.copied == shard.numel * 4


def test_the_average_is_shown_and_the_parameters_come_back_with_their_bits() -> None:
    (whole,) = shards(build_layout(described([(64,)])), 1)
    shown = torch.zeros(whole.numel)
    shard = ShardState(
        whole,
        shown,
        optimizer_spec(name="sgd", lr=1 / 3),
        num_leaves=1,
        initialized=True,
        average=AverageSpec(name="swa"),
    )
    for step in range(3):
        shard.accept(step, Round.TRAIN, [(Node(0, 1), ones(shard))])
        shard.reduce()
        shard.apply(Decision(step, Round.TRAIN, apply=True, lr=1 / 3))
    trained = shown.clone()
    shard.show(average=True)
    torch.testing.assert_close(shown, torch.full_like(shown, -2 / 3))
    assert (shard.step, shard.version) == (3, 4)
    shard.show(average=False)
    assert torch.equal(shown, trained)
    assert (shard.step, shard.version) == (3, 5)
