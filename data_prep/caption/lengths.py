"""Replies that failed by their length: the two tails of the paper's Figure 2.

The lengths of descriptions are nearly normal; what is far shorter is a refusal or a failure, and
what is far longer a model that rambles. Mean and deviation are estimated by the quartiles, since
failures form a mode of their own, which must not move the cuts. So do replies in another script
than nearly all others: a few of them have no normal length, and are dropped.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from affectgpt_jax.common import drawing

# Between the quartiles of a normal distribution, in standard deviations.
QUARTILES = 1.349
# Texts in a unit, and their share of all, from which it has cuts of its own.
LEAST_TEXTS, LEAST_SHARE = 20, 0.1
_LETTERS = re.compile(r"[^\W\d_]")
_LATIN = re.compile(r"[A-Za-z\u00c0-\u024f]")


def measure(text: str) -> tuple[int, str]:
    """Length of a text and its unit: words, or characters where most letters are not Latin."""
    letters = len(_LETTERS.findall(text))
    if letters and 2 * len(_LATIN.findall(text)) < letters:
        return sum(not c.isspace() for c in text), "characters"
    return len(text.split()), "words"


@dataclasses.dataclass(frozen=True)
class Cuts:
    """The lengths that are kept, in one unit: `low` to `high`, both included.

    Attributes:
        mean, deviation: of the normal part.
        texts: in this unit, of `total`.
    """

    mean: float
    deviation: float
    low: float
    high: float
    texts: int
    total: int


def fit_cuts(texts: Sequence[str], tails: float) -> dict[str, Cuts]:
    """The cuts by unit, of texts that are not empty; a unit of few texts beside another has none.

    Args:
        texts: descriptions.
        tails: standard deviations from the mean to each cut.
    """
    lengths: dict[str, list[int]] = {}
    for text in filter(str.strip, texts):
        length, unit = measure(text)
        lengths.setdefault(unit, []).append(length)
    cuts = {}
    total = sum(map(len, lengths.values()))
    most = max(map(len, lengths.values()), default=0)
    for unit, values in sorted(lengths.items()):
        if len(values) < min(most, max(LEAST_TEXTS, LEAST_SHARE * total)):
            continue
        first, mean, third = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
        deviation = (third - first) / QUARTILES
        half = tails * deviation
        cuts[unit] = Cuts(mean, deviation, mean - half, mean + half, len(values), total)
    return cuts


def told_of_others(unit: str, cuts: Mapping[str, Cuts]) -> str:
    """Why texts in a unit without cuts are dropped."""
    total = max(cut.total for cut in cuts.values())
    few = total - sum(cut.texts for cut in cuts.values())
    return f"in {unit}, as {few:,} of {total:,} descriptions only"


def units_without(texts: Sequence[str], cuts: Mapping[str, Cuts]) -> list[str]:
    """The units of texts that have no cuts."""
    return sorted({unit for _, unit in map(measure, filter(str.strip, texts))} - cuts.keys())


def draw_lengths(texts: Sequence[str], cuts: Mapping[str, Cuts], path: Path) -> None:
    """A histogram of the lengths with both cuts, a panel a unit, as PNG."""
    figure = drawing.new_figure(8, 3.5 * max(len(cuts), 1))
    panels = figure.subplots(max(len(cuts), 1), 1, squeeze=False)[:, 0]
    for panel, (unit, cut) in zip(panels, cuts.items()):
        values = [n for n, found in map(measure, filter(str.strip, texts)) if found == unit]
        panel.hist(values, bins=min(80, max(values) - min(values) + 1), color="tab:blue")
        label = f"{cut.low:.1f} to {cut.high:.1f} are kept"
        for at, text in ((cut.low, label), (cut.high, None)):
            panel.axvline(at, color="tab:red", linestyle="--", label=text)
        panel.set_xlabel(f"{unit} of a description")
        panel.set_ylabel("clips")
        panel.legend()
        drawing.tidy(panel)
    if others := units_without(texts, cuts):
        panels[0].set_title(f"dropped: {', '.join(told_of_others(u, cuts) for u in others)}")
    drawing.save_png(figure, path)
