"""Train a run on preferences between two answers (DPO).

    affectgpt prefer --workdir=runs/p1 --from=runs/demo

goes on from a run's best checkpoint, or from --step, by pairs of answers of which one is preferred:
those of records with `alternatives` and `preferred`, in the layout of EmoPrefer and MER-Prefer, or,
with `--config.dpo.source=samples`, the best and the worst of what the run itself writes about clips
that supervision has not seen. The new workdir is a run like any other. The same command, run again,
resumes.

`--config.dpo.KEY=VALUE` sets what the section `dpo` of configs/affectgpt_qwen25_7b.py explains,
`--config.KEY=VALUE` any other key of the run but for those of its model, which stays as it was.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypedDict

import jax
import numpy as np
from ml_collections import ConfigDict

from affectgpt_jax import build, cpu, outcomes, post_training, runtime
from affectgpt_jax.config import ConfigError, check_same_run, validate
from affectgpt_jax.data.packing import Bucket
from affectgpt_jax.data.pipeline import DataError, PromptProcessor
from affectgpt_jax.data.records import Records, hold_out
from affectgpt_jax.evaluation.lexicon import load_lexicon
from affectgpt_jax.evaluation.rewards import Reward, Wheels
from affectgpt_jax.models.attention import grouped
from affectgpt_jax.pairs import (
    Pair,
    PairData,
    annotated_pairs,
    reference_log_probs,
    sampled_pairs,
)
from affectgpt_jax.post_training import Exams
from affectgpt_jax.program import compiler_options, make_program
from affectgpt_jax.restore import Run
from affectgpt_jax.rollouts import scorable
from affectgpt_jax.training import distributed, loop, memory, sharding
from affectgpt_jax.training.checkpoints import SavedRun, silence_threads
from affectgpt_jax.training.metrics_writer import Sample
from affectgpt_jax.training.policy import answer_log_probs
from affectgpt_jax.training.preference import PreferenceLossConfig, preference_loss

SHOWN = {"accuracy": "accuracy", "margin": "margin", "better": "better"}


class _Sampled(TypedDict):
    """Pairs in a file: by clip, the tokens of both answers."""

    number: list[int]
    better: list[list[int]]
    worse: list[list[int]]


def kept_pairs(
    path: Path,
    group: distributed.ProcessGroup,
    dataset: Records,
    processor: PromptProcessor,
    question: str,
    made_of: Callable[[], Any],
    make: Callable[[], tuple[list[Pair], int]],
) -> list[Pair]:
    """Sampled pairs from a file, or else from `make()`, see `post_training.kept`."""

    def plain() -> _Sampled:
        pairs, _ = make()
        return {
            "number": [pair.number for pair in pairs],
            "better": [pair.better.tolist() for pair in pairs],
            "worse": [pair.worse.tolist() for pair in pairs],
        }

    known = post_training.kept(path, _Sampled, group, made_of, plain)
    prompts = processor.prompt_examples(dataset, question)
    return [
        Pair(n, prompts[n].tokens, *(np.asarray(tokens, np.int32) for tokens in both))
        for n, *both in zip(known["number"], known["better"], known["worse"], strict=True)
    ]


def prefer(
    config: ConfigDict,
    workdir: Path,
    run: Run,
    group: distributed.ProcessGroup | None = None,
    fallback: bool = False,
    allow_other: Collection[str] = (),
) -> dict[str, Any]:
    """Go on from a run by preferences; arguments, result and errors are those of
    `reinforce.reinforce`."""
    group = group or distributed.ProcessGroup()
    dpo, mesh = config.dpo, run.mesh
    lexicon = load_lexicon(dpo.lexicon or None)
    other_lexicon = post_training.load_test_lexicon(dpo)
    try:
        settings = PreferenceLossConfig(dpo.beta, dpo.label_smoothing, dpo.nll_weight)
        session = loop.Session(config, workdir, group, SHOWN)
    except ValueError as error:
        raise ConfigError(f"config.dpo or config.profile_steps: {error}") from None
    shares = sharding.data_parallel_size(mesh)
    for name in ("pairs", "prompts"):
        if dpo[name] % (shares * config.gradient_accumulation_steps):
            raise ConfigError(
                f"config.dpo.{name}={dpo[name]} cannot be shared by {shares} devices (mesh "
                f"{config.mesh!r}) in {config.gradient_accumulation_steps} microbatches"
            )
    config.batch_size = dpo.pairs
    post_training.note_start(dpo, run, lexicon)
    validate(config)
    group.from_main_process(lambda: check_same_run(config, workdir))
    say, clock, processor = session.say, session.clock, run.processor
    say(f"workdir {workdir}; from {run.title}")

    # Pairs, some of them held out by the names of their clips.
    clips = group.main_process_first(
        lambda: post_training.open_clips(config, "dpo", workdir, run, say)
    )
    reward = Reward("sentiment" if dpo.question == "sentiment" else "wheel_f", Wheels(lexicon))
    test = scorable(clips["test"], reward, dpo.question, dpo.test_clips, "config.data.test")
    group.from_main_process(lambda: post_training.save_config(config, run, workdir))
    distributed.check_shared(workdir / "config.json")
    asked = 0  # tokens of the longest prompt about a clip to learn from
    if dpo.source == "samples":
        asked = outcomes.prompt_length(processor, dpo.question, [clips["rl"]])
    exams = Exams(
        dpo,
        run,
        {"test": test},
        seed=config.seed,
        lexicon=lexicon,
        other_lexicon=other_lexicon,
        prompt_length=asked,
        group=group,
        pulse=session.pulse,
    )
    sets = {}
    for name, dataset in zip(("train", "val"), hold_out(clips["rl"], dpo.val_share), strict=True):
        if dpo.source == "records":
            pairs, same = annotated_pairs(dataset, processor)
            say(f"{name}: {same} of {len(dataset):,} preferences are for neither, and left out")
        else:
            say(f"{name}: sampling {dpo.group} answers about each of {len(dataset):,} clips")

            def sample(dataset: Records = dataset) -> tuple[list[Pair], int]:
                return sampled_pairs(
                    dataset,
                    processor,
                    dpo.question,
                    exams.sampled,
                    run.trainable,
                    reward,
                    dpo.gap,
                    config.seed,
                )

            def made_of(dataset: Records = dataset) -> list[Any]:
                facts = post_training.asked_of(run, dataset, dpo, config.seed)
                return [dpo.start_sha256, lexicon.identity.sha256, dpo.gap, *facts]

            file = workdir / f"pairs_{name}.json"
            pairs = kept_pairs(file, group, dataset, processor, dpo.question, made_of, sample)
        if not pairs:
            raise DataError(
                f"config.dpo.data: no pair to {name}, since {len(dataset)} clips gave none; name "
                "more clips" + (", or lower config.dpo.gap" if dpo.source == "samples" else "")
            )
        sets[name] = PairData(config, dataset, processor, pairs, sharding.data_parallel_rank(mesh))
        say(f"{name}: {sets[name].describe()}")
    data, held_out = sets["train"], sets["val"]
    # Of one shape, so that each program is compiled once.
    both = zip(*((s.bucket.length, s.bucket.targets) for s in sets.values()), strict=True)
    data.bucket = held_out.bucket = Bucket(*map(max, both))

    # The program: the set-up of supervision, with another loss.
    llm = build.base_config(config.llm)
    options = compiler_options(config, say)
    group.require_same({"base": run.identity.sha256})
    say("attention: xla (both answers of a pair share their prompt)")
    program = make_program(
        config,
        mesh,
        {data.bucket.length: data.collate([], data.rows)},
        preference_loss(settings),
        llm=llm,
        attend=grouped,
        memory_limit=group.from_main_process(memory.device_limit),
    )
    inputs = post_training.inputs_of(run, clips, lexicon)
    checkpoints, state, start = post_training.start(
        program, run, inputs, session, fallback=fallback, allow_other=allow_other
    )
    steps = {}
    if start < config.steps:
        with clock.measure("compile"):
            with runtime.compiling("1 program", enabled=group.is_main_process):
                steps = program.compile(options)
            group.meet()

    loss = program.loss
    evaluate = jax.jit(lambda trainable, base, batch: loss(program.model, base, trainable, batch))
    # Of all processes' rows on each, which all write them into their batches.
    log_probs = jax.jit(
        functools.partial(answer_log_probs, program.model),
        out_shardings=sharding.replicated(mesh),
    )

    def validation(trainable: Any) -> tuple[dict[str, float], list[Sample]]:
        """Loss, accuracy of the implicit reward, and margin on held-out pairs."""
        sums, pairs = np.zeros(3), 0.0
        for _, batch in held_out.whole():
            session.pulse()
            total, count, metrics = evaluate(
                trainable, run.base, sharding.shard_whole_batch(mesh, batch)
            )
            sums += np.array([float(total), float(metrics["accuracy"]), float(metrics["margin"])])
            pairs += float(count)
        names = ("val/loss", "val/accuracy", "val/margin")
        return dict(zip(names, (sums / pairs).tolist(), strict=True)), []

    with session.running(start), checkpoints:
        say("asking about the held-out clips, before")
        with clock.measure("evaluate"):
            file = workdir / post_training.BEFORE
            before = exams.thorough("test", run.trainable, file, lambda: dpo.start_sha256)
            for name, pairs in sets.items():
                tokens = [
                    [p.prompt.tolist(), p.better.tolist(), p.worse.tolist()] for p in pairs.pairs
                ]
                found = post_training.kept(
                    workdir / f"reference_{name}.json",
                    list[list[float]],
                    group,
                    lambda pairs=pairs, tokens=tokens: [
                        dpo.start_sha256,
                        *post_training.model_and_clips(run, pairs.dataset),
                        tokens,
                    ],
                    lambda pairs=pairs: [
                        row.tolist()
                        for row in reference_log_probs(
                            lambda batch: log_probs(run.base, run.trainable, batch),
                            mesh,
                            pairs,
                            session.pulse,
                        )
                    ],
                )
                pairs.reference = [np.asarray(row, np.float32) for row in found]
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
        )
        best, last = group.from_main_process(checkpoints.best_step), int(state["step"])
        if best != last:
            state = checkpoints.restore(best, program.state)
        say(f"asking about the held-out clips, after, with step {best}")
        with clock.measure("evaluate"):
            file = workdir / post_training.after_file(best)
            fingerprint = functools.partial(SavedRun(workdir).fingerprint, best)
            after = exams.thorough("test", state["trainable"], file, fingerprint)
            pairs, _ = validation(state["trainable"])
        result = post_training.compare(config, dpo, workdir, exams, before, after, best, last)
        result["pairs"] = {"train": len(data.pairs), "held_out": len(held_out.pairs)} | {
            name.removeprefix("val/"): value for name, value in pairs.items()
        }
        accuracy = f"0.500 -> {pairs['val/accuracy']:.3f}"
        rows = [("preferred as annotated, held-out pairs", accuracy)]
        post_training.finish(session, result, totals, rows)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; ends with status 1 and one sentence for trouble that the user can mend."""
    post_training.run_command(
        "affectgpt prefer",
        __doc__,
        "dpo",
        argv,
        prefer,
        "lower config.dpo.pairs, raise config.gradient_accumulation_steps, or let "
        "config.remat=full recompute more",
    )


if __name__ == "__main__":
    silence_threads()
    cpu.keep_freed_memory()
    main()
