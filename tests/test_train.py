"""The training command as a user runs it, on small records."""

import dataclasses
import itertools
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from affectgpt_jax import build, load_run, train
from affectgpt_jax.common.identity import code_identity
from affectgpt_jax.config import ConfigError
from affectgpt_jax.configs import demo as demo_config
from affectgpt_jax.data import demo
from affectgpt_jax.data.records import RecordDataset, write_records
from affectgpt_jax.models import attention
from affectgpt_jax.training import loop
from affectgpt_jax.training.checkpoints import Checkpoints
from affectgpt_jax.training.metrics_writer import read_metrics
from affectgpt_jax.weights import __main__ as weights
from affectgpt_jax.weights.release import read_release

SMALL = (
    "--config.steps=6",
    "--config.checkpoint_every=3",
    "--config.log_every=1",
    "--config.batch_size=8",
    "--config.generate.batch_size=16",
    "--config.generate.max_new_tokens=4",
    "--config.num_buckets=1",
)
# For what has nothing to do with answers: without a question that is scored, nothing is generated,
# and no program for it compiled.
LOSS_ALONE = ("--config.label=description", "--config.data.test=")


@pytest.fixture(scope="module")
def records(demo_records):
    """Flags that name small record directories."""
    return tuple(f"--config.data.{split}={path}" for split, path in demo_records.items())


def run(workdir, *flags):
    train.main([f"--workdir={workdir}", "--config.mesh=data:-1", *SMALL, *flags])
    return json.loads((workdir / "result.json").read_text())


def losses(workdir):
    return {
        record["step"]: record["train/loss"]
        for record in read_metrics(workdir / "metrics.jsonl")
        if "train/loss" in record
    }


@pytest.fixture(scope="module")
def finished(records, tmp_path_factory):
    """An undisturbed run, with dropout so that random masks are part of what must repeat."""
    workdir = tmp_path_factory.mktemp("finished")
    result = run(workdir, *records, "--config.lora.dropout=0.1", "--config.profile_steps=2:4")
    return workdir, result


def test_a_run_leaves_everything_that_the_readme_promises(finished):
    workdir, result = finished
    assert set(result) >= {
        "wall_s", "steps", "loss_first", "loss_last", "hit", "labels_per_clip", "samples_per_s",
        "tokens_per_s", "tflop_per_s_per_device",
    }  # fmt: skip
    predictions = [json.loads(line) for line in (workdir / "predictions.jsonl").open()]
    truth = (workdir / "truth.csv").read_text().splitlines()
    assert truth[0] == "name,emotion"
    assert [p["name"] for p in predictions] == [line.split(",")[0] for line in truth[1:]]
    assert set(predictions[0]) == {"name", "text", "labels"}
    hits = [p["labels"][:1] == [t.split(",")[1]] for p, t in zip(predictions, truth[1:])]
    assert result["hit"] == np.mean(hits)
    for file in ("run.png", "config.json", "tensorboard", "checkpoints/6"):
        assert (workdir / file).exists(), file
    assert list((workdir / "profile").rglob("*.xplane.pb"))
    # Answers about the first clips of validation, beside the truth.
    events = b"".join(file.read_bytes() for file in (workdir / "tensorboard").iterdir())
    assert b"val/answers" in events and b"demo-val-00000" in events and b"  truth   " in events
    assert "mfu" not in result, "a CPU's peak is not known"
    assert result["loss_first"] == losses(workdir)[1]
    assert sum(result["time_s"].values()) == pytest.approx(result["wall_s"])


def test_the_picture_of_a_run_is_set_beside_its_ceilings_and_its_control():
    ceilings = {"face": 0.2, "audio_face": 0.6, "multi_audio_face_text": 0.66}
    result = {"ceilings": ceilings, "hit_features_shuffled": 0.09}
    assert list(train.references(demo_config.get_config(), result).items()) == [
        ("ceiling", 0.66), ("ceiling, face", 0.2), ("ceiling, audio + face", 0.6),
        ("control: shuffled features", 0.09),
    ]  # fmt: skip
    assert train.references(demo_config.get_config(), {}) == {}


