"""Peaks of memory that can be counted by hand."""

from __future__ import annotations

import subprocess
import sys

import torch
from torch import nn

from worker.gradients.peak_memory import PeakMemory

ROWS, WIDTH = 64, 32
UNIT = ROWS * WIDTH * 4  # bytes


def test_what_is_freed_does_not_count() -> None:
    x = torch.ones(ROWS, WIDTH)
    with PeakMemory() as memory:
        for _ in range(5):
            y = x + 1
            y.mul_(2)  # in place
            y[:3].view(-1)  # no memory of their own
            del y
    assert memory.peak == UNIT
    with PeakMemory() as memory:
        kept = [x + i for i in range(5)]
    assert memory.peak == 5 * UNIT
    assert len(kept) == 5


def test_activations_that_a_backward_pass_needs() -> None:
    x = torch.ones(ROWS, WIDTH)
    for layers in (4, 8):
        model = nn.Sequential(*(nn.Tanh() for _ in range(layers)), nn.Linear(WIDTH, 1))
        with PeakMemory() as memory:
            model(x).sum().backward()
        # The first tanh has no gradient to make, but the output of each is the next one's input.
        assert memory.peak < (layers + 1) * UNIT


def test_every_layer_keeps_its_output() -> None:
    x = torch.ones(ROWS, WIDTH, requires_grad=True)
    peaks = []
    for layers in (4, 8, 16):
        model = nn.Sequential(*(nn.Tanh() for _ in range(layers)))
        with PeakMemory() as memory:
            model(x).sum().backward()
        peaks.append(memory.peak)
    assert peaks[1] - peaks[0] == 4 * UNIT
    assert peaks[2] - peaks[1] == 8 * UNIT


def test_measuring_imports_no_compiler() -> None:
    program = (
        "import sys, torch; from worker.gradients.peak_memory import PeakMemory\n"
        "with PeakMemory() as memory: torch.ones(3) + 1\n"
        "print(memory.peak, 'torch._dynamo' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["24", "False"]
