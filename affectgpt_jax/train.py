"""Train AffectGPT: `python -m affectgpt_jax.train --config=configs/demo.py --workdir=runs/demo`.

Without arguments it trains the demo: a small but complete AffectGPT on generated clips, in minutes,
on two CPU cores, with a scored result. Run again with the same workdir, it resumes from the newest
checkpoint. `--config.key=value` overrides any key of the config. Under srun or mpirun, or with
`--coordinator_address=HOST:PORT --process_id=I --num_processes=N`, several processes train as one.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

from affectgpt_jax import build, inference, runtime
from affectgpt_jax.common.errors import UserError
from affectgpt_jax.config import ConfigError, check_same_run, described, parse_command_line
from affectgpt_jax.data.pipeline import (
    DataError,
    MixtureComponent,
    TrainPipeline,
    sequential_batches,
    too_long_message,
)
from affectgpt_jax.data.prompts import InputMode, PromptError, parse_label
from affectgpt_jax.data.records import RecordError
from affectgpt_jax.data.tokenizer import TokenizerError
from affectgpt_jax.models.affectgpt import AffectGPT, init_random_base, with_compute
from affectgpt_jax.models.lora import LoraConfig
from affectgpt_jax.models.quantize import QuantizedKernel
from affectgpt_jax.training import distributed, memory, metrics_writer, sharding, xla_options
from affectgpt_jax.training.checkpoints import (
    CheckpointError,
    Checkpoints,
    CheckpointWriteError,
    silence_threads,
)
from affectgpt_jax.training.optimizer import learning_rate_schedule, make_optimizer
from affectgpt_jax.training.sharding import abstract
from affectgpt_jax.training.step import (
    State,
    init_key,
    init_state,
    make_eval_step,
    make_train_step,
    nonfinite_leaves,
)
from affectgpt_jax.training.stopping import (
    Stopped,
    StopSignals,
    Watchdog,
    WorkdirInUse,
    lock_workdir,
)
from affectgpt_jax.weights.huggingface import WeightsError, base_identity, load_base
from affectgpt_jax.weights.peft import load_adapter
from affectgpt_jax.weights.release import load_release


class TrainingError(UserError, RuntimeError):
    """Training cannot go on."""


# Trouble that a user can mend: shown as one sentence, without a traceback.
USER_ERRORS = (
    CheckpointError,
    ConfigError,
    DataError,
    PromptError,
    RecordError,
    TokenizerError,
    TrainingError,
    WeightsError,
    WorkdirInUse,
    distributed.LaunchError,
    sharding.MeshError,
    metrics_writer.MetricsError,
)


def train(
    config: ConfigDict,
    workdir: Path,
    group: distributed.ProcessGroup | None = None,
    fallback: bool = False,
) -> dict[str, Any]:
    """Run a config from data to scored result.

    Args:
        config: of the run.
        workdir: which this run alone works in; the same for all processes.
        group: the processes of the run; None is this one alone.
        fallback: go on from an older checkpoint where the newest is damaged.

    Returns:
        What `workdir/result.json` then holds; empty on all processes but the first.

    Raises:
        Stopped: a signal has ended the run, after everything was saved.
    """
    clock = metrics_writer.TimeBuckets(outside="setup")
    group = group or distributed.ProcessGroup()
    is_main_process = group.is_main_process
    group.from_main_process(lambda: check_same_run(config, workdir))
    check_shared(workdir)
    try:
        profiled = config.profile_steps if is_main_process else ""
        profiler = metrics_writer.Profiler(profiled, workdir, config.steps)
    except ValueError as error:
        raise ConfigError(f"config.profile_steps: {error}") from None
    mesh = sharding.make_mesh(config.mesh)
    check_rows(config, mesh)
    rows = sharding.data_parallel_rank(mesh)
    progress = metrics_writer.Progress(config.steps, enabled=is_main_process)
    kind, shape = jax.devices()[0].device_kind, dict(mesh.shape)
    progress.line(f"workdir {workdir}; {jax.device_count()} x {kind}, mesh {shape}")

    # Everything that can be refused is looked at before data is read or written.
    directory = build.base_directory(config.llm)
    llm = build.base_config(config.llm)
    attention = build.attention(config, llm)
    group.require_same({"attention": attention.name})
    progress.line(f"attention: {attention.name} ({attention.reason})")
    shard = sharding.ActivationConstraint(mesh)
    model = build.model(config, llm, shard, attention.attend)
    compiler_options = train_step_options(config, progress.line)
    optimizer_config = build.optimizer_config(config)
    optimizer = make_optimizer(optimizer_config, config.steps)
    schedule = learning_rate_schedule(optimizer_config, config.steps)

    # Data: tokenised whole, so that batch shapes are known before anything is compiled. What is
    # generated, the first process writes and the others then find.
    tokenizer = build.tokenizer(directory, llm)
    data = group.main_process_first(lambda: build.data(config, workdir, tokenizer, progress.line))
    question = test_question(config)
    if data.test is not None:
        # Trouble with a clip shows now, not at the end.
        data.test.processor.prompt_examples(data.test.dataset, question)
    pipeline = TrainPipeline(
        data.train,
        batch_size=config.batch_size,
        max_tokens=config.max_tokens,
        too_long=config.too_long,
        num_buckets=config.num_buckets,
        pack_length=config.pack_length,
        seed=config.seed,
        process=rows,
    )
    if pipeline.dropped:
        progress.line(
            f"dropped {pipeline.dropped} examples over {config.max_tokens} tokens (too_long=drop)"
        )
    for source in data.train if len(data.train) > 1 else ():
        progress.line(
            f"{source.name}: {len(source.dataset):,} clips, weight {source.weight:g}, "
            f"{source.label} from {source.processor.mode.name}"
        )
    lengths = ", ".join(f"{b.length} ({b.targets} supervised)" for b in pipeline.buckets)
    clips, held_out = (sum(len(s.dataset) for s in sources) for sources in (data.train, data.val))
    progress.line(f"{clips:,} training clips, {held_out:,} for validation; row lengths {lengths}")
    if config.pack_length:
        progress.line(describe_packing(pipeline))
        model = build.model(config, llm, shard, attention.for_rows_of(pipeline.buckets[0].clips))

    # State: shapes first, then weights and fresh adapters straight into their shardings.
    abstract_base = abstract(mesh, lambda key: init_random_base(model, key))
    abstract_state = abstract(mesh, lambda key: init_state(model, optimizer, key))
    check_disk(workdir, abstract_state)
    progress.line(
        f"{count(abstract_base):,} frozen parameters ({directory.name}, "
        f"{nbytes(abstract_base) / 2**20:,.1f} MiB in {config.base_precision or config.dtype}), "
        f"{count(abstract_state['trainable']['lora']):,} in LoRA and "
        f"{count(abstract_state['trainable']['fusion']):,} in heads and fusion to train"
    )
    base = load_base(directory, abstract_base, sharding.shardings_of(abstract_base))
    identity = base_identity(directory)
    group.require_same({"base": identity.sha256})
    checkpoints = Checkpoints(workdir, identity, config.max_to_keep, is_main_process)
    start = group.from_main_process(lambda: checkpoints.step_to_resume(fallback, progress.line))
    if start is None:
        start = 0
        initialise = jax.jit(
            lambda key: init_state(model, optimizer, key),
            out_shardings=sharding.shardings_of(abstract_state),
        )
        state = initialise(init_key(config.seed))
        if config.init_from:
            state["trainable"] |= load_start(
                Path(config.init_from).expanduser(),
                abstract_state["trainable"],
                model.decoder.lora,
                progress.line,
            )
    else:
        state = checkpoints.restore(start, abstract_state)
        progress.line(f"resumed from the checkpoint of step {start}")

    # Compile every batch shape before the loop, side by side.
    shapes = {
        bucket.length: sharding.abstract_batch(mesh, pipeline.filler_batch(bucket))
        for bucket in pipeline.buckets
    }
    if config.remat == "auto":
        choice = memory.choose_remat(
            model,
            mesh,
            abstract_state,
            abstract_base,
            shapes[max(shapes)],
            config.gradient_accumulation_steps,
            group.from_main_process(memory.device_limit),
        )
        model = with_compute(model, remat=choice.policy)
        progress.line(str(choice))
    train_step = make_train_step(
        model,
        optimizer,
        schedule,
        seed=config.seed,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
    )
    steps_by_length = {}
    if start < config.steps:
        with clock.measure("compile"):
            steps_by_length = compile_steps(
                train_step, mesh, abstract_state, abstract_base, shapes, compiler_options
            )
            # Who finds its programs in the cache is early, and a collective waits for seconds only.
            group.meet()
    stop = StopSignals(progress.line)
    watchdog = Watchdog(config.step_timeout, group.fail)

    def pulse() -> None:
        """Between the batches of an evaluation, which may take long."""
        watchdog.beat("a batch of an evaluation")
        stop.check()

    # The main process's memory decides: all run the same program.
    merged = group.from_main_process(
        lambda: inference.merges(config.generate.merge_lora, model, base),
    )
    generators = {
        source.processor.mode: inference.Generator(
            model,
            base,
            source.processor,
            mesh,
            num_buckets=config.num_buckets,
            batch_size=config.generate.batch_size,
            max_new_tokens=config.generate.max_new_tokens,
            merge_lora="true" if merged else "false",
            pulse=pulse,
        )
        for source in (*data.val, *([data.test] if data.test else []))
    }
    validate = make_validation(config, model, base, data.val, mesh, generators, pulse)

    # The loop. Batches come from Grain's threads and go to the device one step ahead; the metrics
    # of a step are read while the next one runs. So the device never waits for the host, which is
    # never more than STEPS_IN_FLIGHT ahead of it.
    clock.outside("idle")
    writer = metrics_writer.MetricsWriter(
        workdir,
        resume_step=start,
        enabled=is_main_process,
        wandb_project=config.wandb_project,
        config=config.to_dict(),
    )
    reporter = StepReporter(config, workdir, writer, progress, checkpoints)

    def validated(step: int) -> dict[str, float]:
        """Scores of the state, logged; empty if the run is told to stop meanwhile."""
        with clock.measure("evaluate"), contextlib.suppress(Stopped):
            scores = validate(state["trainable"])
            writer.write(step, scores)
            reporter.require_finite(step, scores)
            progress.line(f"step {step}: {' '.join(f'{k} {v:.4f}' for k, v in scores.items())}")
            return scores
        return {}

    with writer, progress, profiler, checkpoints, stop, watchdog:
        if start and (start % config.checkpoint_every == 0 or start == config.steps):
            # A run that is told to stop saves before it validates.
            if group.from_main_process(lambda: checkpoints.val_loss(start)) is None:
                scores = validated(start)
                if not scores:
                    raise stop.stopped()
                if is_main_process:
                    checkpoints.set_val_loss(start, scores["val/loss"])
        batches = pipeline.batches(start, config.steps)
        with clock.measure("data_wait"):
            batch = next(batches, None)  # None where no step is left
        on_device = batch and sharding.shard_batch(mesh, batch)
        step = start
        for step in range(start + 1, config.steps + 1):
            profiler.step(step)
            # A step moves nothing between host and device but what is moved by name: a NumPy array
            # or a metric that slips in would wait for the device. Validation and saving may wait.
            with clock.measure("step"), jax.transfer_guard("disallow"):
                run = steps_by_length[batch["tokens"].shape[1]]
                began = time.perf_counter()
                state, metrics = run(state, base, on_device)
                dispatched = time.perf_counter()
                with clock.measure("data_wait"):
                    batch = next(batches, None)
                fetched = time.perf_counter()
                on_device = batch and sharding.shard_batch(mesh, batch)
                mix = pipeline.component_counts(step - 1) if len(data.train) > 1 else {}
                times = StepTimes(dispatched - began, fetched - dispatched)
                reporter.submit(step, metrics, pipeline.size(step - 1), times, mix)
                watchdog.beat(f"step {step}")
            stopping = stop.reached()
            if stopping or step % config.checkpoint_every == 0 or step == config.steps:
                with clock.measure("step"):
                    reporter.flush()
                    reporter.require_finite_state(step, state)
                scores = {} if stopping else validated(step)
                with clock.measure("save"):
                    checkpoints.save(step, state, scores.get("val/loss"))
                if not scores:
                    checkpoints.wait()
                    progress.line(f"stopped after step {step}; the same command goes on from there")
                    raise stop.stopped()
                reporter.skip_pause()
        profiler.step(step + 1)  # ends a trace that reaches to the last step
        with clock.measure("save"):
            checkpoints.wait()
        best = group.from_main_process(checkpoints.best_step)
        if best != int(state["step"]):
            state = checkpoints.restore(best, abstract_state)

        # Score the held-out clips with the checkpoint that validation chose.
        result = {"steps": config.steps, "best_step": best} | reporter.totals()
        if is_main_process:
            result = summarise_losses(workdir) | result
        if data.test is not None:
            progress.line(
                f"asking about {len(data.test.dataset):,} held-out clips with step {best}"
            )
            with clock.measure("evaluate"):
                generator = generators[data.test.processor.mode]
                result |= answer_test_set(
                    config, workdir, state, generator, data.test, is_main_process
                )
            if "hit" in result:
                writer.write(config.steps, {"test/hit": result["hit"]})
            else:
                progress.line("not scored: " + result["not_scored"])
    result["wall_s"] = sum(clock.report().values())
    result["time_s"] = clock.report()
    if is_main_process:
        (workdir / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        mode_ceiling = result.get("ceilings", {}).get(build.input_mode(config).name)
        metrics_writer.plot_run(
            workdir / "metrics.jsonl",
            workdir / "run.png",
            ceilings=mode_ceiling and {"ceiling": mode_ceiling},
        )
        print(clock.table())
        print(final_report(config, workdir, result))
    return result if is_main_process else {}


# Steps that may be dispatched before the first of them is waited for: with one running and one
# queued the device is never idle, and more would only hold more batches in its memory.
STEPS_IN_FLIGHT = 2


class StepTimes(NamedTuple):
    """Seconds that the loop spent in dispatching a step, and in waiting for the next batch."""

    dispatch_s: float
    wait_s: float


class StepReporter:
    """Logs finished steps, one step late, and stops a run that has left the finite numbers.

    Args:
        config: the run's config.
        workdir: named in errors.
        writer, progress: where metrics go.
        checkpoints: asked for the last good one when a run fails.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        writer: metrics_writer.MetricsWriter,
        progress: metrics_writer.Progress,
        checkpoints: Checkpoints,
    ):
        self._config, self._workdir = config, workdir
        self._writer, self._progress, self._checkpoints = writer, progress, checkpoints
        self._throughput = metrics_writer.Throughput()
        self._pending: deque[tuple] = deque()
        self._wait_s = self._dispatch_s = 0.0  # since the last report
        self._samples, self._seconds = 0, 0.0
        self._finished = time.perf_counter()

    def submit(
        self,
        step: int,
        metrics: dict[str, jax.Array],
        size: tuple[int, int],
        times: StepTimes,
        mix: Mapping[str, int],
    ) -> None:
        """Hand in a step that was just dispatched; waits until few enough are in flight.

        Args:
            step: its number, from 1.
            metrics: device scalars of the train step, read `STEPS_IN_FLIGHT - 1` steps later.
            size: clips and tokens of its batch, over all processes.
            times: what the loop has waited for since the step before was handed in.
            mix: clips from each set of a mixture.

        Raises:
            TrainingError: a step before had a loss or gradient that is not finite.
        """
        self._pending.append((step, metrics, size, mix))
        self._dispatch_s += times.dispatch_s
        self._wait_s += times.wait_s
        while len(self._pending) >= STEPS_IN_FLIGHT:
            self._report()

    def flush(self) -> None:
        """Report all steps that were handed in; waits for the device to finish them.

        Raises:
            TrainingError: as for `submit`.
        """
        while self._pending:
            self._report()

    def _report(self) -> None:
        """Wait for the oldest step and log it."""
        step, metrics, (samples, tokens), mix = self._pending.popleft()
        asked = time.perf_counter()
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        device_s = time.perf_counter() - asked
        scalars = {f"train/{name}": value for name, value in values.items()}
        scalars |= {f"mix/{name}": clips for name, clips in mix.items()}
        if step % self._config.log_every == 0 or step in (1, self._config.steps):
            rates = self._throughput.rates()
            self._writer.write(step, scalars | {f"rate/{k}": v for k, v in rates.items()})
        self.require_finite(step, scalars)
        now = time.perf_counter()
        step_s, self._finished = now - self._finished, now
        self._samples, self._seconds = self._samples + samples, self._seconds + step_s
        host_s = step_s - self._wait_s - self._dispatch_s - device_s
        self._throughput.update(samples, tokens, step_s, self._wait_s, host_s)
        self._wait_s = self._dispatch_s = 0.0
        self._progress.update(step, values["loss"], self._throughput.rates())

    def skip_pause(self) -> None:
        """Leave the time since the last step, spent on something else, out of the rates."""
        self._finished = time.perf_counter()

    def totals(self) -> dict[str, float]:
        """Mean samples/s over all steps of this process's life; empty without any."""
        return {"samples_per_s": self._samples / self._seconds} if self._samples else {}

    def require_finite(self, step: int, scalars: dict[str, float]) -> None:
        """Stop the run if one of a step's scalars is NaN or infinite.

        Raises:
            TrainingError: naming the scalars, the step and the last good checkpoint.
        """
        bad = {name: value for name, value in scalars.items() if not math.isfinite(value)}
        if bad:
            raise self._not_finite(step, ", ".join(f"{name} {bad[name]}" for name in bad))

    def require_finite_state(self, step: int, state: State) -> None:
        """Stop the run rather than save a state that holds NaN or infinite values.

        Raises:
            TrainingError: naming arrays of it, the step and the last good checkpoint.
        """
        if bad := nonfinite_leaves(state):
            more = f" and {len(bad) - 3} more arrays" if len(bad) > 3 else ""
            raise self._not_finite(
                step, f"values that are not finite in {', '.join(bad[:3])}{more}"
            )

    def _not_finite(self, step: int, what: str) -> TrainingError:
        good = self._checkpoints.latest_step()
        where = self._workdir / "checkpoints" / str(good) if good else "none yet"
        return TrainingError(
            f"step {step} of {self._config.steps} gave {what}, and the losses before it were "
            f"finite (last good checkpoint: {where}); lower config.optimizer.learning_rate, set "
            "config.optimizer.clip_norm, or look for bad features in that step's batch"
        )


