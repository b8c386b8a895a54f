"""How far a crowd stays below what can be known: `python -m benchmarks.crowd`.

A crowd of `data_prep.crowd` learns from corpora of a demo world, of so many clips each that people
have labelled coarsely and with mistakes, and votes on other clips. Its share of right words stands
beside that of its best and mean single member and of the exact posterior. The best member is chosen
by the truth, which nobody has who needs a crowd.

`--compile DEVICE` says what XLA's CUDA compiler makes of an epoch of ten members on 40,000 clips
(extra gpu-compile; nothing is run).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from affectgpt_jax.data import demo as worlds
from affectgpt_jax.data import demo_captions
from affectgpt_jax.training import gpu_compile, hlo, hlo_traffic, roofline
from affectgpt_jax.training.devices import DEVICES
from benchmarks import harness
from benchmarks.harness import Report, at_least
from data_prep.caption import demo
from data_prep.crowd import members
from data_prep.crowd import run as crowd
from data_prep.crowd.votes import read_votes

SIZES = (384, 768, 1536, 3072)


def measure(seed: int, size: int, clips: int, folder: Path) -> dict[str, float]:
    """The facts of `demo.crowd_facts` of one world.

    Args:
        seed: of the world and of the crowd.
        size: labelled clips of each corpus.
        clips: that are voted on.
        folder: for records and the crowd.
    """
    world = worlds.World(seed)
    captions = demo_captions.draw_captions(world, clips)
    corpora = dict.fromkeys(demo.CORPORA, size)
    records, sets = demo.write_clips(folder, world, captions, corpora, print)
    heads = {name: (name.partition("-")[0],) for name in sets}
    crowd.train(sets, folder / "crowd", heads=heads, seed=seed)
    crowd.vote(folder / "crowd", records, folder / "votes.csv")
    single = (words for _, words in crowd.member_words(folder / "crowd", records))
    return demo.crowd_facts(world, captions, read_votes(folder / "votes.csv"), single)


LAUNCH_S = 5e-6  # of a small kernel in a loop, at the least
CLIPS = 40_000
WIDTHS = {"face": 768, "audio": 1024, "text": 192}


def describe(device: str) -> dict[str, Any]:
    """An epoch of ten members on a GPU that is not here, see `harness.describe_for_gpu`.

    Args:
        device: of `training.devices.DEVICES`.

    Returns:
        `launches` and `moved_gb` of it, `memory_s` and `launch_s`, which the bytes and the launches
        take alone, and `limit_s`, of all epochs that the settings allow, by the larger one.
    """
    settings = members.Settings()
    [place] = gpu_compile.devices(device, 1)
    lowered = members.lower_epoch(CLIPS, WIDTHS, len(worlds.EMOTIONS), settings, place)
    compiled = gpu_compile.compile_step(lowered, {})
    launches = hlo_traffic.launches(hlo.parse(compiled.as_text()), 0)
    count = sum(launch.times for launch in launches)
    memory_s = roofline.launch_floor(launches, DEVICES[device], "float32")
    return {
        "device": DEVICES[device].name,
        "clips": CLIPS,
        "members": settings.folds * settings.seeds,
        "launches": count,
        "moved_gb": sum(launch.bytes for launch in launches) / 1e9,
        "memory_s": memory_s,
        "launch_s": count * LAUNCH_S,
        "limit_s": settings.epochs * max(memory_s, count * LAUNCH_S),
    }


def run(args: argparse.Namespace) -> Report:
    """All worlds and sizes, or an epoch that is compiled and not run."""
    if args.compile:
        return harness.describe_for_gpu("crowd", device=args.compile)
    rows = []
    for size in args.sizes:
        for seed in args.seeds:
            with tempfile.TemporaryDirectory() as temporary:
                facts = measure(seed, size, args.clips, Path(temporary))
            rows.append({"size": size, "world": seed, **facts})
            print(rows[-1], flush=True)
    return {"clips": args.clips, "corpora": len(demo.CORPORA), "rows": rows}


def _mean(rows: list[dict[str, Any]], key: str) -> float:
    return statistics.fmean(row[f"crowd: {key}"] for row in rows)


COMPILED: dict[str, Callable[[Report], str]] = {
    "compiled, not run": lambda r: r["device"],
    "clips, members": lambda r: f"{r['clips']:,}, {r['members']}",
    "launches of an epoch": lambda r: f"{r['launches']:,}",
    "GB": lambda r: f"{r['moved_gb']:,.0f}",
    "by bytes": lambda r: f"{r['memory_s']:.2f} s",
    f"at {1e6 * LAUNCH_S:.0f} us a launch": lambda r: f"{r['launch_s']:.2f} s",
    "100 epochs": lambda r: f"{r['limit_s']:.0f} s",
}


def table(report: Report) -> str:
    """A Markdown table of a report: means over worlds."""
    if "rows" not in report:
        return harness.columns(COMPILED, [report])
    sizes = list(dict.fromkeys(row["size"] for row in report["rows"]))
    of = {size: [row for row in report["rows"] if row["size"] == size] for size in sizes}
    columns = {
        "labelled clips of a corpus": lambda size: f"{size:,}",
        "worlds": lambda size: str(len(of[size])),
        "crowd": lambda size: f"{_mean(of[size], 'right'):.3f}",
        "best single member": lambda size: f"{_mean(of[size], 'best single member'):.3f}",
        "mean single member": lambda size: f"{_mean(of[size], 'mean single member'):.3f}",
        "exact posterior": lambda size: f"{_mean(of[size], 'exact posterior'):.3f}",
        "shortfall": lambda size: (
            f"{_mean(of[size], 'exact posterior') - _mean(of[size], 'right'):.3f}"
        ),
    }
    error = statistics.fmean(row["crowd: its standard error"] for row in report["rows"])
    told = (
        f"{report['corpora']} corpora, {report['clips']:,} clips voted on; the standard error of a "
        f"share in one world is {error:.3f}."
    )
    return f"{harness.columns(columns, sizes)}\n\n{told}"


def flags(add: Callable[..., Any]) -> None:
    add("--seeds", type=int, nargs="+", default=[0], help="worlds")
    add("--sizes", type=at_least(64), nargs="+", default=list(SIZES), help="clips of a corpus")
    add("--clips", type=at_least(64), default=demo.CLIPS, help="that are voted on")
    add("--compile", choices=DEVICES, metavar="DEVICE", help=f"one of {', '.join(DEVICES)}")


def result(args: argparse.Namespace) -> str:
    """The name of the result."""
    return f"crowd_compiled_{args.compile}" if args.compile else "crowd"


COMMAND = harness.Measurement("crowd", run, harness.each(table), result, flags)

if __name__ == "__main__":
    COMMAND.main()
