"""Corpora of a crowd out of record directories, and which clips two directories share."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import importlib.resources
import sys
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from affectgpt_jax.common.errors import UserError
from affectgpt_jax.common.files import read_bytes
from affectgpt_jax.common.progress import Counter
from affectgpt_jax.common.tables import csv_rows
from affectgpt_jax.common.text import listed
from affectgpt_jax.data.records import IndexEntry, RecordDataset
from affectgpt_jax.evaluation.lexicon import load_lexicon

from ..report import REPORT_FILE
from .members import Corpus, Inputs

KINDS = ("emotion", "valence")
FEATURES = ("face", "audio")
NAMES_SHOWN = 20


class CrowdError(UserError, ValueError):
    """Corpora, or a crowd, that cannot be used."""


class Marks(TypedDict):
    """What tells clips from others, "" for a clip without such a mark.

    `file` is the hash in extraction.csv, where there is one; `features` has, by feature and
    encoder, a hash of its mean, unless several clips here have the same.
    """

    name: list[str]
    file: list[str]
    features: dict[str, list[str]]


@dataclasses.dataclass(frozen=True, eq=False)
class Clips:
    """The clips of a record directory.

    Attributes:
        directory: where they are.
        entries: their annotations.
        features: by feature of `FEATURES` the mean over time, float16 `[N, d]`, zeros where absent.
        encoders: by feature, what made it.
        marks: what tells each clip from others.
    """

    directory: Path
    entries: list[IndexEntry]
    features: dict[str, np.ndarray]
    encoders: dict[str, str]
    marks: Marks


def read_clips(directory: Path, what: str) -> Clips:
    """Read a record directory.

    Args:
        directory: the records.
        what: they are, for the progress line.

    Raises:
        RecordError, ReadError: no records, or damaged ones.
        CrowdError: none of `FEATURES` in them.
    """
    dataset = RecordDataset(directory)
    known = {f: dataset.manifest.features[f] for f in FEATURES if f in dataset.manifest.features}
    if not known:
        raise CrowdError(f"{directory} has no feature {' or '.join(FEATURES)} for a crowd to read")
    features = {f: np.zeros((len(dataset), m["width"]), np.float16) for f, m in known.items()}
    with Counter("clips", what, stream=sys.stderr) as count:
        for i in range(len(dataset)):
            for feature, values in dataset[i].features.items():
                if feature in features:
                    features[feature][i] = values.astype(np.float32).mean(axis=0)
            count(i + 1, len(dataset))
    files = file_hashes(directory)
    encoders = {feature: facts["encoder"] for feature, facts in known.items()}
    marks = Marks(
        name=[entry.name for entry in dataset.index],
        file=[files.get(entry.name, "") for entry in dataset.index],
        features={
            f"{feature} of {encoders[feature]}": _digests(array)
            for feature, array in features.items()
        },
    )
    return Clips(directory, list(dataset.index), features, encoders, marks)


def file_hashes(directory: Path) -> dict[str, str]:
    """By clip, the hash of its files, as extraction.csv beside records has it; else nothing."""
    path = directory / REPORT_FILE
    if not path.is_file():
        return {}
    rows = csv_rows(read_bytes(path), str(path), ("name", "sha256"))
    return {row["name"]: row["sha256"] for _, row in rows}


def _digests(array: np.ndarray) -> list[str]:
    """A hash of each row, "" where it tells no clip from others: of zeros, or as of silence."""
    found = [hashlib.sha256(row.tobytes()).hexdigest()[:32] if row.any() else "" for row in array]
    times = collections.Counter(found)
    return [digest if times[digest] == 1 else "" for digest in found]


def marks_of(marks: Marks, names: Collection[str]) -> Marks:
    """The marks of these clips alone."""
    places = [i for i, name in enumerate(marks["name"]) if name in names]

    def taken(values: Sequence[str]) -> list[str]:
        return [values[i] for i in places]

    features = {what: taken(values) for what, values in marks["features"].items()}
    return Marks(name=taken(marks["name"]), file=taken(marks["file"]), features=features)


def make_corpus(
    name: str, clips: Clips, kinds: Sequence[str], text: np.ndarray | None, left_out: set[str]
) -> Corpus:
    """A corpus of the clips that have a feature and a label of one of these kinds.

    Args:
        name: of the corpus.
        clips: its records.
        kinds: of `KINDS`.
        text: a vector of each clip's subtitle, `[N, d]`; None for none.
        left_out: names of clips that are not to be learned.

    Raises:
        CrowdError: no clip has a label of one of the kinds, a class that the lexicon does not know,
            or a valence without a range.
    """
    emotion = [canonical(e.emotion) if "emotion" in kinds else "" for e in clips.entries]
    words = tuple(sorted({word for word in emotion if word}))
    valence = np.full(len(clips.entries), np.nan, np.float32)
    if "valence" in kinds:
        for i, entry in enumerate(clips.entries):
            if entry.valence is not None:
                valence[i] = _scaled(entry, clips.directory)
    for kind, there in (("emotion", bool(words)), ("valence", np.isfinite(valence).any())):
        if kind in kinds and not there:
            raise CrowdError(f"{clips.directory}: no clip has the label {kind!r}")
    unknown = [w for w in words if w not in canonical_words() and w not in load_lexicon()]
    if unknown:
        raise CrowdError(
            f"{clips.directory}: the lexicon does not know the classes {listed(unknown)}; write "
            "them in other words"
        )
    arrays = clips.features | ({} if text is None else {"text": text})
    there = np.any([array.any(axis=1) for array in arrays.values()], axis=0)
    used = [
        i
        for i, entry in enumerate(clips.entries)
        if there[i] and (emotion[i] or np.isfinite(valence[i])) and entry.name not in left_out
    ]
    return Corpus(
        name,
        Inputs([clips.entries[i].name for i in used], {n: a[used] for n, a in arrays.items()}),
        words,
        np.array([words.index(emotion[i]) if emotion[i] else -1 for i in used], np.int32),
        valence[used],
    )


def _scaled(entry: IndexEntry, directory: Path) -> float:
    """The valence on a scale of -1 to 1."""
    if len(entry.valence_range) != 2:
        raise CrowdError(f"{directory}: {entry.name!r} has a valence, but no valence_range")
    low, high = entry.valence_range
    return 2 * (entry.valence - low) / (high - low) - 1


def canonical_words() -> dict[str, str]:
    """The canonical word of every spelling in words.toml."""
    text = importlib.resources.files(__package__).joinpath("words.toml").read_text("utf-8")
    table = tomllib.loads(text)
    return {spelling: word for word, spellings in table.items() for spelling in [word, *spellings]}


def canonical(word: str) -> str:
    """The canonical form of a class; a word that words.toml does not have stays as it is."""
    word = word.strip().lower()
    return canonical_words().get(word, word)


def _in_common(a: Marks, b: Marks) -> dict[str, list[tuple[Sequence[str], Sequence[str]]]]:
    """By kind of mark, what both sides have: marks of `a` and of `b`."""
    features = [(own, b["features"][w]) for w, own in a["features"].items() if w in b["features"]]
    return {
        "file": [(a["file"], b["file"])],
        "features": features,
        "name": [(a["name"], b["name"])],
    }


def compared_by(a: Marks, b: Marks) -> list[str]:
    """What clips of two directories can be compared by, beside their names."""
    features = [w for w, own in a["features"].items() if any(own) and any(b["features"].get(w, ()))]
    return [*(["files"] if any(a["file"]) and any(b["file"]) else []), *features]


def shared(a: Marks, b: Marks) -> dict[str, list[str]]:
    """By kind of mark, the names in `a` of clips that have it in common with one of `b`.

    A clip with the same file is the same, and so is one with the same mean of any feature by the
    same encoder; one with the same name only may be another.
    """
    found = {}
    for kind, pairs in _in_common(a, b).items():
        same: set[int] = set()
        for mine, theirs in pairs:
            there = set(theirs) - {""}
            same.update(i for i, mark in enumerate(mine) if mark in there)
        if same:
            found[kind] = [a["name"][i] for i in sorted(same)]
    return found


def told_apart(a: Marks, b: Marks) -> set[str]:
    """Names that clips of both have, of which a mark says that they are others."""
    there = {name: i for i, name in enumerate(b["name"])}
    pairs = [pair for kind, found in _in_common(a, b).items() if kind != "name" for pair in found]
    return {
        name
        for i, name in enumerate(a["name"])
        if (j := there.get(name)) is not None
        and any(mine[i] and theirs[j] and mine[i] != theirs[j] for mine, theirs in pairs)
    }


def same_clips(found: Mapping[str, Sequence[str]]) -> set[str]:
    """Of what `shared` found, the clips that are the same by their content."""
    return {name for kind, names in found.items() if kind != "name" for name in names}


def leak(a: str, b: str, found: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """Rows of a report about the clips that `a` shares with `b`."""
    return [
        {"in": a, "and": b, "same": kind, "clips": len(names), "names": list(names[:NAMES_SHOWN])}
        for kind, names in found.items()
    ]
