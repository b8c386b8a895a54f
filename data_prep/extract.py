"""Turn a folder of clips into records: decode, find faces, run the encoders, write.

    affectgpt extract --clips DIR --out RECORDS \\
        --video clip-vit-l --audio hubert-l
    affectgpt extract --csv clips.csv --clips DIR --out RECORDS \\
        --video clip-vit-l=/models/clip --audio hubert-l=/models/hubert

Clips are files of a folder, called NAME with the suffix of a medium; sound may lie beside the video
or in it. A CSV file names those that count (column name), says what is known of them (subtitle,
labels, description: the columns of affectgpt_jax.import_arrays) and may name their files (columns
video, audio, face).

RECORDS then holds the records, and extraction.csv: a row per clip with what became of it, and why.
A clip counts if all features can be had of it; with --allow-missing, if any can. The same command,
stopped and run again, goes on where it stopped; what is finished lies in RECORDS/.blocks, which may
be deleted when nothing is to be added any more. The output is the same, byte by byte, for any
number of workers, stops and shares: under srun each task takes its share of the clips, as with
--shard I/N, and the last one to end writes the records.

Video encoders: {video}.

Audio encoders: {audio}.

A name alone is looked up in the hub's cache, NAME=DIR is a directory, and NAME=OWNER/MODEL another
model of the hub; the bare architectures ({bare}) take weights of any size.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from affectgpt_jax import cli
from affectgpt_jax.common.files import lock_file, read_bytes, sha256_of, write_text
from affectgpt_jax.common.identity import json_sha256
from affectgpt_jax.common.json import write_json
from affectgpt_jax.common.tables import CsvTable
from affectgpt_jax.common.text import print_lines, say
from affectgpt_jax.data.arrays import records_from_csv
from affectgpt_jax.data.records import (
    EXTRACTION,
    MANIFEST_FILE,
    Record,
    RecordError,
    read_manifest,
    write_records,
)

from .blocks import BLOCKS, PLACES, BlockStore, FeatureOf
from .clips import MEDIA_COLUMNS, Clip, ClipError, find_clips
from .encoders import (
    ARCHITECTURES,
    BATCH,
    FEATURES,
    MISSING,
    PRECISIONS,
    Encoder,
    EncoderError,
    find_encoder,
)
from .encoders import names as encoder_names
from .report import (
    OK,
    REPORT_FILE,
    Elsewhere,
    clip_report,
    read_elsewhere,
    reasons,
    write_report,
)
from .settings import BOXES, DETECTOR_HELP, make_settings, placement
from .shards import add_shard_flag, shard_of_task

LOCK = "lock"
FINISHED = "finished"  # in there: of what the records are


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        SystemExit: after printing the help, or one sentence about what is wrong.
    """
    described = __doc__.format(
        video=", ".join(n for n in encoder_names("video") if n not in ARCHITECTURES),
        audio=", ".join(n for n in encoder_names("audio") if n not in ARCHITECTURES),
        bare=", ".join(ARCHITECTURES),
    )
    parser = cli.make_parser("affectgpt extract", described)
    add = parser.add_argument
    add("--clips", nargs="+", default=[], type=Path, metavar="DIR", help="folders of media files")
    add("--csv", type=Path, metavar="FILE", help="which clips, what is known of them, their files")
    add("--out", type=Path, required=True, metavar="DIR", help="the record directory to write")
    add("--video", metavar="NAME[=DIR]", help="encoder of faces and frames")
    add("--audio", metavar="NAME[=DIR]", help="encoder of sound")
    add(
        "--features",
        nargs="+",
        choices=[feature for features in FEATURES.values() for feature in features],
        metavar="FEATURE",
        help=f"of {', '.join(f for features in FEATURES.values() for f in features)}; default: "
        "all that the encoders allow",
    )
    add("--faces", type=Path, metavar="DIR", help="OpenFace's arrays NAME.npy; default: detect")
    add(
        "--boxes",
        type=Path,
        metavar="DIR",
        help="arrays NAME.npy [frames, 4] of faces: left, top, width, height in pixels",
    )
    add(
        "--face-detector",
        type=Path,
        metavar="FILE",
        help=DETECTOR_HELP,
    )
    add(
        "--face-order",
        choices=("bgr", "rgb"),
        default="bgr",
        help="of the channels in these arrays; default: bgr, as OpenCV wrote the public ones",
    )
    add(
        "--allow-missing",
        action="store_true",
        help="a clip that lacks a modality goes without it; default: it is left out",
    )
    add(
        "--against",
        nargs="+",
        default=[],
        type=Path,
        metavar="DIR",
        help="extractions whose clips must not be here again, as a test set: they are left out",
    )
    add("--ignore", nargs="+", default=[], metavar="COLUMN", help="of the CSV file, to leave out")
    add("--split", metavar="NAME", help="name of the split; default: that of the directory")
    add("--workers", type=int, metavar="N", help="processes that decode ahead; default: one a core")
    add_shard_flag(add)
    add("--batch", type=int, metavar="N", help=f"clips at a time; default: {BATCH}")
    add("--device", choices=("cpu", "cuda"), help="default: cuda, where PyTorch finds it")
    add(
        "--precision",
        choices=PRECISIONS["cuda"],
        help="of matrix products; default: float32 on a CPU, float16 on a GPU",
    )
    cli.add_download_flag(add)
    arguments = parser.parse_args(argv)
    if not arguments.clips and not arguments.csv:
        parser.error("give --clips DIR, --csv FILE, or both")
    encoders = {kind: getattr(arguments, kind) for kind in FEATURES}
    possible = [f for kind, features in FEATURES.items() if encoders[kind] for f in features]
    if not possible:
        parser.error("give --video, --audio, or both")
    given = ("faces", "boxes", "face_detector")
    if len(named := [f"--{n.replace('_', '-')}" for n in given if getattr(arguments, n)]) > 1:
        parser.error(f"{' and '.join(named)} both say where faces are; name one of them")
    for feature in arguments.features or ():
        if feature not in possible:
            kind = next(kind for kind, features in FEATURES.items() if feature in features)
            parser.error(f"--features {feature} needs an encoder: --{kind}")
    if arguments.out.resolve() in [directory.resolve() for directory in arguments.against]:
        parser.error(f"--against names {arguments.out}, which is to be written")
    arguments.features = tuple(f for f in possible if f in (arguments.features or possible))
    for name, least in (("workers", 0), ("batch", 1)):
        if (value := getattr(arguments, name)) is not None and value < least:
            parser.error(f"--{name} is {value}; expected {least} or more")
    return arguments


