"""Servers and workers on GPUs: whole jobs in this process with another memory in the GPU's place, and on one if any."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.local_job import hashes, job_config, run_here, run_processes
from ps.job.config import JobConfig
from ps.memory.gpu import device_of
from ps.memory.segment import Segment
from ps.parameters.layout import shards
from ps.server.parameter_server import ParameterServer
from ps.step.messages import LeafResult, Push, PushedNode, Round
from tests.support.choices import full
from tests.support.stand_in import StandInDevice
from worker.gradients.backend import DeviceBackend, backend_of
from worker.gradients.slots import Slots
from worker.process.exchange import Beside, Exchange, RefusedError

pytestmark = pytest.mark.cluster

LARGE = {"hidden": 25_000}  # five blocks


class _Elsewhere(DeviceBackend):
    """Of a worker on the GPU of no server."""

    def __init__(self, gpu: StandInDevice) -> None:
        super().__init__(gpu)
        self.gpu = None


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
    """own: whether the worker is on the GPU of the first server, and so in its process."""
    expected = hashes(run_here(_config(tmp_path / "cpu")))
    gpu = StandInDevice()
    devices = [StandInDevice() for _ in range(servers)]
    config = _config(tmp_path / "gpu", servers)
    if own:
        assert hashes(run_here(config, DeviceBackend(gpu), devices)) == expected
    else:
        assert hashes(run_here(config, _Elsewhere(gpu), devices)) == expected
    layout = config.layout()
    parts = [shard.numel * layout.itemsize for shard in shards(layout, servers)]
    copied = [device.copied for device in devices]
    saved = 2
    if own:  # what its server owns comes to the host's memory for checkpoints alone
        assert copied[0] <= (saved + 1) * parts[0]
    first = 1 if own else 0
    assert all(count >= 6 * part for count, part in zip(copied[first:], parts[first:], strict=True))
    if own and servers == 1:
        assert gpu.copied == 0
    else:  # sums and parameters of the other servers
        assert gpu.copied >= 12 * (layout.nbytes - (parts[0] if own else 0))


def test_a_step_on_one_gpu_copies_nothing_and_waits_for_nothing(tmp_path: Path) -> None:
    found = {}
    for steps in (6, 12):
        gpu, device = StandInDevice(), StandInDevice()
        config = _config(tmp_path / f"{steps}", steps=steps, checkpoint_every=0)
        run_here(config, DeviceBackend(gpu), [device])
        found[steps] = gpu.copied, gpu.waits, device.copied, device.waits
    assert found[6] == found[12]
    assert found[6][:2] == (0, 0)


@pytest.mark.parametrize(("servers", "own"), [(1, True), (2, True), (2, False)])
def test_evaluations_on_gpus_are_of_the_average(tmp_path: Path, servers: int, *, own: bool) -> None:
    raw: dict[str, Any] = {"average": {"name": "ema", "decay": 0.5}, "eval_every": 2, "best": {"metric": "loss"}}
    expected = run_here(_config(tmp_path / "cpu", **raw))
    backend = DeviceBackend(StandInDevice()) if own else _Elsewhere(StandInDevice())
    state = run_here(_config(tmp_path / "gpu", servers, **raw), backend, [StandInDevice() for _ in range(servers)])
    assert state.standing.best == expected.standing.best
    assert hashes(state) == hashes(expected)
    trained = run_here(_config(tmp_path / "trained", **{**raw, "average": {**raw["average"], "evaluate": False}}))
    assert trained.standing.best != expected.standing.best


def test_locked_memory_is_let_go_with_its_segment() -> None:
    device = StandInDevice()
    segment = Segment.create(4000, "lock")
    memory = segment.tensor(torch.float32, 1000)
    device.lock(memory[500:])
    segment.close()
    del segment
    assert device.locked == 1
    del memory
    assert device.locked == 0


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
    devices = [StandInDevice(), StandInDevice()]
    assert hashes(run_here(config, DeviceBackend(StandInDevice()), devices)) == expected


def _server(config: JobConfig) -> ParameterServer:
    server = ParameterServer(config, 0, "127.0.0.1", StandInDevice())
    server.connect([server.address])
    return server


def _join(config: JobConfig, server: ParameterServer) -> tuple[Exchange, Slots]:
    """A worker beside the server, with one slot."""
    layout = config.layout()
    segment = Segment.create(layout.nbytes, "test")
    backend = DeviceBackend(StandInDevice())
    assert server.gpu_parameters is not None
    backend.share(server.gpu_parameters, 0, layout.numel)
    slots = Slots(segment.tensor(layout.dtype, layout.numel).view(1, -1), layout, backend)
    beside = Beside(0, partial(server.call_from_here, slots.flat))
    return Exchange(config, "w", 0, [server.address], segment, None, beside), slots


INITIAL = Push(0, Round.INITIALIZE, (PushedNode(0, 1, 0),), (LeafResult(0, 0.0, 0.0, 0),), b"")


def test_a_worker_that_is_let_in_finds_the_present_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(tmp_path, optimizer={"name": "sgd", "lr": 1.0})
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
    on_gpu = server.gpu_parameters
    assert on_gpu is not None
    assert on_gpu[0] == -1 / 8
    assert exchange.parameters[0] == 0.0  # nobody looks there
    await_copies = StandInDevice.await_copies
    monkeypatch.setattr(StandInDevice, "await_copies", lambda self: (time.sleep(0.3), await_copies(self)))
    other = Exchange(config, "other", 0, [server.address], Segment.create(4, "test"))
    assert torch.equal(other.parameters, on_gpu)
    exchange.close()
    other.close()
    server.stop()


def test_a_fault_of_the_worker_in_this_process_costs_it_its_place(tmp_path: Path) -> None:
    config = _config(tmp_path)
    server = _server(config)
    exchange, slots = _join(config, server)
    assignments = exchange.assignments()
    assert next(assignments).kind == Round.INITIALIZE
    exchange.push(INITIAL._replace(step=5), slots)
    with pytest.raises(RefusedError, match="pushed step 5; this shard is at 0"):
        next(assignments)
    again, slots = _join(config, server)
    assignments = again.assignments()
    assert next(assignments).kind == Round.INITIALIZE
    server.stop()
    with pytest.raises(ConnectionError):
        next(assignments)
    again.close()


@needs_gpu
def test_processes_on_one_gpu(tmp_path: Path) -> None:
    def run(name: str, workers: int, **placement: Any) -> Any:
        config = _config(tmp_path / name, placement={"device": "cuda", "workers": 2, **placement})
        return run_processes(replace(config, num_servers=placement.get("servers", 1)), workers)

    through_host = run("host", 1)
    on_gpu = [run(f"{n}-{s}", n, server_device="cuda", servers=s) for n, s in ((1, 1), (2, 1), (2, 2))]
    assert len({hashes(state) for state in on_gpu}) == 1
    for name, value in through_host.model.items():
        torch.testing.assert_close(on_gpu[0].model[name], value, rtol=1e-4, atol=1e-5)


@needs_gpu
def test_a_worker_beside_a_server_on_a_gpu(tmp_path: Path) -> None:
    placement = {"device": "cuda", "server_device": "cuda"}
    changes: list[dict[str, Any]] = [
        {},
        {"clip": {"norm": 0.1}},
        {"optimizer": {"name": "momentum", "lr": 0.01}},
        {"optimizer": {"name": "rmsprop", "lr": 0.01}},
        {"precision": "bf16", "optimizer": {"name": "sgd", "lr": 0.0001}},  # a rate that does not diverge
    ]
    for number, change in enumerate(changes):
        states = []
        for servers in (1, 2):
            config = _config(tmp_path / f"{number}-{servers}", placement={**placement, "workers": 2}, **change)
            config = replace(config, num_servers=servers)
            states.append(run_here(config, backend_of("cuda"), [device_of("cuda") for _ in range(servers)]))
        assert hashes(states[0]) == hashes(states[1]), change
        expected = run_here(_config(tmp_path / f"{number}-cpu", **change))
        tolerance = 3e-2 if "precision" in change else 1e-3
        for name, value in expected.model.items():
            torch.testing.assert_close(states[0].model[name], value, rtol=tolerance, atol=tolerance / 2)


@needs_gpu
def test_buffers_on_a_gpu_are_those_of_the_cpu(tmp_path: Path) -> None:
    def run(name: str, backend: Any, devices: Any) -> Any:
        placement = {"device": "cuda", "server_device": "cuda"} if devices else {}
        changes = {"optimizer": {"name": "sgd", "lr": 0.01}, "data": {"micro_batch": 32}, "placement": placement}
        config = job_config(tmp_path / name, "tests.support.tasks:deep", steps=6, **changes)
        return run_here(config, backend, devices)

    there = [run(f"gpu-{i}", backend_of("cuda"), [device_of("cuda")]) for i in range(2)]
    assert hashes(there[0]) == hashes(there[1])
    expected = run("cpu", None, [])
    assert any("running_mean" in name for name in expected.model)
    for name, value in expected.model.items():
        torch.testing.assert_close(there[0].model[name], value, rtol=1e-3, atol=1e-3)
