"""Post-training, which goes on from another run by rewards or by preferences: what both share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import jax
import numpy as np
from ml_collections import ConfigDict

from affectgpt_jax import build, cli, outcomes, pairs, restore
from affectgpt_jax import config as configs
from affectgpt_jax.common.files import write_text
from affectgpt_jax.common.identity import Identity, json_sha256
from affectgpt_jax.common.json import check_type, read_json, write_json
from affectgpt_jax.config import (
    SECTIONS,
    ConfigError,
    apply_overrides,
    config_of_flags,
    validate,
)
from affectgpt_jax.data import demo
from affectgpt_jax.data.records import Records, hold_out
from affectgpt_jax.evaluation.lexicon import WHEELS, Lexicon, load_lexicon
from affectgpt_jax.evaluation.rewards import Reward, Wheels
from affectgpt_jax.inference import Generator
from affectgpt_jax.models.generate import Sampling
from affectgpt_jax.program import Program
from affectgpt_jax.restore import Run
from affectgpt_jax.rollouts import scorable, truths
from affectgpt_jax.trainer_command import TrainerCommand, add_flags
from affectgpt_jax.training import distributed, loop, metrics_writer
from affectgpt_jax.training.checkpoints import Checkpoints, check_disk
from affectgpt_jax.training.metrics_writer import SAMPLES, Sample
from affectgpt_jax.training.step import State

BEFORE = "answers_before.json"


# Keys of a config that say what a model is and in which precision it computes. A run that goes on
# from another one keeps them.
MODEL_KEYS = (
    *("input", "prompts", "dtype", "base_precision"),
    *("fusion", "projectors", "qformer", "lora"),
)


def model_of(config: ConfigDict) -> dict[str, str]:
    """Of a config, as "config.KEY", what `MODEL_KEYS` hold; dropout is of training alone."""
    found = configs.described(ConfigDict({key: config[key] for key in MODEL_KEYS}))
    return {key: value for key, value in found.items() if not key.endswith(".dropout")}


# --- command line and config ----------------------------------------------------------------------


def config_from(start: ConfigDict, section: str, arguments: Sequence[str]) -> ConfigDict:
    """The config of a run that goes on from another one.

    Args:
        start: config of that one.
        section: that is added, one of `config.SECTIONS`.
        arguments: `--config.KEY=VALUE`, which change keys.

    Raises:
        ConfigError: a key or a value that cannot be.
    """
    config = ConfigDict(start.to_dict())
    for other in SECTIONS:
        if other in config:
            del config[other]
    config[section] = SECTIONS[section]()
    # A constant rate: what is learned from is noisy, and the run may end at any step.
    config.steps, config.optimizer.learning_rate, config.checkpoint_every = 1000, 1e-5, 50
    if config.llm == "tiny":
        config.steps, config.optimizer.learning_rate = 150, 4e-4
        config[section].max_new_tokens = config.generate.max_new_tokens
    config.optimizer.final_learning_rate = -1.0  # until the rate is known
    config.optimizer.warmup_steps, config.optimizer.weight_decay = 0, 0.0
    config.optimizer.clip_norm = 1.0
    config.log_every = 1
    config.lora.dropout = config.qformer.dropout = 0.0
    config.pack_length, config.gradient_accumulation_steps = 0, 1
    _refuse_unread(section, arguments)
    apply_overrides(config, arguments)
    if config.optimizer.final_learning_rate < 0:
        config.optimizer.final_learning_rate = config.optimizer.learning_rate
    if config.lora.dropout or config.qformer.dropout:
        raise ConfigError(
            "config.lora.dropout and config.qformer.dropout must be 0: with dropout, training sees "
            "another model than the one that its answers are compared with"
        )
    config.batch_size = config.gradient_accumulation_steps  # until the rows are known
    validate(config)
    return config


def _refuse_unread(section: str, arguments: Sequence[str]) -> None:
    """Refuse flags of supervised training that have no effect here.

    Raises:
        ConfigError: there is one.
    """
    rows = {"rl": "config.rl.prompts and config.rl.group", "dpo": "config.dpo.pairs"}[section]
    long = {
        "rl": "clips whose prompts are too long are left out, and counted",
        "dpo": "a pair that is too long is refused",
    }[section]
    start = "the command writes what --from or --checkpoint, and --step, name"
    why = {
        "batch_size": f"the rows of an update follow from {rows}; set those",
        "pack_length": "a row holds one prompt and its answers; leave it out",
        "too_long": f"{long}; leave it out",
        "init_from": "the weights are those of the run to start from; leave it out",
        **{f"{section}.{key}": start for key in ("start", "start_step", "start_sha256")},
        f"{section}.lexicon_sha256": f"the command writes it; set config.{section}.lexicon",
    }
    if section == "dpo":
        held_out = "checkpoints are chosen by the pairs that config.dpo.val_share holds out; set it"
        why |= {"data.val": held_out, "data.val_share": held_out}
    for argument in arguments:
        name = argument.lstrip("-").partition("=")[0]
        if (key := name.removeprefix("config.")) in why:
            raise ConfigError(f"config.{key} cannot be set here: {why[key]}")


def check_same_model(config: ConfigDict, start: ConfigDict) -> None:
    """Refuse a config of another model than that of the run that it starts from.

    Raises:
        ConfigError: the first key that differs.
    """
    mine = model_of(config)
    for key, value in model_of(start).items():
        if mine[key] != value:
            raise ConfigError(
                f"{key} is {mine[key]}, but {value} in the run to start from, whose model stays as "
                f"it was trained; leave {key} out"
            )


def check_questions(config: ConfigDict, section: str, start: ConfigDict, place: Path) -> None:
    """Refuse a question to learn from that the run to start from was not trained on.

    Raises:
        ConfigError: it was not, by the key.
    """
    key, asked = f"config.{section}", config[section].question
    wanted = f"{key}.question={asked}"
    if section == "dpo" and config.dpo.source == "records":  # `question` only measures
        asked = pairs.QUESTION
        wanted = f"{asked}s, two of which {key}.source=records compares"
    restore.check_trained_on(start, place, asked, wanted)


def parse_command_line(
    command: str, description: str, argv: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """The flags of a command, and its overrides of the config.

    Raises:
        UsageError: an unknown flag, or one that is missing.
        SystemExit: after printing the help.
    """
    parser = cli.make_parser(command, description)
    add = parser.add_argument
    add("--workdir", required=True, type=Path, metavar="DIR", help="of the new run")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--from", dest="origin", metavar="RUN", help="workdir of the run to start from"
    )
    restore.add_checkpoint_flags(parser, which)
    add("--step", type=int, metavar="N", help="of its checkpoint; default: the best on validation")
    add("--config.KEY", metavar="VALUE", help="instead of the run's or the default one")
    add_flags(parser)
    own, overrides = cli.parse_with_overrides(parser, argv)
    if own.config and own.origin is not None:
        parser.error("--config goes with --checkpoint; a run has its config")
    own.workdir = own.workdir.expanduser()
    start = Path(own.origin or own.checkpoint).expanduser()
    if own.workdir.resolve() == start.resolve():
        flag = "--checkpoint" if own.origin is None else "--from"
        parser.error(f"--workdir and {flag} are the same run; name a new --workdir")
    return own, overrides


def open_start(
    own: argparse.Namespace, section: str, overrides: Sequence[str]
) -> tuple[ConfigDict, Callable[[], Run]]:
    """The config of a new run, and what loads the weights that it starts from.

    Args:
        own, overrides: of `parse_command_line`.
        section: of the config that the command adds.

    Raises:
        UserError: no run and no checkpoint, or a config that cannot be, is that of another model,
            or asks what it was not trained on.
    """
    how = {"allow_other": own.allow_other, "download": own.download}
    if own.origin is not None:
        origin = Path(own.origin).expanduser()
        start = restore.load_config(origin)
        config = config_from(start, section, overrides)
        check_same_model(config, start)
        check_questions(config, section, start, origin)
        return config, lambda: restore.open_run(
            origin, own.step, llm=config.llm, mesh=config.mesh, **how
        ).with_weights()
    named = None
    if own.config:
        rest = [arg for arg in overrides if not arg.startswith(f"--config.{section}.")]
        named = config_of_flags(own.config, rest)
    path = restore.checkpoint_path(own.checkpoint, download=own.download)
    start = restore.config_of_checkpoint(path, named)
    config = config_from(start, section, overrides)
    check_same_model(config, start)
    check_questions(config, section, start, path)
    return config, lambda: restore.open_checkpoint(
        own.checkpoint, named, own.step, llm=config.llm, mesh=config.mesh, **how
    ).with_weights()


def run_command(
    command: str,
    description: str,
    section: str,
    argv: Sequence[str] | None,
    work: Callable[..., Any],
    out_of_memory: str,
) -> None:
    """Read a command line, join the other processes, load the run to start from, and work.

    Args:
        command: as in "affectgpt reinforce".
        description: for its help.
        section: of the config that it adds.
        argv: its arguments; None are those of the process.
        work: `(config, workdir, run, group, fallback, allow_other)`.
        out_of_memory: what to do where there is none left.
    """
    trainer = TrainerCommand(out_of_memory)
    with trainer.ending():
        argv = sys.argv[1:] if argv is None else argv
        own, overrides = parse_command_line(command, description, argv)
        config, load = open_start(own, section, overrides)
        with trainer.joined(config, own) as group:
            work(config, own.workdir, load(), group, own.fallback, own.allow_other)


# --- the start ------------------------------------------------------------------------------------


def save_config(config: ConfigDict, start: Run, workdir: Path) -> None:
    """Write the config of a run, and what its start has kept of how features are made."""
    configs.save_config(config, workdir)
    kept = start.workdir / build.EXTRACTION_FILE
    if kept.is_file() and kept.parent != workdir:
        write_text(workdir / build.EXTRACTION_FILE, kept.read_text(encoding="utf-8"))


def note_start(section: ConfigDict, run: Run, lexicon: Lexicon) -> None:
    """Write into a config which checkpoint and which lexicon the run depends on."""
    section.start, section.start_step = str(run.workdir), run.step
    section.start_sha256 = run.fingerprint(run.step)
    section.lexicon_sha256 = lexicon.identity.sha256


def inputs_of(run: Run, clips: Mapping[str, Records], lexicon: Lexicon) -> dict[str, Identity]:
    """What the answers of a run depend on beside its base, see `build.inputs`.

    Args:
        run: that it goes on from.
        clips: see `open_clips`.
        lexicon: by which it is rewarded and compared.
    """
    names = {"rl": "training records (rl)", "val": "validation records (val)"}
    names["test"] = build.TEST_RECORDS
    records = {names[part]: build.records_identity(found) for part, found in clips.items()}
    return {**run.inputs, **records, "lexicon": lexicon.identity}


def start(
    program: Program,
    run: Run,
    inputs: Mapping[str, Identity],
    session: loop.Session,
    *,
    fallback: bool,
    allow_other: Collection[str],
) -> tuple[Checkpoints, State, int]:
    """The new run's checkpoints, its state, and the step from which it goes on.

    Args:
        program: the update.
        run: that it starts from where there is no checkpoint yet.
        inputs: see `inputs_of`.
        session: of the loop.
        fallback, allow_other: see `loop.initial_state`.
    """
    config, workdir, group = session.config, session.workdir, session.group
    for line in program.describe(build.base_directory(config.llm).name):
        session.say(line)
    check_disk(workdir, program.state)
    group.require_same({what: identity.sha256 for what, identity in inputs.items()})
    checkpoints = Checkpoints(
        workdir, run.identity, config.max_to_keep, group.is_main_process, inputs
    )
    state, step = loop.initial_state(
        checkpoints,
        program.state,
        lambda: _start_state(program, run),
        session,
        fallback=fallback,
        allow_other=allow_other,
    )
    return checkpoints, state, step


def _start_state(program: Program, run: Run) -> State:
    """The run's adapters and fusion with a fresh optimizer, which the loop may donate."""
    state = program.init_state(program.config.seed)
    state["trainable"] = jax.tree.map(
        # A copy: the start is still asked, and compared with.
        lambda x, like: jax.device_put(x.copy(), like.sharding),
        run.trainable,
        program.state["trainable"],
    )
    return state


