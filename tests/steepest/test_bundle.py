from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest

from steepest.bundle import bundle_task
from steepest.errors import SpecError

TRAIN = "import numpy\nfrom helpers.deep import value\nimport beside\ndef f():\n    return value\n"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "beside.py").write_text("import helpers\n")
    (tmp_path / "unrelated.py").write_text("")
    (tmp_path / "helpers").mkdir()
    (tmp_path / "helpers" / "__init__.py").write_text("")
    (tmp_path / "helpers" / "deep.py").write_text("value = 1\n")
    return tmp_path


def _names(data: bytes) -> list[str]:
    return zipfile.ZipFile(io.BytesIO(data)).namelist()


def test_a_file_and_what_it_imports_go_along(project: Path) -> None:
    bundle = bundle_task(f"{project / 'train.py'}:f")
    assert (bundle.module, bundle.function) == ("train", "f")
    assert _names(bundle.data) == ["beside.py", "helpers/__init__.py", "helpers/deep.py", "train.py"]


def test_the_same_code_gives_the_same_bytes(project: Path) -> None:
    first = bundle_task(f"{project / 'train.py'}:f").data
    (project / "train.py").touch()
    assert bundle_task(f"{project / 'train.py'}:f").data == first


def test_files_and_folders_that_the_code_names_go_along(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "vocabulary.json").write_text("[1]")
    (project / "unnamed.csv").write_text("1")
    for name in ("data/a.npy", "data/deep/b.npy", "data/.hidden", "data/code.py", "data/__pycache__/c.pyc"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(name)
    (project / "train.py").write_text(
        TRAIN + "FILES = 'vocabulary.json', './data/', '../other', '/etc/passwd', '', '.'\n"
    )
    named = ["data/a.npy", "data/deep/b.npy", "vocabulary.json"]
    bundle = bundle_task(f"{project / 'train.py'}:f")
    assert [name for name in _names(bundle.data) if not name.endswith(".py")] == named
    assert bundle.left_out == ()
    monkeypatch.setattr("steepest.bundle.MAX_DATA_BYTES", 20)
    bundle = bundle_task(f"{project / 'train.py'}:f")
    assert [name for name in _names(bundle.data) if not name.endswith(".py")] == ["vocabulary.json"]
    assert bundle.left_out == ("data",)


def test_installed_modules_are_not_packed() -> None:
    assert bundle_task("json.decoder:JSONDecoder").data == b""


def test_a_local_package_is_packed(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    bundle = bundle_task("helpers.deep:value")
    assert bundle.module == "helpers.deep"
    assert _names(bundle.data) == ["helpers/__init__.py", "helpers/deep.py"]


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("train.py", ["names no function", "path/to/file.py:function"]),
        ("nowhere.py:f", ["there is no file nowhere.py"]),
        ("train.py:g", ["no function 'g'", "it has: f"]),
        ("broken.py:f", ["broken.py", "line 1"]),
        ("my-train.py:f", ["my-train.py", "rename"]),
    ],
)
def test_what_cannot_be_packed_is_named(
    project: Path, task: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "broken.py").write_text("def f(:\n")
    (project / "my-train.py").write_text("def f(): ...\n")
    monkeypatch.chdir(project)
    with pytest.raises(SpecError) as caught:
        bundle_task(task)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("name", ["services", "worker", "ps"])
@pytest.mark.parametrize("kind", ["file", "package", "imported"])
def test_a_reserved_name_is_refused_with_the_file_to_rename(
    project: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    task = f"{name}.py:f"
    if kind == "package":
        (project / name).mkdir()
        (project / name / "__init__.py").write_text("def f(): ...\n")
        task = f"{name}:f"
    else:
        (project / f"{name}.py").write_text("def f(): ...\n")
    if kind == "imported":
        (project / "train.py").write_text(f"import {name}\ndef f(): ...\n")
        task = "train.py:f"
    with pytest.raises(SpecError) as caught:
        bundle_task(task)
    assert repr(name) in str(caught.value)
    assert "rename" in str(caught.value)
