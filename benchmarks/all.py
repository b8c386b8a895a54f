"""Every measurement of speed, one after the other: `python -m benchmarks.all`.

In full on a GPU, the least known first; elsewhere at a smaller scale. Each is a command with a
bound in time, whose result is a JSON file. What has its file is not run again, so that a call that
was stopped goes on; `--again` runs all. `--budget SECONDS` starts nothing that may not end in time,
for machines that are lent by the minute. Ends with the table of what was met and what is open.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from affectgpt_jax.cli import make_parser
from benchmarks import tables
from benchmarks.harness import RESULTS, SCALES, default_scale, records_folder

GRACE_S = 5.0  # for a process to end in, once it is asked to


class Step(NamedTuple):
    """A measurement.

    Attributes:
        result: name of its file, without ending.
        command: words after `python -m`.
        bound_s: seconds after which it is stopped.
        profile: name of the file that it writes beside, without ending.
    """

    result: str
    command: tuple[str, ...]
    bound_s: int
    profile: str = ""

    def done(self, out: Path) -> bool:
        """Whether its files are in a folder."""
        names = [self.result, *([self.profile] if self.profile else [])]
        return all((out / f"{name}.json").exists() for name in names)


def steps(scale: str, records: Path, out: Path) -> list[Step]:
    """All measurements of a scale, in the order in which they run."""
    found: list[Step] = []

    def add(name: str, command: Sequence[str], bound_s: int, profile: str = "") -> None:
        target = ("--out", str(out / f"{name}_{scale}.json"))
        found.append(Step(f"{name}_{scale}", (*command, *target), bound_s, profile))

    def train(name: str, *words: str, bound_s: int, profile: bool = False) -> None:
        command = ["benchmarks.train_step", *words, "--records", str(records), "--scale", scale]
        made = f"profile_{name}_{scale}" if profile else ""
        command += ["--profile", str(records / made)] if made else []
        add(f"train_step_{name}", command, bound_s, made)

    full = scale == "full"
    # A 7B base and its activations take most of 80 GB: one side at a time.
    alone = ("--leave", "--block", "10") if full else ()
    clips = "48" if full else "12"  # of which two CPU cores take a few seconds
    mix = ("--workload", "affectgpt", "--batch", clips, "--pack", "--peer", "torch", "--tuning")
    train("anchor", "--workload", "anchor", bound_s=300 if full else 620, profile=True)
    if full:  # elsewhere its rows of 4,096 tokens are too long for two sides
        beside = ("--workload", "anchor", "--peer", "torch", *alone)
        train("anchor_beside_tuned", *beside, bound_s=560)
    for tuning in ("packed", "tuned", "release"):
        train(f"affectgpt_{clips}_beside_{tuning}", *mix, tuning, *alone, bound_s=560)
    train(f"affectgpt_{clips}", *mix[:5], bound_s=300, profile=True)
    brief = ("--turns", "2", "--singles", "1") if full else ()  # a lent GPU's time is short
    generation = ["benchmarks.generation", "--scale", scale, "--records", str(records)]
    add("generation", [*generation, *brief], 560 if full else 3600)
    three = ("--workload", "affectgpt", "--batch", "3")
    train("affectgpt_3", *three, "--peer", "torch", "--tuning", "release", "tuned", bound_s=560)
    beside = ("--workload", "small", "--peer", "torch")
    train("small", *beside, bound_s=460, profile=True)
    # There each side leaves after its turn, so that turns are long and few.
    few = ("--only", "packing", "gather", "attention", "--steps", "10", "--block", "10")
    single = ["benchmarks.savings", "--scale", scale, "--records", str(records)]
    add("savings", [*single, *(few if full else ())], 560 if full else 3600)
    if full:
        for precision in ("int8", "fp8"):
            words = ("--workload", "anchor", "--set", f"base_precision={precision}")
            train(f"anchor_{precision}", *words, bound_s=240)
        # Off by default in this XLA: matmuls that read a layer's weights where they lie in the
        # stack, instead of from a copy.
        slices = "xla_options=xla_gpu_enable_dynamic_slice_fusion=true"
        train("anchor_slices", "--workload", "anchor", "--set", slices, bound_s=240)
        add("low_precision", ["benchmarks.low_precision", "--shape", "7b"], 560)
        add("extraction", ["benchmarks.extraction", "--device", "cuda"], 560)
    # None of them needs a GPU or a large model's weights: they are measured in full everywhere.
    size = ["--scale", "tiny"] if scale == "tiny" else []
    # An update of 48 clips of 255 tokens at 17,600 tokens/s, the aim of a GPU.
    step = ("--step", "0.7")
    add("input", ["benchmarks.input_pipeline", *step, *size, "--records", str(records)], 560)
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
        if step.done(out) and not again:
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
        done = status == 0 and step.done(out)
        complete = complete and done
        what = "done" if done else "stopped" if status == 124 else f"failed, exit status {status}"
        say(f"{step.result}: {what} after {time.perf_counter() - at:.0f} s")
    return complete


def start(step: Step) -> int:
    """Run a step as a process group of its own, of which nothing is left afterwards."""
    process = subprocess.Popen([sys.executable, "-m", *step.command], start_new_session=True)
    try:
        return process.wait(step.bound_s)
    except subprocess.TimeoutExpired:
        return 124
    finally:
        end(process)


def end(process: subprocess.Popen) -> None:
    """End a process with all of its group: a worker that goes on would slow what comes next."""
    with contextlib.suppress(ProcessLookupError):  # nobody is left
        os.killpg(process.pid, signal.SIGTERM)
        try:
            until = time.monotonic() + GRACE_S
            while time.monotonic() < until:
                process.poll()  # an ended process is of its group until it is waited for
                os.killpg(process.pid, 0)
                time.sleep(0.05)
        finally:  # Ctrl-C may come again
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; ends with status 1 where a result is missing."""
    parser = make_parser("benchmarks.all", __doc__)
    add = parser.add_argument
    add("--scale", choices=SCALES, default=default_scale(), help="default: full on a GPU")
    add("--only", nargs="+", default=[], help="results to make, by a part of their name")
    add("--again", action="store_true", help="run also what has a result")
    add("--budget", type=float, default=0.0, help="seconds; 0 is no limit")
    add("--records", type=Path, default=records_folder(), help="of record sets and traces")
    add("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    planned = steps(args.scale, args.records, args.out)
    for part in args.only:
        if not any(part in step.result for step in planned):
            names = ", ".join(step.result for step in planned)
            parser.error(f"--only {part} is in the name of no result; there are {names}")
    if args.only:
        planned = [step for step in planned if any(part in step.result for part in args.only)]
    args.out.mkdir(parents=True, exist_ok=True)
    args.records.mkdir(parents=True, exist_ok=True)
    complete = run(planned, args.out, again=args.again, budget_s=args.budget, start=start)
    print(tables.targets(args.out))
    raise SystemExit(int(not complete))


if __name__ == "__main__":
    # Steps are sessions of their own: what ends this process does not reach them by itself.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # `nohup` keeps its word
            signal.signal(number, lambda got, _: sys.exit(128 + got))
    main()
