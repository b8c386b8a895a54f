"""The loop that every trainer runs: resume, step, log, validate, save, stop.

    session = Session(config, workdir, group)
    state, start = initial_state(checkpoints, program.state, init, session)
    with session.running(start), checkpoints:
        state, totals = run_steps(session, steps, state, base, data, mesh, ...)

The device never waits for the host, which is never more than `STEPS_IN_FLIGHT` steps ahead of it:
batches come from Grain's threads and go to the device one step ahead, and the metrics of a step are
read while the next one runs.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from affectgpt_jax.common.errors import UserError
from affectgpt_jax.training import devices, metrics_writer, run_picture, sharding
from affectgpt_jax.training.checkpoints import Checkpoints
from affectgpt_jax.training.distributed import ProcessGroup
from affectgpt_jax.training.step import State, nonfinite_leaves
from affectgpt_jax.training.stopping import Stopped, StopSignals, Watchdog

# Steps that may be dispatched before the first of them is waited for: with one running and one
# queued the device is never idle, and more would only hold more batches in its memory.
STEPS_IN_FLIGHT = 2

# `trainable -> scores, samples`: metrics by name, among them "val/loss", and some answers to show.
Validation = Callable[[Any], tuple[dict[str, float], Sequence[metrics_writer.Sample]]]


class TrainingError(UserError, RuntimeError):
    """Training cannot go on."""


class TrainingData(Protocol):
    """Batches by the number of their step, from 0, as `data.pipeline.TrainPipeline` has them."""

    def batches(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """This process's rows of the batches of steps `start ... stop - 1`."""

    def samples(self, step: int) -> np.ndarray:
        """The clips of a step's batch, over all processes: tokens and supervised ones, `[N, 2]`."""

    def component_counts(self, step: int) -> dict[str, int]:
        """Clips of a step's batch by the component of a mixture that they come from."""