def open_clips(
    config: ConfigDict, key: str, workdir: Path, run: Run, say: Callable[[str], None]
) -> dict[str, Records]:
    """The clips of a run: "rl" to learn from, "val" to choose by, "test" to ask before and after.

    Without a validation set, one is held out of the first. Preferences have no "val": what they
    choose by are pairs, some of which the command holds out itself.

    Clips to learn from are compared by name with the others, and with those that the start was
    trained on where it was trained here.

    Args:
        config: of the run.
        key: in the config, of the clips to learn from; "" there is the demo's own split.
        workdir, run: of the new run, and the one that it goes on from.
        say: told what takes long, of clips that are in two sets, and of sets that are not here.

    Raises:
        ConfigError: a place that is not named, features that do not fit, or, where `strict_leaks`
            is set, clips that are in two.
        RecordError: a directory without intact records.
    """
    section = config[key]
    is_demo = demo.world_seed(config.data.train, config.demo_seed) is not None
    places = {
        "rl": section.data or (config.data.train if is_demo else ""),
        "val": config.data.val if key == "rl" else "",
        "test": config.data.test,
    }
    for name, where in (("rl", f"config.{key}.data"), ("test", "config.data.test")):
        if not places[name]:
            raise ConfigError(
                f"{where} names no records; pass --{where}=DIR with clips that supervision has not "
                "seen"
            )
    found = {}
    for name, place in places.items():
        if not place:
            continue
        # What the run has generated is not generated again.
        at_home = run.workdir if name != "rl" and (run.workdir / "data").is_dir() else workdir
        found[name] = build.open_records(config, place, name, at_home, say)
        build.check_features(config, found[name], run.processor.mode)
        run.check_encoders(found[name], name, say)
    if key == "rl" and "val" not in found:
        found["rl"], found["val"] = hold_out(found["rl"], config.data.val_share)
    names = {entry.name for entry in found["rl"].index}
    for other in [name for name in found if name != "rl"]:
        if shared := sum(entry.name in names for entry in found[other].index):
            what = f"{shared} clips of config.{key}.data are in config.data.{other} too"
            build.report_leak(config, what, say)
    if run.is_trained_here and section.data:  # no training set has clips of the demo's own split
        trained, missing = build.trained_names(run.config, run.workdir)
        if shared := sorted(names & trained):
            what = (
                f"{len(shared)} clips of config.{key}.data are among those that {run.workdir} was "
                f"trained on, e.g. {shared[0]!r}"
            )
            build.report_leak(config, what, say)
        if missing:
            places = ", ".join(place or "that its config does not name" for place in missing)
            say(
                f"note: clips of config.{key}.data are not compared with all of those that "
                f"{run.workdir} was trained on, since these records are not here: {places}"
            )
    return found


