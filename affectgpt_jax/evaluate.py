"""Evaluate a run: checkpoint, answers, labels, scores, report.

    affectgpt evaluate --workdir runs/demo

asks the checkpoint that validation chose about the run's test clips and writes, into the run's
folder `evaluate`, report.html, report.json and report.md, and every answer and label behind them.
An evaluation of anything else goes beside, into `evaluate/2`, `evaluate/3` and so on.
Other clips are named with

    --set mer2024=/records/mer2024 --set mine:fine=/records/mine

by a set of MER-UniBench ({keys}) or any name with its task ({tasks}), and a record directory.

    --root /records

takes every set of MER-UniBench that has its records in a folder called so there, and says which
have none. Run again, it goes on where it stopped.

    --checkpoint FILE.pth --config=affectgpt_qwen25_7b --out DIR

in place of --workdir evaluates weights that nobody trained here: see docs/released.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from affectgpt_jax import asking, cli, cpu, inference
from affectgpt_jax.chat import BaseChat
from affectgpt_jax.common.files import atomic_write, lock_file
from affectgpt_jax.common.identity import json_sha256
from affectgpt_jax.common.json import read_json, write_json
from affectgpt_jax.common.progress import Counter
from affectgpt_jax.common.text import print_lines
from affectgpt_jax.config import ConfigError
from affectgpt_jax.data import demo
from affectgpt_jax.data.modalities import MODALITIES, modalities_in_words
from affectgpt_jax.data.pipeline import PromptProcessor
from affectgpt_jax.data.records import MANIFEST_FILE, Records, RecordSubset
from affectgpt_jax.evaluation.answers import answers_file, file_name
from affectgpt_jax.evaluation.chat_server import ChatServer
from affectgpt_jax.evaluation.datasets import BY_KEY, BY_NAME, DATASETS, DEMO, TASKS, name_and_task
from affectgpt_jax.evaluation.extract import ChatExtractor, Extractor, NoWords, ReplyCache
from affectgpt_jax.evaluation.lexicon import Lexicon, load_lexicon
from affectgpt_jax.evaluation.readers import Finding, Pairs, Table, pair
from affectgpt_jax.evaluation.report import REPORT_FILE, write_report
from affectgpt_jax.evaluation.results import NEEDS_LEXICON, TITLES, Result, percent, score_set
from affectgpt_jax.evaluation.rewards import Wheels
from affectgpt_jax.evaluation.rules import RuleExtractor
from affectgpt_jax.evaluation.summary import Report, make_report
from affectgpt_jax.evaluators import question_for_test_set
from affectgpt_jax.models.generate import GREEDY, Sampling
from affectgpt_jax.restore import (
    OUT_OF_MEMORY,
    Run,
    add_run_flags,
    check_trained_on,
    open_from_flags,
    parse_run_flags,
    set_up_process,
)
from affectgpt_jax.training.checkpoints import ALLOWED_OTHERS, silence_threads
from affectgpt_jax.training.metrics_writer import read_metrics
from affectgpt_jax.training.run_picture import curves_of

EXTRACTORS = ("auto", "rules", "llm", "openai")
LOCK_FILE = "evaluate.lock"
# What a folder is the evaluation of.
ASKED_FILE = "evaluation.json"
# Those whose answers are lists of labels, the one whose answers must be read first, and the one
# that asks which of two descriptions fits the clip better.
QUESTIONS = (*asking.AGREEABLE, "description", "preference")


@dataclasses.dataclass(frozen=True)
class SetPlace:
    """A data set of the command line.

    Attributes:
        name: as Table 2 writes it, "demo", or the user's.
        task: how it is scored; "" where its records are to tell.
        place: a record directory, or whatever else `config.data.test` may be.
    """

    name: str
    task: str
    place: str


@dataclasses.dataclass(frozen=True)
class HowDecoded:
    """How answers about a clip are written.

    Attributes:
        name: in reports; "" where there is one way only.
        sampling: how tokens are chosen.
        group: answers to each prompt, of which the consensus is taken.
    """

    name: str
    sampling: Sampling
    group: int = 1


# What the AffectGPT release samples its answers with.
ONE_SAMPLE = HowDecoded("one sample", Sampling(temperature=1.0, top_p=0.9))


@dataclasses.dataclass(frozen=True, eq=False)
class TestSet:
    """Clips to ask about, and what is true of them."""

    name: str
    task: str
    dataset: Records
    truth: Table
    references: Mapping[str, float]

    def about(self, processor: PromptProcessor) -> dict[str, list[tuple[str, str]]]:
        """What is known of each clip beside its truth, as examples show it: names and texts."""
        features = processor.mode.features
        return {
            entry.name: [
                (name, text)
                for name, text in (
                    ("subtitle", entry.subtitle),
                    ("described as", entry.description),
                    ("without", ", ".join(f for f in features if f not in entry.present)),
                )
                if text
            ]
            for entry in self.dataset.index
        }


def parse_set(text: str) -> SetPlace:
    """`NAME[:TASK]=RECORDS`.

    Raises:
        ValueError: another form, or a task that is unknown or not the set's.
    """
    head, _, place = text.partition("=")
    if not head.partition(":")[0] or not place:
        raise ValueError(f"{text!r} is not NAME=RECORDS, as in mer2024=/records/mer2024")
    return SetPlace(*name_and_task(head), place)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        SystemExit: after printing the help, or one sentence about what is wrong.
    """
    description = __doc__.format(keys=", ".join(BY_KEY), tasks=", ".join(TASKS))
    parser = cli.make_parser("affectgpt evaluate", description)
    add = parser.add_argument
    add_run_flags(parser, ALLOWED_OTHERS)
    add(
        "--steps",
        "--step",
        nargs="+",
        default=["best"],
        metavar="STEP",
        help="checkpoints by number, 'best' on validation (the default) or 'all'; of several, the "
        "best on validation, or else the last one named, is the fixed one",
    )
    add(
        "--set",
        action="append",
        default=[],
        type=cli.argument_type(parse_set),
        dest="sets",
        metavar="NAME[:TASK]=RECORDS",
        help="clips to ask about, once or more; default: the run's own test set",
    )
    add("--root", metavar="DIR", help="records of sets of MER-UniBench, in folders by their names")
    add(
        "--question",
        choices=QUESTIONS,
        metavar="TYPE",
        help=f"one of {', '.join(QUESTIONS)}; default: the first that the run was trained on",
    )
    add(
        "--extractor",
        choices=EXTRACTORS,
        help="who finds labels in descriptions: rules, the run's own LLM without its adapters, or "
        "a server; auto: rules for the base that ships, else llm",
    )
    cli.add_chat_server_flags(add)
    add(
        "--max-reply-tokens",
        type=int,
        default=512,
        metavar="N",
        help="of a reply about labels, thinking included; default: 512",
    )
    add("--lexicon", metavar="DIR", help="the official emotion wheels; default: the shipped ones")
    add("--level", type=int, choices=(1, 2), help="of the wheels; default: 1")
    add("--batch-size", type=int, metavar="N", help="answers at a time; default: the run's")
    add(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="of an answer; default: the run's, and for descriptions at least its max_tokens",
    )
    asking.add_sampling_flags(parser, "of sampling, of resampling and of the examples")
    add("--consensus", type=int, metavar="N", help="labels that N sampled answers agree on")
    add("--max-clips", type=int, metavar="N", help="the first N of each set, for a trial")
    add("--bootstrap", type=int, default=1000, metavar="N", help="resamples; 0: no intervals")
    add(
        "--out",
        metavar="DIR",
        help="default: RUN/evaluate, where reports of other evaluations stay; needed with "
        "--checkpoint",
    )
    arguments = parse_run_flags(parser, argv)
    _check_arguments(parser, arguments)
    return arguments


