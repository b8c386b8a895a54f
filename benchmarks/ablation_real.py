"""Tables 3 and 4 and Figure 4 on real data: `python -m benchmarks.ablation_real --table 4 ...`.

    python -m benchmarks.ablation_real --table 4 --llm DIR --records records \\
        --tests records/unibench --workdir runs/t4

checks the record directories of the rows and prints the command of each run, of its evaluation on
the sets below --tests, and of the report beside the paper's figures. With --submit, runs are handed
to SLURM.

The rows of a table are folders below --records; those of Table 4 are what `affectgpt caption filter
--levels ... --write records/t4-...` writes. Of Table 3, t3-NAME-emotion are the pairs of t3-NAME
whose text names an emotion, which `affectgpt caption labels --records ... --write ...` picks out,
as the paper does with --base-url and --model, else by rules; where they lack, the command is
printed. All runs see the same number of clips, as the paper's do, however large their set is. The
general sets are trained on their own questions, and asked about emotion as all others are. Sets of
images are left out, since clips have no image to be asked about: the paper shows such models
frames, while images here have a head of their own.

The sets of a table must have the features that they share of the same encoders, which are those of
the tests. Rows of Figure 4 are the same clips by other encoders, so each has tests of its own:
--tests 'records/unibench-{row}', extracted as its f4-... was. No clip of a test, nor of --against,
may be in a set: files are compared by the hashes in extraction.csv, else features and names.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from affectgpt_jax import build
from affectgpt_jax.cli import exit_on_error, make_parser
from affectgpt_jax.common.errors import UserError
from affectgpt_jax.common.text import listed, print_lines
from affectgpt_jax.config import parse_command_line
from affectgpt_jax.data.modalities import MODALITIES
from affectgpt_jax.data.records import (
    INDEX_FILE,
    MANIFEST_FILE,
    Manifest,
    read_index,
    read_manifest,
)
from affectgpt_jax.evaluation.datasets import DATASETS
from data_prep.crowd import corpora

CLIPS = 900_000  # that a run sees: 300,000 updates of 3
WIDTHS = {"face": "video_width", "frame": "video_width", "audio": "audio_width"}
LAUNCH = "configs/launch/slurm.sh"
TESTS, ROW = "records/unibench", "{row}"


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
        Row("emovit", "t3-emovit", ("--config.input=image",)),
        *(Row(name, f"t3-{name}") for name in ("mafw", "merr-coarse", "merr-fine")),
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


def check_rows(table: str, rows: Sequence[Row], records: Path) -> dict[Row, Manifest]:
    """The manifests of the rows that have records.

    Raises:
        AblationError: fewer than two of them; a feature that several encoders have made; or in
            Figure 4 other clips, or twice the same encoders.
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
    if table == "fig4":
        _check_encoder_rows(found, records)
        return found
    by: dict[str, tuple[str, Row]] = {}
    for row, manifest in found.items():
        for feature, encoder in _encoders(manifest).items():
            other, first = by.setdefault(feature, (encoder, row))
            if other != encoder:
                raise AblationError(
                    f"{row.folder} has the feature {feature} of {encoder}, and {first.folder} of "
                    f"{other}; extract both with the same encoders"
                )
    return found


def _check_encoder_rows(found: Mapping[Row, Manifest], records: Path) -> None:
    first, *others = found
    names = _names(records / first.folder, found[first])
    for row in others:
        if differing := sorted(names ^ _names(records / row.folder, found[row])):
            raise AblationError(
                f"{row.folder} and {first.folder} have other clips: {listed(differing)}; "
                "extract both from the same CSV file"
            )
    by: dict[tuple[tuple[str, str], ...], Row] = {}
    for row, manifest in found.items():
        encoders = tuple(sorted(_encoders(manifest).items()))
        if (other := by.setdefault(encoders, row)) != row:
            raise AblationError(
                f"{row.folder} and {other.folder} have the same encoders, {dict(encoders)}; "
                "extract one of them with another"
            )


def _names(place: Path, manifest: Manifest) -> set[str]:
    return {entry.name for entry in read_index(place / INDEX_FILE, manifest)}


def _encoders(manifest: Manifest) -> dict[str, str]:
    return {name: facts["encoder"] for name, facts in manifest.features.items()}


def tests_of(row: Row, arguments: Mapping[str, object]) -> Path:
    """Where the test sets of a row are."""
    return Path(str(arguments["tests"]).replace(ROW, row.name)).expanduser()


def not_askable(
    found: Mapping[Row, Manifest], arguments: Mapping[str, object], overrides: Sequence[str]
) -> dict[Row, tuple[str, ...]]:
    """The rows that see features which their tests lack, and these. Where no test is there yet, it
    may get all features that `data_prep.extract` computes.

    Raises:
        ConfigError: tests by another encoder than the row's, or flags that are no config's.
    """
    lacking = {}
    for row, manifest in found.items():
        config, flags = parse_command_line(train_flags(row, manifest, arguments, overrides))
        mode = build.input_mode(config)
        root = tests_of(row, arguments)
        there = {
            place: read_manifest(place)
            for place in (root / dataset.key for dataset in DATASETS)
            if (place / MANIFEST_FILE).is_file()
        }
        missing = {f for test in there.values() for f in mode.features if f not in test.features}
        if not there:
            missing = {f for f in mode.features if not MODALITIES[f].encoder}
        if missing:
            lacking[row] = tuple(sorted(missing))
            continue
        trained = build.training_encoders(config, flags.workdir)
        for place, test in there.items():
            build.check_encoders(trained, test, mode, str(place), lambda s: print_lines([f"# {s}"]))
    return lacking