# --- what is made once ----------------------------------------------------------------------------


class _Kept(TypedDict):
    """A file of what a run has made once.

    Attributes:
        made_of: the hash of all that the content depends on.
        content: what was made.
    """

    made_of: str
    content: Any


def kept(
    path: Path,
    kind: Any,
    group: distributed.ProcessGroup,
    made_of: Callable[[], Any],
    make: Callable[[], Any],
) -> Any:
    """What was made before of the same things, from a file; else what is made now, and kept there.

    A run that is trained anew in the same place, or on other records, finds files of before.

    Args:
        path: of the file.
        kind: type of the content, as `common.json` says.
        group: the processes of the run, which all call this and read the file; the first one
            decides whether it is the right one, and writes it.
        made_of: returns all that the content depends on, a value that JSON has.
        make: makes the content.

    Raises:
        ReadError: a file of another form.
    """
    advice = "delete it, and it is made anew"

    def read() -> Any:
        if not path.is_file():
            return None
        found = read_json(path, _Kept, advice=advice)
        same = found["made_of"] == json_sha256(made_of())
        return check_type(found["content"], kind, str(path), advice=advice) if same else None

    # A file of all answers may be larger than a message between processes.
    if group.from_main_process(lambda: read() is not None):
        distributed.check_shared(path)
        return read()
    content = make()
    if group.is_main_process:
        write_json(path, {"made_of": json_sha256(made_of()), "content": content}, indent=None)
    return content