def _check_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if arguments.checkpoint is not None and not arguments.out:
        parser.error("--checkpoint needs --out=DIR, where the report is to be written")
    if arguments.bootstrap < 0:
        parser.error(f"--bootstrap is {arguments.bootstrap}; expected 0 or more")
    asking.check_consensus(parser, arguments)
    asking.check_sampling_flags(parser, arguments)
    counts = ("batch_size", "max_clips", "max_new_tokens", "concurrency", "max_reply_tokens")
    asking.check_least_one(parser, arguments, *counts)
    if arguments.consensus and (len(arguments.steps) > 1 or arguments.steps == ["all"]):
        parser.error("--consensus compares decodings of one checkpoint; name one in --steps")
    server = (arguments.extractor == "openai", bool(arguments.base_url), bool(arguments.model))
    if any(server) and not all(server):
        parser.error("--extractor=openai, --base-url and --model go together")
    for step in arguments.steps:
        if not (step.isdecimal() or step in ("best", "all")):
            parser.error(f"--steps: {step!r} is neither a number, nor 'best', nor 'all'")
    names = [place.name for place in arguments.sets]
    if len(set(names)) != len(names):
        parser.error("--set names a data set twice")
    try:
        check_file_names(arguments.sets)
    except ConfigError as error:
        parser.error(str(error))


