"""One command for all measurements: what runs, in which order, and what a limit of time does."""

import _thread
import importlib
import os
import re
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


def test_what_may_not_end_in_time_is_not_started(tmp_path):
    said, (log, start) = [], started(tmp_path)
    assert not run(PLANNED, tmp_path, again=False, budget_s=5, start=start, say=said.append)
    assert log == [] and said[0] == "a: may take 10 s, 5 s are left; not started"


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
    assert "--only typo is in the name of no result; there are train_step_anchor_tiny, " in told


def test_a_call_without_all_results_fails(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        everything.main(
            ["--scale=tiny", "--budget=1", f"--out={tmp_path}", f"--records={tmp_path}"]
        )
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    assert "not started" in printed and re.search(r"\| open \|", printed)
