"""One command for all measurements: what runs, in which order, and what a limit of time does."""

import re

import pytest

from benchmarks import all as everything
from benchmarks import tables, workloads
from benchmarks.all import Step, run, steps

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


@pytest.mark.parametrize("scale", workloads.SCALES)
def test_every_command_is_one_that_its_module_takes(scale, tmp_path):
    pytest.importorskip("torch", reason="the benchmark of the extraction runs in PyTorch")
    planned = steps(scale, tmp_path, tmp_path)
    assert len({step.result for step in planned}) == len(planned)
    for step in planned:
        module, *words = step.command
        assert module.startswith("benchmarks.") and words[-2:] == [
            "--out",
            str(tmp_path / f"{step.result}.json"),
        ]
        name = module.removeprefix("benchmarks.")
        parser = getattr(__import__(module, fromlist=[name]), "parse", None)
        if parser:
            assert parser(words).out == tmp_path / f"{step.result}.json"


def test_every_aim_is_answered_by_a_measurement_that_is_made(tmp_path):
    made = {s.result for scale in ("full", "small") for s in steps(scale, tmp_path, tmp_path)}
    assert {aim.result for aim in tables.AIMS} <= made


def test_a_process_beyond_its_bound_is_stopped():
    command = ("timeit", "-n1", "-r1", "__import__('time').sleep(60)")
    assert everything.start(Step("a", command, 1)) == 124


def test_a_call_without_all_results_fails(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        everything.main(
            ["--scale=tiny", "--budget=1", f"--out={tmp_path}", f"--records={tmp_path}"]
        )
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    assert "not started" in printed and re.search(r"\| open \|", printed)
