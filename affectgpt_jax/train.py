"""Train AffectGPT: `affectgpt train --config=configs/demo.py --workdir=runs/demo`.

Without arguments it trains the demo: a small but complete AffectGPT on generated clips, in minutes,
on two CPU cores, with a scored result. Run again with the same workdir, it resumes from the newest
checkpoint. `--config.key=value` overrides any key of the config. Under srun or mpirun, or with
`--coordinator_address=HOST:PORT --process_id=I --num_processes=N`, several processes train as one.
"""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from affectgpt_jax import build, cli, cpu, evaluators, inference, restore, runtime
from affectgpt_jax.common.json import write_json
from affectgpt_jax.common.progress import QUIET_S, Counter, Elapsed
from affectgpt_jax.config import (
    ConfigError,
    check_same_run,
    parse_command_line,
    save_config,
    saved_steps,
)
from affectgpt_jax.data.modalities import modalities_in_words
from affectgpt_jax.data.pipeline import TrainPipeline
from affectgpt_jax.program import check_rows, compiler_options, make_program
from affectgpt_jax.trainer_command import TrainerCommand, add_flags
from affectgpt_jax.training import distributed, loop, memory, metrics_writer, sharding, xla_options
from affectgpt_jax.training.checkpoints import (
    Checkpoints,
    check_disk,
    silence_threads,
)
from affectgpt_jax.training.losses import cross_entropy
from affectgpt_jax.training.step import State
from affectgpt_jax.weights.huggingface import base_identity, calls_own_head_tied, load_base


