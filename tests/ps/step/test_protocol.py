"""Leader and shards together, with a network that delivers in any order and workers that come, hang and die.

Whatever happens: every step is made once, none is lost, and the parameters end with the bits of an undisturbed run.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.numerics.tree import Node, maximal_nodes
from ps.parameters.layout import build_layout, shards
from ps.step.effects import Decide, Dismiss, Effect, Evaluated, Phase, Save, Send, Stepped
from ps.step.leader import Leader
from ps.step.messages import Assign, Decision, LeafResult, Outcome, Push, PushedNode, Round
from ps.step.plan import Plan
from ps.step.shard import ShardState
from steepest.optimizer_spec import optimizer_spec
from steepest.spec import ClipSpec, ScheduleSpec
from steepest.step_spec import AverageSpec
from tests.support.models import described

STEPS, LEAVES = 5, 6
LAYOUT = build_layout(described([(70_016,), (70_016,)]))  # without padding, for what lies there is not added
SPEC = optimizer_spec(name="momentum", lr=0.1)
AVERAGE = AverageSpec(name="ema", decay=0.5)


def gradient(step: int, leaf: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + leaf)
    return torch.randn(LAYOUT.numel, generator=generator)


def node_sum(step: int, node: Node) -> torch.Tensor:
    if node.is_leaf:
        return gradient(step, node.low)
    left, right = node.halves()
    return node_sum(step, left) + node_sum(step, right)


@dataclass
class Worker:
    """inbox: what it was assigned. to_shards: per shard, what is on the way, in order; the leader's is number 0."""

    inbox: deque[Assign] = field(default_factory=deque)
    to_shards: dict[int, deque[Push]] = field(default_factory=dict)
    dismissed: bool = False


