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


SHARER = """
import sys, torch
from pathlib import Path
from ps.memory.segment import Segment, SegmentReference
pid, descriptor, size, nonce = sys.argv[1:]
segment = Segment.open(SegmentReference(int(pid), int(descriptor), int(size), bytes.fromhex(nonce)))
room = segment.constant(4096, lambda room: sys.exit("it was filled already"))
tensor = torch.frombuffer(room, dtype=torch.uint8)
assert bool((tensor == 7).all()), tensor
del segment

def private() -> int:
    own, here = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        here = "steepest-shared" in line if "-" in line.split()[0] else here
        own += int(line.split()[1]) if here and line.startswith(("Private_Dirty", "Anonymous")) else 0
    return own

assert private() == 0, private()
tensor[: 1 << 20] = 1
assert private() >= 1024, private()
"""


def test_constants_lie_in_memory_once_and_what_one_process_writes_is_its_own() -> None:
    segment = Segment.create(4096 + (8 << 20), "shared")

    def fill(room: memoryview) -> None:
        torch.frombuffer(room, dtype=torch.uint8).fill_(7)

    room = torch.frombuffer(segment.constant(4096, fill), dtype=torch.uint8)
    r = segment.reference
    arguments = [str(r.pid), str(r.descriptor), str(r.size), r.nonce.hex()]
    subprocess.run([sys.executable, "-c", SHARER, *arguments], check=True)
    assert bool((room == 7).all())


def test_constants_half_filled_by_a_process_that_died_are_filled_again() -> None:
    segment = Segment.create(4096 + 64, "shared")
    r = segment.reference
    dying = SHARER.replace('lambda room: sys.exit("it was filled already")', "lambda room: __import__('os').abort()")
    arguments = [str(r.pid), str(r.descriptor), str(r.size), r.nonce.hex()]
    assert subprocess.run([sys.executable, "-c", dying, *arguments], check=False).returncode < 0
    room = segment.constant(4096, lambda room: torch.frombuffer(room, dtype=torch.uint8).fill_(3))
    assert bytes(room) == b"\3" * 64


def test_an_empty_range_is_an_empty_tensor() -> None:
    assert Segment.create(0, "empty").tensor(torch.float32, 0).numel() == 0
