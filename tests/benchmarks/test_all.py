"""One command for all measurements: what runs, in which order, and what a limit of time does."""

import _thread
import importlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import needs_torch
import pytest

from benchmarks import all as everything
from benchmarks import tables
from benchmarks.all import Step, run, steps
from benchmarks.harness import SCALES

PLANNED = [Step(name, ("true",), 10) for name in ("a", "b", "c")]


def make(out, *done):
    for name in done:
        (out / f"{name}.json").write_text("{}")


def started(out, fails=()):
    log = []

    def start(step):
        log.append(step.result)
        if step.result in fails:
            return fails[step.result]
        make(out, step.result)
        return 0

    return log, start


def test_what_has_a_result_is_not_run_again(tmp_path):
    make(tmp_path, "b")
    log, start = started(tmp_path)
    assert run(PLANNED, tmp_path, again=False, budget_s=0, start=start, say=list)
    assert log == ["a", "c"]
    assert run(PLANNED, tmp_path, again=True, budget_s=0, start=start, say=list)
    assert log == ["a", "c", "a", "b", "c"]


def test_what_has_less_than_half_its_time_is_not_started(tmp_path):
    said, (log, start) = [], started(tmp_path)
    assert not run(PLANNED, tmp_path, again=False, budget_s=4, start=start, say=said.append)
    assert log == [] and said[0] == "a: may take 10 s, 4 s are left; not started"


def test_what_runs_when_the_time_is_over_is_stopped_then(tmp_path):
    bounds = []

    def start(step):
        bounds.append(step.bound_s)
        return 124

    assert not run(PLANNED[:1], tmp_path, again=False, budget_s=7, start=start, say=list)
    assert not run(PLANNED[:1], tmp_path, again=False, budget_s=0, start=start, say=list)
    assert 6 < bounds[0] <= 7 and bounds[1] == 10


def test_a_call_that_is_cut_goes_on_where_it_was(tmp_path):
    log, start = started(tmp_path)

    def cut(step):
        if step.result == "b":
            raise KeyboardInterrupt
        return start(step)

    with pytest.raises(KeyboardInterrupt):
        run(PLANNED, tmp_path, again=False, budget_s=0, start=cut, say=list)
    assert run(PLANNED, tmp_path, again=False, budget_s=0, start=start, say=list)
    assert log == ["a", "b", "c"]


LENT = [
    "attention",
    "train_step_anchor",
    "train_step_affectgpt_48_beside_tuned",
    "train_step_affectgpt_48_beside_packed",
    "generation_jax",
    "prediction_anchor",
    "train_step_anchor_int8",
    "train_step_anchor_fp8",
    "train_step_anchor_traced",
]


def test_a_lent_gpu_measures_first_what_is_known_least(tmp_path):
    planned = steps("full", tmp_path, tmp_path, brief=True)[: len(LENT)]
    assert [step.result for step in planned] == [f"{name}_full" for name in LENT]
    assert all(step.bound_s <= 400 for step in planned)
    # The same ones run in tests, on fewer clips.
    tiny = [step.result.replace("tiny", "full") for step in steps("tiny", tmp_path, tmp_path)]
    assert [name.replace("_12_", "_48_") for name in tiny[: len(LENT)]] == [
        step.result for step in planned
    ]


def test_sides_share_a_gpu_only_where_it_has_room(tmp_path, monkeypatch):
    for crowded in (True, False):
        planned = steps("full", tmp_path, tmp_path, crowded=crowded)
        beside = [step for step in planned if "affectgpt_48_beside" in step.result]
        assert beside and all(("--leave" in step.command) == crowded for step in beside)
    for told, crowded in (("143771\n143771\n", False), ("81559\n", True), ("[N/A]", True)):
        answer = lambda *_, told=told, **__: told  # noqa: E731
        monkeypatch.setattr(everything.subprocess, "check_output", answer)
        assert everything.crowded() == crowded
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert everything.crowded()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_first_measurements_run_and_a_second_call_makes_what_the_first_did_not(tmp_path):
    """All that a lent GPU would run first, at tiny scale, each command as it is."""
    needs_torch.pytorch("the peer runs in PyTorch")
    results, env = tmp_path / "results", os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
    names = [name.replace("_48_", "_12_") + "_tiny" for name in LENT]
    command = [sys.executable, "-m", "benchmarks.all", "--scale=tiny", "--budget=3000"]
    command += [f"--out={results}", f"--records={tmp_path}", "--only", *names]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as first:
        for line in first.stdout:
            if line.startswith(f"{names[2]}: python"):
                first.send_signal(signal.SIGTERM)
    assert first.returncode == 128 + signal.SIGTERM
    made = {path.stem for path in results.glob("*.json")}
    assert made == {*names[:2], "profile_anchor_tiny"}
    second = subprocess.run(command, env=env, capture_output=True, text=True)
    assert second.returncode == 0, second.stdout + second.stderr
    assert [f"{name}: there already" in second.stdout for name in names[:3]] == [True, True, False]
    made = {path.stem for path in results.glob("*.json")}
    assert made == {*names, "profile_anchor_tiny", "profile_anchor_traced_tiny"}