class World:
    """Everything but time and processes."""

    def __init__(self, num_servers: int, evaluation_leaves: int = 0, *, evaluates_average: bool = False) -> None:
        self.flat = torch.zeros(LAYOUT.numel)
        self.shards = [
            ShardState(s, self.flat[s.start : s.stop], SPEC, num_leaves=LEAVES, average=AVERAGE)
            for s in shards(LAYOUT, num_servers)
        ]
        plan = Plan(
            total_steps=STEPS,
            num_leaves=LEAVES,
            num_servers=num_servers,
            base_lr=0.1,
            schedule=ScheduleSpec(name="linear"),
            clip=ClipSpec(norm=1.0),
            evaluation_leaves=evaluation_leaves,
            evaluates_average=evaluates_average,
            metric_names=("accuracy",),
            eval_every=2,
            checkpoint_every=2,
        )
        self.leader = Leader(plan)
        self.workers: dict[str, Worker] = {}
        self.followers: dict[int, deque[Any]] = {i: deque() for i in range(1, num_servers)}
        self.to_leader: dict[int, deque[Any]] = {i: deque() for i in range(1, num_servers)}
        self.stepped: list[int] = []
        self.evaluated: list[int] = []
        self.seen: dict[tuple[int, str], torch.Tensor] = {}  # parameters, by step and kind of round
        self.saved: list[int] = []
        self.saving = False
        self.now = 0.0

    def carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send(worker, assign):
                    self.workers[worker].inbox.append(assign)
                case Dismiss(worker, _):
                    if worker in self.workers:
                        self.workers[worker].dismissed = True
                case Decide(decision):
                    for queue in self.followers.values():
                        queue.append(decision)
                    clamped = self.obey(0, decision)
                    self.carry_out(self.leader.applied(0, decision.step, clamped, self.now)[1])
                case Stepped(completed):
                    self.stepped.append(completed.decision.step)
                case Evaluated(step, metrics):
                    self.evaluated.append(step)
                    assert metrics["accuracy"] == 0.5
                case Save(step, _):
                    self.saved.append(step)
                    self.saving = True
                case _:
                    pass

    def obey(self, index: int, decision: Decision) -> float:
        shard = self.shards[index]
        if decision.kind != Round.SHOW:
            return shard.apply(decision)
        shard.show(average=decision.apply)
        return 0.0

    def see(self, assign: Assign) -> None:
        """What a worker computes with, unless its answer will come too late."""
        if assign.kind == Round.INITIALIZE or self.shards[0].version != assign.version:
            return
        assert {shard.version for shard in self.shards} == {assign.version}
        before = self.seen.setdefault((assign.step, assign.kind), self.flat.clone())
        assert torch.equal(before, self.flat)

    def join(self, name: str) -> None:
        self.workers[name] = Worker(to_shards={i: deque() for i in range(len(self.shards))})
        self.carry_out(self.leader.join(name, self.now))

    def die(self, name: str, rng: random.Random) -> None:
        """Each stream carries what it had sent up to some point, then breaks."""
        worker = self.workers[name]
        for index, queue in worker.to_shards.items():
            for _ in range(rng.randint(0, len(queue))):
                self.deliver(name, index)
        del self.workers[name]
        self.carry_out(self.leader.leave(name, self.now))

    def work(self, name: str) -> None:
        worker = self.workers[name]
        assign = worker.inbox.popleft()
        self.see(assign)
        nodes: list[PushedNode] = []
        leaves = [i for low, high in assign.ranges for i in range(low, high)]
        results = tuple(LeafResult(i, 1.0 + i, 2.0, 2, (1.0,)) for i in leaves)
        if assign.kind == Round.INITIALIZE:
            nodes = [PushedNode(0, 1, 0)]
        elif assign.kind == Round.TRAIN:
            for low, high in assign.ranges:
                nodes += [PushedNode(n.low, n.high, 0) for n in maximal_nodes(low, high, LEAVES)]
        push = Push(assign.step, assign.kind, tuple(nodes), results, seconds=0.01)
        for index, queue in worker.to_shards.items():
            if index == 0 or assign.kind in (Round.TRAIN, Round.INITIALIZE):
                queue.append(push)

    def deliver(self, name: str, index: int) -> None:
        push = self.workers[name].to_shards[index].popleft()
        shard = self.shards[index]
        if push.kind in (Round.TRAIN, Round.INITIALIZE):
            values = []
            for pushed in push.nodes:
                node = Node(pushed.low, pushed.high)
                whole = torch.ones(LAYOUT.numel) if push.kind == Round.INITIALIZE else node_sum(push.step, node)
                values.append((node, whole[shard.shard.start : shard.shard.stop].clone()))
            assert shard.accept(push.step, push.kind, values) != Outcome.AHEAD
        if index == 0:
            self.carry_out(self.leader.push(name, push, self.now)[1])
        if push.kind in (Round.TRAIN, Round.INITIALIZE) and shard.is_complete:
            sums = shard.reduce()
            if index == 0:
                self.carry_out(self.leader.report(0, push.step, push.kind, sums, self.now)[1])
            else:
                self.to_leader[index].append(("report", push.step, push.kind, sums))

    def actions(self) -> list[tuple[Any, ...]]:
        """All that can happen next."""
        found: list[tuple[Any, ...]] = []
        for name, worker in self.workers.items():
            if worker.inbox:
                found.append(("work", name))
            found += [("deliver", name, i) for i, queue in worker.to_shards.items() if queue]
            if worker.dismissed and not worker.inbox and not any(worker.to_shards.values()):
                found.append(("leave", name))
        found += [("decision", i) for i, queue in self.followers.items() if queue]
        found += [("news", i) for i, queue in self.to_leader.items() if queue]
        if self.saving:
            found.append(("saved",))
        return found

    def act(self, action: tuple[Any, ...]) -> None:
        self.now += 0.01
        match action:
            case ("work", name):
                self.work(name)
            case ("deliver", name, index):
                self.deliver(name, index)
            case ("leave", name):
                del self.workers[name]
                self.carry_out(self.leader.leave(name, self.now))
            case ("decision", index):
                decision = self.followers[index].popleft()
                clamped = self.obey(index, decision)
                self.to_leader[index].append(("applied", decision.step, clamped))
            case ("news", index):
                match self.to_leader[index].popleft():
                    case ("report", step, kind, sums):
                        self.carry_out(self.leader.report(index, step, kind, sums, self.now)[1])
                    case ("applied", step, clamped):
                        self.carry_out(self.leader.applied(index, step, clamped, self.now)[1])
            case ("saved",):
                self.saving = False
                self.carry_out(self.leader.saved(self.leader.step, "", self.now))


