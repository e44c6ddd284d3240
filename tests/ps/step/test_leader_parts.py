"""The leader of a job that compresses: every part's residual is where its micro-batches are computed, whoever comes
and goes.
"""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.step.best import Standing
from ps.step.effects import Decide, Dismiss, Effect, Lost, Phase, Save, Send, Settle
from ps.step.leader import Leader
from ps.step.messages import Assign, LeafResult, Push, PushedNode, Round
from ps.step.plan import Plan
from steepest.spec import ScheduleSpec

STEPS, LEAVES, PART_LEAVES, PARTS = 8, 7, 2, 4


def plan(**changes: Any) -> Plan:
    common: dict[str, Any] = {
        "total_steps": STEPS, "num_leaves": LEAVES, "num_servers": 1, "base_lr": 0.1, "schedule": ScheduleSpec(),
        "part_leaves": PART_LEAVES, "evaluation_leaves": 3, "metric_names": ("accuracy",), "eval_every": 3,
        "checkpoint_every": 2,
    }  # fmt: skip
    return Plan(**{**common, **changes})


class World:
    """Workers keep, for every part they own, the number of steps that went into its residual."""

    def __init__(self, leader: Leader, held: dict[int, int]) -> None:
        self.leader = leader
        self.held = held  # residuals with the leader
        self.workers: dict[str, dict[int, int]] = {}
        self.inbox: dict[str, deque[Assign]] = {}
        self.dismissed: set[str] = set()
        self.settling: Settle | None = None
        self.saving: Save | None = None
        self.saved: dict[int, int] = {}
        self.steps: list[list[int]] = [[] for _ in range(PARTS)]
        self.settled = 0
        self.lost = ""
        self.now = 0.0

    def carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send(worker, assign, handed):
                    self.workers[worker].update({part: self.held.pop(part) for part in handed})
                    self.inbox[worker].append(assign)
                case Dismiss(worker, _):
                    self.dismissed.add(worker)
                case Settle():
                    assert effect.owners
                    self.settling = effect
                case Save():
                    self.saving = effect
                case Lost(reason):
                    self.lost = reason
                case Decide(decision):
                    self.carry_out(self.leader.applied(0, decision.step, 0.0, self.now)[1])

    def join(self, name: str) -> None:
        self.workers[name], self.inbox[name] = {}, deque()
        self.carry_out(self.leader.join(name, self.now))

    def work(self, name: str) -> None:
        assign = self.inbox[name].popleft()
        leaves = [i for low, high in assign.ranges for i in range(low, high)]
        nodes: list[PushedNode] = []
        if assign.kind == Round.TRAIN:
            parts = sorted({leaf // PART_LEAVES for leaf in leaves})
            whole = [leaf for part in parts for leaf in range(part * 2, min(part * 2 + 2, LEAVES))]
            assert leaves == whole, "a part is computed as a whole"
            own = self.workers[name]
            for part in list(own):
                if part not in parts:
                    del own[part]
            for part in parts:
                assert own.get(part, 0) == assign.step, "the residual is not here"
                own[part] = assign.step + 1
                self.steps[part].append(assign.step)
                nodes.append(PushedNode(part * 2, min(part * 2 + 2, LEAVES), part))
        results = tuple(LeafResult(i, 1.0, 2.0, 2, (1.0,)) for i in leaves)
        push = Push(assign.step, assign.kind, tuple(nodes), results, seconds=0.01)
        self.carry_out(self.leader.push(name, push, self.now)[1])
        if assign.kind in (Round.TRAIN, Round.INITIALIZE):
            self.report(assign)

    def report(self, assign: Assign) -> None:
        if not any(a.step == assign.step and a.kind == assign.kind for inbox in self.inbox.values() for a in inbox):
            done = self.leader.report(0, assign.step, assign.kind, np.ones(1), self.now)
            self.carry_out(done[1])

    def settle(self, settle: Settle) -> None:
        self.settling = None
        self.settled += 1
        for part, owner in settle.owners.items():
            assert self.workers[owner][part] == settle.step
            self.held[part] = self.workers[owner][part]
        self.carry_out(self.leader.settled(self.now))

    def save(self, save: Save) -> None:
        self.saving = None
        self.saved = {**self.held, **{part: self.workers[owner][part] for part, owner in save.owners.items()}}
        assert set(self.saved.values()) <= {save.step}
        assert len(self.saved) in (0, PARTS)
        self.carry_out(self.leader.saved(self.leader.step, "", self.now))

    def act(self, rng: random.Random) -> None:
        """Something that can happen next."""
        self.now += 0.01
        actions: list[Any] = [lambda n=n: self.work(n) for n, inbox in self.inbox.items() if inbox]
        if self.settling is not None:
            actions.append(lambda: self.settle(self.settling))  # type: ignore[arg-type]
        if self.saving is not None:
            actions.append(lambda: self.save(self.saving))  # type: ignore[arg-type]
        gone = [n for n in self.dismissed if n in self.workers and not self.inbox[n]]
        if gone:
            actions.append(lambda: self.leave(gone[0]))
        if not actions:
            self.carry_out(self.leader.resume(self.now))
            return
        rng.choice(actions)()

    def leave(self, name: str) -> None:
        del self.workers[name], self.inbox[name]
        self.carry_out(self.leader.leave(name, self.now))


@settings(max_examples=150)
@given(st.integers(0, 2**32), st.integers(1, 6), st.sampled_from([0.0, 0.1, 0.4]))
def test_residuals_follow_their_parts(seed: int, num_workers: int, trouble: float) -> None:
    rng = random.Random(seed)
    world = World(Leader(plan()), {})
    names = iter(f"w{i}" for i in range(10_000))
    for _ in range(num_workers):
        world.join(next(names))
    for _ in range(3000):
        if world.leader.phase == Phase.FINISHED:
            break
        staying = [n for n in world.workers if n not in world.dismissed]
        if rng.random() < trouble:
            match rng.randrange(3):
                case 0 if len(staying) < 9:
                    world.join(next(names))
                case 1 if len(staying) > 1:
                    world.carry_out(world.leader.retire(rng.choice(staying), world.now))
                case _:
                    world.carry_out(world.leader.pause(world.now))
        elif not staying:
            world.join(next(names))
        world.act(rng)
    assert world.leader.phase == Phase.FINISHED
    assert world.steps == [list(range(STEPS))] * PARTS
    assert world.saved == dict.fromkeys(range(PARTS), STEPS)
    assert not world.lost
    if not trouble and num_workers == 1:
        assert not world.settled


def test_after_a_restart_the_leader_hands_out_what_was_saved() -> None:
    held = dict.fromkeys(range(PARTS), 4)
    world = World(Leader(plan(), Standing(4), initialized=True, kept=held), held)
    world.join("a")
    assert world.workers["a"] == dict.fromkeys(range(PARTS), 4)
    world.join("b")
    rng = random.Random(0)
    while world.leader.phase != Phase.FINISHED:
        world.act(rng)
    assert world.settled == 1
    assert world.steps == [list(range(4, STEPS))] * PARTS


def test_with_a_worker_its_residuals_are_lost() -> None:
    world = World(Leader(plan()), {})
    world.join("a")
    for _ in range(2):
        world.act(random.Random(0))
    world.join("b")
    world.leave("b")
    assert not world.lost, "nothing was given to it yet"
    world.leave("a")
    assert "a is gone" in world.lost
    assert world.leader.join("c", 0.0) == [Dismiss("c", "the job has ended")]


def test_nobody_else_is_given_a_stragglers_part() -> None:
    world = World(Leader(plan(evaluation_leaves=0, checkpoint_every=0)), {})
    world.join("a")
    world.join("b")
    while world.leader.step < 2:
        world.act(random.Random(0))
    assert {n for n, inbox in world.inbox.items() if inbox} == {"a", "b"}
    world.work("a")
    world.carry_out(world.leader.tick(world.now + 50.0))
    assert not world.inbox["a"]
