"""Plans of the paper's recipe on several clusters: `python -m benchmarks.plans`.

Runs `python -m affectgpt_jax.plan` for each of `PLANS`, prints a Markdown table of what they say
and writes it all to `benchmarks/results/plans.json`. Nothing of it was measured on a GPU: the
seconds that a plan took itself are the only measurement.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.train_step import RESULTS

# The paper's 3 clips an update are one GPU's; more of them share as many each.
PLANS = (
    ("--device=a100-80g", "--devices=1"),
    ("--device=a100-80g", "--devices=8", "--config.batch_size=24"),
    ("--device=a100-80g", "--devices=64", "--config.batch_size=192"),
    ("--device=a100-40g", "--devices=8", "--config.batch_size=24"),
    ("--device=a100-40g", "--devices=8", "--config.batch_size=24", "--config.mesh=fsdp:8"),
)
COMMAND = ("python", "-m", "affectgpt_jax.plan", "--config=affectgpt_qwen25_7b")
GIB = 2**30


def make(flags: Sequence[str]) -> dict[str, Any]:
    """One plan, with its command and the seconds that it took."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    output = subprocess.check_output([sys.executable, *COMMAND[1:], *flags, "--json"])
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "command": " ".join([*COMMAND, *flags]),
        "seconds": seconds,
        # Of all cores together: what others do on the machine leaves it alone.
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "plan": json.loads(output),
    }


def table(plans: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of plans."""
    lines = [
        "| GPUs | batch, mesh, remat | peak of usable GiB | TFLOP a GPU | sent | products / memory "
        "/ network | at least | expected | tokens/s | recommended |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for made in plans:
        plan = made["plan"]
        layout, best = plan["layout"], plan["recommended"]
        seconds = layout["seconds"]
        axes = [f"{axis}:{size}" for axis, size in layout["mesh"].items() if size > 1]
        flops = plan["flops"]["step"] / layout["devices"]
        sent = sum(c["bytes"] for c in plan["collectives"])
        terms = " / ".join(f"{1e3 * seconds[k]:.0f}" for k in ("compute", "memory", "network"))
        lines.append(
            f"| {layout['devices']} x {plan['device']['name']} | {plan['config']['batch_size']}, "
            f"{','.join(axes) or 'data:1'}, {layout['remat']} "
            f"| {layout['memory']['total'] / GIB:.1f} of {plan['usable'] / GIB:.1f} "
            f"| {flops / 1e12:.1f} | {sent / 1e9:.2f} GB | {terms} ms "
            f"| {1e3 * seconds['floor']:.0f} ms | {1e3 * seconds['expected']:.0f} ms "
            f"| {layout['tokens_per_s']:,.0f} | {_short(best['flags']) if best else 'none fits'} |"
        )
    return "\n".join(lines)


def _short(flags: str) -> str:
    return f"`{flags.replace('--config.', '')}`"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "plans.json")
    parser.add_argument("--show", action="store_true", help="print the table of --out and stop")
    args = parser.parse_args(argv)
    if not args.show:
        report = {"environment": environment.describe(), "plans": [make(flags) for flags in PLANS]}
        environment.save(report, args.out)
    report = json.loads(args.out.read_text(encoding="utf-8"))
    print(table(report["plans"]))
    took, work = ([made[key] for made in report["plans"]] for key in ("seconds", "cpu_seconds"))
    print(
        f"\neach plan took {min(took):.0f} to {max(took):.0f} s, of which processors worked "
        f"{min(work):.0f} to {max(work):.0f} s"
    )


if __name__ == "__main__":
    main()
