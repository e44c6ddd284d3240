"""Checkpoints: safetensors files and a manifest that is written last.

A checkpoint is a directory `step-{step:012d}` with model.safetensors (`state_dict` names), optimizer.safetensors
("{parameter}.{state}", torch.optim's state names), extra.safetensors when the model has state outside `state_dict`,
average.safetensors when the job averages its parameters (`state_dict` names), compression.safetensors when it
compresses (see ps.checkpoint.named_state), and manifest.json, which holds the SHA-256 of each file; beside them,
records.json has the records that the history may not have yet. Everything is written under a temporary name, synced and
renamed, so a directory with a manifest is whole. It knows nothing of topology.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ps.memory.raw import raw_bytes
from ps.step.best import Best, Standing
from ps.step.messages import RECORD_BYTES, StepRecord

MANIFEST = "manifest.json"
MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
EXTRA = "extra.safetensors"
AVERAGE = "average.safetensors"
COMPRESSION = "compression.safetensors"
RECORDS = "records.json"
FORMAT = 1
KEPT = 3


class CheckpointError(Exception):
    """A checkpoint is torn, altered or of another format. The message names the file."""


@dataclass(frozen=True)
class State:
    """A job's whole training state, as tensors of the parameters' own shapes.

    model: `state_dict` name -> tensor. optimizer: "{parameter}.{state}" -> tensor. extra: non-persistent buffers.
    average: as model, with the average of the parameters in their place, if there is one. compression: what a job that
    compresses has besides, see ps.checkpoint.named_state.
    """

    standing: Standing
    model: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    extra: dict[str, torch.Tensor]
    compression: dict[str, torch.Tensor] = field(default_factory=dict)
    average: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Of how many steps this is the state."""
        return self.standing.step


@dataclass(frozen=True, slots=True)
class Written:
    """A checkpoint on disk."""

    step: int
    path: Path
    parameters_sha256: str
    state_sha256: str


def state_hashes(state: State) -> tuple[str, str]:
    """(parameters_sha256, state_sha256).

    The first is over the `state_dict` tensors sorted by name: name in UTF-8, then raw little-endian bytes. The second
    goes on over the optimizer's tensors, likewise, then the step as 8 bytes, little-endian.
    """
    digest = hashlib.sha256()
    for name in sorted(state.model):
        digest.update(name.encode())
        digest.update(raw_bytes(state.model[name]))
    parameters = digest.hexdigest()
    for name in sorted(state.optimizer):
        digest.update(name.encode())
        digest.update(raw_bytes(state.optimizer[name]))
    digest.update(state.step.to_bytes(8, "little"))
    return parameters, digest.hexdigest()


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_checkpoint(
    directory: Path,
    state: State,
    *,
    records: Sequence[StepRecord] = (),
    incarnation: int = 0,
    keep: int = KEPT,
) -> Written:
    """Write `directory`/step-N, then remove all but the newest `keep` checkpoints and the best one.

    records: of steps before this one that may not have reached the history; incarnation: the life that made them. They
    lie beside the state, so that a job that goes on from here has no gap in its history.

    Raises OSError (a full disk, say); what was on disk before is untouched then.
    """
    directory.mkdir(parents=True, exist_ok=True)
    final = directory / _name(state.step)
    temporary = directory / f".{final.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        files = {MODEL: state.model, OPTIMIZER: state.optimizer}
        if state.extra:
            files[EXTRA] = state.extra
        if state.average:
            files[AVERAGE] = state.average
        if state.compression:
            files[COMPRESSION] = state.compression
        for name, tensors in files.items():
            # Tied tensors appear under each of their names, so each gets memory of its own.
            try:
                save_file({k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}, temporary / name)
            except Exception as error:  # safetensors wraps OSError in its own type
                raise OSError(f"cannot write {temporary / name}: {error}") from error
            _sync(temporary / name)
        parameters, whole = state_hashes(state)
        manifest = {
            "format": FORMAT,
            "step": state.step,
            "updates": state.standing.updates,
            "parameters_sha256": parameters,
            "state_sha256": whole,
            "best": _best_to_json(state.standing.best),
            "clip": list(state.standing.clip),
            "norms": list(state.standing.norms),
            "seconds": state.standing.seconds,
            "files": {name: {"sha256": _file_sha256(temporary / name)} for name in files},
        }
        kept = {"incarnation": incarnation, "records": [_plain(r) for r in records]}
        (temporary / RECORDS).write_text(json.dumps(kept))
        _sync(temporary / RECORDS)
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        _sync(temporary / MANIFEST)
        _sync(temporary)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        _sync(directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in checkpoints(directory)[keep:]:
        if old.name != _name(state.standing.best.step):
            shutil.rmtree(old, ignore_errors=True)
    return Written(state.step, final, parameters, whole)


def _name(step: int) -> str:
    return f"step-{step:012d}"


def step_of(path: Path) -> int:
    """The step of a checkpoint, by its name."""
    return int(path.name.removeprefix("step-"))


def _best_to_json(best: Best) -> dict[str, Any] | None:
    return {**best._asdict(), "value": best.value if best.step >= 0 else None} if best.last >= 0 else None


def _best_from_json(raw: dict[str, Any] | None) -> Best:
    return Best(**{**raw, "value": math.nan if raw["value"] is None else raw["value"]}) if raw else Best()


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in a directory, newest first, whether valid or not."""
    return sorted((p for p in directory.glob("step-*") if p.is_dir()), reverse=True)


def read_checkpoint(path: Path) -> State:
    """Read a checkpoint and verify every byte. Raises CheckpointError."""
    return _read(path)[1]


def _verified_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files have the hashes it says. Raises CheckpointError."""
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
        hashes = {name: entry["sha256"] for name, entry in manifest["files"].items()}
        int(manifest["step"]), int(manifest["updates"]), manifest["parameters_sha256"], manifest["state_sha256"]
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST}: {error}") from error
    if version != FORMAT:
        raise CheckpointError(f"{path / MANIFEST}: format {version}; this version reads format {FORMAT}")
    for name, expected in hashes.items():
        try:
            found = _file_sha256(path / name)
        except OSError as error:
            raise CheckpointError(f"{path / name}: {error}") from error
        if found != expected:
            raise CheckpointError(f"{path / name}: its SHA-256 is not the one in the manifest")
    return manifest


