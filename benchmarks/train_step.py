"""An update, measured beside PyTorch's in one run: `python -m benchmarks.train_step`.

    --workload anchor
    --workload affectgpt --batch 48 --pack --peer torch --tuning release tuned packed
    --workload small --peer torch

Workloads are those of `benchmarks.workloads`: in full on a GPU, at a smaller scale elsewhere. Each
side is a process, and blocks of steps alternate. First, both compute the loss of every supervised
token of one batch, and must agree. With `--profile DIR`, JAX's steps are traced afterwards, and
`benchmarks.profile_table` says where their time goes.

A step lasts from the end of the one before to its own, with batches read, assembled and moved to
the device as in training. Prints a table and writes `benchmarks/results/train_step_NAME.json`;
`--show` prints the table of such files.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from affectgpt_jax.models.flops import Flops, train_flops
from affectgpt_jax.models.lora import LoraConfig
from benchmarks import environment, workloads
from benchmarks.turns import Side, TurnError
from benchmarks.workloads import Workload

RESULTS = Path(__file__).parent / "results"
TUNINGS = ("release", "tuned", "packed")
# Dense bfloat16 FLOP/s of a device, from NVIDIA's data sheets, by a part of its name.
PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}
# How far the losses of single tokens may be apart, in units of their spread. Float32 has seven
# digits and keeps more than five through eight layers (2e-6 apart in every comparison so far);
# bfloat16 has two to three in all.
AGREE = {"float32": 1e-5, "bfloat16": 0.1}
PACK_LENGTH = {"full": 2048, "small": 1024, "tiny": 1024}
# Parts of an update of 48 clips at full scale, so that activations fit into 80 GB: some 6,000
# tokens a part, and 4,000 where all logits are held.
PARTS = {"padded": 6, "release": 8, "packed": 2}


class ComparisonError(RuntimeError):
    """The two sides do not compute the same."""


def default_scale() -> str:
    """ "full" where there is an NVIDIA GPU. JAX is not asked: it would take hold of the GPU."""
    return "full" if os.path.exists("/dev/nvidiactl") else "small"


def records_folder() -> Path:
    """Where record sets are kept between runs."""
    return Path(tempfile.gettempdir()) / "affectgpt_jax-benchmarks"


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


def flops_of(workload: Workload, samples: Sequence[Sequence[int]]) -> Flops:
    """Model FLOPs of an update on clips of these `(tokens, supervised tokens)`."""
    lora = workload.config.lora
    lora = LoraConfig(lora.rank, lora.alpha, lora.dropout, tuple(lora.targets))
    each = [train_flops(workload.llm, lora, length, targets) for length, targets in samples]
    return Flops(*map(sum, zip(*each, strict=True)))


def summarise(
    blocks: Sequence[Mapping[str, Any]], workload: Workload, peak: float | None
) -> dict[str, Any]:
    """Steps by their median and deciles; rates by block, as median, lowest and highest.

    Args:
        blocks: as the sides return them.
        workload: whose FLOPs count.
        peak: FLOP/s of the device, where that is known.
    """
    seconds = [s for block in blocks for s in block["seconds"]]
    deciles = statistics.quantiles(seconds, n=10) if len(seconds) > 1 else seconds * 9
    rates: dict[str, list[float]] = {}
    total = Flops(0, 0, 0, 0)
    for block in blocks:
        samples = [sample for step in block["samples"] for sample in step]
        flops = flops_of(workload, samples)
        total = Flops(*map(sum, zip(total, flops, strict=True)))
        amounts = {
            "samples_per_s": len(samples),
            "tokens_per_s": sum(length for length, _ in samples),
            "places_per_s": sum(block["places"]),
            "model_flop_per_s": flops.total,
        }
        for name, amount in amounts.items():
            rates.setdefault(name, []).append(amount / sum(block["seconds"]))
    tokens = sum(length for b in blocks for step in b["samples"] for length, _ in step)
    found = {
        "steps": len(seconds),
        "median_s": statistics.median(seconds),
        "p10_s": deciles[0],
        "p90_s": deciles[-1],
        "data_wait": sum(block["wait_s"] for block in blocks) / sum(seconds),
        "fill": tokens / sum(sum(block["places"]) for block in blocks),
        "gflop_per_step": {k: v / len(seconds) / 1e9 for k, v in total._asdict().items()},
    }
    for name, values in rates.items():
        found |= {name: statistics.median(values), f"{name}_range": [min(values), max(values)]}
    found["mfu"] = found["model_flop_per_s"] / peak if peak else None
    return found


def ratios(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Samples/s of one side over the other's, block by block of the same turn."""

    def rate(block: Mapping[str, Any]) -> float:
        return sum(map(len, block["samples"])) / sum(block["seconds"])

    each = [rate(a) / rate(b) for a, b in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(each), "lowest": min(each), "highest": max(each)}


