"""Telemetry: what is written, shown and traced, under clocks and terminals made for the test."""

import io
import json
import os
import resource
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from terminals import FakeClock, Terminal

from affectgpt_jax.common import drawing
from affectgpt_jax.training.metrics_writer import (
    MetricsError,
    MetricsWriter,
    Profiler,
    Progress,
    Sample,
    Throughput,
    TimeBuckets,
    divergence,
    read_metrics,
    summary_table,
)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


# --- MetricsWriter ------------------------------------------------------------------------------


def train(
    workdir: Path, steps: range, *, resume_step: int = 0, clock: FakeClock | None = None
) -> None:
    """Writes one line a step, at two seconds a step."""
    clock = clock or FakeClock()
    with MetricsWriter(workdir, resume_step=resume_step, clock=clock) as writer:
        for step in steps:
            clock.advance(2.0)
            writer.write(step, {"train/loss": 8.0 / step, "lr": 0.5})


def test_no_link_is_written_through(tmp_path):
    mine = tmp_path / "mine"
    mine.write_text('{"step": 1, "time_s": 0.5}\n{"step": 2, "time_s": 1.0}\n')
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to(mine)
    with pytest.raises(OSError, match="a link stands there"):
        MetricsWriter(tmp_path / "run", resume_step=1)
    assert mine.read_text().count("\n") == 2


def test_a_line_holds_step_time_and_scalars(tmp_path: Path, clock: FakeClock) -> None:
    with MetricsWriter(tmp_path / "run", clock=clock) as writer:
        clock.advance(1.5)
        writer.write(3, {"train/loss": 0.25, "lr": 1})
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 3, "time_s": 1.5, "train/loss": 0.25, "lr": 1.0}
    ]


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"train/loss": 0.5})
        assert read_metrics(tmp_path / "metrics.jsonl")[0]["train/loss"] == 0.5


def test_device_scalars_are_taken(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"train/loss": jnp.float32(0.75)})
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["train/loss"] == 0.75


def test_values_that_are_not_finite_become_null_and_say_which(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"a": float("nan"), "b": float("inf"), "c": float("-inf"), "d": 2.0})
    text = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    del record["step"], record["time_s"]
    assert record == {
        **{"a": None, "a_nonfinite": "nan", "b": None, "b_nonfinite": "inf"},
        **{"c": None, "c_nonfinite": "-inf", "d": 2.0},
    }


@pytest.mark.parametrize("name", ["step", "time_s"])
def test_a_metric_cannot_take_a_name_of_the_format(tmp_path: Path, name: str) -> None:
    with MetricsWriter(tmp_path) as writer, pytest.raises(ValueError, match=f"step 7.*'{name}'"):
        writer.write(7, {name: 1.0})


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "run", enabled=False) as writer:
        writer.write(1, {"train/loss": 1.0})
    assert not (tmp_path / "run").exists()


