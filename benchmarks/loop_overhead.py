"""What the training loop takes of the host: `python -m benchmarks.loop_overhead`.

The default run of `affectgpt_jax.train`, shortened, by its own account: `rate/host_ms` is the time
of a step in which the loop neither waited, for a batch or for the device, nor dispatched the step.
On a CPU the device is the host's cores; there XLA gets a single thread, so that the loop has a core
of its own, as beside a GPU. `--config.key=value` goes to the training command.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from affectgpt_jax.training.metrics_writer import read_metrics
from benchmarks import harness
from benchmarks.harness import Report, at_least, spread, spread_in_words
from benchmarks.runner import TRAIN, Run, RunError, train_all

AIM_MS = 2.0
# Steps that a logged rate is the mean of (`metrics_writer.Throughput`).
WINDOW = 20
# XLA takes its number of threads from here. On a GPU it has no say.
ONE_THREAD = ("env", "NPROC=1", *TRAIN)


def rates(workdir: Path) -> dict[str, list[float]]:
    """Milliseconds a step of a run, for each `WINDOW` steps after the first ones: in which the loop
    was at work (`host`), had no batch (`data_wait`), and altogether (`step`)."""
    records = [r for r in read_metrics(workdir / "metrics.jsonl") if "rate/host_ms" in r]
    apart = [r for r in records if r["step"] % WINDOW == 0 and r["step"] > WINDOW]
    return {name: [r[f"rate/{name}_ms"] for r in apart] for name in ("host", "data_wait", "step")}


def run(args: argparse.Namespace) -> Report:
    """One measurement; returns the report.

    Raises:
        RunError: the run cannot be started, or failed.
    """
    flags = (f"--config.steps={args.steps}", f"--config.checkpoint_every={args.steps}")
    with tempfile.TemporaryDirectory() as temporary:
        flags += ("--config.log_every=10", *args.overrides)
        told = Run("loop", Path(temporary) / "run", flags)
        [outcome] = train_all([told], jobs=1, command=ONE_THREAD)
        if outcome.result is None:
            raise RunError(outcome.error)
        found = rates(told.workdir)
    return {
        "settings": {"steps": args.steps, "log_every": 10, "window": WINDOW},
        "milliseconds": {
            name: spread(values) | {"windows": len(values)} for name, values in found.items()
        },
    }


def table(report: Report) -> str:
    """A Markdown table of a report."""
    names = {
        "step": "altogether",
        "host": "the loop at work, beyond dispatch",
        "data_wait": "waiting for a batch",
    }
    return harness.markdown(
        ("a step of the default run", f"median (range) of means over {WINDOW} steps"),
        [
            (name, spread_in_words(report["milliseconds"][key], ".2f", " ms"))
            for key, name in names.items()
        ],
    )


def flags(add: Callable[..., Any]) -> None:
    least = 2 * WINDOW + 1
    add("--steps", type=at_least(least), default=240, help=f"{least} or more")


COMMAND = harness.Measurement(
    "loop_overhead",
    run,
    harness.each(table),
    lambda args: f"loop_overhead_{harness.default_scale()}",
    flags,
    overrides=True,
)

if __name__ == "__main__":
    COMMAND.main()