def train(
    config: ConfigDict,
    workdir: Path,
    group: distributed.ProcessGroup | None = None,
    fallback: bool = False,
    allow_other: Collection[str] = (),
) -> dict[str, Any]:
    """Run a config from data to scored result.

    Args:
        config: of the run.
        workdir: which this run alone works in; the same for all processes.
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
    group.from_main_process(lambda: check_same_run(config, workdir))
    try:
        session = loop.Session(config, workdir, group)
    except ValueError as error:
        raise ConfigError(f"config.profile_steps: {error}") from None
    say, clock = session.say, session.clock
    mesh = sharding.make_mesh(config.mesh)
    check_rows(config, mesh)
    kind, shape = jax.devices()[0].device_kind, dict(mesh.shape)
    say(f"workdir {workdir}; {jax.device_count()} x {kind}, mesh {shape}")
    if reserved := xla_options.describe_gpu_memory(
        jax.default_backend(), memory.device_limit(), os.environ
    ):
        say(reserved)
    directory, llm = build.base_directory(config.llm), build.base_config(config.llm)
    build.check_model(config, llm)
    if calls_own_head_tied(directory):
        say(f"note: {directory}: the stored lm_head is used, though config.json calls it tied")
    build.optimizer_config(config)
    build.check_data(config)
    resumes = group.from_main_process(lambda: bool(saved_steps(workdir)))
    initial = {} if resumes else restore.initial_weights(config, llm, mesh, say)
    attention = build.attention(config, llm)
    group.require_same({"attention": attention.name})
    say(f"attention: {attention.name} ({attention.reason})")
    options = compiler_options(config, say)
    group.from_main_process(lambda: save_config(config, workdir))
    distributed.check_shared(workdir / "config.json")

    # Data: tokenised whole, so that batch shapes are known before anything is compiled. What is
    # generated, the main process writes and the others then find.
    tokenizer = build.tokenizer(directory, llm)
    data = group.main_process_first(lambda: build.data(config, workdir, tokenizer, say))
    group.from_main_process(lambda: build.keep_extraction(workdir, data.train))
    if data.test is not None:
        # Trouble with a clip shows now, not at the end.
        question = evaluators.question_for_test_set(config)
        data.test.processor.prompt_examples(data.test.dataset, question)
    pipeline = TrainPipeline(
        data.train,
        batch_size=config.batch_size,
        max_tokens=config.max_tokens,
        too_long=config.too_long,
        num_buckets=config.num_buckets,
        pack_length=config.pack_length,
        seed=config.seed,
        process=sharding.data_parallel_rank(mesh),
    )
    for line in [*pipeline.describe(), pipeline.describe_run(config.steps)]:
        say(line)
    say(f"{sum(len(component.dataset) for component in data.val):,} clips for validation")

    # The program: model, optimizer, loss and shapes, sharded over the mesh. Nothing is allocated.
    program = make_program(
        config,
        mesh,
        pipeline.filler_batches(),
        cross_entropy,
        llm=llm,
        attend=attention.for_rows_of(pipeline.buckets[0].clips),
        memory_limit=group.from_main_process(memory.device_limit),
    )
    for line in program.describe(directory.name):
        say(line)
    check_disk(workdir, program.state)

    # All that an answer depends on: the same in all processes, and as it was where a run resumes.
    with Elapsed("hashing the base", quiet_s=QUIET_S, enabled=group.is_main_process):
        identity, inputs = base_identity(directory), build.inputs(config, directory, data)
    group.require_same({name: one.sha256 for name, one in [("base", identity), *inputs.items()]})
    checkpoints = Checkpoints(workdir, identity, config.max_to_keep, group.is_main_process, inputs)

    # The frozen base and the state, straight into their shardings. `loop.initial_state` has the
    # order in which a run resumes.
    def fresh_state() -> State:
        with Elapsed("drawing weights", quiet_s=QUIET_S, enabled=group.is_main_process):
            return restore.fresh_state(program, initial)

    state, start = loop.initial_state(
        checkpoints,
        program.state,
        fresh_state,
        session,
        fallback=fallback,
        allow_other=allow_other,
    )
    with Elapsed("reading the base", quiet_s=QUIET_S, enabled=group.is_main_process):
        base = load_base(directory, program.base, sharding.shardings_of(program.base))

    # Every batch shape is compiled before the loop, side by side.
    steps = {}
    if start < config.steps:
        count = len(program.batches)
        what = f"{count} programs, one for each row length" if count > 1 else "1 program"
        with clock.measure("compile"):
            with runtime.compiling(what, enabled=group.is_main_process):
                steps = program.compile(options)
            # Who finds its programs in the cache is early, and a collective waits for seconds only.
            group.meet()

    # Validation and the loop; then the best checkpoint answers the held-out clips.
    merge_lora = group.from_main_process(
        lambda: inference.should_merge(config.generate.merge_lora, program.model, base)
    )
    generators = evaluators.make_generators(
        program, base, data.held_out, merge_lora=merge_lora, pulse=session.pulse
    )

    def validating(done: int, total: int) -> None:
        session.progress.show(lambda: [f"validation: {done:,} of {total:,} answers"])

    validate = evaluators.make_validation(
        program, base, data.val, generators, session.pulse, validating
    )
    with session.running(start), checkpoints:
        state, totals = loop.run_steps(
            session,
            steps,
            state,
            base,
            pipeline,
            mesh,
            checkpoints,
            validate,
            start,
            program.flops,
        )
        best = group.from_main_process(checkpoints.best_step)
        if best != int(state["step"]):
            state = checkpoints.restore(best, program.state)
        result = {"steps": config.steps, "best_step": best} | totals
        if group.is_main_process:
            log = workdir / "metrics.jsonl"
            result = metrics_writer.first_and_last_loss(log) | result
            if trouble := metrics_writer.divergence(log):
                rate = config.optimizer.learning_rate
                result["warning"] = (
                    f"{trouble}; lower config.optimizer.learning_rate, which is {rate:g}, or train "
                    "longer if there were few steps"
                )
        if data.test is not None:
            session.progress.close()
            answers = Counter(
                "answers", f"held-out clips, step {best}", enabled=group.is_main_process
            )
            with clock.measure("evaluate"), answers:
                result |= evaluators.score_test_set(
                    config,
                    workdir,
                    state["trainable"],
                    generators[data.test.processor.mode],
                    data.test,
                    write=group.is_main_process,
                    progress=answers,
                )
            scores = {f"test/{name}": result[name] for name in ("hit", "f") if name in result}
            if scores:
                session.writer.write(best, scores)  # whose score it is, often not the last
            else:
                say("not scored: " + result["not_scored"])
        times = clock.report()
        result |= {"wall_s": sum(times.values()), "time_s": times}
        if group.is_main_process:
            write_json(workdir / "result.json", result)
        session.draw(config.steps, references(config, result))
    if group.is_main_process:
        print(clock.table())
        print(summary(config, workdir, result))
    return result


def references(config: ConfigDict, result: dict[str, Any]) -> dict[str, float]:
    """What the picture of a run sets its score beside; its own ceiling first."""
    ceilings = dict(result.get("ceilings", {}))
    own = ceilings.pop(build.input_mode(config).name, None)
    found = {} if own is None else {"ceiling": own}
    found |= {f"ceiling, {modalities_in_words(mode)}": ceilings[mode] for mode in ceilings}
    for name in ("hit", "f"):
        if (key := f"{name}_features_shuffled") in result:
            found["control: shuffled features"] = result[key]
    return found


def summary(config: ConfigDict, workdir: Path, result: dict[str, Any]) -> str:
    """The closing words: scores beside what is possible, what was written, what to do next."""
    rows = [("loss, first and last", f"{result['loss_first']:.3f} -> {result['loss_last']:.3f}")]
    rows.append(("best on validation", f"the checkpoint of step {result['best_step']}"))
    if "samples_per_s" in result:
        rows.append(("samples/s", f"{result['samples_per_s']:.0f}"))
    if "mfu" in result:
        rate = f"{result['tflop_per_s_per_device']:.0f} TFLOP/s a device"
        rows.append(("MFU", f"{result['mfu']:.1%}  ({rate})"))
    rows += score_rows(config, result)
    table = metrics_writer.summary_table(rows, title="Result")
    answers = ", predictions.jsonl" if "clips" in result else ""
    answers += ", truth.csv" if "clips" in result and "not_scored" not in result else ""
    warning = f"\n\nwarning: {result['warning']}" if "warning" in result else ""
    return f"""{table}{warning}

