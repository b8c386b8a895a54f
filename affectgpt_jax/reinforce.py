"""Reinforce a run by the benchmark's own score of what it writes (GRPO).

    affectgpt reinforce --workdir=runs/r1 --from=runs/demo

asks the run about clips that supervision has not seen, rewards its answers by the emotion wheels,
and makes the better answers of each prompt more probable. Adapters and fusion go on from the run's
best checkpoint, or from --step; the base stays frozen. The new workdir is a run like any other:
every command reads it. The same command, run again, resumes.

`--config.rl.KEY=VALUE` sets what the section `rl` of configs/affectgpt_qwen25_7b.py explains,
`--config.KEY=VALUE` any other key of the run, such as `--config.steps=500` or
`--config.optimizer.learning_rate=1e-5`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from ml_collections import ConfigDict

from affectgpt_jax import build, cli, cpu, inference, outcomes, restore, rollouts, runtime
from affectgpt_jax.common.json import read_json, write_json
from affectgpt_jax.config import (
    ConfigError,
    apply_overrides,
    check_same_run,
    described,
    save_config,
    validate,
)
from affectgpt_jax.configs import affectgpt_qwen25_7b
from affectgpt_jax.data import demo
from affectgpt_jax.data.records import Records, RecordSubset, hold_out
from affectgpt_jax.evaluation.lexicon import Lexicon, load_lexicon
from affectgpt_jax.evaluation.rewards import Reward, RewardError, Wheels
from affectgpt_jax.models.attention import causal, cudnn_masked, grouped
from affectgpt_jax.models.generate import Sampling
from affectgpt_jax.program import compiler_options, make_program
from affectgpt_jax.restore import Run
from affectgpt_jax.training import distributed, loop, memory, metrics_writer, sharding
from affectgpt_jax.training.checkpoints import (
    Checkpoints,
    CheckpointWriteError,
    check_disk,
    silence_threads,
)
from affectgpt_jax.training.policy import PolicyLossConfig, policy_loss
from affectgpt_jax.training.stopping import lock_workdir

SHOWN = ("reward", "kl", "entropy", "labels", "answer_tokens", "flat_groups")
SHOWN += ("rollout_tokens_per_s", "update_tokens_per_s")
EARLY_END = "ended.json"


def config_from(start: ConfigDict, arguments: Sequence[str]) -> ConfigDict:
    """The config of a run that reinforces another one.

    Args:
        start: config of that one.
        arguments: `--config.KEY=VALUE`, which change keys; others are left alone.

    Raises:
        ConfigError: a key or a value that cannot be.
    """
    config = ConfigDict(start.to_dict())
    config.rl = affectgpt_qwen25_7b.reinforcement()
    # A constant rate: larger than supervision's at its end, since signs of a reward are noisy.
    config.steps, config.optimizer.learning_rate = 1000, 1e-5
    config.checkpoint_every = 50
    if config.llm == "tiny":
        config.steps, config.optimizer.learning_rate = 150, 4e-4
        config.rl.max_new_tokens = config.generate.max_new_tokens
    config.optimizer.warmup_steps = 0
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 1.0
    config.log_every = 1
    # Dropout would make the policy that is trained another one than the one that wrote.
    config.lora.dropout = config.qformer.dropout = 0.0
    config.pack_length = 0
    config.gradient_accumulation_steps = 1
    config.optimizer.final_learning_rate = -1.0
    apply_overrides(config, arguments)
    if config.optimizer.final_learning_rate < 0:
        config.optimizer.final_learning_rate = config.optimizer.learning_rate
    if config.lora.dropout or config.qformer.dropout:
        raise ConfigError(
            "config.lora.dropout and config.qformer.dropout must be 0: dropout would train another "
            "policy than the one that wrote the answers"
        )
    return config


def make_reward(config: ConfigDict, lexicon: Lexicon) -> Reward:
    """The reward of a config.

    Raises:
        ConfigError: one that makes no sense.
    """
    rl = config.rl
    try:
        return Reward(
            rl.reward,
            Wheels(lexicon, tuple(rl.wheels)),
            rl.format_weight,
            rl.length_penalty,
            rl.length_free,
            rl.allow_hacking,
        )
    except RewardError as error:
        raise ConfigError(f"config.rl: {error}") from None


def open_clips(
    config: ConfigDict, workdir: Path, run: Run, say: Callable[[str], None]
) -> dict[str, Records]:
    """The clips of a run: "rl" to learn from, "val" to choose by, "test" to ask before and after.

    Without a validation set, one is held out of the first.

    Raises:
        ConfigError: a place that is not named, features that do not fit, or clips that are in two.
        RecordError: a directory without intact records.
    """
    demo_seed = demo.world_seed(config.data.train, config.demo_seed)
    places = {
        "rl": config.rl.data or ("" if demo_seed is None else config.data.train),
        "val": config.data.val,
        "test": config.data.test,
    }
    for name in ("rl", "test"):
        if not places[name]:
            key = "config.rl.data" if name == "rl" else "config.data.test"
            raise ConfigError(
                f"{key} names no records; pass --{key}=DIR with clips that supervision has not seen"
            )
    found = {}
    for name, place in places.items():
        if not place:
            continue
        # What the run has generated is not generated again.
        at_home = run.workdir if name != "rl" and (run.workdir / "data").is_dir() else workdir
        found[name] = build.open_records(config, place, name, at_home, say)
        build.check_features(config, found[name], run.processor.mode)
    if "val" not in found:
        found["rl"], found["val"] = hold_out(found["rl"], config.data.val_share)
    names = {entry.name for entry in found["rl"].index}
    for other in ("val", "test"):
        shared = sum(entry.name in names for entry in found[other].index)
        if shared:
            what = f"{shared} clips of config.rl.data are in config.data.{other} too"
            if config.strict_leaks:
                raise ConfigError(f"{what}; take them out of one")
            say(f"warning: {what}")
    return found


def scorable(dataset: Records, reward: Reward, question: str, most: int) -> Records:
    """The first clips, `most` at the most, that a reward can score."""
    truth = rollouts.truths(dataset, question)
    return RecordSubset(dataset, np.flatnonzero(reward.scorable(truth))[:most].tolist())


def reinforce(
    config: ConfigDict,
    workdir: Path,
    run: Run,
    group: distributed.ProcessGroup | None = None,
    fallback: bool = False,
) -> dict[str, Any]:
    """Go on from a run by rewards.

    Args:
        config: see `config_from`.
        workdir: which this run alone works in.
        run: that it starts from, loaded with this config's mesh.
        group: the processes of the run; None is this one alone.
        fallback: go on from an older checkpoint where the newest is damaged.

    Returns:
        What the main process writes into `workdir/result.json`.

    Raises:
        Stopped: a signal has ended the run, after everything was saved.
    """
    group = group or distributed.ProcessGroup()
    rl = config.rl
    lexicon = load_lexicon(rl.lexicon or None)
    other_lexicon = load_lexicon(rl.test_lexicon) if rl.test_lexicon else None
    reward = make_reward(config, lexicon)
    try:
        loss = policy_loss(
            PolicyLossConfig(rl.epsilon, rl.epsilon_high, rl.beta, rl.kl, rl.weight_cap)
        )
    except ValueError as error:
        raise ConfigError(f"config.rl.{error}") from None
    config.rl.start, config.rl.start_step = str(run.workdir), run.step
    config.rl.start_sha256 = run.fingerprint(run.step)
    config.rl.lexicon_sha256 = lexicon.identity.sha256
    mesh = run.mesh
    shares = sharding.data_parallel_size(mesh)
    unit = shares * config.gradient_accumulation_steps
    if rl.prompts % unit:
        raise ConfigError(
            f"config.rl.prompts={rl.prompts} in config.gradient_accumulation_steps="
            f"{config.gradient_accumulation_steps} microbatches cannot be shared by {shares} "
            f"devices (mesh {config.mesh!r}); use a multiple of {unit}"
        )
    config.batch_size = sum(rollouts.row_counts(config, shares))
    validate(config)
    group.from_main_process(lambda: check_same_run(config, workdir))
    try:
        session = loop.Session(config, workdir, group, SHOWN)
    except ValueError as error:
        raise ConfigError(f"config.profile_steps: {error}") from None
    say, clock = session.say, session.clock
    say(f"workdir {workdir}; from step {run.step} of {run.workdir}")
    say(f"reward {rl.reward} by {lexicon.identity}")

    # Data.
    clips = group.main_process_first(lambda: open_clips(config, workdir, run, say))
    supervised = None
    if rl.sft_share:
        trained = build.data(config, run.workdir, run.processor.tokenizer, say).train
        supervised = rollouts.SupervisedRows(trained, config.max_tokens, config.seed)
    data = rollouts.RolloutData(
        config,
        clips["rl"],
        run.processor,
        reward,
        sharding.data_parallel_rank(mesh),
        shares,
        supervised,
    )
    group.from_main_process(lambda: save_config(config, workdir))
    distributed.check_shared(workdir / "config.json")
    for line in data.describe():
        say(line)
    asked_about = {
        "val": scorable(clips["val"], reward, rl.question, rl.val_clips),
        "test": scorable(clips["test"], reward, rl.question, rl.test_clips),
    }

    # The program: the same set-up as that of supervision, with another loss.
    directory, llm = build.base_directory(config.llm), build.base_config(config.llm)
    options = compiler_options(config, say)
    attention = build.attention(config, llm)
    attend = attention.attend
    if rl.share_prompt:
        attend = grouped(causal if attention.name == "xla" else cudnn_masked)
    group.require_same({"attention": attention.name, "base": run.identity.sha256})
    say(f"attention: {attention.name} ({attention.reason})")
    more = ["reference_log_probs"] if rl.beta or rl.stop_kl else []
    more += ["old_log_probs"] if rl.updates > 1 else []
    program = make_program(
        config,
        mesh,
        {data.bucket.length: data.filler_batch(more)},
        loss,
        llm=llm,
        attend=attend,
        memory_limit=group.from_main_process(memory.device_limit),
    )
    for line in program.describe(directory.name):
        say(line)
    check_disk(workdir, program.state)

    # The state: that of the newest checkpoint, or the run's adapters with a fresh optimizer.
    def fresh() -> Any:
        state = program.init_state(config.seed)
        # A copy: the state is donated, and the start stays for the KL.
        state["trainable"] = jax.tree.map(
            lambda x, like: jax.device_put(x.copy(), like.sharding),
            run.trainable,
            program.state["trainable"],
        )
        return state

    checkpoints = Checkpoints(workdir, run.identity, config.max_to_keep, group.is_main_process)
    state, start = loop.initial_state(checkpoints, program.state, fresh, session, fallback=fallback)
    ended = workdir / EARLY_END

    def finished(step: int) -> bool:
        return ended.is_file() and step >= read_json(ended, dict[str, Any])["step"]

    steps = {}
    if start < config.steps and not finished(start):
        with clock.measure("compile"):
            with runtime.compiling("1 program", enabled=group.is_main_process):
                compiled = program.compile(options)
            group.meet()
        update = compiled[data.bucket.length]

    # How answers are written: as many rows at a time as a step has answers.
    merge_lora = group.from_main_process(
        lambda: inference.should_merge(rl.merge_lora, run.model, run.base)
    )
    length = max(
        data.prompt_length,
        outcomes.prompt_length(run.processor, rl.question, list(asked_about.values())),
    )
    data.prompt_length = length

    def generator(sampling: Sampling, answers: int, merge: bool) -> inference.Generator:
        return inference.Generator(
            run.model,
            run.base,
            run.processor,
            mesh,
            batch_size=rl.prompts * answers,
            prompt_length=length,
            max_new_tokens=rl.max_new_tokens,
            sampling=sampling,
            group=answers,
            log_probs=True,
            merge_lora=merge,
            pulse=session.pulse,
        )

    policy = generator(Sampling(rl.temperature, rl.top_p), rl.group, merge_lora)
    plain = policy
    if merge_lora or (rl.temperature, rl.top_p) != (1, 1):
        plain = generator(Sampling(1.0), rl.group, False)
    greedy = generator(Sampling(), 1, False)
    exams = {
        name: outcomes.Examination(
            dataset,
            rollouts.truths(dataset, rl.question),
            run.processor,
            mesh,
            rl.question,
            greedy,
            plain,
            rl.prompts,
            length,
            config.seed,
            session.pulse,
        )
        for name, dataset in asked_about.items()
    }
    samples = max(rl.consensus, rl.test_samples)

    def examine(name: str, trainable: Any, file: str = "") -> outcomes.Outcome:
        exam = exams[name]
        if not file:
            asked = exam.ask(trainable, rl.group)
            return outcomes.outcome(asked, exam.truth, rl.question, lexicon, rl.group)
        asked = _asked_once(group, workdir / file, lambda: exam.ask(trainable, samples))
        return outcomes.outcome(asked, exam.truth, rl.question, lexicon, rl.test_samples)

    def validate_policy(trainable: Any) -> dict[str, float]:
        """The loss by which a checkpoint is chosen is what the sampled reward lacks."""
        found = examine("val", trainable)
        return {
            "val/loss": 1 - float(found.sampled.mean()),
            "val/sampled_reward": float(found.sampled.mean()),
            f"val/{found.metric}": found.greedy.primary,
            "val/labels": found.labels,
        }

    say(f"asking about {len(asked_about['test']):,} held-out clips, before")
    with clock.measure("evaluate"), session.stop:
        before = examine("test", run.trainable, "answers_before.json")
    if start < config.steps and not finished(start):
        step = rollouts.RolloutStep(
            config,
            program,
            update,
            data,
            policy,
            reward,
            run.trainable if rl.beta or rl.stop_kl else None,
            say,
        )

        def run_step(state: Any, base: Any, prompts: Any) -> tuple[Any, dict[str, float]]:
            state, metrics = step(state, base, prompts)
            number = int(state["step"])
            if rl.stop_kl and step.kl > rl.stop_kl:
                say(
                    f"step {number}: the KL to the start is {step.kl:.3f}, over config.rl.stop_kl="
                    f"{rl.stop_kl:g}, so the run ends here"
                )
                if group.is_main_process:
                    write_json(ended, {"step": number, "kl": step.kl})
                group.meet()
            return state, metrics

        steps = {length: run_step}
    with session.running(start), checkpoints:
        state, totals = loop.run_steps(
            session,
            steps,
            state,
            run.base,
            data,
            mesh,
            checkpoints,
            validate_policy,
            start,
            program.flops,
            finished,
        )
        best = group.from_main_process(checkpoints.best_step)
        last = int(state["step"])
        if best != last:
            state = checkpoints.restore(best, program.state)
        say(f"asking about {len(asked_about['test']):,} held-out clips with step {best}, after")
        with clock.measure("evaluate"):
            after = examine("test", state["trainable"], f"answers_step_{best}.json")
        result = {
            "steps": last,
            "ended_by": "stop_kl" if finished(last) else "steps",
            "best_step": best,
            "start": {"run": rl.start, "step": rl.start_step, "sha256": rl.start_sha256},
            "lexicon": {"name": lexicon.identity.name, "sha256": lexicon.identity.sha256},
            "clips": len(asked_about["test"]),
            "samples_per_clip": rl.test_samples,
            "before": before.as_dict(),
            "after": after.as_dict(),
        }
        result |= outcomes.gains(before, after, config.seed) | totals
        if other_lexicon is not None:
            result["other_lexicon"] = _by_other_lexicon(
                config, workdir, exams["test"], other_lexicon, best
            )
        session.writer.write(last, {"test/sampled_reward": float(after.sampled.mean())})
    times = clock.report()
    result |= {"wall_s": sum(times.values()), "time_s": times}
    if group.is_main_process:
        write_json(workdir / "result.json", result)
        metrics_writer.plot_run(workdir / "metrics.jsonl", workdir / "run.png")
        print(clock.table())
        print(summary(workdir, result))
    return result


def _asked_once(
    group: distributed.ProcessGroup, path: Path, ask: Callable[[], outcomes.Asked]
) -> outcomes.Asked:
    """What a file holds, or else what all processes together find out, for which it is written."""
    known = group.from_main_process(
        lambda: read_json(path, outcomes.Asked) if path.is_file() else None
    )
    if known is None:
        known = ask()
        if group.is_main_process:
            write_json(path, known)
    return known


def _by_other_lexicon(
    config: ConfigDict, workdir: Path, exam: outcomes.Examination, lexicon: Lexicon, best: int
) -> dict[str, Any]:
    """The result by a lexicon that was no reward."""
    rl = config.rl
    reward = Reward("sentiment" if rl.question == "sentiment" else "wheel_f", Wheels(lexicon))
    known = np.flatnonzero(reward.scorable(exam.truth))
    truth = [exam.truth[i] for i in known]
    found = []
    for file in ("answers_before.json", f"answers_step_{best}.json"):
        asked = read_json(workdir / file, outcomes.Asked)
        asked = {name: [lists[i] for i in known] for name, lists in asked.items()}
        found.append(outcomes.outcome(asked, truth, rl.question, lexicon, rl.test_samples))
    before, after = found
    return {
        "lexicon": {"name": lexicon.identity.name, "sha256": lexicon.identity.sha256},
        "clips": len(known),
        "before": before.as_dict(),
        "after": after.as_dict(),
    } | outcomes.gains(before, after, config.seed)


def summary(workdir: Path, result: dict[str, Any]) -> str:
    """The closing words: before and after, and where to look."""
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
    rows.append(("best on validation", f"the checkpoint of step {result['best_step']}"))
    title = f"Before and after, {result['clips']:,} held-out clips"
    return f"""{metrics_writer.summary_table(rows, title=title)}

