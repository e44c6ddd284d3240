from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ps.checkpoint.files import (
    MANIFEST,
    RECORDS,
    CheckpointError,
    State,
    best_verified,
    checkpoints,
    files_of,
    newest_valid,
    read_checkpoint,
    read_records,
    state_hashes,
    step_of,
    verified_at,
    write_checkpoint,
)
from ps.step.best import Best, Standing
from ps.step.messages import StepRecord


def state(step: int = 7) -> State:
    generator = torch.Generator().manual_seed(step)
    return State(
        standing=Standing(step, step - 1, clip=(0.1, 1 / 3)),
        model={"b.weight": torch.randn(3, 4, generator=generator), "a": torch.tensor(5)},
        optimizer={"b.weight.exp_avg": torch.randn(3, 4, generator=generator), "b.weight.step": torch.tensor(6.0)},
        extra={"mask": torch.ones(2, dtype=torch.bool)},
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path, state())
    back = read_checkpoint(written.path)
    assert back.standing == Standing(7, 6, clip=(0.1, 1 / 3))
    for name in ("model", "optimizer", "extra"):
        ours, theirs = getattr(state(), name), getattr(back, name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert (written.parameters_sha256, written.state_sha256) == state_hashes(back)


def test_records_lie_beside_the_state_and_are_no_part_of_it(tmp_path: Path) -> None:
    record = StepRecord(6, 1.5, math.nan, *[0.5] * 2, 8, *[1.0] * 3, True, False, 2, *[0.1] * 4, b"norms")
    written = write_checkpoint(tmp_path, state(), records=[record], incarnation=3)
    incarnation, (back,) = read_records(written.path)
    assert incarnation == 3
    assert repr(back) == repr(record)  # with what is not a number
    assert RECORDS not in {p.name for p in files_of(written.path)}
    (written.path / RECORDS).write_text("torn")
    assert read_records(written.path) == (0, [])
    assert read_checkpoint(written.path).step == 7


def test_the_hashes_are_those_of_the_contract() -> None:
    it = state()
    digest = hashlib.sha256()
    for name in ["a", "b.weight"]:
        digest.update(name.encode() + it.model[name].numpy().tobytes())
    parameters = digest.copy().hexdigest()
    for name in ["b.weight.exp_avg", "b.weight.step"]:
        digest.update(name.encode() + it.optimizer[name].numpy().tobytes())
    digest.update((7).to_bytes(8, "little"))
    assert state_hashes(it) == (parameters, digest.hexdigest())


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "extra.safetensors", MANIFEST])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_found_and_the_newest_valid_one_is_used(tmp_path: Path, file: str, damage: str) -> None:
    write_checkpoint(tmp_path, state(5))
    newer = write_checkpoint(tmp_path, state(6)).path
    data = bytearray((newer / file).read_bytes())
    match damage:
        case "flip":
            # The last character of the manifest is a newline; one in the middle of a hash is not to be overlooked.
            place = data.index(b"_sha256") + 15 if file == MANIFEST else len(data) - 3
            data[place] ^= 1
            (newer / file).write_bytes(data)
        case "truncate":
            (newer / file).write_bytes(data[: len(data) // 2])
        case _:
            (newer / file).unlink()
    with pytest.raises(CheckpointError):
        read_checkpoint(newer)
    found = newest_valid(tmp_path)
    assert found is not None
    assert found[1].step == 5
    assert newer.exists()


def test_every_flipped_bit_of_the_tensors_is_found(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, state()).path
    file = path / "model.safetensors"
    good = file.read_bytes()
    for place in range(0, len(good), 7):
        bad = bytearray(good)
        bad[place] ^= 1 << (place % 8)
        file.write_bytes(bad)
        with pytest.raises(CheckpointError):
            read_checkpoint(path)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in range(1, 7):
        write_checkpoint(tmp_path, state(step), keep=3)
    assert [p.name[-1] for p in checkpoints(tmp_path)] == ["6", "5", "4"]


def test_a_directory_without_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step-000000000009").mkdir()
    assert newest_valid(tmp_path) is None
    assert newest_valid(tmp_path / "nowhere") is None


def test_another_format_is_refused_by_name(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, state()).path
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        read_checkpoint(path)


FULL_DISK = """
import resource, signal, sys, torch
from pathlib import Path
from ps.checkpoint.files import State, write_checkpoint
from ps.step.best import Standing
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_checkpoint(Path(sys.argv[1]), State(Standing(8, 8), {"w": torch.zeros(100_000)}, {}, {}))
except OSError as error:
    print("refused:", error)
"""


def test_a_file_that_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    """The kernel refuses to let a file grow, as it does on a full disk."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    write_checkpoint(tmp_path, state(7))
    run = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True)
    assert "refused: cannot write" in run.stdout, run.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000000007"]
    found = newest_valid(tmp_path)
    assert found is not None
    assert found[1].step == 7


def test_tied_tensors_appear_under_each_name(tmp_path: Path) -> None:
    shared = torch.randn(4)
    it = State(Standing(1, 1), {"a": shared, "b": shared}, {}, {})
    back = load_file(write_checkpoint(tmp_path, it).path / "model.safetensors")
    assert torch.equal(back["a"], back["b"])
    shutil.rmtree(tmp_path)


def test_the_best_checkpoint_stays_and_is_found(tmp_path: Path) -> None:
    assert best_verified(tmp_path) is None
    for step in range(1, 8):
        best = Best(2, 0.5, step - 2, step) if step >= 2 else Best(-1, math.nan, 1, step)
        written = write_checkpoint(tmp_path, dataclasses.replace(state(step), standing=Standing(step, best=best)))
        assert repr(read_checkpoint(written.path).standing.best) == repr(best)
        found = best_verified(tmp_path)
        assert (found and found.step) == (2 if step >= 2 else None)
    assert [step_of(path) for path in checkpoints(tmp_path)] == [7, 6, 5, 2]
    assert verified_at(tmp_path, 4) is None
    there = verified_at(tmp_path, 5)
    assert there is not None
    assert there.state_sha256 == state_hashes(state(5))[1]
    (tmp_path / "step-000000000002" / "model.safetensors").write_bytes(b"torn")
    assert best_verified(tmp_path) is None


def test_records_of_an_older_version_have_fewer_numbers(tmp_path: Path) -> None:
    record = StepRecord(6, 1.5, 0.5, *[0.5] * 2, 8, *[1.0] * 3, True, False, 2, *[0.1] * 4, b"norms", 0.25, b"beside")
    written = write_checkpoint(tmp_path, state(), records=[record], incarnation=3)
    assert repr(read_records(written.path)) == repr((3, [record]))
    kept = json.loads((written.path / RECORDS).read_text())
    kept["records"] = [kept["records"][0][:-12]]
    (written.path / RECORDS).write_text(json.dumps(kept))
    older = record._replace(data_seconds=0.0, logged=b"")
    assert repr(read_records(written.path)) == repr((3, [older]))
