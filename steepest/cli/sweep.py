"""`steepest sweep`: many jobs that differ in a few fields."""

from __future__ import annotations

import json
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from steepest.cli.common import DEFAULT_SERVER, EXIT_JOB, EXIT_OK, Json, Server, Task, app, client_of, fail
from steepest.cli.options import JobOptions, submission, takes_job_options

if TYPE_CHECKING:
    from steepest.sweep import Outcome, Plan, Trial

_SWEEP = "Sweep"


@app.command(rich_help_panel="Train")
@takes_job_options
def sweep(
    task: Task,
    options: JobOptions,
    grid: Annotated[
        list[str],
        Option(
            metavar="PATH=A,B,C",
            help="Values of a field, such as optimizer.lr=1e-3,1e-2, or of an argument of the task function, such as "
            "arg.hidden=32,64; repeatable. All combinations are tried.",
            rich_help_panel=_SWEEP,
        ),
    ] = [],  # noqa: B006  # Typer copies it
    range_: Annotated[
        list[str],
        Option(
            "--range",
            metavar="PATH=LOW:HIGH[:log]",
            help="Numbers between two, for --random and --trials, such as optimizer.lr=1e-4:1e-1:log; repeatable.",
            rich_help_panel=_SWEEP,
        ),
    ] = [],  # noqa: B006
    random: Annotated[
        int | None, Option(min=1, metavar="N", help="Try N combinations drawn at random.", rich_help_panel=_SWEEP)
    ] = None,
    trials: Annotated[
        int | None,
        Option(min=1, metavar="N", help="Try N that Optuna chooses near what did well.", rich_help_panel=_SWEEP),
    ] = None,
    parallel: Annotated[int, Option(min=1, max=64, help="Trials at a time.", rich_help_panel=_SWEEP)] = 4,
    metric: Annotated[
        str,
        Option(
            help="What trials are compared by in their evaluations; loss: else of the last step.",
            rich_help_panel=_SWEEP,
        ),
    ] = "loss",
    maximize: Annotated[
        bool, Option("--maximize", help="More of the metric is better.", rich_help_panel=_SWEEP)
    ] = False,
    give_up: Annotated[
        bool,
        Option(
            "--give-up",
            help="Cancel a trial that is worse than the median of the others at the same step.",
            rich_help_panel=_SWEEP,
        ),
    ] = False,
    output: Annotated[
        Path | None, Option(help="Also write the result to this file, as JSON.", rich_help_panel=_SWEEP)
    ] = None,
    server: Server = DEFAULT_SERVER,
    as_json: Json = False,
) -> None:
    """Try many values of a few fields; each trial is a job. Run it again with the same --name to go on with it.

    The whole grid:      steepest sweep train.py:digits --epochs 5 --grid optimizer.lr=1e-3,1e-2 --grid arg.hidden=32,64

    Twenty at random:    steepest sweep job.toml --range optimizer.lr=1e-4:1e-1:log --random 20
    """
    from steepest.sweep import Plan, Sweep, parse_choice, parse_range

    if random is not None and trials is not None:
        fail("--random and --trials are both given; allowed: one of the two")
    method = "random" if random is not None else "tpe" if trials is not None else "grid"
    plan = Plan(
        choices=tuple(map(parse_choice, grid)),
        ranges=tuple(map(parse_range, range_)),
        method=method,
        trials=random or trials or 0,
        parallel=parallel,
        metric=metric,
        maximize=maximize,
        give_up=give_up,
    )
    request = submission(task, options)
    name = request.name or f"sweep-{uuid.uuid4().hex[:6]}"
    with client_of(server) as client:
        running = Sweep(client, name, plan, request.task, request.arguments, request.spec, _Teller(plan).tell)
        sys.stderr.write(f"{name}: {plan.size} trials, {parallel} at a time\n")
        try:
            outcome = running.run()
        except KeyboardInterrupt:
            _show(running.outcome())
            sys.stderr.write(f"interrupted; what ran is cancelled. --name {name} goes on with the rest\n")
            raise
    if output is not None:
        output.write_text(json.dumps(outcome.to_dict(), indent=2) + "\n")
    if as_json:
        sys.stdout.write(json.dumps(outcome.to_dict()) + "\n")
    else:
        _show(outcome)
    raise typer.Exit(EXIT_OK if outcome.ranked else EXIT_JOB)


class _Teller:
    """A line for each trial that begins or ends."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._best: float | None = None

    def tell(self, trial: Trial) -> None:
        """Say it on stderr."""
        if trial.state == "QUEUED":
            text = "submitted"
        elif trial.given_up:
            text = "given up: worse than the median"
        elif trial.value is None:
            text = f"{trial.state}: {trial.error or 'no ' + self._plan.metric}".splitlines()[0]
        else:
            text = f"{trial.state} {self._plan.metric} {trial.value:.6g}"
            best = self._best is None or (trial.value > self._best if self._plan.maximize else trial.value < self._best)
            if best and trial.state == "SUCCEEDED":
                self._best = trial.value
                text += "  the best so far"
        sys.stderr.write(f"{trial.job}  {_words(trial.parameters)}  {text}\n")
        sys.stderr.flush()


def _words(parameters: dict[str, Any]) -> str:
    return " ".join(f"{path}={_text(value)}" for path, value in parameters.items())


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _show(outcome: Outcome) -> None:
    """All trials, the best first."""
    from rich.console import Console
    from rich.table import Table

    ranked = outcome.ranked
    rest = [trial for trial in outcome.trials if trial not in ranked]
    table = Table(box=None)
    longest = max((len(trial.job) for trial in outcome.trials), default=0)
    table.add_column("job", no_wrap=True, min_width=longest)
    for path in dict.fromkeys(path for trial in outcome.trials for path in trial.parameters):
        table.add_column(path)
    table.add_column(outcome.plan.metric, justify="right")
    table.add_column("state")
    for trial in [*ranked, *rest]:
        value = "" if trial.value is None else f"{trial.value:.6g}"
        state = "given up" if trial.given_up else trial.state
        shown = map(_text, trial.parameters.values())
        table.add_row(trial.job, *shown, value, state, style="bold" if ranked[:1] == [trial] else "")
    Console().print(table)
