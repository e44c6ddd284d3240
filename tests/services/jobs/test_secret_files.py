"""Which secrets a job gets, and which are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.jobs.secret_files import SecretFiles
from steepest.errors import SpecError
from steepest.spec import TrainingJobSpec, spec_from_dict


def spec(**secrets: str) -> TrainingJobSpec:
    return spec_from_dict({"task": {"module": "m", "function": "f"}, "steps": 1, "secrets": secrets})


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """As Kubernetes lays secrets down: a link to a folder that is replaced as a whole."""
    (tmp_path / "..2026").mkdir()
    (tmp_path / "..data").symlink_to("..2026")
    for name, data in {
        "hub": b"everybody's\n",
        "short": b" 12345\n",
        "image": b"\xff\xd8\xff",
        "zero": b"1234567890\x00",
        "large": b"x" * 65537,
    }.items():
        (tmp_path / "..2026" / name).write_bytes(data)
        (tmp_path / name).symlink_to(f"..data/{name}")
    (tmp_path / "ada").mkdir()
    (tmp_path / "ada" / "hub").write_text("only ada's")
    (tmp_path / "ada" / "own").write_text("for ada too")
    return tmp_path


def test_an_owners_own_comes_first(directory: Path) -> None:
    files = SecretFiles(directory)
    assert files.of(spec(TOKEN="hub"), "ada") == {"TOKEN": "only ada's"}
    assert files.of(spec(TOKEN="hub"), "bob") == {"TOKEN": "everybody's"}
    assert files.of(spec(TOKEN="hub"), "") == {"TOKEN": "everybody's"}
    assert files.of(spec(A="own", B="hub"), "ada") == {"A": "for ada too", "B": "only ada's"}


def test_a_new_value_is_read(directory: Path) -> None:
    (directory / "..2027").mkdir()
    (directory / "..2027" / "hub").write_text("rotated value")
    (directory / "..data").unlink()
    (directory / "..data").symlink_to("..2027")
    assert SecretFiles(directory).of(spec(TOKEN="hub"), "bob") == {"TOKEN": "rotated value"}


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("own", "there is no secret 'own' for this job; there are: hub, image, large, short, zero"),
        ("ada", "there is no secret 'ada' for this job"),
        ("short", "'short' has fewer than 8 characters"),
        ("image", "'image' is no text of at most 64 KiB"),
        ("zero", "'zero' is no text"),
        ("large", "'large' is no text"),
    ],
)
def test_what_cannot_be_had_is_refused(directory: Path, name: str, problem: str) -> None:
    with pytest.raises(SpecError, match=problem) as refused:
        SecretFiles(directory).of(spec(TOKEN=name), "bob")
    assert refused.value.violations[0].field == "secrets.TOKEN"


def test_a_service_without_secrets_says_how_it_gets_them() -> None:
    assert SecretFiles(None).of(spec(), "ada") == {}
    with pytest.raises(SpecError, match="this service has no secrets; start it with --secrets-dir DIR"):
        SecretFiles(None).of(spec(TOKEN="hub"), "ada")


@pytest.mark.parametrize("name", ["../hub", "ada/hub", ".hub", "", "a" * 254, "hub\n"])
def test_a_name_leads_nowhere_else(name: str) -> None:
    with pytest.raises(SpecError, match="secrets"):
        spec(TOKEN=name)


def test_a_variable_has_one_value() -> None:
    raw = {"task": {"module": "m", "function": "f"}, "steps": 1, "environment": {"A": "b"}, "secrets": {"A": "hub"}}
    with pytest.raises(SpecError, match=r"environment\.A is among the secrets, too"):
        spec_from_dict(raw)


@pytest.mark.parametrize("name", ["PYTHONHASHSEED", "RAY_ADDRESS", "STEEPEST_SECRETS", "PATH", "1A", "A=B", ""])
@pytest.mark.parametrize("field", ["environment", "secrets"])
def test_variables_that_would_do_nothing_or_harm_are_refused(field: str, name: str) -> None:
    with pytest.raises(SpecError, match=field):
        spec_from_dict({"task": {"module": "m", "function": "f"}, "steps": 1, field: {name: "something"}})
