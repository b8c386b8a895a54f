"""What each saving is worth, in turns with it and without: `python -m benchmarks.savings`.

The workload is AffectGPT's recipe on its own lengths, clips sharing rows. One side runs it as
`affectgpt_jax.train` does, the other one without a single saving; each is a process, and blocks of
steps alternate. Prints a table and writes `benchmarks/results/savings_SCALE.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import environment, workloads
from benchmarks.train_step import (
    RESULTS,
    at_least,
    default_scale,
    environments,
    ratios,
    records_folder,
    summarise,
    take_turns,
    workload_arguments,
)
from benchmarks.turns import Side, TurnError


class Saving(NamedTuple):
    """Something that can be left out.

    Attributes:
        what: is saved by, in words.
        instead: what runs without it.
        layout: of rows, without it.
        settings: of the config, without it.
        without: of `sides.Ours`, where the config has no setting.
    """

    what: str
    instead: str
    layout: str = "packed"
    settings: Mapping[str, Any] = {}
    without: str = ""


SAVINGS = {
    "packing": Saving("clips share rows", "a row for each, in buckets of length", layout="padded"),
    "gather": Saving(
        "supervised positions are chosen before the vocabulary",
        "logits at every position",
        without="gather",
    ),
    "chunks": Saving(
        "logits of 512 positions at a time, none of filler alone",
        "of all at once",
        without="chunks",
    ),
    "attention": Saving(
        "attention skips what no sample sees", "plain XLA", settings={"attention": "xla"}
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
    "unroll": Saving(
        "layers in a row, where that is the default",
        "a loop over layers",
        settings={"unroll_layers": "false"},
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
    on = workload_arguments(**names, layout="packed", settings={})
    off = workload_arguments(**names, layout=saving.layout, settings=dict(saving.settings))
    workload, records = workloads.make(**on), str(args.records)
    workloads.open_records(workload, args.records)  # by one process, before two read them
    leave = args.scale == "full"  # a GPU has no room for both
    with contextlib.ExitStack() as stack:
        cache = stack.enter_context(tempfile.TemporaryDirectory())
        where, _ = environments(args.scale == "full", leave, cache)
        sides = {
            name: stack.enter_context(Side(name, "benchmarks.sides:Ours", told, where))
            for name, told in (
                ("on", {"workload": on, "records": records}),
                ("off", {"workload": off, "records": records, "without": saving.without}),
            )
        }
        kept, facts = take_turns(
            sides, steps=args.steps, block=args.block, warmup=args.warmup, leave=leave
        )
    return {
        "environment": facts["on"].pop("environment"),
        "saving": saving._asdict(),
        "ratio": ratios(kept["on"], kept["off"]),
        "sides": {
            name: summarise(blocks, workload, None)
            | {k: v for k, v in facts[name].items() if k != "environment"}
            for name, blocks in kept.items()
        },
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All that were asked for; returns the report.

    Raises:
        TurnError: a side failed.
    """
    found = {}
    for name in args.only or SAVINGS:
        found[name] = measure(SAVINGS[name], args)
        print(row(found[name]), file=sys.stderr, flush=True)
    about = [of.pop("environment") for of in found.values()][0]
    about["command"] = environment.command("benchmarks.savings", args.words)
    settings = {name: getattr(args, name) for name in ("scale", "batch", "block", "warmup")}
    return {"environment": about, "settings": settings, "savings": found}


def row(found: Mapping[str, Any]) -> str:
    """The line of a saving in the table."""
    saving, on, off = found["saving"], found["sides"]["on"], found["sides"]["off"]
    return (
        f"| {saving['what']} | {saving['instead']} | {1e3 * on['median_s']:,.0f} ms | "
        f"{1e3 * off['median_s']:,.0f} ms | "
        + "{median:.2f} ({lowest:.2f} to {highest:.2f})".format(**found["ratio"])
        + f" | {on['peak_bytes'] / 2**30:.1f} and {off['peak_bytes'] / 2**30:.1f} GiB | "
        f"{on['compile_s']:.0f} and {off['compile_s']:.0f} s |"
    )


def table(report: Mapping[str, Any]) -> str:
    """A Markdown table of a report."""
    settings = report["settings"]
    return "\n".join(
        [
            f"| affectgpt {settings['batch']}, {settings['scale']} | without it | step | step "
            "without | samples/s over those without (by block) | memory | compiled in |",
            "|---|---|---|---|---|---|---|",
            *map(row, report["savings"].values()),
        ]
    )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--only", nargs="+", choices=SAVINGS, default=[], help="default: all")
    add("--scale", choices=workloads.SCALES, default=default_scale(), help="default: full on a GPU")
    clips = "clips in an update; default: 48 in full, 12 else"
    add("--batch", type=at_least(0), default=0, help=clips)
    add("--steps", type=at_least(1), default=20)
    add("--block", type=at_least(1), default=5, help="steps of a turn")
    add("--warmup", type=at_least(0), default=3)
    add("--records", type=Path, default=records_folder(), help="where record sets are kept")
    add("--out", type=Path, help="default: benchmarks/results/savings_SCALE.json")
    add("--show", type=Path, nargs="+", help="print the table of such files and stop")
    args = parser.parse_args(argv)
    args.batch = args.batch or (48 if args.scale == "full" else 12)
    args.words = list(argv)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; ends with status 1 and one sentence where a side fails."""
    args = parse(sys.argv[1:] if argv is None else argv)
    if args.show:
        for path in args.show:
            print(table(json.loads(path.read_text(encoding="utf-8"))))
        return
    try:
        report = run(args)
    except TurnError as error:
        raise SystemExit(f"error: {error}") from None
    environment.save(report, args.out or RESULTS / f"savings_{args.scale}.json")
    print(table(report))


if __name__ == "__main__":
    main()
