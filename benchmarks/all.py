"""Every measurement of speed, one after the other: `python -m benchmarks.all`.

In full on a GPU, the least known first; elsewhere at a smaller scale. Each is a command with a
bound in time, whose result is a JSON file. What has its file is not run again, so that a call that
was stopped goes on; `--again` runs all. `--budget SECONDS` is for machines that are lent by the
minute: sides take one turn each, nothing is started with less than half of its bound left, and what
runs at the end is stopped. Ends with the table of what was met and what is open.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from affectgpt_jax.cli import exit_on_error, make_parser
from benchmarks import tables
from benchmarks.harness import RESULTS, SCALES, default_scale, records_folder

GRACE_S = 5.0  # for a process to end in, once it is asked to
ROOM_MIB = 130_000  # two bases of 7B in bfloat16, and activations of some 6,000 tokens for each


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
    bound_s: float
    profile: str = ""

    def done(self, out: Path) -> bool:
        """Whether its files are in a folder."""
        names = [self.result, *([self.profile] if self.profile else [])]
        return all((out / f"{name}.json").exists() for name in names)


def steps(
    scale: str, records: Path, out: Path, *, brief: bool = False, crowded: bool = True
) -> list[Step]:
    """All measurements of a scale, in the order in which they run.

    Args:
        scale: of `harness.SCALES`.
        records: folder of record sets and traces.
        out: folder of results.
        brief: one turn of ten steps for each side.
        crowded: at full scale a device has room for one side at a time on 48 clips.
    """
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
    turn = ("--steps", "10", "--block", "10", "--warmup", "2") if brief else ()
    anchor = ("--workload", "anchor", *turn)
    alone = ("--leave",) if full and crowded else ()
    alone += ("--block", "10") if full and not brief else ()
    clips = "48" if full else "12"  # of which two CPU cores take a few seconds
    mix = ("--workload", "affectgpt", "--batch", clips, "--pack", "--peer", "torch", "--tuning")
    generation = ["benchmarks.generation", "--scale", scale, "--records", str(records)]
    short = ("--turns", "1" if brief else "2", "--singles", "1") if full or brief else ()
    add("attention", ["benchmarks.attention", "--scale", scale], 120)
    # A trace may fail in ways of its own: on a GPU it has a run of its own, at the end.
    train("anchor", *anchor, bound_s=240 if full else 620, profile=not full)
    for tuning in ("tuned", "packed"):
        words = (*mix, tuning, *alone, *turn)
        train(f"affectgpt_{clips}_beside_{tuning}", *words, bound_s=400 if full else 560)
    lent = scale != "small"  # on a lent GPU, and in tests; two CPU cores take too long
    if lent:
        add("generation_jax", [*generation, *short, "--no-peer"], 240)
    measured = str(out / f"train_step_anchor_{scale}.json")
    prediction = ["benchmarks.prediction", "--scale", scale, "--records", str(records)]
    add("prediction_anchor", [*prediction, "--measured", measured], 120)
    if lent:
        for precision in ("int8", "fp8"):
            words = (*anchor, "--set", f"base_precision={precision}")
            train(f"anchor_{precision}", *words, bound_s=240)
        train("anchor_traced", *anchor, bound_s=240, profile=True)
    # What follows is known better, or takes longer.
    train(f"affectgpt_{clips}_beside_release", *mix, "release", *alone, *turn, bound_s=560)
    if full:  # elsewhere its rows of 4,096 tokens are too long for two sides
        beside = (*anchor, "--peer", "torch", "--leave", *(() if brief else ("--block", "10")))
        train("anchor_beside_tuned", *beside, bound_s=560)  # 141 GB have no room for both
    train(f"affectgpt_{clips}", *mix[:5], bound_s=300, profile=True)
    add("generation", [*generation, *short], 560 if full else 3600)
    three = ("--workload", "affectgpt", "--batch", "3")
    train("affectgpt_3", *three, "--peer", "torch", "--tuning", "release", "tuned", bound_s=560)
    beside = ("--workload", "small", "--peer", "torch")
    train("small", *beside, bound_s=460, profile=True)
    # There each side leaves after its turn, so that turns are long and few.
    few = ("--only", "packing", "gather", "attention", "--steps", "10", "--block", "10")
    single = ["benchmarks.savings", "--scale", scale, "--records", str(records)]
    add("savings", [*single, *(few if full else ())], 560 if full else 3600)
    if full:
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
        budget_s: nothing is started with less than half of its bound left, and nothing runs
            longer; 0 is no limit.
        start: runs a step and returns its exit status, 124 if it was stopped.
        say: told of each step.
    """
    began, complete = time.perf_counter(), True
    for step in planned:
        if step.done(out) and not again:
            say(f"{step.result}: there already")
            continue
        left = budget_s - (time.perf_counter() - began)
        if budget_s and step.bound_s > 2 * left:
            say(f"{step.result}: may take {step.bound_s} s, {left:.0f} s are left; not started")
            complete = False
            continue
        if budget_s:
            step = step._replace(bound_s=min(step.bound_s, left))
        say(f"{step.result}: python -m {' '.join(step.command)}")
        at = time.perf_counter()
        status = start(step)
        # A file of an earlier call must not pass for the result of one that failed.
        done = status == 0 and step.done(out)
        complete = complete and done
        what = "done" if done else "stopped" if status == 124 else f"failed, exit status {status}"
        say(f"{step.result}: {what} after {time.perf_counter() - at:.0f} s")
    return complete


