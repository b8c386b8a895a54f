"""The report as one page of HTML that needs nothing else: no script, no font, no request.

The page is a template, `assets/report/page.html.jinja`, which escapes every expression. The
content security policy of the page forbids scripts and requests as a second guard against text
from a model or a file.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affectgpt_jax.evaluation.answers import SideBySide
from affectgpt_jax.evaluation.markup import printable
from affectgpt_jax.evaluation.published import MAIN_TABLE, SOURCE, read_published
from affectgpt_jax.evaluation.results import MEAN
from affectgpt_jax.evaluation.summary import Report
from affectgpt_jax.evaluation.tables import (
    NOT_COMPARABLE,
    Table,
    cell_text,
    comparable,
    interval_text,
)

if TYPE_CHECKING:
    import jinja2

ASSETS = Path(__file__).parent.parent / "assets" / "report"
METRICS = {
    "f": "F",
    "p": "P",
    "r": "R",
    "hit": "Hit rate",
    "weighted_f1": "Weighted F1",
    "accuracy": "Accuracy",
}
TASKS = {
    "fine": "open-vocabulary labels, set F over five emotion wheels",
    "basic": "one true emotion, hit rate over five emotion wheels",
    "sentiment": "positive against negative, weighted F1",
    "words": "one true word, hit rate of the first label, no lexicon",
    "preference": "which of two descriptions people prefer, weighted F1",
}
# Limits of the page; report.json has the full lists.
LIMITS = {"WORDS_SHOWN": 30, "CLASSES_SHOWN": 40, "NAMES_SHOWN": 8, "TEXT_SHOWN": 600}
# With more columns than this, the column names of a confusion table are written vertically.
WIDE = 12
# A curve of the page has no more points than this.
CURVE_POINTS = 300
# The published system that the overview marks.
PEER = ("AffectGPT", "AVT")


def render_page(report: Report) -> str:
    """The whole report as HTML."""
    return _template().render(
        report=report,
        title=f"Emotion understanding: {report.system}",
        clips=sum(result.fixed.score.counts["clips"] for result in report.sets),
        peers=_peers(report),
        plots=[_plot(title, curves) for title, curves in report.curves.items() if curves],
    )


def render_ablation(table: Table, answers: Sequence[SideBySide] = ()) -> str:
    """A page with one table, and what its runs answered about some clips."""
    return _template().render(title=table.title, table=table, answers=answers)


def _peers(report: Report) -> dict[str, float]:
    """The published score of each set that the overview draws beside ours.

    Scores that do not compare with published ones get no mark, because a mark invites comparison.
    """
    if not any(row.published for row in report.tables[0].rows):
        return {}
    published = {(s.name, s.modalities): s.values for s in read_published(MAIN_TABLE)}[PEER]
    return {
        result.name: published[result.name]
        for result in report.sets
        if result.name in published and comparable(result.fixed.score)
    }


def _plot(
    title: str, curves: Mapping[str, tuple[Sequence[int], Sequence[float]]]
) -> dict[str, Any]:
    """A plot of curves from 0: places in percent of its width and height, and where its ticks are.

    Every curve is a path; few points are marked as well, by strokes of length 0.
    """
    last = max(step for steps, _ in curves.values() for step in steps) or 1
    highest = max(value for _, values in curves.values() for value in values)
    lowest = min(0.0, *(value for _, values in curves.values() for value in values))
    span = 1.05 * (highest - lowest) or 1.0

    def up(value: float) -> float:
        return round(100 - 100 * (value - lowest) / span, 2)

    paths = []
    for name, (steps, values) in curves.items():
        stride = -(-len(steps) // CURVE_POINTS)
        chosen = sorted({*range(0, len(steps), stride), len(steps) - 1})
        places = [f"{100 * steps[i] / last:.2f} {up(values[i])}" for i in chosen]
        dots = "".join(f"M{place}h0" for place in places) if len(places) <= 30 else ""
        paths.append((name, "M" + "L".join(places), dots))
    ticks = [(f"{tick:g}", up(tick)) for tick in _ticks(lowest, lowest + span)]
    steps = [(f"{tick:,.0f}", 100 * tick / last) for tick in _ticks(0, last)]
    return {"title": title, "paths": paths, "ticks": ticks, "steps": steps}


def _ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers from `low` to `high`."""
    power = 10.0 ** math.floor(math.log10(high - low))
    unit = next(u * power for u in (0.2, 0.5, 1, 2) if (high - low) / (u * power) <= 6.01)
    first, last = math.ceil(low / unit), math.floor(high / unit)
    return [round(n * unit, 12) for n in range(first, last + 1)]


@functools.cache
def _template() -> jinja2.Template:
    # Imported here, because `affectgpt_jax.score` and `report --help` need no template.
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS),
        autoescape=True,
        finalize=_printable,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "metric": METRICS.__getitem__,
        "percent": lambda share: "\u2013" if share is None else f"{100 * share:.2f}",
        "difference": lambda share: f"{100 * share:+.2f}",
        "interval": lambda interval: interval_text(interval) if interval else "\u2013",
        "score": cell_text,
        "thousands": lambda count: f"{count:,}",
        "cut": lambda text, limit: text if len(text) <= limit else f"{text[:limit]}\u2026",
    }
    environment.tests["comparable"] = comparable
    environment.globals |= {
        "MEAN": MEAN,
        "NOT_COMPARABLE": NOT_COMPARABLE,
        "SOURCE": SOURCE,
        "TASKS": TASKS,
        "WIDE": WIDE,
        **LIMITS,
    }
    return environment.get_template("page.html.jinja")


def _printable(value: Any) -> Any:
    """Text without control characters; markup that the template made stays as it is."""
    return printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value
