"""The `steepest` command. Heavy imports wait until a command needs them."""

from __future__ import annotations

import itertools
import json
import signal
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from typer import Argument, Option

from steepest.cli.common import (
    DEFAULT_SERVER,
    JobName,
    Json,
    Server,
    Task,
    app,
    client_of,
    exit_for,
    fail,
    prepare_for_embedded_ray,
    report,
    show_until_end,
)
from steepest.cli.options import JobOptions, explain, submission, takes_job_options

if TYPE_CHECKING:
    from steepest.job import Job


def main() -> None:
    """Entry point: turns errors into one clear message and an exit code."""
    from steepest.errors import SpecError, SteepestError

    warnings.showwarning = _warn
    # A plain kill ends a command as Ctrl-C does: jobs are cancelled, processes stopped.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app()
    except SpecError as error:
        fail(explain(error))
    except SteepestError as error:
        fail(str(error))
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    sys.stderr.write(f"warning: {message}\n")


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


@app.command(rich_help_panel="Train")
@takes_job_options
def train(
    task: Task,
    options: JobOptions,
    output: Annotated[
        Path | None, Option(help="Leave model, optimizer state, manifest and history in this directory.")
    ] = None,
    plan: Annotated[
        bool, Option("--plan", help="Only show what the job would take, memory and network, or why it cannot fit.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train here: start Ray and the service in this process tree, submit, show progress, wait, stop."""
    prepare_for_embedded_ray()
    from steepest.cli.train import plan as plan_job
    from steepest.cli.train import train_embedded

    request = submission(task, options)
    if plan:
        needed = plan_job(request)
        if as_json:
            sys.stdout.write(json.dumps(needed.to_dict()) + "\n")
        return
    info = train_embedded(request, output)
    if output is not None and not as_json:
        sys.stderr.write(f"artifacts: {output}\n")
    report(info, as_json=as_json, output=None if output is None else str(output))
    exit_for(info)


@app.command(rich_help_panel="Train")
@takes_job_options
def check(task: Task, options: JobOptions, as_json: Json = False) -> None:
    """Rehearse one step of a task; say what was understood of it, and what would be refused or warned of."""
    from steepest.cli.train import check as check_task
    from steepest.cli.train import show_check

    checked = check_task(submission(task, options))
    if as_json:
        sys.stdout.write(json.dumps(checked) + "\n")
    else:
        show_check(checked)


@app.command(rich_help_panel="Train")
@takes_job_options
def submit(
    task: Task,
    options: JobOptions,
    watch: Annotated[bool, Option("--watch", help="Show progress until the job ends.")] = False,
    server: Server = DEFAULT_SERVER,
    as_json: Json = False,
) -> None:
    """Submit a job to a service and print its name."""
    from steepest.submission import check_submission

    request = submission(task, options)
    check_submission(request.task, request.arguments, request.spec)
    with client_of(server) as client:
        job = client.submit(request.task, name=request.name, arguments=request.arguments, **request.spec)
        _submitted(job, watch=watch, as_json=as_json)


def _submitted(job: Job, *, watch: bool, as_json: bool) -> None:
    """Say its name, and show its progress if that is wanted."""
    if not as_json:
        sys.stdout.write(job.name + "\n")
        sys.stdout.flush()
    info = show_until_end(job) if watch else job.get()
    if as_json:
        report(info, as_json=True)
    if watch:
        exit_for(info)


@app.command(rich_help_panel="Train")
def replay(
    job: JobName,
    name: Annotated[str, Option(metavar="NAME", help="Id of the new job; chosen by the service when not given.")] = "",
    workers: Annotated[
        int | None, Option(min=1, help="Number of workers, if it is to be another; never changes the result.")
    ] = None,
    watch: Annotated[bool, Option("--watch", help="Show progress until the job ends.")] = False,
    server: Server = DEFAULT_SERVER,
    as_json: Json = False,
) -> None:
    """Submit a job again as its record says: what rollbacks changed is changed from the start, with the same bits."""
    with client_of(server) as client:
        _submitted(client.replay(job, name=name, workers=workers), watch=watch, as_json=as_json)


@app.command("list", rich_help_panel="Watch")
def list_jobs(
    filter_: Annotated[
        str,
        Option(
            "--filter",
            metavar="FILTER",
            help="Only jobs for which this holds: state, owner, priority, create_time, name or labels.KEY compared "
            "with a value, such as 'state = RUNNING AND priority >= 10'.",
        ),
    ] = "",
    order_by: Annotated[
        str, Option(metavar="FIELDS", help="Such as 'priority desc, name' (default: the newest first).")
    ] = "",
    limit: Annotated[int | None, Option(min=1, help="At most so many.")] = None,
    server: Server = DEFAULT_SERVER,
    as_json: Json = False,
) -> None:
    """List jobs, the newest first."""
    with client_of(server) as client:
        jobs = list(itertools.islice(client.list(filter_, order_by), limit))
    if as_json:
        sys.stdout.write(json.dumps({"jobs": [job.to_dict() for job in jobs]}) + "\n")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None)
    longest = max((len(job.job) for job in jobs), default=0)
    table.add_column("job", no_wrap=True, min_width=longest)  # a name that is cut is no use
    for name in ("state", "step", "loss", "workers", "reason"):
        table.add_column(name)
    for job in jobs:
        loss = "" if job.loss is None else f"{job.loss:.4g}"
        steps = f"{job.step}/{job.total_steps}"
        table.add_row(job.job, job.state, steps, loss, str(job.spec.placement.workers), job.reason)
    Console().print(table)


@app.command(rich_help_panel="Watch")
def get(job: JobName, server: Server = DEFAULT_SERVER, as_json: Json = False) -> None:
    """Show a job as it is now."""
    with client_of(server) as client:
        info = client.job(job).get()
    report(info, as_json=as_json)
    exit_for(info)


@app.command(rich_help_panel="Watch")
def watch(job: JobName, server: Server = DEFAULT_SERVER, as_json: Json = False) -> None:
    """Show events and progress of a job until it ends. With --json, one object a line."""
    with client_of(server) as client:
        if not as_json:
            info = show_until_end(client.job(job))
            report(info, as_json=False)
            exit_for(info)
        from dataclasses import asdict

        from steepest.jobs import Event, JobInfo

        for update in client.job(job).watch():
            if isinstance(update, JobInfo):
                report(update, as_json=True)
                exit_for(update)
            kind = "event" if isinstance(update, Event) else "progress"
            sys.stdout.write(json.dumps({kind: asdict(update)}) + "\n")
            sys.stdout.flush()


@app.command(rich_help_panel="Watch")
def logs(
    job: JobName,
    follow: Annotated[bool, Option("--follow", "-f", help="Go on until the job ends.")] = False,
    server: Server = DEFAULT_SERVER,
    as_json: Json = False,
) -> None:
    """Show what the task's code has printed, with the worker that printed it. With --json, one object a line."""
    from dataclasses import asdict

    from steepest.cli.console import log_line

    with client_of(server) as client:
        for line in client.job(job).logs(follow=follow):
            sys.stdout.write((json.dumps(asdict(line)) if as_json else log_line(line)) + "\n")
            sys.stdout.flush()


@app.command(rich_help_panel="Watch")
def wait(job: JobName, server: Server = DEFAULT_SERVER, as_json: Json = False) -> None:
    """Wait until a job ends; the exit code says how."""
    from steepest.jobs import JobInfo

    with client_of(server) as client:
        info = next(update for update in client.job(job).watch() if isinstance(update, JobInfo))
    report(info, as_json=as_json)
    exit_for(info)


def _steer(job: str, server: str, verb: str, *, as_json: bool, **arguments: Any) -> None:
    with client_of(server) as client:
        info = getattr(client.job(job), verb)(**arguments)
    if as_json:
        report(info, as_json=True)
    else:
        sys.stdout.write(f"{info.job} {info.state}\n")


@app.command(rich_help_panel="Steer")
def cancel(job: JobName, server: Server = DEFAULT_SERVER, as_json: Json = False) -> None:
    """Stop a job at its next step boundary, keeping a checkpoint."""
    _steer(job, server, "cancel", as_json=as_json)


@app.command(rich_help_panel="Steer")
def pause(job: JobName, server: Server = DEFAULT_SERVER, as_json: Json = False) -> None:
    """Hold a running job at its next step boundary."""
    _steer(job, server, "pause", as_json=as_json)


@app.command(rich_help_panel="Steer")
def resume(job: JobName, server: Server = DEFAULT_SERVER, as_json: Json = False) -> None:
    """Let a paused job go on."""
    _steer(job, server, "resume", as_json=as_json)


@app.command(rich_help_panel="Steer")
def scale(
    job: JobName,
    workers: Annotated[int, Argument(metavar="N", help="New number of workers.")],
    server: Server = DEFAULT_SERVER,
    as_json: Json = False,
) -> None:
    """Change the number of workers of a live job. Never changes its result."""
    _steer(job, server, "scale", as_json=as_json, workers=workers)


@app.command(rich_help_panel="Steer", context_settings={"ignore_unknown_options": True})
def priority(
    job: JobName,
    value: Annotated[int, Argument(metavar="N", help="-1000 to 1000; jobs begin with 0.")],
    server: Server = DEFAULT_SERVER,
    as_json: Json = False,
) -> None:
    """Have a job wait before those of less priority.

    Running jobs are left alone, but for elastic ones, and where the service has steepest serve --preemption.
    """
    _steer(job, server, "set_priority", as_json=as_json, priority=value)


@app.command(rich_help_panel="What is kept")
def download(
    job: JobName,
    output: Annotated[Path, Option(help="Directory to write to.")],
    step: Annotated[int | None, Option(min=0, help="Of this step (default: the newest).")] = None,
    best: Annotated[bool, Option("--best", help="Of the best evaluation; see best.metric in the spec.")] = False,
    server: Server = DEFAULT_SERVER,
) -> None:
    """Fetch one of a job's checkpoints: model.safetensors, optimizer.safetensors, manifest.json."""
    if step is not None and best:
        fail("--step and --best are both given; allowed: one of the two")
    with client_of(server) as client:
        client.job(job).download(output, step=step, best=best)
    sys.stdout.write(f"{output}\n")
