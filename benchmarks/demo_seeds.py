"""Train the default config on several demo worlds: `python -m benchmarks.demo_seeds`.

Every run is a process of its own, as a user would start it, so its wall time holds imports, data
building and compilation. The first seed is run twice, to see whether its losses repeat bit by bit.
`--config.key=value` goes to all runs.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from affectgpt_jax.training.metrics_writer import read_metrics
from benchmarks import harness
from benchmarks.harness import Report
from benchmarks.runner import Run, RunError, train_all


def losses(workdir: Path) -> list[float]:
    """Every logged training loss of a run."""
    records = read_metrics(workdir / "metrics.jsonl")
    return [record["train/loss"] for record in records if "train/loss" in record]


def run(args: argparse.Namespace) -> Report:
    """All worlds; returns the report.

    Raises:
        RunError: a run cannot be started, or failed.
    """
    with tempfile.TemporaryDirectory() as temporary:
        names, seeds = [*map(str, args.seeds), "again"], [*args.seeds, args.seeds[0]]
        runs = [
            Run(f"world {n}", Path(temporary) / n, (f"--config.demo_seed={s}", *args.overrides))
            for n, s in zip(names, seeds, strict=True)
        ]
        outcomes = train_all(runs, jobs=1)  # times as a user would see them
        if failed := [o.error for o in outcomes if o.result is None]:
            raise RunError(f"{len(failed)} of {len(runs)} runs failed: {failed[0]}")
        repeats = losses(runs[0].workdir) == losses(runs[-1].workdir)
    return {
        "repeats_bit_by_bit": repeats,
        "runs": [
            {"demo_seed": seed, **outcome.result} for seed, outcome in zip(args.seeds, outcomes)
        ],
    }


def fused(run: Report) -> float:
    """The ceiling of the default inputs."""
    return run["ceilings"]["multi_audio_face_text"]


def best_of(*modes: str) -> Callable[[Report], str]:
    """The highest of these ceilings."""
    return lambda run: f"{max(run['ceilings'][mode] for mode in modes):.3f}"


COLUMNS = {
    "world": lambda run: f"{run['demo_seed']}",
    "hit rate": lambda run: f"{run['hit']:.3f}",
    "ceiling": lambda run: f"{fused(run):.3f}",
    "share": lambda run: f"{run['hit'] / fused(run):.1%}",
    "best single input": best_of("face", "audio", "text"),
    "best pair with subtitle": best_of("face_text", "audio_text"),
    "features shuffled": lambda run: f"{run['hit_features_shuffled']:.3f}",
    "labels per clip": lambda run: f"{run['labels_per_clip']:.2f}",
    "wall time": lambda run: f"{run['process_wall_s']:.0f} s",
}


def table(report: Report) -> str:
    """A Markdown table of a report."""
    repeats = f"same seed, same losses, bit by bit: {report['repeats_bit_by_bit']}"
    return f"{harness.columns(COLUMNS, report['runs'])}\n\n{repeats}"


def flags(add: Callable[..., Any]) -> None:
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])


COMMAND = harness.Measurement(
    "demo_seeds",
    run,
    harness.each(table),
    lambda args: "demo_seeds",
    flags,
    overrides=True,
)

if __name__ == "__main__":
    COMMAND.main()
