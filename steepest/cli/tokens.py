"""Commands about tokens. They work on the service's data directory: whoever runs the service makes the first."""

from __future__ import annotations

import json
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from steepest.cli.common import Json, app

if TYPE_CHECKING:
    from services.store.tokens import Tokens

token = typer.Typer(
    no_args_is_help=True,
    help="Make, list and revoke the tokens of a service.\n\n"
    "A service without tokens is open to all on its machine; the first one closes it. Run these where the service "
    "runs, with the --config and the environment that it has: they work on what it keeps, and count at once.",
)
app.add_typer(token, name="token", rich_help_panel="The service")

Name = Annotated[str, Argument(metavar="NAME", help="Of a person or program; jobs that it submits bear it.")]
Config = Annotated[
    Path | None,
    Option("--config", envvar="STEEPEST_CONFIG", metavar="FILE", help="TOML file of the service's settings."),
]
DataDirectory = Annotated[
    Path | None,
    Option("--data-dir", metavar="DIR", help="Where the service keeps its jobs.", show_default="steepest-data"),
]
Database = Annotated[
    str | None, Option("--database-url", metavar="URL", help="The database that the service keeps jobs in, if any.")
]
SECONDS_A_DAY = 86_400.0


def _tokens(config: Path | None, data_dir: Path | None, database_url: str | None) -> AbstractContextManager[Tokens]:
    """Those of the service with these settings."""
    from steepest.embedded import serve_settings, tokens_of

    given = {"data_dir": data_dir, "database_url": database_url}
    settings = serve_settings(config, {name: value for name, value in given.items() if value is not None})
    return tokens_of(settings.data_dir, settings.database_url)


@token.command()
def create(
    name: Name,
    role: Annotated[
        str, Option(help="viewer: look; submitter: submit jobs and act on those; admin: act on all jobs.")
    ] = "submitter",
    days: Annotated[float | None, Option(min=0.0, help="Days after which it expires; not given: never.")] = None,
    config: Config = None,
    data_dir: DataDirectory = None,
    database_url: Database = None,
    as_json: Json = False,
) -> None:
    """Make a token and print it. It is shown this once: the service keeps only a hash of it."""
    with _tokens(config, data_dir, database_url) as tokens:
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
    config: Config = None, data_dir: DataDirectory = None, database_url: Database = None, as_json: Json = False
) -> None:
    """List all tokens, those that were revoked or have expired too."""
    with _tokens(config, data_dir, database_url) as tokens:
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
def revoke(name: Name, config: Config = None, data_dir: DataDirectory = None, database_url: Database = None) -> None:
    """End a token, from its next call on. Its jobs go on."""
    with _tokens(config, data_dir, database_url) as tokens:
        tokens.revoke(name, time.time())
    sys.stdout.write(f"{name} is revoked\n")
