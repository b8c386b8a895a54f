"""A report from prediction files alone; needs no accelerator and no model.

    affectgpt report --set mer2023=predictions.jsonl,truth.csv \\
        --out report

writes report.html, report.json and report.md (the paper's Table 2). A set is a known one
({keys})
or any other as NAME:TASK=... Several prediction files before the truth are checkpoints, the last of
them the one that was fixed beforehand.

    affectgpt report --ablation 5 --run none=runs/none \\
        --run qformer=runs/qformer --out ablation

brings the reports that affectgpt_jax.evaluate has written into several workdirs (or any other
report.json) together in the shape of the paper's Table 3, 4, 5, 6 or 8, or of its Figure 4, and
sets what the runs answered about the same clips side by side, as in its Figure 5.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from affectgpt_jax import cli
from affectgpt_jax.common.text import print_lines, say
from affectgpt_jax.evaluation.answers import side_by_side
from affectgpt_jax.evaluation.datasets import BY_KEY, DEMO, TASKS, name_and_task
from affectgpt_jax.evaluation.lexicon import load_lexicon
from affectgpt_jax.evaluation.readers import pair, read_predictions, read_texts, read_truth
from affectgpt_jax.evaluation.report import REPORT_FILE, write_ablation, write_report
from affectgpt_jax.evaluation.results import NEEDS_LEXICON, SetResult, score_set
from affectgpt_jax.evaluation.summary import make_report
from affectgpt_jax.evaluation.tables import ABLATIONS, ablation_table, read_run


@dataclasses.dataclass(frozen=True)
class SetFiles:
    """The files of one data set.

    Attributes:
        name: for the report.
        task: fine, basic, sentiment, words or preference.
        predictions: a file per checkpoint, the fixed one last.
        truth: the truth file.
    """

    name: str
    task: str
    predictions: tuple[str, ...]
    truth: str


def parse_set(text: str) -> SetFiles:
    """`NAME[:TASK]=PREDICTIONS[,PREDICTIONS...],TRUTH`.

    Raises:
        ValueError: another form, an unknown set without a task, another task.
    """
    head, _, files = text.partition("=")
    key = head.partition(":")[0]
    *predictions, truth = files.split(",")
    if not key or not truth or not predictions or not all(predictions):
        raise ValueError(
            f"{text!r} is not NAME=PREDICTIONS,TRUTH, as in mer2023=predictions.jsonl,truth.csv"
        )
    if len(set(predictions)) != len(predictions):
        raise ValueError(f"{text!r} names a prediction file twice")
    name, task = name_and_task(head)
    if not task:
        raise ValueError(
            f"{key!r} is none of {', '.join(BY_KEY)}, {DEMO}; say how it is scored, as in "
            f"{key}:basic=... ({', '.join(TASKS)})"
        )
    return SetFiles(name, task, tuple(predictions), truth)


def parse_reference(text: str) -> tuple[str, str, float]:
    """`SET:LABEL=SHARE`: name of the set or its key, label, share.

    Raises:
        ValueError: another form, or a share that is not between 0 and 1.
    """
    head, _, value = text.rpartition("=")
    key, _, label = head.partition(":")
    try:
        share = float(value)
    except ValueError:
        share = -1.0
    if not key or not label or not 0 <= share <= 1:
        raise ValueError(
            f"{text!r} is not SET:LABEL=SHARE with a share from 0 to 1, as in demo:ceiling=0.664"
        )
    return BY_KEY[key].name if key in BY_KEY else key, label, share


def parse_run(text: str) -> tuple[str, str]:
    """`LABEL=RUN`: the label and the path of a report.json.

    RUN may be that file, the folder that it is in, or the workdir of an evaluated run.

    Raises:
        ValueError: another form, or a run that was evaluated in several ways.
    """
    label, _, path = text.rpartition("=")
    if not label or not path:
        raise ValueError(f"{text!r} is not LABEL=RUN, as in qformer=runs/qformer")
    place = Path(path).expanduser()
    if place.is_dir():
        inside = place / "evaluate"
        place = inside if inside.is_dir() else place
        whole = place / REPORT_FILE
        # Of an evaluation that was interrupted, there is none.
        found = [whole] * whole.is_file() + sorted(place.glob(f"*/{REPORT_FILE}"))
        if len(found) > 1:
            raise ValueError(
                f"{place} holds several evaluations; name one: {', '.join(map(str, found))}"
            )
        place = found[0] if found else whole
    return label, str(place)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        SystemExit: after printing the help, or one sentence about what is wrong.
    """
    description = __doc__.format(keys=", ".join([*BY_KEY, DEMO]))
    parser = cli.make_parser("affectgpt report", description)
    add = parser.add_argument
    add(
        "--set",
        action="append",
        default=[],
        type=cli.argument_type(parse_set),
        dest="sets",
        metavar="NAME=PREDICTIONS,TRUTH",
        help="predictions and truth of a data set, in the formats of affectgpt_jax.score",
    )
    add("--ablation", choices=ABLATIONS, help="the table of the paper to take the shape of")
    add(
        "--run",
        action="append",
        default=[],
        type=cli.argument_type(parse_run),
        dest="runs",
        metavar="LABEL=RUN",
        help="a row of --ablation, and the workdir of an evaluated run or a report.json",
    )
    add(
        "--answers",
        type=int,
        default=8,
        metavar="N",
        help="of each set, clips to set side by side with --ablation; default: 8",
    )
    add("--out", required=True, metavar="DIR", help="where the files go")
    add("--system", default="this system", metavar="NAME", help="what to call it")
    add("--modalities", default="", metavar="AVT", help="that it was given: A, V, T")
    add("--peers", action="store_true", help="set the published systems beside")
    add("--lexicon", metavar="DIR", help="the official emotion wheels; default: the shipped ones")
    add("--level", type=int, choices=(1, 2), help="of the wheels; default: 1")
    add(
        "--reference",
        action="append",
        default=[],
        type=cli.argument_type(parse_reference),
        dest="references",
        metavar="SET:LABEL=SHARE",
        help="a value to draw beside a set's score, such as a ceiling",
    )
    add(
        "--missing",
        choices=("error", "empty"),
        default="error",
        help="clips without a prediction: stop (the default), or score them as empty",
    )
    add("--allow-pickle", action="store_true", help="read pickled plain values of npz files")
    add("--bootstrap", type=int, default=1000, metavar="N", help="resamples; 0: no intervals")
    add("--seed", type=int, default=0, help="of the resampling and the examples")
    arguments = parser.parse_args(argv)
    if arguments.bootstrap < 0 or arguments.seed < 0 or arguments.answers < 0:
        parser.error("--bootstrap, --seed and --answers must be 0 or more")
    if bool(arguments.sets) == bool(arguments.ablation):
        parser.error("expected either --set, once or more, or --ablation with --run")
    if bool(arguments.runs) != bool(arguments.ablation):
        parser.error("--ablation and --run go together")
    for flag in ("lexicon", "level"):
        if getattr(arguments, flag) and not any(s.task in NEEDS_LEXICON for s in arguments.sets):
            parser.error(
                f"--{flag} has no part here: no --set is scored as {' or '.join(NEEDS_LEXICON)}"
            )
    arguments.level = arguments.level or 1
    names = {files.name for files in arguments.sets}
    for name, label, _ in arguments.references:
        if name not in names:
            parser.error(f"--reference {name}:{label}: there is no --set {name}")
    return arguments


