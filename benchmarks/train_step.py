"""An update, measured beside PyTorch's in one run: `python -m benchmarks.train_step`.

    --workload anchor
    --workload affectgpt --batch 48 --pack --peer torch --tuning release tuned packed
    --workload small --peer torch

Workloads are those of `benchmarks.workloads`: in full on a GPU, at a smaller scale elsewhere. Each
side is a process, and blocks of steps alternate. First, both compute the loss of every supervised
token of one batch, and must agree. With `--profile DIR`, JAX's steps are traced afterwards; where
their time goes (`benchmarks.profile_table`) is printed and written beside the result.

A step lasts from the end of the one before to its own, with batches read, assembled and moved to
the device as in training.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from affectgpt_jax.common.errors import UserError
from affectgpt_jax.training.devices import peak_flops
from benchmarks import harness, profile_table, workloads
from benchmarks.blocks import ratios, summarise, take_turns, workers
from benchmarks.harness import Report, at_least, spread_in_words

TUNINGS = ("release", "tuned", "packed")
# How far the losses of single tokens may be apart, in units of their spread. Float32 has seven
# digits and keeps more than five through eight layers (2e-6 apart in every comparison so far);
# bfloat16 has two to three in all.
AGREE = {"float32": 1e-5, "bfloat16": 0.1}


class ComparisonError(UserError, RuntimeError):
    """The two sides do not compute the same."""


def agreement(ours: Sequence[float], theirs: Sequence[float], dtype: str) -> dict[str, float]:
    """Compare the losses of the same tokens.

    Their mean says little: under random weights it is near log(vocabulary) whatever is computed.
    So single tokens are compared, and differences measured against the spread of the losses.

    Raises:
        ComparisonError: they are further apart than rounding explains.
    """
    a, b = np.asarray(ours), np.asarray(theirs)
    if a.shape != b.shape:
        raise ComparisonError(f"{len(a)} supervised tokens in JAX, {len(b)} in PyTorch")
    apart = float(np.linalg.norm(a - b) / np.linalg.norm(b - b.mean()))
    if not apart <= AGREE[dtype]:  # NaN does not pass
        raise ComparisonError(
            f"losses of the same {len(a)} tokens are {apart:.2g} of their spread apart, expected "
            f"at most {AGREE[dtype]} in {dtype} (means: {a.mean():.6g} in JAX, {b.mean():.6g} in "
            "PyTorch); speeds of different things cannot be compared"
        )
    means = {"jax": float(a.mean()), "torch": float(b.mean())}
    return means | {"tokens": len(a), "apart": apart, "bound": AGREE[dtype]}


def run(args: argparse.Namespace) -> Report:
    """One measurement; returns the report.

    Raises:
        ComparisonError: losses differ.
        TurnError: a side failed.
        ConfigError: an unknown config key, or a value of another type.
    """
    arguments = functools.partial(
        workloads.arguments,
        args.workload,
        args.scale,
        args.batch,
        pack_length=args.pack,
        dtype=args.dtype,
        tokenizer=args.tokenizer,
        settings=dict(args.set),
    )
    packed = args.pack is not None
    mine = arguments(
        "packed" if packed else "padded",
        gradient_accumulation_steps=args.gradient_accumulation_steps,
    )
    layouts = {"release": "release", "tuned": "padded", "packed": "packed"}
    peers = {
        tuning: arguments(
            layouts[tuning], gradient_accumulation_steps=args.peer_gradient_accumulation_steps
        )
        for tuning in (args.tuning if args.peer else ())
    }
    workload, records = workloads.make(**mine), str(args.records)
    if workload.records:  # written by one process, before several read them
        workloads.open_records(workload, args.records)
    targets = {"jax": ("benchmarks.sides:Jax", {"workload": mine, "records": records})}
    for tuning, given in peers.items():
        told = {"workload": given, "records": records, "tuning": tuning}
        targets[tuning] = ("benchmarks.sides:Torch", told)
    with workers(targets, gpu=args.scale == "full", leave=args.leave) as sides:
        same = {}
        for tuning, given in peers.items():
            # Every side reads rows of one clip, and packed ones where it packs.
            layout = mine if tuning == "packed" and not packed else given
            values = []
            for side in (sides["jax"], sides[tuning]):
                values.append(side.call("token_losses", workload=layout, records=records))
                if args.leave:
                    side.leave()
            same[tuning] = agreement(*values, workload.config.dtype)
        kept, facts = take_turns(
            sides, steps=args.steps, block=args.block, warmup=args.warmup, leave=args.leave
        )
        if args.profile:
            args.profile.mkdir(parents=True, exist_ok=True)
            for name in peers:
                sides[name].leave()
            sides["jax"].call("warm_up", steps=args.warmup)
            sides["jax"].call("profile", first=0, steps=args.block, directory=str(args.profile))
    about = facts[args.tuning[0] if args.peer else "jax"]["environment"]
    dtype = workload.config.dtype
    peak = peak_flops(about["device"].partition(" x ")[2], dtype)
    settings = {
        "workload": args.workload,
        "scale": args.scale,
        "batch": args.batch if args.workload == "affectgpt" else None,
        "dtype": dtype,
        "packed": packed,
        "peak_flop_per_s": peak,
        "sides": {"jax": mine, **peers},
        "leave": args.leave,
        "block": args.block,
        "warmup": args.warmup,
        "flags": {k: v for k, v in os.environ.items() if k in ("XLA_FLAGS", "OMP_NUM_THREADS")},
    }
    if args.profile:
        words = f"{harness.command('train_step', args.words)} --profile DIR"
        made = {"environment": about | {"command": words}, "settings": settings}
        harness.save(made, args.profile / "about.json")
    return {
        "environment": about,
        "settings": settings,
        "losses": same,
        "sides": {
            name: summarise(blocks, workload, peak)
            | {k: v for k, v in facts[name].items() if k != "environment"}
            for name, blocks in kept.items()
        },
        "ratios": {name: ratios(kept["jax"], kept[name]) for name in peers},
        "blocks": {
            name: [
                {"seconds": b["seconds"], "samples": [len(s) for s in b["samples"]]} for b in blocks
            ]
            for name, blocks in kept.items()
        },
    }


COLUMNS = {
    "workload": lambda r: r["what"],
    "side": lambda r: r["name"],
    "step, median (10 to 90 %)": lambda r: (
        f"{1e3 * r['median_s']:,.0f} ms ({1e3 * r['p10_s']:,.0f} to {1e3 * r['p90_s']:,.0f})"
    ),
    "samples/s": lambda r: f"{r['samples_per_s']:.2f}",
    "tokens/s (with padding)": lambda r: f"{r['tokens_per_s']:,.0f} ({r['places_per_s']:,.0f})",
    "rows full": lambda r: f"{r['fill']:.0%}",
    "model FLOP/s": lambda r: f"{r['model_flop_per_s'] / 1e12:.3g} T",
    "MFU": lambda r: f"{r['mfu']:.1%}" if r["mfu"] else "",
    "memory": lambda r: f"{r['peak_bytes'] / 2**30:.1f} GiB",
    "compiled in": lambda r: f"{r['compile_s']:.0f} s" if "compile_s" in r else "",
    "token losses apart": lambda r: f"{r['same']['apart']:.0e}" if r["same"] else "",
    "samples/s of JAX over it (by block)": lambda r: r["ratio"] and spread_in_words(r["ratio"]),
}


def table(reports: Sequence[Report]) -> str:
    """A Markdown table of reports: a row for every side."""
    rows = []
    for report in reports:
        settings = report["settings"]
        batch = f" {settings['batch']}" if settings["batch"] else ""
        what = f"{settings['workload']}{batch}, {settings['scale']}, {settings['dtype']}"
        what += "".join(f", {words}" for words in in_words(settings["sides"]["jax"]["settings"]))
        for side, found in report["sides"].items():
            name = f"PyTorch, {side}" if side != "jax" else "JAX"
            name += ", packed" if side == "jax" and settings["packed"] else ""
            same, ratio = report["losses"].get(side), report["ratios"].get(side, "")
            rows.append(found | {"what": what, "name": name, "same": same, "ratio": ratio})
    return harness.columns(COLUMNS, rows)


def finish(args: argparse.Namespace, report: Report, path: Path) -> None:
    """Print what stands beside the table: losses, FLOPs, compilation, choices, the profile."""
    ours = report["sides"]["jax"]
    for tuning, same in report["losses"].items():
        print(
            f"loss of the same {same['tokens']} tokens: {same['jax']:.6f} in JAX, "
            f"{same['torch']:.6f} in PyTorch ({tuning}); single tokens are {same['apart']:.1e} of "
            f"their spread apart (bound {same['bound']:g})"
        )
    parts = ours["gflop_per_step"]
    print(
        f"model FLOPs of a step: {sum(parts.values()):,.4g} G = "
        + " + ".join(f"{value:,.4g} {name}" for name, value in parts.items())
        + " (models/flops.py has the formula)"
    )
    again = ours["compile_again_s"]
    print(
        f"compiled in {ours['compile_s']:.1f} s"
        + (f", from the cache in {min(again):.1f} s" if again else "")
        + f"; waiting for data: {ours['data_wait']:.2%} of a step"
    )
    print(*ours["notes"], sep="\n")
    if args.profile:
        profile = profile_table.report_of(args.profile)
        harness.save(profile, path.with_name(f"profile_{path.name.removeprefix('train_step_')}"))
        print(profile_table.table(profile))


def in_words(settings: Mapping[str, Any]) -> list[str]:
    """Changed keys of the config, as `--set` takes them."""
    plain = {k: v if isinstance(v, str) else json.dumps(v) for k, v in settings.items()}
    return [f"{key}={value}" for key, value in plain.items()]


def name_of(args: argparse.Namespace) -> str:
    """A result file's name, without its ending; what a trial changes is in it."""
    parts = ["train_step", args.workload]
    if args.workload == "affectgpt":
        rows = "padded" if args.pack is None else f"packed_{args.pack}" if args.pack else ""
        parts += [str(args.batch), *([f"{rows}_rows"] if rows else [])]
    parts += [args.dtype] if args.dtype else []
    parts += [re.sub(r"[^\w.]+", "-", words).strip("-") for words in in_words(dict(args.set))]
    parts += ["beside", *args.tuning] if args.peer else []
    return "_".join([*parts, args.scale])


