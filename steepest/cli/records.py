"""Commands about what is kept of jobs: events, checkpoints, records, pictures, reports."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from steepest.cli.common import DEFAULT_SERVER, EXIT_JOB, JobName, Json, Server, app, client_of, fail

if TYPE_CHECKING:
    from collections.abc import Sequence

    from steepest.jobs import Finding
    from steepest.records import Records

JobOrDirectory = Annotated[
    str, Argument(metavar="JOB", help="trainingJobs/ID, only the ID, or a directory that train --output has left.")
]


@app.command(rich_help_panel="Watch")
def events(job: JobName, server: Server = DEFAULT_SERVER, as_json: Json = False) -> None:
    """Show what has happened to a job."""
    from dataclasses import asdict

    with client_of(server) as client:
        found = client.job(job).events()
    if as_json:
        sys.stdout.write(json.dumps({"events": [asdict(event) for event in found]}) + "\n")
        return
    for event in found:
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.time))
        sys.stdout.write(f"{moment}  {event.state:10} {event.reason}\n")


@app.command(rich_help_panel="What is kept")
def checkpoints(job: JobName, server: Server = DEFAULT_SERVER, as_json: Json = False) -> None:
    """List a job's checkpoints, newest first; the files of each are verified."""
    from dataclasses import asdict

    with client_of(server) as client:
        found = client.job(job).checkpoints()
    if as_json:
        sys.stdout.write(json.dumps({"checkpoints": [asdict(checkpoint) for checkpoint in found]}) + "\n")
        return
    for checkpoint in found:
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(checkpoint.time))
        notes = [note for note in ("best" if checkpoint.best else "", checkpoint.problem) if note]
        state = checkpoint.state_sha256[:12] or "-"
        size = f"{checkpoint.size_bytes / 1e6:.2f} MB"
        sys.stdout.write(f"step {checkpoint.step:<10} {size:>12}  {moment}  {state}  {'; '.join(notes)}\n")
    if not found:
        sys.stderr.write(f"{job} has no checkpoint yet\n")


@app.command(rich_help_panel="What is kept")
def verify(
    directory: Annotated[Path, Argument(metavar="DIR", help="What train --output or download has left.")],
    as_json: Json = False,
) -> None:
    """Compare a checkpoint's files with the hashes in its manifest; exit code 1 when they differ."""
    from steepest.verify import verify_checkpoint

    found = verify_checkpoint(directory)
    if as_json:
        sys.stdout.write(json.dumps({"directory": str(directory), **found}) + "\n")
    elif found["valid"]:
        sys.stdout.write(f"{directory}: step {found['step']}, {found['files']} files are as they were written\n")
    for problem in found["problems"]:
        sys.stderr.write(f"{problem}\n")
    if not found["valid"]:
        raise typer.Exit(EXIT_JOB)


@app.command(rich_help_panel="What is kept")
def delete(job: JobName, server: Server = DEFAULT_SERVER, as_json: Json = False) -> None:
    """Delete a job that has ended, with its checkpoints, records and log."""
    with client_of(server) as client:
        handle = client.job(job)
        handle.delete()
    sys.stdout.write(json.dumps({"deleted": handle.name}) + "\n" if as_json else f"{handle.name} deleted\n")


def _read(
    job: str, server: str, *, signals: bool = False, histograms: bool = False
) -> tuple[str, Records, Sequence[Finding]]:
    """(title, records, findings) of a job or a directory."""
    from steepest.records import read_directory, records_of

    if Path(job).is_dir():
        return Path(job).resolve().name, read_directory(Path(job)), ()
    with client_of(server) as client:
        handle = client.job(job)
        info = handle.get()
        counted = handle.histograms() if histograms else ()
        records = records_of(handle.history(signals=signals), handle.evaluations(), counted)
        return info.job, records, info.findings


@app.command(rich_help_panel="What is kept")
def plot(
    job: JobOrDirectory,
    output: Annotated[Path, Option(help="File to write: .png, .svg or .pdf.")],
    server: Server = DEFAULT_SERVER,
) -> None:
    """Draw loss, gradient norms, clip rate and throughput of a job."""
    if output.suffix.lower() not in (".png", ".svg", ".pdf"):
        fail(f"--output {output}: {output.suffix or 'no suffix'} is no kind of picture; allowed: .png, .svg, .pdf")
    from steepest.charts import training_figure

    title, records, findings = _read(job, server)
    figure = training_figure(records, title, findings)
    _write(output, lambda: figure.savefig(output))


