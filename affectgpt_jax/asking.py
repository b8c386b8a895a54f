"""What clips are asked, and how answers come: as they are written, or many side by side.

Shared by the commands that show answers to a person.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from affectgpt_jax.common.errors import UserError
from affectgpt_jax.common.progress import Counter
from affectgpt_jax.common.text import one_line, print_lines, say
from affectgpt_jax.data import demo
from affectgpt_jax.data.prompts import LABEL_TYPES
from affectgpt_jax.data.records import Records, RecordSubset
from affectgpt_jax.evaluation.rewards import Wheels
from affectgpt_jax.inference import SCORED, Answer, Generator, agreed_answers, should_merge
from affectgpt_jax.models.generate import Sampling
from affectgpt_jax.restore import Run


class PredictError(UserError, ValueError):
    """A question or an output file that cannot be used."""


# Asked by default, as far as the run has been trained on them.
DEFAULT_QUESTIONS = ("description", "ovlabel")
# Whose answers are lists of labels, on which several may agree.
AGREEABLE = ("ovlabel", "onehot", "onehot_candidates")


def add_answer_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of what is asked and how answers are chosen; `check_answer_flags` reads them."""
    add = parser.add_argument
    add(
        "--question",
        action="append",
        metavar="TEXT",
        help="a label type, whose question is asked, or any text; repeatable; default: "
        f"{' and '.join(DEFAULT_QUESTIONS)}, as far as the run was trained on them",
    )
    add_sampling_flags(parser)
    add("--consensus", type=int, metavar="N", help="labels that N sampled answers agree on")
    add("--lexicon", metavar="DIR", help="by which they agree; default: the shipped emotion wheels")
    add("--max-new-tokens", type=int, metavar="N", help="default: the run's")
    add("--batch-size", type=int, metavar="N", help="answers at a time; default: the run's")


def add_sampling_flags(parser: argparse.ArgumentParser, seeded: str = "of sampling") -> None:
    """The flags of how tokens are chosen; `check_sampling_flags` reads them.

    Args:
        parser: of the command.
        seeded: what the seed is of.
    """
    add = parser.add_argument
    add("--temperature", type=float, metavar="T", help="default: 0, no sampling")
    add("--top-p", type=float, default=1.0, metavar="P", help="share to sample from; default: 1")
    add("--repetition-penalty", type=float, default=1.0, metavar="X", help="default: 1, none")
    add("--seed", type=int, default=0, help=f"{seeded}; default: 0")


