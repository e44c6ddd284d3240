"""What the modules of the command share: the application, its options, and how a job is shown."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer
from typer import Argument, Option
from typer.core import TyperCommand

if TYPE_CHECKING:
    from steepest.client import Client, Job
    from steepest.jobs import JobInfo


def _remember_token(value: str) -> str:
    _Connection.token = value
    return value


def _remember_ca(value: Path | None) -> Path | None:
    _Connection.tls_ca = value
    return value


class _Connection:
    """How the command that runs reaches the service, beside its address."""

    token = ""
    tls_ca: Path | None = None


_connecting = typer.Typer(add_completion=False)


@_connecting.command()
def _options(
    token: Annotated[
        str,
        Option(
            "--token",
            envvar="STEEPEST_TOKEN",
            help="For a service that needs one; better in the variable than in the history of a shell.",
            callback=_remember_token,
            expose_value=False,
            show_default=False,
        ),
    ] = "",
    tls_ca: Annotated[
        Path | None,
        Option(
            "--tls-ca",
            envvar="STEEPEST_TLS_CA",
            help="PEM file of the authority behind the service's certificate; it has the connection encrypted.",
            callback=_remember_ca,
            expose_value=False,
        ),
    ] = None,
) -> None: ...


class _Command(TyperCommand):
    """A command; one that talks to a service takes --token and --tls-ca beside --server."""

    def __init__(self, name: str | None, *, params: list[Any] | None = None, **settings: Any) -> None:
        params = list(params or [])
        for index, parameter in enumerate(params):
            if parameter.name == "server":
                params[index + 1 : index + 1] = [
                    p for p in typer.main.get_command(_connecting).params if p.name != "help"
                ]
                break
        text = inspect.cleandoc(settings.pop("help", None) or "")
        super().__init__(name, params=params, help="\n\n".join(map(_unwrapped, text.split("\n\n"))), **settings)


def _unwrapped(paragraph: str) -> str:
    """As one line, which the help wraps to the terminal; not what is indented, or a command in each line."""
    lines = paragraph.split("\n")
    return paragraph if any(line.startswith((" ", "steepest ")) for line in lines) else " ".join(lines)


Function = TypeVar("Function", bound=Callable[..., Any])


class _App(typer.Typer):
    def command(self, name: str | None = None, **settings: Any) -> Callable[[Function], Function]:
        """Every command is a `_Command`."""
        return super().command(name, **{"cls": _Command, **settings})


app = _App(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Distributed training whose result never depends on placement.\n\n"
    "Start with: [bold]steepest train path/to/train.py:function --steps 100[/bold]",
)

EXIT_OK, EXIT_JOB, EXIT_USAGE = 0, 1, 2

Task = Annotated[
    str, Argument(metavar="TASK", help="path/to/file.py:function, package.module:function, or a job file (job.toml).")
]
JobName = Annotated[str, Argument(metavar="JOB", help="trainingJobs/ID, or only the ID.")]
Server = Annotated[
    str,
    Option(
        "--server",
        envvar="STEEPEST_SERVER",
        help="Address of the service; else that of the context in use, or 127.0.0.1:50051.",
        show_default=False,
    ),
]
Json = Annotated[bool, Option("--json", help="Print one JSON object as the last line of stdout.")]
DEFAULT_SERVER = ""  # the context in use


def fail(message: str) -> NoReturn:
    """End with a message on stderr, and the exit code of a usage error."""
    from steepest.cli.console import complain

    complain(message)
    sys.exit(EXIT_USAGE)


@contextlib.contextmanager
def client_of(server: str) -> Iterator[Client]:
    """A connection to a service."""
    from steepest.client import Client

    with Client(server, token=_Connection.token or None, tls_ca=_Connection.tls_ca) as client:
        yield client


def report(info: JobInfo, *, as_json: bool, **more: Any) -> None:
    """Print a job. more: further keys of the JSON object."""
    from steepest.cli.console import summary

    if as_json:
        sys.stdout.write(json.dumps({**info.to_dict(), **more}) + "\n")
    else:
        sys.stdout.write(summary(info) + "\n")
    sys.stdout.flush()


def exit_for(info: JobInfo) -> NoReturn:
    """End with the exit code that says how a job did."""
    raise typer.Exit(EXIT_JOB if info.state in ("FAILED", "CANCELLED") else EXIT_OK)


def show_until_end(job: Job) -> JobInfo:
    """Show progress until the job ends."""
    from steepest.cli.console import show

    end = show(job.name, job.get().total_steps, job.watch(logs=True))
    return end or job.get()


def prepare_for_embedded_ray() -> None:
    """Ray forks while gRPC's threads run; gRPC's own fork handlers crash such children. Before gRPC is imported."""
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