@app.command(rich_help_panel="What is kept")
def report(
    job: JobName,
    output: Annotated[Path, Option(help="HTML file to write.")],
    server: Server = DEFAULT_SERVER,
) -> None:
    """Write one HTML file with a job's curves, layers, findings, events and spec."""
    from importlib.metadata import version

    from steepest.records import records_of
    from steepest.report import report_html

    with client_of(server) as client:
        handle = client.job(job)
        info = handle.get()
        text = report_html(
            info, records_of(handle.history(), handle.evaluations()), handle.events(), version("steepest")
        )
    _write(output, lambda: output.write_text(text, encoding="utf-8"))


@app.command(rich_help_panel="What is kept")
def trace(
    job: JobOrDirectory,
    output: Annotated[Path, Option(help="JSON file to write, for https://ui.perfetto.dev or chrome://tracing.")],
    steps: Annotated[str, Option(help="FIRST:LAST, as 100:200, or 100: and :200.")] = ":",
    server: Server = DEFAULT_SERVER,
) -> None:
    """Write where the time of a job's steps went as a trace."""
    found = re.fullmatch(r"(\d*):(\d*)", steps)
    if found is None:
        fail(f"--steps {steps!r}: must be FIRST:LAST, as 100:200, either of which may be left out")
    from steepest.trace import write_trace

    title, records, _ = _read(job, server)
    chosen = records.between(int(found[1] or 0), int(found[2]) if found[2] else None)
    if not len(chosen):
        fail(f"--steps {steps}: the job has no record of such a step")
    _write(output, lambda: write_trace(chosen, output, title))


TRACKERS = ("tensorboard", "mlflow", "wandb")
FORMATS = ("csv", "parquet", *TRACKERS)


@app.command(rich_help_panel="What is kept")
def export(
    job: JobOrDirectory,
    output: Annotated[Path, Option(help="File to write; for tensorboard, mlflow and wandb, a directory.")],
    to: Annotated[str, Option("--to", help="csv, parquet, tensorboard, mlflow or wandb; else by the suffix.")] = "",
    following: Annotated[
        bool, Option("--follow", help="Go on until the job ends; for tensorboard, mlflow and wandb.")
    ] = False,
    server: Server = DEFAULT_SERVER,
) -> None:
    """Write the records of a job's steps for other programs, at once or while it runs."""
    chosen = to or output.suffix.removeprefix(".").lower()
    if chosen not in FORMATS:
        fail(f"--to {chosen or 'nothing'}: cannot be written; allowed: {', '.join(FORMATS)}")
    if following and chosen not in TRACKERS:
        fail(f"--follow: {chosen} is written at once; allowed: --to {', '.join(TRACKERS)}")
    if following:
        _follow(job, output, chosen, server)
        return
    from steepest import export as trackers
    from steepest.records import write_csv, write_parquet

    title, records, _ = _read(job, server, signals=chosen == "parquet", histograms=chosen == "tensorboard")

    def track() -> None:
        with getattr(trackers, chosen)(output, title.removeprefix("trainingJobs/")) as log:
            log(records)

    files = {"csv": write_csv, "parquet": write_parquet}
    _write(output, (lambda: files[chosen](records, output)) if chosen in files else track)


def _follow(job: str, output: Path, chosen: str, server: str) -> None:
    from steepest import export as trackers

    with client_of(server) as client:
        handle = client.job(job)
        name = handle.get().job.removeprefix("trainingJobs/")  # before anything is written
        state = ""

        def track() -> None:
            nonlocal state
            with getattr(trackers, chosen)(output, name) as log:
                state = trackers.follow(handle, log)

        _write(output, track)
    if state != "SUCCEEDED":
        raise typer.Exit(EXIT_JOB)


def _write(output: Path, write: Any) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write()
    except OSError as error:
        fail(f"--output {output}: cannot be written: {error.strerror or error}")
    sys.stdout.write(f"{output}\n")
