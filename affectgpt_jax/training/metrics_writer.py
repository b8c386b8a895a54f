"""What a run tells about itself: metrics, rates, a time account, a live line, traces.

Each class does one of these and knows nothing of the others, so that the training loop can be
read as a list of what it reports. Clocks and streams are arguments: nothing here is global.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import secrets
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, SupportsFloat, TypedDict

import jax

from affectgpt_jax.common.errors import UserError
from affectgpt_jax.common.files import atomic_write, decode, naming, open_to_append, write_text
from affectgpt_jax.common.json import parse_json
from affectgpt_jax.common.progress import LiveLine, duration

Clock = Callable[[], float]


class MetricsError(UserError, RuntimeError):
    """Something that a run reports to is not there, or is damaged."""


# --- metrics on disk ----------------------------------------------------------------------------


# Clips of a validation that are shown.
SAMPLES = 8
# Seconds between two times that TensorBoard sees what is new.
_FLUSH_S = 15.0


class Sample(NamedTuple):
    """A clip of validation: its name, what the model answers, and what is true."""

    clip: str
    answer: str
    truth: str


class MetricsWriter:
    """Writes scalars to `workdir/metrics.jsonl` and, for TensorBoard, to `workdir/tensorboard`.

    TensorBoard also gets samples, and Weights & Biases all of it, the config and pictures too.

    A line of `metrics.jsonl` is one JSON object: `step`, `time_s` (s since the run began; a
    resumed run goes on from the last line it keeps) and the scalars. JSON has no NaN: a value
    that is not finite becomes null, with its kind beside it as `<name>_nonfinite`, one of
    "nan", "inf" and "-inf".

    Args:
        workdir: folder of the run, made if it is not there.
        resume_step: the step of the checkpoint that this run continues. What an earlier run wrote
            for later steps is dropped, so that the stream reads as if nothing had happened;
            0 is a fresh start and drops everything.
        enabled: False on every process but the first; nothing is then written.
        clock: seconds, from any origin.
        wandb_project: where not empty, all also goes to this project of Weights & Biases.
        config: of the run, for Weights & Biases.

    Raises:
        MetricsError: the `metrics.jsonl` to continue is damaged (see `read_metrics`).
        MetricsError: Weights & Biases is asked for, but not installed.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        resume_step: int = 0,
        enabled: bool = True,
        clock: Clock = time.perf_counter,
        wandb_project: str = "",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._enabled = enabled
        if not enabled:
            return
        workdir.mkdir(parents=True, exist_ok=True)
        metrics_file = workdir / "metrics.jsonl"
        self._clock = clock
        self._start_s = clock() - _drop_steps_after(resume_step, metrics_file)
        self._lines = open_to_append(metrics_file)
        self._sinks = [_TensorBoard(workdir / "tensorboard", resume_step)]
        if wandb_project:
            self._sinks.append(_WeightsAndBiases(workdir, wandb_project, config or {}))

    def write(self, step: int, scalars: Mapping[str, SupportsFloat]) -> None:
        """Appends one line and flushes it; a device scalar is waited for.

        Args:
            step: the step that the scalars belong to; an earlier one than the last may follow.
            scalars: values by name, such as "train/loss".

        Raises:
            ValueError: a scalar is named `step` or `time_s`, or the writer is closed.
        """
        if not self._enabled:
            return
        if reserved := scalars.keys() & {"step", "time_s"}:
            raise ValueError(f"step {step}: a metric cannot be called {sorted(reserved)[0]!r}.")
        values = {name: float(value) for name, value in scalars.items()}
        record = {"step": int(step), "time_s": round(self._clock() - self._start_s, 6)}
        for name, value in values.items():
            record |= _json_scalar(name, value)
        self._lines.write(json.dumps(record, allow_nan=False) + "\n")
        self._lines.flush()
        for sink in self._sinks:
            sink.write(step, values)

    def write_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Shows some answers beside the truth, as `val/answers`, in all but `metrics.jsonl`."""
        if self._enabled and samples:
            for sink in self._sinks:
                sink.write_samples(step, samples)

    def write_picture(self, step: int, png: Path) -> None:
        """Shows a picture, by the name of its file, where pictures are kept."""
        if self._enabled:
            for sink in self._sinks:
                sink.write_picture(step, png)

    def close(self) -> None:
        """Flushes and closes all files; a second call does nothing."""
        if self._enabled:
            # Each is closed, whatever a full disk makes of the others.
            with contextlib.ExitStack() as stack:
                for sink in self._sinks:
                    stack.callback(sink.close)
                self._lines.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _TensorBoard:
    """Events in a folder, written by tensorboardX: TensorFlow is not needed.

    Whoever has an event writes it. The thread that does so behind tensorboardX's `SummaryWriter`
    ends on a full disk, and the run then waits for it without an end.
    """

    def __init__(self, folder: Path, resume_step: int) -> None:
        # Imported late: it takes longer than JAX, and only the first process writes events.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary
        from tensorboardX.summary import text

        self._event, self._summary, self._text = Event, Summary, text
        self._folder, self._flushed_s = folder, float("-inf")
        folder.mkdir(parents=True, exist_ok=True)
        # File names have a resolution of one second: a quick restart must not overwrite the events
        # that it continues.
        self._events = EventsWriter(str(folder / "events"), f".from{resume_step:09d}")
        # TensorBoard hides older events from this step on.
        start = SessionLog(status=SessionLog.START)
        self._add(resume_step + 1 if resume_step else 0, session_log=start)

    def _add(self, step: int, **content: Any) -> None:
        with naming(self._folder):
            self._events.write_event(self._event(step=step, wall_time=time.time(), **content))
            if time.monotonic() - self._flushed_s > _FLUSH_S:
                self._events.flush()
                self._flushed_s = time.monotonic()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        # One event for each value would be several times as many bytes.
        entries = [self._summary.Value(tag=tag, simple_value=v) for tag, v in values.items()]
        self._add(step, summary=self._summary(value=entries))

    def write_samples(self, step: int, samples: Sequence[Sample]) -> None:
        # Text is Markdown there. What is indented is shown as it is, whatever a model writes.
        lines = [line for sample in samples for line in _in_lines(sample)]
        shown = "\n".join(f"    {line}" for line in lines)
        self._add(step, summary=self._text("val/answers", shown))

    def write_picture(self, step: int, png: Path) -> None:
        """Nothing: TensorBoard draws the curves itself."""

    def close(self) -> None:
        with naming(self._folder):
            self._events.close()


def check_wandb(project: str) -> None:
    """Refuse a project of Weights & Biases, unless it is "", where the package is missing.

    Raises:
        MetricsError: saying how to install it.
    """
    if not project:
        return
    try:
        import wandb  # noqa: F401
    except ImportError:
        raise MetricsError(
            f"config.wandb_project={project!r} needs the package wandb; "
            "pip install 'affectgpt-jax[wandb]', or leave the project empty"
        ) from None


class _WeightsAndBiases:
    """A run of Weights & Biases, which a resumed run continues."""

    def __init__(self, workdir: Path, project: str, config: Mapping[str, Any]) -> None:
        check_wandb(project)
        import wandb

        self._wandb = wandb
        identity = workdir / "wandb_id"
        if not identity.exists():
            write_text(identity, secrets.token_hex(8))
        self._run = wandb.init(
            project=project,
            id=identity.read_text(encoding="utf-8"),
            resume="allow",
            name=workdir.name,
            dir=str(workdir),
            config=dict(config),
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if step < self._run.step:  # which it would drop
            self._run.summary.update(values)
        else:
            self._run.log(dict(values), step=step)

    def write_samples(self, step: int, samples: Sequence[Sample]) -> None:
        table = self._wandb.Table(columns=list(Sample._fields), data=[list(s) for s in samples])
        self._run.log({"val/answers": table}, step=step)

    def write_picture(self, step: int, png: Path) -> None:
        self._run.log({png.stem: self._wandb.Image(str(png))}, step=step)

    def close(self) -> None:
        self._run.finish()


def _in_lines(sample: Sample) -> Iterator[str]:
    yield sample.clip
    for name, text in (("answer", sample.answer), ("truth", sample.truth)):
        for number, line in enumerate(text.splitlines() or [""]):
            yield f"  {'' if number else name:<8}{line}"


def _json_scalar(name: str, value: float) -> dict[str, float | str | None]:
    if math.isfinite(value):
        return {name: value}
    return {name: None, f"{name}_nonfinite": str(value)}


def _drop_steps_after(resume_step: int, metrics_file: Path) -> float:
    """Rewrites the file without later steps; returns the `time_s` of its last line, or 0."""
    if resume_step == 0 or not metrics_file.exists():
        metrics_file.unlink(missing_ok=True)
        return 0.0
    kept = [record for record in read_metrics(metrics_file) if record["step"] <= resume_step]
    # A run that is killed at this point loses no line.
    with atomic_write(metrics_file, "w") as lines:
        lines.writelines(json.dumps(record) + "\n" for record in kept)
    return kept[-1].get("time_s", 0.0) if kept else 0.0


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads a `metrics.jsonl`, one dict a line, in the order of the file.

    A last line that was cut off while it was written is left out.

    Raises:
        FileNotFoundError: there is no such file.
        MetricsError: any other line is not a JSON object with an integer `step`.
    """
    whole, newline, tail = path.read_bytes().rpartition(b"\n")
    lines = decode(whole, str(path), error=MetricsError).split("\n") if newline else []
    records = [_parse_record(line, f"{path}, line {n}") for n, line in enumerate(lines, start=1)]
    # Every whole line ends in a newline, so what follows the last one may be half a line.
    with contextlib.suppress(MetricsError):
        records.append(_parse_record(tail, str(path)))
    return records


