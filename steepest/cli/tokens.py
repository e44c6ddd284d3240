"""Commands about tokens. They work on the service's data directory: whoever runs the service makes the first."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from steepest.cli.common import Json, app

token = typer.Typer(
    no_args_is_help=True,
    help="Make, list and revoke the tokens of a service.\n\n"
    "A service without tokens is open to all on its machine; the first one closes it. Run these where the service "
    "runs: they work on its data directory, and count at once.",
)
app.add_typer(token, name="token", rich_help_panel="The service")

Name = Annotated[str, Argument(metavar="NAME", help="Of a person or program; jobs that it submits bear it.")]
DataDirectory = Annotated[Path, Option("--data-dir", help="Of the service.")]
SECONDS_A_DAY = 86_400.0
DEFAULT_DIRECTORY = Path("steepest-data")
Database = Annotated[
    str, Option("--database-url", envvar="STEEPEST_DATABASE_URL", help="Of the service, if it has one.")
]


@token.command()
def create(
    name: Name,
    role: Annotated[
        str, Option(help="viewer: look; submitter: submit jobs and act on those; admin: act on all jobs.")
    ] = "submitter",
    days: Annotated[float | None, Option(min=0.0, help="After which it expires; without them it never does.")] = None,
    data_dir: DataDirectory = DEFAULT_DIRECTORY,
    database_url: Database = "",
    as_json: Json = False,
) -> None:
    """Make a token and print it. It is shown this once: the service keeps only a hash of it."""
    from steepest.embedded import tokens_of

    with tokens_of(data_dir, database_url) as tokens:
        now = time.time()
        expires = None if days is None else now + days * SECONDS_A_DAY
        made = tokens.create(name, role, now, expires)
    if as_json:
        sys.stdout.write(json.dumps({"name": name, "role": role, "token": made, "expires": expires}) + "\n")
        return
    sys.stderr.write(f"{name} is a {role}; keep the token, it is not shown again\n")
    sys.stdout.write(made + "\n")


@token.command("list")
def list_tokens(
    data_dir: DataDirectory = DEFAULT_DIRECTORY, database_url: Database = "", as_json: Json = False
) -> None:
    """List all tokens, those that were revoked or have expired too."""
    from steepest.embedded import tokens_of

    with tokens_of(data_dir, database_url) as tokens:
        rows = tokens.all()
    if as_json:
        keys = ("name", "role", "created", "revoked", "expires")
        shown = [{key: getattr(row, key) for key in keys} for row in rows]
        sys.stdout.write(json.dumps({"tokens": shown}) + "\n")
        return
    for row in rows:
        ends = ""
        if row.expires is not None:
            ends = f", {'expired' if row.expires <= time.time() else 'expires'} {_day(row.expires)}"
        revoked = ", revoked" if row.revoked else ""
        sys.stdout.write(f"{row.name:24} {row.role:10} made {_day(row.created)}{ends}{revoked}\n")
    if not rows:
        sys.stderr.write("there is none: the service is open to all on its machine\n")


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(seconds))


@token.command()
def revoke(name: Name, data_dir: DataDirectory = DEFAULT_DIRECTORY, database_url: Database = "") -> None:
    """End a token, from its next call on. Its jobs go on."""
    from steepest.embedded import tokens_of

    with tokens_of(data_dir, database_url) as tokens:
        tokens.revoke(name, time.time())
    sys.stdout.write(f"{name} is revoked\n")
