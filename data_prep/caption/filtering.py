"""The filter: which descriptions are kept, by which test, and why the others are not.

Three levels, in any combination:

* `low`: the reply did not fail, its length is normal, and the person who is seen speaks;
* `emotion`: the crowd's word agrees with the labels of the description on the emotion wheels;
* `sentiment`: the crowd's sentiment is that of the description.

Every clip has a row in `filtered.csv`: per test `passed`, `dropped` or `not judged`, the value and
the reason. A clip that a test of the chosen levels has not judged is not kept, and counted as such.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from affectgpt_jax.common import drawing
from affectgpt_jax.common.errors import ReadError
from affectgpt_jax.common.files import read_bytes, write_text
from affectgpt_jax.common.identity import json_sha256
from affectgpt_jax.common.json import write_json
from affectgpt_jax.common.tables import csv_rows, write_csv
from affectgpt_jax.common.text import listed
from affectgpt_jax.data.arrays import parse_labels
from affectgpt_jax.data.records import (
    EXTRACTION,
    MANIFEST_FILE,
    Record,
    RecordDataset,
    RecordError,
    read_manifest,
    write_records,
)
from affectgpt_jax.evaluation.extract import is_refusal
from affectgpt_jax.evaluation.lexicon import WHEELS, Lexicon
from affectgpt_jax.evaluation.metrics import SENTIMENTS

from ..blocks import BLOCKS, PLACES
from ..clips import MEDIA_COLUMNS, read_clip_rows
from ..crowd.votes import Vote, read_votes
from ..report import copy_report
from ..speakers.verdicts import read_speakers
from .describe import Described, read_described
from .labels import COLUMNS as COLUMNS_OF_LABELS
from .labels import description_sha256
from .lengths import Cuts, fit_cuts, measure, told_of_others
from .settings import DESCRIPTIONS, LABELS, SPEAKERS, VOTES, CaptionError, Settings

# The tests of each level, in the order in which they are applied.
LEVELS = {
    "low": ("reply", "length", "speaker"),
    "emotion": ("emotion",),
    "sentiment": ("sentiment",),
}
TESTS = tuple(test for tests in LEVELS.values() for test in tests)
PASSED, DROPPED, NOT_JUDGED = "passed", "dropped", "not judged"
UNREAD = "the reply about labels could not be read"
TRAINED_ON = "trained on"  # the last stage of the funnel
MADE_OF = "made of"  # key of a manifest's `extra`
FILTERED, PLUS, FUNNEL = "filtered.csv", "plus.csv", "funnel"
COLUMNS = (
    *("name", "kept"),
    *itertools.chain.from_iterable((t, f"{t}_value", f"{t}_why") for t in TESTS),
)
# The command that makes what a test reads.
MADE_BY = {
    f"{DESCRIPTIONS}.jsonl": "caption merge",
    LABELS: "caption labels",
    SPEAKERS: "speakers check",
    VOTES: "crowd vote",
}
NEEDS = {
    "reply": (f"{DESCRIPTIONS}.jsonl", LABELS),
    "length": (f"{DESCRIPTIONS}.jsonl",),
    "speaker": (SPEAKERS,),
    "emotion": (LABELS, VOTES),
    "sentiment": (LABELS, VOTES),
}


class Judgement(NamedTuple):
    """What a test says about a clip: one of `PASSED`, `DROPPED`, `NOT_JUDGED`; value and reason."""

    outcome: str
    value: str = ""
    why: str = ""


class Labelled(NamedTuple):
    """A row of `labels.csv`.

    Attributes:
        labels, sentiment: of a description; none, and neutral, where the reply was not read.
        unparsed: the reply that no labels could be read from, or with labels no sentiment.
        description_sha256: of the description, see `labels.description_sha256`.
    """

    labels: tuple[str, ...]
    sentiment: str
    unparsed: str = ""
    description_sha256: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class DataSet:
    """All that the stages have said, by clip; None where a stage has not run.

    Attributes:
        names: of the clips, in order.
        rows: the clips' own CSV file, by name.
        folder: to which the paths in `rows` are relative.
        descriptions, labels, speakers, votes: of the stages.
        cuts: of the lengths of descriptions, by unit.
    """

    names: list[str]
    rows: dict[str, dict[str, str]]
    descriptions: dict[str, Described] | None
    labels: dict[str, Labelled] | None
    speakers: dict[str, Mapping[str, str]] | None
    votes: dict[str, Vote] | None
    cuts: dict[str, Cuts]
    folder: Path


def read_labels(path: Path) -> dict[str, Labelled]:
    """The rows of `labels.csv` by name.

    Raises:
        ReadError: a file that cannot be read, or a sentiment that is none.
    """
    found = {}
    for line, row in csv_rows(read_bytes(path), str(path), COLUMNS_OF_LABELS):
        if row["sentiment"] not in SENTIMENTS:
            raise ReadError(
                f"{path}, line {line}: the sentiment is {row['sentiment']!r}; expected "
                f"{', '.join(SENTIMENTS)}"
            )
        labels = parse_labels(row["labels"])
        rest = (row[column] for column in COLUMNS_OF_LABELS[2:])
        found[row["name"]] = Labelled(labels, *rest)
    return found


def read_data_set(out: Path, table: Path | None, settings: Settings) -> DataSet:
    """All that the stages have left in the folder of a data set.

    Args:
        out: the folder.
        table: the clips' CSV file; without one, the clips are those that have a description.
        settings: for the cuts.

    Raises:
        ReadError: a file that cannot be read.
        CaptionError: no descriptions, or labels of others.
    """

    def found(file: str, read: Any) -> Any:
        return read(out / file) if (out / file).exists() else None

    descriptions = found(f"{DESCRIPTIONS}.jsonl", read_described)
    if table is None and descriptions is None:
        raise CaptionError(f"{out} has no {DESCRIPTIONS}.jsonl; run `caption merge` first")
    labels = found(LABELS, read_labels)
    if other := [
        name
        for name, line in (descriptions or {}).items()
        if name in (labels or {})
        and labels[name].description_sha256 != description_sha256(line["reply"])
    ]:
        raise CaptionError(
            f"{out / LABELS} is of other descriptions of {len(other):,} clips: {listed(other)}; "
            "run `affectgpt caption labels` again"
        )
    rows = read_clip_rows(table) if table else {name: {"name": name} for name in descriptions}
    texts = [line["reply"] for line in (descriptions or {}).values()]
    return DataSet(
        list(rows),
        rows,
        descriptions,
        labels,
        found(SPEAKERS, read_speakers),
        found(VOTES, read_votes),
        fit_cuts(texts, settings.lengths.tails),
        table.parent if table else out,
    )


def check_stages(data: DataSet, out: Path, levels: Sequence[str]) -> None:
    """Refuse levels whose stages have not run, or know none of the clips.

    Raises:
        CaptionError: naming the file and the command that makes it.
    """
    stages = {
        f"{DESCRIPTIONS}.jsonl": data.descriptions,
        LABELS: data.labels,
        SPEAKERS: data.speakers,
        VOTES: data.votes,
    }
    always = (f"{DESCRIPTIONS}.jsonl", LABELS)  # what a training set is made of
    needed = {file: f"the level {lv}" for lv in levels for t in LEVELS[lv] for file in NEEDS[t]}
    for file in dict.fromkeys([*always, *needed]):
        what = needed.get(file, "a training set")
        if stages[file] is None:
            raise CaptionError(
                f"{out / file} is missing, which {what} needs; run `affectgpt {MADE_BY[file]}`"
            )
        if not any(name in stages[file] for name in data.names):
            raise CaptionError(
                f"{out / file} has none of the {len(data.names):,} clips: it names "
                f"{listed(list(stages[file]))}, and they are called {listed(data.names)}"
            )


# --- tests --------------------------------------------------------------------------------------


def judge(data: DataSet, settings: Settings, lexicon: Lexicon) -> dict[str, dict[str, Judgement]]:
    """Every test of every clip, by name and test."""
    judged = {}
    for name in data.names:
        described = (data.descriptions or {}).get(name)
        labelled = (data.labels or {}).get(name)
        vote = (data.votes or {}).get(name)
        judged[name] = {
            "reply": judge_reply(described, labelled),
            "length": judge_length(described, data.cuts),
            "speaker": judge_speaker((data.speakers or {}).get(name), settings.speakers.drop),
            "emotion": judge_emotion(labelled, vote, settings, lexicon),
            "sentiment": judge_sentiment(labelled, vote, settings),
        }
    return judged


def judge_reply(described: Described | None, labelled: Labelled | None) -> Judgement:
    """Whether there is a description at all."""
    if described is None:
        return Judgement(NOT_JUDGED, why="no description")
    finish, text = described["finish"], described["reply"]
    if not text:
        return Judgement(DROPPED, finish, described["why"] or "the reply is empty")
    if finish == "length":
        return Judgement(DROPPED, finish, "the reply was cut off")
    # One that names emotions may as well say what cannot be determined.
    if labelled is not None and not labelled.labels and is_refusal(text):
        return Judgement(DROPPED, finish, "the reply is a refusal")
    return Judgement(PASSED, finish)


def judge_length(described: Described | None, cuts: Mapping[str, Cuts]) -> Judgement:
    """Whether the length of the description is normal."""
    if described is None:
        return Judgement(NOT_JUDGED, why="no description")
    length, unit = measure(described["reply"])
    value = f"{length} {unit}"
    if not length:
        return Judgement(DROPPED, value, "empty")
    if unit not in cuts:
        return Judgement(DROPPED, value, told_of_others(unit, cuts))
    if length < cuts[unit].low:
        return Judgement(DROPPED, value, f"shorter than {cuts[unit].low:.1f} {unit}")
    if length > cuts[unit].high:
        return Judgement(DROPPED, value, f"longer than {cuts[unit].high:.1f} {unit}")
    return Judgement(PASSED, value)


def judge_speaker(row: Mapping[str, str] | None, drop: Sequence[str]) -> Judgement:
    """Whether the person who is seen may be the one who is heard."""
    if row is None:
        return Judgement(NOT_JUDGED, why="no verdict")
    verdict = row["verdict"]
    if verdict in drop:
        return Judgement(DROPPED, verdict, f"{verdict.replace('_', ' ')}, by {row['network']}")
    return Judgement(PASSED, verdict)


def judge_emotion(
    labelled: Labelled | None, vote: Vote | None, settings: Settings, lexicon: Lexicon
) -> Judgement:
    """Whether the labels agree with the crowd's word on the wheels that know both.

    `neutral`, which stands on no wheel, agrees with a description that names nothing, names it,
    or has a neutral sentiment.
    """
    if (missing := _missing(labelled, vote, vote and vote.emotion)) is not None:
        return missing
    if vote.emotion_votes < settings.crowd.least_votes:
        why = f"{vote.emotion_votes} votes for {vote.emotion}"
        return Judgement(DROPPED, vote.emotion, why)
    unread = Judgement(NOT_JUDGED, vote.emotion, UNREAD)
    if labelled.unparsed and not labelled.labels:
        return unread
    if vote.emotion == "neutral":
        fits = not labelled.labels or "neutral" in labelled.labels
        if labelled.unparsed and not fits:  # the sentiment is not known
            return unread
        passed = fits or labelled.sentiment == "neutral"
        value = "neutral"
    elif not labelled.labels:
        return Judgement(DROPPED, vote.emotion, "the description names no emotion")
    else:
        agreeing, known = agreement(labelled.labels, vote.emotion, lexicon)
        if not known:
            return Judgement(NOT_JUDGED, vote.emotion, "on no wheel are both sides known")
        value = f"{vote.emotion}, {agreeing} of {known} wheels"
        passed = {
            "any": agreeing >= 1,
            "majority": 2 * agreeing > known,
            "all": agreeing == known,
        }[settings.crowd.agree]
    if passed:
        return Judgement(PASSED, value)
    shown = ", ".join(labelled.labels) or "none"
    return Judgement(DROPPED, value, f"the description says {shown}")


def agreement(labels: Sequence[str], word: str, lexicon: Lexicon) -> tuple[int, int]:
    """On how many wheels one of the labels is the word's, and how many wheels know both sides."""
    agreeing = known = 0
    for wheel in range(1, WHEELS + 1):
        one = lexicon.label(word, wheel)
        many = {lexicon.label(label, wheel) for label in labels} - {None}
        if one is not None and many:
            known += 1
            agreeing += one in many
    return agreeing, known


