"""Servers and workers on GPUs: whole jobs in this process with another memory in the GPU's place, and on one if any."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.local_job import hashes, job_config, run_here, run_processes
from ps.job.config import JobConfig
from ps.memory.segment import Segment
from ps.parameters.layout import shards
from ps.server.parameter_server import ParameterServer
from ps.step.messages import LeafResult, Push, PushedNode, Round
from steepest.v1 import exchange_pb2 as pb
from tests.support.choices import full
from tests.support.stand_in import StandInDevice
from worker.gradients.backend import DeviceBackend
from worker.gradients.slots import Slots
from worker.process.exchange import Exchange, RefusedError

pytestmark = pytest.mark.cluster

LARGE = {"hidden": 25_000}  # five blocks
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def _config(directory: Path, servers: int = 1, **raw: Any) -> JobConfig:
    return job_config(
        directory,
        "tests.support.tasks:regression",
        **{
            "steps": 6,
            "arguments": LARGE,
            "optimizer": {"name": "adamw", "lr": 0.01},
            "checkpoint_every": 3,
            "data": {"micro_batch": 8},
            "placement": {"servers": servers},
            **raw,
        },
    )


@pytest.mark.parametrize(
    ("servers", "own"),  # of five blocks
    [
        (1, True),
        (3, False),
        (7, True),
        *(full(*both) for both in [(1, False), (2, True), (2, False), (3, True), (7, False)]),
    ],
)
def test_a_job_on_gpus_gives_the_bits_of_one_without(tmp_path: Path, servers: int, *, own: bool) -> None:
    expected = hashes(run_here(_config(tmp_path / "cpu")))
    backend = DeviceBackend(StandInDevice("gpu-0"))
    devices = [StandInDevice(f"gpu-{i if own else i + 1}") for i in range(servers)]
    config = _config(tmp_path / "gpu", servers)
    assert hashes(run_here(config, backend, devices)) == expected
    # What a server on the worker's own GPU owns comes to the host's memory for checkpoints alone.
    saved = 2
    layout = config.layout()
    parts = [shard.numel * layout.itemsize for shard in shards(layout, servers)]
    copied = [device.copied for device in devices]
    if own:
        assert copied[0] <= saved * parts[0]
        assert all(count >= 6 * part for count, part in zip(copied[1:], parts[1:], strict=False))
        assert backend.publishes == (servers > 1)
    else:
        assert backend.publishes
    if own and servers == 1:
        assert backend.gpu.copied == 7 * layout.nbytes  # each version of the parameters, on the GPU


@pytest.mark.parametrize(
    "changes",
    [{"optimizer": {"name": name, "lr": 0.01}} for name in ("nesterov", "adam")]
    + [{"clip": {"value": 0.01}}, {"arguments": {**LARGE, "dtype": "float64"}}],
    ids=str,
)
def test_optimizers_and_types(tmp_path: Path, changes: dict[str, Any]) -> None:
    expected = run_here(_config(tmp_path / "cpu", **changes))
    state = run_here(_config(tmp_path / "gpu", **changes), DeviceBackend(StandInDevice()), [StandInDevice()])
    assert hashes(state) == hashes(expected)


@pytest.mark.parametrize(
    "changes", [{"clip": {"norm": 0.1}}, {"optimizer": {"name": "adagrad", "lr": 0.01}}], ids=["norm", "adagrad"]
)
def test_what_is_computed_in_another_order_differs_by_rounding_alone(tmp_path: Path, changes: dict[str, Any]) -> None:
    expected = run_here(_config(tmp_path / "cpu", **changes))
    state = run_here(_config(tmp_path / "gpu", **changes), DeviceBackend(StandInDevice()), [StandInDevice()])
    for name, value in expected.model.items():
        torch.testing.assert_close(state.model[name], value, rtol=1e-5, atol=1e-6)


def test_servers_that_own_nothing_share_nothing(tmp_path: Path) -> None:
    expected = hashes(run_here(_config(tmp_path / "cpu")))
    devices = [StandInDevice() for _ in range(7)]  # of five blocks
    assert hashes(run_here(_config(tmp_path / "gpu", 7), DeviceBackend(StandInDevice()), devices)) == expected


def test_a_worker_without_a_gpu_works_with_servers_on_one(tmp_path: Path) -> None:
    expected = hashes(run_here(_config(tmp_path / "cpu")))
    assert hashes(run_here(_config(tmp_path / "gpu"), None, [StandInDevice()])) == expected


def test_a_job_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    expected = hashes(run_here(_config(tmp_path / "cpu", steps=9)))
    first = _config(tmp_path / "gpu", steps=6)
    run_here(first, DeviceBackend(StandInDevice()), [StandInDevice()])
    more = _config(tmp_path / "gpu", steps=9)
    assert hashes(run_here(more, DeviceBackend(StandInDevice()), [StandInDevice()])) == expected


def test_inline_transport_and_servers_on_a_gpu(tmp_path: Path) -> None:
    expected = hashes(run_here(_config(tmp_path / "cpu")))
    config = _config(tmp_path / "gpu", placement={"servers": 2, "transport": "inline"})
    devices = [StandInDevice(), StandInDevice("gpu-1")]
    assert hashes(run_here(config, DeviceBackend(StandInDevice()), devices)) == expected


def _server(config: JobConfig) -> ParameterServer:
    server = ParameterServer(config, 0, "127.0.0.1", StandInDevice())
    server.connect([server.address])
    return server


def _join(config: JobConfig, server: ParameterServer) -> tuple[Exchange, Slots]:
    """A worker on the server's GPU, with one slot."""
    layout, device = config.layout(), StandInDevice()
    segment = Segment.create(layout.nbytes, "test")
    slots = Slots(segment.tensor(layout.dtype, layout.numel).view(1, -1), layout, DeviceBackend(device))
    return Exchange(config, "w", 0, [server.address], segment, None, device), slots


