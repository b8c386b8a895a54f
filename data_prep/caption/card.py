"""The card of a data set: what is in it, how it was made, and what it leaves out.

It is a `README.md` as the Hugging Face hub reads it, with the plots beside it. All that it says
comes from the files of the stages.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np

from affectgpt_jax.common import drawing
from affectgpt_jax.common.files import write_text
from affectgpt_jax.common.identity import json_sha256
from affectgpt_jax.common.json import read_json
from affectgpt_jax.data.records import IndexEntry
from affectgpt_jax.evaluation.lexicon import Lexicon
from affectgpt_jax.evaluation.markup import escape_markdown

from ..contents import Contents, table_row, write_statistics
from . import filtering
from .describe import KINDS, Described, read_described
from .filtering import PASSED, DataSet, Judgement
from .labels import read_about
from .lengths import draw_lengths, measure, told_of_others, units_without
from .settings import DESCRIPTIONS, CaptionError, Settings

CARD = "README.md"
SAMPLES = 12  # rows that are kept, and as many that are dropped
TEXT_SHOWN = 240
BANDS = 5  # of lengths and durations
# The hub's classes of size: up to so many clips.
SIZES = {
    10**3: "n<1K",
    10**4: "1K<n<10K",
    10**5: "10K<n<100K",
    10**6: "100K<n<1M",
    10**7: "1M<n<10M",
}
# Columns of Table 1 that are shown.
TABLE_1 = (
    "clips",
    "hours",
    "label vocabulary",
    "labels per clip, mean",
    "words per description, mean",
    "words per description, median",
)


class _Funnel(TypedDict):
    """What is read of `funnel.json`."""

    levels: list[Literal["low", "emotion", "sentiment"]]
    settings_sha256: str
    lexicon: str
    plus_sha256: str
    funnel: list[dict[str, Any]]


def write_card(
    data: DataSet,
    judged: Mapping[str, Mapping[str, Judgement]],
    levels: Sequence[str],
    lexicon: Lexicon,
    settings: Settings,
    out: Path,
    *,
    title: str,
    license_name: str,
    languages: Sequence[str],
    crowd: Path | None = None,
    seconds: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Path:
    """Write `README.md`, its plots and `statistics/`; returns the path of the card.

    `filtering.write_results` has drawn the funnel.

    Args:
        data, judged, levels: the data set, and what is kept of it, as `read_filter` has it.
        lexicon, settings: by which it was judged.
        out: the folder.
        title, license_name, languages: as the user says; the latter as the hub's codes.
        crowd: folder of the crowd that voted, for its corpora and leaks.
        seconds: durations of clips by name, where they are known.
        seed: of the sample rows.

    Raises:
        ReadError: a file that cannot be read.
        OSError: one that cannot be written.
    """
    usable, lacking = filtering.trainable(data, judged, levels)
    kept = list(usable)
    untrainable = {name: what for what, names in lacking.items() for name in names}
    seconds = seconds or {}
    sets = [
        _contents("all descriptions", data, data.names, seconds),
        _contents("kept", data, kept, seconds, usable),
    ]
    write_statistics(sets, out / "statistics")
    texts = [line["reply"] for line in (data.descriptions or {}).values()]
    draw_lengths(texts, data.cuts, out / "lengths.png")
    _draw_growth({c.name: c.entries for c in sets}, out / "vocabulary.png")
    stages = filtering.funnel(data, judged, levels)
    parts = [
        _head(title, license_name, languages, len(kept)),
        _table_1(sets),
        _funnel(stages),
        "## Lengths\n\n![lengths of descriptions](lengths.png)\n\n" + _cuts(data),
        "## Labels\n\n![distributions](statistics/distributions.png)\n\n"
        "![growth of the vocabulary](vocabulary.png)",
        _bias(data, kept, seconds),
        _matrix(data, lexicon),
        _samples(data, judged, levels, usable, untrainable, seed),
        _how(data, settings, lexicon, levels, out),
        _crowd(crowd),
        _limits(data, crowd),
    ]
    path = out / CARD
    write_text(path, "\n\n".join(part.strip() for part in parts if part) + "\n")
    return path


def read_filter(
    data: DataSet,
    judged: Mapping[str, Mapping[str, Judgement]],
    lexicon: Lexicon,
    settings: Settings,
    out: Path,
) -> tuple[str, ...]:
    """The levels by which `filter` wrote the files that the card is about.

    Raises:
        ReadError: a file that cannot be read.
        CaptionError: it has not run, or what it judged, and how, has changed since.
    """
    path = out / f"{filtering.FUNNEL}.json"
    if not path.exists():
        raise CaptionError(f"{path} is missing; run `affectgpt caption filter` first")
    written = read_json(path, _Funnel, advice="run `affectgpt caption filter` again")
    levels = tuple(written["levels"])
    filtering.check_stages(data, out, levels)
    usable, _ = filtering.trainable(data, judged, levels)
    for what, then, now in (
        ("caption.toml", written["settings_sha256"], settings.sha256),
        ("the lexicon", written["lexicon"], str(lexicon.identity)),
        ("what it judged", written["funnel"], filtering.funnel(data, judged, levels)),
        ("what is kept", written["plus_sha256"], json_sha256(filtering.plus_rows(data, usable))),
    ):
        if then != now:
            raise CaptionError(
                f"{path} is of another state: {what} has changed since `affectgpt caption filter` "
                "ran; run it again, on the same clips"
            )
    return levels


def _contents(
    name: str,
    data: DataSet,
    names: Iterable[str],
    seconds: Mapping[str, float],
    labels: Mapping[str, tuple[str, ...]] | None = None,
) -> Contents:
    """Clips by name, with labels that are not those of their descriptions where there are any."""
    if labels is None:
        labels = {n: found.labels for n, found in (data.labels or {}).items()}
    names = [n for n in names if data.descriptions and n in data.descriptions]
    entries = [
        IndexEntry(
            name=n,
            subtitle=data.rows[n].get("subtitle", ""),
            description=data.descriptions[n]["reply"],
            labels=labels.get(n, ()),
            present=(),
        )
        for n in names
    ]
    return Contents(name, entries, [seconds[n] for n in names if n in seconds])


def _head(title: str, license_name: str, languages: Sequence[str], clips: int) -> str:
    size = next((name for most, name in SIZES.items() if clips < most), "n>10M")
    # JSON is YAML, whatever stands in the texts.
    lines = [
        "---",
        f"pretty_name: {json.dumps(title)}",
        f"license: {json.dumps(license_name)}",
        f"language: {json.dumps(list(languages))}",
        f'size_categories: ["{size}"]',
        'task_categories: ["video-text-to-text"]',
        'tags: ["emotion", "multimodal", "AffectGPT", "MER-Caption"]',
        "---",
        "",
        f"# {escape_markdown(title)}",
        "",
        "Emotions of people in short clips, described by models and filtered by a crowd of others. "
        "`plus.csv` is the training set, `filtered.csv` says of every clip which test it passed, "
        "and why not.",
    ]
    return "\n".join(lines)


def _markdown_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(escape_markdown(str(cell)) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _table_1(sets: Sequence[Contents]) -> str:
    rows = []
    for contents in sets:
        row = table_row(contents)
        rows.append([contents.name, *(_count(row[column]) for column in TABLE_1)])
    return "## Size\n\n" + _markdown_table(["set", *TABLE_1], rows)


def _funnel(stages: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [s["test"], *(_count(s[k]) for k in ("clips", "labels", "dropped", "not_judged"))]
        for s in stages
    ]
    reasons = [
        [stage["test"], reason, _count(count)]
        for stage in stages
        for reason, count in list(stage["reasons"].items())[:8]
    ]
    text = "## The filter\n\n![funnel](funnel.png)\n\n" + _markdown_table(
        ["test", "clips", "labels", "dropped", "not judged"], rows
    )
    if reasons:
        text += "\n\n" + _markdown_table(["test", "reason", "clips"], reasons)
    return text


def _cuts(data: DataSet) -> str:
    texts = [line["reply"] for line in (data.descriptions or {}).values()]
    lines = [
        f"- {unit}: kept are {cut.low:.1f} to {cut.high:.1f}, of {cut.texts:,} descriptions with a "
        f"mean of {cut.mean:.1f} and a standard deviation of {cut.deviation:.1f}, by the quartiles"
        for unit, cut in data.cuts.items()
    ]
    others = units_without(texts, data.cuts)
    return "\n".join([*lines, *(f"- dropped {told_of_others(u, data.cuts)}" for u in others)])


def _share(names: Sequence[str], kept: set[str]) -> list[str]:
    inside = sum(name in kept for name in names)
    return [_count(len(names)), f"{100 * inside / len(names):.1f} %"]


def _bias(data: DataSet, kept: Sequence[str], seconds: Mapping[str, float]) -> str:
    """Kept share by what the filter should not look at."""
    stays = set(kept)
    text = (
        "## What the filter favours\n\nThe crowd knows few emotions, so that rare and mixed ones "
        "are dropped more often than others, whether or not their description is right."
    )
    by_word: dict[str, list[str]] = {}
    for name in data.names:
        vote = (data.votes or {}).get(name)
        by_word.setdefault((vote.emotion if vote else "") or "no vote", []).append(name)
    if data.votes:
        rows = [[word, *_share(by_word[word], stays)] for word in sorted(by_word)]
        text += "\n\n" + _markdown_table(["emotion, by the crowd", "clips", "kept"], rows)
    described = [n for n in data.names if n in (data.descriptions or {})]
    lengths: dict[str, dict[str, float]] = {}
    for name in described:
        length, unit = measure(data.descriptions[name]["reply"])
        lengths.setdefault(f"{unit} of the description", {})[name] = length
    durations = {n: seconds[n] for n in data.names if n in seconds}
    for title, values in (*sorted(lengths.items()), ("seconds", durations)):
        if rows := [[band, *_share(names, stays)] for band, names in _bands(values)]:
            text += "\n\n" + _markdown_table([title, "clips", "kept"], rows)
    return text


def _bands(values: Mapping[str, float]) -> Iterator[tuple[str, list[str]]]:
    """Clips in bands of about as many each."""
    if not values:
        return
    names = sorted(values, key=lambda n: (values[n], n))
    for part in np.array_split(np.array(names, object), min(BANDS, len(names))):
        yield f"{values[part[0]]:g} to {values[part[-1]]:g}", list(part)


def _matrix(data: DataSet, lexicon: Lexicon) -> str:
    """Crowd's word by the description's labels on the first wheel."""
    if not (data.votes and data.labels):
        return ""
    table: Counter[tuple[str, str]] = Counter()
    for name in data.names:
        vote, labelled = data.votes.get(name), data.labels.get(name)
        if vote and vote.emotion and labelled:
            words = {lexicon.label(label, 1) or "on no wheel" for label in labelled.labels}
            none = "not read" if labelled.unparsed else "no label"
            table.update((vote.emotion, word) for word in words or {none})
    words = sorted({word for _, word in table})
    rows = [
        [said, *(_count(table[said, word]) for word in words)]
        for said in sorted({said for said, _ in table})
    ]
    return (
        "## Crowd and descriptions\n\nClips by the crowd's word (rows) and the labels of the "
        "description on the first emotion wheel (columns; a clip may count in several).\n\n"
        + _markdown_table(["crowd", *words], rows)
    )


def _samples(
    data: DataSet,
    judged: Mapping[str, Mapping[str, Judgement]],
    levels: Sequence[str],
    usable: Mapping[str, tuple[str, ...]],
    untrainable: Mapping[str, str],
    seed: int,
) -> str:
    """A few rows that are kept, and a few that are not, drawn at random."""
    rng = np.random.default_rng(seed)
    dropped = [n for n in data.names if n not in usable]

    def drawn(names: Sequence[str]) -> list[str]:
        chosen = rng.choice(len(names), size=min(SAMPLES, len(names)), replace=False)
        return [names[i] for i in sorted(chosen.tolist())]

    def cells(name: str) -> list[str]:
        text = (data.descriptions or {}).get(name, {}).get("reply", "")
        found = data.labels[name].labels if name in (data.labels or {}) else ()
        labels = usable.get(name, found)
        shown = text if len(text) <= TEXT_SHOWN else f"{text[:TEXT_SHOWN]}\u2026"
        return [name, ", ".join(labels), shown]

    def why(name: str) -> str:
        if name in untrainable:
            return f"without {untrainable[name]} to train on"
        tests = filtering.tests_of(levels)
        test = next(t for t in tests if judged[name][t].outcome != PASSED)
        return f"{test}: {judged[name][test].why}"

    text = "## Samples\n\nKept:\n\n"
    text += _markdown_table(["clip", "labels", "description"], map(cells, drawn(list(usable))))
    if dropped:
        rows = ([*cells(name), why(name)] for name in drawn(dropped))
        text += "\n\nNot kept:\n\n" + _markdown_table(
            ["clip", "labels", "description", "first reason"], rows
        )
    return text


def _how(
    data: DataSet, settings: Settings, lexicon: Lexicon, levels: Sequence[str], out: Path
) -> str:
    """Who was asked what, and by which thresholds it was judged."""
    rows = []
    for kind in (*KINDS, DESCRIPTIONS):
        lines = read_described(out / f"{kind}.jsonl", missing_ok=True).values()
        for (model, prompt, shown), count in Counter(map(_asked, lines)).items():
            rows.append([kind, model, prompt[:12] or "none", shown or "not known", _count(count)])
    if data.labels:
        about = read_about(out)
        by = [about["extractor"], about["prompts_sha256"][:12]] if about else ["not known", ""]
        rows.append(["labels", by[0], by[1] or "none", "descriptions", _count(len(data.labels))])
    networks = Counter(row["network"] for row in (data.speakers or {}).values())
    facts = [
        f"levels: {', '.join(levels) or 'none'}",
        f"settings, `caption.toml`: sha256 {settings.sha256}",
        f"lengths: cuts at the mean -+ {settings.lengths.tails:g} standard deviations",
        "speaker check: "
        + (
            ", ".join(f"{escape_markdown(n)} ({c:,} clips)" for n, c in networks.items())
            or "not run"
        )
        + f"; dropped verdicts: {escape_markdown(', '.join(settings.speakers.drop))}",
        f"crowd and description must agree on {settings.crowd.agree} of the wheels that know both, "
        f"with at least {settings.crowd.least_votes} vote",
        f"lexicon: {escape_markdown(str(lexicon.identity))}",
    ]
    return (
        "## How it was made\n\n"
        + _markdown_table(["what", "model", "prompt sha256", "what was shown", "clips"], rows)
        + "\n\n"
        + "\n".join(f"- {fact}" for fact in facts)
    )


def _asked(line: Described) -> tuple[str, str, str]:
    return line["model"], line["prompt_sha256"], line.get("shown", "")


def _crowd(crowd: Path | None) -> str:
    """Corpora of the crowd and the leaks that were looked for."""
    if crowd is None:
        return ""
    # It loads JAX.
    from ..crowd.run import read_summary

    found = read_summary(crowd.expanduser())
    rows = [
        [
            c["name"],
            _count(c["clips"]),
            ", ".join(c["classes"]) or "valence",
            _count(c["members"]),
            f"{c['score']:.3f}",
        ]
        for c in found["corpora"]
    ]
    text = "## The crowd\n\n" + _markdown_table(
        ["corpus", "clips", "classes", "members", "validation score"], rows
    )
    leaks = json.dumps(found["leaks"], indent=2, sort_keys=True)
    return (
        f"{text}\n\nClips that corpora, voted clips and test sets share:\n\n```json\n{leaks}\n```"
    )


def _limits(data: DataSet, crowd: Path | None) -> str:
    ends = Counter(line["finish"] or "unknown" for line in (data.descriptions or {}).values())
    # The server's own word.
    shown = ", ".join(f"{escape_markdown(end)}: {n:,}" for end, n in ends.most_common())
    return (
        "## Limits and licence\n\n"
        "- Descriptions are those of models: nobody has looked at all of them. What the crowd "
        "does not know, it cannot confirm.\n"
        "- A crowd that learned from sets on which models are tested gives these an advantage"
        f"{'; see the leaks above' if crowd else ''}.\n"
        f"- How replies ended: {shown}.\n"
        "- This data set has annotations alone. Videos stay where their owners have them, under "
        "the licence that they come with; ask their owners for them."
    )


def _draw_growth(sets: Mapping[str, Sequence[IndexEntry]], path: Path) -> None:
    """Different labels by the number of clips in which they were met, as PNG."""
    figure = drawing.new_figure(8, 4)
    panel = figure.subplots()
    for name, entries in sets.items():
        seen: set[str] = set()
        sizes = []
        for entry in entries:
            seen.update(entry.labels)
            sizes.append(len(seen))
        panel.plot(np.arange(1, len(sizes) + 1), sizes, label=name)
    panel.set_xlabel("clips")
    panel.set_ylabel("different labels")
    panel.legend()
    drawing.tidy(panel)
    drawing.save_png(figure, path)
