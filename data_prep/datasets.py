"""The public data sets in the plain layout that data_prep.extract reads: one CSV file each.

    affectgpt datasets --set mercaptionplus --root datasets \\
        --out csv/mercaptionplus.csv
    affectgpt datasets --all --root datasets --out csv --allow-pickle
    affectgpt extract --csv csv/mercaptionplus.csv \\
        --out records/mercaptionplus ...

A row is a clip: its name, the files of its video, audio and face, and what is said about it. Below
the root, a set lies in the folder that the AffectGPT release uses, or in one that has its key as
its name. Test sets are read as affectgpt_jax.labels reads them:

{sets}

MER-Caption has no published file names: name its files with --labels and --descriptions.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from affectgpt_jax import cli
from affectgpt_jax.common.errors import ReadError
from affectgpt_jax.common.files import read_bytes, write_text
from affectgpt_jax.common.json import parse_json
from affectgpt_jax.common.labels import PREFERENCES
from affectgpt_jax.common.tables import csv_rows
from affectgpt_jax.common.text import print_lines, shorten
from affectgpt_jax.evaluation.datasets import BY_KEY, DATASETS, DataSet
from affectgpt_jax.evaluation.label_files import (
    MEDIA,
    find_media,
    find_set,
    read_set,
    read_subtitles,
)
from affectgpt_jax.evaluation.readers import Finding, number_repeats, read_truth

COLUMNS = (
    "name",
    "video",
    "audio",
    "face",
    "subtitle",
    "labels",
    "description",
    "emotion",
    "candidates",
    "valence",
    "valence_range",
    "alternatives",
    "preferred",
    "source",
)


@dataclasses.dataclass(frozen=True)
class CaptionSet:
    """A data set to train on, or of clips that nobody has labelled.

    Attributes:
        name: as the paper writes it.
        key: what commands call it.
        folder: the release's folder.
        labels: its file: by `kind`, of label lists (columns name, openset), of pairs of
            descriptions (name, a1, a2 and, where people chose, preference) or of names; "" where
            none is published.
        descriptions: its file of descriptions (columns name, reason); "" where there is none.
        size: published number of clips.
        subtitles, subtitle_column: as in `DataSet`.
        audio, video, face: media folders.
        kind: captions, pairs or names.
    """

    name: str
    key: str
    folder: str
    labels: str
    descriptions: str
    size: int
    subtitles: str = "subtitle_chieng.csv"
    subtitle_column: str = "english"
    audio: str = "audio"
    video: str = "video"
    face: str = "openface_face"
    kind: str = "captions"


def _of_2026(name: str, key: str, labels: str, size: int, kind: str = "captions") -> CaptionSet:
    return CaptionSet(name, key, "mer2026-dataset", labels, "", size, kind=kind)


CAPTION_SETS = (
    CaptionSet("MER-Caption", "mercaption", "mer2025-dataset", "", "", 115_595),
    CaptionSet(
        "MER-Caption+",
        "mercaptionplus",
        "mer2025-dataset",
        "track2_train_mercaptionplus.csv",
        "track3_train_mercaptionplus.csv",
        31_327,
    ),
    CaptionSet(
        "OV-MERD",
        "ovmerd",
        "mer2025-dataset",
        "track2_train_ovmerd.csv",
        "track3_train_ovmerd.csv",
        332,
    ),
    CaptionSet(
        "MER2025, candidates",
        "mer2025candidates",
        "mer2025-dataset",
        "track_all_candidates.csv",
        "",
        20_000,
        kind="names",
    ),
    # MER-FG: labels of people, labels of MER-Caption+, and the clips that are to be labelled.
    _of_2026("MER2026, labelled by people", "mer2026human", "track2_train_human.csv", 1_532),
    _of_2026("MER2026, MER-Caption+", "mer2026plus", "track2_train_mercaptionplus.csv", 31_327),
    _of_2026(
        "MER2026, candidates", "mer2026candidates", "track1_track2_candidate.csv", 20_000, "names"
    ),
    # MER-Prefer: which of two descriptions people prefer; by three people, by one, not yet known.
    _of_2026("EmoPrefer", "emoprefer", "track3_emoprefer.csv", 574, "pairs"),
    _of_2026("EmoPrefer v2", "emopreferv2", "track3_emopreferv2.csv", 2_096, "pairs"),
    _of_2026("MER-Prefer, candidates", "mer2026pairs", "track3_candidate.csv", 10_000, "pairs"),
    *(
        CaptionSet(
            f"MERR-{kind}",
            f"merr{kind.lower()}",
            "MER2023",
            f"MERR_{kind.lower()}_grained.json",
            "",
            size,
            "transcription_en_all.csv",
            "sentence_en",
        )
        for kind, size in (("Coarse", 28_618), ("Fine", 4_487))
    ),
)
# MERR, of Emotion-LLaMA: one JSON file of all clips, by name, and the key of the description in it.
MERR_TEXTS = {"merrcoarse": "caption", "merrfine": "smp_reason_caption"}
CAPTIONED = {dataset.key: dataset for dataset in CAPTION_SETS}
# OV-MERD comes with descriptions, so it is read as a set to train on; labels are the same.
TESTED = {key: dataset for key, dataset in BY_KEY.items() if key not in CAPTIONED}


@dataclasses.dataclass(frozen=True)
class PlainSet:
    """A data set in the plain layout.

    Attributes:
        name: as the paper writes it.
        rows: of `COLUMNS`, those that are not empty.
        remarks: what is missing or unexpected, a line each.
    """

    name: str
    rows: list[dict[str, str]]
    remarks: list[str]

    def as_csv(self) -> str:
        """The text of the CSV file."""
        stream = io.StringIO(newline="")
        writer = csv.DictWriter(stream, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return stream.getvalue()


def caption_set(
    dataset: CaptionSet,
    folder: Path,
    labels: Path | None = None,
    descriptions: Path | None = None,
) -> PlainSet:
    """A set with label lists and descriptions.

    Args:
        dataset: which one.
        folder: of its files.
        labels, descriptions: other files than the published ones.

    Raises:
        ReadError: a file that cannot be used.
    """
    if not dataset.labels and not (labels and descriptions):
        raise ReadError(f"{dataset.name} has no published files; name --labels and --descriptions")
    place = labels or folder / dataset.labels
    if dataset.kind != "captions":
        return _without_labels(dataset, folder, place)
    words: Mapping[str, Sequence[str]]
    if dataset.key in MERR_TEXTS:
        words, texts = _merr(place, MERR_TEXTS[dataset.key])
    else:
        table = read_truth(place, "fine")
        words = dict(zip(table.names, table.values, strict=True))
        told = descriptions or (folder / dataset.descriptions if dataset.descriptions else None)
        texts = _descriptions(told) if told else {}
    names = tuple(dict.fromkeys((*words, *texts)))
    subtitles, remarks = _size_and_subtitles(dataset, folder, len(names))
    said = {"labels": words, "a description": texts, "a subtitle": subtitles}
    lacking = [
        Finding(f"without {what}", tuple(name for name in names if name not in of))
        for what, of in said.items()
        if of
    ]
    rows = [
        {
            "name": name,
            "subtitle": subtitles.get(name, ""),
            "labels": _list(words.get(name, ())),
            "description": texts.get(name, ""),
            "source": dataset.name,
        }
        for name in names
    ]
    findings, more = _add_media(rows, dataset, folder)
    lacking, remarks = lacking + findings, remarks + more
    return PlainSet(dataset.name, rows, remarks + [str(f) for f in lacking if f.names])


def _size_and_subtitles(
    dataset: CaptionSet, folder: Path, found: int
) -> tuple[Mapping[str, str], list[str]]:
    remarks = [] if found == dataset.size else [_size(found, dataset.size)]
    path = folder / dataset.subtitles
    if path.is_file():
        return read_subtitles(path, dataset.subtitle_column), remarks
    return {}, [*remarks, f"no {path}, so that all clips are without a subtitle"]


def _without_labels(dataset: CaptionSet, folder: Path, path: Path) -> PlainSet:
    """Names alone, or pairs of descriptions: a row a pair, also where a clip has several.

    Raises:
        ReadError: a file that cannot be used.
    """
    pairs = dataset.kind == "pairs"
    columns = ("name", "a1", "a2") if pairs else ("name",)
    rows: list[dict[str, str]] = []
    for line, row in csv_rows(read_bytes(path), str(path), columns):
        clip = {"name": row["name"].strip(), "source": dataset.name}
        if pairs:
            texts = [" ".join(row[side].split()) for side in ("a1", "a2")]
            choice = row.get("preference", "").strip().lower()
            if not all(texts) or choice not in ("", *PREFERENCES):
                raise ReadError(
                    f"{path}, line {line}: expected two descriptions and a preference of "
                    f"{', '.join(PREFERENCES)} or nothing, found {shorten(row)}"
                )
            clip |= {"alternatives": json.dumps(texts, ensure_ascii=False), "preferred": choice}
        rows.append(clip)
    subtitles, remarks = _size_and_subtitles(dataset, folder, len(rows))
    names = list(dict.fromkeys(row["name"] for row in rows))
    lacking = [Finding("without a subtitle", tuple(n for n in names if n not in subtitles))]
    found, more = _add_media(rows, dataset, folder)
    for row, name in zip(rows, number_repeats([row["name"] for row in rows]), strict=True):
        row |= {"subtitle": subtitles.get(row["name"], ""), "name": name}
    if again := len(rows) - len(names):
        remarks.append(f"{again:,} rows of a clip that stands there already are called NAME#2, ...")
    if pairs:
        chosen = Counter(row["preferred"] or "nothing" for row in rows)
        remarks.append("preferred: " + ", ".join(f"{w} {n:,}" for w, n in sorted(chosen.items())))
    findings = [*(lacking if subtitles else []), *found]
    return PlainSet(dataset.name, rows, remarks + more + [str(f) for f in findings if f.names])


def evaluation_set(dataset: DataSet, labels: Path, allow_pickle: bool = False) -> PlainSet:
    """The test clips of a set of MER-UniBench.

    An emotion's candidates are all emotions that the set's truth names.

    Raises:
        ReadError: a file that cannot be used.
    """
    truth = read_set(dataset, labels, allow_pickle)
    emotions = _list(sorted(set(truth.values))) if dataset.truth == "emotion" else ""
    rows = []
    for name, value, subtitle in zip(truth.names, truth.values, truth.subtitles, strict=True):
        row = {"name": name, "subtitle": subtitle, "source": dataset.name}
        match dataset.truth:
            case "openset":
                row["labels"] = _list(value)
            case "emotion":
                row |= {"emotion": value, "candidates": emotions}
            case "valence":
                low, high = dataset.valence
                row |= {"valence": repr(value), "valence_range": f"{low:g}, {high:g}"}
        rows.append(row)
    _add_media(rows, dataset, labels.parent)
    remarks = [line for line in truth.summary() if not line.startswith("subtitles: ")]
    return PlainSet(dataset.name, rows, remarks)


def _descriptions(path: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for line, row in csv_rows(read_bytes(path), str(path), ("name", "reason")):
        name = row["name"].strip()
        if name in found:
            raise ReadError(f"{path}, line {line}: {name!r} stands there twice; keep one")
        found[name] = row["reason"].strip()
    return found


def _merr(path: Path, text: str) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Labels and descriptions of MERR's JSON file: an object by clip, with `pseu_emotion`."""
    found = parse_json(read_bytes(path), str(path), dict[str, dict[str, Any]])
    words: dict[str, list[str]] = {}
    texts: dict[str, str] = {}
    for name, clip in found.items():
        for key in ("pseu_emotion", text):
            if not isinstance(clip.get(key, ""), str):
                raise ReadError(f"{path}: {name}.{key}: expected text, found {shorten(clip[key])}")
        if word := clip.get("pseu_emotion", "").strip().lower():
            words[name] = [word]
        if description := clip.get(text, "").strip():
            texts[name] = description
    if not texts:
        raise ReadError(f"{path}: no clip has a description as {text!r}")
    return words, texts


