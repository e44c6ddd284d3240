"""Who is let in, and what a bad message does. What servers compute is in tests/integration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.local_job import job_config
from ps.job.config import JobConfig
from ps.memory.segment import Segment
from ps.server.parameter_server import ParameterServer
from ps.step.messages import LeafResult, Push, PushedNode, Ready, Round
from ps.wire import convert
from ps.wire.address import ServerAddress
from steepest.spec import spec_from_dict
from steepest.v1 import exchange_pb2 as pb
from worker.gradients.backend import CpuBackend
from worker.gradients.slots import Slots
from worker.process.exchange import Exchange, RefusedError

pytestmark = pytest.mark.cluster


@pytest.fixture
def config(tmp_path: Path) -> JobConfig:
    return job_config(tmp_path, "tests.support.tasks:regression", steps=5)


@pytest.fixture
def server(config: JobConfig) -> Iterator[ParameterServer]:
    made = ParameterServer(config, 0, "127.0.0.1")
    made.connect([made.address])
    yield made
    made.stop()


def _over(config: JobConfig, transport: str) -> JobConfig:
    placement = config.spec.placement.model_copy(update={"transport": transport})
    return replace(config, spec=config.spec.model_copy(update={"placement": placement}))


def _join(config: JobConfig, address: ServerAddress, name: str = "w", generation: int = 0) -> Exchange:
    return Exchange(config, name, generation, [address], Segment.create(4 * config.layout().nbytes, "test"))


def _slots(config: JobConfig, shared: torch.Tensor) -> Slots:
    return Slots(shared, config.layout(), CpuBackend())


@pytest.mark.parametrize("transport", ["auto", "inline"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token": "guessed"}, "wrong token"),
        ({"incarnation": 2}, "incarnation 1"),
        ({"job": "another"}, "this is incarnation 1 of local"),
        ({"model": None}, "the worker's model is not the one"),
    ],
)
def test_a_stranger_is_refused_by_name(
    config: JobConfig, server: ParameterServer, changes: dict[str, Any], message: str, transport: str, tmp_path: Path
) -> None:
    if "model" in changes:
        changes = {"model": job_config(tmp_path, "tests.support.tasks:large", steps=5).model}
    changed = replace(_over(config, transport), **changes)
    with pytest.raises(RefusedError, match=message):
        _join(changed, server.address)
    assert server.leader is not None
    assert server.leader.members == {}


def test_another_version_is_refused(
    config: JobConfig, server: ParameterServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.process.exchange.PROTOCOL", 99)
    with pytest.raises(RefusedError, match="speaks protocol 99"):
        _join(config, server.address)


def test_a_newer_generation_takes_the_place_of_the_older(config: JobConfig, server: ParameterServer) -> None:
    old = _join(config, server.address, generation=0)
    assert next(old.assignments()).kind == Round.INITIALIZE
    new = _join(config, server.address, generation=1)
    assert next(new.assignments()).kind == Round.INITIALIZE
    old.close()
    new.close()


@pytest.mark.parametrize("transport", ["auto", "inline"])
def test_a_server_that_goes_is_noticed(config: JobConfig, transport: str) -> None:
    config = _over(config, transport)
    server = ParameterServer(config, 0, "127.0.0.1")
    server.connect([server.address])
    exchange = _join(config, server.address)
    assignments = exchange.assignments()
    next(assignments)
    server.stop()
    with pytest.raises(ConnectionError, match="the leader is gone"):
        next(assignments)
    exchange.close()


@pytest.mark.parametrize(
    ("chunk", "size"),
    [
        (pb.Chunk(offset=3), 4),
        (pb.Chunk(), 3),
        (pb.Chunk(offset=10**9), 4),
        (pb.Chunk(offset=-4), 4),
        (pb.Chunk(slot=-1), 4),
    ],
    ids=["unaligned", "torn", "beyond", "before", "no-slot"],
)
def test_a_chunk_that_does_not_fit_costs_the_worker_its_place_and_nothing_else(
    config: JobConfig, server: ParameterServer, chunk: pb.Chunk, size: int
) -> None:
    inline = _over(config, "inline")
    exchange = _join(inline, server.address)
    assignments = exchange.assignments()
    next(assignments)
    exchange._leader.connection.send(pb.WorkerMessage(chunk=chunk), memoryview(b"\0" * size))
    with pytest.raises(RefusedError, match=r"does not fit|not expected"):
        next(assignments)
    exchange.close()
    other = _join(inline, server.address, name="other")
    assert next(other.assignments()).kind == Round.INITIALIZE
    other.close()


def test_a_push_of_a_step_that_is_not_there_yet_is_refused(config: JobConfig, server: ParameterServer) -> None:
    exchange = _join(config, server.address)
    assignments = exchange.assignments()
    next(assignments)
    exchange.push(Push(5, Round.TRAIN, (), ()), _slots(config, torch.empty(0, 0)))
    with pytest.raises(RefusedError, match="pushed step 5"):
        next(assignments)
    exchange.close()


def test_what_was_begun_and_never_pushed_is_no_part_of_a_later_sum(config: JobConfig) -> None:
    config = _over(config, "inline")
    server = ParameterServer(config, 0, "127.0.0.1")
    server.connect([server.address])
    exchange = _join(config, server.address)
    assignments = exchange.assignments()
    next(assignments)
    numel = config.layout().numel
    shared = torch.zeros(2, numel)
    slots = _slots(config, shared)
    exchange.push(Push(0, Round.INITIALIZE, (PushedNode(0, 1, 0),), (LeafResult(0, 0.0, 0.0, 0),), b""), slots)
    num_leaves = config.spec.data.num_micro_batches
    leaves = tuple(LeafResult(leaf, 1.0, 1.0, 1) for leaf in range(num_leaves))
    for step, slot in enumerate((1, 0)):
        assert next(assignments).step == step
        shared[:] = 2.0
        exchange.begin(Ready(step, 0, num_leaves, 0, numel // 2, numel), shared[0])
        shared[0, : numel // 2] = 1.0
        exchange.begin(Ready(step, 0, num_leaves, 0, 0, 16), shared[0])
        exchange.push(Push(step, Round.TRAIN, (PushedNode(0, num_leaves, slot),), leaves), slots)
    assert next(assignments).step == 2
    assert server.leader is not None
    exchange.close()
    server.stop()


@pytest.mark.parametrize("compression", [{}, {"name": "topk"}], ids=["whole", "compressed"])
def test_a_push_whose_gradient_is_not_all_there_never_reaches_the_sum(
    config: JobConfig, compression: dict[str, Any]
) -> None:
    raw = config.spec.model_dump()
    spec = spec_from_dict({**raw, "compression": compression, "placement": {**raw["placement"], "transport": "inline"}})
    config = replace(config, spec=spec)
    server = ParameterServer(config, 0, "127.0.0.1")
    server.connect([server.address])
    exchange = _join(config, server.address)
    assignments = exchange.assignments()
    assert next(assignments).kind == Round.INITIALIZE
    slots = _slots(config, torch.zeros(1, config.layout().numel))
    exchange.push(Push(0, Round.INITIALIZE, (PushedNode(0, 1, 0),), (LeafResult(0, 0.0, 0.0, 0),), b""), slots)
    assert next(assignments).kind == Round.TRAIN
    leader, push = exchange._leader, Push(0, Round.TRAIN, (PushedNode(0, 1, 0),), (LeafResult(0, 1.0, 1.0, 1),))
    torn = memoryview(b"\0" * 16)
    leader.connection.send(pb.WorkerMessage(chunk=pb.Chunk(compressed=bool(compression), last=True)), torn)
    leader.connection.send(pb.WorkerMessage(push=convert.push_to_proto(push)))
    with pytest.raises(RefusedError, match="16 bytes of slot 0 came before its push"):
        next(assignments)
    assert server.leader is not None
    assert server.leader.step == 0
    exchange.close()
    server.stop()
