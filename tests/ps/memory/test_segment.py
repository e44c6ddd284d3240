from __future__ import annotations

import gc
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from ps.memory.segment import Segment

WRITER = """
import sys, torch
from ps.memory.segment import Segment, SegmentReference
pid, descriptor, size, nonce = sys.argv[1:]
segment = Segment.open(SegmentReference(int(pid), int(descriptor), int(size), bytes.fromhex(nonce)))
assert segment is not None
segment.tensor(torch.float32, 4, offset=2).fill_(7.0)
"""


def test_another_process_writes_where_this_one_reads() -> None:
    segment = Segment.create(64, "test")
    r = segment.reference
    arguments = [str(r.pid), str(r.descriptor), str(r.size), r.nonce.hex()]
    subprocess.run([sys.executable, "-c", WRITER, *arguments], check=True)
    assert segment.tensor(torch.float32, 8).tolist() == [0.0, 0.0, 7.0, 7.0, 7.0, 7.0, 0.0, 0.0]


def test_what_is_not_the_segment_is_not_opened() -> None:
    segment = Segment.create(64, "test")
    assert Segment.open(segment.reference) is not None
    assert Segment.open(replace(segment.reference, nonce=bytes(16))) is None
    assert Segment.open(replace(segment.reference, size=9999)) is None
    assert Segment.open(replace(segment.reference, pid=2**22 + 1)) is None
    assert Segment.open(replace(segment.reference, descriptor=9999)) is None


def test_nothing_is_left_when_the_last_tensor_goes() -> None:
    def segments() -> int:
        return Path("/proc/self/maps").read_text().count("steepest-gone")

    segment = Segment.create(64, "gone")
    tensor = segment.tensor(torch.float32, 4)
    assert segments() == 1
    assert any("steepest-gone" in str(f.readlink()) for f in Path("/proc/self/fd").iterdir() if f.is_symlink())
    segment.close()
    del segment
    gc.collect()
    tensor.fill_(1.0)
    assert segments() == 1
    del tensor
    gc.collect()
    assert segments() == 0


def test_an_empty_range_is_an_empty_tensor() -> None:
    assert Segment.create(0, "empty").tensor(torch.float32, 0).numel() == 0
