"""The report as one page of HTML that needs nothing else: no script, no font, no request.

Its content security policy forbids them, so that text out of a model or a file, which is escaped
everywhere, could not start one either.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from affectgpt_jax.evaluation.confusion import Confusion
from affectgpt_jax.evaluation.markup import escape_html, isolated
from affectgpt_jax.evaluation.metrics import Interval, Score
from affectgpt_jax.evaluation.published import MAIN_TABLE, SOURCE, read_published
from affectgpt_jax.evaluation.results import MEAN, Example, Result, SetResult
from affectgpt_jax.evaluation.summary import Report
from affectgpt_jax.evaluation.tables import (
    NOT_COMPARABLE,
    Cell,
    Table,
    cell_text,
    comparable,
    interval_text,
)

STYLE = Path(__file__).parent.parent / "assets" / "report" / "style.css"
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'"
)
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
}
# Of lists that the JSON file has in full.
WORDS_SHOWN = 30
CLASSES_SHOWN = 40
TEXT_SHOWN = 600
NAMES_SHOWN = 8
# Columns of a confusion beyond which their names are written downwards.
WIDE = 12
# The published system that the overview marks.
PEER = ("AffectGPT", "AVT")


def render_page(report: Report) -> str:
    """The whole report."""
    body = [
        f"<h1>Emotion understanding: {isolated(report.system)}</h1>",
        f'<p class="soft">{_made_with(report)}</p>',
        *(f'<p class="warning" role="note">{escape_html(w)}</p>' for w in report.warnings),
        _tiles(report),
        _contents(report),
        '<h2 id="scores">Scores</h2>',
        _overview(report),
        _score_table(report.tables[0]),
        *(f"<h3>{escape_html(t.title)}</h3>{_score_table(t)}" for t in report.tables[1:]),
        *(_set_section(result, n) for n, result in enumerate(report.sets)),
    ]
    return _document(f"Emotion understanding: {report.system}", body)


def render_ablation(table: Table) -> str:
    """A page with one table."""
    return _document(table.title, [f"<h1>{escape_html(table.title)}</h1>", _score_table(table)])


def _document(title: str, body: Iterable[str]) -> str:
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">',
            f"<title>{escape_html(title)}</title>",
            f"<style>\n{STYLE.read_text(encoding='utf-8')}</style>",
            "</head>",
            "<body>",
            *body,
            "</body>",
            "</html>",
            "",
        ]
    )


def _percent(share: float | None) -> str:
    return "\u2013" if share is None else f"{100 * share:.2f}"


def _made_with(report: Report) -> str:
    if report.lexicon is None:
        return "No lexicon was asked: all scores compare words or signs."
    lexicon = report.lexicon
    return (
        f"Lexicon: {escape_html(lexicon.name)}, level {report.level}, "
        f"sha256 <code>{escape_html(lexicon.sha256)}</code>"
    )


def _tiles(report: Report) -> str:
    tiles = []
    for group, mean in reversed(report.means.items()):
        name = "MER-UniBench mean" if group == MEAN else f"{group} mean"
        tiles.append((name, _percent(mean.fixed), _interval_note(mean.interval)))
    if MEAN not in report.means:
        for result in report.sets[:4]:
            fixed = result.fixed
            note = f"{_metric(fixed.score)} {_interval_note(fixed.interval)}"
            tiles.append((result.name, _percent(fixed.score.primary), note))
    clips = sum(result.fixed.score.counts["clips"] for result in report.sets)
    sets = len(report.sets)
    tiles.append(("data sets" if sets != 1 else "data set", str(sets), f"{clips:,} clips"))
    return (
        '<div class="tiles">'
        + "".join(
            f'<div class="tile"><span>{isolated(name)}</span><b>{value}</b>'
            f"<span>{note}</span></div>"
            for name, value, note in tiles
        )
        + "</div>"
    )


def _metric(score: Score) -> str:
    return METRICS[next(iter(score.values))]


def _interval_note(interval: Interval | None) -> str:
    if interval is None:
        return ""
    return f"({interval.confidence:.0%}: {interval_text(interval)})"


def _contents(report: Report) -> str:
    links = ['<li><a href="#scores">Scores</a></li>']
    links += [
        f'<li><a href="#set-{n}">{isolated(result.name)}</a></li>'
        for n, result in enumerate(report.sets)
    ]
    return f'<nav aria-label="Contents"><ul>{"".join(links)}</ul></nav>'


def _overview(report: Report) -> str:
    """A line per set: our score with its interval, the published one, references."""
    published = any(row.published for row in report.tables[0].rows)
    peer = {}
    if published:
        known = {(s.name, s.modalities): s.values for s in read_published(MAIN_TABLE)}
        peer = known[PEER]
    # A mark beside a score invites to compare, so there is none where that would mislead.
    peer = {
        r.name: peer[r.name] for r in report.sets if r.name in peer and comparable(r.fixed.score)
    }
    rows = [_plot_row(result, peer.get(result.name)) for result in report.sets]
    axis = "".join(f"<span>{value}</span>" for value in range(0, 101, 20))
    key = [
        ('<circle class="ours" cx="50%" cy="50%" r="5"/>', "fixed checkpoint"),
    ]
    if any(result.fixed.interval for result in report.sets):
        key.append(('<line class="interval" x1="0" x2="100%" y1="50%" y2="50%"/>', "interval"))
    if peer:
        key.append(
            ('<circle class="peer" cx="50%" cy="50%" r="5"/>', f"AffectGPT as published ({SOURCE})")
        )
    if any(result.references for result in report.sets):
        key.append(('<line class="reference" x1="50%" x2="50%" y1="0" y2="100%"/>', "reference"))
    legend = "".join(
        f'<span><svg aria-hidden="true">{mark}</svg>{text}</span>' for mark, text in key
    )
    return (
        f'<div class="plot">{"".join(rows)}<span></span><span class="axis" aria-hidden="true">'
        f'{axis}</span><span></span></div><p class="key">{legend}</p>'
    )


def _plot_row(result: SetResult, peer: float | None) -> str:
    score, interval = result.fixed.score, result.fixed.interval
    marks = ['<line class="track" x1="0" x2="100%" y1="50%" y2="50%"/>']
    marks += [
        f'<line class="tick" x1="{x}%" x2="{x}%" y1="25%" y2="75%"/>' for x in range(0, 101, 20)
    ]
    told = f"{result.name}: {_percent(score.primary)} percent"
    for name, value in result.references.items():
        at, label = f"{100 * value:.2f}%", f"{name}: {_percent(value)}"
        marks.append(
            f'<line class="reference" x1="{at}" x2="{at}" y1="0" y2="100%">'
            f"<title>{escape_html(label)}</title></line>"
        )
    if interval:
        low, high = 100 * interval.low, 100 * interval.high
        marks.append(f'<line class="interval" x1="{low:.2f}%" x2="{high:.2f}%" y1="50%" y2="50%"/>')
        told += f", interval {interval_text(interval)}"
    if peer is not None:
        marks.append(f'<circle class="peer" cx="{100 * peer:.2f}%" cy="50%" r="5"/>')
        told += f", AffectGPT as published {_percent(peer)}"
    marks.append(f'<circle class="ours" cx="{100 * score.primary:.2f}%" cy="50%" r="5"/>')
    mark = "" if comparable(score) else NOT_COMPARABLE
    return (
        f"<span>{isolated(result.name)}</span>"
        f'<svg role="img" aria-label="{escape_html(told)}">{"".join(marks)}</svg>'
        f'<span class="value">{_percent(score.primary)}{mark}</span>'
    )


def _score_table(table: Table) -> str:
    named = 1 + bool(table.head[1])
    lines = ['<div class="scroll" tabindex="0"><table class="scores">', "<thead>"]
    if table.groups:
        heads = "".join(
            f'<th class="group" colspan="{width}" scope="colgroup">{escape_html(name)}</th>'
            for name, width in table.groups
        )
        lines.append(f'<tr><th colspan="{named}"></th>{heads}</tr>')
    heads = "".join(f'<th class="name">{escape_html(head)}</th>' for head in table.head if head)
    heads += "".join(f'<th scope="col">{isolated(column)}</th>' for column in table.columns)
    lines += [f"<tr>{heads}</tr>", "</thead>", "<tbody>"]
    for row in table.rows:
        kind = "published" if row.published else "ours"
        detail = f'<td class="name">{escape_html(row.detail)}</td>' if table.head[1] else ""
        cells = "".join(map(_score_cell, row.cells))
        lines.append(
            f'<tr class="{kind}"><th scope="row">{isolated(row.name)}</th>{detail}{cells}</tr>'
        )
    lines.append("</tbody></table></div>")
    lines += [f'<p class="note">{escape_html(note)}</p>' for note in table.notes]
    return "\n".join(lines)


def _score_cell(cell: Cell) -> str:
    interval = f"<small>{interval_text(cell.interval)}</small>" if cell.interval else ""
    return f"<td>{cell_text(cell)}{interval}</td>"


def _set_section(result: SetResult, number: int) -> str:
    fixed = result.fixed
    score = fixed.score
    parts = [
        "<section>",
        f'<h2 id="set-{number}">{isolated(result.name)}</h2>',
        f'<p class="soft">{TASKS[result.task]}; {_clips(score)}</p>',
        _values(fixed),
    ]
    if result.references:
        heads = ("Reference", "Percent", "Ours minus it")
        rows = [
            (isolated(name), _percent(value), f"{100 * (score.primary - value):+.2f}")
            for name, value in result.references.items()
        ]
        parts.append(_plain_table(heads, rows))
    if len(result.results) > 1:
        parts.append(_protocols(result))
    if score.wheels:
        parts.append(_wheels(score))
    parts += _classes(result)
    parts += _words(score)
    if fixed.pairs.findings:
        parts.append("<h3>About the files</h3><ul>")
        parts += [f"<li>{_finding(f.what, f.names)}</li>" for f in fixed.pairs.findings]
        parts.append("</ul>")
    parts += _examples("Examples, drawn at random", result.examples)
    parts += _examples("Misses, drawn at random", result.misses)
    parts.append("</section>")
    return "\n".join(parts)


def _clips(score: Score) -> str:
    counts = score.counts
    text = f"{counts['clips']:,} clips"
    if "scored" in counts:
        text += f", {counts['scored']:,} scored"
    if "predicted_labels_per_clip" in counts:
        text += (
            f"; labels per clip: {counts['predicted_labels_per_clip']:.2f} predicted, "
            f"{counts['true_labels_per_clip']:.2f} true"
        )
    if counts["empty_predictions"]:
        text += f"; {counts['empty_predictions']:,} empty predictions"
    return text


def _values(result: Result) -> str:
    rows = [
        (METRICS[name], _percent(value), _interval_ends(result.intervals.get(name)))
        for name, value in result.score.values.items()
    ]
    return _plain_table(("", "Percent", "Interval"), rows)


def _interval_ends(interval: Interval | None) -> str:
    return interval_text(interval) if interval else "\u2013"


def _protocols(result: SetResult) -> str:
    told = result.protocols
    rows = []
    for entry in result.results:
        kind = []
        if entry.predictions == told.fixed:
            kind.append("fixed")
        if entry.predictions == told.best:
            kind.append("best, chosen on the test set")
        against = entry.against_fixed
        rows.append(
            (
                isolated(entry.predictions),
                _percent(entry.score.primary),
                _interval_ends(entry.interval),
                f"{100 * against.difference:+.2f}" if against else "\u2013",
                f"{against.p_value:.4f}" if against else "\u2013",
                ", ".join(kind),
            )
        )
    heads = ("Checkpoint", "Percent", "Interval", "Minus the fixed one", "p", "Protocol")
    return f"<h3>Checkpoints</h3>{_plain_table(heads, rows)}"


def _wheels(score: Score) -> str:
    names = list(score.values)
    heads = (
        "Wheel",
        *(METRICS[n] for n in names),
        "Clips scored",
        "Unmapped labels",
        "Unmapped true labels",
    )
    rows = [
        (
            str(row["wheel"]),
            *(_percent(row[name]) for name in names),
            f"{row['clips']:,}",
            _percent(row["unmapped_predicted"]),
            _percent(row["unmapped_true"]),
        )
        for row in score.wheels
    ]
    means = [(f"<b>{MEAN}</b>", *map(_percent, score.values.values()), "", "", "")]
    return f"<h3>By wheel</h3>{_plain_table(heads, rows + means)}"


def _classes(result: SetResult) -> list[str]:
    """Per class figures beside the confusion, by wheel where there are wheels."""
    classes = result.fixed.score.classes
    parts = ["<h3>By class</h3>"]
    if not result.fixed.score.wheels:
        body = _class_table(classes) + _confusion(result.confusions[0])
        return [*parts, f'<div class="side">{body}</div>']
    for table in result.confusions:
        rows = [row for row in classes if row["wheel"] == table.wheel]
        state = " open" if table.wheel == 1 else ""
        parts.append(
            f"<details{state}><summary>Wheel {table.wheel}</summary>"
            f'<div class="side">{_class_table(rows)}{_confusion(table)}</div></details>'
        )
    return parts


def _class_table(classes: Sequence[dict[str, Any]]) -> str:
    names = [name for name in ("hit", "p", "r", "f") if name in classes[0]]
    counts = [name for name in ("clips", "predicted") if name in classes[0]]
    heads = ("Class", *(name.capitalize() for name in counts), *(METRICS[name] for name in names))
    known = sorted(classes, key=lambda row: -row["clips"])
    rows = [
        (
            isolated(row["label"]),
            *(f"{row[name]:,}" for name in counts),
            *(_percent(row[name]) for name in names),
        )
        for row in known[:CLASSES_SHOWN]
    ]
    more = len(known) - len(rows)
    note = f'<p class="note">and {more:,} more in report.json</p>' if more > 0 else ""
    return f"<div>{_plain_table(heads, rows)}{note}</div>"


def _confusion(table: Confusion) -> str:
    heads = "".join(f'<th scope="col">{isolated(name)}</th>' for name in table.columns)
    lines = []
    for name, counts, clips, right in zip(
        table.rows, table.counts.tolist(), table.clips.tolist(), table.right
    ):
        cells = []
        for column, count in enumerate(counts):
            share = count / clips if clips else 0.0
            kinds = ["hot"] * (share > 0.55) + ["right"] * (column in right)
            kind = f' class="{" ".join(kinds)}"' if kinds else ""
            text = f"{100 * share:.0f}" if count else ""
            cells.append(f'<td{kind} style="--v:{share:.3f}" title="{count:,} clips">{text}</td>')
        lines.append(
            f'<tr><th scope="row">{isolated(name)}</th><td class="n" style="--v:0">{clips:,}</td>'
            f"{''.join(cells)}</tr>"
        )
    wide = " wide" if len(table.columns) > WIDE else ""
    several = " A clip with several labels counts with each." if table.wheel else ""
    caption = (
        f"Rows: true; columns: predicted; percent of the row's clips.{several} Outlined: right."
    )
    return (
        f'<figure><div class="scroll" tabindex="0"><table class="heat{wide}"><thead><tr><th></th>'
        f"<th>clips</th>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _words(score: Score) -> list[str]:
    parts = []
    for side, title in (("predicted", "predicted"), ("true", "true")):
        words = score.counts.get(f"unknown_{side}")
        if not words:
            continue
        chips = "".join(
            f"<li>{isolated(word)} <small>\u00d7 {times:,}</small></li>"
            for word, times in list(words.items())[:WORDS_SHOWN]
        )
        more = len(words) - WORDS_SHOWN
        chips += f"<li><small>and {more:,} more in report.json</small></li>" if more > 0 else ""
        total = sum(words.values())
        parts.append(
            f"<h3>Unknown {title} words: {len(words):,}, {total:,} times</h3>"
            f'<ul class="chips">{chips}</ul>'
        )
    return parts


def _finding(what: str, names: Sequence[str]) -> str:
    shown = ", ".join(isolated(_cut(name, 60)) for name in names[:NAMES_SHOWN])
    more = len(names) - NAMES_SHOWN
    rest = f" and {more:,} more" if more > 0 else ""
    clips = "clip" if len(names) == 1 else "clips"
    return f"{len(names):,} {clips} {escape_html(what)}: {shown}{rest}"


def _examples(title: str, examples: Sequence[Example]) -> list[str]:
    if not examples:
        return []
    cards = "".join(map(_example, examples))
    return [f"<h3>{title}</h3>", f'<div class="examples">{cards}</div>']


def _example(example: Example) -> str:
    kind = "hit" if example.score == 1 else "miss" if example.score == 0 else "part"
    verdict = {"hit": "right", "miss": "wrong"}.get(kind, f"{100 * example.score:.0f} %")
    text = f"<blockquote>{isolated(_cut(example.text, TEXT_SHOWN))}</blockquote>"
    return (
        f'<article class="example {kind}"><h4>{isolated(_cut(example.name, 80))}'
        f"<span>{verdict}</span></h4><dl><dt>predicted</dt><dd>{_value(example.prediction)}</dd>"
        f"<dt>true</dt><dd>{_value(example.truth)}</dd></dl>{text if example.text else ''}"
        "</article>"
    )


def _value(value: Any) -> str:
    """Labels, a word, or a valence."""
    if isinstance(value, float):
        return f"{value:+g}"
    words = [value] if isinstance(value, str) else list(value)
    shown = ", ".join(isolated(_cut(word, 60)) for word in words[:WORDS_SHOWN] if word)
    more = len(words) - WORDS_SHOWN
    return (
        shown + (f" and {more:,} more" if more > 0 else "")
    ) or '<span class="soft">nothing</span>'


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}\u2026"


def _plain_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are markup already; the first of a row names it."""
    head = "".join(
        f'<th scope="col"{"" if n else " class=name"}>{escape_html(text)}</th>'
        for n, text in enumerate(heads)
    )
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
