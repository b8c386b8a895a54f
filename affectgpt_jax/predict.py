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
import difflib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypedDict

from affectgpt_jax import build, cli, cpu
from affectgpt_jax.common.errors import ReadError, UserError
from affectgpt_jax.common.files import lock_file
from affectgpt_jax.common.json import ResumableJsonl, read_json, write_json
from affectgpt_jax.common.progress import Counter
from affectgpt_jax.common.text import json_line, one_line, print_lines, say
from affectgpt_jax.data.prompts import LABEL_TYPES
from affectgpt_jax.data.records import Records, RecordSubset
from affectgpt_jax.evaluation.lexicon import load_lexicon
from affectgpt_jax.evaluation.rewards import Wheels
from affectgpt_jax.inference import SCORED, Answer, Generator, agreed_answers, should_merge
from affectgpt_jax.models.generate import Sampling
from affectgpt_jax.restore import (
    OUT_OF_MEMORY,
    Run,
    add_allow_other,
    add_merge_lora,
    open_run,
    set_up_process,
)
from affectgpt_jax.training.checkpoints import silence_threads


class PredictError(UserError, ValueError):
    """A question or an output file that cannot be used."""


# Asked by default, as far as the run has been trained on them.
DEFAULT_QUESTIONS = ("description", "ovlabel")
# Whose answers are lists of labels, on which several may agree.
AGREEABLE = ("ovlabel", "onehot", "onehot_candidates")


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
    add(
        "--workdir",
        required=True,
        type=path_from_flag,
        metavar="RUN",
        help="directory of a training run",
    )
    add("--step", type=int, metavar="N", help="of the checkpoint; default: the best on validation")
    add("--config.llm", dest="llm", default="", metavar="DIR", help="where the base is now")
    add("--config.mesh", dest="mesh", default="", metavar="MESH", help="devices, if not the run's")
    add_merge_lora(parser)
    add_allow_other(parser, ["prompts"])
    add("--records", metavar="DIR", help="clips, as config.data.test; default: that of the run")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--name", action="append", metavar="NAME", help="a clip; repeatable; default: all clips"
    )
    which.add_argument("--first", type=int, metavar="N", help="the first N clips")
    add(
        "--question",
        action="append",
        metavar="TEXT",
        help="a label type, whose question is asked, or any text; repeatable; default: "
        f"{' and '.join(DEFAULT_QUESTIONS)}, as far as the run was trained on them",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--json", action="store_true", help="a line of JSON per answer")
    where.add_argument(
        "--out", type=path_from_flag, metavar="FILE", help="the same into a file; resumes"
    )
    add("--temperature", type=float, default=0.0, metavar="T", help="default: 0, no sampling")
    add("--top-p", type=float, default=1.0, metavar="P", help="share to sample from; default: 1")
    add("--repetition-penalty", type=float, default=1.0, metavar="X", help="default: 1, none")
    add("--seed", type=int, default=0, help="of sampling; default: 0")
    add("--consensus", type=int, metavar="N", help="labels that N sampled answers agree on")
    add("--lexicon", metavar="DIR", help="by which they agree; default: the shipped emotion wheels")
    add("--max-new-tokens", type=int, metavar="N", help="default: the run's")
    add("--batch-size", type=int, metavar="N", help="clips at a time; default: the run's")
    arguments = parser.parse_args(argv)
    for name in ("step", "first", "max_new_tokens", "batch_size"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}; expected 1 or more")
    for name in ("name", "question"):
        values = getattr(arguments, name) or ()
        for value in values:
            if not value.strip():
                parser.error(f"--{name} is empty")
            if values.count(value) > 1:
                parser.error(f"--{name} {value!r} is given twice")
    if arguments.consensus is None:
        if arguments.lexicon:
            parser.error("--lexicon is read with --consensus only")
    elif arguments.consensus < 2:
        parser.error(f"--consensus is {arguments.consensus}; expected 2 or more answers")
    elif not arguments.temperature:
        arguments.temperature = 1.0
    try:
        check_seed(arguments.seed)
    except PredictError as error:
        parser.error(f"--{error}")
    try:
        arguments.sampling = Sampling(
            arguments.temperature, arguments.top_p, arguments.repetition_penalty
        )
    except ValueError as error:
        parser.error(str(error))
    return arguments


def check_seed(seed: int) -> None:
    """Refuse a seed that samplers do not take.

    Raises:
        PredictError: less than 0, or 2^32 or more.
    """
    if not 0 <= seed < 2**32:
        raise PredictError(f"seed is {seed}; expected 0 to 4294967295")


def predict(arguments: argparse.Namespace) -> None:
    """Answer every question about every clip.

    Raises:
        UserError: a run, clips, a question or an output file that cannot be used.
    """
    check_questions(arguments.question or (), arguments.consensus)
    wheels = Wheels(load_lexicon(arguments.lexicon)) if arguments.consensus else None
    if arguments.out and not arguments.out.parent.is_dir():
        raise PredictError(f"--out={arguments.out}: there is no directory {arguments.out.parent}")
    run = open_run(
        arguments.workdir,
        arguments.step,
        llm=arguments.llm,
        mesh=arguments.mesh,
        merge_lora=arguments.merge_lora,
        allow_other=arguments.allow_other,
    )
    best = ", the best on validation" if run.step == run.best_step else ""
    say(f"{run.workdir}: checkpoint of step {run.step}{best}; input {run.processor.mode.name}")
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
    generator = make_generator(
        run,
        clips,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
        sampling=arguments.sampling,
        group=arguments.consensus or 1,
        seed=arguments.seed,
    )
    if file:
        with file:
            for name, question, answer in ask(run, generator, clips, questions, wheels, file):
                file.write(as_dict(run, name, question, answer))
    elif len(clips) == 1 and not arguments.json and not arguments.consensus:
        for question in questions:
            show_while_writing(run, generator, clips, question)
    else:
        for name, question, answer in ask(run, generator, clips, questions, wheels):
            if arguments.json:
                print(json_line(to_json(as_dict(run, name, question, answer))), flush=True)
            else:
                answered = f"{heading(name, question)}{answer.text}"
                print_lines([answered, *remarks(run, question, answer)])


def make_generator(
    run: Run,
    clips: Records,
    *,
    max_new_tokens: int | None,
    batch_size: int | None,
    sampling: Sampling,
    seed: int,
    group: int = 1,
) -> Generator:
    """What answers questions about these clips; None is as the run's config has it."""
    config = run.config
    return Generator(
        run.model,
        run.base,
        run.processor,
        run.mesh,
        batch_size=min(batch_size or config.generate.batch_size, len(clips)),
        max_new_tokens=max_new_tokens or config.generate.max_new_tokens,
        num_buckets=config.num_buckets,
        merge_lora=should_merge(config.generate.merge_lora, run.model, run.base),
        sampling=sampling,
        group=group,
        seed=seed,
        log_probs=True,
    )


# --- what is asked ------------------------------------------------------------------------------


def check_questions(questions: Sequence[str], consensus: int | None = None) -> None:
    """Refuse what looks like a label type misspelt; any other text may be asked.

    Raises:
        PredictError: a single word that is nearly a label type, or a consensus on a question that
            does not ask for labels.
    """
    for question in questions:
        if consensus and question not in AGREEABLE:
            raise PredictError(
                f"--consensus takes questions that ask for labels ({', '.join(AGREEABLE)}), not "
                f"--question={question}"
            )
        if question in LABEL_TYPES or len(question.split()) > 1:
            continue
        if close := difflib.get_close_matches(question, LABEL_TYPES, 1, cutoff=0.7):
            raise PredictError(
                f"--question={question} is not a label type; did you mean {close[0]}? (A question "
                "of your own has several words.)"
            )


def choose_questions(
    run: Run, asked: Sequence[str] | None, default: Sequence[str]
) -> Sequence[str]:
    """What to ask: `asked`, or those of the default questions that the run has been trained on.

    Raises:
        PredictError: a consensus is asked for, but the run was trained on no list of labels.
    """
    trained = run.label_types
    if asked:
        for question in asked:
            if question in LABEL_TYPES and question not in trained:
                say(f"note: the run was trained on {', '.join(trained)}, not on {question}")
        return asked
    questions = [name for name in default if name in trained]
    if not questions and default == AGREEABLE:
        raise PredictError(
            f"{run.workdir} was trained on {', '.join(trained)}; --consensus needs one of "
            f"{', '.join(AGREEABLE)}"
        )
    questions = questions or list(trained)
    say(f"asking {' and '.join(questions)} (trained: {', '.join(trained)})")
    return questions


def open_clips(run: Run, place: str | None) -> Records:
    """The clips of a place, by default the run's test set.

    Raises:
        PredictError: neither is named.
        ConfigError: they lack the features that the run's input mode reads, or others have them.
        RecordError: a directory without intact records.
    """
    place = place or run.config.data.test
    if not place:
        raise PredictError(
            f"{run.workdir} has no test set (config.data.test is empty); name clips: --records DIR"
        )
    config = run.config.copy_and_resolve_references()
    config.data.verify = False  # a record that is read checks itself, and few may be read
    clips = build.open_records(config, place, "test", run.workdir, say)
    build.check_features(config, clips, run.processor.mode)
    run.report_records(place, clips, say)
    return clips


def choose_clips(clips: Records, names: Sequence[str] | None, first: int | None) -> Records:
    """The clips of these names, or the first ones, or all.

    Raises:
        PredictError: a name that no clip has.
    """
    if first:
        if first > len(clips):
            say(f"note: there are only {len(clips)} clips")
        return RecordSubset(clips, range(min(first, len(clips))))
    if not names:
        return clips
    numbers = {entry.name: number for number, entry in enumerate(clips.index)}
    for name in names:
        if name not in numbers:
            close = difflib.get_close_matches(name, numbers, 3)
            hint = (
                f"did you mean {' or '.join(close)}?" if close else f"one is {next(iter(numbers))}"
            )
            raise PredictError(f"none of the {len(clips)} clips is named {name!r}; {hint}")
    return RecordSubset(clips, [numbers[name] for name in names])


def report_missing(run: Run, clips: Records) -> None:
    """Say which clips lack a modality that the input mode reads; the model goes without it."""
    for feature in run.processor.mode.features:
        without = [entry.name for entry in clips.index if feature not in entry.present]
        if without:
            more = f" and {len(without) - 1} more" if len(without) > 1 else ""
            say(f"note: {without[0]}{more} of {len(clips)} clips: no {feature}, answered without")


# --- how answers come ---------------------------------------------------------------------------


def ask(
    run: Run,
    generator: Generator,
    clips: Records,
    questions: Sequence[str],
    wheels: Wheels | None = None,
    file: AnswerFile | None = None,
) -> Iterator[tuple[str, str, Answer]]:
    """Clip names, questions and answers, as they are complete, but for those that `file` holds.

    With `wheels`, the answers of each group are brought to agreement.
    """
    parts, answered = {}, file.answered if file else ()
    for question in questions:
        left = [i for i, e in enumerate(clips.index) if (e.name, question) not in answered]
        parts[question] = RecordSubset(clips, left)
    # A line that is rewritten would mix with answers on the same terminal.
    in_place = sys.stderr.isatty() and (file is not None or not sys.stdout.isatty())
    done, total = 0, sum(map(len, parts.values()))
    if not total:
        return
    with Counter("answers", stream=sys.stderr, in_place=in_place) as count:
        count(done, total)
        for question, part in parts.items():
            if not len(part):
                continue
            if wheels:
                found = agreed_answers(
                    generator, run.processor, run.trainable, part, question, wheels
                )
            else:
                found = generator.answers(run.trainable, part, question)
            for number, answer in found:
                yield part.index[number].name, question, answer
                done += 1
                count(done, total)


def show_while_writing(run: Run, generator: Generator, clip: Records, question: str) -> None:
    """Print the answer about a single clip as it is written."""
    print(one_line(heading(clip.index[0].name, question)), end="", flush=True)
    shown = 0
    try:
        for answer in generator.stream(run.trainable, clip, question):
            print(one_line(answer.text[shown:]), end="", flush=True)
            shown = len(answer.text)
    finally:
        print()
    print_lines(remarks(run, question, answer))


def heading(name: str, question: str) -> str:
    return f"{name} [{question}] "


def remarks(run: Run, question: str, answer: Answer) -> list[str]:
    """What stands below an answer on a terminal."""
    lines = []
    labels = read_labels(run, question, answer)
    if labels is not None:
        lines.append(f"  labels: {', '.join(labels) or 'none'}")
    if answer.cut:
        lines.append(f"  cut at {answer.tokens} tokens; --max-new-tokens allows more")
    return lines


def read_labels(run: Run, question: str, answer: Answer) -> list[str] | None:
    """The labels of an answer to a question that asks for labels."""
    return run.processor.prompts.read_labels(answer.text, question) if question in SCORED else None


class ClipAnswer(TypedDict):
    """An answer as JSON has it; this module's docstring says what the keys mean."""

    name: str
    question: str
    text: str
    labels: list[str] | None
    tokens: int
    cut: bool
    logprob: float | None


def as_dict(run: Run, name: str, question: str, answer: Answer) -> ClipAnswer:
    """An answer, with its labels."""
    return {
        "name": name,
        "question": question,
        "text": answer.text,
        "labels": read_labels(run, question, answer),
        "tokens": answer.tokens,
        "cut": answer.cut,
        "logprob": answer.log_prob,
    }


def to_json(line: Mapping[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False, allow_nan=False)


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