def setting(text: str) -> tuple[str, Any]:
    """`KEY=VALUE`; the value as JSON, or as it stands."""
    key, sign, value = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def flags(add: Callable[..., Any]) -> None:
    add("--workload", choices=("anchor", "affectgpt", "small"), default="small")
    add("--batch", type=at_least(1), default=48, help="clips in an update of affectgpt")
    add("--pack", type=at_least(0), nargs="?", const=0, help="clips share rows, of so many tokens")
    add("--peer", choices=("torch",), help="measure PyTorch beside it")
    add("--tuning", nargs="+", choices=TUNINGS, help="of PyTorch; default: tuned")
    add("--dtype", choices=("", *AGREE), default="", help="default: the scale's")
    microbatches = "microbatches of {} update; 0 chooses"
    for name, whose in (("", "JAX's"), ("peer-", "PyTorch's")):
        flag = f"--{name}gradient-accumulation-steps"
        add(flag, type=at_least(0), default=0, help=microbatches.format(whose))
    add("--leave", action="store_true", help="a side leaves the device after its turn")
    add("--set", type=setting, action="append", default=[], metavar="KEY=VALUE", help="of config")
    add("--profile", type=Path, metavar="DIR", help="trace steps of JAX into this folder")


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for flag in ("tuning", "peer_gradient_accumulation_steps"):
        if getattr(args, flag) and not args.peer:
            name = flag.replace("_", "-")
            parser.error(f"--{name} is of PyTorch, which does not run; add --peer torch")
    args.tuning = args.tuning or ["tuned"]
    if args.workload != "affectgpt" and (args.pack is not None or "packed" in args.tuning):
        parser.error("only the clips of --workload affectgpt can share rows")


COMMAND = harness.Measurement(
    "train_step",
    run,
    table,
    name_of,
    flags,
    shared=("scale", "steps", "block", "warmup", "tokenizer", "records"),
    check=check,
    finish=finish,
)

if __name__ == "__main__":
    COMMAND.main()
