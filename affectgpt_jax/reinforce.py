"""Reinforce a run by the benchmark's own score of what it writes (GRPO).

    affectgpt reinforce --workdir=runs/r1 --from=runs/demo

asks the run about clips that supervision has not seen, rewards its answers by the emotion wheels,
and makes the better answers of each prompt more probable. Adapters and fusion go on from the run's
best checkpoint, or from --step; the base stays frozen. The new workdir is a run like any other:
every command reads it. The same command, run again, resumes. --checkpoint with --config stands in
place of --from, for weights that nobody trained here.

`--config.rl.KEY=VALUE` sets what the section `rl` of configs/affectgpt_qwen25_7b.py explains,
`--config.KEY=VALUE` any other key of the run, such as `--config.steps=500` or
`--config.optimizer.learning_rate=1e-5`, but for those of its model, which stays as it was trained.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, TypedDict

from ml_collections import ConfigDict

from affectgpt_jax import build, cpu, inference, post_training, rollouts, runtime
from affectgpt_jax.common.json import read_json, write_json
from affectgpt_jax.config import ConfigError, check_same_run, validate
from affectgpt_jax.evaluation.lexicon import Lexicon, load_lexicon
from affectgpt_jax.evaluation.rewards import Reward, RewardError, Wheels
from affectgpt_jax.models.attention import grouped
from affectgpt_jax.models.generate import Sampling
from affectgpt_jax.post_training import Exams
from affectgpt_jax.program import compiler_options, make_program
from affectgpt_jax.restore import Run
from affectgpt_jax.training import distributed, loop, memory, sharding
from affectgpt_jax.training.checkpoints import SavedRun, silence_threads
from affectgpt_jax.training.metrics_writer import Sample
from affectgpt_jax.training.policy import PolicyLossConfig, policy_loss

# Metrics of a step that its line shows, and what it calls them.
SHOWN = {
    "reward": "reward",
    "reward_score": "score",
    "kl": "KL",
    "entropy": "entropy",
    "labels": "labels",
    "answer_tokens": "tokens",
    "flat_groups": "flat",
    "rollout_tokens_per_s": "written/s",
    "update_tokens_per_s": "trained/s",
}
# Says that a run ended by itself before its last step.
ENDED = "ended.json"


class _Ended(TypedDict):
    step: int


def make_reward(rl: ConfigDict, lexicon: Lexicon) -> Reward:
    """The reward of a config's section.

    Raises:
        ConfigError: one that makes no sense.
    """
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


def reinforce(
    config: ConfigDict,
    workdir: Path,
    run: Run,
    group: distributed.ProcessGroup | None = None,
    fallback: bool = False,
    allow_other: Collection[str] = (),
) -> dict[str, Any]:
    """Go on from a run by rewards.

    Args:
        config: see `post_training.config_from`.
        workdir: which this run alone works in.
        run: that it starts from, loaded with this config's mesh.
        group: the processes of the run; None is this one alone.
        fallback: go on from an older checkpoint where the newest is damaged.
        allow_other: which of `checkpoints.ALLOWED_OTHERS` may be others than before.

    Returns:
        What the main process writes into `workdir/result.json`.

    Raises:
        Stopped: a signal has ended the run, after everything was saved.
    """
    # What can be refused is refused before data is read or written.
    group = group or distributed.ProcessGroup()
    rl, mesh = config.rl, run.mesh
    lexicon = load_lexicon(rl.lexicon or None)
    other_lexicon = post_training.load_test_lexicon(rl)
    reward = make_reward(rl, lexicon)
    try:
        settings = PolicyLossConfig(rl.epsilon, rl.epsilon_high, rl.beta, rl.kl, rl.weight_cap)
        measured = SHOWN if rl.beta or rl.stop_kl else {k: SHOWN[k] for k in SHOWN if k != "kl"}
        session = loop.Session(config, workdir, group, measured)
    except ValueError as error:
        raise ConfigError(f"config.rl or config.profile_steps: {error}") from None
    shares = sharding.data_parallel_size(mesh)
    rollouts.check_prompts(config, shares)
    config.batch_size = sum(rollouts.row_counts(config, shares))
    post_training.note_start(rl, run, lexicon)
    validate(config)
    group.from_main_process(lambda: check_same_run(config, workdir))
    say, clock = session.say, session.clock
    say(f"workdir {workdir}; from {run.title}")
    say(f"reward {rl.reward} by {lexicon.identity}")

    # Data: clips that supervision has not seen, and, if asked for, some that it has.
    clips = group.main_process_first(
        lambda: post_training.open_clips(config, "rl", workdir, run, say)
    )
    supervised = None
    if rl.sft_share:
        home = run.workdir if run.is_trained_here else workdir
        trained = build.data(config, home, run.processor.tokenizer, say).train
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
    group.from_main_process(lambda: post_training.save_config(config, run, workdir))
    distributed.check_shared(workdir / "config.json")
    for line in data.describe():
        say(line)
    held_out = "config.rl.data (held out by config.data.val_share)"
    asked = {
        "val": (rl.val_clips, "config.data.val" if config.data.val else held_out),
        "test": (rl.test_clips, "config.data.test"),
    }
    exams = Exams(
        rl,
        run,
        {
            name: rollouts.scorable(clips[name], reward, rl.question, *how_many_and_where)
            for name, how_many_and_where in asked.items()
        },
        seed=config.seed,
        lexicon=lexicon,
        other_lexicon=other_lexicon,
        prompt_length=data.prompt_length,
        group=group,
        pulse=session.pulse,
    )
    data.prompt_length = exams.prompt_length

    # The program: the set-up of supervision, with another loss.
    llm = build.base_config(config.llm)
    options = compiler_options(config, say)
    attention = build.attention(config, llm)
    group.require_same({"attention": attention.name, "base": run.identity.sha256})
    say(
        "attention: xla (answers share their prompts)"
        if rl.share_prompt
        else f"attention: {attention.name} ({attention.reason})"
    )
    more = rollouts.later_arrays(rl)
    program = make_program(
        config,
        mesh,
        {data.bucket.length: data.filler_batch(more)},
        policy_loss(settings),
        llm=llm,
        attend=grouped if rl.share_prompt else attention.attend,
        memory_limit=group.from_main_process(memory.device_limit),
    )
    inputs = post_training.inputs_of(run, clips, lexicon)
    checkpoints, state, start = post_training.start(
        program, run, inputs, session, fallback=fallback, allow_other=allow_other
    )

    if not start and group.is_main_process:
        (workdir / ENDED).unlink(missing_ok=True)  # of a run that was here before
    group.meet()

    def finished(step: int) -> bool:
        ended = workdir / ENDED
        return ended.is_file() and step >= read_json(ended, _Ended)["step"]

    steps = {}
    if start < config.steps and not finished(start):
        with clock.measure("compile"):
            with runtime.compiling("1 program", enabled=group.is_main_process):
                [update] = program.compile(options).values()
            group.meet()
        merge_lora = group.from_main_process(
            lambda: inference.should_merge(rl.merge_lora, run.model, run.base)
        )
        writer = exams.sampled
        if merge_lora or (rl.temperature, rl.top_p) != (1, 1):
            writer = exams.generator(Sampling(rl.temperature, rl.top_p), rl.group, merge_lora)
        reference = run.trainable if "reference_log_probs" in more else None
        step = rollouts.RolloutStep(config, program, update, data, writer, reward, reference, say)

        def run_step(state: Any, base: Any, prompts: Any) -> tuple[Any, dict[str, float]]:
            state, metrics = step(state, base, prompts)
            if rl.stop_kl and metrics["kl"] > rl.stop_kl:
                number = step.number
                say(
                    f"step {number}: the KL to the start is {metrics['kl']:.3g}, over "
                    f"config.rl.stop_kl={rl.stop_kl:g}, so the run ends here"
                )
                if group.is_main_process:
                    write_json(workdir / ENDED, {"step": number, "kl": metrics["kl"]})
                group.meet()
            return state, metrics

        steps = {data.prompt_length: run_step}

    def validation(trainable: Any) -> tuple[dict[str, float], list[Sample]]:
        """A checkpoint is chosen by what its samples lack of the largest score."""
        found, samples = exams.quick("val", trainable)
        sampled = float(found.sampled.mean())
        return {
            "val/loss": 1 - sampled,
            "val/sampled_reward": sampled,
            f"val/{found.metric}": found.greedy.primary,
            "val/labels": found.labels,
        }, samples

    with session.running(start), checkpoints:
        say("asking about the held-out clips, before")
        with clock.measure("evaluate"):
            file = workdir / post_training.BEFORE
            before = exams.thorough("test", run.trainable, file, lambda: rl.start_sha256)
        state, totals = loop.run_steps(
            session,
            steps,
            state,
            run.base,
            data,
            mesh,
            checkpoints,
            validation,
            start,
            program.flops,
            finished,
        )
        best, last = group.from_main_process(checkpoints.best_step), int(state["step"])
        if best != last:
            state = checkpoints.restore(best, program.state)
        say(f"asking about the held-out clips, after, with step {best}")
        with clock.measure("evaluate"):
            file = workdir / post_training.after_file(best)
            fingerprint = functools.partial(SavedRun(workdir).fingerprint, best)
            after = exams.thorough("test", state["trainable"], file, fingerprint)
        result = post_training.compare(config, rl, workdir, exams, before, after, best, last)
        result["ended_by"] = "stop_kl" if finished(last) else "steps"
        post_training.finish(session, result, totals)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; ends with status 1 and one sentence for trouble that the user can mend."""
    post_training.run_command(
        "affectgpt reinforce",
        __doc__,
        "rl",
        argv,
        reinforce,
        "lower config.rl.prompts or config.rl.group, raise config.gradient_accumulation_steps, or "
        "let config.remat=full recompute more",
    )


if __name__ == "__main__":
    silence_threads()
    cpu.keep_freed_memory()
    main()