def model_and_clips(run: Run, dataset: Records) -> list[Any]:
    """What a model computes of clips depends on, but for its checkpoint and the code's version.

    Args:
        run: of whose base, tokenizer, prompts and modules it is.
        dataset: the clips.
    """
    return [
        run.identity.sha256,
        {name: i.sha256 for name, i in run.inputs.items() if name != "code"},
        model_of(run.config),
        build.records_identity(dataset).sha256,
        [entry.name for entry in dataset.index],
    ]


def asked_of(run: Run, dataset: Records, section: ConfigDict, seed: int) -> list[Any]:
    """What answers about clips depend on, but for the checkpoint that gives them.

    Args:
        run, dataset: see `model_and_clips`.
        section: of the config.
        seed: of sampling.
    """
    return [
        *model_and_clips(run, dataset),
        {key: section[key] for key in ("question", "group", "prompts", "max_new_tokens")},
        seed,
    ]


# --- before and after -----------------------------------------------------------------------------


class Exams:
    """The clips of a run that are asked, and how.

    Args:
        section: of the config.
        run: that it starts from.
        datasets: by name, clips that can be scored.
        seed: of sampling.
        lexicon: by which labels are compared.
        other_lexicon: by which those of "test" are compared as well; see `load_test_lexicon`.
        prompt_length: tokens of a row of prompts, at the least.
        group: its processes.
        pulse: called before every batch.

    Attributes:
        prompt_length: of all prompts.
        other_lexicon: see there.

    Raises:
        DataError: the other lexicon can score none of the clips of "test".
    """

    def __init__(
        self,
        section: ConfigDict,
        run: Run,
        datasets: dict[str, Records],
        *,
        seed: int,
        lexicon: Lexicon,
        other_lexicon: Lexicon | None = None,
        prompt_length: int = 0,
        group: distributed.ProcessGroup,
        pulse: Callable[[], None],
    ):
        question = section.question
        self.other_lexicon = other_lexicon
        if other_lexicon:
            reward = _reward_by(other_lexicon, question)
            scorable(datasets["test"], reward, question, 1, "config.data.test")
        found = outcomes.prompt_length(run.processor, question, list(datasets.values()))
        self.prompt_length = max(found, prompt_length)
        self._section, self._run, self._group, self._pulse = section, run, group, pulse
        self._lexicon, self._seed = lexicon, seed
        self._asked: dict[Path, outcomes.Asked] = {}
        self.sampled = self.generator(Sampling(1.0), section.group)
        greedy = self.generator(Sampling(), 1)
        self._exams = {
            name: outcomes.Examination(
                dataset,
                truths(dataset, question, f"config.data.{name}"),
                run.processor,
                run.mesh,
                question,
                greedy,
                self.sampled,
                section.prompts,
                self.prompt_length,
                seed,
                pulse,
            )
            for name, dataset in datasets.items()
        }

    def generator(self, sampling: Sampling, answers: int, merge_lora: bool = False) -> Generator:
        """Writes so many answers to each of a step's prompts at a time."""
        section, run = self._section, self._run
        return Generator(
            run.model,
            run.base,
            run.processor,
            run.mesh,
            batch_size=section.prompts * answers,
            prompt_length=self.prompt_length,
            max_new_tokens=section.max_new_tokens,
            sampling=sampling,
            group=answers,
            log_probs=True,
            merge_lora=merge_lora,
            pulse=self._pulse,
        )

    def quick(self, name: str, trainable: Any) -> tuple[outcomes.Outcome, list[Sample]]:
        """Of one group of samples a clip; and the most probable answers about the first clips."""
        exam, samples = self._exams[name], self._section.group
        asked = exam.ask(trainable, samples)
        question = self._section.question
        shown = zip(exam.dataset.index[:SAMPLES], asked["greedy"], exam.truth)
        return outcomes.outcome(asked, exam.truth, question, self._lexicon, samples), [
            Sample(entry.name, "(cut off)" if labels is None else ", ".join(labels), _words(true))
            for entry, labels, true in shown
        ]

    def thorough(
        self, name: str, trainable: Any, file: Path, checkpoint: Callable[[], str]
    ) -> outcomes.Outcome:
        """Of enough samples for a consensus; all answers are kept in a file, and found there.

        Args:
            name: of the clips.
            trainable: of the model that is asked.
            file: of the answers.
            checkpoint: returns the fingerprint of its checkpoint.
        """
        section, exam = self._section, self._exams[name]
        samples = max(section.consensus, section.test_samples)

        def made_of() -> list[Any]:
            facts = asked_of(self._run, exam.dataset, section, self._seed)
            return [checkpoint(), samples, *facts]

        asked = self._asked[file] = kept(
            file, outcomes.Asked, self._group, made_of, lambda: exam.ask(trainable, samples)
        )
        return outcomes.outcome(
            asked,
            exam.truth,
            section.question,
            self._lexicon,
            section.test_samples,
            section.consensus,
        )

    def by_wheels(self, name: str, file: Path, numbers: tuple[int, ...]) -> np.ndarray:
        """Mean rewards of the clips' samples by some wheels, of answers that `thorough` has had:
        `[N]`, nan where none of them scores a clip."""
        section, exam = self._section, self._exams[name]
        wheels = Wheels(self._lexicon, numbers)
        return outcomes.sampled_rewards(
            self._asked[file], exam.truth, section.question, wheels, section.test_samples
        )

    def by_other_lexicon(self, name: str, files: Sequence[Path]) -> list[Any]:
        """Outcomes of answers that `thorough` has had, by the other lexicon, and how many clips
        that scores."""
        section, exam, lexicon = self._section, self._exams[name], self.other_lexicon
        reward = _reward_by(lexicon, section.question)
        known = np.flatnonzero(reward.scorable(exam.truth))
        truth, found = [exam.truth[i] for i in known], []
        for file in files:
            asked = self._asked[file]
            asked = {key: [lists[i] for i in known] for key, lists in asked.items()}
            found.append(
                outcomes.outcome(
                    asked,
                    truth,
                    section.question,
                    lexicon,
                    section.test_samples,
                    section.consensus,
                )
            )
        return [*found, len(known)]


