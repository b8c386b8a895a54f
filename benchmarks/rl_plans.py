"""Plans of a step of reinforcement of Qwen2.5-7B: `python -m benchmarks.rl_plans [--add]`.

Runs `python -m affectgpt_jax.plan --rl --compile` for each of `PLANS` (extra gpu-compile). Nothing
is run on a GPU: memory is XLA's buffer assignment, and times follow from FLOPs and bytes. Every
plan is written as soon as it is made.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from affectgpt_jax.common.json import read_json
from benchmarks import harness
from benchmarks.harness import Report

PLAN = "python -m affectgpt_jax.plan --rl --config=affectgpt_qwen25_7b --devices=1 --compile"
# The first is the default step: 64 prompts, 4 answers each, of lists of labels.
PLANS = (
    ("--device=h100-80g",),
    ("--device=h100-80g", "--config.rl.prompts=32", "--config.rl.group=8"),
    ("--device=a100-80g",),
)
GIB = 2**30


def make(command: str) -> dict[str, Any]:
    """One plan, with its command."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        words = [*command.split()[1:], f"--json={path}"]
        subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
        return {"command": command, "plan": read_json(path, dict[str, Any])}


def run(args: argparse.Namespace) -> Report:
    """Every plan that is asked for; returns the report."""
    path = args.out or harness.RESULTS / "rl_plans.json"
    kept = harness.load(path)["plans"] if args.add and path.is_file() else []
    for flags in PLANS[: args.first]:
        command = " ".join((PLAN, *flags))
        if command not in [made["command"] for made in kept]:
            kept.append(make(command))
            about = {"command": harness.command("rl_plans", args.words), **harness.describe()}
            harness.save({"environment": about, "plans": kept}, path)
    return {"plans": kept}


def compiled_ms(name: str) -> Callable[[Report], str]:
    """The floor of one run of a program."""
    return lambda made: f"{made['plan']['compiled']['passes'][name]['floor_ms']:,.1f}"


COLUMNS = {
    "compiled, not run": lambda m: m["plan"]["device"]["name"],
    "prompts x answers": lambda m: (
        f"{m['plan']['config']['rl']['prompts']} x {m['plan']['config']['rl']['group']}"
    ),
    "tokens of both": lambda m: f"{m['plan']['prompt']} + {m['plan']['answer']}",
    "remat": lambda m: m["plan"]["remat"],
    "peak GiB (estimate)": lambda m: (
        f"{m['plan']['compiled']['peak_gib']:.1f} ({m['plan']['estimate']['peak_gib']:.1f})"
    ),
    "of usable": lambda m: f"{m['plan']['usable'] / GIB:.1f}",
    "prompts ms": compiled_ms("prefill"),
    "a token ms": compiled_ms("decode"),
    "reference ms": compiled_ms("log_probs"),
    "update ms": compiled_ms("update"),
    "a step at least": lambda m: f"{m['plan']['compiled']['step_s']:.1f} s",
    "expected": lambda m: f"{m['plan']['seconds']['step']['expected']:.1f} s",
}


def table(report: Report) -> str:
    """A Markdown table of plans."""
    return harness.columns(COLUMNS, report["plans"])


def flags(add: Callable[..., Any]) -> None:
    add("--first", type=harness.at_least(1), help="only so many of the plans")
    add("--add", action="store_true", help="keep the plans that the file has")


COMMAND = harness.Measurement(
    "rl_plans", run, harness.each(table), lambda args: "rl_plans", flags=flags
)

if __name__ == "__main__":
    COMMAND.main()