def take_turns(
    sides: Mapping[str, Side], *, steps: int, block: int, warmup: int, leave: bool
) -> tuple[dict[str, list[dict]], dict[str, dict[str, Any]]]:
    """Let the sides run in turns; returns the blocks of each, and its facts with peak memory.

    Who goes first alternates, so that nobody always runs on what the other one has warmed.

    Args:
        sides: by name.
        steps: that count, of each; rounded up to whole blocks.
        block: steps of a turn.
        warmup: steps before the first turn of a process.
        leave: end a side's process after each turn, where the device has no room for all.

    Raises:
        TurnError: a side failed, or a loss is not finite.
    """
    kept: dict[str, list[dict]] = {name: [] for name in sides}
    facts: dict[str, dict[str, Any]] = {}
    warm: set[str] = set()
    for turn in range(math.ceil(steps / block)):
        for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:
            side = sides[name]
            if name not in warm:
                side.call("warm_up", steps=warmup)
                warm.add(name)
            found = side.call("block", first=warmup + turn * block, steps=block)
            if not all(map(math.isfinite, found["losses"])):
                raise TurnError(f"{name}: a loss is not finite: {found['losses']}")
            kept[name].append(found)
            now, peak = side.call("facts"), side.call("peak_bytes")
            known = facts.setdefault(name, now | {"peak_bytes": 0, "compile_again_s": []})
            known["peak_bytes"] = max(known["peak_bytes"], peak)
            if leave:
                if turn and "compile_s" in now:
                    known["compile_again_s"].append(now["compile_s"])
                side.leave()
                warm.discard(name)
    return kept, facts


