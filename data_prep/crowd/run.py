"""Train a crowd on record directories, and have it vote on another.

A crowd is a directory: for each corpus NAME.safetensors with the members' parameters and NAME.json
about them and their clips; `members.json` and `report.md` about all.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.resources
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from affectgpt_jax.common.files import atomic_write, sha256_of, write_text
from affectgpt_jax.common.identity import json_sha256
from affectgpt_jax.common.json import read_json, write_json
from affectgpt_jax.common.progress import Counter
from affectgpt_jax.common.text import brief, shorten
from affectgpt_jax.evaluation.markup import escape_markdown

from . import members
from .corpora import (
    KINDS,
    Clips,
    CrowdError,
    Marks,
    compared_by,
    leak,
    make_corpus,
    marks_of,
    read_clips,
    same_clips,
    shared,
)
from .members import Corpus, Group, Inputs, Settings
from .text import TextEncoder
from .votes import Ballot, Vote, count, write_votes

MEMBERS_FILE, REPORT_FILE = "members.json", "report.md"
# To be raised with every change of this code that changes members.
VERSION = 2

Say = Callable[[str], None]


class _About(TypedDict):
    """NAME.json: the members of a corpus, and its clips."""

    identity: str
    sha256: str
    classes: list[str]
    valence: bool
    clips: int
    majority: float | None
    hidden: list[int]
    epochs: list[int]
    scores: list[float]
    marks: Marks


class _Facts(TypedDict):
    """What members.json says of a corpus."""

    name: str
    classes: list[str]
    valence: bool
    clips: int
    majority: float | None
    members: int
    score: float
    score_sd: float


_Leak = TypedDict("_Leak", {"in": str, "and": str, "same": str, "clips": int})


class _Compared(TypedDict):
    """What clips of a corpus or directory could be compared with those of another by."""

    clips: str
    against: str
    by: list[str]


class _Leaks(TypedDict):
    left_out: dict[str, int]
    found: list[_Leak]
    compared: list[_Compared]


class Summary(TypedDict):
    """members.json."""

    encoders: dict[str, tuple[str, int]]
    corpora: list[_Facts]
    leaks: _Leaks


def read_summary(crowd: Path) -> Summary:
    """What a crowd is, of its members.json.

    Raises:
        CrowdError: no crowd, or one of another form.
    """
    advice = "name a directory that `affectgpt crowd train` wrote"
    summary = read_json(crowd / MEMBERS_FILE, Summary, error=CrowdError, advice=advice)
    for facts in summary["corpora"]:
        _check_name(facts["name"])
    return summary


def _read_about(crowd: Path, name: str) -> _About:
    advice = "train the crowd again"
    return read_json(crowd / f"{name}.json", _About, error=CrowdError, advice=advice)


def _check_name(name: str) -> None:
    if not name or name != os.path.basename(name) or name.startswith("."):
        raise CrowdError(f"{shorten(name)} cannot be a corpus: it becomes the name of a file")
    if f"{name}.json" == MEMBERS_FILE:
        raise CrowdError(f"{name!r} cannot be a corpus: {MEMBERS_FILE} is about all of them")


def shipped_base() -> Path:
    """The base that comes with the package."""
    return Path(str(importlib.resources.files("affectgpt_jax") / "assets" / "tiny_base"))


def train(
    sets: Mapping[str, Path],
    out: Path,
    *,
    heads: Mapping[str, Sequence[str]],
    text: bool | Path = True,
    against: Sequence[Path] = (),
    say: Say = print,
    **settings: Any,
) -> None:
    """Train a crowd; a corpus that is finished under the same settings is kept.

    Args:
        sets: a record directory with human labels for each corpus.
        out: the crowd's directory.
        heads: which of `KINDS` each corpus is to teach.
        text: whether subtitles are read, or the base to read them with instead of the shipped one.
        against: record directories whose clips must not be learned, such as test sets and the clips
            to vote on: a clip with the same file or features is left out, and told of.
        say: prints a line.
        settings: fields of `Settings`.

    Raises:
        CrowdError: a corpus without labels, too small, or with other features than the others.
    """
    settings = Settings(**settings | {"hidden": tuple(settings.get("hidden", Settings.hidden))})
    check(sets, heads, settings)
    encoder = TextEncoder(text if isinstance(text, Path) else shipped_base()) if text else None
    clips = {name: read_clips(Path(place), name) for name, place in sets.items()}
    others = {str(place): read_clips(Path(place), f"{place}").marks for place in against}
    encoders = _same_encoders(clips, encoder)
    leaks, left_out, compared = _leaks({n: c.marks for n, c in clips.items()}, others)
    for row in compared:
        say(_told_how(row))
    finished = {}
    for name, found in clips.items():
        vectors = encoder([e.subtitle for e in found.entries]) if encoder else None
        corpus = make_corpus(name, found, heads[name], vectors, left_out[name])
        marks = marks_of(found.marks, set(corpus.inputs.names))
        finished[name] = _trained(corpus, out, encoders, settings, marks, say)
    summary = {
        "settings": dataclasses.asdict(settings),
        "encoders": encoders,
        "corpora": [_facts(name, about) for name, about in finished.items()],
        "leaks": {
            "left_out": {name: len(names) for name, names in left_out.items() if names},
            "found": leaks,
            "compared": compared,
        },
    }
    write_json(out / MEMBERS_FILE, summary)
    write_text(out / REPORT_FILE, report(summary))
    total = sum(len(about["scores"]) for about in finished.values())
    say(f"{out}: {len(finished)} corpora, {total} members")


def check(sets: Mapping[str, Path], heads: Mapping[str, Sequence[str]], settings: Settings) -> None:
    """What can be known to be wrong before anything is read.

    Raises:
        CrowdError: no corpus, a name that is no file name, a head that is none, impossible numbers.
    """
    if not sets:
        raise CrowdError("a crowd needs a corpus with human labels at least")
    for name in sets:
        _check_name(name)
        kinds = heads.get(name, ())
        if not kinds or set(kinds) - set(KINDS):
            raise CrowdError(
                f"the corpus {name} is to teach {', '.join(kinds) or 'nothing'}; expected "
                f"{' or '.join(KINDS)}, or both"
            )
    least = {"folds": 2, "seeds": 1, "epochs": 1, "batch_size": 1, "patience": 1}
    for field, lowest in least.items():
        if (value := getattr(settings, field)) < lowest:
            raise CrowdError(f"{field} is {value}; expected {lowest} or more")
    if not settings.hidden or min(settings.hidden) < 1:
        raise CrowdError(f"hidden is {list(settings.hidden)}; expected widths of 1 or more")


def _same_encoders(clips: Mapping[str, Clips], text: TextEncoder | None) -> dict[str, Any]:
    """Encoder and width of each modality, which all corpora must share."""
    first, *_ = clips
    for name, found in clips.items():
        if (own := _made_by(found)) != (expected := _made_by(clips[first])):
            raise CrowdError(
                f"the corpora {first} and {name} have different features: {expected} and {own}; "
                "extract both with the same encoders"
            )
    told = {"text": [text.identity.sha256, text.width]} if text else {}
    return _made_by(clips[first]) | told


def _made_by(clips: Clips) -> dict[str, Any]:
    return {f: [clips.encoders[f], array.shape[1]] for f, array in clips.features.items()}


def _leaks(
    corpora: Mapping[str, Marks], others: Mapping[str, Marks]
) -> tuple[list[dict[str, Any]], dict[str, set[str]], list[_Compared]]:
    """A report of clips that are in two places, which of each corpus are left out for it, and what
    could be compared with the others."""
    rows, left_out, compared = [], {name: set() for name in corpora}, []
    for name, marks in corpora.items():
        for its_marks in others.values():
            left_out[name] |= same_clips(shared(marks, its_marks))
    # Test sets and the clips to vote on are compared with one another, too.
    places = [*corpora.items(), *others.items()]
    for i, (other, its_marks) in enumerate(places):
        for name, own in places[:i]:
            rows += leak(name, other, shared(own, its_marks))
            if other in others:
                compared.append(
                    _Compared(clips=name, against=other, by=compared_by(own, its_marks))
                )
    return rows, left_out, compared


def _told_how(row: _Compared) -> str:
    by = ", ".join(row["by"])
    how = f"{by}, and names" if by else "names alone: they have no encoder in common"
    return f"{row['clips']} and {row['against']} were compared by {how}"


def _trained(
    corpus: Corpus,
    out: Path,
    encoders: Mapping[str, Any],
    settings: Settings,
    marks: Marks,
    say: Say,
) -> dict[str, Any]:
    """Facts about the trained members of a corpus, from the directory or after training."""
    total = len(corpus.inputs.names)
    if total < 2 * settings.folds:
        raise CrowdError(
            f"the corpus {corpus.name} has {total} clips to learn from; expected "
            f"{2 * settings.folds} at least for {settings.folds} folds"
        )
    labels = [corpus.words, corpus.emotion.tolist(), np.nan_to_num(corpus.valence, nan=9).tolist()]
    content = [corpus.inputs.names, labels, _digest(corpus.inputs.arrays)]
    identity = json_sha256([VERSION, dataclasses.asdict(settings), encoders, content])
    path, weights = out / f"{corpus.name}.json", out / f"{corpus.name}.safetensors"
    if path.is_file() and weights.is_file():
        try:
            about = _read_about(out, corpus.name)
        except CrowdError:  # of another version, or damaged
            about = None
        if about and (about["identity"], about["sha256"]) == (identity, sha256_of(weights)):
            if about["marks"] != marks:  # members do not depend on the files' hashes
                write_json(path, about := about | {"marks": marks}, indent=None)
            say(f"{corpus.name}: finished before")
            return about
    tensors: dict[str, np.ndarray] = {}
    groups: dict[int, Group] = {}
    for hidden in settings.hidden:
        with Counter("epochs", f"{corpus.name}, {hidden} wide", stream=sys.stderr) as counter:
            groups[hidden] = members.train_group(corpus, hidden, settings, counter)
        tensors |= _flat(groups[hidden].params, str(hidden))
    data = save(tensors)
    with atomic_write(weights) as file:
        file.write(data)
    about = {
        "identity": identity,
        "sha256": sha256_of(weights),
        "classes": list(corpus.words),
        "valence": corpus.has_valence,
        "clips": total,
        "majority": _majority(corpus),
        "hidden": list(groups),
        "folds": [fold for group in groups.values() for fold in group.folds],
        "seeds": [seed for group in groups.values() for seed in group.seeds],
        "epochs": [epoch for group in groups.values() for epoch in group.epochs],
        "scores": [score for group in groups.values() for score in group.scores],
        "marks": marks,
    }
    write_json(path, about, indent=None)
    score = np.mean(about["scores"])
    say(f"{corpus.name}: {total:,} clips, {len(about['scores'])} members, validation {score:.4f}")
    return about


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Of all that members read."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _majority(corpus: Corpus) -> float | None:
    """Share of the most frequent class, which a member that learned nothing would have right."""
    known = corpus.emotion[corpus.emotion >= 0]
    return round(float(np.bincount(known).max() / len(known)), 4) if len(known) else None


def _facts(name: str, about: Mapping[str, Any]) -> dict[str, Any]:
    scores = about["scores"]
    return {
        "name": name,
        **{key: about[key] for key in ("classes", "valence", "clips", "majority")},
        "members": len(scores),
        "score": round(float(np.mean(scores)), 4),
        "score_sd": round(float(np.std(scores)), 4),
        "best_epochs": [min(about["epochs"]), max(about["epochs"])],
    }


def report(summary: Mapping[str, Any]) -> str:
    """The crowd as a page of Markdown."""
    lines = [
        "# Crowd",
        "",
        "| corpus | clips | classes | valence | members | validation (sd) | most frequent class |",
        "|---|---|---|---|---|---|---|",
    ]
    for facts in summary["corpora"]:
        lines.append(
            f"| {escape_markdown(facts['name'])} | {facts['clips']:,} | "
            f"{escape_markdown(', '.join(facts['classes']))} | "
            f"{'yes' if facts['valence'] else 'no'} | {facts['members']} | {facts['score']:.4f} "
            f"({facts['score_sd']:.4f}) | {facts['majority'] or ''} |"
        )
    lines += [
        "",
        "The validation score is the weighted F1 of emotions, less a quarter of the squared",
        "error of valence (on a scale of -1 to 1); of valence alone, minus the squared error. Each",
        "member is scored on the fold by which its best epoch was chosen.",
        "",
        "## Clips in two places",
        "",
    ]
    lines += [f"- {escape_markdown(told(row))}" for row in summary["leaks"]["found"]] or [
        "None was found."
    ]
    for name, number in summary["leaks"]["left_out"].items():
        lines.append(f"- {number:,} clips of {escape_markdown(name)} were left out of training")
    if compared := summary["leaks"]["compared"]:
        lines += ["", *(f"- {escape_markdown(_told_how(row))}" for row in compared)]
    return "\n".join([*lines, ""])


def told(row: Mapping[str, Any]) -> str:
    """A leak in words."""
    return (
        f"{row['clips']:,} clips of {row['in']} have the same {row['same']} as one of {row['and']}"
    )


# --- voting ---------------------------------------------------------------------------------------


def vote(
    crowd: Path, records: Path, out: Path, *, text: Path | None = None, say: Say = print
) -> list[Vote]:
    """Have a crowd vote on the clips of a record directory, and write the votes.

    Clips that the crowd learned from are told of, and noted in its members.json.

    Args:
        crowd: what `train` wrote.
        records: the clips.
        out: the CSV file to write.
        text: the base that subtitles were read with; by default the shipped one.
        say: prints a line.

    Raises:
        CrowdError: no crowd, a damaged one, or one that learned from other encoders.
    """
    summary, clips, inputs = _to_vote_on(crowd, records, text)
    names = inputs.names
    ballots, leaks = [], []
    for facts in summary["corpora"]:
        about = _read_about(crowd, facts["name"])
        leaks += leak(facts["name"], str(records), shared(about["marks"], clips.marks))
        ballots.append(ballot(crowd, facts["name"], about, inputs))
    votes = count(names, ballots, inputs.there)
    write_votes(out, votes)
    corpora = {facts["name"] for facts in summary["corpora"]}
    others = [
        row
        for row in summary["leaks"]["found"]
        if row["in"] not in corpora or row["and"] != str(records)
    ]
    summary["leaks"]["found"] = others + leaks
    write_json(crowd / MEMBERS_FILE, summary)
    write_text(crowd / REPORT_FILE, report(summary))
    for row in leaks:
        advice = (
            "" if row["same"] == "name" else f"; train with --against {records} to leave them out"
        )
        say(f"warning: {told(row)}{advice}")
    return votes


def member_words(
    crowd: Path, records: Path, text: Path | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """What each single member of a crowd would say, without the others.

    Args:
        crowd, records, text: as for `vote`.

    Yields:
        For every member that knows emotions the name of its corpus, and a word for each clip.

    Raises:
        CrowdError: as for `vote`.
    """
    summary, _, inputs = _to_vote_on(crowd, records, text)
    for facts in summary["corpora"]:
        about = _read_about(crowd, facts["name"])
        words = np.array(about["classes"])
        if len(words):
            for probabilities, _ in answers_of(crowd, facts["name"], about, inputs):
                yield from ((facts["name"], words[p.argmax(axis=-1)]) for p in probabilities)


def _to_vote_on(crowd: Path, records: Path, text: Path | None) -> tuple[Summary, Clips, Inputs]:
    """What a crowd is, the clips, and what its members see of them.

    Raises:
        CrowdError: no crowd, or one that learned from other encoders.
    """
    summary = read_summary(crowd)
    clips = read_clips(records, "clips")
    encoder = TextEncoder(text or shipped_base()) if "text" in summary["encoders"] else None
    found = _same_encoders({"clips": clips}, encoder)
    for name, expected in summary["encoders"].items():
        if tuple(found.get(name, ())) != expected:
            own = found.get(name, "nothing")
            raise CrowdError(
                f"the crowd learned {name} from {list(expected)}, and {records} has {own}; extract "
                "it with the same encoder, or train the crowd anew"
            )
    vectors = {"text": encoder([e.subtitle for e in clips.entries])} if encoder else {}
    names = [entry.name for entry in clips.entries]
    arrays = clips.features | vectors
    return summary, clips, Inputs(names, {name: arrays[name] for name in summary["encoders"]})


def ballot(
    crowd: Path,
    name: str,
    about: Mapping[str, Any],
    inputs: Inputs,
) -> Ballot:
    """The averaged answers of a corpus's members."""
    answers = list(answers_of(crowd, name, about, inputs))
    probabilities = np.concatenate([p for p, _ in answers]).mean(axis=0)
    valence = np.concatenate([v for _, v in answers]).mean(axis=0)
    words = tuple(about["classes"])
    return Ballot(words, probabilities, valence if about["valence"] else None)


