"""Pictures of what was measured, from the files of benchmarks/results.

    python -m benchmarks.pictures

draws docs/img/speed.png (JAX beside PyTorch, from train_step_*_small.json and
generation_small.json), and the training runs of low_precision.json and parity.json beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from affectgpt_jax.cli import exit_on_error, make_parser
from affectgpt_jax.common import drawing
from affectgpt_jax.common.identity import json_sha256
from benchmarks import harness
from benchmarks.generation import Case
from benchmarks.harness import RESULTS, Report

SPEED = RESULTS.parent.parent / "docs" / "img" / "speed.png"
TWINS = {
    "release": "PyTorch as released",
    "tuned": "PyTorch, tuned",
    "packed": "PyTorch, tuned and packed",
}
SLOWER, FASTER = "tab:red", "tab:blue"
# Of the relative difference of a loss between the frameworks, and where a row of parity is red:
# every update feeds the rounding of the steps before back into the next.
PARITY_BOUND = 1e-3


class Ratio(NamedTuple):
    """How many times as fast JAX is: median and range; `what` names work and peer."""

    what: str
    median: float
    lowest: float
    highest: float


def training_ratios(reports: Sequence[Report]) -> list[Ratio]:
    """Samples/s of updates over each twin that a report has beside it."""
    found = []
    for report in reports:
        settings = report["settings"]
        rows = "4 rows of 256 tokens"
        if settings["workload"] == "affectgpt":
            rows = f"{settings['batch']} clips{', packed' if settings['packed'] else ''}"
        for twin, ratio in report["ratios"].items():
            found.append(Ratio(f"{rows}\nover {TWINS[twin]}", *map(ratio.get, Ratio._fields[1:])))
    return sorted(found, key=lambda ratio: -ratio.median)


def generation_ratios(report: Report) -> list[Ratio]:
    """Clips/s of answers over `transformers`, many and one at a time."""
    found = []
    for kind, entry in report["kinds"].items():
        for batch in (report["settings"]["batch"], 1):
            ours, peer = (
                entry["cases"][Case(side, batch).name] for side in ("jax", "transformers")
            )
            ratio = ours["clips_per_s"] / peer["clips_per_s"]
            lowest, highest = (ours["range"][end] / peer["range"][1 - end] for end in (0, 1))
            at_a_time = f"{batch} at a time" if batch > 1 else "one at a time"
            found.append(Ratio(f"{kind}\n{at_a_time}", ratio, lowest, highest))
    return sorted(found, key=lambda ratio: -ratio.median)


def draw_speed(folder: Path, png: Path) -> None:
    """Bars from 1, the speed of PyTorch: training on the left, answers on the right.

    Raises:
        ReadError: a result is missing.
    """
    reports = [harness.load(path) for path in sorted(folder.glob("train_step_*_small.json"))]
    answers = harness.load(folder / "generation_small.json")
    panels = {
        "updates": training_ratios(reports),
        "answers, over transformers": generation_ratios(answers),
    }
    figure = drawing.new_figure(11, 0.9 + 0.55 * max(map(len, panels.values())))
    about = answers["environment"]
    figure.suptitle(
        f"Times as fast as PyTorch: 40 million parameters, {answers['settings']['dtype']}, "
        f"{about['cpu_cores']} cores of {about['cpu']}",
        fontsize=11,
    )
    for axes, (title, ratios) in zip(figure.subplots(1, 2, sharex=True), panels.items()):
        _bars(axes, ratios)
        axes.set_title(title, fontsize=11)
    drawing.save_png(figure, png, json_sha256([*reports, answers]))


def _bars(axes: Any, ratios: Sequence[Ratio]) -> None:
    """A bar from 1 to each median, its range, and its value."""
    places = np.arange(len(ratios))
    medians = np.array([ratio.median for ratio in ratios])
    whiskers = [medians - [r.lowest for r in ratios], [r.highest for r in ratios] - medians]
    colours = [FASTER if median >= 1 else SLOWER for median in medians]
    style = {"error_kw": {"ecolor": drawing.GREY, "capsize": 3}, "height": 0.6, "alpha": 0.8}
    axes.barh(places, medians - 1, left=1, xerr=whiskers, color=colours, **style)
    for place, ratio in zip(places, ratios):
        end = max(ratio.highest, 1)
        axes.annotate(f"{ratio.median:.2f}", (end, place), (6, 0), textcoords="offset points",
                      va="center", fontsize=9)  # fmt: skip
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(places, [ratio.what for ratio in ratios], fontsize=8.5)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("times as fast")
    drawing.tidy(axes)
    axes.grid(visible=False, axis="y")


def draw_runs(
    runs: Mapping[str, Sequence[float]],
    apart: Mapping[str, Sequence[float]],
    png: Path,
    about: str,
    bound: float | None = None,
) -> None:
    """Draw training runs side by side: every value lightly, and running means.

    Args:
        runs: label -> loss by step; the first stands behind the others, which take turns on it.
        apart: label -> relative difference of the losses of two runs by step.
        png: the picture.
        about: kept in the file.
        bound: of these differences.
    """
    figure = drawing.new_figure(11, 4.4)
    losses, errors = figure.subplots(1, 2)
    colours = {label: f"C{number}" for number, label in enumerate(dict.fromkeys([*runs, *apart]))}
    for number, (label, values) in enumerate(runs.items()):
        turn = 5 * (len(runs) - 2)
        style = {"linestyle": (5 * number, (5, turn)) if turn > 0 else "-", "linewidth": 1.6}
        style = style if number else {"linewidth": 5, "alpha": 0.4}
        if not number:
            losses.plot(values, color=colours[label], linewidth=0.8, alpha=0.35)
        losses.plot(drawing.smooth(values), color=colours[label], **style)
        losses.plot([], color=colours[label], label=label)  # whole, for the names
    for label, values in apart.items():
        means = np.array(drawing.smooth(values))
        # A logarithm has no place for losses that are equal.
        for shown, style in ((values, (0.6, 0.3, None)), (means, (1.8, 1.0, label))):
            shown = np.where(np.array(shown) > 0, shown, np.nan)
            width, alpha, name = style
            errors.semilogy(shown, color=colours[label], linewidth=width, alpha=alpha, label=name)
    if bound is not None:
        errors.axhline(bound, color="tab:red", linestyle="--", label=f"bound {bound:g}")
    losses.set(title="loss, running means")
    first = next(iter(runs))
    errors.set(title=f"relative difference of the loss from {first}, running means")
    for axes in (losses, errors):
        axes.set_xlabel("step")
        drawing.tidy(axes)
        axes.legend(loc="upper right", ncols=2, fontsize=9, framealpha=0.85, edgecolor="none")
    errors.margins(y=0.25)  # room for names
    drawing.save_png(figure, png, about)


def draw_low_precision(report: Report, png: Path) -> None:
    """Training runs on bases of low precision, and how far each is from the float32 one."""
    runs = {name: row["losses"] for name, row in report["quality"].items()}
    plain = np.array(runs["float32"])
    apart = {
        name: np.abs(np.subtract(losses, plain)) / plain
        for name, losses in runs.items()
        if name != "float32"
    }
    draw_runs(runs, apart, png, json_sha256(report))


def draw_parity(report: Report, png: Path) -> None:
    """A training run in both frameworks, and one in JAX from a start whose last bits were moved."""
    curves = report["curves"]
    runs = {"PyTorch": curves["torch"], "JAX": curves["jax"]}
    apart = {
        label: np.abs(np.subtract(curves[name], curves[other])) / curves[other]
        for label, name, other in (
            ("JAX", "jax", "torch"),
            ("JAX from JAX, last bit moved", "jax_nudged", "jax"),
        )
    }
    draw_runs(runs, apart, png, json_sha256(report), PARITY_BOUND)


@exit_on_error()
def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("python -m benchmarks.pictures", __doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--speed", type=Path, default=SPEED, help="where that picture goes")
    arguments = parser.parse_args(argv)
    draw_speed(arguments.results, arguments.speed)
    for name, draw in (("low_precision", draw_low_precision), ("parity", draw_parity)):
        draw(harness.load(arguments.results / f"{name}.json"), arguments.results / f"{name}.png")


if __name__ == "__main__":
    main()