class Compared:
    """Which clips are in several record directories; each is read once."""

    def __init__(self) -> None:
        self._cheap: dict[Path, corpora.Marks] = {}
        self._whole: dict[Path, corpora.Marks] = {}

    def shared(self, mine: Path, theirs: Path) -> tuple[set[str], str]:
        """Clips of `mine` that are in `theirs`, too, and what they were compared by.

        A clip of the same name is taken to be the same where nothing tells that it is another.
        """
        a, b = self._of_files(mine), self._of_files(theirs)
        by = "the hashes of their files"
        if not all(a["file"]) or not all(b["file"]):
            a, b = self._of_features(mine, a), self._of_features(theirs, b)
            by = ", ".join(corpora.compared_by(a, b))
        found = corpora.shared(a, b)
        same_name = set(found.get("name", ())) - corpora.told_apart(a, b)
        return corpora.same_clips(found) | same_name, by

    def _of_files(self, place: Path) -> corpora.Marks:
        if place not in self._cheap:
            names = sorted(_names(place, read_manifest(place)))
            hashes = corpora.file_hashes(place)
            files = [hashes.get(name, "") for name in names]
            self._cheap[place] = corpora.Marks(name=names, file=files, features={})
        return self._cheap[place]

    def _of_features(self, place: Path, otherwise: corpora.Marks) -> corpora.Marks:
        if place not in self._whole:
            has = set(corpora.FEATURES) & set(read_manifest(place).features)
            self._whole[place] = corpora.read_clips(place, str(place)).marks if has else otherwise
        return self._whole[place]


def check_leaks(rows: Sequence[Row], arguments: Mapping[str, object]) -> list[str]:
    """Compare the sets of rows with all records below their tests, and with those of --against.

    Returns:
        What was compared, and how.

    Raises:
        AblationError: a clip is in both.
    """
    compared, lines = Compared(), []
    for row in rows:
        root, own = tests_of(row, arguments), Path(arguments["records"], row.folder)
        below = [path.parent for path in sorted(root.rglob(MANIFEST_FILE))]
        if not below:
            lines.append(f"leaks of {row.folder}: not checked, since {root} has no records yet")
        for place in dict.fromkeys([*below, *arguments["against"]]):
            shared, by = compared.shared(own, place)
            if shared:
                raise AblationError(
                    f"{row.folder} has {len(shared):,} clips of {place}: {listed(sorted(shared))}; "
                    "leave them out, as with extract --against"
                )
            how = f"none, by {by}" if by else "none by name; not checked by content, none in common"
            lines.append(f"leaks of {row.folder} from {place}: {how}")
    return lines


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
        words = [f"--workdir={workdir / row.name}", f"--root={tests_of(row, arguments)}"]
        if QA in row.flags:  # which has trained no question about emotions
            words.append("--question=description")
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
        add(
            "--tests",
            metavar="DIR",
            help="records of the test sets, in folders by their keys; "
            f"{ROW} is the row's name; default: {TESTS}, of fig4 {TESTS}-{ROW}",
        )
        add(
            "--against",
            nargs="+",
            default=[],
            type=Path,
            metavar="DIR",
            help="records of clips that no set may have, beside those of --tests",
        )
        add("--batch-size", type=int, default=192, metavar="N", help="default: 192")
        add("--share", type=float, default=1.0, metavar="X", help="of the paper's length; a pilot")
        add("--submit", action="store_true", help="hand the runs to SLURM by sbatch")
        arguments, overrides = parser.parse_known_args(argv)
        if arguments.batch_size < 1 or not 0 < arguments.share <= 1:
            parser.error("--batch-size must be 1 or more, and --share above 0 and at most 1")
        if arguments.tests is None:
            arguments.tests = f"{TESTS}-{ROW}" if arguments.table == "fig4" else TESTS
        if arguments.table == "fig4" and ROW not in arguments.tests:
            parser.error(
                f"--tests {arguments.tests}: rows of fig4 differ in encoders, so each needs tests "
                f"of its own; put {ROW} into the path, as in --tests '{TESTS}-{ROW}'"
            )
        rows = TABLES[arguments.table]
        found = check_rows(arguments.table, rows, arguments.records)
        unasked = not_askable(found, vars(arguments), overrides)
        if unasked:
            which = ", ".join(f"{row.folder} ({', '.join(f)})" for row, f in unasked.items())
            print_lines([f"# left out, since the tests lack what they see: {which}"])
        if len(found) - len(unasked) < 2:
            raise AblationError(
                f"the tests {arguments.tests} can be asked of {len(found) - len(unasked)} of the "
                f"rows of {arguments.table}; expected two or more, so give them the features above"
            )
        asked = {row: manifest for row, manifest in found.items() if row not in unasked}
        print_lines(f"# {line}" for line in check_leaks([*asked], vars(arguments)))
        if lacking := [row.folder for row in rows if row not in found]:
            print_lines([f"# left out, without records: {', '.join(lacking)}"])
        there = [row.folder for row in asked]
        for folder in lacking:
            if folder.endswith(EMOTION) and (whole := folder.removesuffix(EMOTION)) in there:
                words = preparation(arguments.records, whole, folder)
                print_lines([f"# {folder} is made by: {shlex.join(words)}"])
        for kind, words in commands(arguments.table, asked, vars(arguments), overrides):
            line = ["sbatch", LAUNCH, *words] if kind == "train" else words
            print_lines([shlex.join(line)])
            if arguments.submit and kind == "train":
                subprocess.run(line, check=True)


if __name__ == "__main__":
    main()
