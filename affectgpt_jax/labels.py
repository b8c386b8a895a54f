"""The truth of the data sets of MER-UniBench as plain CSV files, with what is missing.

    affectgpt labels --set meld --root datasets/meld-process \\
        --out truth/meld.csv
    affectgpt labels --all --root datasets --out truth \\
        --allow-pickle

A file has the columns name, openset or emotion or valence, and subtitle. Below the root, a set lies
in the folder that the AffectGPT release uses, or in one that has its key as its name:

{sets}
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from affectgpt_jax import cli
from affectgpt_jax.common.errors import ReadError
from affectgpt_jax.common.files import atomic_write
from affectgpt_jax.common.text import print_lines
from affectgpt_jax.evaluation.datasets import BY_KEY, DATASETS
from affectgpt_jax.evaluation.label_files import SetTruth, find_set, read_set


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        SystemExit: after printing the help, or one sentence about what is wrong.
    """
    sets = "\n".join(f"    {d.key:<11}{d.folder}: {' or '.join(d.labels)}" for d in DATASETS)
    parser = cli.make_parser("affectgpt labels", __doc__.format(sets=sets))
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--set", choices=BY_KEY, metavar="KEY", help=f"one of {', '.join(BY_KEY)}")
    which.add_argument("--all", action="store_true", help="every set that lies below the root")
    add("--root", required=True, metavar="DIR", help="where the sets, or the set, lie")
    add("--out", required=True, metavar="PATH", help="the file to write; with --all, the directory")
    add(
        "--allow-pickle",
        action="store_true",
        help="read label files in npz: plain containers, text and numbers; nothing is executed",
    )
    return parser.parse_args(argv)


def _write(truth: SetTruth, path: Path) -> None:
    """Write the CSV file.

    Raises:
        ReadError: a name or text that UTF-8 cannot hold.
        OSError: the file cannot be written.
    """
    try:
        content = truth.as_csv().encode("utf-8")
    except UnicodeEncodeError as error:
        piece = error.object[max(0, error.start - 20) : error.end]
        raise ReadError(f"{truth.dataset.name}: {piece!r} is not text that UTF-8 holds") from None
    with atomic_write(path) as file:
        file.write(content)


def write_labels(arguments: argparse.Namespace) -> Iterator[str]:
    """Write the truth files; yields lines about each set as it is done.

    Raises:
        ReadError: a file that cannot be used, or no set below the root.
        UserError: a file that cannot be written.
    """
    root, out = Path(arguments.root).expanduser(), Path(arguments.out).expanduser()
    wanted = DATASETS if arguments.all else (BY_KEY[arguments.set],)
    found = {dataset: find_set(dataset, root, alone=not arguments.all) for dataset in wanted}
    if not any(found.values()):
        files = " or ".join(dict.fromkeys(name for d in wanted for name in d.labels))
        folders = (
            f", or in its folder {wanted[0].folder}" if len(wanted) == 1 else " or its folders"
        )
        raise ReadError(f"--root={arguments.root}: found no {files} there{folders}")
    for dataset, labels in found.items():
        if labels is None:
            yield f"{dataset.name}: not found ({' or '.join(dataset.labels)})"
            continue
        truth = read_set(dataset, labels, arguments.allow_pickle)
        path = out / f"{dataset.key}.csv" if arguments.all else out
        with cli.writing(f"--out={path}"):
            _write(truth, path)
        yield f"{dataset.name}: {len(truth.names):,} clips of {labels} -> {path}"
        yield from (f"  {line}" for line in truth.summary())


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; see `cli.exit_on_error`."""
    with cli.exit_on_error():
        print_lines(write_labels(parse_arguments(argv)))


if __name__ == "__main__":
    main()
