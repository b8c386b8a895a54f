"""Score tables in the shape of the paper's, with our rows above the published ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from affectgpt_jax.common.errors import ReadError
from affectgpt_jax.common.json import read_json
from affectgpt_jax.common.text import shorten
from affectgpt_jax.evaluation.datasets import GROUPS, UNIBENCH
from affectgpt_jax.evaluation.lexicon import is_official
from affectgpt_jax.evaluation.markup import escape_markdown
from affectgpt_jax.evaluation.metrics import Interval, Score, ScoreError
from affectgpt_jax.evaluation.published import (
    MAIN_TABLE,
    OV_MERD_TABLE,
    SOURCE,
    System,
    read_later,
    read_published,
)
from affectgpt_jax.evaluation.results import MEAN, GroupMean, SetResult

FORMAT = "affectgpt_jax report 1"
NINE = tuple(name for names in UNIBENCH.values() for name in names)
# The paper's ablations by table or figure: the title, how the names of its rows begin, and the
# name of the table in `published`.
ABLATIONS = {
    "3": ("Training set", "trained on", "3/13"),
    "4": ("Filtering", "filter", "4"),
    "5": ("Pre-fusion", "pre-fusion", "5"),
    "6": ("Input", "input", "6"),
    "8": ("LoRA rank", "LoRA rank", "8"),
    "fig4": ("Encoder", "encoder", "Fig 4"),
}
NOT_COMPARABLE = "\u2020"
UNLIKE = (
    f"{NOT_COMPARABLE} Not made with the official emotion wheels at level 1: does not compare with "
    "published scores."
)
OV_MERD = "OV-MERD"


@dataclasses.dataclass(frozen=True)
class Cell:
    """A score in a table.

    Attributes:
        value: share, 0 to 1; None for an empty cell.
        interval: its confidence interval, if known.
        comparable: whether it compares with published scores.
    """

    value: float | None = None
    interval: Interval | None = None
    comparable: bool = True


@dataclasses.dataclass(frozen=True)
class Row:
    """A system of a table.

    Attributes:
        name: of the system or run.
        detail: modalities, or "".
        cells: one per column.
        published: whether the paper, or a later one, reports it.
        source: which one; "" for ours.
    """

    name: str
    detail: str
    cells: tuple[Cell, ...]
    published: bool = False
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """Scores of systems.

    Attributes:
        title: what it shows.
        head: headings of the columns of names and of details; an empty one has no column.
        groups: heading and width of groups of columns.
        columns: headings.
        rows: ours first.
        notes: sentences below the table.
    """

    title: str
    head: tuple[str, str]
    groups: tuple[tuple[str, int], ...]
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def sourced(self) -> bool:
        """Whether a last column names where rows come from."""
        return any(row.source for row in self.rows)


def comparable(score: Score) -> bool:
    """Whether a score was made as published ones are: official wheels at level 1, or none."""
    return score.lexicon is None or (is_official(score.lexicon) and score.level == 1)


def main_table(
    system: str,
    modalities: str,
    sets: Sequence[SetResult],
    means: Mapping[str, GroupMean],
    peers: bool,
) -> Table:
    """Our scores in the shape of Table 2: nine sets, their mean, and further sets to the right.

    A missing set leaves its column empty. Without any of the nine sets, their columns are left out.

    Args:
        system: the name of our system.
        modalities: its inputs, as A, V and T.
        sets: its results.
        means: see `results.group_means`.
        peers: add the published systems, if one of the nine is there.
    """
    by_name = {result.name: result for result in sets}
    further = [result.name for result in sets if result.name not in NINE]
    # A report on other sets alone shares no column with published systems.
    nine = any(name in by_name for name in NINE)
    alone, peers = peers and not nine and OV_MERD not in further, peers and nine
    columns = (*NINE, MEAN, *further) if nine else tuple(further)

    def ours(best: bool) -> tuple[Cell, ...]:
        cells = []
        for column in columns:
            if column == MEAN:
                cells.append(_mean_cell(means.get(MEAN), sets, best))
            elif column not in by_name:
                cells.append(Cell())
            else:
                result = by_name[column].best if best else by_name[column].fixed
                interval = None if best else result.interval
                cells.append(Cell(result.score.primary, interval, comparable(result.score)))
        return tuple(cells)

    several = max((len(result.results) for result in sets), default=1)
    rows = [Row(f"{system}, fixed checkpoint" if several > 1 else system, modalities, ours(False))]
    if several > 1:
        name = f"{system}, best of {several}, chosen on the test set"
        rows.append(Row(name, modalities, ours(True)))
    if peers:
        known = read_published(MAIN_TABLE) + read_later(MAIN_TABLE)
        rows += [_published_row(peer, columns) for peer in known]
    groups = []
    if nine:
        groups = [(GROUPS[task], len(names)) for task, names in UNIBENCH.items()] + [("", 1)]
        groups += [("Not in the mean", len(further))] if further else []
    return Table(
        "Primary scores in percent",
        ("System", "Modalities" if modalities or peers else ""),
        tuple(groups),
        columns,
        tuple(rows),
        (
            *_notes(rows, peers, MEAN in means or not nine, sets),
            *([f"No published system has a score on {_words(further)}."] if alone else []),
        ),
    )


def _mean_cell(mean: GroupMean | None, sets: Sequence[SetResult], best: bool) -> Cell:
    if mean is None:
        return Cell()
    fair = all(comparable(r.fixed.score) for r in sets if r.name in NINE)
    if not best:
        return Cell(mean.fixed, mean.interval, fair)
    return Cell(mean.fixed if mean.best is None else mean.best, None, fair)


def _published_row(peer: System, columns: Sequence[str]) -> Row:
    cells = tuple(Cell(peer.values.get(column)) for column in columns)
    return Row(peer.name, peer.modalities, cells, published=True, source=peer.source)


def _notes(rows: Sequence[Row], peers: bool, whole: bool, sets: Sequence[SetResult]) -> list[str]:
    notes = []
    if not whole:
        lacking = [name for name in NINE if name not in {result.name for result in sets}]
        notes.append(f"No mean: it needs all nine sets, and these are missing: {_words(lacking)}.")
    intervals = [cell.interval for row in rows for cell in row.cells if cell.interval]
    if intervals:
        notes.append(
            f"Intervals: {intervals[0].confidence:.0%}, percentile bootstrap over the test clips; "
            "they do not hold what another training run or label extraction would change."
        )
    if peers:
        notes.append(
            f"Published rows: {SOURCE}, and later papers by the column Source; AffectGPT's are, "
            "set by set, the best of seven checkpoints chosen on the test set."
        )
    if any(not cell.comparable for row in rows for cell in row.cells):
        notes.append(UNLIKE)
    return notes


def _words(names: Sequence[str]) -> str:
    return ", ".join(names)


def ov_merd_table(system: str, sets: Sequence[SetResult]) -> Table | None:
    """Our F, P and R on OV-MERD above the published descriptions of Table 10; None without ours."""
    ours = next((result.fixed for result in sets if result.name == OV_MERD), None)
    if ours is None:
        return None
    fair = comparable(ours.score)
    cells = tuple(
        Cell(value, ours.intervals.get(name), fair) for name, value in ours.score.values.items()
    )
    rows = [Row(system, "", cells)]
    for peer in read_published(OV_MERD_TABLE):
        shares = peer.values[OV_MERD], peer.others[OV_MERD, "Ps"], peer.others[OV_MERD, "Rs"]
        rows.append(Row(peer.name, "", tuple(map(Cell, shares)), published=True))
    notes = [f"Published rows: {SOURCE}, Table {OV_MERD_TABLE}."]
    notes += [] if fair else [UNLIKE]
    title = f"{OV_MERD} beside published descriptions, percent"
    return Table(title, ("System", ""), (), ("F", "P", "R"), tuple(rows), tuple(notes))


@dataclasses.dataclass(frozen=True)
class Run:
    """The scores of a report that an ablation shows.

    Attributes:
        name: of the row.
        values: fixed-checkpoint scores, shares, by set and by group of sets.
        intervals: (low, high, confidence, resamples) of them, where known.
        best: scores of the best checkpoints, where there were several.
        lexicon: name and hash of the lexicon behind the scores, or None.
        level: of its wheels, or None.
        comparable: whether the scores compare with published ones.
    """

    name: str
    values: dict[str, float]
    intervals: dict[str, Interval]
    best: dict[str, float]
    lexicon: str | None
    level: int | None
    comparable: bool


def read_run(name: str, path: str | Path) -> Run:
    """The scores in a `report.json`.

    Raises:
        ReadError: a file that is not one.
    """
    path = Path(path)
    report = read_json(path, dict[str, Any], advice="expected a report.json")
    try:
        if report["format"] != FORMAT:
            raise ValueError
        lexicon = report["lexicon"]
        values: dict[str, float] = {}
        intervals: dict[str, Interval] = {}
        best: dict[str, float] = {}
        for entry in report["sets"]:
            told = entry["protocols"]
            values[str(entry["name"])] = _share(told["fixed_value"])
            if told["checkpoints"] > 1:
                best[str(entry["name"])] = _share(told["best_value"])
            for found in list(entry["results"][-1]["intervals"].values())[:1]:
                intervals[str(entry["name"])] = _interval(found)
        for group, mean in report["means"].items():
            values[group] = _share(mean["fixed"])
            if mean["interval"]:
                intervals[group] = _interval(mean["interval"])
            if mean["best"] is not None:
                best[group] = _share(mean["best"])
        made = lexicon and f"{lexicon['name']} (sha256 {lexicon['sha256'][:12]})"
        return Run(name, values, intervals, best, made, report["level"], bool(report["comparable"]))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise ReadError(
            f"{path} is not a report.json of this version ({FORMAT!r}); make it anew from its "
            "predictions"
        ) from None


def _share(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise ValueError
    return float(value)


def _interval(entry: dict[str, Any]) -> Interval:
    return Interval(
        _share(entry["low"]),
        _share(entry["high"]),
        _share(entry["confidence"]),
        int(entry["resamples"]),
    )


def ablation_table(number: str, runs: Sequence[Run], peers: bool = False) -> Table:
    """Runs that differ in one setting, in the shape of the paper's Tables 3 to 6, 8, or Figure 4.

    The columns are the means of the fine-grained, basic and sentiment sets and of all nine, and
    each set that is in no mean. If runs had several checkpoints, a further column has the mean of
    the best ones, chosen on the test set. Empty columns are left out.

    Args:
        number: "3" (training set), "4" (filtering), "5" (pre-fusion), "6" (input), "8" (LoRA rank)
            or "fig4" (encoders).
        runs: the rows.
        peers: add the paper's rows.

    Raises:
        ScoreError: no runs, another number, a name twice, or runs scored with different lexicons.
    """
    if number not in ABLATIONS:
        raise ScoreError(f"there is no ablation {number!r}; expected {_words(list(ABLATIONS))}")
    if not runs:
        raise ScoreError("an ablation needs one run or more")
    names = [run.name for run in runs]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ScoreError(f"two runs are called {shorten(repeated[0], 40)}; name each once")
    ways = {(run.lexicon, run.level) for run in runs if run.lexicon}
    if len(ways) > 1:
        told = " and ".join(sorted(f"{lexicon} level {level}" for lexicon, level in ways))
        raise ScoreError(f"the runs were scored in two ways, which do not mix: {told}")
    title, what, table = ABLATIONS[number]
    further = list(dict.fromkeys(n for run in runs for n in run.values if _extra(n)))
    columns = [*GROUPS.values(), MEAN, *further]
    published = read_published(table) if peers else ()
    columns = [
        column
        for column in columns
        if any(column in run.values for run in runs) or any(column in p.values for p in published)
    ]
    chosen = [c for c in (MEAN, *further) if any(c in run.best for run in runs)]
    rows = []
    for run in runs:
        fair = [run.comparable or column in further for column in columns]
        cells = [Cell(run.values.get(c), run.intervals.get(c), f) for c, f in zip(columns, fair)]
        cells += [Cell(run.best.get(c), None, run.comparable or c in further) for c in chosen]
        rows.append(Row(run.name, "", tuple(cells)))
    for peer in published:
        cells = [Cell(peer.values.get(c)) for c in columns] + [Cell() for _ in chosen]
        label = peer.name.removeprefix(f"{what} ")
        rows.append(Row(label, "", tuple(cells), published=True))
    place = "Figure 4" if number == "fig4" else f"Table {number}"
    best = [f"{column}, best checkpoint, chosen on the test set" for column in chosen]
    return Table(
        f"{title} (the paper's {place}), percent",
        (title, ""),
        (),
        (*columns, *best),
        tuple(rows),
        tuple(_ablation_notes(rows, peers, runs)),
    )


def _extra(name: str) -> bool:
    return name not in NINE and name not in (*GROUPS.values(), MEAN)


def _ablation_notes(rows: Sequence[Row], peers: bool, runs: Sequence[Run]) -> list[str]:
    lexicon = next((run for run in runs if run.lexicon), None)
    notes = [f"Lexicon: {lexicon.lexicon}, level {lexicon.level}."] if lexicon else []
    intervals = [cell.interval for row in rows for cell in row.cells if cell.interval]
    if intervals:
        notes.append(f"Intervals: {intervals[0].confidence:.0%}, bootstrap over the test clips.")
    if peers:
        notes.append(
            f"Published rows: {SOURCE}; best of several checkpoints, chosen on the test set."
        )
    if any(not cell.comparable for row in rows for cell in row.cells):
        notes.append(UNLIKE)
    return notes


def as_dict(table: Table) -> dict[str, Any]:
    """The table as JSON values."""
    return dataclasses.asdict(table)


def cell_text(cell: Cell) -> str:
    """A score in percent, marked if it does not compare with published ones."""
    if cell.value is None:
        return "\u2013"
    mark = "" if cell.comparable else NOT_COMPARABLE
    return f"{100 * cell.value:.2f}{mark}"


def interval_text(interval: Interval) -> str:
    """Its ends in percent."""
    return f"{100 * interval.low:.1f}\u2013{100 * interval.high:.1f}"


def render_markdown(table: Table) -> str:
    """The table in GitHub's Markdown, with its title above and its notes below."""
    heads = [head for head in table.head if head]
    source = ["Source"] if table.sourced else []
    lines = [f"### {escape_markdown(table.title)}", ""]
    lines.append(_line([*heads, *table.columns, *source]))
    rule = ["---"] * len(heads) + ["---:"] * len(table.columns) + ["---"] * len(source)
    lines.append(f"|{'|'.join(rule)}|")
    for row in table.rows:
        name = (
            f"**{escape_markdown(row.name)}**" if not row.published else escape_markdown(row.name)
        )
        cells = [name, *([escape_markdown(row.detail)] if table.head[1] else [])]
        for cell in row.cells:
            text = cell_text(cell)
            cells.append(f"{text} ({interval_text(cell.interval)})" if cell.interval else text)
        cells += [escape_markdown(row.source)] * len(source)
        lines.append("| " + " | ".join(cells) + " |")
    for note in table.notes:
        lines += ["", escape_markdown(note)]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(escape_markdown, cells)) + " |"
