import json
import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from affectgpt_jax.config import parse_command_line, save_config
from affectgpt_jax.data import demo
from affectgpt_jax.data.records import RecordDataset
from benchmarks import ablation, harness, training_sets
from benchmarks.ablation import (
    DEFAULT,
    LENGTH,
    QUICK,
    TABLES,
    Variant,
    markdown,
    plan,
    summarise,
    t_interval,
)
from benchmarks.runner import Outcome, Run, RunError, finished, train_all

WORKDIR = Path("runs/ablation")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("tables", "variants"), [([5], 3), ([6], 7), ([8], 4), ([5, 6], 9), ([8, 6, 5], 12)]
)
def test_a_variant_that_tables_share_is_trained_once(tables, variants):
    runs = plan(tables, [0, 1, 2], WORKDIR)
    assert len(runs) == 3 * variants
    assert len({run.workdir for run in runs.values()}) == len(runs)
    assert [seed for variant, seed in runs if variant == DEFAULT] == [0, 1, 2]


def test_every_run_is_a_config_that_differs_as_the_table_says():
    base, _ = parse_command_line(LENGTH)
    for (variant, seed), run in plan([5, 6, 8], [3, 4], WORKDIR, ["--config.steps=7"]).items():
        config, _ = parse_command_line(run.flags)
        assert (config.fusion, config.input, config.lora.rank, config.data.train) == variant
        assert (config.seed, config.demo_seed, config.steps) == (seed, seed, 7)
        assert config.lora.alpha == 32
        expected = base.copy_and_resolve_references()
        expected.fusion, expected.input, expected.lora.rank, _ = variant
        expected.seed = expected.demo_seed = seed
        expected.steps = 7
        assert config == expected


@pytest.mark.parametrize(
    "flag",
    ["--config.fusion=none", "--config.lora.rank=4", "-config.demo_seed=9", "--config.seed=1"],
)
def test_what_the_tables_vary_cannot_be_overridden(flag):
    with pytest.raises(RunError, match="the tables vary or fix config."):
        plan([5], [0], WORKDIR, [flag])


def test_the_tables_agree_on_the_default_and_on_the_papers_best():
    for number in (*QUICK, "fig4"):
        (row,) = (row for row in TABLES[number].rows if row.variant == DEFAULT)
        assert row.published == 74.77
    assert sum(len(TABLES[number].rows) for number in QUICK) == 14


# --- training sets ------------------------------------------------------------------------------


def test_tables_3_and_4_share_sets_and_train_on_what_the_filter_left():
    runs = plan([3, 4, "fig4"], [0, 1], WORKDIR)
    variants = {variant for variant, _ in runs}
    assert len(variants) == 3 + 2 + 5 + 1 + len(training_sets.NOISES) + 1 and len(runs) == 2 * len(
        variants
    )
    run = runs[Variant(data="raw-low-e"), 1]
    config, _ = parse_command_line(run.flags)
    assert config.data.train == str(WORKDIR / "worlds" / "1" / "sets" / "raw-low-e")
    assert config.data.test == config.data.val == "demo" and config.demo_seed == 1
    noisy, _ = parse_command_line(runs[Variant(data="face-x32"), 0].flags)
    assert noisy.data.test == str(WORKDIR / "worlds" / "0" / "sets" / "face-x32" / "test")
    with pytest.raises(RunError, match="vary or fix config.data.train"):
        plan([4], [0], WORKDIR, ["--config.data.train=x"])
    fresh, _ = parse_command_line(runs[Variant(data="untrained"), 0].flags)
    assert (fresh.data.train, fresh.steps, fresh.optimizer.learning_rate) == ("demo", 1, 0)
    longer = plan([4], [0], WORKDIR, ["--config.steps=90", "--config.optimizer.learning_rate=1e-2"])
    steps = {v.data: parse_command_line(run.flags)[0].steps for (v, _), run in longer.items()}
    assert steps.pop("untrained") == 1 and set(steps.values()) == {90}
    assert set(ablation.sampled_keys([4], runs)) == {k for k in runs if k[0] in FILTERS}


FILTERS = {row.variant for row in TABLES[4].rows}
RAW, PLUS = Variant(data="raw"), Variant(data="raw-plus")


