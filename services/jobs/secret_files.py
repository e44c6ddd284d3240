"""The secrets that jobs may name: files of a directory, as Kubernetes, Docker and systemd lay them down."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ps.job.environment import LEAST_CHARACTERS
from steepest.errors import SpecError, Violation
from steepest.spec import TrainingJobSpec

MAX_BYTES = 64 << 10


class SecretFiles:
    """A file's name is the secret's. Those in a folder named as an owner are for that owner's jobs, and come first.

    directory: None where there are none.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory

    def of(self, spec: TrainingJobSpec, owner: str) -> dict[str, str]:
        """By variable, the values of the secrets that a job of this owner names. Raises SpecError."""
        return {variable: self._read(variable, name, owner) for variable, name in spec.secrets.items()}

    def _read(self, variable: str, name: str, owner: str) -> str:
        field = f"secrets.{variable}"
        if self._directory is None:
            problem = (
                f"{name!r}: this service has no secrets; start it with --secrets-dir DIR, or STEEPEST_SECRETS_DIR=DIR"
            )
            raise SpecError([Violation(field, problem)])
        places = ([self._directory / owner] if owner else []) + [self._directory]
        path = next((place / name for place in places if (place / name).is_file()), None)
        if path is None:
            there = ", ".join(sorted(_names(places))) or "none"
            raise SpecError([Violation(field, f"there is no secret {name!r} for this job; there are: {there}")])
        try:
            with path.open("rb") as file:
                data = file.read(MAX_BYTES + 1)
            value = data.decode().removesuffix("\n").removesuffix("\r")
        except OSError as error:
            raise SpecError([Violation(field, f"{name!r} cannot be read: {error.strerror}")]) from None
        except UnicodeDecodeError:
            value = "\x00"
        if len(data) > MAX_BYTES or "\x00" in value:
            problem = f"{name!r} is no text of at most {MAX_BYTES >> 10} KiB, as a variable takes"
            raise SpecError([Violation(field, problem)])
        if len(value.strip()) < LEAST_CHARACTERS:
            problem = (
                f"{name!r} has fewer than {LEAST_CHARACTERS} characters, too few to be told from other text where "
                "it is to be hidden"
            )
            raise SpecError([Violation(field, problem)])
        return value


def _names(places: Iterable[Path]) -> set[str]:
    """Of all secrets there; names with a dot before them are the files' keeper's own."""
    return {
        file.name
        for place in places
        if place.is_dir()
        for file in place.iterdir()
        if file.is_file() and not file.name.startswith(".")
    }
