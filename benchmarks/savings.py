"""What each saving is worth, in turns with it and without: `python -m benchmarks.savings`.

The workload is AffectGPT's recipe on its own lengths, clips sharing rows. One side runs it as
`affectgpt_jax.train` does, the other one without a single saving; each is a process, and blocks of
steps alternate.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from affectgpt_jax.models.decoder import LOSS_CHUNK
from benchmarks import harness, workloads
from benchmarks.blocks import ratios, summarise, take_turns, workers
from benchmarks.harness import Report, at_least, spread_in_words


class Saving(NamedTuple):
    """Something that can be left out.

    Attributes:
        what: saves, in words.
        instead: what runs without it.
        layout: of rows, without it.
        settings: of the config, without it.
        without: argument of `sides.Jax`, where the config has no setting.
        on_gpu: which nothing but a GPU has.
    """

    what: str
    instead: str
    layout: str = "packed"
    settings: Mapping[str, Any] = {}
    without: str = ""
    on_gpu: bool = False


SAVINGS = {
    "packing": Saving("clips share rows", "a row for each, in buckets of length", layout="padded"),
    "gather": Saving(
        "supervised positions are chosen before the lm_head",
        "logits at every position",
        without="gather",
    ),
    "chunks": Saving(
        f"logits of {LOSS_CHUNK:,} positions at a time, none of filler alone",
        "of all at once",
        without="chunks",
    ),
    "attention": Saving(
        "cuDNN's attention skips what no sample sees",
        "plain XLA",
        settings={"attention": "xla"},
        on_gpu=True,
    ),
    "save_projections": Saving(
        "the backward pass computes as little again as fits",
        "all but the projections' results",
        settings={"remat": "save_projections"},
    ),
    "full": Saving(
        "the backward pass computes as little again as fits",
        "whole layers",
        settings={"remat": "full"},
    ),
    "overlap": Saving(
        "batches are read and moved while a step runs", "one after the other", without="overlap"
    ),
}


def measure(saving: Saving, args: argparse.Namespace) -> dict[str, Any]:
    """Both sides of one saving.

    Raises:
        TurnError: a side failed.
    """
    names = {"name": "affectgpt", "scale": args.scale, "batch": args.batch}
    on = workloads.arguments(**names, layout="packed", settings={})
    off = workloads.arguments(**names, layout=saving.layout, settings=dict(saving.settings))
    workload, records = workloads.make(**on), str(args.records)
    workloads.open_records(workload, args.records)  # by one process, before two read them
    leave = args.scale == "full"  # a GPU has no room for both
    target = "benchmarks.sides:Jax"
    targets = {
        "on": (target, {"workload": on, "records": records}),
        "off": (target, {"workload": off, "records": records, "without": saving.without}),
    }
    with workers(targets, gpu=args.scale == "full", leave=leave) as sides:
        kept, facts = take_turns(
            sides, steps=args.steps, block=args.block, warmup=args.warmup, leave=leave
        )
    return {
        "environment": facts["on"].pop("environment"),
        "saving": saving._asdict(),
        "ratio": ratios(kept["on"], kept["off"]),
        "sides": {
            name: summarise(blocks, workload)
            | {k: v for k, v in facts[name].items() if k != "environment"}
            for name, blocks in kept.items()
        },
    }


def run(args: argparse.Namespace) -> Report:
    """All that were asked for; returns the report.

    Raises:
        TurnError: a side failed.
    """
    found = {}
    for name in args.only:
        found[name] = measure(SAVINGS[name], args)
        print(name, spread_in_words(found[name]["ratio"]), file=sys.stderr, flush=True)
    about = [of.pop("environment") for of in found.values()][0]
    settings = {name: getattr(args, name) for name in ("scale", "batch", "block", "warmup")}
    return {"environment": about, "settings": settings, "savings": found}


def columns(first: str) -> dict[str, Callable[[Report], str]]:
    """Of the table, whose first column's heading says what was measured."""

    def both(key: str, form: Callable[[float], str]) -> Callable[[Report], str]:
        return lambda found: " and ".join(form(found["sides"][s][key]) for s in ("on", "off"))

    return {
        first: lambda found: found["saving"]["what"],
        "without it": lambda found: found["saving"]["instead"],
        "step with it and without": both("median_s", lambda s: f"{1e3 * s:,.0f} ms"),
        "samples/s over those without (by block)": lambda found: spread_in_words(found["ratio"]),
        "memory": both("peak_bytes", lambda size: f"{size / 2**30:.1f} GiB"),
        "compiled in": both("compile_s", lambda s: f"{s:.0f} s"),
    }


def table(report: Report) -> str:
    """A Markdown table of a report."""
    settings = report["settings"]
    first = f"affectgpt {settings['batch']}, {settings['scale']}"
    return harness.columns(columns(first), report["savings"].values())


def flags(add: Callable[..., Any]) -> None:
    add("--only", nargs="+", choices=SAVINGS, default=[], help="default: all that the device has")
    clips = "clips in an update; default: 48 in full, 12 else"
    add("--batch", type=at_least(0), default=0, help=clips)


def check(_: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    full = args.scale == "full"
    args.batch = args.batch or (48 if full else 12)
    args.only = args.only or [name for name, s in SAVINGS.items() if full or not s.on_gpu]


COMMAND = harness.Measurement(
    "savings",
    run,
    harness.each(table),
    lambda args: f"savings_{args.scale}",
    flags,
    shared=("scale", "steps", "block", "warmup", "records"),
    check=check,
)

if __name__ == "__main__":
    COMMAND.main()