def judge_sentiment(labelled: Labelled | None, vote: Vote | None, settings: Settings) -> Judgement:
    """Whether the crowd's sentiment is that of the description."""
    if (missing := _missing(labelled, vote, vote and vote.sentiment)) is not None:
        return missing
    if vote.sentiment_votes < settings.crowd.least_votes:
        why = f"{vote.sentiment_votes} votes for {vote.sentiment}"
        return Judgement(DROPPED, vote.sentiment, why)
    if labelled.unparsed:
        return Judgement(NOT_JUDGED, vote.sentiment, UNREAD)
    if vote.sentiment == labelled.sentiment:
        return Judgement(PASSED, vote.sentiment)
    return Judgement(DROPPED, vote.sentiment, f"the description is {labelled.sentiment}")


def _missing(labelled: Labelled | None, vote: Vote | None, said: str | None) -> Judgement | None:
    if labelled is None:
        return Judgement(NOT_JUDGED, why="no labels")
    if vote is None or not said:
        return Judgement(NOT_JUDGED, why="the crowd did not vote")
    return None


# --- results ------------------------------------------------------------------------------------


def tests_of(levels: Sequence[str]) -> tuple[str, ...]:
    """The tests of these levels, in the order in which they are applied."""
    return tuple(test for level in LEVELS if level in levels for test in LEVELS[level])


