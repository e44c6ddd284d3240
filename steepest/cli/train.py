"""`steepest train`: the whole service, for one job, in this process tree."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steepest.cli.console import show, show_plan
from steepest.cli.options import Submission
from steepest.client import Client
from steepest.embedded import describe_task, plan_job, running_service
from steepest.errors import SpecError, Violation
from steepest.jobs import JobInfo
from steepest.records import records_of, write_parquet
from steepest.submission import check_submission

if TYPE_CHECKING:
    from ps.job.footprint import Footprint
    from services.service import Service
    from steepest.client import Job

LONG = 1000  # epochs of a task that is checked without a length, which leaves room for any warm-up


def train_embedded(request: Submission, output: Path | None) -> JobInfo:
    """Run one job to its end. Raises SpecError before anything is started where it can be told."""
    _, spec = check_submission(request.task, request.arguments, request.spec)
    placement = spec.placement
    if output is not None:
        _check_output(output)
    with embedded_client(placement.workers * placement.threads_per_worker) as (client, service):
        job = client.submit(request.task, name=request.name, arguments=request.arguments, **request.spec)
        page = job.name.replace("trainingJobs", f"http://127.0.0.1:{service.http_port}/jobs")
        sys.stderr.write(f"watch it at {page}\n")
        service.cluster.wait_ready()
        info = _follow(job)
        if output is not None and info.parameters_sha256:
            job.download(output)
            write_history(job, output / "history.parquet")
    return info


@contextlib.contextmanager
def embedded_client(num_cpus: int) -> Iterator[tuple[Client, Service]]:
    """A service of this process on ports of its own, and a client of it; it keeps nothing."""
    secrets = os.environ.get("STEEPEST_SECRETS_DIR")
    settings = {"grpc_port": 0, "http_port": 0, "num_cpus": num_cpus}
    with (
        tempfile.TemporaryDirectory(prefix="steepest-", ignore_cleanup_errors=True) as data,
        running_service(Path(data), **settings, secrets_directory=Path(secrets) if secrets else None) as service,
        Client(f"127.0.0.1:{service.grpc_port}", token="", tls_ca="") as client,
    ):
        yield client, service


def plan(request: Submission) -> Footprint:
    """What a job would take on this machine. Raises SpecError for one that cannot be, or cannot fit."""
    bundle, spec = check_submission(request.task, request.arguments, request.spec)
    needed, available, problem = plan_job(bundle, spec)
    show_plan(needed, available)
    if problem:
        raise SpecError([Violation("placement", problem)])
    return needed


def check(request: Submission) -> dict[str, Any]:
    """What a rehearsal finds of a task. Raises SpecError for one that a service would refuse."""
    length = {} if {"steps", "epochs"} & request.spec.keys() else {"epochs": LONG}
    bundle, spec = check_submission(request.task, request.arguments, {**request.spec, **length})
    spec, found = describe_task(bundle, spec)
    trainable = sum(p.numel for p in found.model.parameters)
    return {
        "task": request.task,
        "model": found.model_class,
        "parameters": trainable + sum(c.numel for c in found.model.constants),
        "trainable": trainable,
        "buffers": sum(b.numel for b in found.model.buffers),
        "batch": found.batch,
        "loss": found.loss,
        "weight": found.weight,
        "samples": found.num_samples,
        "evaluation_samples": found.num_evaluation_samples,
        "metrics": list(found.metric_names),
        "global_batch": spec.data.global_batch,
        "micro_batch": spec.data.micro_batch_size,
        "micro_batches": spec.data.num_micro_batches,
        "micro_batch_price": round(found.price, 2) or None,
        "micro_batch_bytes": found.peak_bytes or None,
        "checkpoint_activations": spec.memory.checkpoint_activations,
        "evaluates_with_gradients": found.evaluates_with_gradients,
        "warnings": [{"code": code, "message": message} for code, message in found.warnings],
    }


def show_check(checked: Mapping[str, Any]) -> None:
    """What was understood of a task, for people."""
    frozen = checked["parameters"] - checked["trainable"]
    evaluation = f", {checked['evaluation_samples']:,} to evaluate" if checked["evaluation_samples"] else ""
    price = checked["micro_batch_price"]
    rows = {
        "model": f"{checked['model']}, {checked['trainable']:,} parameters are trained, {frozen:,} are frozen",
        "data": f"{checked['samples']:,} samples to train{evaluation}",
        "batch": checked["batch"],
        "loss": f"{checked['loss']}; weight {checked['weight']}",
        "step": f"{checked['global_batch']} samples in {checked['micro_batches']} micro-batches of "
        f"{checked['micro_batch']}" + (f", {price:g} times the time of one" if price else ""),
        "metrics": ", ".join(checked["metrics"]) or "none",
    }
    if checked["micro_batch_bytes"]:
        rows["memory"] = f"{checked['micro_batch_bytes'] / 1e6:,.1f} MB at the peak of a micro-batch's pass"
        if checked["checkpoint_activations"]:
            rows["memory"] += f", with memory.checkpoint_activations = {checked['checkpoint_activations']}"
    for name, text in rows.items():
        sys.stdout.write(f"{name:8} {text}\n")
    for warning in checked["warnings"]:
        sys.stdout.write(f"warning  {warning['message']} ({warning['code']})\n")
    if not checked["warnings"]:
        sys.stdout.write("nothing to warn of\n")


def _follow(job: Job) -> JobInfo:
    """Show progress to the end. The first Ctrl-C cancels the job and waits for it, the second leaves at once."""
    total = job.get().total_steps
    try:
        end = show(job.name, total, job.watch(logs=True))
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stderr.write("cancelling; press Ctrl-C again to leave at once\n")
        if not job.get().has_ended:
            job.cancel()
        end = show(job.name, total, job.watch(logs=True))
    return end or job.get()


def write_history(job: Job, path: Path) -> None:
    """All step records as a Parquet file, and those of the parameters' signals beside it: see steepest.records."""
    write_parquet(records_of(job.history(signals=True)), path)


def _check_output(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / ".steepest-write-test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SpecError([Violation("--output", f"cannot write to {output}: {error.strerror}")]) from None