def score_files(arguments: argparse.Namespace) -> list[SetResult]:
    """Score every set of the command line.

    Raises:
        ReadError: a file that cannot be used.
        ScoreError: files that give no score.
    """
    results = []
    lexicon = None
    for files in arguments.sets:
        task, allow_pickle = files.task, arguments.allow_pickle
        if task in NEEDS_LEXICON and lexicon is None:
            lexicon = load_lexicon(arguments.lexicon)
        truth = read_truth(files.truth, task, allow_pickle)
        pairs = {
            path: pair(read_predictions(path, task, allow_pickle), truth, arguments.missing)
            for path in files.predictions
        }
        results.append(
            score_set(
                files.name,
                task,
                pairs,
                lexicon if task in NEEDS_LEXICON else None,
                level=arguments.level,
                resamples=arguments.bootstrap,
                seed=arguments.seed,
                texts=read_texts(files.predictions[-1]),
                references={
                    label: share
                    for name, label, share in arguments.references
                    if name == files.name
                },
            )
        )
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; see `cli.exit_on_error`."""
    with cli.exit_on_error():
        arguments = parse_arguments(argv)
        out = Path(arguments.out).expanduser()
        if arguments.ablation:
            runs = [read_run(label, path) for label, path in arguments.runs]
            table = ablation_table(arguments.ablation, runs, arguments.peers)
            places = {label: Path(path) for label, path in arguments.runs}
            answers, remarks = side_by_side(places, arguments.answers, arguments.seed)
            with cli.writing(f"--out={arguments.out}"):
                written = write_ablation(table, out, answers)
            for remark in remarks:
                say(remark)
        else:
            report = make_report(
                arguments.system,
                score_files(arguments),
                modalities=arguments.modalities,
                peers=arguments.peers,
                resamples=arguments.bootstrap,
                seed=arguments.seed,
            )
            with cli.writing(f"--out={arguments.out}"):
                written = write_report(report, out)
            for warning in report.warnings:
                say(f"warning: {warning}")
        print_lines(map(str, written))


if __name__ == "__main__":
    main()