def test_an_interrupted_run_resumes_to_the_same_losses_bit_by_bit(
    finished, records, tmp_path, monkeypatch, capsys
):
    submit = loop.StepReporter.submit

    def interrupt(self, step, *args):
        if step == 5:
            raise KeyboardInterrupt
        submit(self, step, *args)

    monkeypatch.setattr(loop.StepReporter, "submit", interrupt)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, *records, "--config.lora.dropout=0.1")
    assert stopped.value.code == 130
    assert "the same command resumes" in capsys.readouterr().err
    monkeypatch.undo()
    result = run(tmp_path, *records, "--config.lora.dropout=0.1")
    undisturbed, expected = finished
    assert losses(tmp_path) == losses(undisturbed)
    assert result["hit"] == expected["hit"]
    assert result["best_step"] == expected["best_step"]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("init_from=nowhere.pth", "nowhere.pth"),
        ("init_from=.", "adapter_config.json"),
        ("wandb_project=x", "needs the package wandb"),
        ("projectors.video_width=512", "are 768 wide, but config.projectors.video_width is 512"),
        ("optimizer.beta1=2", "beta1"),
        ("prompts=nowhere.toml", "nowhere.toml"),
        ("data.test=nowhere", "nowhere"),
        ("xla_options=a=b", "config.xla_options"),
    ],
)
def test_what_can_be_refused_is_refused_before_anything_is_written(
    flag, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it then fails
    with pytest.raises(SystemExit, match=rf"error: .*{message}"):
        train.main(["--workdir=run", "--config.mesh=data:1,fsdp:8", f"--config.{flag}"])
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.lock"]


def test_a_finished_run_started_again_only_scores(finished, records, capsys):
    workdir, before = finished
    trace = losses(workdir)
    again = run(workdir, *records, "--config.lora.dropout=0.1")
    assert "resumed from the checkpoint of step 6" in capsys.readouterr().out
    assert again["hit"] == before["hit"]
    assert losses(workdir) == trace


def test_the_score_of_the_test_clips_stands_at_the_step_that_has_it(
    finished, records, tmp_path, monkeypatch
):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    monkeypatch.setattr(Checkpoints, "best_step", lambda self: 3)
    assert run(workdir, *records, "--config.lora.dropout=0.1")["best_step"] == 3
    *_, last = read_metrics(workdir / "metrics.jsonl")
    assert "test/hit" in last and last["step"] == 3


def make_reporter(peak_flops=None, config=None, shown=None, workdir=Path("run"), resumed=False):
    """A reporter on two devices, what it has written by step, and a function that hands in the next
    step: two clips of three tokens and a FLOP each."""
    written, config, steps = {}, config or demo_config.get_config(), itertools.count(1)
    writer = SimpleNamespace(write=written.__setitem__)
    progress = SimpleNamespace(update=lambda *args: shown.append(args) if shown is not None else 0)
    reporter = loop.StepReporter(
        config,
        workdir,
        writer,
        progress,
        checkpoints=None,
        flops=lambda samples: int(samples[:, 0].sum()),
        devices=2,
        peak_flops=peak_flops,
        resumed=resumed,
    )

    def submit(dispatch_s=0.0, wait_s=0.0, loss=1):
        times = loop.StepTimes(dispatch_s, wait_s)
        samples = np.array([[3, 1], [3, 2]])
        reporter.submit(next(steps), {"loss": np.float32(loss)}, samples, times, {})

    return reporter, written, submit


def test_the_loop_is_at_most_two_steps_ahead_of_what_is_finished():
    reporter, written, submit = make_reporter()
    for step in (1, 2, 3):
        submit()
        assert list(written) == [*range(1, step)], "one step runs, one is queued"
    reporter.flush()
    assert list(written) == [1, 2, 3]


def test_the_line_of_a_step_says_when_losses_are_above_the_first():
    losses = [2.0, *[1.0] * 20, *[4.0] * 20]
    rewarded = demo_config.get_config()
    rewarded.rl = {}
    for config, marked in ((None, 6), (rewarded, None)):
        shown = []
        reporter, _, submit = make_reporter(config=config, shown=shown)
        for loss in losses:
            submit(loss=loss)
        reporter.flush()
        found = [others for _, _, _, others in shown]
        # The mean of 16 losses: 10 of 1.0 and 6 of 4.0 are the first of which it is above 2.
        first = len(losses) if marked is None else 20 + marked
        assert found[:first] == [{}] * first
        assert found[first:] == [{"above the first,": 2.0}] * (len(losses) - first)


def test_losses_after_a_resume_are_compared_with_the_runs_first(tmp_path):
    log = '{"step": 1, "train/loss": 3.0}\n{"step": 2, "train/loss": 0.5}\n'
    for file, losses, marked in (
        (log, [1.0, *[2.0] * 20], False),  # above the first of this process
        (log, [5.0] * 20, True),
        (None, [1.0, *[2.0] * 20], False),  # who knows
    ):
        if file is None:
            (tmp_path / "metrics.jsonl").unlink()
        else:
            (tmp_path / "metrics.jsonl").write_text(file)
        shown = []
        reporter, _, submit = make_reporter(shown=shown, workdir=tmp_path, resumed=True)
        for loss in losses:
            submit(loss=loss)
        reporter.flush()
        assert shown[-1][3] == ({"above the first,": 3.0} if marked else {})


def test_the_hosts_time_is_what_is_neither_dispatch_nor_waiting(monkeypatch):
    now_s = [0.0]

    def spend(seconds, result=None):
        now_s[0] += seconds
        return result

    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: now_s[0]))
    monkeypatch.setattr(jax, "device_get", lambda metrics: spend(0.5, metrics))
    _, written, submit = make_reporter()
    for _ in range(5):
        spend(0.25 + 0.125 + 0.0625)
        submit(dispatch_s=0.25, wait_s=0.125)
    rates = {name: value for name, value in written[4].items() if name.endswith("_ms")}
    assert rates == {"rate/step_ms": 937.5, "rate/data_wait_ms": 125.0, "rate/host_ms": 62.5}