def answers_of(
    crowd: Path,
    name: str,
    about: Mapping[str, Any],
    inputs: Inputs,
) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Of each width, its members' probabilities `[M, N, C]` and valence `[M, N]`."""
    path = crowd / f"{name}.safetensors"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CrowdError(f"{path} cannot be read: {brief(error)}") from None
    for hidden in about["hidden"]:
        prefix = f"{hidden}."
        mine = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        try:
            found = members.predict(_nested(mine), inputs)
        # Whatever arrays of other names and shapes make of the network.
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise CrowdError(
                f"{path}: not the members that {name}.json tells of ({brief(error)}); train the "
                "crowd again"
            ) from None
        if (width := found[0].shape[-1]) != (named := max(len(about["classes"]), 1)):
            raise CrowdError(
                f"{path} answers with {width} classes, and {name}.json names {named}; train the "
                "crowd again"
            )
        yield found


def _flat(tree: Any, prefix: str) -> dict[str, np.ndarray]:
    """Arrays of nested dicts and lists by dotted name."""
    if isinstance(tree, np.ndarray):
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    parts = (_flat(value, f"{prefix}.{key}") for key, value in items)
    return functools.reduce(dict.__or__, parts, {})


def _nested(flat: Mapping[str, np.ndarray]) -> Any:
    """Inverse of `_flat`; a dict whose keys are numbers is a list."""
    if "" in flat:
        return flat[""]
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, value in flat.items():
        first, _, rest = name.partition(".")
        parts.setdefault(first, {})[rest] = value
    tree = {key: _nested(part) for key, part in parts.items()}
    return [tree[str(i)] for i in range(len(tree))] if "0" in tree else tree
