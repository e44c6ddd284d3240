"""Commands about derivatives: gradient checks and curvature."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from steepest.cli.common import (
    DEFAULT_SERVER,
    EXIT_JOB,
    JobName,
    Json,
    Server,
    Task,
    app,
    client_of,
    fail,
    prepare_for_embedded_ray,
)
from steepest.cli.options import JobOptions, submission, takes_job_options

if TYPE_CHECKING:
    from steepest.analyses import Curvature, GradientCheck
    from steepest.client import Client

Processes = Annotated[int, Option(min=1, max=64, help="Processes that compute, on the hosts of the cluster.")]
METHODS = ("own", "forward", "finite")
SHOWN = 20  # parameters in a table


@app.command("check-gradients", rich_help_panel="Study")
@takes_job_options
def check_gradients(
    task: Task,
    options: JobOptions,
    got: Annotated[str, Option(help="What is checked: own (as training computes it), forward or finite.")] = "own",
    expected: Annotated[str, Option(help="What it is compared with: own, forward or finite.")] = "finite",
    tolerance: Annotated[float, Option(min=1e-12, max=1.0, help="Largest relative error that passes.")] = 1e-6,
    processes: Processes = 1,
    server: Annotated[
        str | None, Option("--server", help="A service on whose cluster to compute; else this machine does.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare a task's gradient with central differences, in float64, entry by entry.

    own is what training uses: backpropagation, or the gradient that an AnalyticTask derived by hand. forward is
    forward-mode differentiation. Exit code 1 when they disagree, 2 when the task is refused.
    """
    for name, method in (("--got", got), ("--expected", expected)):
        if method not in METHODS:
            fail(f"{name} {method}: there is no such way to a gradient; allowed: {', '.join(METHODS)}")
    if got == expected:
        fail(f"--got {got} --expected {expected}: these are one and the same; choose two")
    request = submission(task, options)
    with _embedded(processes) if server is None else client_of(server) as client:
        found = client.check_gradients(
            request.task,
            got=got,
            expected=expected,
            tolerance=tolerance,
            processes=processes,
            say=_progress(),
            arguments=request.arguments,
            **request.spec,
        )
    if as_json:
        sys.stdout.write(json.dumps({"task": task, "expected": expected, "got": got, **found.to_dict()}) + "\n")
    else:
        _show_check(found, expected, got)
    if not found.passed:
        raise typer.Exit(EXIT_JOB)


@contextlib.contextmanager
def _embedded(processes: int) -> Iterator[Client]:
    """A service of this process, with room for an analysis."""
    prepare_for_embedded_ray()
    from steepest.cli.train import embedded_client

    with embedded_client(processes) as (client, _):
        yield client


def _progress() -> Callable[[str], None]:
    """Shows what is being done, on a terminal."""
    if not sys.stderr.isatty():
        return lambda text: None

    def say(text: str) -> None:
        sys.stderr.write(f"\r\x1b[2K{text}\r")
        sys.stderr.flush()

    return say


def _show_check(found: GradientCheck, expected: str, got: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None)
    table.add_column("parameter", no_wrap=True)
    table.add_column("largest relative error", justify="right")
    errors = sorted(found.parameters.items(), key=lambda item: -item[1])
    for name, error in errors[:SHOWN]:
        style = "red" if error > found.tolerance else ""
        table.add_row(name, f"{error:.2e}", style=style)
    console = Console()
    console.print(table)
    if len(errors) > SHOWN:
        console.print(f"and {len(errors) - SHOWN} parameters with less")
    worst = found.worst
    if worst is not None:
        place = ", ".join(map(str, worst.index))
        console.print(
            f"worst: {worst.parameter}[{place}]: {expected} {worst.expected:.10g}, {got} {worst.got:.10g}",
            highlight=False,
            markup=False,
        )
    verdict = "they agree" if found.passed else "they do NOT agree"
    console.print(
        f"{verdict}: largest relative error {found.max_relative_error:.2e}, allowed {found.tolerance:g}; "
        f"{found.entries_compared:,} of {found.entries:,} derivatives compared one by one"
        + (", all of them along random directions" if found.entries_compared < found.entries else "")
        + (f"; {found.kinks:,} at kinks, where any value between the one-sided ones is right" if found.kinks else ""),
        highlight=False,
    )


@app.command(rich_help_panel="Study")
def curvature(
    job: JobName,
    step: Annotated[
        int | None, Option("--step", "--checkpoint", min=0, help="Of this checkpoint (default: the newest).")
    ] = None,
    top: Annotated[int, Option(min=1, max=100, help="How many of the largest eigenvalues.")] = 5,
    samples: Annotated[
        int, Option(min=0, help="Of the training data, whose mean loss is looked at; 0: up to 2,048.")
    ] = 0,
    processes: Processes = 1,
    matrix: Annotated[str, Option(help="hessian, or gauss_newton, which is never negative.")] = "hessian",
    jacobian: Annotated[
        int, Option(min=0, help="Also the singular values of the Jacobian of the outputs for so many samples.")
    ] = 0,
    server: Server = DEFAULT_SERVER,
    as_json: Json = False,
) -> None:
    """Measure the curvature of a job's loss: top eigenvalues, trace, spectral density, kind of point.

    In float64, with dropout off and batch statistics constant, at a checkpoint. The result is the same bits with any
    number of processes.
    """
    with client_of(server) as client:
        handle = client.job(job)
        found = handle.curvature(
            step=step, top=top, samples=samples, processes=processes, matrix=matrix, jacobian=jacobian, say=_progress()
        )
    if as_json:
        sys.stdout.write(json.dumps({"job": handle.name, **found.to_dict()}) + "\n")
    else:
        _show_curvature(found)


def _show_curvature(found: Curvature) -> None:
    lines = [
        f"at step               {found.step}, {found.samples:,} samples, {found.parameters:,} parameters",
        f"matrix                {found.matrix}",
        f"loss, gradient norm   {found.loss:.6g}, {found.gradient_norm:.4g}",
        f"largest eigenvalues   {', '.join(f'{value:.6g}' for value in found.eigenvalues)}",
        f"smallest eigenvalue   {found.smallest_eigenvalue:.6g}",
        f"trace                 {found.trace:.6g} ± {found.trace_error:.2g}",
        f"kind of point         {found.point}",
        f"spectral density      {_bars(found.density_values)}",
        f"                      from {found.density_grid[0]:.4g} to {found.density_grid[-1]:.4g}, log scale",
    ]
    singular = found.jacobian_singular_values
    if singular:
        lines.append(f"Jacobian of outputs   {len(singular)} singular values, {singular[0]:.4g} to {singular[-1]:.4g}")
    sys.stdout.write("\n".join(lines) + "\n")


def _bars(values: tuple[float, ...], width: int = 50) -> str:
    """Numbers as bars of different heights, on a log scale."""
    import math
    from itertools import pairwise

    starts = [len(values) * i // width for i in range(width + 1)]
    heights = [max(values[low:high], default=0.0) for low, high in pairwise(starts)]
    highest = max(heights)
    if not highest > 0:
        return " " * width
    decades = [6.0 + math.log10(height / highest) if height > 0 else 0.0 for height in heights]
    return "".join(" ▁▂▃▄▅▆▇█"[max(0, min(8, round(8 * decade / 6)))] for decade in decades)