def test_sampled_answers_purity_and_clips_stand_beside_greedy_ones():
    outcomes = {(v, s): outcome(0.5 + s / 10, CEILINGS) for v in (RAW, PLUS) for s in (0, 1)}
    sets = {
        (v, s): {"clips": clips, "purity": 0.5 + add, "sampled": 0.3 + add + s / 50}
        for v, clips, add in ((RAW, 6000, 0.0), (PLUS, 2000, 0.4))
        for s in (0, 1)
    }
    report = summarise(4, outcomes, sets)
    rows = {row["label"]: row for row in report["rows"]}
    plus = rows["low + emotion + sentiment"]
    assert plus["sampled"] == pytest.approx((0.71, T1 * 0.01))
    assert plus["sampled_difference"] == pytest.approx((0.4, 0.0))
    assert plus["purity"][0] == pytest.approx(0.9) and plus["clips"] == 2000
    assert rows["none"]["sampled_difference"] is None and rows["low"]["sampled"] is None
    fresh = {(Variant(data="untrained"), 0): {"clips": 6144, "purity": 1.0, "sampled": 0.04}}
    row = summarise(4, outcomes, sets | fresh)["rows"][-1]
    assert (row["sampled"], row["clips"], row["purity"]) == ((0.04, None), None, None)
    text = markdown(report)
    head = text.splitlines()[0]
    assert '| worlds | against "none" | sampled | ' in head and head.endswith("| clips | paper |")
    assert "| as many, at random | - |" in text and "from its Table 4" in text
    # A report of a table without training sets reads as it did.
    assert "sampled" not in markdown(summarise(5, OUTCOMES))


def test_the_noise_of_a_worse_encoder_lowers_what_can_be_known():
    clean, noisy = demo.World(0), demo.World(0, {"face": 64.0})
    ceilings = [demo.ceilings(w.evidence("test", 150))["face"] for w in (clean, noisy)]
    assert ceilings[1] < ceilings[0] - 0.03
    one, other = (next(iter(w.records("test", 1))).features for w in (clean, noisy))
    assert (one["audio"] == other["audio"]).all() and (one["face"] != other["face"]).any()


def test_sets_are_written_once_and_known_by_their_purity(tmp_path, monkeypatch):
    monkeypatch.setattr(training_sets, "CLIPS", 60)
    said = []
    first = training_sets.prepare(tmp_path, 0, ["human-short", "coarse", "fine"], said.append)
    assert [facts["clips"] for facts in first.values()] == [20, 30, 8]
    assert first["human-short"]["purity"] == 1 and 0.3 < first["coarse"]["purity"] < 0.8
    short = RecordDataset(tmp_path / "sets" / "human-short")
    assert {len(entry.labels) for entry in short.index} == {1}
    monkeypatch.setattr(training_sets, "_write", None)
    assert training_sets.prepare(tmp_path, 0, ["coarse"], said.append)["coarse"] == first["coarse"]


# Quantiles of Student's t have closed forms for one and two degrees of freedom.
T1, T2 = math.tan(math.pi * 0.475), 0.95 / math.sqrt(2 * 0.975 * 0.025)


@pytest.mark.parametrize(
    ("values", "mean", "half"),
    [
        ([0.5], 0.5, None),
        ([0.2, 0.4], 0.3, T1 * 0.1),
        ([0.1, 0.2, 0.6], 0.3, T2 * math.sqrt(0.07 / 3)),
        ([0.3, 0.3, 0.3], 0.3, 0.0),
    ],
)
def test_intervals_are_students(values, mean, half):
    found = t_interval(values)
    assert found[0] == pytest.approx(mean)
    assert found[1] == (None if half is None else pytest.approx(half))


def outcome(hit: float, ceilings: dict[str, float], wall_s: float | None = 100.0) -> Outcome:
    return Outcome({"hit": hit, "ceilings": ceilings, "process_wall_s": wall_s})