def describe_packing(pipeline: TrainPipeline) -> str:
    """What packing makes of the first epoch, in one sentence."""
    epoch, _ = pipeline.locate(0)  # small weights may leave epoch 0 empty
    fill, bucket = pipeline.fill(epoch), pipeline.buckets[0]
    rows, updates = fill.clips_per_row, fill.clips_per_batch
    return (
        f"packed: the first epoch is {len(rows):,} rows of {bucket.length:,} tokens, "
        f"{fill.tokens:.1%} full, in {len(updates):,} updates; clips a row {rows.mean():.1f} "
        f"({rows.min()} to {rows.max()}, room for {bucket.clips}), an update "
        f"{updates.mean():.1f} ({updates.min()} to {updates.max()})"
    )


def check_shared(workdir: Path) -> None:
    """Refuse a workdir that is another directory here than on the first process.

    Raises:
        LaunchError: what that has just written there is missing.
    """
    if not (workdir / "config.json").exists():
        raise distributed.LaunchError(
            f"{workdir} is not the directory that process 0 writes to; name a --workdir on a file "
            "system that all machines share"
        )


def check_rows(config: ConfigDict, mesh: Mesh) -> None:
    """Refuse a batch whose rows the mesh cannot share.

    Raises:
        ConfigError: a part of a batch is not a multiple of the devices that split it.
    """
    shares = sharding.data_parallel_size(mesh)
    rows = config.batch_size // config.gradient_accumulation_steps
    if rows % shares:
        raise ConfigError(
            f"config.batch_size={config.batch_size} in config.gradient_accumulation_steps="
            f"{config.gradient_accumulation_steps} microbatches gives {rows} rows at a time, "
            f"which {shares} devices (mesh {config.mesh!r}) cannot share equally; "
            f"use a multiple of {shares * config.gradient_accumulation_steps}"
        )


