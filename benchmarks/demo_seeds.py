"""Train the default config on several demo worlds: `python -m benchmarks.demo_seeds`.

Every run is a process of its own, as a user would start it, so its wall time holds imports, data
building and compilation. The first seed is run twice, to see whether its losses repeat bit by bit.
Writes `benchmarks/results/demo_seeds.json`; `--show` prints the table of such a file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from affectgpt_jax.training.telemetry import read_metrics
from benchmarks import environment

RESULTS = Path(__file__).parent / "results" / "demo_seeds.json"


def run(seed: int, workdir: Path, overrides: list[str]) -> dict[str, Any]:
    """Train one world in a fresh process; returns its result with the process's wall time."""
    command = [sys.executable, "-m", "affectgpt_jax.train", f"--workdir={workdir}"]
    began = time.perf_counter()
    subprocess.run([*command, f"--config.demo_seed={seed}", *overrides], check=True)
    wall_s = time.perf_counter() - began
    result = json.loads((workdir / "result.json").read_text(encoding="utf-8"))
    return {"demo_seed": seed, "process_wall_s": wall_s, **result}


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
        folder = Path(temporary)
        runs = [run(seed, folder / str(seed), overrides) for seed in args.seeds]
        run(args.seeds[0], folder / "again", overrides)
        repeats = losses(folder / str(args.seeds[0])) == losses(folder / "again")
    report = {"environment": environment.describe(), "repeats_bit_by_bit": repeats, "runs": runs}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(table(report))
    print(f"same seed, same losses, bit by bit: {repeats}")


if __name__ == "__main__":
    main()
