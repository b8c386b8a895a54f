"""Train the default config on several demo worlds: `python -m benchmarks.demo_seeds`.

Every run is a process of its own, as a user would start it, so its wall time holds imports, data
building and compilation. The first seed is run twice, to see whether its losses repeat bit by bit.
Writes `benchmarks/results/demo_seeds.json`; `--show` prints the table of such a file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from affectgpt_jax.training.metrics_writer import read_metrics
from benchmarks import environment
from benchmarks.runner import Run, RunError, train_all

RESULTS = Path(__file__).parent / "results" / "demo_seeds.json"


def losses(workdir: Path) -> list[float]:
    """Every logged training loss of a run."""
    records = read_metrics(workdir / "metrics.jsonl")
    return [record["train/loss"] for record in records if "train/loss" in record]


def table(report: dict[str, Any]) -> str:
    """A Markdown table of a report."""
    lines = [
        "| world | hit rate | ceiling | share | best single input | best pair with subtitle "
        "| features shuffled | labels per clip | wall time |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in report["runs"]:
        c = r["ceilings"]
        fused = c["multi_audio_face_text"]
        single = max(c["face"], c["audio"], c["text"])
        pair = max(c["face_text"], c["audio_text"])
        lines.append(
            f"| {r['demo_seed']} | {r['hit']:.3f} | {fused:.3f} | {r['hit'] / fused:.1%} "
            f"| {single:.3f} | {pair:.3f} | {r['hit_features_shuffled']:.3f} "
            f"| {r['labels_per_clip']:.2f} | {r['process_wall_s']:.0f} s |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--show", type=Path, help="print the table of a result file and stop")
    args, overrides = parser.parse_known_args()
    if args.show:
        print(table(json.loads(args.show.read_text(encoding="utf-8"))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        names, seeds = [*map(str, args.seeds), "again"], [*args.seeds, args.seeds[0]]
        runs = [
            Run(f"world {name}", Path(temporary) / name, (f"--config.demo_seed={s}", *overrides))
            for name, s in zip(names, seeds)
        ]
        try:
            outcomes = train_all(runs, jobs=1)  # times as a user would see them
        except RunError as error:
            raise SystemExit(f"error: {error}") from None
        if failed := [o.error for o in outcomes if o.result is None]:
            raise SystemExit(f"error: {len(failed)} of {len(runs)} runs failed: {failed[0]}")
        repeats = losses(runs[0].workdir) == losses(runs[-1].workdir)
    report = {
        "environment": environment.describe(),
        "repeats_bit_by_bit": repeats,
        "runs": [
            {"demo_seed": seed, **outcome.result} for seed, outcome in zip(args.seeds, outcomes)
        ],
    }
    environment.save(report, args.out)
    print(table(report))
    print(f"same seed, same losses, bit by bit: {repeats}")


if __name__ == "__main__":
    main()
