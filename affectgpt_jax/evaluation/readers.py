"""Read predictions and truth from files, clip by clip; nothing is dropped silently."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from affectgpt_jax.common.errors import ReadError
from affectgpt_jax.common.files import read_bytes
from affectgpt_jax.common.json import json_lines
from affectgpt_jax.common.labels import PREFERENCES, parse_labels, read_labels
from affectgpt_jax.common.tables import csv_rows
from affectgpt_jax.common.text import listed, shorten
from affectgpt_jax.evaluation.lexicon import normalise
from affectgpt_jax.evaluation.npz import npz_values

# Where a prediction may stand, the first that is present counts.
PREDICTION_KEYS = {
    "fine": ("labels", "openset", "text"),
    "basic": ("labels", "openset", "text"),
    "sentiment": ("sentiment", "labels", "openset", "text"),
    "words": ("labels", "openset", "text"),
    "preference": ("preference", "preferred"),
}
TRUTH_KEYS = {
    "fine": "openset",
    "basic": "emotion",
    "sentiment": "valence",
    "words": "emotion",
    "preference": "preference",
}
MELD_COLUMNS = ("Dialogue_ID", "Utterance_ID", "Emotion")
# Test splits of the release's label files, and the emotions that their numbers stand for.
SPLITS = {
    "test_corpus": ("anger", "joy", "sadness", "neutral", "disgust", "fear", "surprise"),
    "test1_corpus": (),
    "whole_corpus": ("happy", "sad", "neutral", "anger"),
}
# What `pair` finds of clips that it was told to score as empty.
NO_PREDICTION = "without a prediction, scored as empty"


@dataclasses.dataclass(frozen=True)
class Finding:
    """A remark about some clips that affects how a score is read.

    Attributes:
        what: of the clips, after their number: "with an empty prediction".
        names: the clips.
    """

    what: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"{count(self.names)} {self.what}: {listed(self.names)}"


@dataclasses.dataclass(frozen=True)
class Table:
    """One value per clip, as a file has them.

    Attributes:
        where: the file, for messages.
        names: of the clips, each once, in the order of the file.
        values: labels (list of words), a sentiment or emotion (word), or a valence (number).
        findings: what is remarkable about some of them.
    """

    where: str
    names: tuple[str, ...]
    values: tuple[Any, ...]
    findings: tuple[Finding, ...]


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Prediction and truth of each clip that has a truth, in the order of the truth file."""

    names: tuple[str, ...]
    predictions: list[Any]
    truth: list[Any]
    findings: tuple[Finding, ...]


def count(names: Sequence[str]) -> str:
    """So many clips."""
    return f"{len(names)} clip{'' if len(names) == 1 else 's'}"


def read_predictions(path: str | Path, task: str, allow_pickle: bool = False) -> Table:
    """Read the predictions of a system for each clip.

    Args:
        path: a JSONL file (one object a line with `name` and `labels`, `openset` or `text`; for
            the sentiment task `sentiment` first) or a CSV file with such columns, where a text is
            read as a list by `read_labels`; or an npz archive of the release (`*-openset.npz`,
            `*-openset-sentiment.npz`) with arrays `filenames` and `fileitems`, whose texts are read
            by the release's own rule, `parse_labels`.
        task: fine, basic, sentiment, words, or preference, whose column is `preference`.
        allow_pickle: read archives whose arrays are pickled objects.

    Returns:
        Label lists; words for sentiment and preference.

    Raises:
        ReadError: a file that is not so, or has a clip twice.
    """
    path = Path(path)
    data, where = read_bytes(path), str(path)
    match path.suffix.lower():
        case ".jsonl":
            records = _choose_key(json_lines(data, where), PREDICTION_KEYS[task], where)
        case ".csv":
            records = _choose_key(csv_rows(data, where, ("name",)), PREDICTION_KEYS[task], where)
        case ".npz":
            records = _prediction_archive(data, where, allow_pickle)
        case _:
            raise _unknown_suffix(where)
    if path.suffix.lower() == ".npz":
        records = ((place, name, _by_release(value)) for place, name, value in records)
    return _table(where, records, _sentiment if task in ("sentiment", "preference") else _labels)