@pytest.mark.parametrize("peak_flops", [None, 4.0])
def test_compute_is_reported_by_device_and_as_a_share_of_its_peak(monkeypatch, peak_flops):
    now_s = itertools.count(0.0, 0.5)  # read three times for a step
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: next(now_s)))
    reporter, written, submit = make_reporter(peak_flops)
    for _ in range(4):
        submit()
    reporter.flush()
    share = {} if peak_flops is None else {"mfu": 0.5}
    rates = {k: v for k, v in written[4].items() if k in ("rate/TFLOP/s/device", "rate/mfu")}
    assert rates == {"rate/TFLOP/s/device": 2e-12} | {f"rate/{k}": v for k, v in share.items()}
    assert reporter.totals() == pytest.approx(
        {"samples_per_s": 2 / 1.5, "tokens_per_s": 4.0, "tflop_per_s_per_device": 2e-12} | share
    )


def test_the_summary_has_the_mfu_where_the_devices_peak_is_known():
    result = {"loss_first": 2.0, "loss_last": 1.0, "best_step": 3, "samples_per_s": 50.0}
    result |= {"tokens_per_s": 13_000.0, "tflop_per_s_per_device": 403.4}
    lines = [
        train.summary(demo_config.get_config(), Path("run"), result | known)
        for known in ({}, {"mfu": 0.4079})
    ]
    assert "MFU" not in lines[0]
    assert re.search(r"MFU +40.8%  \(403 TFLOP/s a device\)", lines[1])


