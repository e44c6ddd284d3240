"""A downloaded checkpoint is compared with its manifest, without torch or a service."""

import hashlib
import json
from pathlib import Path

from steepest.verify import verify_checkpoint


def checkpoint(directory: Path) -> Path:
    (directory / "model.safetensors").write_bytes(b"weights")
    manifest = {
        "step": 7,
        "parameters_sha256": "a",
        "state_sha256": "b",
        "files": {"model.safetensors": {"sha256": hashlib.sha256(b"weights").hexdigest()}},
    }
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


def test_one_that_is_whole(tmp_path: Path) -> None:
    found = verify_checkpoint(checkpoint(tmp_path))
    assert found == {
        "valid": True, "problems": [], "step": 7, "files": 1, "parameters_sha256": "a", "state_sha256": "b",
    }  # fmt: skip


def test_one_byte_that_differs(tmp_path: Path) -> None:
    (checkpoint(tmp_path) / "model.safetensors").write_bytes(b"weighty")
    found = verify_checkpoint(tmp_path)
    assert not found["valid"]
    assert "model.safetensors" in found["problems"][0]


def test_a_file_or_manifest_that_is_missing(tmp_path: Path) -> None:
    (checkpoint(tmp_path) / "model.safetensors").unlink()
    assert "No such file" in verify_checkpoint(tmp_path)["problems"][0]
    for text in ("{}", "no json", '{"files": 3}'):
        (tmp_path / "manifest.json").write_text(text)
        [problem] = verify_checkpoint(tmp_path)["problems"]
        assert "is no manifest" in problem
    assert not verify_checkpoint(tmp_path / "nowhere")["valid"]


def test_a_manifest_that_names_files_elsewhere(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["files"] = {"../../etc/passwd": {"sha256": "0"}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    [problem] = verify_checkpoint(tmp_path)["problems"]
    assert "is no file of this directory" in problem