def read_texts(path: str | Path) -> dict[str, str]:
    """Read the model's text about each clip, the field `text` of a JSONL prediction file.

    Other files, and lines without a text, have none.

    Raises:
        ReadError: a file that cannot be read, or is not JSONL though its name says so.
    """
    path = Path(path)
    if path.suffix.lower() != ".jsonl":
        return {}
    return {
        record["name"].strip(): record["text"]
        for _, record in json_lines(read_bytes(path), str(path))
        if isinstance(record.get("name"), str) and isinstance(record.get("text"), str)
    }


def read_truth(
    path: str | Path, task: str, allow_pickle: bool = False, split: str | None = None
) -> Table:
    """Read the true labels of each clip.

    Args:
        path: a CSV or JSONL file with `name` and, by task, `openset` (fine), `emotion` (basic and
            words), `valence` (sentiment) or `preference`, as MER2026's `track3_emoprefer.csv`
            has it; MELD's public CSV, whose clips are called
            `dia{D}_utt{U}`; or a label archive of the release, whose test split is read.
        task: fine, basic, sentiment, words or preference.
        allow_pickle: read the release's label archives, which are pickled dicts.
        split: the array of such an archive to read; default: the first test split that it has.

    Returns:
        Label lists for fine, words for basic, words and preference, finite numbers for sentiment.
        Preferences are of pairs of descriptions, of which a clip may have several: see
        `number_repeats`.

    Raises:
        ReadError: a file that is not so, has a clip twice, or a value that cannot be understood.
    """
    path = Path(path)
    data, where, key = read_bytes(path), str(path), TRUTH_KEYS[task]
    match path.suffix.lower():
        case ".jsonl":
            records = _choose_key(json_lines(data, where), (key,), where)
        case ".csv":
            records = _truth_csv(data, where, key)
        case ".npz":
            records = _truth_archive(data, where, task, allow_pickle, split)
        case _:
            raise _unknown_suffix(where)
    parse = _PARSE[TRUTH_KEYS[task]]
    return _table(where, records, parse, several=task == "preference")


def number_repeats(names: Sequence[str]) -> list[str]:
    """Names of rows of which a clip may have several: NAME, then NAME#2, NAME#3 and so on."""
    times: Counter[str] = Counter()
    found = []
    for name in names:
        times[name] += 1
        found.append(name if times[name] == 1 else f"{name}#{times[name]}")
    return found


def clip_of(name: str) -> str:
    """The clip of a row that `number_repeats` has named."""
    return re.sub("#[0-9]+$", "", name)


def pair(predictions: Table, truth: Table, missing: str = "error") -> Pairs:
    """Pair predictions with the truth.

    Args:
        predictions: a prediction per clip; more clips than the truth has are reported.
        truth: the clips that count.
        missing: "error", or "empty" for an empty prediction where a clip has none.

    Raises:
        ReadError: no clip in common, or a clip without a prediction.
    """
    predicted = dict(zip(predictions.names, predictions.values, strict=True))
    known = set(truth.names)
    lacking = tuple(name for name in truth.names if name not in predicted)
    if len(lacking) == len(known):
        raise ReadError(
            f"{predictions.where} and {truth.where} have no clip in common: one has "
            f"{listed(predictions.names[:1])}, the other {listed(truth.names[:1])}"
        )
    if lacking and missing == "error":
        raise ReadError(
            f"{predictions.where} has no prediction of {count(lacking)} of {truth.where} "
            f"({listed(lacking)}); add them, or score them as empty with --missing=empty"
        )
    nothing = "" if isinstance(predictions.values[0], str) else []
    extra = tuple(name for name in predictions.names if name not in known)
    empty = tuple(name for name in truth.names if name in predicted and not predicted[name])
    untrue = tuple(
        name for name, value in zip(truth.names, truth.values, strict=True) if value == []
    )
    findings = (
        *predictions.findings,
        *truth.findings,
        Finding(NO_PREDICTION, lacking),
        Finding("predicted but not in the truth, left out", extra),
        Finding("with an empty prediction", empty),
        Finding("with an empty truth, not scored", untrue),
    )
    return Pairs(
        truth.names,
        [predicted.get(name, nothing) for name in truth.names],
        list(truth.values),
        tuple(finding for finding in findings if finding.names),
    )


