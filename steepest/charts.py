"""Pictures of a job's training, drawn by Matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from steepest.bottleneck import COLUMNS, step_parts
from steepest.errors import SteepestError
from steepest.jobs import Finding
from steepest.records import Records

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, GREY = "#2f6fde", "#d97706", "#12805c", "#c0392b", "#8a8f98"  # legible for the color-blind
MOST_POINTS = 4000  # of a line; more are drawn as the range of each bucket
LEAST_WINDOW, MOST_WINDOW = 5, 50  # steps that means are over; a twentieth of them all in between
DECADES = 2.0  # of positive values, from which on a scale is logarithmic
HEAT_COLUMNS, HEAT_DECADES = 400, 6.0


def training_figure(records: Records, title: str, findings: Sequence[Finding] = ()) -> Figure:
    """Loss, gradient norms before and after the clip, clip rate, throughput; findings are marked at their steps.

    Raises SteepestError when there is nothing to draw.
    """
    figure = _figure((11, 7))
    if not len(records):
        raise SteepestError("the job has made no step yet, so there is nothing to draw")
    axes = figure.subplots(2, 2, sharex=True)
    figure.suptitle(title)
    draw_loss(axes[0, 0], records)
    draw_norms(axes[0, 1], records)
    draw_clip_rate(axes[1, 0], records)
    draw_throughput(axes[1, 1], records)
    for axis in axes.flat:
        _mark(axis, findings)
    for axis in axes[1]:
        axis.set_xlabel("step")
    return figure


def draw_loss(axis: Axes, records: Records) -> None:
    """The training loss, as it was and smoothed, and that of the evaluations."""
    loss = records.column("loss")
    _line(axis, records, loss, BLUE, "of the step", faint=True)
    _line(axis, records, _running_mean(loss, _window(records)), BLUE, f"mean of {_window(records)} steps")
    if records.evaluations:
        points = [(e.step, e.metrics.get("loss", np.nan)) for e in records.evaluations]
        axis.plot(*zip(*points, strict=True), color=ORANGE, marker="o", markersize=3, linewidth=1, label="evaluation")
        loss = np.append(loss, [value for _, value in points])
    _finish(axis, "Loss", loss)


def draw_norms(axis: Axes, records: Records) -> None:
    """The global gradient norm before and after the clip."""
    before, after = records.column("gradient_norm"), records.column("clipped_norm")
    _line(axis, records, before, ORANGE, "before the clip")
    if not np.array_equal(before, after, equal_nan=True):
        _line(axis, records, after, GREEN, "after the clip")
    _finish(axis, "Gradient norm", before)


def draw_clip_rate(axis: Axes, records: Records) -> None:
    """The share of steps whose gradient was clipped."""
    _line(
        axis,
        records,
        100 * _running_mean(records.column("clipped"), _window(records)),
        ORANGE,
        f"of {_window(records)} steps",
    )
    axis.set_ylim(-3, 103)
    axis.set_title("Steps that were clipped, %", loc="left")


def draw_throughput(axis: Axes, records: Records) -> None:
    """Samples in a second."""
    seconds = _running_mean(records.column("step_seconds"), _window(records))
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = _running_mean(records.column("samples"), _window(records)) / seconds
    _line(axis, records, rate, GREEN, f"over {_window(records)} steps")
    axis.set_ylim(bottom=0)
    axis.set_title("Samples a second", loc="left")


def layers_figure(records: Records) -> Figure | None:
    """The gradient norm of every parameter over the steps; None when norms are not kept."""
    if not records.norms or not len(records):
        return None
    names = list(records.norms)
    values = np.array(list(records.norms.values()))
    starts = np.linspace(0, values.shape[1], min(HEAT_COLUMNS, values.shape[1]), endpoint=False).astype(int)
    with np.errstate(divide="ignore"):
        powers = np.log10(np.fmax.reduceat(values, starts, axis=1))
    powers[~np.isfinite(powers)] = np.nan
    figure = _figure((11, min(12.0, 1.5 + 0.18 * len(names))))
    axis = figure.subplots()
    if np.isfinite(powers).any():
        high = float(np.nanmax(powers))
        steps = records.columns["step"]
        picture = axis.imshow(
            powers,
            aspect="auto",
            interpolation="nearest",
            vmin=max(float(np.nanmin(powers)), high - HEAT_DECADES),
            vmax=high,
            extent=(float(steps[0]), float(steps[-1]) + 1, len(names) - 0.5, -0.5),
        )
        figure.colorbar(picture, ax=axis, label="log10 of the norm", pad=0.01)
    shown = range(0, len(names), max(1, len(names) // 50))
    axis.set_yticks(list(shown), [names[index] for index in shown], fontsize=7)
    axis.set_xlabel("step")
    axis.set_title("Gradient norm of every parameter", loc="left")
    return figure


def time_figure(records: Records) -> Figure:
    """Where the time of steps goes."""
    figure = _figure((11, 3))
    axis = figure.subplots()
    found = step_parts({name: records.column(name) for name in COLUMNS})
    parts = {
        "waiting for data": (found["data"], GREY),
        "forward and backward": (found["compute"] + found["straggler"], BLUE),
        "messages": (found["network"], RED),
        "reduce": (found["reduce"], ORANGE),
        "apply": (found["apply"], GREEN),
    }
    steps = records.columns["step"]
    means = [1e3 * _running_mean(values, _window(records)) for values, _ in parts.values()]
    axis.stackplot(steps, *means, labels=list(parts), colors=[color for _, color in parts.values()], alpha=0.85)
    axis.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False, ncols=4)
    axis.set_title(f"Where a step's time goes, ms, mean of {_window(records)} steps", loc="left")
    axis.set_xlabel("step")
    return figure


def as_svg(figure: Figure) -> str:
    """The picture as an SVG element, to be put into a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _figure(size: tuple[float, float]) -> Figure:
    try:
        from matplotlib import rcParams
        from matplotlib.figure import Figure
    except ImportError:
        raise SteepestError("pictures are drawn by Matplotlib, which is not there: pip install matplotlib") from None
    rcParams["svg.hashsalt"] = "steepest"  # the same picture twice has the same bytes
    return Figure(figsize=size, dpi=150, layout="constrained")