def test_the_summary_says_what_there_is_of_a_score():
    known = {"loss_first": 2.0, "loss_last": 1.0, "best_step": 3, "clips": 6, "answers_cut": 0}
    lists = {"f": 0.5, "p": 0.4, "r": 0.6667, "f_interval": (0.1, 0.9), "clips_scored": 5}
    lists |= {"labels_per_clip": 1.5, "f_features_shuffled": 0.25}
    texts = [
        train.summary(demo_config.get_config(), Path("run"), known | more)
        for more in (lists, {"not_scored": "6 of 6 clips name no true answer"}, {"warning": "up"})
    ]
    assert re.search(r"F of the labels, 5 clips +0.500 \(0.100 to 0.900\)", texts[0])
    assert re.search(r"control: shuffled features +0.250", texts[0])
    assert "result.json, predictions.jsonl, truth.csv " in texts[0]
    assert re.search(r"not scored +6 of 6 clips name no true answer", texts[1])
    assert "predictions.jsonl" in texts[1] and "truth.csv" not in texts[1]
    assert ["\nwarning: up\n" in text for text in texts] == [False, False, True]


def test_the_next_batch_goes_to_the_device_before_a_step_is_waited_for(
    records, tmp_path, monkeypatch
):
    events = []
    shard_batch, report = loop.sharding.shard_batch, loop.StepReporter._report

    def copied(mesh, batch):
        events.append("copy")
        return shard_batch(mesh, batch)

    def waited(self):
        events.append("wait")
        report(self)

    monkeypatch.setattr(loop.sharding, "shard_batch", copied)
    monkeypatch.setattr(loop.StepReporter, "_report", waited)
    # Without a test set, and validated at the end only.
    run(tmp_path, *records, *LOSS_ALONE, "--config.checkpoint_every=6")
    assert events[:12] == ["copy"] * 2 + ["copy", "wait"] * 4 + ["wait"] * 2


@pytest.mark.parametrize("fusion", ["none", "attention", "qformer"])
def test_every_pre_fusion_trains(fusion, records, tmp_path):
    flags = ("--config.steps=12", "--config.checkpoint_every=12", "--config.lora.dropout=0.0")
    result = run(tmp_path, *records, *flags, *LOSS_ALONE, f"--config.fusion={fusion}")
    trace = losses(tmp_path)
    assert np.mean([trace[i] for i in (10, 11, 12)]) < np.mean([trace[i] for i in (1, 2, 3)])
    assert result["steps"] == 12


# The long question with all candidate words needs more tokens than the demo's other prompts.
WIDE = "--config.max_tokens=160"


# What is scored, what has no answer to score, and what has no features to shuffle; that every mode
# and label type has its program and its score is shown in test_program.py and test_evaluators.py.
@pytest.mark.parametrize(
    ("mode", "label"),
    [
        ("multi_audio_face_frame_text", "onehot_candidates"),
        ("image", "description"),
        ("text", "sentiment"),
    ],
)
def test_a_run_trains_and_answers(mode, label, records, tmp_path):
    flags = ("--config.steps=1", f"--config.input={mode}", f"--config.label={label}")
    result = run(tmp_path, *records, WIDE, *flags)
    assert np.isfinite(result["loss_last"])
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").open()]
    assert len(lines) == 16
    assert all(("labels" in line) == ("hit" in result) for line in lines)
    assert ("hit" in result) == (label != "description")