def environments(gpu: bool, leave: bool, cache: str) -> tuple[dict[str, str], dict[str, str]]:
    """Environment variables of JAX's process, and of PyTorch's, in which JAX only draws weights."""
    ours = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_ENABLE_COMPILATION_CACHE": "true"}
    ours = ours if leave else {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    if not gpu:
        return ours, {}
    share = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9" if leave else "0.45"}
    return ours | share, {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}


def workload_arguments(
    name: str,
    scale: str,
    batch: int,
    layout: str,
    *,
    pack_length: int | None = None,
    gradient_accumulation_steps: int = 0,
    **others: Any,
) -> dict[str, Any]:
    """What `workloads.make` is given for rows of a layout, one of `PARTS`.

    Args:
        pack_length: tokens of a packed row; None or 0 is the scale's.
        gradient_accumulation_steps: parts of an update; 0 chooses.

    The others are those of `workloads.make`.
    """
    in_parts = name == "affectgpt" and scale == "full" and batch >= 48
    return {
        "name": name,
        "scale": scale,
        "batch": batch,
        "pack_length": (pack_length or PACK_LENGTH[scale]) if layout == "packed" else 0,
        "gradient_accumulation_steps": gradient_accumulation_steps
        or (PARTS[layout] if in_parts else 1),
        **others,
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """One measurement; returns the report.

    Raises:
        ComparisonError: losses differ.
        TurnError: a side failed.
        ValueError: an unknown config key, or a value of another type.
    """
    arguments = functools.partial(
        workload_arguments,
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
    workload = workloads.make(**mine)
    if workload.records:  # written by one process, before several read them
        workloads.open_records(workload, args.records)
    records = str(args.records)
    with contextlib.ExitStack() as stack:
        cache = stack.enter_context(tempfile.TemporaryDirectory())
        ours, theirs = environments(args.scale == "full", args.leave, cache)
        told = {"workload": mine, "records": records}
        sides = {"jax": stack.enter_context(Side("jax", "benchmarks.sides:Ours", told, ours))}
        for tuning, given in peers.items():
            told = {"workload": given, "records": records, "tuning": tuning}
            side = Side(tuning, "benchmarks.sides:Theirs", told, theirs)
            sides[tuning] = stack.enter_context(side)
        same = {}
        for tuning, given in peers.items():
            # Everybody understands rows of one clip, and packed ones who packs.
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
    last = facts[args.tuning[0] if args.peer else "jax"].get("environment")
    command = environment.command("benchmarks.train_step", args.words)
    peak = None
    if workload.config.dtype == "bfloat16":
        peak = next((flops for name, flops in PEAKS.items() if name in last["device"]), None)
    report = {
        "environment": last | {"command": command},
        "settings": {
            "workload": args.workload,
            "scale": args.scale,
            "batch": args.batch if args.workload == "affectgpt" else None,
            "dtype": workload.config.dtype,
            "packed": packed,
            "peak_flop_per_s": peak,
            "sides": {"jax": mine, **peers},
            "leave": args.leave,
            "block": args.block,
            "warmup": args.warmup,
            "flags": {k: v for k, v in os.environ.items() if k in ("XLA_FLAGS", "OMP_NUM_THREADS")},
        },
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
    if args.profile:
        made = report["environment"] | {"command": f"{command} --profile DIR"}
        about = {"environment": made, "settings": report["settings"]}
        (args.profile / "about.json").write_text(json.dumps(about, indent=2), encoding="utf-8")
    return report


def table(reports: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of reports."""
    lines = [
        "| workload | side | step, median (10 to 90 %) | samples/s | tokens/s (with padding) | "
        "rows full | model FLOP/s | MFU | memory | compiled in | token losses apart | samples/s of "
        "JAX over it (by block) |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        settings = report["settings"]
        batch = f" {settings['batch']}" if settings["batch"] else ""
        what = f"{settings['workload']}{batch}, {settings['scale']}, {settings['dtype']}"
        what += "".join(f", {words}" for words in in_words(settings["sides"]["jax"]["settings"]))
        for side, r in report["sides"].items():
            name = f"PyTorch, {side}" if side != "jax" else "JAX"
            name += ", packed" if side == "jax" and settings["packed"] else ""
            ratio = report["ratios"].get(side)
            by = "{median:.2f} ({lowest:.2f} to {highest:.2f})".format(**ratio) if ratio else ""
            mfu = f"{r['mfu']:.1%}" if r["mfu"] else ""
            compiled = f"{r['compile_s']:.0f} s" if "compile_s" in r else ""
            apart = f"{report['losses'][side]['apart']:.0e}" if side in report["losses"] else ""
            lines.append(
                f"| {what} | {name} | {1e3 * r['median_s']:,.0f} ms ({1e3 * r['p10_s']:,.0f} to "
                f"{1e3 * r['p90_s']:,.0f}) | {r['samples_per_s']:.2f} | {r['tokens_per_s']:,.0f} "
                f"({r['places_per_s']:,.0f}) | {r['fill']:.0%} | "
                f"{r['model_flop_per_s'] / 1e12:.3g} T | {mfu} | {r['peak_bytes'] / 2**30:.1f} GiB "
                f"| {compiled} | {apart} | {by} |"
            )
    return "\n".join(lines)


def describe(report: Mapping[str, Any]) -> str:
    """What stands beside the table: losses, FLOPs and their formula, compilation, choices."""
    ours, lines = report["sides"]["jax"], []
    for tuning, same in report["losses"].items():
        lines.append(
            f"loss of the same {same['tokens']} tokens: {same['jax']:.6f} in JAX, "
            f"{same['torch']:.6f} in PyTorch ({tuning}); single tokens are {same['apart']:.1e} of "
            f"their spread apart (bound {same['bound']:g})"
        )
    parts = ours["gflop_per_step"]
    lines.append(
        f"model FLOPs of a step: {sum(parts.values()):,.4g} G = "
        + " + ".join(f"{value:,.4g} {name}" for name, value in parts.items())
        + "; a token takes 4 for a frozen weight and 6 for an adapter's, a pair of positions 12 "
        "for every head and dimension; padding and what is computed again take none "
        "(models/flops.py)"
    )
    again = ours["compile_again_s"]
    lines.append(
        f"compiled in {ours['compile_s']:.1f} s"
        + (f", from the cache in {min(again):.1f} s" if again else "")
        + f"; waiting for data: {ours['data_wait']:.2%} of a step"
    )
    return "\n".join([*lines, *ours["notes"]])


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


def at_least(least: int) -> Callable[[str], int]:
    """What argparse reads a whole number with."""

    def read(text: str) -> int:
        if not re.fullmatch(r"-?\d+", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} given; expected {least} or more")
        return int(text)

    return read


def setting(text: str) -> tuple[str, Any]:
    """`KEY=VALUE`; the value as JSON, or as it stands."""
    key, sign, value = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--workload", choices=("anchor", "affectgpt", "small"), default="small")
    add("--scale", choices=workloads.SCALES, default=default_scale(), help="default: full on a GPU")
    add("--batch", type=at_least(1), default=48, help="clips in an update of affectgpt")
    add("--pack", type=at_least(0), nargs="?", const=0, help="clips share rows, of so many tokens")
    add("--peer", choices=("torch",), help="measure PyTorch beside it")
    add("--tuning", nargs="+", choices=TUNINGS, help="of PyTorch; default: tuned")
    add("--steps", type=at_least(1), default=20)
    add("--block", type=at_least(1), default=5, help="steps of a turn")
    add("--warmup", type=at_least(0), default=3)
    add("--dtype", choices=("", *AGREE), default="", help="default: the scale's")
    add(
        "--gradient-accumulation-steps",
        type=at_least(0),
        default=0,
        help="parts of JAX's update; 0 chooses",
    )
    add("--peer-gradient-accumulation-steps", type=at_least(0), default=0, help="of PyTorch's")
    add("--leave", action="store_true", help="a side leaves the device after its turn")
    add("--set", type=setting, action="append", default=[], metavar="KEY=VALUE", help="of config")
    add("--tokenizer", default="tiny", help="directory of one; default: what ships")
    add("--records", type=Path, default=records_folder(), help="where record sets are kept")
    add("--profile", type=Path, metavar="DIR", help="trace steps of JAX into this folder")
    add("--out", type=Path, help="default: benchmarks/results/NAME.json")
    add("--show", type=Path, nargs="+", help="print the table of such files and stop")
    args = parser.parse_args(argv)
    args.words = list(argv)
    for flag in ("tuning", "peer_accumulation"):
        if getattr(args, flag) and not args.peer:
            name = flag.replace("_", "-")
            parser.error(f"--{name} is of PyTorch, which does not run; add --peer torch")
    args.tuning = args.tuning or ["tuned"]
    if args.workload != "affectgpt" and (args.pack is not None or "packed" in args.tuning):
        parser.error("only the clips of --workload affectgpt can share rows")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; ends with status 1 and one sentence where a side fails or the two differ."""
    args = parse(sys.argv[1:] if argv is None else argv)
    if args.show:
        print(table([json.loads(path.read_text(encoding="utf-8")) for path in args.show]))
        return
    try:
        report = run(args)
    except (ComparisonError, TurnError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    out = args.out or RESULTS / f"{name_of(args)}.json"
    environment.save(report, out)
    print(describe(report), table([report]), sep="\n\n")


if __name__ == "__main__":
    main()
