"""A crowd of small networks that learned from human labels votes on clips without any.

    affectgpt crowd train --out crowd --set mer2023:emotion,valence=DIR \\
        --set meld:emotion=DIR --against records/clips
    affectgpt crowd vote --crowd crowd --records records/clips \\
        --out caption/votes.csv

A corpus is a record directory with human labels (column emotion, or valence with its range),
extracted with the same encoders as the clips to vote on. Each has folds x seeds x widths members,
MERBench's attention fusion of face, audio and subtitle, and one vote. A corpus that is finished is
kept when the same command runs again.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from affectgpt_jax import cli
from affectgpt_jax.common.text import print_lines, say


def _corpus(text: str) -> tuple[str, tuple[str, ...], Path]:
    """NAME:KIND,KIND=DIR."""
    head, equals, place = text.partition("=")
    name, colon, kinds = head.partition(":")
    if not (name and equals and colon and place):
        raise ValueError(f"{text!r} is no corpus; expected NAME:emotion,valence=DIR")
    return name, tuple(kind.strip() for kind in kinds.split(",")), Path(place).expanduser()


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.make_parser("affectgpt crowd", __doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="train | vote")
    add = verbs.add_parser("train", help="train the members").add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="the crowd to write")
    add(
        "--set",
        dest="sets",
        action="append",
        required=True,
        type=cli.argument_type(_corpus),
        metavar="NAME:KINDS=DIR",
        help="a corpus, what it teaches (emotion, valence, or both) and its records",
    )
    add(
        "--against",
        nargs="+",
        default=[],
        type=Path,
        metavar="DIR",
        help="records whose clips must not be learned: test sets, and the clips to vote on",
    )
    add("--folds", type=int, default=5, metavar="N", help="parts of a corpus; default: 5")
    add("--seeds", type=int, default=2, metavar="N", help="members of a fold; default: 2")
    add(
        "--hidden",
        type=int,
        nargs="+",
        default=[128],
        metavar="N",
        help="widths of layers, each with its own members; default: 128",
    )
    add("--epochs", type=int, default=100, metavar="N", help="at most; default: 100")
    add("--patience", type=int, default=5, metavar="N", help="epochs without progress; default: 5")
    add("--seed", type=int, default=0, metavar="N", help="of all that is random; default: 0")
    text = verbs.choices["train"].add_mutually_exclusive_group()
    text.add_argument("--no-text", action="store_true", help="do not read subtitles")
    text.add_argument("--text-base", type=Path, metavar="DIR", help="that reads subtitles")
    add = verbs.add_parser("vote", help="vote on clips").add_argument
    add("--crowd", type=Path, required=True, metavar="DIR", help="what train wrote")
    add("--records", type=Path, required=True, metavar="DIR", help="the clips")
    add("--out", type=Path, required=True, metavar="FILE", help="the CSV file to write")
    add("--text-base", type=Path, metavar="DIR", help="as in training; default: the shipped one")
    arguments = parser.parse_args(argv)
    if arguments.verb == "train":
        names = [name for name, _, _ in arguments.sets]
        for name, times in Counter(names).items():
            if times > 1:
                parser.error(f"--set names {name!r} {times} times; name corpora apart")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; see `cli.exit_on_error`."""
    with cli.exit_on_error(
        interrupted="interrupted; the same command keeps the corpora that are finished",
        out_of_memory="lower --seeds or --hidden",
    ):
        arguments = parse_arguments(argv)
        from . import run

        if arguments.verb == "train":
            run.train(
                {name: place for name, _, place in arguments.sets},
                arguments.out.expanduser(),
                heads={name: kinds for name, kinds, _ in arguments.sets},
                text=arguments.text_base or not arguments.no_text,
                against=arguments.against,
                folds=arguments.folds,
                seeds=arguments.seeds,
                hidden=tuple(arguments.hidden),
                epochs=arguments.epochs,
                patience=arguments.patience,
                seed=arguments.seed,
                say=say,
            )
            print_lines([f"{arguments.out / run.REPORT_FILE}"])
        else:
            out = arguments.out.expanduser()
            votes = run.vote(
                arguments.crowd, arguments.records, out, text=arguments.text_base, say=say
            )
            lines = [f"{out}: {len(votes):,} clips"]
            for field in ("emotion", "sentiment"):
                words = Counter(getattr(vote, field) or "(no vote)" for vote in votes)
                lines += [f"{field:>10}  {word}: {n:,}" for word, n in words.most_common()]
            print_lines(lines)


if __name__ == "__main__":
    main()