def test_a_mixture_logs_the_mix_of_every_step_and_validates_each_set(records, tmp_path, capsys):
    config = tmp_path / "mixed.py"
    train_records = records[0].split("=")[1]
    config.write_text(f"""
from affectgpt_jax.configs import demo
from affectgpt_jax.configs.affectgpt_qwen25_7b import data_set


def get_config():
    c = demo.get_config()
    c.data.train = c.data.val = c.data.test = ""
    c.data.val_share = 0.3
    c.data.mixture.voices = data_set(
        {train_records!r}, share=0.5, label="onehot", input="audio_text"
    )
    c.data.mixture.whole = data_set({train_records!r}, weight=0.5)
    return c
""")
    workdir, flags = (
        tmp_path / "run",
        ("--config.steps=9", "--config.data.mixture.whole.weight=2.0"),
    )
    run(workdir, f"--config={config}", *flags)
    lines = read_metrics(workdir / "metrics.jsonl")
    mixes = [(r["mixture/voices"], r["mixture/whole"]) for r in lines if "train/loss" in r]
    assert len(mixes) == 9
    assert all(sum(mix) == 8 for mix in mixes)
    voices, whole = np.sum(mixes, axis=0)
    assert 0 < voices < whole
    validated = [r for r in lines if "val/loss" in r]
    assert {"val/loss/voices", "val/hit/voices", "val/loss/whole"} <= set(validated[0])
    said = capsys.readouterr().out
    assert "voices: " in said and "onehot from audio_text" in said
    assert "weight 2, hybrid from multi_audio_face_text" in said
    run(tmp_path / "again", f"--config={config}", *flags)
    assert losses(tmp_path / "again") == losses(workdir)


def test_packed_rows_train_on_the_same_clips_with_the_same_loss(records, tmp_path, capsys):
    """At rate 0, an epoch's summed loss does not depend on which clips share a row."""
    frozen = ("learning_rate", "warmup_learning_rate", "final_learning_rate")
    flags = ["--config.data.test=", *(f"--config.optimizer.{rate}=0.0" for rate in frozen)]
    run(tmp_path / "padded", *records, *flags, "--config.steps=8")
    capsys.readouterr()
    workdir = tmp_path / "packed"
    result = run(workdir, *records, *flags, "--config.pack_length=100", "--config.steps=8")
    said = capsys.readouterr().out
    rows, full, updates = re.search(
        r"packed: the first epoch is (\d+) rows of 100 tokens, ([\d.]+)% full, in (\d+) updates; "
        r"clips a row [\d.]+ \(1 to \d, room for \d\), an update [\d.]+ \(\d+ to \d+\)",
        said,
    ).groups()
    assert 64 / 3 < int(rows) <= 8 * int(updates) < 40  # of 8 devices, one row or more each
    assert 50 < float(full) < 100

    def epoch(workdir, steps):
        lines = [r for r in read_metrics(workdir / "metrics.jsonl") if "train/loss" in r][:steps]
        counts = np.array([line["train/supervised_tokens"] for line in lines])
        return counts @ [line["train/loss"] for line in lines], counts.sum()

    (loss, tokens), (packed_loss, packed_tokens) = (
        epoch(tmp_path / "padded", 8),
        epoch(workdir, int(updates)),
    )
    assert packed_tokens == tokens
    np.testing.assert_allclose(packed_loss, loss, rtol=1e-5)  # float32, summed in another order
    assert result["samples_per_s"] > 0


def test_clips_in_training_and_evaluation_are_reported_or_refused(records, tmp_path, capsys):
    train_records = records[0].split("=")[1]
    flags = (*records, f"--config.data.test={train_records}", "--config.steps=1")
    with pytest.raises(SystemExit, match="error: 64 test clips are training clips too, e.g. 'demo"):
        run(tmp_path / "strict", *flags, "--config.strict_leaks=True")
    run(tmp_path / "run", *flags)
    assert "warning: 64 test clips are training clips too" in capsys.readouterr().out


def test_without_lora_heads_and_fusion_train_alone(records, tmp_path):
    result = run(tmp_path, *records, *LOSS_ALONE, "--config.lora.rank=0", "--config.steps=12")
    trace = losses(tmp_path)
    assert np.mean([trace[i] for i in (10, 11, 12)]) < np.mean([trace[i] for i in (1, 2, 3)])
    assert result["steps"] == 12


