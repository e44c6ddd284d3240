"""Sweeps: many jobs that differ in a few fields, and which of them did best.

Optuna chooses what to try and what to give up; the service runs it. A trial is an ordinary job, so that it is watched,
kept and downloaded like any other.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from steepest.errors import ServiceUnavailableError, SpecError, Violation
from steepest.jobs import JobInfo, Progress
from steepest.spec import spec_from_dict
from steepest.spec_fields import put_field

if TYPE_CHECKING:
    import optuna

    from steepest.client import Client, Job

ARGUMENT = "arg."  # before the name of an argument of the task function
LOSS = "loss"
LOOKS = 20  # at how many steps of a trial it is compared with the others
BEFORE_GIVING_UP = 4  # trials that end before one is given up for being worse than their median
GRID_LIMIT = 10_000


@dataclass(frozen=True, slots=True)
class Choice:
    """The values that a field may have. path: in the spec, or "arg.NAME" for an argument of the task function."""

    path: str
    values: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Range:
    """The numbers that a field may have, `low` and `high` included. is_log: drawn evenly in their logarithms."""

    path: str
    low: float
    high: float
    is_log: bool = False

    @property
    def is_integer(self) -> bool:
        """Whether only whole numbers are meant."""
        return isinstance(self.low, int) and isinstance(self.high, int)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a sweep tries.

    method: "grid" (all combinations), "random", or "tpe" (Optuna's tree-structured Parzen estimator: near what did
    well). trials: how many; the grid has as many as it has combinations. metric: of the evaluation; "loss" is that of
    the evaluation, or of the last training step for a task without one. give_up: cancel a trial that is worse than the
    median of the others at the same step.
    """

    choices: tuple[Choice, ...] = ()
    ranges: tuple[Range, ...] = ()
    method: str = "grid"
    trials: int = 0
    parallel: int = 4
    metric: str = LOSS
    maximize: bool = False
    give_up: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises SpecError."""
        if not self.choices and not self.ranges:
            raise SpecError([Violation("--grid", "there is nothing to vary; give --grid or --range")])
        if self.method == "grid" and self.ranges:
            raise SpecError([Violation("--range", "a grid has no ranges; give --random N or --trials N as well")])
        paths = [choice.path for choice in self.choices] + [part.path for part in self.ranges]
        for path in {path for path in paths if paths.count(path) > 1}:
            raise SpecError([Violation(path, "it is varied twice")])
        if self.method == "grid" and self.size > GRID_LIMIT:
            raise SpecError([Violation("--grid", f"{self.size:,} combinations; allowed: at most {GRID_LIMIT:,}")])

    @property
    def size(self) -> int:
        """How many trials there are."""
        return math.prod(len(choice.values) for choice in self.choices) if self.method == "grid" else self.trials


@dataclass(frozen=True, slots=True)
class Trial:
    """One job of a sweep. value: of the metric; None before the end, and for a job without one."""

    number: int
    job: str
    parameters: dict[str, Any]
    state: str
    value: float | None = None
    given_up: bool = False
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As --json prints it."""
        return {
            "number": self.number,
            "job": self.job,
            "parameters": self.parameters,
            "state": self.state,
            "value": self.value,
            "given_up": self.given_up,
            "error": self.error,
        }


@dataclass(frozen=True, slots=True)
class Outcome:
    """All trials of a sweep, in order of their numbers."""

    name: str
    plan: Plan
    trials: tuple[Trial, ...]

    @property
    def ranked(self) -> list[Trial]:
        """Those that have a value and were not given up, the best first."""
        sign = -1.0 if self.plan.maximize else 1.0
        found = [
            (sign * t.value, t.number, t)
            for t in self.trials
            if t.value is not None and math.isfinite(t.value) and not t.given_up
        ]
        return [trial for _, _, trial in sorted(found)]

    def to_dict(self) -> dict[str, Any]:
        """As --json prints it."""
        best = next(iter(self.ranked), None)
        return {
            "sweep": self.name,
            "metric": self.plan.metric,
            "direction": "maximize" if self.plan.maximize else "minimize",
            "best": None if best is None else best.to_dict(),
            "trials": [trial.to_dict() for trial in self.trials],
        }


def varied(spec: Mapping[str, Any], arguments: Mapping[str, Any], parameters: Mapping[str, Any]) -> tuple[Any, Any]:
    """(spec, arguments) with the parameters of a trial put in. Raises SpecError for a path that leads nowhere."""
    own, given = json.loads(json.dumps(spec)), dict(arguments)
    for path, value in parameters.items():
        if path.startswith(ARGUMENT):
            given[path.removeprefix(ARGUMENT)] = value
            continue
        put_field(own, path, value)
    return own, given


