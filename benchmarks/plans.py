"""Plans of the paper's recipe on several clusters: `python -m benchmarks.plans`.

Runs `python -m affectgpt_jax.plan` for each of `PLANS`. Nothing of it was measured on a GPU: the
seconds that a plan took itself are the only measurement.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import harness
from benchmarks.harness import Report

# The paper's 3 clips an update are one GPU's; more of them share as many each.
PLANS = (
    ("--device=a100-80g", "--devices=1"),
    ("--device=a100-80g", "--devices=8", "--config.batch_size=24"),
    ("--device=a100-80g", "--devices=64", "--config.batch_size=192"),
    ("--device=a100-40g", "--devices=8", "--config.batch_size=24"),
    ("--device=a100-40g", "--devices=8", "--config.batch_size=24", "--config.mesh=fsdp:8"),
)
PLAN = ("python", "-m", "affectgpt_jax.plan", "--config=affectgpt_qwen25_7b")
GIB = 2**30


def make(flags: Sequence[str]) -> dict[str, Any]:
    """One plan, with its command and the seconds that it took."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    output = subprocess.check_output([sys.executable, *PLAN[1:], *flags, "--json"])
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "command": " ".join([*PLAN, *flags]),
        "seconds": seconds,
        # Of all cores together: what others do on the machine leaves it alone.
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "plan": json.loads(output),
    }


def run(_: argparse.Namespace) -> Report:
    """Every plan; returns the report."""
    return {"plans": [make(flags) for flags in PLANS]}


def layout_of(made: Report) -> str:
    """Batch, mesh and remat policy of a plan."""
    layout = made["plan"]["layout"]
    axes = [f"{axis}:{size}" for axis, size in layout["mesh"].items() if size > 1]
    batch = made["plan"]["config"]["batch_size"]
    return f"{batch}, {','.join(axes) or 'data:1'}, {layout['remat']}"


def milliseconds(*keys: str) -> Callable[[Report], str]:
    """Of terms of an update's time."""

    def cell(made: Report) -> str:
        seconds = made["plan"]["layout"]["seconds"]
        return " / ".join(f"{1e3 * seconds[key]:.0f}" for key in keys) + " ms"

    return cell


def recommended(made: Report) -> str:
    """The flags that a plan recommends."""
    best = made["plan"]["recommended"]
    return f"`{best['flags'].replace('--config.', '')}`" if best else "none fits"


COLUMNS = {
    "GPUs": lambda m: f"{m['plan']['layout']['devices']} x {m['plan']['device']['name']}",
    "batch, mesh, remat": layout_of,
    "peak of usable GiB": lambda m: (
        f"{m['plan']['layout']['memory']['total'] / GIB:.1f} of {m['plan']['usable'] / GIB:.1f}"
    ),
    "TFLOP a GPU": lambda m: (
        f"{m['plan']['flops']['step'] / m['plan']['layout']['devices'] / 1e12:.1f}"
    ),
    "sent": lambda m: f"{sum(c['bytes'] for c in m['plan']['collectives']) / 1e9:.2f} GB",
    "matmuls / memory / network": milliseconds("compute", "memory", "network"),
    "at least": milliseconds("floor"),
    "expected": milliseconds("expected"),
    "tokens/s": lambda m: f"{m['plan']['layout']['tokens_per_s']:,.0f}",
    "recommended": recommended,
}


def table(report: Report) -> str:
    """A Markdown table of plans, and how long they took."""
    plans = report["plans"]
    took, work = (
        "{:.0f} to {:.0f} s".format(*(limit(made[key] for made in plans) for limit in (min, max)))
        for key in ("seconds", "cpu_seconds")
    )
    words = f"each plan took {took}, of which processors worked {work}"
    return f"{harness.columns(COLUMNS, plans)}\n\n{words}"


COMMAND = harness.Measurement("plans", run, harness.each(table), lambda args: "plans")

if __name__ == "__main__":
    COMMAND.main()