def first_and_last_loss(path: Path) -> dict[str, float]:
    """`loss_first` and `loss_last` of the whole run, resumed or not, from its `metrics.jsonl`.

    Raises:
        MetricsError: the log is gone or damaged.
    """
    _, losses = _losses(path)
    return {"loss_first": losses[0], "loss_last": losses[-1]}


def divergence(path: Path) -> str:
    """How a loss that should have fallen has not, in a sentence without its end; empty if it has.

    That is: over its last twentieth it is above the first one, or has lost half of what it had
    gained. It would have been NaN no longer than a step.

    Args:
        path: a `metrics.jsonl`.

    Raises:
        MetricsError: the log is gone or damaged.
    """
    steps, losses = _losses(path)
    part = max(1, len(losses) // 20)
    first, last = losses[0], statistics.fmean(losses[-part:])
    means = [statistics.fmean(losses[i : i + part]) for i in range(len(losses) - part + 1)]
    lowest = min(means)
    if last > first:
        return f"the training loss ended at {last:.4g}, above the {first:.4g} that it began with"
    # Single batches differ by as much.
    if part > 1 and last - lowest > (first - lowest) / 2:
        step = steps[means.index(lowest)]
        return (
            f"the training loss fell from {first:.4g} to {lowest:.4g} about step {step}, and rose "
            f"again to {last:.4g}"
        )
    return ""


def _losses(path: Path) -> tuple[list[int], list[float]]:
    found = [(r["step"], r.get("train/loss")) for r in read_metrics(path)]
    found = [(step, loss) for step, loss in found if loss is not None]  # null: not finite
    if not found:
        raise MetricsError(
            f"{path} holds no training loss of this finished run, whose log it is; put it back"
        )
    return [step for step, _ in found], [loss for _, loss in found]


class _Record(TypedDict):
    """A line of `metrics.jsonl`; its other keys are the names of metrics."""

    step: int


def _parse_record(line: bytes | str, where: str) -> dict[str, Any]:
    advice = "mend or delete that line"
    return parse_json(line, where, _Record, error=MetricsError, advice=advice)


# --- where the time goes ------------------------------------------------------------------------


class _Step(NamedTuple):
    samples: int
    tokens: int
    flops: int
    step_s: float
    data_wait_s: float
    host_s: float


class Throughput:
    """Rates over the last steps.

    Args:
        window: how many steps the rates cover.
        skip: how many first steps to leave out: they compile.
        devices: that share the work.
        peak_flops: FLOP/s of a device, of which the MFU is the share; None where it is not known.
    """

    def __init__(
        self, window: int = 20, skip: int = 1, devices: int = 1, peak_flops: float | None = None
    ) -> None:
        self._steps: deque[_Step] = deque(maxlen=window)
        self._to_skip = skip
        self._devices, self._peak_flops = devices, peak_flops

    def update(
        self,
        samples: int,
        tokens: int,
        step_s: float,
        data_wait_s: float,
        host_s: float,
        flops: int = 0,
    ) -> None:
        """Adds one step.

        Args:
            samples: samples trained on, over all processes.
            tokens: tokens that are not padding, over all processes.
            step_s: s from the end of the step before to the end of this one.
            data_wait_s: s of `step_s` during which the step had no batch to work on.
            host_s: s of `step_s` in which the loop neither waited, for a batch or for the device,
                nor dispatched the step.
            flops: model FLOPs of the step, over all processes (`models.flops`); 0 is not known.
        """
        if self._to_skip > 0:
            self._to_skip -= 1
            return
        self._steps.append(_Step(samples, tokens, flops, step_s, data_wait_s, host_s))

    def rates(self) -> dict[str, float]:
        """Returns `samples/s`, `tokens/s`, `TFLOP/s/device` and `mfu` (a share of 1), as far as
        they are known, and means of `step_ms`, `data_wait_ms` and `host_ms`.

        The dict is empty until a step has been counted: no rate is better than a made-up one.
        """
        total_s = sum(step.step_s for step in self._steps)
        if total_s <= 0:
            return {}
        data_wait_s = sum(step.data_wait_s for step in self._steps)
        host_s = sum(step.host_s for step in self._steps)
        return {
            "samples/s": sum(step.samples for step in self._steps) / total_s,
            "tokens/s": sum(step.tokens for step in self._steps) / total_s,
            **compute_rates(
                sum(step.flops for step in self._steps), total_s, self._devices, self._peak_flops
            ),
            "step_ms": 1e3 * total_s / len(self._steps),
            "data_wait_ms": 1e3 * data_wait_s / len(self._steps),
            "host_ms": 1e3 * host_s / len(self._steps),
        }


def compute_rates(
    flops: int, seconds: float, devices: int, peak_flops: float | None
) -> dict[str, float]:
    """`TFLOP/s/device` and, where the peak of a device in FLOP/s is known, `mfu`; {} without FLOPs.

    Model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B) is the share of the peak that a
    device would need for the FLOPs of the model alone.
    """
    if not flops:
        return {}
    rate = flops / seconds / devices
    share = {"mfu": rate / peak_flops} if peak_flops else {}
    return {"TFLOP/s/device": rate / 1e12} | share


class TimeBuckets:
    """Accounts for all wall time since construction: every instant is in exactly one bucket.

    ```
    buckets = TimeBuckets()
    with buckets.measure("step"):
        ...
        with buckets.measure("save"):  # counts as save, not as step
            ...
    print(buckets.table())
    ```

    Time outside every `measure` goes to one bucket of its own. For one thread.

    Args:
        clock: seconds, from any origin.
        outside: that bucket, until `outside` names another.
    """

    NAMES = ("setup", "compile", "data_wait", "step", "save", "evaluate", "idle")

    def __init__(self, clock: Clock = time.perf_counter, outside: str = "idle") -> None:
        self._clock = clock
        self._seconds = dict.fromkeys(self.NAMES, 0.0)
        self._current = outside
        self._since_s = clock()

    def outside(self, name: str) -> None:
        """From now on, time outside every `measure` is `name`; call it outside of all."""
        self._switch(name)

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Counts the time within as `name`, and goes back to the enclosing bucket after it.

        Raises:
            ValueError: there is no such bucket.
        """
        if name not in self._seconds:
            raise ValueError(f"no time bucket {name!r}; there are {', '.join(self.NAMES)}.")
        enclosing = self._switch(name)
        try:
            yield
        finally:
            self._switch(enclosing)

    def report(self) -> dict[str, float]:
        """Returns s by bucket until now; their sum is the wall time."""
        self._switch(self._current)
        return dict(self._seconds)

    def table(self) -> str:
        """Returns `report()` as a text table with each bucket's share of the wall time."""
        seconds = self.report()
        wall_s = sum(seconds.values())
        rows = [*seconds.items(), ("wall", wall_s)]
        share = 100 / wall_s if wall_s else 0.0
        return summary_table(
            [(name, f"{s:10.1f} s  {s * share:5.1f} %") for name, s in rows],
            title="Where the time went",
        )

    def _switch(self, name: str) -> str:
        """Closes the running bucket, opens `name` and returns the one that was running."""
        now_s = self._clock()
        self._seconds[self._current] += now_s - self._since_s
        self._since_s = now_s
        before, self._current = self._current, name
        return before


# --- what a person watches ----------------------------------------------------------------------


class Progress(LiveLine):
    """The state of a run in one line: step, loss, rates and the time that is left.

    The last step is always shown.

    Args:
        total_steps: the step at which the run ends.
        options: of `LiveLine`.
    """

    def __init__(self, total_steps: int, **options: Any) -> None:
        super().__init__(**options)
        self._total_steps = total_steps

    def update(
        self,
        step: int,
        loss: SupportsFloat,
        rates: Mapping[str, float],
        others: Mapping[str, float] | None = None,
    ) -> None:
        """Shows a finished step, if it is time to.

        Args:
            step: how many steps are done.
            loss: of that step; a device scalar is waited for only when it is shown.
            rates: from `Throughput.rates()`; rates that are missing are left out of the line.
            others: of that step, shown behind the loss.
        """
        self.show(
            lambda: _progress_fields(step, self._total_steps, float(loss), rates, others or {}),
            last=step >= self._total_steps,
        )


def _progress_fields(
    step: int,
    total_steps: int,
    loss: float,
    rates: Mapping[str, float],
    others: Mapping[str, float],
) -> list[str]:
    fields = [f"step {step}/{total_steps}", f"loss {loss:#.4g}"]
    fields += [f"{name} {_short(value)}" for name, value in others.items()]
    if "samples/s" in rates:
        fields.append(f"{_short(rates['samples/s'])} samples/s")
    if "tokens/s" in rates:
        fields.append(f"{_short(rates['tokens/s'])} tokens/s")
    if "mfu" in rates:
        fields.append(f"MFU {rates['mfu']:.1%}")
    if "step_ms" in rates:
        fields.append(f"{_milliseconds(rates['step_ms'])} ms/step")
    if "TFLOP/s/device" in rates:
        fields.append(f"{_short(rates['TFLOP/s/device'])} TFLOP/s/device")
    if "data_wait_ms" in rates:
        fields.append(f"data {_milliseconds(rates['data_wait_ms'])} ms")
    if "step_ms" in rates:
        # At the current rate: evaluations and checkpoints still to come are not in it.
        fields.append(f"ETA {duration((total_steps - step) * rates['step_ms'] / 1e3)}")
    return fields


def _short(value: float) -> str:
    """Three significant digits with k, M or G: 19321 -> "19.3k"."""
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * factor:  # where three digits round up to the factor
            return f"{value / factor:.3g}{suffix}"
    return f"{value:.3g}"


def _milliseconds(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def summary_table(rows: Sequence[tuple[str, str]], title: str) -> str:
    """Returns (name, value) rows as a boxed ASCII table, without a newline at its end."""
    name_width = max((len(name) for name, _ in rows), default=0)
    lines = [f"{name:<{name_width}}  {value}".rstrip() for name, value in rows]
    width = max(len(line) for line in [title, *lines])
    rule = f"+{'-' * (width + 2)}+"
    boxed = [f"| {line:<{width}} |" for line in lines]
    return "\n".join([rule, f"| {title:<{width}} |", rule, *boxed, rule])


# --- traces -------------------------------------------------------------------------------------


class Profiler:
    """Traces a range of steps with the JAX profiler into `workdir/profile`.

    ```
    with Profiler("10:15", workdir) as profiler:
        for step in range(steps):
            profiler.step(step)
            ...
    ```

    Args:
        steps: "10:15" traces steps 10 to 14; "" traces nothing.
        workdir: folder of the run.
        total_steps: the last step of the run, if known.

    Raises:
        ValueError: `steps` is not such a range, or reaches past the last step.
    """

    def __init__(self, steps: str, workdir: Path, total_steps: int | None = None) -> None:
        self._steps = _parse_steps(steps)
        if total_steps is not None and self._steps.stop > total_steps + 1:
            raise ValueError(f"profile steps {steps!r} reach past the last step, {total_steps}.")
        self._folder = workdir / "profile"
        self._tracing = False

    def step(self, step: int) -> None:
        """Starts or stops the trace where due; call it before every step."""
        inside = step in self._steps
        if inside and not self._tracing:
            _wait_for_devices()
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True
        elif self._tracing and not inside:
            _wait_for_devices()
            self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if not self._tracing:
            return
        try:
            # After an error the devices may never be ready, and the error matters more.
            if error is None:
                _wait_for_devices()
        finally:
            self._stop()

    def _stop(self) -> None:
        self._tracing = False
        jax.profiler.stop_trace()


def _parse_steps(text: str) -> range:
    if not text:
        return range(0)
    match = re.fullmatch(r"(\d+):(\d+)", text)
    steps = range(int(match[1]), int(match[2])) if match else range(0)
    if not steps:
        raise ValueError(
            f"profile steps must be FIRST:END with FIRST < END, "
            f"such as 10:15 for the steps 10 to 14; got {text!r}."
        )
    return steps


def _wait_for_devices() -> None:
    # Steps are dispatched ahead of the devices. Without this a trace would hold the end of
    # earlier steps and lack the end of its own.
    jax.block_until_ready(jax.live_arrays())
