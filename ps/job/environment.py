"""Environment variables of a job's code, and secrets among them, which leave its processes in no text of ours."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from urllib.parse import quote, quote_plus

SECRETS = "STEEPEST_SECRETS"  # names of the variables that hold secrets, for this process and those it starts
LEAST_CHARACTERS = 8  # of what is hidden: a shorter text would be found everywhere
HIDDEN = "***"


def _secrets() -> list[str]:
    names = os.environ.get(SECRETS, "").split(",")
    return [os.environ[name] for name in names if name in os.environ]


def set_variables(variables: Mapping[str, str], secrets: Mapping[str, str]) -> None:
    """Set them in this process and those that it starts. secrets: by variable, values that are not to be shown."""
    os.environ.update(with_variables({}, variables, secrets))
    _hidden[:] = _forms_of(_secrets())


def with_variables(
    environment: Mapping[str, str], variables: Mapping[str, str], secrets: Mapping[str, str]
) -> dict[str, str]:
    """An environment with these variables, for another process; see set_variables."""
    return {**environment, **variables, **secrets, SECRETS: ",".join(secrets)}


def hidden(text: str) -> str:
    """The text without the secrets of this process."""
    return _without(text, _hidden)


def hide(text: str, secrets: Iterable[str]) -> str:
    """The text without secrets, nor any line of one that has several, such as a key in a PEM file.

    They are hidden as they are, and as Python, JSON and addresses on the web write them.
    """
    return _without(text, _forms_of(secrets))


def _without(text: str, forms: Iterable[str]) -> str:
    for form in forms:
        text = text.replace(form, HIDDEN)
    return text


def _forms_of(secrets: Iterable[str]) -> list[str]:
    """All that is to be hidden, the longest first."""
    lines = {line.strip() for secret in secrets for line in (secret, *secret.splitlines())}
    forms = {form for line in lines if len(line) >= LEAST_CHARACTERS for form in _forms(line)}
    return sorted(forms, key=len, reverse=True)


def _forms(secret: str) -> tuple[str, ...]:
    return secret, repr(secret)[1:-1], json.dumps(secret)[1:-1], quote(secret, safe=""), quote_plus(secret)


_hidden = _forms_of(_secrets())  # from the start: code may take its secrets out of the environment