INITIAL = Push(0, Round.INITIALIZE, (PushedNode(0, 1, 0),), (LeafResult(0, 0.0, 0.0, 0),), b"")


@pytest.mark.parametrize("shown", ["nothing", "too-small", "gone"])
def test_a_slot_that_cannot_be_had_never_reaches_the_sum(tmp_path: Path, shown: str) -> None:
    config = _config(tmp_path)
    layout = config.layout()
    server = _server(config)
    exchange, slots = _join(config, server)
    assert list(exchange.on_gpu) == [(0, layout.numel)]
    assignments = exchange.assignments()
    assert next(assignments).kind == Round.INITIALIZE
    exchange.push(INITIAL, slots)
    assert next(assignments).kind == Round.TRAIN
    leader = exchange._leader
    if shown == "nothing":
        leader.shown.add(0)
    else:
        reference = pb.DeviceReference(handle=b"other/1", size=layout.nbytes - 4 * (shown == "too-small"))
        leader.connection.send(pb.WorkerMessage(gpu_slot=pb.GpuSlot(slot=0, memory=reference)))
    exchange.push(Push(0, Round.TRAIN, (PushedNode(0, 8, 0),), (LeafResult(0, 1.0, 1.0, 1),)), slots)
    said = {"nothing": "never shown", "too-small": "bytes are shared, and", "gone": "invalid device context"}
    with pytest.raises(RefusedError, match=said[shown]):
        next(assignments)
    assert server.leader is not None
    assert server.leader.step == 0
    exchange.close()
    server.stop()


def test_a_worker_that_is_let_in_finds_the_present_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(tmp_path, optimizer={"name": "sgd", "lr": 1.0})
    layout = config.layout()
    server = _server(config)
    exchange, slots = _join(config, server)
    assignments = exchange.assignments()
    next(assignments)
    exchange.push(INITIAL, slots)
    next(assignments)
    slots.flat(0).fill_(1.0)
    leaves = tuple(LeafResult(leaf, 1.0, 1.0, 1) for leaf in range(8))
    exchange.push(Push(0, Round.TRAIN, (PushedNode(0, 8, 0),), leaves), slots)
    assert next(assignments).step == 1
    on_gpu = exchange.on_gpu[0, layout.numel]
    assert on_gpu[0] == -1 / 8
    assert exchange.parameters[0] == 0.0  # nobody looks there
    await_copies = StandInDevice.await_copies
    monkeypatch.setattr(StandInDevice, "await_copies", lambda self: (time.sleep(0.3), await_copies(self)))
    other = Exchange(config, "other", 0, [server.address], Segment.create(4, "test"))
    assert torch.equal(other.parameters, on_gpu)
    exchange.close()
    other.close()
    server.stop()


def test_parameters_that_cannot_be_had_are_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(tmp_path)
    server = _server(config)
    device = StandInDevice()
    monkeypatch.setattr(device, "open", StandInDevice("another").open)
    with pytest.raises(RefusedError, match=r"server 0: its GPU memory .* use placement.server_device = cpu"):
        Exchange(config, "w", 0, [server.address], Segment.create(config.layout().nbytes, "test"), None, device)
    server.stop()


@needs_gpu
def test_processes_on_one_gpu(tmp_path: Path) -> None:
    def run(name: str, workers: int, **placement: Any) -> Any:
        config = _config(tmp_path / name, placement={"device": "cuda", "workers": 2, **placement})
        return run_processes(replace(config, num_servers=placement.get("servers", 1)), workers)

    through_host = run("host", 1)
    on_gpu = [run(f"{n}", n, server_device="cuda", servers=s) for n, s in ((1, 1), (2, 1), (2, 2))]
    assert len({hashes(state) for state in on_gpu}) == 1
    for name, value in through_host.model.items():
        torch.testing.assert_close(on_gpu[0].model[name], value, rtol=1e-4, atol=1e-5)