def load_start(
    path: Path, abstract_trainable: Any, lora: LoraConfig | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """What a run starts from instead of fresh parameters, as part of a `trainable` tree.

    Args:
        path: the directory of a PEFT adapter (LoRA alone), or a `.pth` of the PyTorch release.
        abstract_trainable: shapes and shardings to fill.
        lora: the config's adapters.
        say: told what was loaded, and what of the file was not.

    Raises:
        WeightsError: neither, or one that does not fit; the message names what differs.
    """
    if path.is_dir():
        loaded = {"lora": load_adapter(path, abstract_trainable["lora"], lora)}
        say(f"starting from the adapter {path}; heads and fusion start fresh")
        return loaded
    loaded, unused = load_release(path, abstract_trainable, lora)
    said = f"; left out, since this config has no place for them: {', '.join(unused)}"
    say(f"starting from {path}{said if unused else ''}")
    return loaded


def check_disk(workdir: Path, state: State) -> None:
    """Refuse to start a run whose first checkpoint does not fit on the disk.

    Raises:
        TrainingError: naming how much is free and how much a checkpoint needs.
    """
    need = nbytes(state)
    free = shutil.disk_usage(workdir).free
    if free < need:
        raise TrainingError(
            f"{workdir}: {free / 2**20:.0f} MiB are free, but one checkpoint takes "
            f"{need / 2**20:.0f} MiB; free some space, or name another --workdir"
        )


def train_step_options(
    config: ConfigDict, say: Callable[[str], None]
) -> dict[str, xla_options.Value]:
    """XLA's options for the update on these devices; `say` is told of each.

    Raises:
        ConfigError: `config.xla_options` holds something that XLA does not take.
    """
    try:
        options, lines = xla_options.compiler_options(
            build.device_platform(),
            jax.device_count(),
            xla_options.parse(config.xla_options),
            os.environ.get("XLA_FLAGS", ""),
            xla_options.refusal_by_xla,
        )
    except xla_options.XlaOptionError as error:
        raise ConfigError(f"config.xla_options: {error}") from None
    for line in lines:
        say(f"XLA option {line}")
    return options


def count(tree: Any) -> int:
    """Number of parameters in a tree of arrays or shapes."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, QuantizedKernel))
    return sum(math.prod(leaf.shape) for leaf in leaves)


def nbytes(tree: Any) -> int:
    """Bytes of a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def lower_step(
    train_step: Callable,
    mesh: Mesh,
    abstract_state: State,
    abstract_base: Any,
    batch: Any,
) -> Any:
    """Lower an update for a batch's shapes; nothing is allocated. The state is donated."""
    out = (sharding.shardings_of(abstract_state), sharding.replicated(mesh))
    step = jax.jit(train_step, donate_argnums=0, out_shardings=out)
    return step.lower(abstract_state, abstract_base, batch)


def compile_steps(
    train_step: Callable,
    mesh: Mesh,
    abstract_state: State,
    abstract_base: Any,
    batches: dict[int, Any],
    compiler_options: Mapping[str, xla_options.Value] | None = None,
) -> dict[int, Callable]:
    """The compiled update for every abstract batch, by the same keys."""

    def compile_one(batch: Any) -> Callable:
        lowered = lower_step(train_step, mesh, abstract_state, abstract_base, batch)
        return lowered.compile(compiler_options=dict(compiler_options or {}))

    with ThreadPoolExecutor() as pool:
        return dict(zip(batches, pool.map(compile_one, batches.values()), strict=True))


def test_question(config: ConfigDict) -> str:
    """What the test clips are asked: the question that can be scored, or else the first one."""
    types = parse_label(config.label)
    return inference.scored_question(types) or types[0]


def make_validation(
    config: ConfigDict,
    model: AffectGPT,
    base: Any,
    sources: Sequence[MixtureComponent],
    mesh: Mesh,
    generators: Mapping[InputMode, inference.Generator],
    pulse: Callable[[], None],
) -> Callable[[Any], dict[str, float]]:
    """`trainable -> {"val/loss", "val/hit"}`; the hit rate where clips name a true answer.

    Of several sets, the loss is that of all tokens together, and every set has its own beside it,
    `val/loss/NAME` and `val/hit/NAME`. `pulse` is called before every batch.
    """
    parts = {source.name: _validation_of(config, source, generators) for source in sources}
    eval_step = jax.jit(make_eval_step(model))

    def validate(trainable: Any) -> dict[str, float]:
        sums, scores = {}, {}
        for name, (batches, hit) in parts.items():
            device_sums = []
            for batch in batches():
                pulse()
                batch = sharding.shard_whole_batch(mesh, batch)
                device_sums.append(eval_step(trainable, base, batch))
            sums[name] = np.sum(jax.device_get(device_sums), axis=0)
            suffix = f"/{name}" if len(parts) > 1 else ""
            if hit is not None:
                scores[f"val/hit{suffix}"] = hit(trainable)
            if suffix:
                total, tokens = sums[name]
                scores[f"val/loss{suffix}"] = float(total / tokens)
        total, tokens = np.sum(list(sums.values()), axis=0)
        return {"val/loss": float(total / tokens), **scores}

    return validate


def _validation_of(
    config: ConfigDict,
    source: MixtureComponent,
    generators: Mapping[InputMode, inference.Generator],
) -> tuple[Callable[[], Iterator[Any]], Callable[[Any], float] | None]:
    """The batches of a validation set, and its hit rate if it has one.

    Clips take turns with the label types, the same ones every time.
    """
    dataset, processor, types = source.dataset, source.processor, parse_label(source.label)
    by_type = [processor.training_examples(dataset, kind) for kind in types]
    examples = [by_type[i % len(types)][i] for i in range(len(dataset))]
    lengths = np.array([[len(example) for example in kind] for kind in by_type])
    if lengths.max() > config.max_tokens and config.too_long != "drop":
        raise DataError(too_long_message(dataset, types, lengths, config.max_tokens))
    kept = [i for i, example in enumerate(examples) if len(example) <= config.max_tokens]
    if not kept:
        raise DataError(
            f"data set {source.name!r} has no validation example of at most {config.max_tokens} "
            "tokens; raise config.max_tokens"
        )

    def batches() -> Iterator[Any]:
        found = sequential_batches(
            dataset, processor, examples, config.batch_size, config.num_buckets, numbers=kept
        )
        return (batch for _, batch in found)

    question = inference.scored_question(types)
    if question is None or inference.without_truth(dataset, question):
        return batches, None

    def hit(trainable: Any) -> float:
        answers = generators[processor.mode].answer(trainable, dataset, question)
        labels = inference.read_labels(processor, answers, question)
        return inference.score_labels(dataset, labels, question)["hit"]

    return batches, hit


def summarise_losses(workdir: Path) -> dict[str, float]:
    """First and last training loss of the whole run, resumed or not.

    Raises:
        MetricsError: its log is gone or damaged.
    """
    path = workdir / "metrics.jsonl"
    losses = [r["train/loss"] for r in metrics_writer.read_metrics(path) if "train/loss" in r]
    if not losses:
        raise metrics_writer.MetricsError(
            f"{path} holds no training loss of this finished run, whose log it is; put it back"
        )
    return {"loss_first": losses[0], "loss_last": losses[-1]}


def answer_test_set(
    config: ConfigDict,
    workdir: Path,
    state: State,
    generator: inference.Generator,
    test: MixtureComponent,
    is_main_process: bool = True,
) -> dict[str, Any]:
    """Answers for held-out clips; their hit rate, the control with shuffled features, ceilings.

    Where clips name no true answer, or no label type of the model has one, the answers are written
    without a score, and `not_scored` says why. All processes compute the answers, which takes all
    devices; the main process writes them.
    """
    trainable, dataset, processor = state["trainable"], test.dataset, test.processor
    question = test_question(config)
    scored = question in inference.SCORED
    answers = generator.answer(trainable, dataset, question)
    labels = inference.read_labels(processor, answers, question) if scored else None
    if is_main_process:
        inference.write_predictions(workdir, dataset, answers, labels)
    result: dict[str, Any] = {"clips": len(dataset), "answers_cut": answers.cut}
    if labels is None:
        return result | {"not_scored": f"config.label={config.label} has no answer to score"}
    if without := inference.without_truth(dataset, question):
        return result | {"not_scored": f"{without} of {len(dataset)} clips name no true answer"}
    result |= inference.score_labels(dataset, labels, question)
    if processor.features:
        order = np.random.default_rng(config.seed).permutation(len(dataset))
        shuffled = inference.read_labels(
            processor, generator.answer(trainable, dataset, question, feature_from=order), question
        )
        scores = inference.score_labels(dataset, shuffled, question)
        result["hit_features_shuffled"] = scores["hit"]
    ceilings = dataset.ceilings(processor.mode.name)
    if ceilings and question != "sentiment":
        result["ceilings"] = ceilings
    return result


def final_report(config: ConfigDict, workdir: Path, result: dict[str, Any]) -> str:
    """The closing words: scores beside what is possible, what was written, what to do next."""
    rows = [("loss, first and last", f"{result['loss_first']:.3f} -> {result['loss_last']:.3f}")]
    rows.append(("best on validation", f"the checkpoint of step {result['best_step']}"))
    if "samples_per_s" in result:
        rows.append(("samples/s", f"{result['samples_per_s']:.0f}"))
    if "hit" in result:
        ceilings = result.get("ceilings", {})
        best = ceilings.get(build.input_mode(config).name)
        share = f"  ({result['hit'] / best:.0%} of the ceiling)" if best else ""
        error = math.sqrt(result["hit"] * (1 - result["hit"]) / result["clips"])
        rows.append(
            (f"hit rate, {result['clips']:,} clips", f"{result['hit']:.3f} +- {error:.3f}{share}")
        )
        rows.append(("labels per clip", f"{result['labels_per_clip']:.2f} (the first one counts)"))
        if "hit_features_shuffled" in result:
            rows.append(("control: shuffled features", f"{result['hit_features_shuffled']:.3f}"))
        rows += [
            (f"ceiling with {mode.replace('_', ' + ')}", f"{value:.3f}")
            for mode, value in ceilings.items()
        ]
        if result["answers_cut"]:
            rows.append(("answers cut at the token limit", str(result["answers_cut"])))
    table = metrics_writer.summary_table(rows, title="Result")
    answers = ", predictions.jsonl, truth.csv" if "clips" in result else ""
    return f"""{table}

What you have now, in {workdir}:
  {"result.json" + answers:<42}  the result{" and every answer behind it" if answers else ""}
  metrics.jsonl, tensorboard/, run.png        the training run
  checkpoints/                                adapters, fusion, optimizer state

What to run next:
  python -m affectgpt_jax.train --config.fusion=qformer --workdir=runs/qformer
  python -m affectgpt_jax.train --config.input=face_text --workdir=runs/face_text
  python -m affectgpt_jax.train --config=affectgpt_qwen25_7b --config.llm=DIR \\
      --config.data.train=RECORDS --workdir=runs/paper      (the paper's recipe; see README.md)"""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; ends with status 1 and one sentence for trouble that the user can mend."""
    workdir = launch = None
    own = flags.FlagValues()
    distributed.define_flags(own)
    flags.DEFINE_bool(
        "fallback",
        False,
        "where the newest checkpoint is damaged, set it aside and resume from one that is whole",
        flag_values=own,
    )
    try:
        config, workdir = parse_command_line(sys.argv[1:] if argv is None else argv, __doc__, own)
        launch = distributed.find_launch(own)
        runtime.use_compilation_cache()
        xla_options.reserve_gpu_memory()
        facts = described(config) | {"workdir": str(workdir), "jax": jax.__version__}
        with distributed.join(launch, facts, own.join_timeout, print) as group:
            with lock_workdir(workdir) if group.is_main_process else contextlib.nullcontext():
                train(config, workdir, group, own.fallback)
    except USER_ERRORS as error:
        leave(launch, f"error: {error}")
    except CheckpointWriteError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        # Orbax's threads still hold half of the checkpoint and would fill the terminal at exit.
        os._exit(1)
    except jax.errors.JaxRuntimeError as error:
        if not runtime.out_of_memory(error):
            raise
        leave(
            launch,
            "error: the device has no memory left; lower config.batch_size, raise "
            "config.gradient_accumulation_steps, or let config.remat=full compute more again",
        )
    except BrokenPipeError:  # whoever read the output has left; there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        leave(launch, 1)
    except OSError as error:  # a full disk, a folder that may not be written
        leave(
            launch,
            f"error: {error.filename or workdir}: {error.strerror or error}; the run needs a "
            "--workdir that it can write to, with room",
        )
    except KeyboardInterrupt:
        leave(launch, "interrupted; the same command resumes from the newest checkpoint")


def leave(launch: distributed.Launch | None, status: str | int) -> NoReturn:
    """End with a status, or with 1 and a sentence."""
    if launch is None:
        raise SystemExit(status) from None
    if isinstance(status, str):
        print(f"process {launch.process_id} of {launch.num_processes}: {status}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    # JAX's own way out waits for the other processes, which may hang in a collective.
    os._exit(status if isinstance(status, int) else 1)


if __name__ == "__main__":
    silence_threads()
    runtime.keep_freed_memory()
    main()