def output_folder(arguments: argparse.Namespace) -> Path:
    """Where all that is written goes."""
    return Path(arguments.out or Path(arguments.workdir, "evaluate")).expanduser()


def evaluate(arguments: argparse.Namespace, say: Callable[[str], None]) -> tuple[Report, Path]:
    """Do what the command line asks for; returns the report and the folder that it is in."""
    return evaluate_run(open_from_flags(arguments, say), arguments, say)


def evaluate_run(
    run: Run, arguments: argparse.Namespace, say: Callable[[str], None]
) -> tuple[Report, Path]:
    """`evaluate` of a run that is open, with its weights or without."""
    out = output_folder(arguments)
    out.mkdir(parents=True, exist_ok=True)
    advice = "wait for it, stop it, or name another --out"
    with lock_file(out / LOCK_FILE, str(out), advice, say):
        return _evaluate(run, out, arguments, say)


def _evaluate(
    run: Run, out: Path, arguments: argparse.Namespace, say: Callable[[str], None]
) -> tuple[Report, Path]:
    steps = choose_steps(arguments.steps, run)
    question = choose_question(arguments.question, run)
    if question == "preference" and arguments.consensus:
        raise ConfigError("--consensus is for labels, and preferences have none; leave it out")
    log = run.workdir / "metrics.jsonl"  # which a run that was published lacks
    curves = curves_of(read_metrics(log)) if log.is_file() else {}
    limit = arguments.max_new_tokens or run.config.generate.max_new_tokens
    if question == "description" and not arguments.max_new_tokens:
        limit = max(limit, run.config.max_tokens)  # no description that it learned was longer
    processor = run.processor
    decodings = choose_decodings(arguments)
    places = for_question(question, choose_sets(arguments, run, say))
    if all(place.task for place in places):  # or else records are to tell
        check_reads(arguments, question, [place.task for place in places])
    as_trained = (
        question == question_for_test_set(run.config)
        and decodings == [HowDecoded("", GREEDY)]
        and limit == run.config.generate.max_new_tokens
    )
    asked_step = steps[-1] if as_trained else None
    sets = [open_set(run, place, arguments.max_clips, asked_step, say) for place in places]
    check_reads(arguments, question, [test.task for test in sets])
    for test in sets:
        # Trouble with a clip shows before any answer.
        processor.prompt_examples(test.dataset, question)
    tasks = [test.task for test in sets]
    extracts = needs_extractor(question, tasks)
    lexicon = None
    if extracts or needs_wheels(arguments, tasks):
        lexicon = load_lexicon(arguments.lexicon)
    if lexicon and not arguments.lexicon:  # which one is meant has not been said
        mine = {"lexicon": lexicon.identity}
        run.check_inputs(mine, arguments.allow_other, say)
    chat = chat_server(arguments)
    run = run if run.base is not None else run.with_weights()
    replies = Counter("replies about labels")
    extractor = make_extractor(arguments, run, lexicon, out, replies, chat) if extracts else None
    generators = {
        how: inference.Generator(
            run.model,
            run.base,
            processor,
            run.mesh,
            num_buckets=run.config.num_buckets,
            batch_size=arguments.batch_size or run.config.generate.batch_size,
            max_new_tokens=limit,
            merge_lora=inference.should_merge(run.config.generate.merge_lora, run.model, run.base),
            sampling=how.sampling,
            group=how.group,
            seed=arguments.seed,
        )
        for how in decodings
    }
    level = arguments.level or 1
    wheels = lexicon and Wheels(lexicon, level=level)
    pairs: dict[str, dict[str, Pairs]] = {s.name: {} for s in sets}
    texts: dict[str, dict[str, str]] = {}
    files = {
        (step, test.name, how): _answer_file(
            run, step, checkpoint, test, question, limit, how, arguments.seed
        )
        for step in steps
        for checkpoint in [run.fingerprint(step)]  # reads its files, so once for all sets
        for test, how in itertools.product(sets, decodings)
    }
    asked = {
        "question": question,
        "sets": [dict(name=s.name, task=s.task, clips=len(s.dataset)) for s in sets],
        "answers": [*files.values()],
        "extractor": extractor.identity if extractor else None,
        "lexicon": lexicon and lexicon.identity.sha256,
        **{"level": level, "bootstrap": arguments.bootstrap, "seed": arguments.seed},
    }
    folder = claim_folder(out, asked, say)
    for step in steps:
        at_step = run if step == run.step else run.at_step(step, arguments.allow_other, say)
        trainable = at_step.trainable
        for test, (how, generator) in itertools.product(sets, generators.items()):
            file = files[step, test.name, how]
            said = ", ".join(filter(None, [run.step_name(step), how.name]))
            with Counter(f"answers about {test.name}", said) as count:
                answers = inference.answers_on_disk(
                    out / "answers" / file, generator, trainable, test.dataset, question, count, say
                )
            with replies:
                predictions = predict(
                    test, answers, processor, question, extractor, how.group, wheels
                )
            pairs[test.name][said] = pair(predictions.table, test.truth)
            texts[test.name] = dict(zip(predictions.table.names, predictions.texts, strict=True))
            _write_predictions(answers_file(folder, test.name, said), predictions, test)
    results = [
        score_set(
            test.name,
            test.task,
            pairs[test.name],
            lexicon if test.task in NEEDS_LEXICON else None,
            level=level,
            resamples=arguments.bootstrap,
            seed=arguments.seed,
            texts=texts[test.name],
            references=test.references,
            about=test.about(processor),
            parts=parts_of(test.dataset),
        )
        for test in sets
    ]
    parts = [
        run.name,
        question,
        decodings[-1].name,
        *sampled_how(arguments),
    ]
    report = make_report(
        ", ".join(filter(None, [*parts, extractor and extractor.identity])),
        results,
        modalities=modalities(processor),
        # Beside other clips, scores on those of MER-UniBench say nothing.
        peers=any(test.name in BY_NAME for test in sets),
        curves=curves,
        label_lexicon=lexicon and lexicon.identity,
        level=level if arguments.consensus else None,
        resamples=arguments.bootstrap,
        seed=arguments.seed,
    )
    write_report(report, folder)
    return report, folder


