"""Read the truth and subtitles of a data set from the files that its authors publish."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from affectgpt_jax.common.errors import ReadError
from affectgpt_jax.common.files import read_bytes
from affectgpt_jax.common.tables import csv_rows
from affectgpt_jax.common.text import listed, shorten
from affectgpt_jax.evaluation.datasets import DataSet
from affectgpt_jax.evaluation.readers import Finding, read_truth

# MELD's own file numbers dialogues anew in every split, so the release puts the split in front.
MELD_PREFIX = "test_"
MELD_SUBTITLES = "Utterance"
MEDIA = {
    "audio": (".wav",),
    "video": (".mp4", ".avi"),
    "face": (".npy",),  # or in a folder NAME
}
# How many names are compared with all files to see what stands in front of them.
NAMES_COMPARED = 50
VALUES_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class SetTruth:
    """Human labels and subtitles of the clips of a data set.

    Attributes:
        dataset: which one.
        labels: the label file.
        subtitles_from: the subtitle file and its column; "" without one.
        names: of the test clips, in the order of the label file.
        values: label lists, words or valences.
        subtitles: of each clip, "" where there is none.
        findings: what is missing or unexpected, by clip.
        remarks: what is missing or unexpected of the whole.
    """

    dataset: DataSet
    labels: Path
    subtitles_from: str
    names: tuple[str, ...]
    values: tuple[Any, ...]
    subtitles: tuple[str, ...]
    findings: tuple[Finding, ...]
    remarks: tuple[str, ...]

    def as_csv(self) -> str:
        """Columns name, the kind of truth, and subtitle; label lists as `[a, b]`."""
        stream = io.StringIO(newline="")
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["name", self.dataset.truth, "subtitle"])
        for name, value, subtitle in zip(self.names, self.values, self.subtitles, strict=True):
            text = f"[{', '.join(value)}]" if isinstance(value, list) else value
            writer.writerow([name, text, subtitle])
        return stream.getvalue()

    def summary(self) -> list[str]:
        """Facts and findings, a line each."""
        lines = [f"{self.dataset.truth}: {_distribution(self.values)}"]
        lines.append(f"subtitles: {self.subtitles_from or 'none'}")
        return [*lines, *self.remarks, *map(str, self.findings)]


def find_set(dataset: DataSet, root: str | Path, alone: bool = False) -> Path | None:
    """The label file of a data set under a directory; None if it is not there.

    Args:
        dataset: which one.
        root: holds a folder that is called as in the release, as the set's authors call it, or by
            the set's key.
        alone: the set's files may lie in `root` itself.
    """
    root = Path(root)
    names = (dataset.folder, dataset.key, *filter(None, [dataset.raw_folder]))
    folders = [*(root / name for name in names), *((root,) if alone else ())]
    candidates = (folder / name for folder in folders for name in dataset.labels)
    return next((path for path in candidates if path.is_file()), None)


def read_set(dataset: DataSet, labels: Path, allow_pickle: bool = False) -> SetTruth:
    """The test clips of a data set, with what is missing or unexpected about them.

    Args:
        dataset: which one.
        labels: its label file, beside which its subtitles and media lie.
        allow_pickle: read label files that are pickled dicts, through `plain_pickle`.

    Raises:
        ReadError: a file that cannot be used.
    """
    folder = labels.parent
    split = dataset.split if labels.suffix == ".npz" else None
    table = read_truth(labels, dataset.task, allow_pickle, split)
    public_meld = dataset.key == "meld" and labels.suffix == ".csv"
    names = tuple(f"{MELD_PREFIX}{name}" for name in table.names) if public_meld else table.names
    findings = [*table.findings]
    remarks = []
    if len(names) != dataset.size:
        remarks.append(f"size: {len(names):,} clips, published {dataset.size:,}")

    path, column = folder / dataset.subtitles, dataset.subtitle_column
    source, known = "", {}
    if path.is_file():
        source, known = f"{path}, column {column}", read_subtitles(path, column)
    elif public_meld:
        source, known = f"{labels}, column {MELD_SUBTITLES}", _read_utterances(labels, table.names)
    else:
        remarks.append(f"no {path}, so that all clips are without a subtitle")
    subtitles = tuple(known.get(name, "") for name in names)
    if known:
        findings.append(
            Finding("without a subtitle", tuple(name for name in names if name not in known))
        )
        empty = tuple(name for name in names if name in known and not known[name])
        findings.append(Finding("with an empty subtitle", empty))
    findings.append(Finding("with an empty truth", _names(names, table.values, lambda v: v == [])))
    if dataset.valence:
        low, high = dataset.valence
        outside = _names(names, table.values, lambda value: not low <= value <= high)
        findings.append(Finding(f"with a valence outside {low:g} to {high:g}", outside))
    for kind in MEDIA:
        media = find_media(folder, dataset, kind, names)
        remarks += media.remarks
        findings.append(media.lacking)
    findings = tuple(finding for finding in findings if finding.names)
    return SetTruth(
        dataset, labels, source, names, table.values, subtitles, findings, tuple(remarks)
    )


def _names(names: tuple[str, ...], values: tuple[Any, ...], wanted: Any) -> tuple[str, ...]:
    return tuple(name for name, value in zip(names, values, strict=True) if wanted(value))


def read_subtitles(path: Path, column: str) -> dict[str, str]:
    """Subtitles by clip; the file may hold clips of other splits.

    Raises:
        ReadError: a clip has two different subtitles, or the file cannot be used.
    """
    found: dict[str, str] = {}
    torn = []
    for _, row in csv_rows(read_bytes(path), str(path), ("name", column)):
        name, subtitle = row["name"].strip(), row[column].strip()
        if found.setdefault(name, subtitle) != subtitle:
            torn.append(name)
    if torn:
        raise ReadError(
            f"{path} has two subtitles for {listed(tuple(dict.fromkeys(torn)))}; keep one of each"
        )
    return found


def _read_utterances(path: Path, names: tuple[str, ...]) -> dict[str, str]:
    rows = csv_rows(read_bytes(path), str(path), (MELD_SUBTITLES,))
    texts = (row[MELD_SUBTITLES].strip() for _, row in rows)
    return {f"{MELD_PREFIX}{name}": text for name, text in zip(names, texts, strict=True)}


@dataclasses.dataclass(frozen=True)
class Media:
    """The files of one kind that the clips of a set have.

    Attributes:
        files: by clip.
        lacking: the clips without a file.
        remarks: that there is no folder, that files have other names than clips, or belong to none
            where others lack one.
    """

    files: Mapping[str, Path]
    lacking: Finding
    remarks: tuple[str, ...]


class MediaFolders(Protocol):
    """A set with its folders of media, such as a `DataSet`."""

    audio: str
    video: str
    face: str


def find_media(folder: Path, dataset: MediaFolders, kind: str, names: Sequence[str]) -> Media:
    """Find the files of the clips of a set, matched by `match_names`.

    Args:
        folder: of the set.
        dataset: the set.
        kind: audio, video or face.
        names: of its clips.

    Raises:
        ReadError: a folder that cannot be listed.
    """
    places = [folder / getattr(dataset, f"{shape}{kind}", "") for shape in ("", "raw_")]
    place = next((p for p in places if p != folder and p.is_dir()), None)
    if place is None:
        none = Finding(f"without {kind} in {places[0]}", ())
        return Media({}, none, (f"no folder {places[0]}",))
    present = _media_files(place, kind)
    matched, how = match_names(names, present)
    lacking = tuple(name for name in names if name not in matched)
    remarks = [f"{kind} in {place}: {how}"] if how else []
    left = sorted(present.keys() - matched.values())
    if lacking and left:
        remarks.append(f"{len(left):,} files in {place} belong to no clip: {listed(left)}")
        # Names were renamed, or a part of them left out: how they begin tells which.
        begin = [_beginnings(side) for side in (lacking, left)]
        if max(map(len, begin)) > 1 or begin[0].keys() != begin[1].keys():
            told = [", ".join(f"{w} {n:,}" for w, n in side.most_common(4)) for side in begin]
            remarks.append(f"by how names begin: clips without {kind}: {told[0]}; files: {told[1]}")
    files = {name: present[file] for name, file in matched.items()}
    return Media(files, Finding(f"without {kind} in {place}", lacking), tuple(remarks))


def _beginnings(names: Collection[str]) -> Counter[str]:
    """How many names begin how: with letters and digits, to the first mark between them."""
    starts = (re.match(r"[^\W_]+[\W_]?", name) for name in names)
    return Counter(f"{start[0]}..." if start else "..." for start in starts)


def match_names(names: Sequence[str], present: Collection[str]) -> tuple[dict[str, str], str]:
    """Find the name by which each clip is there, where others may have renamed them all alike.

    If no name is there as it is, one side may have something in front of every name, as
    `test_dia0_utt0` for `dia0_utt0`, or differ in upper and lower case.

    Args:
        names: that are looked for.
        present: that are there.

    Returns:
        Names that are there by the names that are looked for, and how they differ, "" if not.
    """
    found = {name: name for name in names if name in present}
    if found or not present:
        return found, ""
    prefixes: Counter[tuple[str, str]] = Counter()
    for name in names[:NAMES_COMPARED]:
        for other in present:
            if other.endswith(name):
                prefixes["", other.removesuffix(name)] += 1
            elif name.endswith(other):
                prefixes[name.removesuffix(other), ""] += 1
    # What has no letter may be part of a number.
    rules = [rule for rule, _ in prefixes.most_common() if re.search(r"[^\W\d_]", "".join(rule))]
    for cut, put in rules[:1]:
        renamed = {n: put + n.removeprefix(cut) for n in names if n.startswith(cut)}
        found = {name: other for name, other in renamed.items() if other in present}
    if not found:
        folded = {other.casefold(): other for other in present}
        if len(folded) == len(present):
            found = {n: folded[n.casefold()] for n in names if n.casefold() in folded}
    if not found:
        return {}, ""
    name, other = next(iter(found.items()))
    example = f"{shorten(other)} for {shorten(name)}"
    return found, f"{len(found):,} are found by other names, as {example}"


def _media_files(folder: Path, kind: str) -> dict[str, Path]:
    """The files of a folder by their names without a suffix of this kind.

    Raises:
        ReadError: the folder cannot be listed.
    """
    found: dict[str, Path] = {}
    try:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                stem, suffix = os.path.splitext(entry.name)
                if entry.name.startswith("."):  # what a system or an archive hides
                    continue
                if suffix.lower() in MEDIA[kind] and entry.is_file():
                    found.setdefault(stem, Path(entry.path))
                elif kind == "face" and entry.is_dir():
                    nested = Path(entry.path, f"{entry.name}.npy")
                    if nested.is_file():
                        found.setdefault(entry.name, nested)
    except OSError as error:
        raise ReadError(f"{folder} cannot be listed: {error.strerror or error}") from None
    return found


def _distribution(values: tuple[Any, ...]) -> str:
    """A few words about all values."""
    if isinstance(values[0], float):
        signs = Counter((value > 0) - (value < 0) for value in values)
        return (
            f"{min(values):g} to {max(values):g}; {signs[1]:,} positive, {signs[-1]:,} negative, "
            f"{signs[0]:,} zero, which are not scored"
        )
    lists = isinstance(values[0], list)
    counts = Counter(word for value in values for word in (value if lists else (value,)))
    top = ", ".join(f"{shorten(w, 30)} {n:,}" for w, n in counts.most_common(VALUES_SHOWN))
    each = f"{sum(counts.values()) / len(values):.2f} labels per clip, " if lists else ""
    more = f" and {len(counts) - VALUES_SHOWN:,} more" if len(counts) > VALUES_SHOWN else ""
    return f"{each}{len(counts):,} different: {top}{more}"
