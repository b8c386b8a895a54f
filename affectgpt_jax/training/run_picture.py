"""The picture of a run, `run.png`: losses and scores, and what drives and limits them below."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from affectgpt_jax.common import drawing
from affectgpt_jax.training.metrics_writer import read_metrics

# Shares, 0 to 1, that a run may be validated by, what a picture calls them, and their colour.
SCORES = {
    "hit": ("hit rate", "tab:orange"),
    "sampled_reward": ("reward of a sample", "tab:orange"),
    "reward_score": ("reward of a sample", "tab:blue"),
    "f": ("F of the most probable answer", "tab:green"),
    "weighted_f1": ("weighted F1 of the most probable answer", "tab:green"),
    "accuracy": ("pairs in the preferred order", "tab:green"),
}
# The panels below, each of which is drawn where one of its metrics is logged; curves by name.
PANELS = {
    "learning rate": {"": "train/learning_rate"},
    "gradient norm": {"": "train/grad_norm"},
    "tokens/s": {
        "all": "rate/tokens/s",
        "written": "train/rollout_tokens_per_s",
        "trained": "train/update_tokens_per_s",
    },
    "KL to the start": {"": "train/kl"},
    "entropy of the answers": {"": "train/entropy"},
    "labels of a sample": {"": "train/labels"},
    "margin of the pairs": {"train": "train/margin", "val": "val/margin"},
}
COLUMNS = 3


def plot_run(
    metrics_file: Path, png: Path, *, references: Mapping[str, float] | None = None
) -> None:
    """Draw a run against its steps.

    Above are the loss (every value that was logged, their running mean, and that of validation)
    and the `SCORES`, on an axis from 0 that holds all references; below the `PANELS`. What was not
    logged is left out, so a run with few points gives a picture with little on it.

    Args:
        metrics_file: a `metrics.jsonl`.
        png: the picture to write; its folder must exist.
        references: scores by name, 0 to 1, to draw as lines with their names, such as ceilings and
            controls; the first one stands out.

    Raises:
        FileNotFoundError: there is no `metrics_file`.
        MetricsError: `metrics_file` is damaged (see `read_metrics`).
    """
    records = read_metrics(metrics_file)
    logged = {key for record in records for key in record}
    panels = {
        title: curves for title, curves in PANELS.items() if not logged.isdisjoint(curves.values())
    }
    rows = math.ceil(len(panels) / COLUMNS)
    figure = drawing.new_figure(11, 4.2 + 2.1 * rows)
    above, *below = figure.subfigures(
        1 + bool(rows), 1, height_ratios=[4.2, 2.1 * rows][: 1 + rows], squeeze=False
    )[:, 0]
    # A run without a score has no half of a picture for it.
    has_scores = bool(references) or any(
        _of(f"{split}/{score}", logged) for split in ("train", "val", "test") for score in SCORES
    )
    losses, *scores = above.subplots(1, 1 + has_scores, sharex=True, squeeze=False)[0]
    _plot_losses(losses, records, logged)
    for axes in scores:
        _plot_scores(axes, records, logged, references or {})
    for part in below:
        for number, (title, curves) in enumerate(panels.items(), 1):
            _plot_panel(part.add_subplot(rows, COLUMNS, number), title, curves, records)
    for axes in figure.axes:
        axes.set_xlabel("step")
        drawing.tidy(axes)
        if axes.get_legend_handles_labels()[0]:
            # Not "best", which looks at every point.
            where = "lower right" if axes in scores else "upper right"
            axes.legend(loc=where, fontsize=9, framealpha=0.85, edgecolor="none")
    drawing.save_png(figure, png)


def curves_of(
    records: Sequence[Mapping[str, Any]],
) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    """Steps and values by title and name, as `plot_run` draws them above; train is smoothed."""
    logged = {key for record in records for key in record}
    steps, values = series(records, "train/loss")
    panels = {"loss": {"train": (steps, drawing.smooth(values))}}
    panels["loss"] |= {_label(name): series(records, name) for name in _validated(logged)}
    for score, (title, _) in SCORES.items():
        for name in sorted(_of(f"val/{score}", logged)):
            panels.setdefault(title, {})[_label(name)] = series(records, name)
    return {
        title: {name: points for name, points in curves.items() if points[0]}
        for title, curves in panels.items()
    }


def series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric; null, a value that was not finite, is left out."""
    points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _plot_losses(axes: Any, records: Sequence[Mapping[str, Any]], logged: set[str]) -> None:
    axes.set_title("loss")
    _plot_smoothed(axes, *series(records, "train/loss"), "tab:blue", "train")
    for number, name in enumerate(_validated(logged)):
        style = {"color": "tab:orange" if name == "val/loss" else f"C{number + 2}"}
        label = drawing.plain(_label(name))
        axes.plot(*series(records, name), "o-", markersize=4, label=label, **style)


