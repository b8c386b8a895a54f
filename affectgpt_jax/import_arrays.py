"""Turn a CSV file and arrays of features into records to train on.

    affectgpt import-arrays --csv clips.csv --face features/clip \\
        --audio features/hubert --encoder face=clip-vit-l-14 \\
        --encoder audio=hubert-large --out /records/mine

The CSV file has a row per clip: its name, and any of the columns below. A feature's arrays, [T, d]
per clip, are a folder of NAME.npy, an .npz archive with an array per name, or one with the arrays
names [N] and, under another key, [N, T, d].
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from affectgpt_jax import cli
from affectgpt_jax.common.text import listed, print_lines
from affectgpt_jax.data.arrays import COLUMNS, Arrays, open_arrays, records_from_csv
from affectgpt_jax.data.modalities import feature_names
from affectgpt_jax.data.records import Record, RecordDataset, RecordError, write_records

MOST_FREQUENT = 5


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        SystemExit: after printing the help, or one sentence about what is wrong.
    """
    description = f"{__doc__}\nColumns: {', '.join(COLUMNS)}"
    parser = cli.make_parser("affectgpt import-arrays", description)
    add = parser.add_argument
    add("--csv", type=Path, required=True, metavar="FILE", help="a row per clip")
    for feature in feature_names():
        add(f"--{feature}", type=Path, metavar="DIR", help=f"{feature} arrays: a folder or .npz")
    add(
        "--encoder",
        action="append",
        default=[],
        metavar="FEATURE=NAME",
        help="what the arrays of a feature were made with; the manifest keeps the name",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="the record directory to write")
    add("--split", metavar="NAME", help="name of the split; default: that of the directory")
    add("--ignore", action="append", default=[], metavar="COLUMN", help="leave a column out")
    add(
        "--allow-missing",
        action="store_true",
        help="a clip without an array goes without that modality; default: stop",
    )
    add("--frames", type=int, metavar="N", help="sample every array to N rows; default: as it is")
    add("--encoding", default="utf-8", help="of the CSV file; default: utf-8")
    return parser.parse_args(argv)


def encoders(pairs: Sequence[str], given: Mapping[str, Path]) -> dict[str, str]:
    """The encoder of every feature with arrays, from `FEATURE=NAME`.

    Raises:
        RecordError: another form, a feature named twice or without arrays, or arrays without an
            encoder.
    """
    found: dict[str, str] = {}
    for pair in pairs:
        feature, _, name = pair.partition("=")
        if not name or feature in found:
            what = f"names {feature!r} twice" if name else "is not FEATURE=NAME"
            raise RecordError(f"--encoder {pair} {what}; as in --encoder face=clip-vit-l-14")
        found[feature] = name
    for feature in (*found, *given):
        if feature not in given:
            raise RecordError(f"--encoder {feature}={found[feature]}: there is no --{feature}")
        if feature not in found:
            raise RecordError(
                f"--{feature} needs the name of its encoder, as in --encoder {feature}=NAME"
            )
    return found


def watch_zeros(records: Iterable[Record], zeros: dict[str, list[str]]) -> Iterator[Record]:
    """The records; of each feature, `zeros` gets the clips with a row that is all zero."""
    for record in records:
        for feature, values in record.features.items():
            if values.dtype.kind in "fiu" and not values.any(axis=1).all():
                zeros.setdefault(feature, []).append(record.name)
        yield record


def summary(
    dataset: RecordDataset, arrays: Mapping[str, Arrays], zeros: Mapping[str, Sequence[str]]
) -> list[str]:
    """What was written, in lines: features, clips without one, arrays without a clip, labels."""
    manifest, index = dataset.manifest, dataset.index
    lines = [f"{len(index):,} clips, split {manifest.split!r}"]
    for feature, facts in manifest.features.items():
        shape, present = [facts["frames"], facts["width"]], facts["present"]
        lines.append(f"{feature} {shape} of {facts['encoder']}: {present:,} clips")
        if missing := [entry.name for entry in index if feature not in entry.present]:
            lines.append(f"  clips without: {len(missing):,}: {listed(missing)}")
        if blank := zeros.get(feature):
            lines.append(
                f"  clips with rows that are all zero, as others store a missing {feature}: "
                f"{len(blank):,}: {listed(blank)}; the model reads them as values: leave such "
                "arrays out, and pass --allow-missing"
            )
        if unused := sorted(set(arrays[feature]) - {entry.name for entry in index}):
            lines.append(f"  arrays without a row, left out: {len(unused):,}: {listed(unused)}")
    for column in COLUMNS:
        values = [getattr(entry, column) for entry in index]
        values = [value for value in values if value not in ("", (), None)]
        if column != "name" and values:
            lines.append(f"{column}: {len(values):,} clips{_facts(column, values)}")
    return lines


def _facts(column: str, values: list) -> str:
    """More about the values of a column that has words or numbers."""
    if column == "valence":
        return f", {min(values):g} to {max(values):g}"
    if column not in ("labels", "emotion", "source"):
        return ""
    words = [w for value in values for w in (value if isinstance(value, tuple) else (value,))]
    top = Counter(words).most_common(MOST_FREQUENT)
    each = f", {len(words) / len(values):.2f} each" if column == "labels" else ""
    different = f", {len(set(words)):,} different"
    return f"{each}{different}, most often {', '.join(f'{w} ({n:,})' for w, n in top)}"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; see `cli.exit_on_error`."""
    with cli.exit_on_error():
        arguments = parse_arguments(argv)
        given = {f: path for f in feature_names() if (path := getattr(arguments, f)) is not None}
        names = encoders(arguments.encoder, given)
        arrays = {feature: open_arrays(path.expanduser()) for feature, path in given.items()}
        records = records_from_csv(
            arguments.csv.expanduser(),
            arrays,
            ignore=arguments.ignore,
            allow_missing=arguments.allow_missing,
            frames=arguments.frames,
            encoding=arguments.encoding,
        )
        out, zeros = arguments.out.expanduser(), {}
        with cli.writing(str(arguments.out)):
            watched = watch_zeros(records, zeros)
            write_records(out, watched, encoders=names, split=arguments.split)
        print_lines([f"{out}:", *summary(RecordDataset(out), arrays, zeros)])


if __name__ == "__main__":
    main()