What you have now, in {workdir}:
  {"result.json" + answers:<42}  the result{", and every answer" if answers else ""}
  metrics.jsonl, tensorboard/, run.png        the training run
  checkpoints/                                adapters, fusion, optimizer state

{next_commands(config, workdir)}"""


def score_rows(config: ConfigDict, result: dict[str, Any]) -> list[tuple[str, str]]:
    """What the closing words say of the held-out clips."""
    if "not_scored" in result:
        return [("not scored", result["not_scored"])]
    rows = []
    ceilings = result.get("ceilings", {})
    if "hit" in result:
        best = ceilings.get(build.input_mode(config).name)
        error = math.sqrt(result["hit"] * (1 - result["hit"]) / result["clips"])
        rows.append((f"hit rate, {result['clips']:,} clips", f"{result['hit']:.3f} +- {error:.3f}"))
        if best:
            rows.append(("share of the ceiling", f"{result['hit'] / best:.0%}"))
        rows.append(("labels per clip", f"{result['labels_per_clip']:.2f} (the first one counts)"))
    if "f" in result:
        low, high = result["f_interval"]
        value = f"{result['f']:.3f} ({low:.3f} to {high:.3f})"
        rows.append((f"F of the labels, {result['clips_scored']:,} clips", value))
        rows.append(("precision, recall", f"{result['p']:.3f}, {result['r']:.3f}"))
        rows.append(("labels per clip", f"{result['labels_per_clip']:.2f}"))
    for name in ("hit", "f"):
        if (key := f"{name}_features_shuffled") in result:
            rows.append(("control: shuffled features", f"{result[key]:.3f}"))
    rows += [
        (f"ceiling with {modalities_in_words(mode)}", f"{value:.3f}")
        for mode, value in ceilings.items()
    ]
    if result.get("answers_cut"):
        rows.append(("answers cut at the token limit", str(result["answers_cut"])))
    return rows


def next_commands(config: ConfigDict, workdir: Path) -> str:
    """What to run next, each command below what it is for."""
    run = shlex.quote(str(workdir))
    clips, scored = ("", "") if config.data.test else (" --records RECORDS", " --set NAME=RECORDS")
    lines = [
        "What to run next:",
        "  # its answers about a few clips",
        f"  affectgpt predict --workdir {run} --first 3{clips}",
        "  # scores with intervals, confusions and examples, on a page",
        f"  affectgpt evaluate --workdir {run}{scored}",
        "  # curves of the training (pip install tensorboard)",
        f"  tensorboard --logdir {run}/tensorboard",
    ]
    if config.llm == "tiny":
        lines += [
            "  # another pre-fusion; or fewer inputs: --config.input=face_text",
            "  affectgpt train --config.fusion=qformer --workdir runs/qformer",
            "  # the paper's recipe, on a GPU",
            "  affectgpt train --config=affectgpt_qwen25_7b --workdir runs/paper \\",
            "      --config.llm=DIR --config.data.train=RECORDS",
        ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; ends with status 1 and one sentence for trouble that the user can mend."""
    parser = cli.make_parser("affectgpt train", __doc__)
    add_flags(parser)
    command = TrainerCommand(
        "lower config.batch_size, raise config.gradient_accumulation_steps, or let "
        "config.remat=full recompute more"
    )
    with command.ending():
        config, own = parse_command_line(sys.argv[1:] if argv is None else argv, parser)
        with command.joined(config, own) as group:
            train(config, own.workdir, group, own.fallback, own.allow_other)


if __name__ == "__main__":
    silence_threads()
    cpu.keep_freed_memory()
    main()