def _add_media(
    rows: Sequence[dict[str, str]], dataset: CaptionSet | DataSet, folder: Path
) -> tuple[list[Finding], list[str]]:
    """Name the files that exist, and say what is missing, by clips and by folders."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    findings: list[Finding] = []
    remarks: list[str] = []
    for kind in MEDIA:
        media = find_media(folder.resolve(), dataset, kind, names)
        for row in rows:
            if row["name"] in media.files:
                row[kind] = str(media.files[row["name"]])
        findings.append(media.lacking)
        remarks += media.remarks
    return findings, remarks


def _list(words: Sequence[str]) -> str:
    return f"[{', '.join(words)}]" if words else ""


def _size(found: int, published: int) -> str:
    return f"size: {found:,} clips, published {published:,}"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        SystemExit: after printing the help, or one sentence about what is wrong.
    """
    sets = [(s.key, s.folder, s.labels or "--labels FILE") for s in CAPTION_SETS]
    sets += [(d.key, d.folder, " or ".join(d.labels)) for d in TESTED.values()]
    lines = "\n".join(f"    {key:<15}{folder}: {labels}" for key, folder, labels in sets)
    parser = cli.make_parser("affectgpt datasets", __doc__.format(sets=lines))
    add = parser.add_argument
    keys = [*CAPTIONED, *TESTED]
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--set", choices=keys, metavar="KEY", help=f"one of {', '.join(keys)}")
    which.add_argument("--all", action="store_true", help="every set that lies below the root")
    add("--root", required=True, type=Path, metavar="DIR", help="where the sets, or the set, lie")
    add("--out", required=True, type=Path, metavar="PATH", help="the file; with --all, the folder")
    add("--labels", type=Path, metavar="FILE", help="label lists, if not the published file")
    add("--descriptions", type=Path, metavar="FILE", help="likewise")
    add(
        "--allow-pickle",
        action="store_true",
        help="read label files in npz: plain containers, text and numbers; nothing is executed",
    )
    arguments = parser.parse_args(argv)
    if (arguments.labels or arguments.descriptions) and arguments.set not in CAPTIONED:
        parser.error(f"--labels and --descriptions are for --set {', '.join(CAPTIONED)}")
    return arguments


