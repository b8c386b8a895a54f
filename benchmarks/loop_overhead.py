"""What the training loop takes of the host: `python -m benchmarks.loop_overhead`.

The default run of `affectgpt_jax.train`, shortened, by its own account: `rate/host_ms` is the time
of a step in which the loop neither waited, for a batch or for the device, nor dispatched the step.
On a CPU the device is the host's cores; there XLA gets a single thread, so that the loop has a core
of its own, as beside a GPU. Writes `benchmarks/results/loop_overhead_SCALE.json`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from affectgpt_jax.training.metrics_writer import read_metrics
from benchmarks import environment
from benchmarks.runner import TRAIN, Run, RunError, train_all
from benchmarks.train_step import RESULTS, default_scale

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


def run(args: argparse.Namespace, overrides: Sequence[str]) -> dict[str, Any]:
    """One measurement; returns the report.

    Raises:
        RunError: the run cannot be started, or failed.
    """
    flags = (f"--config.steps={args.steps}", f"--config.checkpoint_every={args.steps}")
    with tempfile.TemporaryDirectory() as temporary:
        told = Run("loop", Path(temporary) / "run", (*flags, "--config.log_every=10", *overrides))
        [outcome] = train_all([told], jobs=1, command=ONE_THREAD)
        if outcome.result is None:
            raise RunError(outcome.error)
        found = rates(told.workdir)
    about = environment.describe()
    about["command"] = environment.command("benchmarks.loop_overhead", args.words)
    return {
        "environment": about,
        "settings": {"steps": args.steps, "log_every": 10, "window": WINDOW},
        "milliseconds": {
            name: {
                "median": statistics.median(values),
                "lowest": min(values),
                "highest": max(values),
                "windows": len(values),
            }
            for name, values in found.items()
        },
    }


def table(report: Mapping[str, Any]) -> str:
    """A Markdown table of a report."""
    found = report["milliseconds"]
    lines = ["| a step of the default run | median (range) of means over 20 steps |", "|---|---|"]
    names = {
        "step": "altogether",
        "host": "the loop at work, beyond dispatch",
        "data_wait": "waiting for a batch",
    }
    for key, name in names.items():
        spread = "{median:.2f} ms ({lowest:.2f} to {highest:.2f})".format(**found[key])
        lines.append(f"| {name} | {spread} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; other flags go to the training command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=240, help=f"more than {2 * WINDOW}")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/loop_overhead_...")
    words = sys.argv[1:] if argv is None else list(argv)
    args, overrides = parser.parse_known_args(words)
    args.words = words
    if args.steps <= 2 * WINDOW:
        parser.error(f"--steps is {args.steps}; expected more than {2 * WINDOW}")
    try:
        report = run(args, overrides)
    except RunError as error:
        raise SystemExit(f"error: {error}") from None
    environment.save(report, args.out or RESULTS / f"loop_overhead_{default_scale()}.json")
    print(table(report))


if __name__ == "__main__":
    main()