def test_a_run_starts_from_what_another_has_exported(finished, records, tmp_path, capsys):
    workdir, _ = finished
    frozen = (
        "--config.steps=1",
        "--config.checkpoint_every=1",
        "--config.optimizer.warmup_steps=0",
    )
    frozen += ("--config.optimizer.learning_rate=0.0", "--config.optimizer.final_learning_rate=0.0")
    release, again = tmp_path / "run.pth", tmp_path / "again.pth"
    weights.main(["export-release", str(workdir), str(release), "--step", "6"])
    run(tmp_path / "next", *records, *frozen, f"--config.init_from={release}")
    weights.main(["export-release", str(tmp_path / "next"), str(again), "--step", "1"])
    first, second = (read_release(path).tensors for path in (release, again))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        np.testing.assert_array_equal(tensor.numpy(), second[name].numpy(), err_msg=name)

    # A second stage of training starts from a run as it is, adapters, heads and all.
    run(tmp_path / "stage2", *records, *frozen, f"--config.init_from={tmp_path / 'next'}")
    assert f"starting from step 1 of {tmp_path / 'next'}" in capsys.readouterr().out
    weights.main(["export-release", str(tmp_path / "stage2"), str(tmp_path / "stage2.pth")])
    for name, tensor in read_release(tmp_path / "stage2.pth").tensors.items():
        np.testing.assert_array_equal(tensor.numpy(), first[name].numpy(), err_msg=name)
    other = (*records, *frozen, f"--config.init_from={tmp_path / 'next'}")
    with pytest.raises(SystemExit, match="does not fit this config: .*fusion"):
        run(tmp_path / "unlike", *other, "--config.fusion=qformer")

    weights.main(["export-peft", str(workdir), str(tmp_path / "adapter"), "--step", "6"])
    (tmp_path / "adapter" / "fusion.safetensors").unlink()  # as of one that PEFT has trained
    run(tmp_path / "third", *records, *frozen, f"--config.init_from={tmp_path / 'adapter'}")
    assert "projectors and fusion start fresh" in capsys.readouterr().out
    weights.main(["export-release", str(tmp_path / "third"), str(tmp_path / "third.pth")])
    third = read_release(tmp_path / "third.pth").tensors
    for name, tensor in first.items():
        same = np.array_equal(tensor.numpy(), third[name].numpy())
        assert same == ("lora" in name), name


def test_validation_clips_are_held_out_where_no_set_is_named(records, tmp_path, capsys):
    flags = [f for f in records if "data.val=" not in f]
    run(
        tmp_path,
        *flags,
        *LOSS_ALONE,
        "--config.data.val=",
        "--config.data.val_share=0.25",
        "--config.steps=1",
    )
    dataset = RecordDataset(records[0].split("=")[1])
    said = capsys.readouterr().out
    train_size, val_size = (
        int(re.search(rf"([\d,]+) {what}", said)[1].replace(",", ""))
        for what in ("training clips", "clips for validation")
    )
    assert train_size + val_size == len(dataset)
    assert 0 < val_size < train_size


def test_a_nan_in_a_batch_stops_the_run_and_names_the_last_good_checkpoint(
    records, tmp_path, monkeypatch
):
    batch = train.TrainPipeline.batch

    def poisoned(self, step):
        out = batch(self, step)
        if step == 4:  # counted from 0: the fifth batch
            out["features"]["face"][:, 0, 0] = np.nan
        return out

    monkeypatch.setattr(train.TrainPipeline, "batch", poisoned)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, *records, *LOSS_ALONE)
    message = str(stopped.value)
    assert message.startswith("error: step 5 of 6 gave ")
    assert "train/loss nan" in message
    assert f"last good checkpoint: {tmp_path / 'checkpoints' / '3'}" in message
    assert "\n" not in message
    monkeypatch.undo()
    run(tmp_path, *records, *LOSS_ALONE)
    assert [step for step, loss in losses(tmp_path).items() if np.isfinite(loss)] == [*range(1, 7)]


