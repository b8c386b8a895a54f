"""Ask a trained run about clips: what does the person feel, and why?

    affectgpt predict --workdir runs/demo --name demo-test-00000
    affectgpt predict --workdir runs/demo --first 3 \\
        --question ovlabel
    affectgpt predict --workdir runs/paper \\
        --records /records/mine --temperature 1 --top-p 0.9 \\
        --question "Does the voice fit the face?"
    affectgpt predict --workdir runs/paper \\
        --records /records/mine --question ovlabel --out answers.jsonl
    affectgpt predict --workdir runs/demo --first 3 --consensus 16
    affectgpt predict --checkpoint FILE.pth --records /records/mine \\
        --config=affectgpt_qwen25_7b --config.llm=DIR \\
        --config.prompts=release.toml

The last asks weights that nobody trained here: a .pth of the PyTorch release, a PEFT adapter or an
exported run; docs/released.md goes from the authors' files to their scores.

One clip is answered as you watch, several side by side. With --json every answer is a line of
JSON on the standard output; with --out these lines go to a file, and the same command, interrupted
and run again, goes on where it stopped. A line is

    {"name", "question", "text", "labels", "tokens", "cut", "logprob"}

where labels is a list for questions that ask for labels and otherwise null, tokens counts the end
mark, cut says that the answer reached --max-new-tokens, and logprob is the natural logarithm of the
probability that the model itself gives to the answer. A file with one question can be scored:
affectgpt score --task fine --predictions answers.jsonl --truth ...

Answers are the most probable ones token by token, unless --temperature is set. What is drawn then
follows from --seed, the clip's name and the question: it is the same in any batch, alone or among
others. --consensus samples several answers, at temperature 1 unless another is named, and takes the
labels that agree with all of them the most; tokens are then those of all, and logprob is null.
Notes and progress go to the standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypedDict

from affectgpt_jax import build, cli, cpu
from affectgpt_jax.asking import (
    AGREEABLE,
    DEFAULT_QUESTIONS,
    PredictError,
    add_answer_flags,
    as_dict,
    ask,
    check_answer_flags,
    check_least_one,
    check_questions,
    check_texts,
    choose_clips,
    choose_questions,
    generator_from_flags,
    open_clips,
    report_missing,
    show,
    to_json,
)
from affectgpt_jax.common.errors import ReadError
from affectgpt_jax.common.files import lock_file
from affectgpt_jax.common.json import ResumableJsonl, read_json, write_json
from affectgpt_jax.common.text import json_line, say
from affectgpt_jax.data.records import Records
from affectgpt_jax.evaluation.lexicon import load_lexicon
from affectgpt_jax.evaluation.rewards import Wheels
from affectgpt_jax.restore import (
    OUT_OF_MEMORY,
    Run,
    add_run_flags,
    open_from_flags,
    parse_run_flags,
    set_up_process,
)
from affectgpt_jax.training.checkpoints import silence_threads


def path_from_flag(text: str) -> Path:
    """A path in which `~` is the home directory: in `--flag=~/x`, bash leaves it as it is."""
    return Path(os.path.expanduser(text))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        SystemExit: after printing the help, or one sentence about what is wrong.
    """
    parser = cli.make_parser("affectgpt predict", __doc__)
    add = parser.add_argument
    add_run_flags(parser)
    add("--step", type=int, metavar="N", help="of the checkpoint; default: the best on validation")
    add("--records", metavar="DIR", help="clips, as config.data.test; default: that of the run")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--name", action="append", metavar="NAME", help="a clip; repeatable; default: all clips"
    )
    which.add_argument("--first", type=int, metavar="N", help="the first N clips")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--json", action="store_true", help="a line of JSON per answer")
    where.add_argument(
        "--out", type=path_from_flag, metavar="FILE", help="the same into a file; resumes"
    )
    add_answer_flags(parser)
    arguments = parse_run_flags(parser, argv)
    check_least_one(parser, arguments, "step", "first")
    check_texts(parser, arguments, "name")
    check_answer_flags(parser, arguments)
    return arguments


