"""Tables 3 and 4 and Figure 4 on real data: `python -m benchmarks.ablation_real --table 4 ...`.

    python -m benchmarks.ablation_real --table 4 --llm DIR --records records \\
        --against records/unibench/mer2024 --workdir runs/t4

checks the record directories of the rows and prints the command of each run, of its evaluation,
and of the report beside the paper's figures. With --submit, runs are handed to SLURM.

The rows of a table are folders below --records; those of Table 4 are what `affectgpt caption filter
--levels ... --write records/t4-...` writes. Of Table 3, t3-NAME-emotion are the pairs of t3-NAME
whose text names an emotion, which `affectgpt caption labels --records ... --write ...` picks out,
as the paper does with --base-url and --model, else by rules; where they lack, the command is
printed. All runs see the same number of clips, as the paper's do, however large their set is. Every
set must have the same features of the same encoders (in Figure 4, the same clips instead), and no
clip of --against may be in one.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from affectgpt_jax.cli import exit_on_error, make_parser
from affectgpt_jax.common.errors import UserError
from affectgpt_jax.common.text import listed, print_lines
from affectgpt_jax.data.records import (
    INDEX_FILE,
    MANIFEST_FILE,
    Manifest,
    read_index,
    read_manifest,
)

CLIPS = 900_000  # that a run sees: 300,000 updates of 3
WIDTHS = {"face": "video_width", "frame": "video_width", "audio": "audio_width"}
LAUNCH = "configs/launch/slurm.sh"


class AblationError(UserError, ValueError):
    """Record directories that cannot be compared."""


class Row(NamedTuple):
    """A run: its name in the report, the folder of its records, and flags of its own."""

    name: str
    folder: str
    flags: tuple[str, ...] = ()


# Sets of questions and answers, with the one input that they have.
QA = "--config.label=qa"
EMOTION = "-emotion"  # of these, the pairs that name one
GENERAL = {"minigpt4": "image", "videochat": "frame", "llava": "image", "wavcaps": "audio"}
TABLES: dict[str, tuple[Row, ...]] = {
    "3": (
        *(
            Row(f"{name}{suffix}", f"t3-{name}{suffix}", (f"--config.input={kind}", QA))
            for name, kind in GENERAL.items()
            for suffix in ("", EMOTION)
        ),
        *(Row(name, f"t3-{name}") for name in ("emovit", "mafw", "merr-coarse", "merr-fine")),
        Row("mercaption", "t4-none"),
        Row("mercaptionplus", "t4-plus"),
    ),
    "4": tuple(Row(name, f"t4-{name}") for name in ("none", "low", "low-e", "low-s", "plus")),
    # ImageBind is no encoder of data_prep, so its row is left out.
    "fig4": tuple(
        Row(name, f"f4-{name}")
        for name in ("clip", "siglip", "eva-clip", "dinov2", "data2vec", "wavlm")
    ),
}  # fmt: skip


def check_rows(
    table: str, rows: Sequence[Row], records: Path, against: Sequence[Path]
) -> dict[Row, Manifest]:
    """The manifests of the rows that have records.

    Raises:
        AblationError: fewer than two of them, other features or encoders, other clips in Figure 4,
            or a clip that is in a set of `against`, too.
        RecordError: a directory that cannot be used.
    """
    found = {
        row: read_manifest(records / row.folder)
        for row in rows
        if (records / row.folder / MANIFEST_FILE).is_file()
    }
    if len(found) < 2:
        wanted = ", ".join(row.folder for row in rows)
        raise AblationError(
            f"{records} has records of {len(found)} of the rows of {table}; expected two or more "
            f"of the folders {wanted}"
        )
    names = {row: _names(records / row.folder, manifest) for row, manifest in found.items()}
    first, *others = [row for row in found if not row.flags] or found
    for row in others:
        if table == "fig4":
            if differing := sorted(names[first] ^ names[row]):
                raise AblationError(
                    f"{row.folder} and {first.folder} have other clips: {listed(differing)}; "
                    "extract both from the same CSV file"
                )
        elif not row.flags and _encoders(found[first]) != _encoders(found[row]):
            raise AblationError(
                f"{row.folder} has the features {_encoders(found[row])}, and {first.folder} "
                f"{_encoders(found[first])}; extract both with the same encoders"
            )
    for place in against:
        tested = _names(place, read_manifest(place))
        for row, own in names.items():
            if shared := sorted(own & tested):
                raise AblationError(
                    f"{row.folder} has {len(shared):,} clips of {place}: {listed(shared)}; leave "
                    "them out, as with extract --against"
                )
    return found


def _names(place: Path, manifest: Manifest) -> set[str]:
    return {entry.name for entry in read_index(place / INDEX_FILE, manifest)}


def _encoders(manifest: Manifest) -> dict[str, str]:
    return {name: facts["encoder"] for name, facts in manifest.features.items()}


def train_flags(
    row: Row, manifest: Manifest, arguments: Mapping[str, object], overrides: Sequence[str]
) -> list[str]:
    """The flags of a run's training."""
    widths = {WIDTHS[f]: facts["width"] for f, facts in manifest.features.items() if f in WIDTHS}
    batch = arguments["batch_size"]
    return [
        f"--config=affectgpt_qwen25_7b:{batch}",
        f"--workdir={Path(arguments['workdir'], row.name)}",
        f"--config.llm={arguments['llm']}",
        f"--config.data.train={Path(arguments['records'], row.folder)}",
        f"--config.steps={round(CLIPS * arguments['share']) // batch}",
        *(f"--config.projectors.{key}={width}" for key, width in sorted(widths.items())),
        *row.flags,
        *overrides,
    ]