def check_answer_flags(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse wrong values of the flags of `add_answer_flags`; `arguments` gets its `sampling`."""
    check_least_one(parser, arguments, "max_new_tokens", "batch_size")
    check_texts(parser, arguments, "question")
    if arguments.consensus is None and arguments.lexicon:
        parser.error("--lexicon is read with --consensus only")
    check_consensus(parser, arguments)
    check_sampling_flags(parser, arguments)


def check_consensus(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse a wrong `--consensus`, whose answers are sampled, by default at temperature 1; before
    `check_sampling_flags`."""
    if arguments.consensus is None:
        return
    if arguments.consensus < 2:
        parser.error(f"--consensus is {arguments.consensus}; expected 2 or more answers")
    if arguments.temperature == 0:
        parser.error(
            "--consensus asks for sampled answers, and --temperature=0 does not sample; leave it "
            "out, or pass one over 0"
        )
    if arguments.temperature is None:
        arguments.temperature = 1.0


def check_sampling_flags(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse wrong values of the flags of `add_sampling_flags`; `arguments` gets its `sampling`."""
    try:
        check_seed(arguments.seed)
    except PredictError as error:
        parser.error(f"--{error}")
    if arguments.temperature is None:
        arguments.temperature = 0.0
    try:
        arguments.sampling = Sampling(
            arguments.temperature, arguments.top_p, arguments.repetition_penalty
        )
    except ValueError as error:
        parser.error(str(error))


def check_seed(seed: int) -> None:
    """Refuse a seed that samplers do not take.

    Raises:
        PredictError: less than 0, or 2^32 or more.
    """
    if not 0 <= seed < 2**32:
        raise PredictError(f"seed is {seed}; expected 0 to 4294967295")


def check_least_one(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, *names: str
) -> None:
    """Refuse numbers below 1; None is none."""
    for name in names:
        if (value := getattr(arguments, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}; expected 1 or more")


def check_texts(parser: argparse.ArgumentParser, arguments: argparse.Namespace, name: str) -> None:
    """Refuse an empty value, or one that is given twice, of a flag that is repeatable."""
    values = getattr(arguments, name) or ()
    for value in values:
        if not value.strip():
            parser.error(f"--{name} is empty")
        if values.count(value) > 1:
            parser.error(f"--{name} {value!r} is given twice")


def make_generator(
    run: Run,
    clips: Records,
    *,
    max_new_tokens: int | None,
    batch_size: int | None,
    sampling: Sampling,
    seed: int,
    group: int = 1,
    questions: int = 1,
    prompt_length: int | None = None,
) -> Generator:
    """What answers so many questions about these clips; None is as the run's config has it.

    With a `prompt_length` all prompts are padded to it, see `Generator`.
    """
    config = run.config
    return Generator(
        run.model,
        run.base,
        run.processor,
        run.mesh,
        batch_size=max(1, min(batch_size or config.generate.batch_size, len(clips) * questions)),
        max_new_tokens=max_new_tokens or config.generate.max_new_tokens,
        num_buckets=config.num_buckets,
        merge_lora=should_merge(config.generate.merge_lora, run.model, run.base),
        sampling=sampling,
        group=group,
        seed=seed,
        prompt_length=prompt_length,
        log_probs=True,
    )


def generator_from_flags(
    run: Run, clips: Records, arguments: argparse.Namespace, **more: Any
) -> Generator:
    """`make_generator` with the flags of `add_answer_flags` and `add_sampling_flags`.

    Args:
        run: that answers.
        clips: that it is asked about.
        arguments: of a command line that has been checked.
        **more: further arguments of `make_generator`.
    """
    return make_generator(
        run,
        clips,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
        sampling=arguments.sampling,
        seed=arguments.seed,
        **more,
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
        PredictError: no place is named, and the run has no test set, or has it elsewhere.
        ConfigError: they lack the features that the run's input mode reads, or others have them.
        RecordError: a directory without intact records.
    """
    if not place and not has_test_set(run):
        place = run.config.data.test
        why = f"{place}, is not here" if place else "config.data.test, is empty"
        raise PredictError(f"the test set of {run.workdir}, {why}; name clips: --records DIR")
    return run.open_records(place or run.config.data.test, say, verify=False)  # few may be read


def has_test_set(run: Run) -> bool:
    """Whether the run names a test set, and one that is on this machine."""
    place = run.config.data.test
    generated = demo.world_seed(place, run.config.demo_seed) is not None
    return (
        generated or place.startswith("tfds:") or bool(place) and Path(place).expanduser().exists()
    )


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
    answered: Collection[tuple[str, str]] | None = None,
) -> Iterator[tuple[str, str, Answer]]:
    """Clip names, questions and answers, as they are complete.

    With `wheels`, the answers of each group are brought to agreement.

    Args:
        run, generator, clips, questions, wheels: what is asked.
        answered: names and questions that a file of answers has; None prints the answers.
    """
    missing = [
        tuple(q for q in questions if (entry.name, q) not in (answered or ()))
        for entry in clips.index
    ]
    # A line that is rewritten would mix with answers on the same terminal.
    in_place = sys.stderr.isatty() and (answered is not None or not sys.stdout.isatty())
    done, total = 0, sum(map(len, missing))
    if not total:
        return
    with Counter("answers", stream=sys.stderr, in_place=in_place) as count:
        count(done, total)
        for asked in filter(None, dict.fromkeys(missing)):
            part = RecordSubset(clips, [i for i, left in enumerate(missing) if left == asked])
            if wheels:
                found = agreed_answers(generator, run.processor, run.trainable, part, asked, wheels)
            else:
                found = generator.answers(run.trainable, part, asked)
            for number, answer in found:
                clip, question = divmod(number, len(asked))
                yield part.index[clip].name, asked[question], answer
                done += 1
                count(done, total)


def show(
    run: Run,
    generator: Generator,
    clips: Records,
    questions: Sequence[str],
    wheels: Wheels | None = None,
) -> None:
    """Print answers for a person: about one clip as they are written, else as they are complete.

    With `wheels`, the answers of each group are brought to agreement first.
    """
    if len(clips) == 1 and wheels is None:
        for question in questions:
            show_while_writing(run, generator, clips, question)
        return
    for name, question, answer in ask(run, generator, clips, questions, wheels):
        answered = f"{heading(name, question)}{answer.text}"
        print_lines([answered, *remarks(run, question, answer)])


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
    """An answer as JSON has it.

    Attributes:
        name: of the clip.
        question: that was asked.
        text: the answer.
        labels: that the text names; None where the question asks for none.
        tokens: of the answer, or of all answers that agreed on it.
        cut: whether it ended at the limit of tokens.
        logprob: sum of the log-probabilities of its tokens; None where none were computed.
    """

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