What you have now, in {workdir}:
  result.json, answers_*.json                 the result and every answer behind it
  metrics.jsonl, tensorboard/, run.png        the run
  checkpoints/                                adapters, fusion, optimizer state

What to run next:
  affectgpt evaluate --workdir={workdir} --consensus=16"""


def parse_command_line(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command's own flags, and its overrides of the config.

    Raises:
        UsageError: an unknown flag, or one that is missing.
        SystemExit: after printing the help.
    """
    parser = cli.make_parser("affectgpt reinforce", __doc__)
    add = parser.add_argument
    add("--workdir", required=True, type=Path, metavar="DIR", help="of the new run")
    add(
        "--from",
        required=True,
        type=Path,
        dest="origin",
        metavar="RUN",
        help="workdir of the run to start from",
    )
    add("--step", type=int, metavar="N", help="of its checkpoint; default: the best on validation")
    add("--config.KEY", metavar="VALUE", help="instead of the run's or the default one")
    add(
        "--fallback",
        action="store_true",
        help="where the newest checkpoint is damaged, set it aside and resume from one that is "
        "whole",
    )
    distributed.add_flags(parser)
    own, overrides = parser.parse_known_args(argv)
    for arg in overrides:
        if not (arg.startswith("--config.") and "=" in arg):
            parser.error(f"unknown argument {arg}; keys are set by --config.KEY=VALUE")
    own.workdir, own.origin = own.workdir.expanduser(), own.origin.expanduser()
    if own.workdir.resolve() == own.origin.resolve():
        parser.error("--workdir and --from are the same run; name a new --workdir")
    return own, overrides


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; ends with status 1 and one sentence for trouble that the user can mend."""
    workdir = launch = None

    def leave(status: int, sentence: str) -> NoReturn:
        distributed.leave(launch, status, sentence) if launch else cli.leave(status, sentence)

    with cli.exit_on_error(
        interrupted="interrupted; the same command resumes from the newest checkpoint",
        out_of_memory="lower config.rl.prompts or config.rl.group, raise "
        "config.gradient_accumulation_steps, or let config.remat=full recompute more",
        os_error=lambda error: (
            f"{error.filename or workdir}: {error.strerror or error}; the run "
            "needs a --workdir that it can write to, with room"
        ),
        leave=leave,
    ):
        own, overrides = parse_command_line(sys.argv[1:] if argv is None else argv)
        workdir = own.workdir
        config = config_from(restore.load_config(own.origin), overrides)
        config.batch_size = config.gradient_accumulation_steps  # until the mesh is known
        validate(config)
        make_reward(config, load_lexicon(config.rl.lexicon or None))
        launch = distributed.find_launch(own)
        restore.set_up_process()
        facts = described(config) | {"workdir": str(workdir), "jax": jax.__version__}
        with distributed.join(launch, facts, own.join_timeout, print) as group:
            workdir.mkdir(parents=True, exist_ok=True)
            with lock_workdir(workdir) if group.is_main_process else contextlib.nullcontext():
                run = restore.load_run(own.origin, own.step, llm=config.llm, mesh=config.mesh)
                try:
                    reinforce(config, workdir, run, group, own.fallback)
                except CheckpointWriteError as error:
                    group.fail(str(error))
                    print(f"error: {error}", file=sys.stderr, flush=True)
                    os._exit(1)


if __name__ == "__main__":
    silence_threads()
    cpu.keep_freed_memory()
    main()