def kept_names(judged: Mapping[str, Mapping[str, Judgement]], levels: Sequence[str]) -> list[str]:
    """The clips that passed all tests of the levels."""
    tests = tests_of(levels)
    return [name for name, j in judged.items() if all(j[test].outcome == PASSED for test in tests)]


def filtered_rows(
    judged: Mapping[str, Mapping[str, Judgement]], levels: Sequence[str]
) -> Iterator[dict[str, str]]:
    """The rows of `filtered.csv`."""
    kept = set(kept_names(judged, levels))
    for name, judgements in judged.items():
        row = {"name": name, "kept": "yes" if name in kept else "no"}
        for test, judgement in judgements.items():
            keys = (test, f"{test}_value", f"{test}_why")
            row |= dict(zip(keys, judgement, strict=True))
        yield row


def funnel(
    data: DataSet, judged: Mapping[str, Mapping[str, Judgement]], levels: Sequence[str]
) -> list[dict[str, Any]]:
    """What is left after each test: clips, vocabulary, and what the test dropped, by reason.

    The first stage is all clips, the last one those that are trained on. A clip counts under the
    first test that does not pass it.
    """
    left = list(data.names)

    def stage(test: str, **more: Any) -> dict[str, Any]:
        words = {w for n in left if (row := (data.labels or {}).get(n)) for w in row.labels}
        return {"test": test, "clips": len(left), "labels": len(words), **more}

    stages = [stage("all clips", dropped=0, not_judged=0, reasons={})]
    for test in tests_of(levels):
        outcomes = {name: judged[name][test] for name in left}
        left = [name for name in left if outcomes[name].outcome == PASSED]
        lost = [j for j in outcomes.values() if j.outcome != PASSED]
        reasons = Counter(_kind(test, j) for j in lost)
        not_judged = sum(1 for j in lost if j.outcome == NOT_JUDGED)
        stages.append(
            stage(
                test,
                dropped=len(lost) - not_judged,
                not_judged=not_judged,
                reasons=dict(reasons.most_common()),
            )
        )
    usable, lacking = trainable(data, judged, levels)
    stages.append(
        {
            "test": TRAINED_ON,
            "clips": len(usable),
            "labels": len({word for words in usable.values() for word in words}),
            "dropped": len(left) - len(usable),
            "not_judged": 0,
            "reasons": {f"without {what}": len(names) for what, names in lacking.items()},
        }
    )
    return stages