def load_test_lexicon(section: ConfigDict) -> Lexicon | None:
    """Another lexicon by which the result is scored as well, where a section names one.

    Raises:
        ReadError: a directory without one, or with a damaged one.
    """
    return load_lexicon(section.test_lexicon) if section.test_lexicon else None


def _reward_by(lexicon: Lexicon, question: str) -> Reward:
    """What scores answers to a question in the result."""
    return Reward("sentiment" if question == "sentiment" else "wheel_f", Wheels(lexicon))


def _words(truth: Any) -> str:
    """Labels of a clip, or its valence."""
    return f"{truth:+g}" if isinstance(truth, float) else ", ".join(truth)


def compare(
    config: ConfigDict,
    section: ConfigDict,
    workdir: Path,
    exams: Exams,
    before: outcomes.Outcome,
    after: outcomes.Outcome,
    best: int,
    last: int,
) -> dict[str, Any]:
    """What `result.json` says about the held-out clips, before and after.

    Args:
        config: of the run, and its section.
        section: see there.
        workdir: of the run.
        exams: that were made.
        before, after: on the set "test".
        best: step of the checkpoint that was asked.
        last: step that the run has reached.
    """
    result = {
        "steps": last,
        "best_step": best,
        "start": {
            "run": section.start,
            "step": section.start_step,
            "sha256": section.start_sha256,
        },
        "lexicon": section.lexicon_sha256,
        "clips": len(before.sampled),
        "samples_per_clip": section.test_samples,
        "before": before.as_dict() | outcomes.consensus_gain(before, config.seed),
        "after": after.as_dict() | outcomes.consensus_gain(after, config.seed),
    } | outcomes.gains(before, after, config.seed)
    files = [workdir / BEFORE, workdir / after_file(best)]
    if left := _wheels_left_out(section):
        rewards = [exams.by_wheels("test", file, left) for file in files]
        known = np.flatnonzero(np.isfinite(rewards[0]))
        old, new = (found[known] for found in rewards)
        result["other_wheels"] = {
            "wheels": list(left),
            "clips": len(known),
            "before": {"sampled_reward": float(old.mean())},
            "after": {"sampled_reward": float(new.mean())},
            "sampled_reward_gain": float((new - old).mean()),
            "sampled_reward_gain_interval": outcomes.mean_interval(new - old, config.seed),
        }
    if exams.other_lexicon:
        other_before, other_after, clips = exams.by_other_lexicon("test", files)
        result["other_lexicon"] = {
            "lexicon": exams.other_lexicon.identity.sha256,
            "clips": clips,
            "before": other_before.as_dict(),
            "after": other_after.as_dict(),
        } | outcomes.gains(other_before, other_after, config.seed)
    return result