def _line(
    axis: Axes, records: Records, values: NDArray[np.float64], color: str, label: str, *, faint: bool = False
) -> None:
    steps = records.columns["step"]
    style: dict[str, Any] = {"color": color, "linewidth": 1.0, "alpha": 0.3 if faint else 1.0}
    if len(values) <= MOST_POINTS:
        axis.plot(steps, values, label=label, **style)
        return
    starts = np.linspace(0, len(values), MOST_POINTS // 4, endpoint=False).astype(int)
    least, most = np.fmin.reduceat(values, starts), np.fmax.reduceat(values, starts)
    axis.fill_between(steps[starts], least, most, label=label, color=color, alpha=style["alpha"], linewidth=0.3)


def _window(records: Records) -> int:
    return min(MOST_WINDOW, max(LEAST_WINDOW, len(records) // 20))


def _finish(axis: Axes, title: str, values: NDArray[np.float64]) -> None:
    positive = values[np.isfinite(values) & (values > 0)]
    if len(positive) and len(positive) == np.isfinite(values).sum():
        low, high = np.percentile(positive, [1, 99])
        if np.log10(high / low) > DECADES:
            axis.set_yscale("log")
    axis.set_title(title, loc="left")
    if len(axis.get_legend_handles_labels()[0]) > 1:
        axis.legend(loc="best", fontsize=8, frameon=False)


def _mark(axis: Axes, findings: Sequence[Finding]) -> None:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    for finding in findings:
        axis.axvline(finding.step, color=RED, linewidth=0.8, linestyle="--", alpha=0.7)


def _running_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Over the last `window` values, those that are not finite left out."""
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    last = np.arange(1, len(values) + 1)
    first = np.maximum(last - window, 0)
    with np.errstate(invalid="ignore"):
        means: NDArray[np.float64] = (sums[last] - sums[first]) / (counts[last] - counts[first])
    return means
