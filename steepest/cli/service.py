"""Commands about services: which one to talk to, and what it does now."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from steepest import contexts
from steepest.cli.common import DEFAULT_SERVER, Json, Server, app, client_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from steepest.jobs import JobInfo

context = typer.Typer(no_args_is_help=True, help="Name services, and choose the one that commands talk to.")
app.add_typer(context, name="context", rich_help_panel="The service")

Name = Annotated[str, Argument(metavar="NAME", help="Of the context.")]


@context.command()
def add(name: Name, address: Annotated[str, Argument(metavar="ADDRESS", help="HOST:PORT of a service.")]) -> None:
    """Remember a service; the first one is in use at once."""
    found = contexts.add(name, address)
    sys.stdout.write(f"{name} is {address}{', in use' if found.current == name else ''}\n")


@context.command()
def use(name: Name) -> None:
    """Have commands talk to this service, unless --server or STEEPEST_SERVER says otherwise."""
    sys.stdout.write(f"using {name}: {contexts.use(name).address}\n")


@context.command()
def remove(name: Name) -> None:
    """Forget a service."""
    contexts.remove(name)
    sys.stdout.write(f"{name} is forgotten\n")


@context.command("list")
def list_contexts(as_json: Json = False) -> None:
    """List the services that are known; the one in use has a star."""
    found = contexts.read()
    if as_json:
        sys.stdout.write(json.dumps({"current": found.current or None, "contexts": found.addresses}) + "\n")
        return
    for name, address in found.addresses.items():
        sys.stdout.write(f"{'*' if name == found.current else ' '} {name}  {address}\n")
    if not found.addresses:
        sys.stderr.write(
            f"there is none, so commands talk to {contexts.DEFAULT_ADDRESS}; steepest context add adds one\n"
        )


@app.command(rich_help_panel="The service")
def info(server: Server = DEFAULT_SERVER, as_json: Json = False) -> None:
    """Show what a service is: its version, its cluster and what is free there, its jobs, and who you are to it."""
    with client_of(server) as client:
        found = client.server_info()
        address = client.address
    if as_json:
        sys.stdout.write(json.dumps(found.to_dict()) + "\n")
        return
    days, rest = divmod(int(time.time() - found.started), 86_400)
    hours, minutes = divmod(rest // 60, 60)
    memory = found.resources.get("memory", 0.0)
    free = found.free_resources
    cluster = ", ".join(
        f"{free.get(name, 0.0):g} of {found.resources[name]:g} {name}s free"
        for name in ("CPU", "GPU")
        if name in found.resources
    )
    calls = f"{found.calls_per_second:g} calls a second" if found.calls_per_second else "as many calls as you like"
    packages = "packages" if found.allows_requirements else "no packages"
    jobs = ", ".join(f"{count} {state.lower()}" for state, count in sorted(found.jobs.items()))
    rows = {
        "service": f"steepest {found.version} at {address}, up {days} d {hours} h {minutes} min",
        "cluster": found.not_ready
        or f"{found.hosts} host{'s' if found.hosts != 1 else ''}, {cluster}, {memory / 1e9:.1f} GB of memory",
        "jobs": jobs or "none",
        "access": f"{'TLS' if found.tls else 'no TLS'}, {'tokens' if found.needs_token else 'no tokens'}; you are "
        f"{found.caller or 'anybody'}, {found.role}",
        "limits": f"{calls}, {found.max_code_bytes >> 20} MB of code, {packages} with it",
        "kept": f"ended jobs for {found.retention_days:g} days" if found.retention_days else "jobs until deleted",
    }
    for name, text in rows.items():
        sys.stdout.write(f"{name:8} {text}\n")


LIVE = ("QUEUED", "STARTING", "RUNNING", "PAUSING", "PAUSED", "RECOVERING", "CANCELLING")
BAR, ENDED_SHOWN, PRINTED_WIDTH = 8, 5, 140


@app.command(rich_help_panel="Watch")
def top(
    seconds: Annotated[float, Option(min=0.2, max=60.0, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, Option("--once", help="Look once.")] = False,
    server: Server = DEFAULT_SERVER,
    as_json: Json = False,
) -> None:
    """Show what a service does now: live jobs, their speed, findings and what they wait for. Ctrl-C ends it."""
    with client_of(server) as client:
        if as_json:
            sys.stdout.write(json.dumps({"jobs": [job.to_dict() for job in client.list()]}) + "\n")
            return
        from rich.console import Console
        from rich.live import Live

        console = Console()
        if once or not console.is_terminal:
            wide = console if console.is_terminal else Console(width=PRINTED_WIDTH)
            wide.print(_table(list(client.list()), wide.width))
            return
        with Live(_table(list(client.list()), console.width), console=console, screen=True) as live:
            while True:
                time.sleep(seconds)
                live.update(_table(list(client.list()), console.width))


def _table(jobs: Sequence[JobInfo], width: int) -> Table:
    """Live jobs, then some that have ended. width: of the terminal; columns that it has no room for are left out."""
    from rich.table import Table

    live = [job for job in jobs if job.state in LIVE]
    ended = [job for job in jobs if job.state not in LIVE][:ENDED_SHOWN]
    workers = sum(len(job.workers) for job in live)
    title = f"{len(live)} live jobs, {workers} workers, {len(jobs) - len(live)} ended"
    table = Table(title=title, title_justify="left", box=None)
    rows = [_cells(job) for job in [*live, *ended]]
    names = list(_cells(jobs[0])) if jobs else ["job", "state", "progress"]
    shown, room = [], width
    for name in names:
        longest = max([len(name), *(len(row[name]) for row in rows)])
        if name == "reason":
            longest = min(longest, max(room - GAP, len(name)))
        if longest + GAP <= room or name in names[:3]:
            shown.append((name, longest))
            room -= longest + GAP
    for name, longest in shown:
        table.add_column(name, no_wrap=True, width=longest, overflow="ellipsis")
    for job, row in zip([*live, *ended], rows, strict=True):
        table.add_row(*(row[name] for name, _ in shown), style="" if job.state in LIVE else "dim")
    return table


GAP = 2  # between columns


def _cells(job: JobInfo) -> dict[str, str]:
    """What is shown of a job, the most important first."""
    share = job.step / job.total_steps if job.total_steps else 0.0
    done = round(BAR * share)
    return {
        "job": job.job.removeprefix("trainingJobs/"),
        "state": job.state,
        "progress": f"{'━' * done}{'╌' * (BAR - done)} {share:4.0%}",
        "loss": "" if job.loss is None else f"{job.loss:.4g}",
        "workers": str(len(job.workers)),
        "samples/s": f"{job.samples_per_second:,.0f}" if job.samples_per_second else "",
        "findings": ", ".join(dict.fromkeys(finding.rule for finding in job.findings)),
        "reason": job.reason,
    }
