"""Every measurement of speed, one after the other: `python -m benchmarks.all`.

In full on a GPU, the least known first; elsewhere at a smaller scale. Each is a command with a
bound in time, whose result is a JSON file. What has its file is not run again, so that a call that
was stopped goes on; `--again` runs all. `--budget SECONDS` starts nothing that may not end in time,
for machines that are lent by the minute. Ends with the table of what was met and what is open.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import workloads
from benchmarks.train_step import RESULTS, default_scale, records_folder


class Step(NamedTuple):
    """A measurement.

    Attributes:
        result: name of its file, without ending.
        command: words after `python -m`.
        bound_s: seconds after which it is stopped.
    """

    result: str
    command: tuple[str, ...]
    bound_s: int


def steps(scale: str, records: Path, out: Path) -> list[Step]:
    """All measurements of a scale, in the order in which they run."""
    found: list[Step] = []

    def train(name: str, *words: str, bound_s: int, profile: bool = False) -> None:
        command = ["benchmarks.train_step", *words, "--records", str(records)]
        command += ["--scale", scale]
        if profile:
            command += ["--profile", str(records / f"profile_{name}_{scale}")]
        add(f"train_step_{name}", command, bound_s)
        if profile:
            folder = str(records / f"profile_{name}_{scale}")
            add(f"profile_{name}", ["benchmarks.profile_table", folder], 60)

    def add(name: str, command: Sequence[str], bound_s: int) -> None:
        result = f"{name}_{scale}"
        target = ("--out", str(out / f"{result}.json"))
        found.append(Step(result, (*command, *target), bound_s))

    full = scale == "full"
    # A 7B base and its activations take most of 80 GB: one side at a time.
    alone = ("--leave", "--block", "10") if full else ()
    clips = "48" if full else "12"  # of which two CPU cores take a few seconds
    mix = ("--workload", "affectgpt", "--batch", clips, "--pack", "--peer", "torch", "--tuning")
    train("anchor", "--workload", "anchor", bound_s=240 if full else 560, profile=True)
    if full:  # elsewhere its rows of 4,096 tokens are too long for two sides
        beside = ("--workload", "anchor", "--peer", "torch", *alone)
        train("anchor_beside_tuned", *beside, bound_s=560)
    for tuning in ("packed", "tuned", "release"):
        train(f"affectgpt_{clips}_beside_{tuning}", *mix, tuning, *alone, bound_s=560)
    train(f"affectgpt_{clips}", *mix[:5], bound_s=240, profile=True)
    brief = ("--turns", "2", "--singles", "1") if full else ()  # a lent GPU's time is short
    generation = ["benchmarks.generation", "--scale", scale, "--records", str(records)]
    add("generation", [*generation, *brief], 560 if full else 3600)
    three = ("--workload", "affectgpt", "--batch", "3")
    train("affectgpt_3", *three, "--peer", "torch", "--tuning", "release", "tuned", bound_s=560)
    beside = ("--workload", "small", "--peer", "torch")
    train("small", *beside, bound_s=400, profile=True)
    # There each side leaves after its turn, so that turns are long and few.
    few = ("--only", "packing", "gather", "attention", "--steps", "10", "--block", "10")
    single = ["benchmarks.savings", "--scale", scale, "--records", str(records)]
    add("savings", [*single, *(few if full else ())], 560 if full else 3600)
    if full:
        for precision in ("int8", "fp8"):
            words = ("--workload", "anchor", "--set", f"base_precision={precision}")
            train(f"anchor_{precision}", *words, bound_s=240)
        # Off by default in this XLA: products that read a layer's weights where they lie in the
        # stack, instead of from a copy.
        slices = "xla_options=xla_gpu_enable_dynamic_slice_fusion=true"
        train("anchor_slices", "--workload", "anchor", "--set", slices, bound_s=240)
        add("low_precision", ["benchmarks.low_precision", "--shape", "7b"], 560)
        add("extraction", ["benchmarks.extraction", "--device", "cuda"], 560)
    # None of them needs a GPU or a large model's weights: they are measured in full everywhere.
    size = ["--scale", "tiny"] if scale == "tiny" else []
    add("input", ["benchmarks.input_pipeline", *size, "--records", str(records)], 560)
    add("loop_overhead", ["benchmarks.loop_overhead"], 300)
    add("compile_time", ["benchmarks.compile_time", *size], 300)
    return found


def run(
    planned: Sequence[Step],
    out: Path,
    *,
    again: bool,
    budget_s: float,
    start: Callable[[Step], int],
    say: Callable[[str], None] = print,
) -> bool:
    """Run what has no result yet; returns whether all has one now.

    Args:
        planned: in order.
        out: where results are.
        again: run also what has one.
        budget_s: nothing is started whose bound is beyond it; 0 is no limit.
        start: runs a step and returns its exit status, 124 if it was stopped.
        say: told of each step.
    """
    began, complete = time.perf_counter(), True
    for step in planned:
        path = out / f"{step.result}.json"
        if path.exists() and not again:
            say(f"{step.result}: there already")
            continue
        left = budget_s - (time.perf_counter() - began)
        if budget_s and step.bound_s > left:
            say(f"{step.result}: may take {step.bound_s} s, {left:.0f} s are left; not started")
            complete = False
            continue
        say(f"{step.result}: python -m {' '.join(step.command)}")
        at = time.perf_counter()
        status = start(step)
        # A file of an earlier call must not pass for the result of one that failed.
        done = status == 0 and path.exists()
        complete = complete and done
        what = "done" if done else "stopped" if status == 124 else f"failed, exit status {status}"
        say(f"{step.result}: {what} after {time.perf_counter() - at:.0f} s")
    return complete


def start(step: Step) -> int:
    """Run a step as a process of its own."""
    process = subprocess.Popen([sys.executable, "-m", *step.command])
    try:
        return process.wait(step.bound_s)
    except subprocess.TimeoutExpired:
        process.terminate()
        return 124
    finally:
        process.wait()


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; ends with status 1 where a result is missing."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--scale", choices=workloads.SCALES, default=default_scale(), help="default: full on a GPU")
    add("--only", nargs="+", default=[], help="results to make, by a part of their name")
    add("--again", action="store_true", help="run also what has a result")
    add("--budget", type=float, default=0.0, help="seconds; 0 is no limit")
    add("--records", type=Path, default=records_folder(), help="of record sets and traces")
    add("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    args.records.mkdir(parents=True, exist_ok=True)
    planned = steps(args.scale, args.records, args.out)
    if args.only:
        planned = [step for step in planned if any(part in step.result for part in args.only)]
    complete = run(planned, args.out, again=args.again, budget_s=args.budget, start=start)
    from benchmarks import tables

    print(tables.targets(args.out))
    raise SystemExit(int(not complete))


if __name__ == "__main__":
    main()