NONE = Variant(fusion="none")
CEILINGS = {"multi_audio_face_text": 0.8, "audio_face_text": 0.5, "text": 0.2}
OUTCOMES = {
    (DEFAULT, 0): outcome(0.60, CEILINGS, 120.0),
    (DEFAULT, 1): outcome(0.64, CEILINGS, 90.0),
    (DEFAULT, 2): outcome(0.68, CEILINGS, None),
    (NONE, 0): outcome(0.40, CEILINGS),
    (NONE, 1): outcome(0.45, CEILINGS),
    (NONE, 2): Outcome(None, "exit status 1, error: no disk"),
    (Variant(fusion="qformer"), 0): Outcome({"hit": 0.1, "process_wall_s": 95.0}),
    (Variant(rank=8), 0): outcome(0.99, CEILINGS),
}


def test_a_row_is_compared_with_its_own_ceiling_and_with_the_default_world_by_world():
    none, qformer, attention = summarise(5, OUTCOMES)["rows"]
    assert attention["hits"] == {"0": 0.60, "1": 0.64, "2": 0.68}
    assert attention["hit"] == pytest.approx((0.64, T2 * 0.04 / math.sqrt(3)))
    assert attention["ceiling"] == pytest.approx(0.8)
    assert attention["share"] == pytest.approx((0.8, T2 * 0.05 / math.sqrt(3)))
    assert attention["difference"] is None
    # Without pre-fusion the inputs are those of another mode.
    assert none["ceiling"] == pytest.approx(0.5)
    assert none["share"] == pytest.approx((0.85, T1 * 0.05))
    assert none["difference"] == pytest.approx((-0.195, T1 * 0.005))
    assert qformer["hit"] is qformer["ceiling"] is qformer["share"] is None


def test_what_is_not_scored_is_named():
    report = summarise(5, OUTCOMES)
    assert report["failed"] == {
        "none-multi_audio_face_text-rank16, seed 2": "exit status 1, error: no disk",
        "qformer-multi_audio_face_text-rank16, seed 0": "it was not scored on a demo world",
    }
    assert report["process_wall_s"] == [100.0, 90.0, 120.0]
    assert {run["rank"] for run in report["runs"]} == {16}  # the other table's run is left out


def test_the_table_reads_as_expected():
    lines = markdown(summarise(5, OUTCOMES)).splitlines()
    assert lines[:5] == [
        "| pre-fusion | hit rate | ceiling | share of the ceiling | against the default "
        "| worlds | paper |",
        "|---|---|---|---|---|---|---|",
        "| none | 0.425 +- 0.318 | 0.500 | 85.0% +- 63.5% | -0.195 +- 0.064 | 2 | 72.95 |",
        "| Q-Former | - | - | - | - | 0 | 74.16 |",
        "| attention | 0.640 +- 0.099 | 0.800 | 80.0% +- 12.4% | the default | 3 | 74.77 |",
    ]
    assert lines[-1] == (
        "Failed: qformer-multi_audio_face_text-rank16, seed 0: it was not scored on a demo world"
    )
    widths = "(of 2 worlds: 12.71 standard errors, of 3 worlds: 4.30 standard errors)"
    assert any(f"by Student's t {widths}. The" in line for line in lines)
    one_seed = markdown(summarise(5, {k: value for k, value in OUTCOMES.items() if k[1] == 0}))
    assert "| none | 0.400 | 0.500 | 80.0% | -0.200 | 1 | 72.95 |" in one_seed
    assert "by Student's t. The" in one_seed


@pytest.mark.parametrize("seeds", [(), (0,), (0, 1, 2)])
def test_reports_are_written_and_shown(seeds, tmp_path, capsys):
    outcomes = {key: value for key, value in OUTCOMES.items() if key[1] in seeds}
    about = {"environment": {"command": "ablation", **harness.describe()}, "jobs": 2}
    report = about | summarise(5, outcomes)
    ablation.write(report, tmp_path / "new")
    written = tmp_path / "new" / "ablation_table5"
    assert written.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    text = written.with_suffix(".md").read_text()
    assert markdown(report) in text
    ablation.main([f"--show={written.with_suffix('.json')}"])
    assert capsys.readouterr().out == markdown(report) + "\n"


# --- the runner ---------------------------------------------------------------------------------