def _kind(test: str, judgement: Judgement) -> str:
    """A reason that clips have in common."""
    if judgement.outcome == NOT_JUDGED:
        return judgement.why
    if test == "emotion":
        word = judgement.value.partition(",")[0]
        return f"the crowd says {word}"
    if test == "sentiment":
        return f"the crowd says {judgement.value}, {judgement.why}"
    return judgement.why


def draw_funnel(stages: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bars of the clips and the vocabulary after each test, as PNG."""
    figure = drawing.new_figure(8, 0.6 * len(stages) + 1.2)
    panel = figure.subplots()
    names = [stage["test"] for stage in stages]
    clips = [stage["clips"] for stage in stages]
    bars = panel.barh(np.arange(len(stages)), clips, color="tab:blue")
    texts = [f"{s['clips']:,} clips, {s['labels']:,} labels" for s in stages]
    panel.bar_label(bars, texts, padding=4)
    panel.set_yticks(np.arange(len(stages)), names)
    panel.invert_yaxis()
    panel.set_xlim(0, 1.35 * max(*clips, 1))
    panel.set_xlabel("clips that are left")
    drawing.save_png(figure, path)


def trainable(
    data: DataSet, judged: Mapping[str, Mapping[str, Judgement]], levels: Sequence[str]
) -> tuple[dict[str, tuple[str, ...]], dict[str, list[str]]]:
    """Of clips that are kept, the labels of those that can be trained on; the others by their lack.

    A description that names no emotion, which agrees with a crowd that says `neutral`, has that
    label. Without the level `low`, replies that failed are kept, which teach neither text nor
    labels.
    """
    lacking: dict[str, list[str]] = {}
    usable = {}
    for name in kept_names(judged, levels):
        labels = data.labels[name].labels if name in data.labels else ()
        if name not in data.descriptions or not data.descriptions[name]["reply"]:
            lacking.setdefault("a description", []).append(name)
        elif labels:
            usable[name] = labels
        elif "emotion" in levels and judged[name]["reply"].outcome == PASSED:
            usable[name] = ("neutral",)  # no other word of the crowd agrees with no label
        else:
            lacking.setdefault("a label", []).append(name)
    return usable, lacking


def plus_rows(
    data: DataSet, usable: Mapping[str, Sequence[str]]
) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows of the training set, see `trainable`, in the layout that `extract` reads.

    Columns of the clips' own CSV file stay, but for labels and description, which are the models'.
    Paths are relative to that file's folder still.
    """
    own = list(dict.fromkeys(column for row in data.rows.values() for column in row))
    columns = list(dict.fromkeys([*own, "labels", "description"]))
    rows = [
        data.rows[name]
        | {
            "labels": f"[{', '.join(labels)}]",
            "description": data.descriptions[name]["reply"],
        }
        for name, labels in usable.items()
    ]
    return columns, rows


def _files_from(
    folder: Path, to: Path, rows: Sequence[Mapping[str, str]]
) -> Iterator[dict[str, str]]:
    """Rows whose relative paths lead from another folder to the same files."""
    # Of real folders, since `..` leads out of what a link points to.
    where = os.path.relpath(os.path.realpath(folder), os.path.realpath(to))
    for row in rows:
        files = {c: path for c in MEDIA_COLUMNS if (path := row.get(c, "").strip())}
        yield row | {c: Path(where, path).as_posix() for c, path in files.items()}


def write_results(
    data: DataSet,
    judged: Mapping[str, Mapping[str, Judgement]],
    levels: Sequence[str],
    to: Path,
    about: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Write `filtered.csv`, `plus.csv`, `funnel.json` and `funnel.png`; returns the funnel.

    Args:
        data, judged, levels: what is filtered, by what.
        to: the folder.
        about: of the settings, for `funnel.json`.

    Raises:
        OSError: a file cannot be written.
    """
    usable, _ = trainable(data, judged, levels)
    stages = funnel(data, judged, levels)
    write_csv(to / FILTERED, COLUMNS, filtered_rows(judged, levels))
    plus = plus_rows(data, usable)
    write_csv(to / PLUS, plus[0], _files_from(data.folder, to, plus[1]))
    # By which the card knows whether it is about the same.
    about = {"levels": list(levels), **about, "plus_sha256": json_sha256(plus), "funnel": stages}
    write_json(to / f"{FUNNEL}.json", about)
    draw_funnel(stages, to / f"{FUNNEL}.png")
    return stages


def write_training_records(
    data: DataSet,
    usable: Mapping[str, tuple[str, ...]],
    source: Path,
    to: Path,
    made: Mapping[str, str],
) -> tuple[int, list[str]]:
    """Records of the clips that are kept, with features of an extraction and the new annotations.

    How they were extracted, where that is known, goes with them.

    Args:
        data: the data set.
        usable: labels of the clips, see `trainable`.
        source: records of the clips.
        to: the record directory to write.
        made: of what, see `made_of`.

    Returns:
        How many there are, and the names of clips that are kept but have no record.

    Raises:
        RecordError: no clip that is kept has a record, or a directory that cannot be used.
    """

    def annotated(record: Record) -> Record:
        return dataclasses.replace(
            record,
            description=data.descriptions[record.name]["reply"],
            labels=usable[record.name],
        )

    return copy_records(source, to, list(usable), made, annotated)


def made_of(source: Path, **more: Any) -> dict[str, str]:
    """Hashes of what records are made of that are written from others, as their manifest has them.

    Args:
        source: the others.
        more: what else decides what is written.

    Raises:
        ReadError, OSError: no records there.
    """
    hashes = {what: json_sha256(value) for what, value in more.items()}
    return {"source": json_sha256(dataclasses.asdict(read_manifest(source))), **hashes}


def are_written(to: Path, made: Mapping[str, str]) -> bool:
    """Whether a directory holds the records that are made of that.

    Raises:
        RecordError: it holds others.
    """
    if not (to / MANIFEST_FILE).exists():
        return False
    there = read_manifest(to).extra.get(MADE_OF)
    if isinstance(there, dict) and made.items() <= there.items():
        return True
    raise RecordError(f"{to} already holds other records; delete it or write elsewhere")


def copy_records(
    source: Path,
    to: Path,
    kept: Sequence[str],
    made: Mapping[str, str],
    change: Callable[[Record], Record] = lambda record: record,
) -> tuple[int, list[str]]:
    """Write some of the records of a directory, with what is known of their extraction.

    Those that are there already stay as they are.

    Args:
        source: the records.
        to: the record directory to write.
        kept: names of clips.
        made: of what, see `made_of`.
        change: makes of each record the one that is written.

    Returns, raises: as `write_training_records`.
    """
    records = RecordDataset(source)
    wanted = set(kept)
    numbers = [i for i, entry in enumerate(records.index) if entry.name in wanted]
    lacking = sorted(wanted - {records.index[i].name for i in numbers})
    if not numbers:
        raise RecordError(
            f"{source} has no record of the {len(kept):,} clips that are kept: its clips are "
            f"called {listed([e.name for e in records.index])}"
        )
    if are_written(to, made):
        return len(numbers), lacking
    encoders = {name: facts["encoder"] for name, facts in records.manifest.features.items()}
    # What describes and serves clips like these, and what looks for them elsewhere, reads on.
    copy_report(source, to, {records.index[i].name for i in numbers})
    if (places := source / BLOCKS / PLACES).is_file():
        write_text(to / BLOCKS / PLACES, places.read_text(encoding="utf-8"))
    extra = records.manifest.extra | {MADE_OF: dict(made)}
    if "face arrays" in (how := extra.get(EXTRACTION, {})):
        faces = sum("face" in records.index[i].present for i in numbers)
        extra[EXTRACTION] = how | {"face arrays": min(how["face arrays"], faces)}
    write_records(to, (change(records[i]) for i in numbers), encoders=encoders, extra=extra)
    return len(numbers), lacking