# A clip as a file has it: where it stands, its name, its value before parsing.
Record = tuple[str, Any, Any]


def _unknown_suffix(where: str) -> ReadError:
    return ReadError(f"{where}: expected a file that ends in .jsonl, .csv or .npz")


def _choose_key(
    rows: Iterator[tuple[int, dict[str, Any]]], keys: Sequence[str], where: str
) -> Iterator[Record]:
    """Records with the first of `keys` that the first row has; every row must have it."""
    chosen = None
    for line, row in rows:
        place = f"{where}, line {line}"
        chosen = chosen or next((key for key in keys if key in row), None)
        for key in ("name", chosen):
            if key not in row:
                expected = repr(key) if key else " or ".join(map(repr, keys))
                raise ReadError(f"{place}: expected {expected} beside {shorten(list(row))}")
        yield place, row["name"], row[chosen]


def _truth_csv(data: bytes, where: str, key: str) -> Iterator[Record]:
    rows = csv_rows(data, where)
    for line, row in rows:
        place = f"{where}, line {line}"
        if key == "emotion" and all(column in row for column in MELD_COLUMNS):
            dialogue, utterance = row["Dialogue_ID"].strip(), row["Utterance_ID"].strip()
            if not (re.fullmatch("[0-9]{1,9}", dialogue) and re.fullmatch("[0-9]{1,9}", utterance)):
                raise ReadError(
                    f"{place}: Dialogue_ID {shorten(dialogue)} and Utterance_ID "
                    f"{shorten(utterance)} are not both whole numbers"
                )
            yield place, f"dia{int(dialogue)}_utt{int(utterance)}", row["Emotion"]
        else:
            yield from _choose_key(iter([(line, row)]), (key,), where)


def _prediction_archive(data: bytes, where: str, allow_pickle: bool) -> Iterator[Record]:
    arrays = npz_values(data, where, ("filenames", "fileitems"), allow_pickle)
    if len(arrays) != 2:
        raise ReadError(
            f"{where}: expected arrays filenames and fileitems, found {list(arrays) or 'neither'}; "
            "descriptions (name2reason) must go through label extraction first"
        )
    names, items = arrays["filenames"], arrays["fileitems"]
    if len(names) != len(items):
        raise ReadError(f"{where}: {len(names)} filenames, but {len(items)} fileitems")
    for number, (name, item) in enumerate(zip(names, items)):
        yield f"{where}, item {number}", name, item


def _truth_archive(
    data: bytes, where: str, task: str, allow_pickle: bool, only: str | None
) -> Iterator[Record]:
    """The test split of a label file: a dict from name to `{"emo": ..., "val": ...}`."""
    if task in ("fine", "preference"):
        raise ReadError(f"{where}: the release's label archives hold no such truth; use its CSV")
    wanted = (only,) if only else tuple(SPLITS)
    arrays = npz_values(data, where, wanted, allow_pickle)
    split = next((name for name in wanted if name in arrays), None)
    if split is None:
        raise ReadError(f"{where}: no array {' or '.join(wanted)}, which would hold the test split")
    corpus = arrays[split][0] if len(arrays[split]) == 1 else None
    if not isinstance(corpus, dict):
        raise ReadError(f"{where}, {split}: expected a dict of labels by clip name")
    for name, labels in corpus.items():
        place = f"{where}, {split}, {shorten(name)}"
        # IEMOCAP is tested on its fifth session, whose number stands in the name (Ses05F_...).
        if split == "whole_corpus" and str(name)[4:5] != "5":
            continue
        key = "emo" if TRUTH_KEYS[task] == "emotion" else "val"
        if not isinstance(labels, dict) or key not in labels:
            raise ReadError(f"{place}: expected a dict with {key!r}, found {shorten(labels)}")
        value = labels[key]
        if key == "emo" and type(value) is int:
            value = _numbered_emotion(value, labels, SPLITS[split], place)
        yield place, name, value


