"""What record directories contain: labels, descriptions, durations; as tables and plots."""

from __future__ import annotations

import csv
import dataclasses
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from affectgpt_jax.common import drawing
from affectgpt_jax.common.errors import ReadError
from affectgpt_jax.common.files import atomic_write, read_bytes
from affectgpt_jax.common.tables import csv_rows
from affectgpt_jax.data.modalities import feature_names
from affectgpt_jax.data.records import INDEX_FILE, IndexEntry, read_index, read_manifest

from .report import REPORT_FILE

TOP_LABELS = 30
BINS = {"labels per clip": 1, "words per description": 20, "seconds per clip": 1}
SHOWN_SETS = 6  # in a picture, before lines cannot be told apart


@dataclasses.dataclass(frozen=True)
class Contents:
    """The contents of the clips of a directory.

    Attributes:
        name: of the set.
        entries: its index.
        seconds: of each clip that the extraction's report has a duration of.
    """

    name: str
    entries: Sequence[IndexEntry]
    seconds: Sequence[float]

    @property
    def labels(self) -> list[tuple[str, ...]]:
        """Label lists of the clips that have one; a single emotion is a list of one."""
        lists = (
            entry.labels or ((entry.emotion,) if entry.emotion else ()) for entry in self.entries
        )
        return [words for words in lists if words]

    @property
    def words(self) -> list[int]:
        """Lengths of the descriptions, in words between spaces."""
        return [len(entry.description.split()) for entry in self.entries if entry.description]

    @property
    def numbers(self) -> dict[str, Sequence[float]]:
        """The quantities of `BINS`, of the clips that have them."""
        values = [len(words) for words in self.labels], self.words, self.seconds
        return dict(zip(BINS, values, strict=True))


def read_contents(name: str, directory: Path) -> Contents:
    """Read the index of a record directory, and durations from its extraction.csv if there is one.

    Raises:
        RecordError, ReadError: a directory that is none, or a report that cannot be read.
    """
    entries = read_index(directory / INDEX_FILE, read_manifest(directory))
    seconds = read_seconds(directory)
    known = (seconds[entry.name] for entry in entries if entry.name in seconds)
    return Contents(name, entries, list(known))


def read_seconds(directory: Path) -> dict[str, float]:
    """Durations of clips by name, from an extraction.csv that need not be there.

    Raises:
        ReadError: a report that cannot be read.
    """
    path, seconds = directory / REPORT_FILE, {}
    if path.is_file():
        for line, row in csv_rows(read_bytes(path), str(path), ("name", "seconds")):
            if row["seconds"]:
                try:
                    seconds[row["name"]] = float(row["seconds"])
                except ValueError:
                    found = f"expected seconds, found {row['seconds']!r}"
                    raise ReadError(f"{path}, line {line}: {found}") from None
    return seconds


def table_row(contents: Contents) -> dict[str, Any]:
    """A row of `statistics.csv`; a cell is empty where no clip has the quantity."""
    labels, seconds = contents.labels, contents.seconds
    row: dict[str, Any] = {
        "set": contents.name,
        "clips": len(contents.entries),
        "hours": round(sum(seconds) / 3600, 4) if seconds else "",
        "labelled clips": len(labels),
        "label vocabulary": len({word for each in labels for word in each}),
        "described clips": len(contents.words),
        "clips with a subtitle": sum(1 for entry in contents.entries if entry.subtitle),
    }
    for name, values in contents.numbers.items():
        row[f"{name}, mean"] = round(statistics.fmean(values), 3) if values else ""
        row[f"{name}, median"] = round(statistics.median(values), 3) if values else ""
        row[f"{name}, largest"] = round(max(values), 3) if values else ""
    for feature in feature_names():
        present = sum(1 for entry in contents.entries if feature in entry.present)
        row[f"clips with {feature}"] = present
    return row


def distributions(contents: Contents) -> dict[str, dict[str, int]]:
    """For each quantity the number of clips by value, or by bin, named by its lower end."""
    words = Counter(word for each in contents.labels for word in dict.fromkeys(each))
    # Equally frequent labels in alphabetical order, so that the files do not depend on the clips'.
    top = sorted(words.items(), key=lambda item: (-item[1], item[0]))[:TOP_LABELS]
    return {
        "clips with label": dict(top),
        **{name: _binned(values, BINS[name]) for name, values in contents.numbers.items()},
    }


def _binned(values: Sequence[float], width: int) -> dict[str, int]:
    """Counts of every bin from the first to the last that is not empty."""
    if not values:
        return {}
    bins = Counter(int(value // width) for value in values)
    return {str(i * width): bins[i] for i in range(min(bins), max(bins) + 1)}


def write_statistics(sets: Sequence[Contents], out: Path) -> list[dict[str, Any]]:
    """Write the two CSV files and the picture; returns the rows of the table."""
    out.mkdir(parents=True, exist_ok=True)
    rows = [table_row(contents) for contents in sets]
    with atomic_write(out / "statistics.csv", "w") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    spread = {contents.name: distributions(contents) for contents in sets}
    with atomic_write(out / "distributions.csv", "w") as file:
        plain = csv.writer(file, lineterminator="\n")
        plain.writerow(["set", "quantity", "value", "clips"])
        for name, quantities in spread.items():
            for quantity, counts in quantities.items():
                plain.writerows([name, quantity, *item] for item in counts.items())
    _draw(spread, out / "distributions.png")
    return rows


def _draw(spread: Mapping[str, Mapping[str, Mapping[str, int]]], path: Path) -> None:
    """Bars for the labels of the first set, beside a panel a quantity with lines for all sets."""
    first, shown = next(iter(spread)), list(spread)[:SHOWN_SETS]
    figure = drawing.new_figure(12, 8)
    grid = figure.add_gridspec(len(BINS), 2)
    panel = figure.add_subplot(grid[:, 0])
    counts = spread[first]["clips with label"]
    names = [drawing.plain(label) for label in counts]
    bars = panel.barh(range(len(counts)), list(counts.values()), color="tab:blue")
    panel.bar_label(bars, [f"{count:,}" for count in counts.values()], padding=3, fontsize=8)
    panel.set_yticks(range(len(counts)), names, fontsize=9)
    panel.invert_yaxis()
    panel.set(xlabel="clips", title=f"{drawing.plain(first)}: most frequent labels")
    for row, quantity in enumerate(BINS):
        panel, highest = figure.add_subplot(grid[row, 1]), 1e-9
        for name in shown:
            if counts := spread[name][quantity]:
                edges = np.array([float(value) for value in counts])
                edges = np.append(edges, edges[-1] + BINS[quantity])
                if quantity == "labels per clip":
                    edges -= 0.5  # whole numbers, in the middle of their bins
                values = np.array(list(counts.values()))
                shares = values / values.sum()
                highest = max(highest, shares.max())
                panel.stairs(shares, edges, label=drawing.plain(name), linewidth=1.5)
        panel.set(xlabel=quantity, ylabel="share of clips")
        panel.set_ylim(0, 1.35 * highest)  # room for the names
        panel.xaxis.get_major_locator().set_params(integer=True)
        if panel.patches:
            panel.legend(loc="upper right", ncols=2, fontsize=9, framealpha=0.85, edgecolor="none")
    for panel in figure.axes:
        drawing.tidy(panel)
    figure.axes[0].grid(visible=False, axis="y")
    drawing.save_png(figure, path)
