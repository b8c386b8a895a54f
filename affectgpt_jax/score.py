"""Scores of prediction files, as MER-UniBench computes them; needs no accelerator and no model.

    affectgpt score --task fine --predictions predictions.jsonl \\
        --truth truth.csv

Several prediction files are checkpoints of one run, the last of them the one that was fixed
beforehand: it stands beside the best, which is marked as chosen on the test set.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from affectgpt_jax import cli
from affectgpt_jax.common.text import print_lines
from affectgpt_jax.evaluation import metrics
from affectgpt_jax.evaluation.datasets import TASKS
from affectgpt_jax.evaluation.lexicon import load_lexicon
from affectgpt_jax.evaluation.readers import pair, read_predictions, read_truth
from affectgpt_jax.evaluation.results import (
    NEEDS_LEXICON,
    TITLES,
    Result,
    percent,
    protocols,
    score_checkpoints,
)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        SystemExit: after printing the help, or one sentence about what is wrong.
    """
    parser = cli.make_parser("affectgpt score", __doc__)
    add = parser.add_argument
    add("--task", required=True, choices=TASKS, help="what the truth is and how it counts")
    add(
        "--predictions",
        required=True,
        nargs="+",
        metavar="FILE",
        help="JSONL or CSV (name with labels or openset), or the release's *-openset.npz and "
        "*-openset-sentiment.npz; of several, the last is the fixed checkpoint",
    )
    add(
        "--truth",
        required=True,
        metavar="FILE",
        help="CSV or JSONL (name with openset, emotion, valence or preference), MELD's CSV, or the "
        "release's label npz",
    )
    add("--lexicon", metavar="DIR", help="the official emotion wheels; default: the shipped ones")
    add("--level", type=int, choices=(1, 2), help="of the wheels; default: 1")
    add(
        "--missing",
        choices=("error", "empty"),
        default="error",
        help="clips without a prediction: stop (the default), or score them as empty",
    )
    add("--allow-pickle", action="store_true", help="read pickled plain values of npz files")
    add("--bootstrap", type=int, default=1000, metavar="N", help="resamples; 0: no intervals")
    add("--seed", type=int, default=0, help="of the resampling")
    add(
        "--json",
        metavar="FILE",
        help="write everything there, tables by wheel and class too; -: to standard output, and "
        "the report to standard error",
    )
    arguments = parser.parse_args(argv)
    if arguments.bootstrap < 0 or arguments.seed < 0:
        parser.error("--bootstrap and --seed must be 0 or more")
    for flag in ("lexicon", "level"):
        if getattr(arguments, flag) and arguments.task not in NEEDS_LEXICON:
            parser.error(f"--{flag} has no part in --task={arguments.task}")
    arguments.level = arguments.level or 1
    if len(set(arguments.predictions)) != len(arguments.predictions):
        parser.error("--predictions names a file twice")
    return arguments


def score_files(
    arguments: argparse.Namespace,
) -> tuple[Sequence[Result], metrics.Protocols]:
    """Score every prediction file against the truth.

    Raises:
        ReadError: a file that cannot be used.
        ScoreError: files that give no score.
    """
    task = arguments.task
    lexicon = load_lexicon(arguments.lexicon) if task in NEEDS_LEXICON else None
    truth = read_truth(arguments.truth, task, arguments.allow_pickle)
    pairs = {
        path: pair(read_predictions(path, task, arguments.allow_pickle), truth, arguments.missing)
        for path in arguments.predictions
    }
    results = score_checkpoints(
        task, pairs, lexicon, arguments.level, arguments.bootstrap, arguments.seed
    )
    return results, protocols(results)


def render(results: Sequence[Result], told: metrics.Protocols) -> list[str]:
    """The lines of the report, in percent."""
    blocks = [_render_result(result) for result in results]
    if len(results) > 1:
        blocks.append(_render_protocols(results, told))
    return [line for block in blocks for line in (*block, "")][:-1]


def _render_result(result: Result) -> list[str]:
    score, counts = result.score, result.score.counts
    title = [f"task {score.task}", f"{counts['clips']} clips"]
    if score.lexicon:
        title += [f"level {score.level}", f"lexicon: {score.lexicon}"]
    names = list(score.values)
    rows = [["", *(TITLES.get(name, name) for name in names)]]
    if score.wheels:
        rows[0] += ["clips", "unmapped"]
        rows += [
            [
                f"wheel {row['wheel']}",
                *(percent(row[name]) for name in names),
                str(row["clips"]),
                percent(row["unmapped_predicted"]),
            ]
            for row in score.wheels
        ]
    rows.append(["mean" if score.wheels else "score", *map(percent, score.values.values())])
    if result.intervals:
        ends = [f"{percent(i.low)}-{percent(i.high)}" for i in result.intervals.values()]
        confidence = next(iter(result.intervals.values())).confidence
        rows.append([f"{confidence:.0%} interval", *ends])
    # What was made of the labels comes first: a score of labels that nobody knows says nothing.
    lines = [result.predictions, ", ".join(title)]
    lines += [str(finding) for finding in result.pairs.findings]
    for unknown in result.unknown:
        lines.append(str(unknown))
        if warning := unknown.warning():
            lines.append(f"warning: {warning}")
    lines += _align(rows)
    if score.wheels:
        lines.append(
            f"labels per clip: {counts['predicted_labels_per_clip']:.2f} predicted, "
            f"{counts['true_labels_per_clip']:.2f} true"
        )
    else:
        why = {"sentiment": "have valence 0", "preference": "prefer neither"}.get(
            score.task, "have no true word"
        )
        others = f", the others {why}" if counts["scored"] < counts["clips"] else ""
        lines.append(f"{counts['scored']} clips scored{others}")
    return lines


def _render_protocols(results: Sequence[Result], told: metrics.Protocols) -> list[str]:
    name = next(iter(results[0].score.values))
    lines = [
        f"{TITLES.get(name, name)} by protocol",
        f"fixed checkpoint: {percent(told.fixed_value)} ({told.fixed})",
        f"best of {told.checkpoints}, chosen on the test set: "
        f"{percent(told.best_value)} ({told.best})",
    ]
    for result in results:
        if found := result.against_fixed:
            low, high = 100 * found.interval.low, 100 * found.interval.high
            lines.append(
                f"{result.predictions} minus the fixed one: {100 * found.difference:+.2f} "
                f"({found.interval.confidence:.0%} interval {low:+.2f} to {high:+.2f}, "
                f"p = {found.p_value:.4f})"
            )
    return lines


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns, the first to the left and the others to the right."""
    width = max(map(len, rows))
    rows = [[*row, *[""] * (width - len(row))] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]


def as_dict(
    results: Sequence[Result], told: metrics.Protocols, arguments: argparse.Namespace
) -> dict[str, Any]:
    """The report as JSON has it: shares from 0 to 1, every name and word."""
    return {
        "truth": arguments.truth,
        "settings": {
            key: getattr(arguments, key)
            for key in ("task", "level", "missing", "bootstrap", "seed")
        },
        "results": [result.as_dict() for result in results],
        "protocols": dataclasses.asdict(told),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; see `cli.exit_on_error`."""
    with cli.exit_on_error():
        arguments = parse_arguments(argv)
        results, told = score_files(arguments)
        taken = False
        if arguments.json:
            report = json.dumps(as_dict(results, told, arguments), indent=2) + "\n"
            taken = cli.write_output(arguments.json, report, "--json")
        print_lines(render(results, told), sys.stderr if taken else sys.stdout)


if __name__ == "__main__":
    main()