def crowded() -> bool:
    """Whether the GPU has less room than two 7B models with the activations of 48 clips need."""
    query = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")
    try:
        sizes = subprocess.check_output(query, text=True, stderr=subprocess.DEVNULL).split()
        return min(int(size) for size in sizes) < ROOM_MIB
    except (OSError, subprocess.CalledProcessError, ValueError):
        return True


def start(step: Step) -> int:
    """Run a step as a process group of its own, of which nothing is left afterwards."""
    process = None
    try:
        with deferred_signals():
            process = subprocess.Popen(
                [sys.executable, "-m", *step.command], start_new_session=True
            )
        return process.wait(step.bound_s)
    except subprocess.TimeoutExpired:
        return 124
    finally:
        if process:
            end(process)


@contextlib.contextmanager
def deferred_signals() -> Iterator[None]:
    """Around the start of a process, which nobody would end if a signal came before it is known:
    signals that end this process come afterwards."""
    got: list[int] = []
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in handlers:
        signal.signal(number, lambda number, _: got.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in got:
            signal.raise_signal(number)


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


@exit_on_error()
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; ends with status 1 where a result is missing."""
    parser = make_parser("python -m benchmarks.all", __doc__)
    add = parser.add_argument
    add("--scale", choices=SCALES, default=default_scale(), help="default: full on a GPU")
    add("--only", nargs="+", default=[], help="results to make, by a part of their name")
    add("--again", action="store_true", help="run also what has a result")
    add("--budget", type=float, default=0.0, help="seconds in all; 0 is no limit")
    add("--records", type=Path, default=records_folder(), help="of record sets and traces")
    add("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    room = {"brief": args.budget > 0, "crowded": args.scale != "full" or crowded()}
    planned = steps(args.scale, args.records, args.out, **room)
    for part in args.only:
        if not any(part in step.result for step in planned):
            names = ", ".join(step.result for step in planned)
            parser.error(f"--only {part} is in the name of no result; there are {names}")
    if args.only:
        planned = [step for step in planned if any(part in step.result for part in args.only)]
    args.out.mkdir(parents=True, exist_ok=True)
    args.records.mkdir(parents=True, exist_ok=True)
    complete = run(
        planned,
        args.out,
        again=args.again,
        budget_s=args.budget,
        start=start,
        # Before what the step prints, and not lost where this process is killed.
        say=functools.partial(print, flush=True),
    )
    print(tables.targets(args.out))
    raise SystemExit(int(not complete))


if __name__ == "__main__":
    # Steps are sessions of their own: what ends this process does not reach them by itself.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # `nohup` keeps its word
            signal.signal(number, lambda got, _: sys.exit(128 + got))
    main()