def claim_folder(out: Path, asked: Mapping[str, Any], say: Callable[[str], None]) -> Path:
    """Where the report of an evaluation goes: `out`, or a numbered folder in it.

    A folder belongs to the evaluation that its `ASKED_FILE` describes, and to no other.

    Args:
        out: which this process has locked.
        asked: all that the report depends on, ready for JSON.
        say: told of a folder beside others.
    """
    for number in itertools.count(1):
        folder = out if number == 1 else out / str(number)
        file = folder / ASKED_FILE
        if file.is_file() or (folder / REPORT_FILE).exists():
            if not file.is_file() or read_json(file, dict[str, Any]) != asked:
                continue
        elif number > 1:
            say(f"{out} holds another evaluation, which stays; this one goes to {folder}")
        folder.mkdir(exist_ok=True)
        write_json(file, asked, indent=1)
        return folder


def choose_steps(asked: Sequence[str], run: Run) -> list[int]:
    """Checkpoints in the order in which they are scored, the fixed one last.

    That is the best on validation, which has not seen the test set; if it was not asked for, the
    last one named.

    Raises:
        ConfigError: the run has no such checkpoint.
    """
    steps: list[int] = []
    if not run.is_trained_here and [*asked] != ["best"]:
        raise ConfigError(f"--steps: {run.workdir} is one checkpoint; leave it out")
    for step in asked:
        steps += run.steps if step == "all" else [run.best_step if step == "best" else int(step)]
    for step in steps:
        if step not in run.steps:
            raise ConfigError(
                f"--steps: {run.workdir} has no checkpoint of step {step}; it has {[*run.steps]}"
            )
    steps = list(dict.fromkeys(steps))
    if run.best_step in steps:
        steps.remove(run.best_step)
        steps.append(run.best_step)
    return steps


def choose_question(asked: str | None, run: Run) -> str:
    """The question that is asked.

    A run that was trained on all kinds of questions ("qa") may be asked for a description, too, as
    the paper's Table 3 asks such models; only where that is said.

    Raises:
        ConfigError: the run was not trained on it, or on none that gives labels.
    """
    question = asked or next((name for name in QUESTIONS if name in run.label_types), None)
    wanted = f"--question={asked}" if asked else f"one of {', '.join(QUESTIONS)}"
    if not (question == "description" and "qa" in run.label_types):
        check_trained_on(run.config, run.workdir, question, wanted)
    return question