def extract(arguments: argparse.Namespace) -> None:
    """Run the whole extraction; finished blocks are reused."""
    # What decodes is an extra, which the help does without.
    from . import stages
    from .decoding import available_cores
    from .detectors import read_detector

    out = arguments.out.expanduser()
    device, precision = placement(arguments.device, arguments.precision)
    found = find_clips(
        [path.expanduser() for path in arguments.clips],
        arguments.csv and arguments.csv.expanduser(),
        arguments.faces and arguments.faces.expanduser(),
        arguments.boxes and arguments.boxes.expanduser(),
    )
    detector = None
    if arguments.face_detector:
        detector = read_detector(arguments.face_detector.expanduser())
    if arguments.csv:
        list(annotated(arguments, {}))  # wrong cells must show now, not after hours
    elsewhere = read_elsewhere(arguments.against)
    places = {
        kind: find_encoder(getattr(arguments, kind), kind, arguments.download)
        for kind, features in FEATURES.items()
        if set(features) & set(arguments.features)
    }
    settings = make_settings(
        arguments.features,
        places,
        arguments.batch,
        device,
        precision,
        arguments.face_order,
        BOXES if arguments.boxes else detector.name if detector else None,
    )
    blocks = stages.in_blocks(found.clips, settings)
    identity = _identity(arguments, list(blocks), elsewhere)
    if is_complete(out, identity):
        print_lines([f"{out} is complete: nothing has changed since it was written"])
        return
    store = BlockStore(out / BLOCKS)
    store.folder.mkdir(parents=True, exist_ok=True)  # trouble with it must show now, too
    # Records name encoders by content alone; `describe` looks here for where they were.
    write_json(
        out / BLOCKS / PLACES, {kind: str(p.directory.resolve()) for kind, p in places.items()}
    )
    number, shares = arguments.shard or shard_of_task()
    mine = {key: blocks[key] for key in list(blocks)[number::shares]}
    missing = {key: part for key, part in mine.items() if key not in store}
    if done := sum(len(part) for key, part in mine.items() if key not in missing):
        say(f"{done:,} of {sum(map(len, mine.values())):,} clips are finished")
    work = None
    if missing:
        encoders = {kind: Encoder(place, device, precision) for kind, place in places.items()}
        workers = available_cores() if arguments.workers is None else arguments.workers
        work = stages.run(missing, store, encoders, settings, workers, detector)
    if any(key not in store for key in blocks):
        print_lines([f"share {number} of {shares} is finished; the last one writes the records"])
        return
    # Two shares that end at once both find everything finished.
    with lock_file(out / BLOCKS / LOCK, f"{out}", "its records are being written", say):
        if is_complete(out, identity):
            return
        lines = _assemble(arguments, blocks, store, identity, settings, places, elsewhere)
    print_lines([*lines, *found.remarks(), *(work.lines() if work else ())])