def _plot_scores(
    axes: Any,
    records: Sequence[Mapping[str, Any]],
    logged: set[str],
    references: Mapping[str, float],
) -> None:
    shown = {
        score: names
        for score in SCORES
        if (names := {s: sorted(_of(f"{s}/{score}", logged)) for s in ("train", "val", "test")})
        and any(names.values())
    }
    titles = dict.fromkeys(SCORES[score][0] for score in shown) or ["score"]
    axes.set_title(", ".join(titles))
    highest = [*references.values()]
    for score, by_split in shown.items():
        title, colour = SCORES[score]
        what = f" {title}" if len(titles) > 1 else ""
        for split, names in by_split.items():
            for number, name in enumerate(names):
                steps, values = series(records, name)
                highest += values
                label = drawing.plain(_label(name)) + what
                style = colour if not number else f"C{number + 3}"
                if split == "train":
                    _plot_smoothed(axes, steps, values, style, label)
                elif split == "val":
                    axes.plot(steps, values, "o-", markersize=4, color=style, label=label)
                else:
                    axes.plot(steps, values, "*", markersize=12, color="tab:red", label=label)
    axes.set_ylim(0, 1.08 * max(highest, default=1.0) or 1.0)
    styles = [{"color": "black", "linestyle": "--", "linewidth": 1.2}]
    styles += [{"color": drawing.GREY, "linestyle": ":", "linewidth": 1.0}] * len(references)
    lines = {name: (height, style) for (name, height), style in zip(references.items(), styles)}
    drawing.name_lines(axes, lines, gap=0.055)


def _plot_panel(
    axes: Any, title: str, curves: Mapping[str, str], records: Sequence[Mapping[str, Any]]
) -> None:
    axes.set_title(title, fontsize=10)
    axes.tick_params(labelsize=8, which="both")
    found = {label: series(records, key) for label, key in curves.items()}
    found = {label: points for label, points in found.items() if points[0]}
    for number, (label, points) in enumerate(found.items()):
        plot = axes.plot if title == "learning rate" else functools.partial(_plot_smoothed, axes)
        plot(*points, color=f"C{number}", label=label if len(found) > 1 else None)
    lowest = min((value for _, values in found.values() for value in values), default=0.0)
    if title == "gradient norm" and lowest > 0:
        axes.set_yscale("log", subs=[2, 5])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    elif lowest >= 0:
        axes.set_ylim(bottom=0)


def _plot_smoothed(
    axes: Any, steps: Sequence[int], values: Sequence[float], color: str, label: str | None
) -> None:
    """Every value in a light colour, and their running mean."""
    if steps:
        axes.plot(steps, values, color=color, alpha=0.35, linewidth=0.8)
        axes.plot(steps, drawing.smooth(values), color=color, label=label)


def _validated(logged: set[str]) -> list[str]:
    """Losses of validation. A run by rewards has none: it logs what is missing to the best one."""
    return [] if "val/sampled_reward" in logged else sorted(_of("val/loss", logged))


def _of(name: str, logged: set[str]) -> list[str]:
    """A metric, and those of the components of a mixture, which are named below it."""
    return [key for key in logged if key == name or key.startswith(f"{name}/")]


def _label(name: str) -> str:
    """What a legend calls a metric: its split, and the component where it is of one."""
    split, _, component = name.split("/", 2) if name.count("/") > 1 else (*name.split("/"), "")
    return f"{split} {component}".strip()