def value_of(info: JobInfo, metric: str) -> float | None:
    """A job's value. "loss" is that of the evaluation, or of the last training step without one."""
    value = info.metrics.get(metric)
    return info.loss if value is None and metric == LOSS else value


class Sweep:
    """Runs a plan. name: trials are named after it, and one that is there already is taken up, not run again.

    task, arguments, spec: of every trial, but for what the plan varies. say: called with a trial whenever it begins or
    ends.
    """

    def __init__(
        self,
        client: Client,
        name: str,
        plan: Plan,
        task: str,
        arguments: Mapping[str, Any],
        spec: Mapping[str, Any],
        say: Callable[[Trial], None] = lambda trial: None,
    ) -> None:
        self._client = client
        self._name = name
        self._plan = plan
        self._same = task, dict(arguments), dict(spec)
        self._say = say
        self._lock = threading.Lock()
        self._trials: dict[int, Trial] = {}
        self._jobs: dict[int, Job] = {}

    def run(self) -> Outcome:
        """Run all trials. Ctrl-C cancels those that run; what has ended stays, and the same sweep goes on from there.

        Raises SpecError for a field that no job may have so, before any has run, and when the first trial is refused.
        """
        plan, (study, space) = self._plan, _study(self._plan)
        self._check()
        pending: set[Future[None]] = set()
        started = 0
        with ThreadPoolExecutor(plan.parallel) as pool:
            try:
                while started < plan.size or pending:
                    while started < plan.size and len(pending) < plan.parallel:
                        asked = study.ask(space)
                        job = self._begin(started, {path: _plain(v, plan, path) for path, v in asked.params.items()})
                        if job is None:
                            study.tell(asked, state=_state("FAIL"))
                        else:
                            pending.add(pool.submit(self._follow, study, asked, job, self._trials[started]))
                        started += 1
                    if pending:
                        done, pending = wait(pending, return_when=FIRST_COMPLETED)
                        for each in done:
                            each.result()
            except BaseException:
                for job in self._jobs.values():
                    if not job.get().has_ended:
                        job.cancel()
                raise
        return self.outcome()

    def outcome(self) -> Outcome:
        """What is known so far."""
        return Outcome(self._name, self._plan, tuple(self._trials[number] for number in sorted(self._trials)))

    def _check(self) -> None:
        """Raises SpecError for a spec that cannot be, of all combinations of the grid and the ends of all ranges."""
        _, arguments, spec = self._same
        ends = [Choice(part.path, (part.low, part.high)) for part in self._plan.ranges]
        checked = [*self._plan.choices, *ends]
        if math.prod(len(choice.values) for choice in checked) > GRID_LIMIT:  # each value beside the first of others
            numbers = [
                {other.path: index * (other is choice) for other in checked}
                for choice in checked
                for index in range(len(choice.values))
            ]
        else:
            numbers = list(combinations(checked))
        for number in numbers:
            parameters = {choice.path: choice.values[number[choice.path]] for choice in checked}
            own, given = varied(spec, arguments, parameters)
            spec_from_dict({**own, "task": {"module": "task", "function": "task", "arguments": given}})

    def _begin(self, number: int, parameters: dict[str, Any]) -> Job | None:
        """Submit a trial; None when it is refused."""
        task, arguments, spec = self._same
        own, given = varied(spec, arguments, parameters)
        content = hashlib.sha256(json.dumps([task, own, given], sort_keys=True).encode()).hexdigest()
        name = f"{self._name}-{number}"
        try:
            job = self._client.submit(task, name=name, request_id=f"{name}-{content[:32]}", arguments=given, **own)
        except SpecError as error:
            if not number:
                raise
            self._note(Trial(number, f"trainingJobs/{name}", parameters, "REFUSED", error=str(error)))
            return None
        self._jobs[number] = job
        self._note(Trial(number, job.name, parameters, "QUEUED"))
        return job

    def _note(self, trial: Trial) -> None:
        with self._lock:
            self._trials[trial.number] = trial
            self._say(trial)

    def _follow(self, study: optuna.Study, asked: optuna.trial.Trial, job: Job, trial: Trial) -> None:
        """Watch a trial to its end, and tell the study."""
        given_up, looked = False, 0
        total = job.get().total_steps
        for update in job.watch():
            if isinstance(update, Progress) and self._plan.give_up and not given_up:
                look = update.step * LOOKS // max(total, 1)
                if look > looked and (value := self._now(job, update)) is not None:
                    looked = look
                    with self._lock:
                        asked.report(value, look)
                        given_up = bool(asked.should_prune())  # NumPy's, sometimes
                    if given_up:
                        job.cancel()
            if isinstance(update, JobInfo):
                value = value_of(update, self._plan.metric)
                with self._lock:
                    if given_up:
                        study.tell(asked, state=_state("PRUNED"))
                    elif update.state == "SUCCEEDED" and value is not None and math.isfinite(value):
                        study.tell(asked, value)
                    else:
                        study.tell(asked, state=_state("FAIL"))
                self._note(replace(trial, state=update.state, value=value, given_up=given_up, error=update.error))
                return
        raise ServiceUnavailableError(f"the watch of {job.name} ended before the job did")

    def _now(self, job: Job, progress: Progress) -> float | None:
        """The value of a trial that runs."""
        found = job.get().metrics.get(self._plan.metric)
        if found is None and self._plan.metric == LOSS:
            return progress.loss if math.isfinite(progress.loss) else math.inf
        return found