def _wheels_left_out(section: ConfigDict) -> tuple[int, ...]:
    """Those by which no answer was rewarded, where some wheels rewarded."""
    rewarding = section.get("wheels", ())
    if not rewarding or section.question == "sentiment":
        return ()
    return tuple(n for n in range(1, WHEELS + 1) if n not in rewarding)


def after_file(step: int) -> str:
    """Where the answers of a checkpoint about the test clips are kept."""
    return f"answers_step_{step}.json"


def finish(
    session: loop.Session,
    result: dict[str, Any],
    totals: Mapping[str, Any],
    more: Sequence[tuple[str, str]] = (),
) -> None:
    """Write `result.json` and the picture, and print the closing words; inside `session.running`.

    Args:
        session: of the loop.
        result: of `compare`; what follows is added.
        totals: of `loop.run_steps`.
        more: rows for the summary.
    """
    before, step, best = result["before"], result["steps"], result["best_step"]
    greedy = next(value for key, value in before.items() if key.startswith("greedy_"))
    references = {"a sample, before": before["sampled_reward"], "most probable, before": greedy}
    session.writer.write(best, {"test/sampled_reward": result["after"]["sampled_reward"]})
    times = session.clock.report()
    result |= {**totals, "wall_s": sum(times.values()), "time_s": times}
    workdir = session.workdir
    if session.group.is_main_process:
        write_json(workdir / "result.json", result)
    session.draw(step, references)
    session.progress.close()
    if session.group.is_main_process:
        print(session.clock.table())
        print(summary(workdir, result, more))


