"""What every device keeps; the stand-in of other tests is held to it as a GPU is."""

from __future__ import annotations

import pytest
import torch

from ps.memory.gpu import CudaDevice, Device, DeviceError
from ps.memory.segment import Segment
from tests.support.stand_in import StandInDevice

NUMEL = 5000


@pytest.fixture(params=["stand-in", "cuda"])
def device(request: pytest.FixtureRequest) -> Device:
    if request.param == "stand-in":
        return StandInDevice()
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return CudaDevice()


def test_copies_go_both_ways_and_are_there_after_a_wait(device: Device) -> None:
    host = Segment.create(8 * NUMEL, "device").tensor(torch.float32, 2 * NUMEL)
    device.lock(host)
    there = torch.empty(NUMEL, device=device.torch_device)
    host[:NUMEL] = torch.arange(NUMEL)
    device.copy(there, host[:NUMEL])
    device.await_copies()
    there.mul_(2)
    device.copy(host[NUMEL:], there)
    device.synchronize()
    assert torch.equal(host[NUMEL:], 2 * host[:NUMEL])


def test_a_copy_waits_for_what_was_computed_before(device: Device) -> None:
    host = Segment.create(4 * NUMEL, "device").tensor(torch.float32, NUMEL)
    device.lock(host)
    there = torch.ones(NUMEL, device=device.torch_device)
    for _ in range(10):
        there.mul_(2)
    device.copy(host, there)
    device.synchronize()
    assert torch.equal(host, torch.full((NUMEL,), 1024.0))


def test_less_is_shared_than_is_needed(device: Device) -> None:
    reference = device.share(torch.zeros(10, device=device.torch_device))
    with pytest.raises(DeviceError):
        device.open(reference, torch.float32, 11)


def test_nothing_to_lock_is_no_error(device: Device) -> None:
    device.lock(torch.empty(0))
    device.seed(1)
    assert device.identity