def test_a_resumed_stream_equals_an_undisturbed_one(tmp_path: Path) -> None:
    train(tmp_path / "undisturbed", range(1, 8))

    train(tmp_path / "resumed", range(1, 6))  # killed after step 5, within the line of step 6
    with (tmp_path / "resumed" / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 6, "time_s": 12.0, "train/lo')
    train(tmp_path / "resumed", range(4, 8), resume_step=3, clock=FakeClock(now_s=5.0))

    undisturbed = (tmp_path / "undisturbed" / "metrics.jsonl").read_bytes()
    assert (tmp_path / "resumed" / "metrics.jsonl").read_bytes() == undisturbed
    curves = tensorboard_scalars(tmp_path / "resumed" / "tensorboard")
    assert curves == tensorboard_scalars(tmp_path / "undisturbed" / "tensorboard")


def test_a_fresh_start_keeps_nothing_of_an_earlier_run(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(0, {"val/hit": 0.25})
    (events,) = (tmp_path / "tensorboard").iterdir()
    events.rename(events.with_name("events.out.tfevents.0000000001.of_long_ago"))
    train(tmp_path, range(1, 3))
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    curves = tensorboard_scalars(tmp_path / "tensorboard")
    assert {tag: curve for tag, curve in curves.items() if curve} == {
        "train/loss": [(1, 8.0), (2, 4.0)],
        "lr": [(1, 0.5), (2, 0.5)],
    }


def test_a_resume_that_is_killed_while_trimming_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path, range(1, 6))
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def killed(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        MetricsWriter(tmp_path, resume_step=2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_tensorboard_gets_every_scalar(tmp_path: Path) -> None:
    train(tmp_path, range(1, 4))
    assert tensorboard_scalars(tmp_path / "tensorboard") == {
        "train/loss": [(1, 8.0), (2, 4.0), (3, pytest.approx(8 / 3))],
        "lr": [(1, 0.5), (2, 0.5), (3, 0.5)],
    }


@pytest.mark.timeout(60)  # it would wait for a thread that has ended
def test_a_full_disk_is_an_error_of_whoever_writes_to_tensorboard(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # stands in for the disk
    try:
        with pytest.raises(OSError, match="tensorboard"), MetricsWriter(tmp_path) as writer:
            for step in range(100):
                writer.write_samples(step, [Sample("clip", "They feel calm." * 100, "calm")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


SAMPLES = [
    Sample("clip 1", "They feel calm.", "calm"),
    Sample("clip 2", "They | feel\n# <b>glad</b>.", "glad, happy"),
]


def test_tensorboard_gets_answers_beside_the_truth_as_they_were_written(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event

    with MetricsWriter(tmp_path) as writer:
        writer.write_samples(7, SAMPLES)
        writer.write_samples(9, [])
    files = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    events = [Event.FromString(data) for file in files for data in tfrecords(file.read_bytes())]
    [(step, value)] = [(event.step, value) for event in events for value in event.summary.value]
    assert (step, value.tag) == (7, "val/answers/text_summary")
    # Four blanks before each line: Markdown shows it as it is.
    assert value.tensor.string_val[0].decode().splitlines() == [
        "    clip 1",
        "      answer  They feel calm.",
        "      truth   calm",
        "    clip 2",
        "      answer  They | feel",
        "              # <b>glad</b>.",
        "      truth   glad, happy",
    ]


class FakeWandb:
    """Stands in for the package: remembers what a run was started with and told."""

    def __init__(self) -> None:
        self.started, self.logged, self.finished = [], [], 0
        self.step, self.summary = 0, {}

    def init(self, **kwargs):
        self.started.append(kwargs)
        return self

    def log(self, values, step):
        self.logged.append((step, values))
        self.step = step

    def Table(self, columns, data):  # noqa: N802
        return ("table", columns, data)

    def Image(self, path):  # noqa: N802
        return ("image", path)

    def finish(self):
        self.finished += 1


def test_weights_and_biases_gets_every_scalar_and_a_resumed_run_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for resume_step in (0, 1):
        kwargs = {"wandb_project": "affect", "config": {"seed": 3}}
        with MetricsWriter(tmp_path, resume_step=resume_step, **kwargs) as writer:
            writer.write(resume_step + 1, {"train/loss": 0.5})
    assert fake.logged == [(1, {"train/loss": 0.5}), (2, {"train/loss": 0.5})]
    assert fake.finished == 2
    first, second = fake.started
    assert first == second
    assert (first["project"], first["config"], first["resume"]) == ("affect", {"seed": 3}, "allow")


def test_the_score_of_an_earlier_step_stands_at_that_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of the best checkpoint does; Weights & Biases takes no step but the last."""
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with MetricsWriter(tmp_path, wandb_project="affect") as writer:
        writer.write(9, {"train/loss": 0.5})
        writer.write(3, {"test/hit": 0.75})
    assert read_metrics(tmp_path / "metrics.jsonl")[1]["step"] == 3
    scalars = tensorboard_scalars(tmp_path / "tensorboard")
    assert scalars == {"train/loss": [(9, 0.5)], "test/hit": [(3, 0.75)]}
    assert fake.logged == [(9, {"train/loss": 0.5})]
    assert fake.summary == {"test/hit": 0.75}


def test_weights_and_biases_gets_answers_and_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with MetricsWriter(tmp_path, wandb_project="affect") as writer:
        writer.write_samples(7, SAMPLES)
        writer.write_picture(9, tmp_path / "run.png")
    table = ("table", ["clip", "answer", "truth"], [list(sample) for sample in SAMPLES])
    assert fake.logged == [
        (7, {"val/answers": table}),
        (9, {"run": ("image", str(tmp_path / "run.png"))}),
    ]


def test_the_package_itself_takes_all_of_it_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    figure = drawing.new_figure(1, 1)
    drawing.save_png(figure, tmp_path / "run.png")
    with MetricsWriter(tmp_path, wandb_project="affect", config={"a": {"b": 1}}) as writer:
        writer.write(1, {"train/loss": 0.5, "val/hit": float("nan")})
        writer.write_samples(1, SAMPLES)
        writer.write_picture(2, tmp_path / "run.png")
        writer.write(1, {"test/hit": 0.5})
    [media] = (tmp_path / "wandb").glob("offline-run-*/files/media")
    [picture], [table] = media.rglob("*.png"), media.rglob("*.table.json")
    assert picture.read_bytes() == (tmp_path / "run.png").read_bytes()
    assert json.loads(table.read_text())["data"] == [list(sample) for sample in SAMPLES]
    [log] = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    # A process of the package writes it, and may be behind.
    until = time.monotonic() + 60
    while b"test/hit" not in log.read_bytes() and time.monotonic() < until:
        time.sleep(0.1)
    assert b"train/loss" in log.read_bytes() and b"test/hit" in log.read_bytes()


def test_without_the_package_weights_and_biases_is_refused_with_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it then fails
    with pytest.raises(MetricsError, match=r"needs the package wandb; pip install .*\[wandb\]"):
        MetricsWriter(tmp_path, wandb_project="affect")


def tensorboard_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Returns (step, value) by tag as TensorBoard would show them."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        return scalars_by_record_format(folder)
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in tags}


def scalars_by_record_format(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The same without TensorBoard: a session start hides what came before, from its step on."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    curves: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(folder.glob("events.out.tfevents.*")):
        for event in map(Event.FromString, tfrecords(file.read_bytes())):
            if event.session_log.status == SessionLog.START:
                for tag, curve in curves.items():
                    curves[tag] = [point for point in curve if point[0] < event.step]
            for entry in event.summary.value:
                curves.setdefault(entry.tag, []).append((event.step, entry.simple_value))
    return curves


def tfrecords(data: bytes) -> Iterator[bytes]:
    """Yields the payloads of a TFRecord file: length, its checksum, payload, its checksum."""
    start = 0
    while start < len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        start += 12
        yield data[start : start + length]
        start += length + 4


# --- read_metrics -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tail", ["", '{"st', '{"step": 2, "a": 1', '{"step": 2, "a": "\\u00'], ids=repr
)
def test_half_a_last_line_is_left_out(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + tail)
    assert read_metrics(path) == [{"step": 1}]


def test_a_whole_last_line_counts_without_its_newline(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("bad", ['{"step": 2', "", "[2]", '{"a": 1}', '{"step": "2"}', "\udcff"])
def test_any_other_damage_is_an_error_that_says_where(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "metrics.jsonl"
    text = f'{{"step": 1}}\n{bad}\n{{"step": 3}}\n'
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(MetricsError, match=r"metrics\.jsonl, line 2: "):
        read_metrics(path)


def test_no_metrics_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_metrics(tmp_path / "metrics.jsonl")


# --- Throughput ---------------------------------------------------------------------------------


def test_rates_leave_out_the_steps_that_compile() -> None:
    throughput = Throughput(skip=2)
    throughput.update(samples=8, tokens=800, step_s=60.0, data_wait_s=5.0, host_s=1.0)
    throughput.update(samples=8, tokens=800, step_s=30.0, data_wait_s=0.0, host_s=1.0)
    assert throughput.rates() == {}
    throughput.update(samples=8, tokens=800, step_s=0.25, data_wait_s=0.125, host_s=0.0625)
    assert throughput.rates() == {
        "samples/s": 32.0,
        "tokens/s": 3200.0,
        "step_ms": 250.0,
        "data_wait_ms": 125.0,
        "host_ms": 62.5,
    }


def test_rates_weigh_steps_by_their_time_and_forget_old_ones() -> None:
    throughput = Throughput(window=2, skip=0)
    throughput.update(samples=1000, tokens=1000, step_s=1.0, data_wait_s=1.0, host_s=1.0)
    throughput.update(samples=2, tokens=100, step_s=1.0, data_wait_s=0.0, host_s=0.5)
    throughput.update(samples=4, tokens=500, step_s=2.0, data_wait_s=0.5, host_s=0.25)
    assert throughput.rates() == {
        "samples/s": 2.0,
        "tokens/s": 200.0,
        "step_ms": 1500.0,
        "data_wait_ms": 250.0,
        "host_ms": 375.0,
    }


def test_compute_is_of_one_device_and_has_a_share_only_of_a_known_peak() -> None:
    steps = dict(samples=1, tokens=1, step_s=2.0, data_wait_s=0.0, host_s=0.0)
    known, unknown = (Throughput(skip=0, devices=4, peak_flops=peak) for peak in (1e12, None))
    for throughput in (known, unknown):
        throughput.update(**steps, flops=4 * 10**12)
        throughput.update(**steps, flops=0 if throughput is unknown else 2 * 10**12)
    found = known.rates()
    assert (found["TFLOP/s/device"], found["mfu"]) == (0.375, 0.375)
    assert unknown.rates()["TFLOP/s/device"] == 0.25 and "mfu" not in unknown.rates()
    none = Throughput(skip=0)
    none.update(**steps)
    assert "TFLOP/s/device" not in none.rates()


# --- TimeBuckets --------------------------------------------------------------------------------


def test_buckets_hold_all_wall_time_once(clock: FakeClock) -> None:
    buckets = TimeBuckets(clock)
    clock.advance(1.0)
    with buckets.measure("step"):
        clock.advance(2.0)
        with buckets.measure("save"):
            clock.advance(4.0)
            with buckets.measure("data_wait"):
                clock.advance(8.0)
            clock.advance(16.0)
        clock.advance(32.0)
    clock.advance(64.0)
    report = buckets.report()
    assert report == {
        "setup": 0.0,
        "compile": 0.0,
        "data_wait": 8.0,
        "step": 34.0,
        "save": 20.0,
        "evaluate": 0.0,
        "idle": 65.0,
    }
    assert sum(report.values()) == 127.0


def test_a_report_within_a_bucket_counts_until_now(clock: FakeClock) -> None:
    buckets = TimeBuckets(clock)
    with buckets.measure("evaluate"):
        clock.advance(3.0)
        assert buckets.report()["evaluate"] == 3.0
        clock.advance(1.0)
    assert buckets.report()["evaluate"] == 4.0


def test_an_error_within_a_bucket_ends_it(clock: FakeClock) -> None:
    buckets = TimeBuckets(clock)
    with pytest.raises(RuntimeError), buckets.measure("step"):
        clock.advance(1.0)
        raise RuntimeError
    clock.advance(5.0)
    assert buckets.report()["step"] == 1.0
    assert buckets.report()["idle"] == 5.0


def test_time_outside_every_measure_goes_where_it_was_last_sent(clock: FakeClock) -> None:
    buckets = TimeBuckets(clock, outside="setup")
    clock.advance(1.0)
    with buckets.measure("compile"):
        clock.advance(2.0)
    clock.advance(4.0)
    buckets.outside("idle")
    with buckets.measure("step"):
        clock.advance(8.0)
    clock.advance(16.0)
    report = buckets.report()
    assert (report["setup"], report["compile"]) == (5.0, 2.0)
    assert (report["step"], report["idle"]) == (8.0, 16.0)


def test_an_unknown_bucket_is_an_error_that_names_the_known_ones(clock: FakeClock) -> None:
    with (
        pytest.raises(ValueError, match="'lunch'; there are setup, compile, data_wait, step"),
        TimeBuckets(clock).measure("lunch"),
    ):
        pass


def test_the_time_table_shows_seconds_and_shares(clock: FakeClock) -> None:
    buckets = TimeBuckets(clock)
    with buckets.measure("step"):
        clock.advance(75.0)
    clock.advance(25.0)
    rows = {line.split()[1]: line.split()[2:6] for line in buckets.table().splitlines()[3:-1]}
    assert rows["step"] == ["75.0", "s", "75.0", "%"]
    assert rows["idle"] == ["25.0", "s", "25.0", "%"]
    assert rows["wall"] == ["100.0", "s", "100.0", "%"]


# --- Progress -----------------------------------------------------------------------------------

RATES = {"samples/s": 412.3, "tokens/s": 19321.0, "step_ms": 155.2, "data_wait_ms": 0.31}
LINE_120 = (
    "step 120/600  loss 1.234  412 samples/s  19.3k tokens/s  155 ms/step  data 0.3 ms  ETA 1:15"
)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("COLUMNS", "120")
    return Terminal()


def test_the_line_says_where_the_run_is(clock: FakeClock) -> None:
    stream = io.StringIO()
    Progress(600, stream=stream, clock=clock).update(120, 1.2341, RATES)
    assert stream.getvalue() == LINE_120 + "\n"


def test_the_line_says_what_share_of_the_devices_is_used(clock: FakeClock) -> None:
    def shown(rates: dict[str, float]) -> str:
        stream = io.StringIO()
        Progress(600, stream=stream, clock=clock).update(120, 1.2341, RATES | rates)
        return stream.getvalue()

    assert shown({"TFLOP/s/device": 554.8, "mfu": 0.56101}) == (
        "step 120/600  loss 1.234  412 samples/s  19.3k tokens/s  MFU 56.1%  155 ms/step"
        "  555 TFLOP/s/device  data 0.3 ms  ETA 1:15\n"
    )
    on_a_cpu = shown({"TFLOP/s/device": 0.01524})
    assert "155 ms/step  0.0152 TFLOP/s/device  data" in on_a_cpu and "MFU" not in on_a_cpu


def test_without_rates_the_line_claims_none(clock: FakeClock) -> None:
    stream = io.StringIO()
    Progress(600, stream=stream, clock=clock).update(1, float("nan"), {})
    assert stream.getvalue() == "step 1/600  loss nan\n"


def test_numbers_keep_their_size_readable(clock: FakeClock) -> None:
    stream = io.StringIO()
    rates = {"samples/s": 999.7, "tokens/s": 1.234e6, "step_ms": 12345.6, "data_wait_ms": 12.34}
    Progress(1000, stream=stream, clock=clock).update(100, 0.01234, rates)
    assert stream.getvalue() == (
        "step 100/1000  loss 0.01234  1k samples/s  1.23M tokens/s  12346 ms/step  data 12.3 ms"
        "  ETA 3:05:12\n"
    )


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        ("80", "step 120/600  loss 1.234  412 samples/s  19.3k tokens/s  155 ms/step  ETA 1:15"),
        ("40", "step 120/600  loss 1.234  ETA 1:15"),
        ("9", "step 120"),
    ],
)
def test_a_narrow_terminal_gets_a_line_that_does_not_wrap(
    terminal: Terminal,
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
    columns: str,
    shown: str,
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    Progress(600, stream=terminal, clock=clock).update(120, 1.2341, RATES)
    assert terminal.rows() == [shown]


def test_the_last_step_is_always_shown(clock: FakeClock) -> None:
    stream = io.StringIO()
    progress = Progress(35, stream=stream, interval_s=10.0, clock=clock)
    for step in range(1, 36):
        progress.update(step, 1.0, {})
        clock.advance(1.0)
    shown = [line.split()[1] for line in stream.getvalue().splitlines()]
    assert shown == ["1/35", "11/35", "21/35", "31/35", "35/35"]


def test_the_loss_is_fetched_only_for_lines_that_are_shown(clock: FakeClock) -> None:
    class Loss:
        fetched = 0

        def __float__(self) -> float:
            Loss.fetched += 1
            return 1.0

    progress = Progress(600, stream=io.StringIO(), clock=clock)
    for step in range(1, 11):
        progress.update(step, Loss(), {})
    assert Loss.fetched == 1


def test_progress_of_other_processes_is_silent(terminal: Terminal, clock: FakeClock) -> None:
    with Progress(1, stream=terminal, enabled=False, clock=clock) as progress:
        progress.line("message")
        progress.update(1, 1.0, RATES)
    assert terminal.getvalue() == ""


# --- summary_table ------------------------------------------------------------------------------


def test_a_table_is_aligned_and_plain() -> None:
    assert summary_table([("model", "tiny"), ("parameters", "1.2 M")], "Run") == (
        "+-------------------+\n"
        "| Run               |\n"
        "+-------------------+\n"
        "| model       tiny  |\n"
        "| parameters  1.2 M |\n"
        "+-------------------+"
    )


def test_a_table_is_as_wide_as_its_title() -> None:
    lines = summary_table([("a", "b")], "A long title").splitlines()
    assert {len(line) for line in lines} == {len("| A long title |")}
    assert summary_table([], "Empty").splitlines()[1] == "| Empty |"


# --- Profiler -----------------------------------------------------------------------------------


@pytest.fixture
def profiler_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces the JAX profiler by a list of what it was told."""
    calls: list[str] = []
    monkeypatch.setattr(jax, "block_until_ready", lambda _: calls.append("wait"))
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    return calls


def test_the_steps_asked_for_are_traced(tmp_path: Path, profiler_calls: list[str]) -> None:
    with Profiler("10:15", tmp_path) as profiler:
        for step in range(20):
            profiler.step(step)
            profiler_calls.append(f"step {step}")
    assert profiler_calls == [
        *(f"step {step}" for step in range(10)),
        *("wait", str(tmp_path / "profile")),
        *(f"step {step}" for step in range(10, 15)),
        *("wait", "stop"),
        *(f"step {step}" for step in range(15, 20)),
    ]


def test_a_trace_is_stopped_when_the_run_ends_within_it(
    tmp_path: Path, profiler_calls: list[str]
) -> None:
    with Profiler("1:100", tmp_path) as profiler:
        profiler.step(1)
    assert profiler_calls[-2:] == ["wait", "stop"]


def test_a_trace_is_stopped_at_once_on_an_error(tmp_path: Path, profiler_calls: list[str]) -> None:
    with pytest.raises(RuntimeError, match="lost a host"), Profiler("1:100", tmp_path) as profiler:
        profiler.step(1)
        raise RuntimeError("lost a host")
    assert profiler_calls == ["wait", str(tmp_path / "profile"), "stop"]


def test_a_run_resumed_within_the_steps_traces_the_rest(
    tmp_path: Path, profiler_calls: list[str]
) -> None:
    with Profiler("10:15", tmp_path) as profiler:
        for step in range(13, 17):
            profiler.step(step)
    assert profiler_calls == ["wait", str(tmp_path / "profile"), "wait", "stop"]


def test_no_steps_is_no_trace(tmp_path: Path, profiler_calls: list[str]) -> None:
    with Profiler("", tmp_path) as profiler:
        for step in range(3):
            profiler.step(step)
    assert profiler_calls == []


@pytest.mark.parametrize("text", ["10", "10:", ":15", "15:10", "10:10", "-1:5", "a:b", "1:2:3"])
def test_steps_that_are_no_range_are_an_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"such as 10:15 .* got '" + text):
        Profiler(text, tmp_path)


def test_the_jax_profiler_leaves_a_trace(tmp_path: Path) -> None:
    with Profiler("1:3", tmp_path) as profiler:
        for step in range(4):
            profiler.step(step)
            jnp.sin(jnp.ones(8))
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 0


FALLING = [3.0 - i / 50 for i in range(100)]


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        (FALLING, ""),
        ([2.0], ""),
        # A batch is above the first, the last ones together are not.
        ([*FALLING, 3.5, 1.0, 1.0, 1.0, 1.0, 1.1], ""),
        # Half of what was gained is lost, and a little less; of 120 losses, six are averaged.
        ([*FALLING, *[2.2] * 20], "fell from 3 to 1.07 about step 94, and rose again to 2.2"),
        ([*FALLING, *[1.9] * 20], ""),
        (FALLING[::-1], "ended at 2.96, above the 1.02 that it began with"),
        ([2.0, None, 2.5], "ended at 2.5, above the 2 that it began with"),
    ],
)
def test_a_loss_that_ends_higher_is_said(tmp_path: Path, losses: list, said: str) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": step, "train/loss": loss} for step, loss in enumerate(losses)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = divergence(path)
    assert found == (f"the training loss {said}" if said else "")