def test_weights_that_leave_the_finite_numbers_are_never_saved(records, tmp_path):
    flags = ("--config.optimizer.learning_rate=1e38", "--config.optimizer.clip_norm=0.0")
    warm = ("--config.optimizer.warmup_steps=0", "--config.checkpoint_every=1")
    with pytest.raises(SystemExit, match="last good checkpoint: none yet"):
        run(tmp_path, *records, *LOSS_ALONE, *flags, *warm)
    assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--config.llm=/nowhere"], "config.llm='/nowhere' is not a directory"),
        (["--config.data.train=/nowhere"], "/nowhere/manifest.json is missing"),
        (["--config.data.train="], "config.data.train names no records"),
        (["--config.projectors.video_width=512"], "set it to 768"),
        (["--config.input=text", "--config.lora.rank=0"], "leaves nothing to train"),
        (["--config.label=mood"], "config.label: label 'mood': 'mood' is not a label type"),
        (["--config.input=everything"], "config.input is 'everything'"),
        (["--config.max_tokens=10"], "over --config.max_tokens=10"),
        (["--config.mesh=data:3"], "mesh 'data:3'"),
        (["--config.batch_size=12"], "12 rows at a time, which 8 devices"),
        (
            ["--config.batch_size=8", "--config.gradient_accumulation_steps=2"],
            "use a multiple of 16",
        ),
        (["--config.lora.rank=-1"], "lora.rank is -1"),
        (["--config.profile_steps=9"], "profile_steps"),
        (["--config.init_from=/nowhere.pth"], "/nowhere.pth"),
        (["--config.prompts=/nowhere.toml"], "/nowhere.toml"),
        (["--config.optimizer.beta1=1.5"], "optimizer.beta1"),
    ],
)
def test_what_a_user_gets_wrong_is_one_sentence(flags, said, records, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, *records, *flags)
    message = str(stopped.value)
    assert message.startswith("error: ")
    assert said in message
    assert "\n" not in message


def other_encoder(source, to, name, sha256=""):
    """Records whose sound another encoder has made, as wide as the one before."""
    data = RecordDataset(source)
    encoders = {f: facts["encoder"] for f, facts in data.manifest.features.items()}
    settings = {"encoders": {"audio": {"name": name, "sha256": sha256}}}
    extra = {"extraction": settings} if sha256 else {}
    clips = (data[i] for i in range(len(data)))
    write_records(to, clips, encoders=encoders | {"audio": name}, extra=extra)
    return to


def test_features_of_another_encoder_are_refused_where_both_are_known(
    finished, demo_records, tmp_path, capsys
):
    train_set = other_encoder(demo_records["train"], tmp_path / "train", "hubert-l", "a")
    flags = (f"--config.data.train={train_set}", "--config.data.val=", "--config.data.val_share=.5")
    wavlm = other_encoder(demo_records["test"], tmp_path / "wavlm", "wavlm-l", "b")
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "run", *flags, f"--config.data.test={wavlm}")
    assert not (tmp_path / "run" / "data").exists()
    assert str(stopped.value) == (
        "error: the audio features of the test records are of the encoder 'wavlm-l', but those of "
        "the training records of 'hubert-l', so the model cannot read them; extract both with the "
        "same encoder"
    )

    # A run knows it, though its records are gone.
    asked = load_run(finished[0])
    extraction = {"encoders": {"audio": {"name": "hubert-l", "sha256": "a"}}}
    features = RecordDataset(train_set).manifest.features
    gone = dataclasses.replace(
        asked, workdir=tmp_path, config=asked.config.copy_and_resolve_references()
    )
    gone.config.data.train = "/nowhere"
    facts = {"features": features, "extraction": extraction}
    (tmp_path / build.EXTRACTION_FILE).write_text(json.dumps(facts))
    with pytest.raises(ConfigError, match="audio features of the test records .*'wavlm-l'"):
        gone.open_records(str(wavlm), print)
    # The same weights under another name, and the same name, are the same encoder.
    gone.open_records(str(other_encoder(wavlm, tmp_path / "same", "hubert:mine", "a")), print)
    gone.open_records(str(other_encoder(wavlm, tmp_path / "name", "hubert-l")), print)
    assert "encoder" not in capsys.readouterr().out
    # A name that somebody chose may be the same encoder's.
    gone.open_records(str(other_encoder(wavlm, tmp_path / "import", "HuBERT")), print)
    said = capsys.readouterr().out
    assert "warning: the audio features of the test records are of the encoder 'HuBERT'" in said
    assert "unless both names are of the same encoder" in said