# What the training command leaves behind, without the training. Files in the workdir tell it what
# to do: `FAIL`, `SLEEP`, or `MEET` another run that is under way.
FAKE = """
import json, os, pathlib, sys, time
from affectgpt_jax.config import parse_command_line
config, flags = parse_command_line(sys.argv[1:])
workdir = flags.workdir
with (workdir / "calls").open("a") as file:
    file.write("x")
print("workdir", workdir, flush=True)
active = workdir.with_suffix(".active")
active.touch()
if (workdir / "SLEEP").exists():
    time.sleep(600)
while (workdir / "MEET").exists() and len(list(workdir.parent.glob("*.met"))) < 2:
    workdir.with_suffix(".met").touch()
    time.sleep(0.01)
beside = len(list(workdir.parent.glob("*.active")))
active.unlink()
if (workdir / "FAIL").exists():
    raise SystemExit("error: the disk is full")
(workdir / "config.json").write_text(config.to_json())
cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
(workdir / "data").mkdir(exist_ok=True)
result = {"hit": 0.5, "steps": config.steps, "beside": beside, "cores": cores}
result["ceilings"] = {mode: 0.6 for mode in (config.input, "audio_face_text")}
(workdir / "result.json").write_text(json.dumps(result))
"""
COMMAND = (sys.executable, "-c", FAKE)


def make_runs(folder: Path, count: int = 3, *flags: str) -> list[Run]:
    return [Run(f"run {i}", folder / str(i), (f"--config.seed={i}", *flags)) for i in range(count)]


def touch(run: Run, name: str, text: str = "") -> None:
    run.workdir.mkdir(exist_ok=True)
    (run.workdir / name).write_text(text)


def calls(runs: list[Run]) -> list[int]:
    return [len((run.workdir / "calls").read_text()) for run in runs]


def test_runs_that_are_finished_are_not_run_again(tmp_path):
    runs, said = make_runs(tmp_path), []
    first = train_all(runs, 2, said.append, COMMAND)
    assert [o.result["hit"] for o in first] == [0.5] * 3
    assert sorted(re.sub(r"\d+ s", "N s", line) for line in said) == sorted(
        [f"[{n}/3] run {i}: finished in N s" for n, i in enumerate(_order(said), 1)]
    )
    again = train_all(runs, 2, said.append, COMMAND)
    assert said[-1] == "3 of 3 runs are finished already"
    assert again == first
    assert calls(runs) == [1, 1, 1]


def _order(said: list[str]) -> list[int]:
    return [int(re.search(r"run (\d)", line)[1]) for line in said]


@pytest.mark.parametrize("left", [None, "", '{"hit": 0.'])
def test_a_run_that_did_not_come_to_its_end_is_started_again(left, tmp_path):
    runs = make_runs(tmp_path, 2)
    touch(runs[0], "metrics.jsonl")
    if left is not None:  # cut off as it was written
        touch(runs[0], "result.json", left)
    outcomes = train_all(runs, 1, lambda _: None, COMMAND)
    assert calls(runs) == [1, 1]
    assert outcomes[0].result["hit"] == 0.5
    # Its first process was not timed, so nothing is said of how long it took.
    assert outcomes[0].result["process_wall_s"] is None
    assert outcomes[1].result["process_wall_s"] > 0


def test_a_run_that_fails_stops_no_other_and_is_tried_again(tmp_path):
    runs, said = make_runs(tmp_path), []
    touch(runs[0], "FAIL")
    outcomes = train_all(runs, 1, said.append, COMMAND)
    log = runs[0].workdir / "train.log"
    assert outcomes[0] == Outcome(None, f"exit status 1, error: the disk is full (more in {log})")
    assert [bool(o.result) for o in outcomes] == [False, True, True]
    assert f"[1/3] run 0: failed: {outcomes[0].error}" in said
    (runs[0].workdir / "FAIL").unlink()
    assert all(o.result for o in train_all(runs, 1, said.append, COMMAND))
    assert calls(runs) == [2, 1, 1]
    assert log.read_text().count(f"workdir {runs[0].workdir}") == 2


