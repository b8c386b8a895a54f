"""Training runs as a user starts them: each a process of `python -m affectgpt_jax.train`.

Several run side by side, each on cores of its own. What a run says goes to `WORKDIR/train.log`. One
that is finished, as its `result.json` and `config.json` show, is not run again; one that was
interrupted is continued by the training command itself. The clips that a finished run had generated
(250 MB) are removed: they follow from its seed.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from affectgpt_jax.common.errors import ReadError, UserError
from affectgpt_jax.common.json import read_json, write_json
from affectgpt_jax.config import ConfigError, parse_command_line
from benchmarks.harness import core_numbers

TRAIN = (sys.executable, "-m", "affectgpt_jax.train")


class RunError(UserError, ValueError):
    """A run that cannot be started as asked."""


class Run(NamedTuple):
    """A training run: what messages call it, its workdir, and the flags of its config."""

    name: str
    workdir: Path
    flags: tuple[str, ...]


class Outcome(NamedTuple):
    """What became of a run.

    Attributes:
        result: what its `result.json` holds, and `process_wall_s`: the seconds from the start of
            its process to the end, imports and compilation included; None where it took several
            processes. None for a run that failed.
        error: the last words of a run that failed.
    """

    result: dict[str, Any] | None
    error: str = ""


def finished(run: Run) -> Outcome | None:
    """What an earlier call left of a run; None if it has not come to its end.

    Raises:
        RunError: the flags make no config, or the workdir holds a finished run of another one.
    """
    try:
        config, _ = parse_command_line(run.flags)
    except ConfigError as error:
        raise RunError(f"{run.name}: {error}") from None
    result = _read_json(run.workdir / "result.json")
    if result is None:
        return None
    if _read_json(run.workdir / "config.json") != json.loads(config.to_json()):
        raise RunError(
            f"{run.workdir} holds a finished run of another config; name another --workdir, or "
            "remove that one"
        )
    process = _read_json(run.workdir / "process.json") or {}
    return Outcome({"process_wall_s": process.get("wall_s"), **result})


def train_all(
    runs: Sequence[Run],
    jobs: int,
    say: Callable[[str], None] = print,
    command: Sequence[str] = TRAIN,
) -> list[Outcome]:
    """Train the runs that are not finished, `jobs` at a time; one that fails stops no other.

    Args:
        runs: each with a workdir of its own.
        jobs: processes at a time. The cores are shared out among them, where the system can pin
            processes: two that have one core each get more done than one after the other on two.
        say: called with a line for every run.
        command: the training command.

    Raises:
        RunError: as `finished`, before anything is started.
    """
    outcomes = {run: outcome for run in runs if (outcome := finished(run))}
    if outcomes:
        say(f"{len(outcomes)} of {len(runs)} runs are finished already")
    cores, shares = core_numbers(), queue.SimpleQueue()
    for job in range(jobs):
        shares.put(cores[job % max(len(cores), 1) :: jobs])
    running: set[subprocess.Popen] = set()
    # A process inherits the cores of the thread that starts it, so every thread takes its share.
    with ThreadPoolExecutor(jobs, initializer=lambda: _pin(shares.get())) as pool:
        waiting = {
            pool.submit(_train, run, command, running): run for run in runs if run not in outcomes
        }
        try:
            for future in as_completed(waiting):
                run, outcome = waiting[future], future.result()
                outcomes[run] = outcome
                say(f"[{len(outcomes)}/{len(runs)}] {run.name}: {_in_words(outcome)}")
        except BaseException:
            # Whoever stops this stops the runs; started again, they go on from their checkpoints.
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                process.terminate()
            raise
    return [outcomes[run] for run in runs]


def _pin(cores: Sequence[int]) -> None:
    if cores:
        os.sched_setaffinity(0, cores)  # of this thread


def _train(run: Run, command: Sequence[str], running: set[subprocess.Popen]) -> Outcome:
    fresh = not run.workdir.exists()
    run.workdir.mkdir(parents=True, exist_ok=True)
    log = run.workdir / "train.log"
    began = time.perf_counter()
    with log.open("ab") as file:
        process = subprocess.Popen(
            [*command, f"--workdir={run.workdir}", *run.flags],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )
        running.add(process)
        status = process.wait()
        running.discard(process)
    wall_s = time.perf_counter() - began
    if status == 0:
        write_json(run.workdir / "process.json", {"wall_s": wall_s if fresh else None})
        try:
            if outcome := finished(run):
                shutil.rmtree(run.workdir / "data", ignore_errors=True)
                return outcome
        except RunError as error:
            return Outcome(None, str(error))
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    last = next((line.strip() for line in reversed(lines) if line.strip()), "no word")
    return Outcome(None, f"exit status {status}, {last} (more in {log})")


def _in_words(outcome: Outcome) -> str:
    if outcome.result is None:
        return f"failed: {outcome.error}"
    wall_s = outcome.result["process_wall_s"]
    return "finished" if wall_s is None else f"finished in {wall_s:.0f} s"


def _read_json(path: Path) -> dict[str, Any] | None:
    """A file's content; None where it is not there, or was cut off as it was written."""
    try:
        return read_json(path, dict[str, Any])
    except ReadError:
        return None