def build(key: str, arguments: argparse.Namespace) -> PlainSet | None:
    """One data set; None where it is not below the root.

    Raises:
        ReadError: a file that cannot be used.
    """
    root = arguments.root.expanduser()
    if key in TESTED:
        labels = find_set(TESTED[key], root, alone=not arguments.all)
        return labels and evaluation_set(TESTED[key], labels, arguments.allow_pickle)
    dataset = CAPTIONED[key]
    folders = [root / dataset.folder, root / key, *([] if arguments.all else [root])]
    if arguments.labels or not dataset.labels:
        if arguments.all:
            return None
        folder = next(folder for folder in folders if folder.is_dir() or folder == root)
        return caption_set(dataset, folder, arguments.labels, arguments.descriptions)
    folder = next((f for f in folders if (f / dataset.labels).is_file()), None)
    return folder and caption_set(dataset, folder, None, arguments.descriptions)


def write_sets(arguments: argparse.Namespace) -> Iterator[str]:
    """Write the CSV files; yields lines about each set as it is done.

    Raises:
        ReadError: a file that cannot be used, or no set below the root.
        UserError: a file that cannot be written.
    """
    found, out = 0, arguments.out.expanduser()
    for key in [*CAPTIONED, *TESTED] if arguments.all else [arguments.set]:
        plain = build(key, arguments)
        if plain is None:
            continue
        found += 1
        path = out / f"{key}.csv" if arguments.all else out
        with cli.writing(f"--out={path}"):
            write_text(path, plain.as_csv())
        yield f"{plain.name}: {len(plain.rows):,} clips -> {path}"
        yield from (f"  {line}" for line in plain.remarks)
    if not found:
        folders = {d.folder for d in (*CAPTION_SETS, *DATASETS)}
        if arguments.set:
            folders = {(CAPTIONED | TESTED)[arguments.set].folder}
        raise ReadError(
            f"--root={arguments.root}: found no label file there or in its folders "
            f"{', '.join(sorted(folders))}"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; see `cli.exit_on_error`."""
    with cli.exit_on_error():
        print_lines(write_sets(parse_arguments(argv)))


if __name__ == "__main__":
    main()