def test_a_workdir_of_another_config_is_refused_before_anything_starts(tmp_path):
    runs = make_runs(tmp_path, 2)
    train_all(runs[:1], 1, lambda _: None, COMMAND)
    with pytest.raises(RunError, match=f"{runs[0].workdir} holds a finished run of another config"):
        train_all(make_runs(tmp_path, 2, "--config.steps=5"), 1, command=COMMAND)
    assert not runs[1].workdir.exists()


def test_flags_that_make_no_config_are_refused_before_anything_starts(tmp_path):
    runs = [*make_runs(tmp_path, 1), Run("run x", tmp_path / "x", ("--config.stepz=5",))]
    with pytest.raises(RunError, match="run x: config.stepz is not a key; did you mean"):
        train_all(runs, 1, command=COMMAND)
    assert list(tmp_path.iterdir()) == []


def test_a_command_that_ends_without_a_result_has_failed(tmp_path):
    (run,) = make_runs(tmp_path, 1)
    (outcome,) = train_all([run], 1, lambda _: None, (sys.executable, "-c", "print('bye')"))
    assert outcome.error == f"exit status 0, bye (more in {run.workdir / 'train.log'})"


def test_so_many_run_at_a_time_each_on_its_own_cores(tmp_path):
    runs = make_runs(tmp_path, 4)
    for run in runs:
        touch(run, "MEET")  # never ends if there are fewer
    results = [o.result for o in train_all(runs, 2, lambda _: None, COMMAND)]
    assert max(result["beside"] for result in results) <= 2
    shares = sorted({tuple(result["cores"]) for result in results})
    if hasattr(os, "sched_getaffinity"):
        mine = sorted(os.sched_getaffinity(0))  # still all of them
        assert len(shares) == min(2, len(mine))
        assert sorted(core for share in shares for core in share) == mine


def test_stopping_stops_the_runs(tmp_path):
    runs = make_runs(tmp_path, 2)
    touch(runs[1], "SLEEP")  # longer than any test may take

    def stop(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_all(runs, 2, stop, COMMAND)
    assert not (runs[1].workdir / "result.json").exists()


def test_the_command_writes_the_reports_of_its_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablation, "train_all", partial(train_all, command=COMMAND))
    flags = ["--seeds", "0", "1", "--jobs", "2", "--config.steps=7"]
    flags += [f"--workdir={tmp_path / 'runs'}", f"--out={tmp_path / 'out'}"]
    broken = tmp_path / "runs" / "attention-multi_audio_face_text-rank8-seed1"
    broken.mkdir(parents=True)
    (broken / "FAIL").touch()
    with pytest.raises(SystemExit, match="error: 1 of 8 runs gave no score"):
        ablation.main(["--table", "8", *flags])
    (broken / "FAIL").unlink()
    capsys.readouterr()
    ablation.main(["--table", "8", "5", *flags])
    said = capsys.readouterr().out
    assert "7 of 12 runs are finished already" in said
    assert "Table 5: pre-fusion" in said and "Table 8: LoRA rank" in said
    for number in (5, 8):
        report = json.loads((tmp_path / "out" / f"ablation_table{number}.json").read_text())
        assert report["environment"]["command"] == (
            f"python -m benchmarks.ablation --table {number} --seeds 0 1 --config.steps=7"
        )
        assert str(tmp_path) not in json.dumps(report)
        assert [row["hits"] for row in report["rows"]] == [{"0": 0.5, "1": 0.5}] * len(
            TABLES[number].rows
        )
        assert {run["steps"] for run in report["runs"]} == {7}


def test_a_wrong_flag_is_one_sentence():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.ablation", "--table", "5", "--config.stepz=3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.strip().endswith("config.stepz is not a key; did you mean config.steps?")
    assert "Traceback" not in done.stderr


def test_the_config_that_the_training_command_leaves_is_known_again(tmp_path):
    for run in plan([5, 6, 8], [1], tmp_path, ["--config.steps=1"]).values():
        config, _ = parse_command_line(run.flags)
        run.workdir.mkdir()
        save_config(config, run.workdir)
        assert finished(run) is None
        touch(run, "result.json", '{"hit": 0.25}')
        assert finished(run).result == {"hit": 0.25, "process_wall_s": None}
