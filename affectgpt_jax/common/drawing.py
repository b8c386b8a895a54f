"""What pictures share: figures without a display, files, smoothed curves, lines with names.

Matplotlib is imported when a picture is drawn. Without pyplot there is neither a display nor a
global figure.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from affectgpt_jax.common.files import atomic_write
from affectgpt_jax.common.text import one_line

DPI = 110
GREY = "0.45"
NAME_SHOWN = 40  # characters


def new_figure(width: float, height: float) -> Any:
    """An empty `matplotlib.figure.Figure` of so many inches, which lays out what it holds."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_png(figure: Any, path: str | os.PathLike[str], about: str | None = None) -> None:
    """Write a figure as PNG, whole or not at all: the same data, the same bytes.

    Args:
        figure: a Matplotlib figure.
        path: whose folder must exist.
        about: kept as `Description` in the file.

    Raises:
        OSError: the file cannot be written.
    """
    with atomic_write(path) as file:
        # Neither a date nor a version.
        figure.savefig(
            file, format="png", dpi=DPI, metadata={"Software": None, "Description": about}
        )


def plain(text: str) -> str:
    """Text from outside for a figure: in one line, not too long, and without formulas."""
    text = one_line(text)
    text = text if len(text) <= NAME_SHOWN else f"{text[:NAME_SHOWN]}\u2026"
    return text.replace("$", r"\$")


def tidy(axes: Any) -> None:
    """A light grid, and no frame where no axis is."""
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def smooth(values: Sequence[float], share: float = 0.1) -> list[float]:
    """Means over about this share of the values around each, so that a curve can be read.

    At the beginning a window reaches back no further than there are values, and as far ahead: the
    first mean is the first value. At the end it only looks back.

    Not medians: a batch holds one kind of answer, and the kinds' losses lie far apart, so that a
    median jumps between them.
    """
    places = np.arange(len(values))
    half = np.minimum(places, int(len(values) * share / 2))
    ends = np.minimum(places + half + 1, len(values))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return ((sums[ends] - sums[places - half]) / (ends - places + half)).tolist()


def spread(places: Sequence[float], gap: float) -> list[float]:
    """The places, moved apart to at least `gap`, in their order and each as near as that lets."""
    order = sorted(range(len(places)), key=places.__getitem__)
    groups: list[list[float]] = []  # of neighbours that touch: their sum and number
    for rank, i in enumerate(order):
        groups.append([places[i] - rank * gap, 1])
        while len(groups) > 1 and groups[-2][0] / groups[-2][1] > groups[-1][0] / groups[-1][1]:
            total, count = groups.pop()
            groups[-1] = [groups[-1][0] + total, groups[-1][1] + count]
    level = [total / count for total, count in groups for _ in range(int(count))]
    found = dict(zip(order, level, strict=True))
    return [found[i] + rank * gap for i, rank in sorted(zip(order, range(len(order))))]


def name_lines(axes: Any, lines: Mapping[str, tuple[float, Mapping[str, Any]]], gap: float) -> None:
    """Draw horizontal lines, and their names and values right of the axes, none over another.

    Args:
        axes: with their limits set.
        lines: height and Matplotlib's properties of each, by name.
        gap: between the middles of two names, as a share of the height of the axes.
    """
    low, high = axes.get_ylim()
    heights = [height for height, _ in lines.values()]
    places = spread([(height - low) / (high - low) for height in heights], gap)
    for (name, (height, style)), place in zip(lines.items(), places, strict=True):
        axes.axhline(height, **style)
        axes.annotate(
            f"{name}  {height:.3f}",
            xy=(1, (height - low) / (high - low)),
            xytext=(1.04, place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            color=style["color"],
            arrowprops={"arrowstyle": "-", "color": style["color"], "lw": 0.5, "shrinkB": 0},
        )
