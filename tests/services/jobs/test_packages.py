"""Packages that go along with a job's code: real pip, and wheels that are made here."""

from __future__ import annotations

import io
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ps.job.code import PACKAGES_FOLDER
from services.jobs.code_bundles import CodeStore
from services.jobs.packages import Packed, with_packages
from steepest.errors import SpecError
from tests.support.documented import is_documented
from tests.support.wheels import make_wheel, use_only


@pytest.fixture(autouse=True)
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "index"
    directory.mkdir()
    use_only(directory, monkeypatch)
    make_wheel(directory, "steepest_lib", "1.0", "VALUE = 1\n")
    make_wheel(directory, "steepest_lib", "1.5", "VALUE = 1.5\n", ["steepest_base>=2"])
    make_wheel(directory, "steepest_base", "2.3", "VALUE = 2\n")
    return directory


def archive(**members: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, text in members.items():
            file.writestr(f"{name}.py", text)
    return buffer.getvalue()


def packed(code: bytes, *requirements: str, max_bytes: int = 1 << 20) -> Packed:
    return with_packages(code, requirements, seconds=60.0, max_bytes=max_bytes)


def names(code: bytes) -> set[str]:
    return {name for name in zipfile.ZipFile(io.BytesIO(code)).namelist() if ".dist-info" not in name}


def test_packages_and_what_they_need_lie_beside_the_code() -> None:
    code, packages = packed(archive(task="import steepest_lib"), "steepest_lib")
    assert set(packages) == {"steepest_lib==1.5", "steepest_base==2.3"}
    own = {f"{PACKAGES_FOLDER}/{name}" for name in ("steepest_lib.py", "steepest_base.py", "requirements.json")}
    assert names(code) == {"task.py", *own}
    assert "steepest_lib" not in sys.modules


def test_the_same_requirements_give_the_same_bytes() -> None:
    code = archive(task="")
    assert packed(code, "steepest_lib<1.5", "steepest_base") == packed(code, "steepest_base", "steepest_lib<1.5")


def test_what_is_installed_is_taken_from_there() -> None:
    code = archive(task="")
    assert packed(code, "numpy", "torch>=2") == Packed(code, ())
    assert packed(b"") == Packed(b"", ())


def test_code_that_has_its_packages_keeps_them(index: Path) -> None:
    first = packed(archive(task=""), "steepest_base")
    make_wheel(index, "steepest_base", "2.4", "VALUE = 3\n")
    assert packed(first.code, "steepest_base") == first
    assert packed(archive(task=""), "steepest_base").packages == ("steepest_base==2.4",)
    changed = packed(first.code, "steepest_lib==1.0")
    assert changed.packages == ("steepest_lib==1.0",)
    assert f"{PACKAGES_FOLDER}/steepest_base.py" not in names(changed.code)
    assert names(packed(first.code).code) == {"task.py"}


def test_what_cannot_be_had_is_refused(index: Path) -> None:
    with pytest.raises(SpecError) as refused:
        packed(b"", "steepest_absent")
    assert is_documented("a job requires a package that cannot be had", str(refused.value))
    make_wheel(index, "steepest_base", "1.0", "")
    with pytest.raises(SpecError, match=r"pip cannot install them: .*steepest-lib 1\.5 depends on steepest_base>=2"):
        packed(b"", "steepest_lib==1.5", "steepest_base==1.0")


def test_nothing_that_is_installed_is_replaced(index: Path) -> None:
    make_wheel(index, "numpy", "1.0", "")
    with pytest.raises(SpecError) as refused:
        packed(b"", "numpy<2")
    assert f"numpy {np.__version__} is installed" in str(refused.value)
    assert is_documented("a job requires another version of what is installed", str(refused.value))


def test_modules_of_the_same_name_are_refused(index: Path) -> None:
    for name in ("worker", "colorsys"):  # of the service, and of Python
        make_wheel(index, name, "3.0", "")
        with pytest.raises(SpecError, match=f"one of {name}==3.0 has a module '{name}', and so has what is installed"):
            packed(b"", name)


def test_what_is_too_large_is_refused() -> None:
    with pytest.raises(SpecError, match=r"steepest_base==2\.3 and the code come to \d+ bytes; allowed: 100\."):
        packed(b"", "steepest_base", max_bytes=100)


def test_a_python_without_pip_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.jobs.packages._PIP", (sys.executable, "-I", "-S", "-m", "pip"))
    with pytest.raises(SpecError, match="this service's Python has no pip"):
        packed(b"", "steepest_base")


def test_pip_may_not_take_long() -> None:
    with pytest.raises(SpecError, match=r"pip has not chosen packages for them within 0\.01 s"):
        with_packages(b"", ["steepest_base"], seconds=0.01, max_bytes=1 << 20)


def test_users_bring_no_folder_of_packages(tmp_path: Path) -> None:
    store = CodeStore(tmp_path / "code", 1 << 20)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr(f"{PACKAGES_FOLDER}/steepest_base.py", "")
    with pytest.raises(SpecError, match="reserved"):
        store.add([buffer.getvalue()])
    name, packages = store.with_packages(store.add([archive(task="")]), ["steepest_base"], 60.0)
    assert packages == ("steepest_base==2.3",)
    unpacked = store.unpacked(name)
    assert unpacked is not None
    assert (unpacked / PACKAGES_FOLDER / "steepest_base.py").exists()