def for_question(question: str, places: Sequence[SetPlace]) -> list[SetPlace]:
    """The sets as a question scores them: preferences are a task of their own.

    Raises:
        ConfigError: a set that is named with a task of other questions, or the other way round.
    """
    if question != "preference":
        for place in places:
            if place.task == "preference":
                raise ConfigError(
                    f"--set {place.name}:preference is scored by --question=preference, not by "
                    f"--question={question}"
                )
        return list(places)
    for place in places:
        if place.task not in ("", "preference") and place.name != DEMO:
            raise ConfigError(
                f"--question=preference: {place.name} is scored as {place.task}; name records with "
                "alternatives, as --set NAME:preference=RECORDS"
            )
    return [dataclasses.replace(place, task="preference") for place in places]


def needs_wheels(arguments: argparse.Namespace, tasks: Collection[str]) -> bool:
    """Whether labels become those of wheels: in a score, or to agree."""
    return bool(arguments.consensus) or any(task in NEEDS_LEXICON for task in tasks)


def needs_extractor(question: str, tasks: Collection[str]) -> bool:
    """Whether labels or sentiments must be found in answers."""
    return question == "description" or "sentiment" in tasks


def check_reads(arguments: argparse.Namespace, question: str, tasks: Collection[str]) -> None:
    """Refuse flags that an evaluation of this question and these tasks does not read.

    Raises:
        ConfigError: naming the first one.
    """
    wheels, extracts = needs_wheels(arguments, tasks), needs_extractor(question, tasks)
    scored = f"--question={question}, scored as {' and '.join(dict.fromkeys(tasks))}"
    for flag, given, read in (
        ("--lexicon", arguments.lexicon, wheels or extracts),
        ("--level", arguments.level, wheels),
        ("--extractor", arguments.extractor, extracts),
    ):
        if given and not read:
            raise ConfigError(f"{flag}={given} has no part in {scored}; leave it out")


def choose_decodings(arguments: argparse.Namespace) -> list[HowDecoded]:
    """How answers are written: the last way is the one that counts."""
    if not arguments.consensus:
        return [HowDecoded("", arguments.sampling)]
    group = arguments.consensus
    how = HowDecoded(f"consensus of {group}", arguments.sampling, group)
    return [HowDecoded("most probable", GREEDY), ONE_SAMPLE, how]


def sampled_how(arguments: argparse.Namespace) -> list[str]:
    """How tokens were chosen, in words; nothing where they were the most probable ones."""
    sampling = arguments.sampling
    if sampling == GREEDY:
        return []
    settings = [
        f"{name.replace('_', ' ')} {x:g}" for name, x in dataclasses.asdict(sampling).items()
    ]
    return [*settings, f"seed {arguments.seed}"] if sampling.temperature else settings


def choose_sets(
    arguments: argparse.Namespace, run: Run, say: Callable[[str], None]
) -> list[SetPlace]:
    """The sets that are named, then those that are found; without either, the run's own.

    Raises:
        ConfigError: there is none, or two that would share their files.
    """
    if arguments.root or arguments.sets:
        places = [*arguments.sets, *find_sets(arguments, say)]
        check_file_names(places)
        return places
    place = run.config.data.test
    if not place:
        raise ConfigError(f"{run.workdir} names no test set; name one as --set NAME=RECORDS")
    if demo.world_seed(place, 0) is not None:
        return [SetPlace(DEMO, "words", place)]
    known = BY_KEY.get(Path(place).name)
    return [SetPlace(known.name, known.task, place) if known else SetPlace("test", "", place)]


def check_file_names(places: Sequence[SetPlace]) -> None:
    """Refuse sets of which one would overwrite what the other has written.

    Raises:
        ConfigError: two names that become the same name of a file.
    """
    names: dict[str, str] = {}
    for place in places:
        file = file_name(place.name)
        if (other := names.setdefault(file, place.name)) != place.name:
            raise ConfigError(
                f"the sets {other!r} and {place.name!r} would both be written to "
                f"{file}-step-STEP.jsonl; give one of them another name in --set"
            )


def find_sets(arguments: argparse.Namespace, say: Callable[[str], None]) -> list[SetPlace]:
    """The sets below `--root` that have records and are not named by `--set`.

    Raises:
        ConfigError: none of them has.
    """
    if not arguments.root:
        return []
    root = Path(arguments.root).expanduser()
    named = {place.name for place in arguments.sets}
    wanted = [dataset for dataset in DATASETS if dataset.name not in named]
    found = [d for d in wanted if (root / d.key / MANIFEST_FILE).is_file()]
    if not found:
        raise ConfigError(
            f"--root={root}: found no records there; expected one or more of the folders "
            f"{', '.join(d.key for d in wanted)}, each with a {MANIFEST_FILE}"
        )
    if lacking := [d.key for d in wanted if d not in found]:
        say(f"no records in {root} of {', '.join(lacking)}")
    return [SetPlace(d.name, d.task, str(root / d.key)) for d in found]


