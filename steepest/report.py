"""A job on paper: one HTML file with its numbers, pictures, findings, events and spec, and nothing from outside."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from steepest.bottleneck import COLUMNS, RECENT_STEPS, bottleneck
from steepest.charts import as_svg, layers_figure, time_figure, training_figure
from steepest.errors import SteepestError
from steepest.jobs import Event, JobInfo
from steepest.records import Records


def report_html(info: JobInfo, records: Records, events: Sequence[Event], version: str) -> str:
    """The file's text. Raises SteepestError when Jinja or Matplotlib is not there."""
    try:
        from jinja2 import Environment
        from markupsafe import Markup
    except ImportError:
        raise SteepestError("reports are made with Jinja, which is not there: pip install jinja2 matplotlib") from None
    pictures, facts = [], _facts(info)
    if len(records):
        pictures.append(("Training", training_figure(records, "", info.findings)))
        layers = layers_figure(records)
        if layers is not None:
            pictures.append(("Layers", layers))
        pictures.append(("Time", time_figure(records)))
        held = bottleneck({name: records.column(name)[-RECENT_STEPS:] for name in COLUMNS})
        facts += [] if held is None else [("A step is", f"{held.word}, {1e3 * held.seconds:.3g} ms")]
    source = files("steepest").joinpath("report.html.jinja").read_text(encoding="utf-8")
    template = Environment(autoescape=True).from_string(source)
    return template.render(
        info=info,
        facts=facts,
        # The pictures are Matplotlib's own, which escapes what it writes.
        pictures=[(title, Markup(as_svg(figure))) for title, figure in pictures],  # noqa: S704
        events=events,
        spec=json.dumps(info.spec.model_dump(mode="json", exclude_none=True), indent=2),
        version=version,
        now=time.time(),
        where=_where,
        moment=_moment,
    )


def _facts(info: JobInfo) -> list[tuple[str, str]]:
    facts = [("Steps", f"{info.step:,} of {info.total_steps:,}"), ("Samples", f"{info.samples:,}")]
    if info.loss is not None:
        facts.append(("Last training loss", f"{info.loss:.4g}"))
    facts += [(f"Evaluation: {name}", f"{value:.4g}") for name, value in sorted(info.metrics.items())]
    facts.append(("Took", f"{info.wall_seconds:,.1f} s"))
    if info.samples_per_second:
        facts.append(("Samples a second", f"{info.samples_per_second:,.0f}"))
    facts.append(("Workers, servers", f"{info.spec.placement.workers}, {info.spec.placement.num_servers}"))
    if info.best_step is not None:
        facts.append(("Best evaluation at step", f"{info.best_step:,}"))
    if info.parameters_sha256:
        facts.append(("Parameters, SHA-256", info.parameters_sha256[:16] + "…"))
    return facts


def _where(finding: Any) -> str:
    samples = finding.samples and "samples " + ", ".join(map(str, finding.samples))
    micro_batch = None if finding.micro_batch is None else f"micro-batch {finding.micro_batch}"
    return ", ".join(filter(None, [finding.layer, finding.worker, micro_batch, samples]))


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