def _state(name: str) -> Any:
    from optuna.trial import TrialState

    return TrialState[name]


def _study(plan: Plan) -> tuple[optuna.Study, dict[str, Any]]:
    """A study, and what it chooses from. Values go by their numbers, because Optuna takes only some kinds."""
    try:
        import optuna
    except ModuleNotFoundError:
        raise ServiceUnavailableError("a sweep needs the package 'optuna': pip install 'steepest[sweeps]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space: dict[str, Any] = {
        choice.path: optuna.distributions.CategoricalDistribution(range(len(choice.values))) for choice in plan.choices
    }
    for part in plan.ranges:
        if part.is_integer:
            space[part.path] = optuna.distributions.IntDistribution(int(part.low), int(part.high), log=part.is_log)
        else:
            space[part.path] = optuna.distributions.FloatDistribution(part.low, part.high, log=part.is_log)
    samplers: dict[str, Callable[[], Any]] = {
        "tpe": lambda: optuna.samplers.TPESampler(seed=plan.seed, constant_liar=plan.parallel > 1),
    }
    study = optuna.create_study(
        direction="maximize" if plan.maximize else "minimize",
        sampler=samplers.get(plan.method, lambda: optuna.samplers.RandomSampler(seed=plan.seed))(),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=BEFORE_GIVING_UP, n_warmup_steps=LOOKS // 5),
    )
    if plan.method == "grid":
        for combination in combinations(plan.choices):
            study.enqueue_trial(combination)
    return study, space


def _plain(value: Any, plan: Plan, path: str) -> Any:
    """What a number that Optuna chose stands for."""
    for choice in plan.choices:
        if choice.path == path:
            return choice.values[value]
    return value


def combinations(choices: Sequence[Choice]) -> Iterator[dict[str, int]]:
    """All of a grid, by the numbers of the values; the last field changes first."""
    sizes = [len(choice.values) for choice in choices]
    for number in range(math.prod(sizes)):
        found = {}
        for choice, size in zip(reversed(choices), reversed(sizes), strict=True):
            number, found[choice.path] = divmod(number, size)  # noqa: PLW2901
        yield found


def parse_choice(text: str) -> Choice:
    """PATH=A,B,C: values as JSON where they are, else as text. Raises SpecError."""
    path, equals, values = text.partition("=")
    if not equals or not path or not values:
        raise SpecError([Violation("--grid", f"{text!r} is not of the form PATH=VALUE,VALUE")])
    try:
        found: Iterable[Any] = json.loads(f"[{values}]")
    except json.JSONDecodeError:
        found = values.split(",")
    return Choice(path, tuple(found))


def parse_range(text: str) -> Range:
    """PATH=LOW:HIGH or PATH=LOW:HIGH:log; whole numbers stay whole. Raises SpecError."""
    path, _, values = text.partition("=")
    parts = values.split(":")
    try:
        low, high = (json.loads(part) for part in parts[:2])
        valid = low < high and parts[2:] in ([], ["log"]) and (low > 0 or not parts[2:])
    except (ValueError, TypeError):
        valid = False
    if not valid or not path:
        problem = f"{text!r} is not of the form PATH=LOW:HIGH or PATH=LOW:HIGH:log (0 < LOW), with LOW < HIGH"
        raise SpecError([Violation("--range", problem)])
    return Range(path, low, high, is_log=bool(parts[2:]))