def open_set(
    run: Run,
    place: SetPlace,
    max_clips: int | None,
    as_trained: int | None,
    say: Callable[[str], None],
) -> TestSet:
    """Open the records of a set and read off them what is true.

    Args:
        run: that is asked.
        place: of the set.
        max_clips: the first so many alone.
        as_trained: the checkpoint that is scored, if it is asked as training asks about the run's
            own test set; None if otherwise.
        say: as for `Run.open_records`.

    Raises:
        ConfigError: features that do not fit, or clips without a truth of the set's task.
        RecordError: no intact records.
    """
    dataset = run.open_records(place.place, say)
    if max_clips is not None and max_clips < len(dataset):
        dataset = RecordSubset(dataset, range(max_clips))
    task = place.task or _task_of(dataset, place)
    truth = read_truth(dataset, task, place)
    references = {}
    if task == "words":
        references = {
            f"ceiling with {modalities_in_words(name)}": value
            for name, value in dataset.ceilings(run.processor.mode.name).items()
        }
        if place.place == run.config.data.test and max_clips is None:
            references |= control(run, as_trained)
    return TestSet(place.name, task, dataset, truth, references)


def control(run: Run, step: int | None) -> dict[str, float]:
    """The score on the run's own test set with features of other clips, if training found that of
    the checkpoint of this step."""
    file = run.workdir / "result.json"
    if step is None or not file.is_file():
        return {}
    result = read_json(file, dict[str, Any])
    if result.get("best_step") != step or "hit_features_shuffled" not in result:
        return {}
    return {"control: shuffled features": result["hit_features_shuffled"]}


# What a record says that is true, by task.
TRUTHS: dict[str, Callable[[Any], Any]] = {
    "fine": lambda entry: [label.strip().lower() for label in entry.labels] or None,
    "basic": lambda entry: entry.emotion.strip().lower() or None,
    "words": lambda entry: entry.emotion.strip().lower() or None,
    "sentiment": lambda entry: entry.valence,
    "preference": lambda entry: entry.preferred or None,
}


def parts_of(dataset: Records) -> dict[str, set[str]]:
    """Clips that are scored by themselves, too: those that say which modality contradicts others.

    The paper's Figure 6 shows such clips. Nothing, where no record says so. A record that does not
    may be of a clip whose modalities agree, or that nobody has looked at.
    """
    torn = {entry.name for entry in dataset.index if entry.conflict}
    if not torn:
        return {}
    others = {entry.name for entry in dataset.index} - torn
    return {"clips whose modalities conflict": torn, "other clips": others}


def _task_of(dataset: Records, place: SetPlace) -> str:
    """The first task that all clips have a truth for."""
    for task in ("basic", "fine", "sentiment"):
        if all(TRUTHS[task](entry) is not None for entry in dataset.index):
            return task
    raise ConfigError(
        f"{place.place} has clips without emotion, labels or valence; name how it is scored, as in "
        f"--set mine:fine={place.place}"
    )


def read_truth(dataset: Records, task: str, place: SetPlace) -> Table:
    """What is true of the clips that say so; the others are left out and listed.

    Raises:
        ConfigError: no clip says so.
    """
    found = {entry.name: TRUTHS[task](entry) for entry in dataset.index}
    known = {name: value for name, value in found.items() if value is not None}
    if not known:
        field = {"fine": "labels", "sentiment": "valence", "preference": "preferred"}.get(
            task, "emotion"
        )
        raise ConfigError(f"{place.place}: no record has the {field} that {task} is scored by")
    without = tuple(name for name in found if name not in known)
    findings = (Finding("without a truth, left out", without),) if without else ()
    return Table(place.place, tuple(known), tuple(known.values()), findings)


def chat_server(arguments: argparse.Namespace) -> ChatServer | None:
    """The server that the command line names.

    Raises:
        ChatError: an address or a key that cannot be used.
    """
    if arguments.extractor != "openai":
        return None
    return ChatServer(
        arguments.base_url,
        arguments.model,
        api_key=os.environ.get(arguments.api_key_env, ""),
        concurrency=arguments.concurrency,
        max_tokens=arguments.max_reply_tokens,
    )


