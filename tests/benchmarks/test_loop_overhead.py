"""The benchmark of the loop's host time: what it reads from a run, and what it reports."""

import json

import pytest

from benchmarks import loop_overhead, tables
from benchmarks.runner import Outcome, RunError


def fake_run(log, host_ms):
    """A training command that leaves these host times behind, one for every ten steps."""

    def train_all(runs, jobs, command):
        [run] = runs
        log.append((run.flags, jobs, command))
        run.workdir.mkdir()
        lines = [{"step": 1, "time": 0.0, "train/loss": 1.0}]  # nothing is timed yet
        for i, value in enumerate(host_ms, start=1):
            rates = {"host_ms": value, "data_wait_ms": 0.5, "step_ms": 100.0}
            lines.append({"step": 10 * i, "time": 0.0} | {f"rate/{k}": v for k, v in rates.items()})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run.workdir / "metrics.jsonl").write_text(text)
        return [Outcome({"steps": 80})]

    return train_all


def test_host_time_is_of_windows_that_do_not_overlap_after_the_first(tmp_path, monkeypatch, capsys):
    log, out = [], tmp_path / "out.json"
    times = [90, 80, 70, 3.0, 60, 1.0, 50, 2.0]  # at steps 10, 20, ... 80
    monkeypatch.setattr(loop_overhead, "train_all", fake_run(log, times))
    loop_overhead.COMMAND.main(["--steps=80", f"--out={out}", "--config.batch_size=8"])
    [(flags, jobs, command)] = log
    assert {"--config.steps=80", "--config.batch_size=8"} < set(flags)
    assert jobs == 1 and command[:2] == ("env", "NPROC=1")
    report = json.loads(out.read_text())
    host = {"median": 2.0, "lowest": 1.0, "highest": 3.0, "windows": 3}
    assert report["milliseconds"]["host"] == host
    assert "2.00 ms (1.00 to 3.00)" in capsys.readouterr().out
    assert tables.host_time(report) == tables.Measured("2.0 ms (1.0 to 3.0)", False)


def test_what_fails_is_one_sentence(monkeypatch, capsys):
    def failing(runs, jobs, command):
        raise RunError("no such config")

    monkeypatch.setattr(loop_overhead, "train_all", failing)
    with pytest.raises(SystemExit, match="error: no such config"):
        loop_overhead.COMMAND.main([])
    with pytest.raises(SystemExit):
        loop_overhead.COMMAND.main(["--steps=40"])
    assert "'40' given; expected 41 or more" in capsys.readouterr().err