def test_a_device_without_memory_is_one_sentence(monkeypatch, tmp_path):
    text = "RESOURCE_EXHAUSTED: Out of memory"

    def fail(*_):
        raise jax.errors.JaxRuntimeError(text)

    monkeypatch.setattr(train, "train", fail)
    with pytest.raises(SystemExit, match=r"error: the device has no memory left; lower config\."):
        run(tmp_path)
    text = "INTERNAL: something else"
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        run(tmp_path)


def test_a_finished_run_without_its_log_is_refused_in_one_sentence(finished, records, tmp_path):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    (workdir / "metrics.jsonl").unlink()
    with pytest.raises(SystemExit, match=r"error: .*metrics\.jsonl holds no training loss"):
        run(workdir, *records, "--config.lora.dropout=0.1", "--config.profile_steps=2:4")


def test_a_run_is_asked_where_its_attention_cannot_run(finished, tmp_path):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    path = workdir / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"attention": "cudnn_packed", "pack_length": 4096}))
    asked = load_run(workdir)
    assert asked.model.decoder.compute.attend is attention.causal
    assert asked.fingerprint(6) != asked.fingerprint(3)


def test_a_workdir_of_another_run_is_refused(finished, records):
    workdir, _ = finished
    with pytest.raises(SystemExit, match="config.seed=0, but now it is 1"):
        run(workdir, *records, "--config.lora.dropout=0.1", "--config.seed=1")


def test_records_that_were_replaced_are_refused(finished, records, demo_records, tmp_path):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    shutil.copytree(demo_records["train"], tmp_path / "train")
    config = json.loads((workdir / "config.json").read_text())
    config["data"]["train"] = str(tmp_path / "train")
    (workdir / "config.json").write_text(json.dumps(config))
    flags = (*records, "--config.lora.dropout=0.1", f"--config.data.train={tmp_path / 'train'}")
    shutil.rmtree(tmp_path / "train")
    clips = demo.World(1).records("train", 64, tuple(demo.SHAPES))
    write_records(tmp_path / "train", clips, encoders=dict.fromkeys(demo.SHAPES, "demo"))
    before = sorted(workdir.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        run(workdir, *flags, "--config.steps=6")
    message = str(stopped.value)
    assert "checkpoints/6: training records (train): it was trained with 64 clips" in message
    assert sorted(workdir.rglob("*")) == before


def test_what_processes_must_have_in_common_holds_the_code(records, tmp_path, monkeypatch):
    told = []

    def join(launch, facts, timeout_s, say):
        told.append(facts)
        raise ConfigError("enough")

    monkeypatch.setattr(train.distributed, "join", join)
    with pytest.raises(SystemExit, match="enough"):
        run(tmp_path, *records)
    assert told[0]["code"] == str(code_identity())


def test_a_checkpoint_of_another_base_is_refused(finished, records, tmp_path):
    from affectgpt_jax.build import base_directory
    from affectgpt_jax.common.identity import Identity
    from affectgpt_jax.training.checkpoints import CheckpointError
    from affectgpt_jax.weights.huggingface import base_identity

    workdir, _ = finished
    mine = base_identity(base_directory("tiny"))
    other = Identity(mine.name, "0" * 64)
    with Checkpoints(workdir, other) as checkpoints:
        with pytest.raises(CheckpointError, match="was trained on the base"):
            checkpoints.restore(6, {})