def make_extractor(
    arguments: argparse.Namespace,
    run: Run,
    lexicon: Lexicon,
    out: Path,
    progress: Callable[[int, int], None],
    server: ChatServer | None,
) -> Extractor:
    """Who finds labels in descriptions, and the sentiment of labels."""
    rules = RuleExtractor(lexicon)
    kind = arguments.extractor
    if kind in (None, "auto"):
        kind = "rules" if run.config.llm == "tiny" else "llm"
    if kind == "rules":
        return rules
    chat = server or BaseChat(
        run.model.decoder,
        run.base,
        run.identity,
        run.processor.tokenizer,
        run.mesh,
        batch_size=arguments.batch_size or run.config.generate.batch_size,
        max_new_tokens=arguments.max_reply_tokens,
    )
    cache = ReplyCache(out / "replies.jsonl")
    return ChatExtractor(chat, cache, rules.in_text, progress)


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What was answered about each clip, and what it says as its task counts it."""

    table: Table
    texts: tuple[str, ...]


def predict(
    test: TestSet,
    answers: inference.Answers,
    processor: PromptProcessor,
    question: str,
    extractor: Extractor | None,
    group: int = 1,
    wheels: Wheels | None = None,
) -> Predictions:
    """What the answers say about each clip; of a group, what they agree on.

    Of descriptions, one that was sampled is taken, so that labels and text belong together.
    """
    names = tuple(entry.name for entry in test.dataset.index)
    texts = answers.texts
    of_group = [range(clip * group, (clip + 1) * group) for clip in range(len(names))]

    def finding(what: str, flags: Sequence[bool]) -> Finding:
        found = [any(flags[number] for number in numbers) for numbers in of_group]
        return Finding(what, _where(names, found))

    findings = [finding("whose answer was cut off", [a.cut for a in answers.each])]
    if question == "description":
        told = [processor.prompts.read_answer(question, text) for text in texts]
        labels = extractor.labels(told)
        findings += _unread(
            [name for name in names for _ in range(group)],
            told,
            extractor,
            "whose labels could not be extracted",
        )
    else:
        labels = [processor.prompts.read_labels(text, question) for text in texts]
    if question == "preference":
        words = [processor.prompts.read_answer(question, text).strip().lower() for text in texts]
        found = tuple(f for f in findings if f.names)
        return Predictions(Table("the answers", names, tuple(words), found), tuple(texts))
    if group > 1:
        agreed = [
            inference.agree(
                processor.prompts,
                question,
                [texts[n] for n in numbers],
                [labels[n] for n in numbers],
                wheels,
            )
            for numbers in of_group
        ]
        labels, texts = map(list, zip(*agreed, strict=True))
    values: list[Any] = labels
    if test.task == "sentiment":
        values = extractor.sentiments(labels)
        asked = [", ".join(clip) for clip in labels]
        findings += _unread(names, asked, extractor, "whose sentiment could not be extracted")
    table = Table("the answers", names, tuple(values), tuple(f for f in findings if f.names))
    return Predictions(table, tuple(texts))


def _unread(
    names: Sequence[str], asked: Sequence[str], extractor: Extractor, what: str
) -> list[Finding]:
    """The clips of which the extractor could make nothing, by why."""
    clips: dict[str, list[str]] = {}
    for name, text in zip(names, asked, strict=True):
        if (reply := extractor.unparsed.get(text)) is not None:
            why = str(reply) if isinstance(reply, NoWords) else what
            clips.setdefault(why, []).append(name)
    # A clip counts once, however many of its answers are such.
    return [Finding(why, tuple(dict.fromkeys(found))) for why, found in clips.items()]


def _where(names: Sequence[str], flags: Sequence[bool]) -> tuple[str, ...]:
    return tuple(name for name, flag in zip(names, flags, strict=True) if flag)


def _answer_file(
    run: Run,
    step: int,
    checkpoint: str,
    test: TestSet,
    question: str,
    limit: int,
    how: HowDecoded,
    seed: int,
) -> str:
    """A name that changes with everything that an answer depends on but the code."""
    parts = [
        # A run that is trained anew in the same place has the same steps.
        checkpoint,
        run.identity.sha256,
        # But for the code, which every answer names: answers of two versions may stand together.
        {name: i.sha256 for name, i in run.inputs.items() if name != "code"},
        run.config.to_json(),
        dataclasses.asdict(test.dataset.manifest),
        # The first clip's stands for all prompts, so that a trial on a few clips is part of all.
        run.processor.prompt_examples(RecordSubset(test.dataset, [0]), question)[0].tokens.tolist(),
        limit,
        dataclasses.asdict(how.sampling),
        seed if how.sampling.temperature else None,
        *([how.group] if how.group > 1 else []),
    ]
    return f"{file_name(test.name)}-step-{step}-{question}-{json_sha256(parts)[:12]}.jsonl"


def _write_predictions(path: Path, predictions: Predictions, test: TestSet) -> None:
    """Name, text and labels, sentiment or preference of every clip, as `score` reads them.

    The truth stands beside, for those who read.
    """
    table = predictions.table
    truth = dict(zip(test.truth.names, test.truth.values, strict=True))
    key = test.task if test.task in ("sentiment", "preference") else "labels"
    with atomic_write(path, "w") as file:
        for name, value, text in zip(table.names, table.values, predictions.texts, strict=True):
            line = {"name": name, "text": text, key: value}
            line |= {"truth": truth[name]} if name in truth else {}
            file.write(json.dumps(line) + "\n")


def modalities(processor: PromptProcessor) -> str:
    """What the model is given, as tables of the field write it: A, V and T."""
    letters = {MODALITIES[feature].letter for feature in processor.mode.features}
    return "".join((*sorted(letters), "T" if processor.mode.text else ""))


def _beside(result: Result) -> str:
    """Another decoding of the same checkpoint, and how far the one that counts is above it."""
    line = f"  {result.predictions}: {percent(result.score.primary)}"
    if (against := result.against_fixed) is None:
        return line
    low, high = percent(-against.interval.high), percent(-against.interval.low)
    return f"{line}, to which it adds {percent(-against.difference)} ({low} to {high})"


def summarise(report: Report, out: Path, compared: bool = False) -> list[str]:
    """The closing lines: every set's score, and where to look.

    Args:
        report: of the run.
        out: where it was written.
        compared: whether the results are decodings of one checkpoint, not several checkpoints.
    """
    lines = [f"warning: {warning}" for warning in report.warnings]
    for result in report.sets:
        fixed = result.fixed
        # What was made of the labels comes first.
        lines += [f"{result.name}: {unknown}" for unknown in fixed.unknown]
        lines += [f"{result.name}: {finding}" for finding in fixed.pairs.findings]
        score = fixed.score
        metric, value = next(iter(score.values.items()))
        interval = fixed.interval
        ends = f" ({percent(interval.low)} to {percent(interval.high)})" if interval else ""
        lines.append(
            f"{result.name}, {result.task}, {score.counts['clips']:,} clips, "
            f"{fixed.predictions}: {TITLES.get(metric, metric)} {percent(value)}{ends}"
        )
        if compared:
            lines += [_beside(other) for other in result.results[:-1]]
        elif len(result.results) > 1:
            both = result.protocols
            lines.append(
                f"  best of {both.checkpoints}, chosen on the test set: "
                f"{percent(both.best_value)} ({both.best})"
            )
        lines += [f"  {name}: {percent(share)}" for name, share in result.references.items()]
        for part in result.parts:
            ends = ""
            if part.interval:
                ends = f" ({percent(part.interval.low)} to {percent(part.interval.high)})"
            said = part.why_not or f"{percent(part.value)}{ends}"
            lines.append(f"  {part.clips:,} {part.name}: {said}")
    lines.append(f"{out}: report.html, report.json, report.md, and the answers behind them")
    return lines


def describe(error: OSError, out: Path) -> str:
    """Which file, and why; and what to do, where it is the results that cannot be written."""
    # Files are opened by name, so what has none failed later: while it was written to, as a rule.
    file = Path(os.path.abspath(error.filename or out))
    folder = Path(os.path.abspath(out))
    what = f"{error.filename or out}: {error.strerror or error}"
    # Where the folder cannot be made, it may be one above it that is named.
    if file.is_relative_to(folder) or folder.is_relative_to(file):
        return f"{what}; the results need a place that can be written, with room, as --out"
    return what


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; see `cli.exit_on_error`."""
    folder = Path()
    with cli.exit_on_error(
        interrupted="interrupted; the same command goes on from there",
        out_of_memory=OUT_OF_MEMORY,
        os_error=lambda error: describe(error, folder),
    ):
        arguments = parse_arguments(argv)
        folder = output_folder(arguments)
        set_up_process()
        report, out = evaluate(arguments, lambda text: print_lines([text]))
        print_lines(summarise(report, out, compared=bool(arguments.consensus)))


if __name__ == "__main__":
    silence_threads()
    cpu.keep_freed_memory()
    main()