def commands(
    table: str,
    found: Mapping[Row, Manifest],
    arguments: Mapping[str, object],
    overrides: Sequence[str],
) -> Iterator[tuple[str, list[str]]]:
    """What is to be run, as "train", "evaluate" or "report", and words of a command line."""
    workdir = Path(arguments["workdir"])
    for row, manifest in found.items():
        yield "train", train_flags(row, manifest, arguments, overrides)
    for row in found:
        words = [f"--workdir={workdir / row.name}", f"--root={arguments['tests']}"]
        yield "evaluate", ["affectgpt", "evaluate", *words]
    runs = (f"--run={row.name}={workdir / row.name}" for row in found)
    yield "report", ["affectgpt", "report", f"--ablation={table}", "--peers", *runs,
                     f"--out={workdir / 'report'}"]  # fmt: skip


def preparation(records: Path, whole: str, emotional: str) -> list[str]:
    """What makes the pairs that name an emotion of a folder with all pairs, as words."""
    return ["affectgpt", "caption", "labels", f"--out={records / whole}-labels",
            f"--records={records / whole}", f"--write={records / emotional}"]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; see `cli.exit_on_error`."""
    with exit_on_error():
        parser = make_parser("python -m benchmarks.ablation_real", __doc__)
        add = parser.add_argument
        add("--table", choices=TABLES, required=True, help="3, 4 or fig4")
        add("--llm", required=True, metavar="DIR", help="the base, as config.llm")
        add("--records", type=Path, required=True, metavar="DIR", help="the sets lie below it")
        add("--workdir", type=Path, required=True, metavar="DIR", help="of the runs")
        add("--tests", default="records/unibench", metavar="DIR", help="records of the test sets")
        add("--against", nargs="+", default=[], type=Path, metavar="DIR", help="test records")
        add("--batch-size", type=int, default=192, metavar="N", help="default: 192")
        add("--share", type=float, default=1.0, metavar="X", help="of the paper's length; a pilot")
        add("--submit", action="store_true", help="hand the runs to SLURM by sbatch")
        arguments, overrides = parser.parse_known_args(argv)
        if arguments.batch_size < 1 or not 0 < arguments.share <= 1:
            parser.error("--batch-size must be 1 or more, and --share above 0 and at most 1")
        rows = TABLES[arguments.table]
        found = check_rows(arguments.table, rows, arguments.records, arguments.against)
        if lacking := [row.folder for row in rows if row not in found]:
            print_lines([f"# left out, without records: {', '.join(lacking)}"])
        there = [row.folder for row in found]
        for folder in lacking:
            if folder.endswith(EMOTION) and (whole := folder.removesuffix(EMOTION)) in there:
                words = preparation(arguments.records, whole, folder)
                print_lines([f"# {folder} is made by: {shlex.join(words)}"])
        for kind, words in commands(arguments.table, found, vars(arguments), overrides):
            line = ["sbatch", LAUNCH, *words] if kind == "train" else words
            print_lines([shlex.join(line)])
            if arguments.submit and kind == "train":
                subprocess.run(line, check=True)


if __name__ == "__main__":
    main()