def _read(path: Path) -> tuple[Written, State]:
    manifest = _verified_manifest(path)
    tensors: dict[str, dict[str, torch.Tensor]] = {EXTRA: {}, COMPRESSION: {}, AVERAGE: {}}
    for name in manifest["files"]:
        try:
            tensors[name] = load_file(path / name)
        except OSError as error:
            raise CheckpointError(f"{path / name}: {error}") from error
    state = State(
        Standing(
            int(manifest["step"]),
            int(manifest["updates"]),
            _best_from_json(manifest.get("best")),
            tuple(map(float, manifest.get("clip", ()))),
            tuple(map(float, manifest.get("norms", ()))),
            float(manifest.get("seconds", 0.0)),
        ),
        tensors[MODEL],
        tensors[OPTIMIZER],
        tensors[EXTRA],
        tensors[COMPRESSION],
        tensors[AVERAGE],
    )
    parameters, whole = state_hashes(state)
    if (parameters, whole) != (manifest["parameters_sha256"], manifest["state_sha256"]):
        raise CheckpointError(f"{path}: its state_sha256 is not the one in the manifest")
    return Written(state.step, path, parameters, whole), state


def newest_verified(directory: Path) -> Written | None:
    """The newest checkpoint whose files have the hashes in its manifest, or None; loads no tensor.

    It is the one that `newest_valid` reads.
    """
    found = (_verified(path) for path in checkpoints(directory))
    return next((written for written in found if written is not None), None)


def _verified(path: Path) -> Written | None:
    try:
        manifest = _verified_manifest(path)
    except CheckpointError:
        return None
    return Written(int(manifest["step"]), path, manifest["parameters_sha256"], manifest["state_sha256"])


def problem_of(path: Path) -> str:
    """What is wrong with a checkpoint's files, or nothing."""
    try:
        _verified_manifest(path)
    except CheckpointError as error:
        return str(error)
    return ""


def verified_at(directory: Path, step: int) -> Written | None:
    """The checkpoint of a step, or None when there is none, or it does not verify."""
    return _verified(directory / _name(step))


def best_verified(directory: Path) -> Written | None:
    """The checkpoint of the best evaluation, as the newest one knows it, or None."""
    for path in checkpoints(directory):
        with contextlib.suppress(CheckpointError):
            best = _best_from_json(_verified_manifest(path).get("best"))
            return verified_at(directory, best.step) if best.step >= 0 else None
    return None


def files_of(path: Path) -> list[Path]:
    """The files of a valid checkpoint that are its state, and its manifest."""
    names = json.loads((path / MANIFEST).read_text())["files"]
    return [path / name for name in sorted([*names, MANIFEST])]


def read_records(path: Path) -> tuple[int, list[StepRecord]]:
    """(incarnation, records) that were written with a checkpoint; none when there are none to read."""
    try:
        kept = json.loads((path / RECORDS).read_text())
        return int(kept["incarnation"]), [_record(raw) for raw in kept["records"]]
    except (OSError, ValueError, KeyError, TypeError):
        return 0, []


def _plain(record: StepRecord) -> list[Any]:
    return [value.hex() if isinstance(value, bytes) else value for value in record]


def _record(raw: list[Any]) -> StepRecord:
    """A record from JSON, where bytes are hexadecimal; those of older versions have fewer fields."""
    values = dict(zip(StepRecord._fields, raw, strict=False))
    return StepRecord(**values | {name: bytes.fromhex(values[name]) for name in RECORD_BYTES if name in values})


def newest_valid(directory: Path) -> tuple[Written, State] | None:
    """The newest checkpoint that verifies, or None."""
    for path in checkpoints(directory):
        try:
            return _read(path)
        except CheckpointError:
            continue
    return None