def _numbered_emotion(number: int, labels: dict, emotions: Sequence[str], place: str) -> str:
    # Sets with a valence have the same emotion number, a stopgap, on every clip.
    if "val" in labels:
        raise ReadError(f"{place}: a set with valences names no emotions; use --task=sentiment")
    if not 0 <= number < len(emotions):
        raise ReadError(f"{place}: emotion number {number} is none of {len(emotions)}")
    return emotions[number]


def _table(
    where: str, records: Iterator[Record], parse: Callable[[Any], Any], several: bool = False
) -> Table:
    """Parse every record, so that a message can say how many are wrong; of `several` records of a
    clip, `number_repeats` names the others.

    Raises:
        ReadError: no records, one without a name, names or values that cannot be used.
    """
    names: list[str] = []
    values: list[Any] = []
    wrong: list[str] = []
    example = ""
    for place, name, value in records:
        if not isinstance(name, str) or not name.strip():
            raise ReadError(f"{place}: expected the name of a clip, found {shorten(name)}")
        names.append(name.strip())
        try:
            values.append(parse(value))
        except ValueError as error:
            wrong.append(names[-1])
            example = example or f"{place}: {error}"
    if not names:
        raise ReadError(f"{where} has no clips")
    if wrong:
        raise ReadError(f"{example}; so it is with {count(wrong)} ({listed(wrong)})")
    findings: tuple[Finding, ...] = ()
    if several:
        numbered = number_repeats(names)
        again = tuple(name for name, was in zip(numbered, names, strict=True) if name != was)
        findings = (Finding("with a row already, called NAME#2, ...", again),) if again else ()
        names = numbered
    if repeated := [name for name, times in Counter(names).items() if times > 1]:
        raise ReadError(
            f"{where} has {count(repeated)} more than once ({listed(repeated)}); keep one of each"
        )
    return Table(where, tuple(names), tuple(values), findings)


def _by_release(value: Any) -> Any:
    """A text of the release's archives as the list that it is there."""
    return parse_labels(value) if isinstance(value, str) else value


def _labels(value: Any) -> list[str]:
    if isinstance(value, str):
        return read_labels(value)
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        return [word for word in map(normalise, value) if word]
    raise ValueError(f"expected a list of words, found {shorten(value)}")


def _sentiment(value: Any) -> str:
    """One word; several are kept together, and so are none of positive and negative."""
    return ", ".join(_labels(value))


def _emotion(value: Any) -> str:
    if isinstance(value, str) and value.strip():
        return normalise(value)
    raise ValueError(f"expected an emotion, found {shorten(value)}")


def _valence(value: Any) -> float:
    number = math.nan
    # float() would take True, and "1_5" for 15.
    if type(value) in (int, float) or (isinstance(value, str) and "_" not in value):
        with contextlib.suppress(ValueError, OverflowError):
            number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"expected a finite valence, found {shorten(value)}")
    return number


def _preference(value: Any) -> str:
    word = normalise(value) if isinstance(value, str) else ""
    if word not in PREFERENCES:
        raise ValueError(f"expected one of {', '.join(PREFERENCES)}, found {shorten(value)}")
    return word


_PARSE = {
    "openset": _labels,
    "emotion": _emotion,
    "valence": _valence,
    "preference": _preference,
}