def run(
    num_servers: int,
    num_workers: int,
    seed: int,
    trouble: float,
    evaluation_leaves: int = 0,
    *,
    evaluates_average: bool = False,
) -> World:
    rng = random.Random(seed)
    world = World(num_servers, evaluation_leaves, evaluates_average=evaluates_average)
    names = iter(f"w{i}" for i in range(10_000))
    for _ in range(num_workers):
        world.join(next(names))
    deaths = 0
    for _ in range(20_000):
        if world.leader.phase == Phase.FINISHED:
            return world
        alive = [n for n, w in world.workers.items() if not w.dismissed]
        if rng.random() < trouble and deaths < 40:
            match rng.randrange(5):
                case 0 if alive:
                    deaths += 1
                    world.die(rng.choice(alive), rng)
                case 1:
                    world.join(next(names))
                case 2 if len(alive) > 1:
                    world.carry_out(world.leader.retire(rng.choice(alive), world.now))
                case 3:
                    world.now += 20.0  # whoever works now is a straggler
                    world.carry_out(world.leader.tick(world.now))
                case _:
                    world.carry_out(world.leader.pause(world.now))
        actions = world.actions()
        if actions:
            world.act(rng.choice(actions))
        elif world.leader.phase == Phase.PAUSED:
            world.carry_out(world.leader.resume(world.now))
        elif all(w.dismissed for w in world.workers.values()):
            world.join(next(names))
        else:
            world.carry_out(world.leader.resume(world.now))
            assert world.actions(), f"stuck in {world.leader.phase} at step {world.leader.step}"
    raise AssertionError("no end")


EXPECTED = run(1, 1, 0, 0.0).flat


def _averages() -> dict[int, torch.Tensor]:
    """Of the parameters after the first step, and then of each, by step."""
    seen = run(1, 1, 0, 0.0, 4).seen  # evaluations of the parameters as they are trained
    versions = [*(seen[step, Round.TRAIN] for step in range(1, STEPS)), seen[STEPS, Round.EVALUATE]]
    averages = {1: versions[0].clone()}
    for step, version in enumerate(versions[1:], 2):
        averages[step] = averages[step - 1] + (version - averages[step - 1]) * (1 - AVERAGE.decay)
    return averages


AVERAGES = _averages()


@settings(max_examples=120)
@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 2**32),
    st.sampled_from([0.0, 0.1, 0.3]),
    st.sampled_from(["", "parameters", "average"]),
)
def test_every_step_is_made_once_and_the_bits_are_the_same(
    num_servers: int, num_workers: int, seed: int, trouble: float, evaluates: str
) -> None:
    leaves, of_average = 4 if evaluates else 0, evaluates == "average"
    world = run(num_servers, num_workers, seed, trouble, leaves, evaluates_average=of_average)
    if of_average:
        shown = {step: flat for (step, kind), flat in world.seen.items() if kind == Round.EVALUATE}
        assert all(torch.equal(flat, AVERAGES[step]) for step, flat in shown.items())
        assert shown.keys() == {2, 4, 5}
    assert world.stepped == list(range(STEPS))
    assert torch.equal(world.flat, EXPECTED)
    assert world.saved == [2, 4, 5]
    assert world.evaluated == ([2, 4, 5] if evaluates else [])