def predict(arguments: argparse.Namespace) -> None:
    """Answer every question about every clip.

    Raises:
        UserError: a run, clips, a question or an output file that cannot be used.
    """
    check_questions(arguments.question or (), arguments.consensus)
    wheels = Wheels(load_lexicon(arguments.lexicon)) if arguments.consensus else None
    if arguments.out and not arguments.out.parent.is_dir():
        raise PredictError(f"--out={arguments.out}: there is no directory {arguments.out.parent}")
    run = open_from_flags(arguments)
    which = f": checkpoint of step {run.step}" if run.is_trained_here else ""
    best = ", the best on validation" if which and run.step == run.best_step else ""
    say(f"{run.workdir}{which}{best}; input {run.processor.mode.name}")
    default = AGREEABLE if arguments.consensus else DEFAULT_QUESTIONS
    questions = choose_questions(run, arguments.question, default)
    clips = choose_clips(open_clips(run, arguments.records), arguments.name, arguments.first)
    report_missing(run, clips)
    for question in questions:
        # Trouble with a clip shows now, not at the end.
        run.processor.prompt_examples(clips, question)
    # Who may not write must not wait for the weights first.
    file = (
        AnswerFile(arguments.out, file_settings(run, clips, arguments, wheels))
        if arguments.out
        else None
    )
    run = run.with_weights()
    generator = generator_from_flags(
        run,
        clips,
        arguments,
        questions=len(questions),
        group=arguments.consensus or 1,
    )
    if file:
        with file:
            asked = ask(run, generator, clips, questions, wheels, file.answered)
            for name, question, answer in asked:
                file.write(as_dict(run, name, question, answer))
    elif arguments.json:
        for name, question, answer in ask(run, generator, clips, questions, wheels):
            print(json_line(to_json(as_dict(run, name, question, answer))), flush=True)
    else:
        show(run, generator, clips, questions, wheels)


# --- a file of answers --------------------------------------------------------------------------


def file_settings(
    run: Run, clips: Records, arguments: argparse.Namespace, wheels: Wheels | None = None
) -> dict[str, Any]:
    """What must be the same for answers that stand in one file."""
    return {
        "run": str(run.workdir.resolve()),
        "step": run.step,
        # A run that is trained anew in the same place has the same steps.
        "checkpoint": run.fingerprint(run.step),
        "base": run.base_identity().sha256,
        "records": build.records_identity(clips).sha256,
        **{name: identity.sha256 for name, identity in run.inputs.items()},
        "max_new_tokens": arguments.max_new_tokens or run.config.generate.max_new_tokens,
        "temperature": arguments.temperature,
        "top_p": arguments.top_p,
        "repetition_penalty": arguments.repetition_penalty,
        "seed": arguments.seed,
    } | (
        {"consensus": arguments.consensus, "lexicon": wheels.lexicon.identity.sha256}
        if wheels
        else {}
    )


class _AnswerLine(TypedDict):
    """What tells the answers of a file apart; `as_dict` has the other keys."""

    name: str
    question: str


class AnswerFile:
    """Answers as lines of JSON, which an interrupted command goes on with.

    Beside it, FILE.settings.json says how its answers were made, and FILE.lock keeps other
    processes from writing it.

    Attributes:
        answered: clip names and questions of the lines that are there.

    Args:
        path: of the file.
        settings: of the answers to come.

    Raises:
        PredictError: the file was not written by this command, or with other settings.
        FileInUse: another process writes it.
        ReadError: it cannot be read, or a line of it is not an answer.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        beside = path.with_name(f"{path.name}.settings.json")
        lock = path.with_name(f"{path.name}.lock")
        advice = "wait for it, stop it, or name another --out"
        with contextlib.ExitStack() as stack:
            stack.enter_context(lock_file(lock, str(path), advice, say))
            begun = path.exists() and path.stat().st_size
            if begun:
                self._check(path, beside, settings)
            write_json(beside, settings)
            self._file = ResumableJsonl(
                path, _AnswerLine, ("name", "question"), advice="mend it, or name another --out"
            )
            self._held = stack.pop_all()
        self.answered = self._file.records.keys()
        if self._file.torn:
            say(f"{path}: the last line was half written; that answer is asked for again")
        if begun:
            say(f"{path}: {len(self.answered):,} answers are there already")

    def write(self, line: Mapping[str, Any]) -> None:
        """Append an answer, as `as_dict` gives it."""
        self._file.append(line)

    @staticmethod
    def _check(path: Path, beside: Path, settings: Mapping[str, Any]) -> None:
        try:
            theirs = read_json(beside, dict[str, Any])
        except ReadError:
            raise PredictError(
                f"{path} is there, but no {beside.name} that says how it was made; name another "
                "--out"
            ) from None
        for key, mine in settings.items():
            if theirs.get(key) == mine:
                continue
            if key == "code":
                say(f"note: {path} holds answers of another version of the code")
            else:
                raise PredictError(
                    f"{path} holds answers with {key} {theirs.get(key)!r}, but now it is {mine!r}; "
                    "name another --out, or the same settings to go on"
                )

    def __enter__(self) -> Self:
        self._held.enter_context(self._file)
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; see `cli.exit_on_error`."""
    out: Path | None = None
    with cli.exit_on_error(
        interrupted="interrupted; with --out the same command goes on where it stopped",
        out_of_memory=OUT_OF_MEMORY,
        os_error=lambda error: cli.describe_os_error(error, out),
    ):
        arguments = parse_arguments(argv)
        out = arguments.out
        set_up_process()
        predict(arguments)


if __name__ == "__main__":
    silence_threads()
    cpu.keep_freed_memory()
    main()