def _assemble(
    arguments: argparse.Namespace,
    blocks: Mapping[str, Sequence[Clip]],
    store: BlockStore,
    identity: str,
    settings: Mapping[str, Any],
    places: Mapping[str, Any],
    elsewhere: Elsewhere,
) -> list[str]:
    """Write report and records of finished blocks; returns lines about them."""
    out = arguments.out.expanduser()
    rows = (row for key in blocks for row in store.rows(key))
    report = clip_report(rows, arguments.features, arguments.allow_missing, elsewhere)
    write_report(out / REPORT_FILE, report)
    kept = {row["name"] for row in report if row["status"] == OK}
    if not kept:
        why = "; ".join(reasons(report))
        raise ClipError(
            f"none of {len(report):,} clips can be used ({why}); see {out / REPORT_FILE}"
        )
    # Before the manifest: records that were written whole must be known again, whenever this ends.
    write_text(out / BLOCKS / FINISHED, identity)
    arrays = sum(c.faces is not None and c.name in kept for part in blocks.values() for c in part)
    write_records(
        out,
        finished_records(arguments, blocks, store, kept),
        encoders={f: p.name for kind, p in places.items() for f in FEATURES[kind]},
        split=arguments.split,
        extra={EXTRACTION: {**settings, "face arrays": arrays}},
    )
    lines = [f"{out}: {len(kept):,} of {len(report):,} clips", *summary(out), *reasons(report)]
    return [*lines, *elsewhere.remarks(report)]


def is_complete(out: Path, identity: str) -> bool:
    """Whether a directory already holds the records of this `identity`.

    Raises:
        RecordError: it holds others.
    """
    if not (out / MANIFEST_FILE).exists():
        return False
    finished = out / BLOCKS / FINISHED
    if finished.is_file() and finished.read_text(encoding="utf-8") == identity:
        return True
    raise RecordError(
        f"{out} holds the records of other clips or settings, or has lost {BLOCKS}; write "
        f"elsewhere, or delete {MANIFEST_FILE} there to make them anew from what {BLOCKS} has"
    )


def annotated(
    arguments: argparse.Namespace, arrays: Mapping[str, Mapping[str, np.ndarray]]
) -> Iterator[Record]:
    """The records of the CSV file.

    Raises:
        RecordError, ReadError: a CSV file that cannot be used.
    """
    path = arguments.csv.expanduser()
    header = CsvTable(read_bytes(path), str(path)).header
    media = [column for column in MEDIA_COLUMNS if column in header]
    return records_from_csv(path, arrays, ignore=[*arguments.ignore, *media], allow_missing=True)


def finished_records(
    arguments: argparse.Namespace,
    blocks: Mapping[str, Sequence[Clip]],
    store: BlockStore,
    kept: set[str],
) -> Iterator[Record]:
    """The records of the clips that are kept, in the order of the clips."""
    places: dict[str, dict[str, tuple[str, int]]] = {f: {} for f in arguments.features}
    for key in blocks:
        for number, row in enumerate(store.rows(key)):
            for feature in arguments.features:
                if row["name"] in kept and feature not in row["problems"]:
                    places[feature][row["name"]] = key, number
    arrays = {f: FeatureOf(store, f, where) for f, where in places.items() if where}
    if arguments.csv:
        yield from (r for r in annotated(arguments, arrays) if r.name in kept)
        return
    for part in blocks.values():
        for clip in part:
            if clip.name in kept:
                features = {f: a[clip.name] for f, a in arrays.items() if clip.name in a}
                yield Record(name=clip.name, features=features)


def summary(out: Path) -> list[str]:
    """A line per feature of the records."""
    return [
        f"{feature} [{facts['frames']}, {facts['width']}] of {facts['encoder']}: "
        f"{facts['present']:,} clips"
        for feature, facts in read_manifest(out).features.items()
    ]


def _identity(arguments: argparse.Namespace, keys: Sequence[str], elsewhere: Elsewhere) -> str:
    """A hash of everything that determines the output."""
    table = sha256_of(arguments.csv.expanduser()) if arguments.csv else None
    facts = [
        list(keys),
        table,
        arguments.ignore,
        arguments.allow_missing,
        arguments.split,
        sorted(elsewhere.files.items()),
    ]
    return json_sha256(facts)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; see `cli.exit_on_error`."""
    out: Path | None = None
    with cli.exit_on_error(
        interrupted="interrupted; the same command goes on from there",
        out_of_memory="lower --batch or --workers",
        os_error=lambda error: cli.describe_os_error(error, out),
    ):
        arguments = parse_arguments(argv)
        out = arguments.out
        try:
            extract(arguments)
        except ModuleNotFoundError as error:
            raise EncoderError(MISSING.format(error.name)) from None


if __name__ == "__main__":
    main()