@pytest.mark.parametrize(("status", "words"), [(124, "stopped"), (1, "failed, exit status 1")])
def test_one_that_fails_is_told_and_the_next_is_run(tmp_path, status, words):
    said, (log, start) = [], started(tmp_path, {"a": status})
    make(tmp_path, "a")  # of an earlier call
    assert not run(PLANNED, tmp_path, again=True, budget_s=0, start=start, say=said.append)
    assert log == ["a", "b", "c"] and any(f"a: {words}" in line for line in said)


@pytest.mark.parametrize("scale", SCALES)
def test_every_command_is_one_that_its_module_takes(scale, tmp_path):
    needs_torch.pytorch("the benchmark of the extraction runs in PyTorch")
    planned = steps(scale, tmp_path, tmp_path)
    assert len({step.result for step in planned}) == len(planned)
    for step in planned:
        module, *words = step.command
        args = importlib.import_module(module).COMMAND.parse(words)
        assert args.out == tmp_path / f"{step.result}.json"
        if step.profile:  # as `train_step` names it
            assert args.profile and step.profile == step.result.replace("train_step", "profile")


def test_every_aim_is_answered_by_a_measurement_that_is_made(tmp_path):
    made = {s.result for scale in ("full", "small") for s in steps(scale, tmp_path, tmp_path)}
    assert {name for aim in tables.AIMS for name in (aim.result, aim.otherwise) if name} <= made


def lives(number):
    """Whether a process is there and not only waited for."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def with_a_child(told):
    """A step whose child does not end when it is asked to, and tells its number in a file."""
    script = f"trap '' TERM; echo $$ > {told}; sleep 60"
    return Step("a", ("timeit", "-n1", "-r1", f"__import__('os').system({script!r})"), 2)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="children are looked up in /proc")
@pytest.mark.parametrize("interrupted", [False, True])
def test_a_step_that_is_stopped_leaves_no_process_behind(tmp_path, monkeypatch, interrupted):
    monkeypatch.setattr(everything, "GRACE_S", 0.2)
    told = tmp_path / "number"
    if interrupted:  # Ctrl-C

        def interrupt():
            while not (told.exists() and told.read_text()):
                time.sleep(0.05)
            _thread.interrupt_main()

        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            everything.start(with_a_child(told)._replace(bound_s=60))
    else:
        assert everything.start(with_a_child(told)) == 124
    number = int(told.read_text())
    until = time.monotonic() + 5
    while lives(number) and time.monotonic() < until:
        time.sleep(0.05)
    assert not lives(number)


def test_a_signal_while_a_step_starts_ends_it(monkeypatch):
    started, popen = [], subprocess.Popen

    def starting(*args, **kwargs):
        started.append(popen(*args, **kwargs))
        signal.raise_signal(signal.SIGINT)
        return started[0]

    monkeypatch.setattr(everything.subprocess, "Popen", starting)
    command = ("timeit", "-n1", "-r1", "-s", "import time", "time.sleep(60)")
    with pytest.raises(KeyboardInterrupt):
        everything.start(Step("a", command, 60))
    assert started[0].poll() is not None


def test_a_step_has_time_to_end_by_itself(tmp_path):
    """A training run writes a checkpoint then."""
    left = tmp_path / "left"
    code = f"signal.signal(signal.SIGTERM, lambda *_: (open({str(left)!r}, 'w'), exit(1)))"
    command = ("timeit", "-n1", "-r1", "-s", f"import signal, time; {code}", "time.sleep(60)")
    assert everything.start(Step("a", command, 2)) == 124
    assert left.exists()


def test_a_measurement_whose_profile_is_missing_is_run_again(tmp_path):
    planned = [Step("train_step_a", ("true",), 10, profile="profile_a")]
    make(tmp_path, "train_step_a")
    log, start = started(tmp_path)
    assert not run(planned, tmp_path, again=False, budget_s=0, start=start, say=list)
    make(tmp_path, "profile_a")
    assert run(planned, tmp_path, again=False, budget_s=0, start=start, say=list)
    assert log == ["train_step_a"]


def test_what_no_result_is_called_is_refused(tmp_path, capsys):
    flags = ["--scale=tiny", f"--out={tmp_path / 'out'}", f"--records={tmp_path}"]
    with pytest.raises(SystemExit) as ended:
        everything.main([*flags, "--only", "savings", "typo"])
    assert ended.value.code == 2 and not (tmp_path / "out").exists()
    told = capsys.readouterr().err
    assert (
        "--only typo is in the name of no result; there are attention_tiny, train_step_anchor"
        in told
    )


def test_a_call_without_all_results_fails(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        everything.main(
            ["--scale=tiny", "--budget=1", f"--out={tmp_path}", f"--records={tmp_path}"]
        )
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    assert "not started" in printed and re.search(r"\| open \|", printed)
