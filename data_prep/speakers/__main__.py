"""Is the person who is seen in a clip the one who is heard? A verdict for each clip.

    affectgpt speakers check --csv clips.csv --clips clips --out speakers.csv
    affectgpt speakers check --clips clips --out speakers.csv \\
        --network light-asd=finetuning_TalkSet.model
    affectgpt speakers calibrate --verdicts speakers.csv --truth truth.csv

Without a network, synchrony of mouth and sound is judged; it drops a clip on strong evidence only
and says "unsure" else. light-asd and lr-asd are networks of Junhua Liao and others, who publish
their weights; those trained on TalkSet suit film. A file of truth has the columns name and speaking
(0 or 1); 200 clips are enough.

The same command, stopped and run again, goes on where it stopped. Under srun each task takes its
share of the blocks, as with --shard I/N; the last one to end writes the file.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from affectgpt_jax import cli
from affectgpt_jax.common.text import print_lines

from ..clips import find_clips
from ..shards import add_shard_flag, shard_of_task
from . import calibrate
from .synchrony import DETECTOR
from .verdicts import read_speakers


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.make_parser("affectgpt speakers", __doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="check | calibrate")
    check = verbs.add_parser("check", help="judge clips")
    add = check.add_argument
    add("--clips", nargs="+", default=[], type=Path, metavar="DIR", help="folders of media files")
    add("--csv", type=Path, metavar="FILE", help="which clips, and their files")
    add("--out", type=Path, required=True, metavar="FILE", help="the CSV file to write")
    add(
        "--network",
        default=DETECTOR,
        metavar="NAME=FILE",
        help=f"light-asd=FILE, lr-asd=FILE, or {DETECTOR}, the default",
    )
    add("--passes", type=int, metavar="N", help="of a network, 1 to 6; default: 1 on a CPU, else 6")
    add("--share", type=float, default=0.5, metavar="X", help="of the voiced frames; default: 0.5")
    add("--workers", type=int, metavar="N", help="processes that decode; default: one a core")
    add_shard_flag(add)
    add = verbs.add_parser("calibrate", help="compare verdicts with labels").add_argument
    add("--verdicts", type=Path, required=True, metavar="FILE", help="what check wrote")
    add("--truth", type=Path, required=True, metavar="FILE", help="a CSV file: name, speaking")
    arguments = parser.parse_args(argv)
    if arguments.verb == "check":
        if not arguments.clips and not arguments.csv:
            check.error("give --clips DIR, --csv FILE, or both")
        if arguments.workers is not None and arguments.workers < 1:
            check.error(f"--workers is {arguments.workers}; expected 1 or more")
    return arguments


def _check(arguments: argparse.Namespace) -> None:
    # JAX, OpenCV and PyAV, which the help does without.
    from .check import check_clips, load_detector, told

    detector = load_detector(arguments.network, arguments.passes, arguments.share)
    found = find_clips(
        [path.expanduser() for path in arguments.clips],
        arguments.csv and arguments.csv.expanduser(),
    )
    out = arguments.out.expanduser()
    rows = check_clips(
        found.clips,
        out,
        detector,
        workers=arguments.workers,
        shard=arguments.shard or shard_of_task(),
    )
    if rows is None:
        print_lines(["this share is finished; another one will write the file"])
    else:
        print_lines([f"{out}: {len(rows):,} clips", *told(rows), *found.remarks()])


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; see `cli.exit_on_error`."""
    with cli.exit_on_error(
        interrupted="interrupted; the same command goes on from there",
        out_of_memory="lower --workers",
    ):
        arguments = parse_arguments(argv)
        if arguments.verb == "check":
            _check(arguments)
        else:
            rows = read_speakers(arguments.verdicts)
            truth = calibrate.read_truth(arguments.truth)
            print_lines(calibrate.lines(calibrate.calibrate(rows, truth)))


if __name__ == "__main__":
    main()