class Session:
    """What surrounds the steps of a run: clock, progress, metrics, profiler, signals, watchdog.

    Args:
        config: of the run.
        workdir: of the run.
        group: its processes; the main process alone prints and writes.
        shown: metrics of a step that its line shows beside the loss, and what it calls them.

    Raises:
        ValueError: `config.profile_steps` is no range of steps.
        MetricsError: Weights & Biases is asked for, but not installed.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        group: ProcessGroup,
        shown: Mapping[str, str] | None = None,
    ):
        metrics_writer.check_wandb(config.wandb_project)
        self.config, self.workdir, self.group, self.shown = config, workdir, group, shown or {}
        self.clock = metrics_writer.TimeBuckets(outside="setup")
        self.progress = metrics_writer.Progress(config.steps, enabled=group.is_main_process)
        self.say = self.progress.line
        profiled = config.profile_steps if group.is_main_process else ""
        self.profiler = metrics_writer.Profiler(profiled, workdir, config.steps)
        self.stop = StopSignals(self.say)
        self.watchdog = Watchdog(config.step_timeout, group.fail)
        self.writer: metrics_writer.MetricsWriter | None = None

    def pulse(self) -> None:
        """To be called between the batches of an evaluation, which may take long.

        Raises:
            Stopped: a signal asks the run to end.
        """
        self.watchdog.beat("a batch of an evaluation")
        self.stop.check()

    @contextlib.contextmanager
    def running(self, start: int) -> Iterator[None]:
        """Around the steps, from a step on: metrics are written, signals and hangs are noticed."""
        self.clock.outside("idle")
        self.writer = metrics_writer.MetricsWriter(
            self.workdir,
            resume_step=start,
            enabled=self.group.is_main_process,
            wandb_project=self.config.wandb_project,
            config=self.config.to_dict(),
        )
        with self.writer, self.progress, self.profiler, self.stop, self.watchdog:
            yield

    def draw(self, step: int, references: Mapping[str, float]) -> None:
        """Draw `run.png` of what was logged; inside `running`, after the last step.

        Args:
            step: that the run has reached.
            references: see `run_picture.plot_run`.
        """
        if self.group.is_main_process:
            png = self.workdir / "run.png"
            run_picture.plot_run(self.workdir / "metrics.jsonl", png, references=references)
            self.writer.write_picture(step, png)


def initial_state(
    checkpoints: Checkpoints,
    abstract_state: State,
    init: Callable[[], State],
    session: Session,
    *,
    fallback: bool = False,
    allow_other: Collection[str] = (),
) -> tuple[State, int]:
    """The state that a run goes on from, and its step.

    1. The newest checkpoint of the workdir, after a look at its files.
    2. Where that is damaged: refused by name, or with `fallback` the newest one that is whole.
    3. Where there is none: `init()`.

    Raises:
        CheckpointError: the newest checkpoint is damaged, is that of another model or base, or was
            trained with other inputs (`checkpoints.check_inputs`).
    """
    found = session.group.from_main_process(
        lambda: checkpoints.step_to_resume(fallback, session.say, allow_other)
    )
    if found is None:
        return init(), 0
    state = checkpoints.restore(found, abstract_state)
    session.say(f"resumed from the checkpoint of step {found}")
    return state, found


def run_steps(
    session: Session,
    steps: Mapping[int, Callable],
    state: State,
    base: Any,
    data: TrainingData,
    mesh: Mesh,
    checkpoints: Checkpoints,
    validate: Validation,
    start: int,
    flops: Callable[[np.ndarray], int],
    finished: Callable[[int], bool] = lambda step: False,
) -> tuple[State, dict[str, float]]:
    """Run the updates after `start` up to `config.steps`, or to where the run is finished.

    Args:
        session: of the run, inside `Session.running`.
        steps: the compiled update for every row length.
        state: of step `start`; consumed.
        base: frozen weights.
        data: the batches.
        mesh: where batches go.
        checkpoints: where states are saved, every `config.checkpoint_every` steps and at the end.
        validate: before each of these.
        start: the step to go on from.
        flops: model FLOPs of an update on these samples, `[N, 2]`.
        finished: whether a run that has made so many steps ends there.

    Returns:
        The last state, and the mean rates of this process's life (`StepReporter.totals`).

    Raises:
        Stopped: a signal has ended the run, after everything was saved.
        TrainingError: a loss or the state is not finite.
    """
    config, clock, stop = session.config, session.clock, session.stop
    reporter = StepReporter(
        config,
        session.workdir,
        session.writer,
        session.progress,
        checkpoints,
        flops=flops,
        devices=mesh.size,
        peak_flops=devices.peak_flops(mesh.devices.flat[0].device_kind, config.dtype),
        shown=session.shown,
        resumed=start > 0,
    )

    def ends(step: int) -> bool:
        return step == config.steps or finished(step)

    if start and (start % config.checkpoint_every == 0 or ends(start)):
        _validate_late(session, reporter, checkpoints, validate, state, start)
    if start and ends(start):
        return state, reporter.totals()

    def rescue() -> str:
        """Save the last state that is finished; it may wait for ever for a step that is not."""
        reached = int(state["step"])
        if submitted < reached:  # it is the next batch that does not come
            counts = data.component_counts(step - 1)
            reporter.submit(step, metrics, data.samples(step - 1), StepTimes(0.0, 0.0), counts)
        reporter.flush()
        reporter.require_finite_state(step, state)
        if reached > (checkpoints.latest_step() or 0):
            checkpoints.save(reached, state, None)
            checkpoints.wait()
        return f"step {reached} is saved"

    if session.group.num_processes == 1:  # of several, one that hangs cannot save alone
        session.watchdog.rescue = rescue
    batches = data.batches(start, config.steps)
    with clock.measure("data_wait"):
        batch = next(batches, None)  # None where no step is left
    on_device = batch and sharding.shard_batch(mesh, batch)
    step = submitted = start
    for step in range(start + 1, config.steps + 1):
        session.profiler.step(step)
        # A step moves nothing between host and device but what is moved by name: a NumPy array or a
        # metric that slips in would wait for the device. Validation and saving may wait.
        with clock.measure("step"), jax.transfer_guard("disallow"):
            run = steps[batch["tokens"].shape[1]]
            began = time.perf_counter()
            state, metrics = run(state, base, on_device)
            dispatched = time.perf_counter()
            with clock.measure("data_wait"):
                batch = next(batches, None)
            fetched = time.perf_counter()
            on_device = batch and sharding.shard_batch(mesh, batch)
            times = StepTimes(dispatched - began, fetched - dispatched)
            counts = data.component_counts(step - 1)
            reporter.submit(step, metrics, data.samples(step - 1), times, counts)
            submitted = step
            session.watchdog.beat(f"step {step}")
        stopping = stop.reached()
        if stopping or step % config.checkpoint_every == 0 or ends(step):
            with clock.measure("step"):
                reporter.flush()
                reporter.require_finite_state(step, state)
            # A run that is told to stop saves, and validates when it goes on.
            scores = None if stopping else _validated(session, reporter, validate, state, step)
            with clock.measure("save"):
                checkpoints.save(step, state, scores and scores["val/loss"])
            if scores is None:
                checkpoints.wait()
                session.say(f"stopped after step {step}; the same command goes on from there")
                raise stop.stopped()
            reporter.skip_pause()
        if ends(step):
            break
    session.profiler.step(step + 1)  # ends a trace that reaches to the last step
    with clock.measure("save"):
        checkpoints.wait()
    session.watchdog.rescue = None  # it holds the state
    return state, reporter.totals()


def _validated(
    session: Session,
    reporter: StepReporter,
    validate: Validation,
    state: State,
    step: int,
) -> dict[str, float] | None:
    """Scores of a state, logged; None if the run is told to stop meanwhile."""
    with session.clock.measure("evaluate"):
        try:
            scores, samples = validate(state["trainable"])
        except Stopped:
            return None
        session.writer.write(step, scores)
        session.writer.write_samples(step, samples)
        reporter.require_finite(step, scores)
        session.say(f"step {step}: {' '.join(f'{k} {v:.4f}' for k, v in scores.items())}")
        return scores


def _validate_late(
    session: Session,
    reporter: StepReporter,
    checkpoints: Checkpoints,
    validate: Validation,
    state: State,
    step: int,
) -> None:
    """Validate a checkpoint that was saved without it, since its run was told to stop.

    Raises:
        Stopped: this run is told to stop as well.
    """
    if session.group.from_main_process(lambda: checkpoints.val_loss(step)) is not None:
        return
    scores = _validated(session, reporter, validate, state, step)
    if scores is None:
        raise session.stop.stopped()
    if session.group.is_main_process:
        checkpoints.set_val_loss(step, scores["val/loss"])


# Batches differ: so many losses together are compared with the first.
LOSSES_COMPARED = 16


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
        flops: model FLOPs of an update on these samples, `[N, 2]`.
        devices: that share an update.
        peak_flops: FLOP/s of each; None where it is not known.
        shown: metrics that the progress line shows beside the loss, and what it calls them.
        resumed: whether the run has made steps before, which its `metrics.jsonl` has.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        writer: metrics_writer.MetricsWriter,
        progress: metrics_writer.Progress,
        checkpoints: Checkpoints,
        *,
        flops: Callable[[np.ndarray], int],
        devices: int,
        peak_flops: float | None,
        shown: Mapping[str, str] | None = None,
        resumed: bool = False,
    ):
        self._config, self._workdir, self._shown = config, workdir, shown or {}
        self._writer, self._progress, self._checkpoints = writer, progress, checkpoints
        self._count_flops, self._devices, self._peak_flops = flops, devices, peak_flops
        self._throughput = metrics_writer.Throughput(devices=devices, peak_flops=peak_flops)
        self._pending: deque[tuple] = deque()
        self._first_loss: float | None = None
        # The loss of a reward has no reason to fall.
        compared = "rl" not in config
        if compared and resumed:
            try:
                log = workdir / "metrics.jsonl"
                self._first_loss = metrics_writer.first_and_last_loss(log)["loss_first"]
            except (OSError, metrics_writer.MetricsError):  # which a result is refused for
                compared = False
        self._losses = deque[float](maxlen=LOSSES_COMPARED) if compared else None
        self._wait_s = self._dispatch_s = 0.0  # since the last report
        self._samples = self._tokens = self._flops = 0
        self._seconds = 0.0
        self._finished = time.perf_counter()

    def submit(
        self,
        step: int,
        metrics: dict[str, jax.Array],
        samples: np.ndarray,
        times: StepTimes,
        counts: Mapping[str, int],
    ) -> None:
        """Hand in a step that was just dispatched; waits until few enough are in flight.

        Args:
            step: its number, from 1.
            metrics: device scalars of the train step, read `STEPS_IN_FLIGHT - 1` steps later.
            samples: tokens and supervised ones of the clips of its batch, `[N, 2]`, over all
                processes.
            times: what the loop has waited for since the step before was handed in.
            counts: clips from each component of a mixture; one alone is not logged.

        Raises:
            TrainingError: a step before had a loss or gradient that is not finite.
        """
        self._pending.append((step, metrics, samples, counts))
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
        step, metrics, samples, counts = self._pending.popleft()
        asked = time.perf_counter()
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        device_s = time.perf_counter() - asked
        scalars = {f"train/{name}": value for name, value in values.items()}
        if len(counts) > 1:
            scalars |= {f"mixture/{name}": clips for name, clips in counts.items()}
        if step % self._config.log_every == 0 or step in (1, self._config.steps):
            rates = self._throughput.rates()
            self._writer.write(step, scalars | {f"rate/{k}": v for k, v in rates.items()})
        self.require_finite(step, scalars)
        now = time.perf_counter()
        step_s, self._finished = now - self._finished, now
        clips, tokens, flops = len(samples), int(samples[:, 0].sum()), self._count_flops(samples)
        self._samples, self._tokens = self._samples + clips, self._tokens + tokens
        self._flops, self._seconds = self._flops + flops, self._seconds + step_s
        host_s = step_s - self._wait_s - self._dispatch_s - device_s
        self._throughput.update(clips, tokens, step_s, self._wait_s, host_s, flops)
        self._wait_s = self._dispatch_s = 0.0
        others = {name: values[metric] for metric, name in self._shown.items()}
        if self._rises(values["loss"]):
            others["above the first,"] = self._first_loss
        self._progress.update(step, values["loss"], self._throughput.rates(), others)

    def _rises(self, loss: float) -> bool:
        """Whether the mean of the last losses, this one included, is above the first."""
        if self._losses is None:
            return False
        if self._first_loss is None:
            self._first_loss = loss
        self._losses.append(loss)
        full = len(self._losses) == self._losses.maxlen
        return full and statistics.fmean(self._losses) > self._first_loss

    def skip_pause(self) -> None:
        """Leave the time since the last step, spent on something else, out of the rates."""
        self._finished = time.perf_counter()

    def totals(self) -> dict[str, float]:
        """Means over all steps of this process's life; empty where none learned from anything.

        `samples_per_s` and `tokens_per_s` of all devices together; `tflop_per_s_per_device` and,
        where the device's peak is known, `mfu`.
        """
        if not self._flops:
            return {}
        found = metrics_writer.compute_rates(
            self._flops, self._seconds, self._devices, self._peak_flops
        )
        return {
            "samples_per_s": self._samples / self._seconds,
            "tokens_per_s": self._tokens / self._seconds,
            "tflop_per_s_per_device": found.pop("TFLOP/s/device"),
            **found,
        }

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