def summary(workdir: Path, result: dict[str, Any], more: Sequence[tuple[str, str]] = ()) -> str:
    """The closing words: before and after, `more` rows, and where to look."""
    before, after = result["before"], result["after"]

    def row(name: str, key: str) -> tuple[str, str]:
        text = f"{before[key]:.3f} -> {after[key]:.3f}"
        if gain := result.get(f"{key}_gain_interval"):
            text += f"  ({result[f'{key}_gain']:+.3f}, {gain[0]:+.3f} to {gain[1]:+.3f})"
        return name, text

    rows = [row("reward of a sample", "sampled_reward")]
    rows += [
        row(key.replace("_", " "), key)
        for key in after
        if key.startswith(("greedy_", "consensus_")) and isinstance(after[key], float)
    ]
    rows.append(row("labels per clip", "labels_per_clip"))
    rows += more
    rows.append(("best on validation", f"the checkpoint of step {result['best_step']}"))
    title = f"Before and after, {result['clips']:,} held-out clips"
    return f"""{metrics_writer.summary_table(rows, title=title)}

What you have now, in {workdir}:
  result.json, answers_*.json                 the result and every answer behind it
  metrics.jsonl, tensorboard/, run.png        the run
  checkpoints/                                adapters, fusion, optimizer state

What to run next:
  affectgpt evaluate --workdir={workdir} --consensus=16"""
