"""What was planned beside what was measured: `python -m benchmarks.prediction [--measured FILE]`.

FILE is a result of `benchmarks.train_step`, by default that of the anchor. For its workload, device
and rematerialisation policy the planner's estimate of memory and time is made anew, from shapes
alone; `--compiled FILE` adds what `python -m affectgpt_jax.plan --compile --json FILE` says of the
program for that device. Beside them stand the buffers of the program that ran, the most memory that
the device had in use, and the time of a step. A CPU has no peaks, so that no time is planned for
it, and counts no memory of its own: there the estimate stands beside the program alone.

Nothing is run, and no GPU is taken hold of.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from affectgpt_jax.common.errors import UserError
from benchmarks import harness, workloads
from benchmarks.harness import RESULTS, Report
from benchmarks.workloads import Workload

GIB = 2**30


class PredictionError(UserError):
    """Files that cannot be compared."""


def estimate(workload: Workload, records: Path, kind: str, remat: str) -> dict[str, Any]:
    """What is planned for a workload on one device.

    Args:
        workload: that was measured.
        records: folder of record sets, which the shape of packed rows follows from.
        kind: `device_kind` of the device.
        remat: the policy that it ran with.

    Returns:
        "memory" in bytes by part; "floor_s" and "expected_s" of a step, where the device's peaks
        are known and the base is a published one.

    Raises:
        PredictionError: batches have several row lengths, and so no one time.
    """
    from affectgpt_jax.models.decoder import PUBLISHED
    from affectgpt_jax.planner import Planner
    from affectgpt_jax.training import devices
    from affectgpt_jax.training.roofline import EFFICIENCY, Shape

    feed = workloads.feed(workload, records)
    if len(feed.buckets) > 1:
        raise PredictionError(f"{workload.name} has {len(feed.buckets)} row lengths; expected one")
    [bucket], config = feed.buckets, workload.config
    device = devices.find(kind)
    name = next((name for name, llm in PUBLISHED.items() if llm == workload.llm), None)
    if device is None or name is None:
        return {"memory": memory_here(workload, feed.filler_batch(bucket), remat)}
    config = config.copy_and_resolve_references()
    config.llm = name
    microbatches = config.gradient_accumulation_steps
    planner = Planner(config, device, bucket, EFFICIENCY)
    rows = config.batch_size // microbatches
    layout = planner.layout(Shape(1, 1, 1), microbatches, rows, remat)
    return {
        "memory": layout.memory._asdict(),
        "floor_s": layout.time.floor,
        "expected_s": layout.time.expected,
    }


def memory_here(workload: Workload, batch: Any, remat: str) -> dict[str, int]:
    """The estimate that training itself would make with plain XLA's attention."""
    from affectgpt_jax.models.attention import causal
    from affectgpt_jax.program import make_program
    from affectgpt_jax.training import memory
    from benchmarks import sides

    length, mesh, config = batch["tokens"].shape[1], sides.one_device(), workload.config
    program = make_program(config, mesh, {length: batch}, llm=workload.llm, attend=causal)
    rows = memory.rows_of_a_device(
        program.batches[length], mesh, config.gradient_accumulation_steps
    )
    found = memory.estimates(program.model, program.state, program.base, rows, program.loss)
    return next(needed._asdict() for policy, needed in found if policy == remat)


def compiled_report(path: Path) -> dict[str, float]:
    """Peak memory in bytes and floor of a step in seconds, as `plan --compile` wrote them.

    Raises:
        PredictionError: the file has none.
    """
    found = harness.load(path).get("compiled")
    if not isinstance(found, dict) or not {"peak_gib", "floor_ms"} <= found.keys():
        raise PredictionError(
            f"{path} holds no compiled program; write it with python -m affectgpt_jax.plan "
            "--compile --json FILE"
        )
    return {"bytes": found["peak_gib"] * GIB, "floor_s": found["floor_ms"] / 1e3}


def run(args: argparse.Namespace) -> Report:
    """One comparison; returns the report.

    Raises:
        PredictionError: files that cannot be compared.
        ReadError: files that cannot be read.
    """
    import jax

    jax.config.update("jax_platforms", "cpu")  # shapes are traced, and no GPU is needed for that
    measured = harness.load(args.measured)
    side = measured.get("sides", {}).get("jax", {})
    if "program_bytes" not in side:
        raise PredictionError(
            f"{args.measured} does not say how much memory a program took; write it anew with "
            "python -m benchmarks.train_step"
        )
    compiled = compiled_report(args.compiled) if args.compiled else None
    about, settings = measured["environment"], measured["settings"]
    kind = about["device"].partition(" x ")[2]
    workload = workloads.make(**settings["sides"]["jax"])
    found = estimate(workload, args.records, kind, side["remat"])
    return {
        "environment": {k: v for k, v in about.items() if k != "command"},
        "settings": {name: settings[name] for name in ("workload", "scale", "batch", "dtype")}
        | {"remat": side["remat"]},
        "memory": {
            "estimate": found["memory"] | {"total": sum(found["memory"].values())},
            "compiled": compiled and compiled["bytes"],
            "program": side["program_bytes"],
            "device": side["peak_bytes"] if about["platform"] != "cpu" else None,
        },
        "seconds": {
            "floor": found.get("floor_s"),
            "expected": found.get("expected_s"),
            "compiled_floor": compiled and compiled["floor_s"],
            "measured": side["median_s"],
        },
    }


def table(reports: Sequence[Report]) -> str:
    """A Markdown table of reports: peak memory, then the time of a step; at the end the estimate
    over what was measured, or for memory over the program's where nothing was."""

    def gib(size: float | None) -> str:
        return f"{size / GIB:.2f} GiB" if size is not None else ""

    def ms(seconds: float | None) -> str:
        return f"{1e3 * seconds:,.1f} ms" if seconds is not None else ""

    def over(planned: float | None, found: float | None) -> str:
        return f"{planned / found:.2f}" if planned and found else ""

    header = ("workload", "", "estimate", "plan --compile", "program", "measured", "ratio")
    rows = []
    for report in reports:
        settings, memory, seconds = (report[part] for part in ("settings", "memory", "seconds"))
        batch = f" {settings['batch']}" if settings["batch"] else ""
        what = f"{settings['workload']}{batch}, {settings['scale']}, {settings['dtype']}, remat "
        what += f"{settings['remat']}, {report['environment']['device']}"
        total = memory["estimate"]["total"]
        sizes = (total, memory["compiled"], memory["program"], memory["device"])
        against = over(total, memory["device"] or memory["program"])
        rows.append((what, "peak memory", *map(gib, sizes), against))
        times = (seconds["expected"], seconds["compiled_floor"], None, seconds["measured"])
        rows.append((what, "step", *map(ms, times), over(seconds["expected"], seconds["measured"])))
        floor = (seconds["floor"], None, None, None)
        rows.append((what, "step, at least", *map(ms, floor), ""))
    return harness.markdown(header, rows)


def flags(add: Callable[..., Any]) -> None:
    add("--measured", type=Path, metavar="FILE", help="default: the anchor's, of this scale")
    add("--compiled", type=Path, metavar="FILE", help="what plan --compile --json FILE wrote")


def check(_: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    args.measured = args.measured or RESULTS / f"train_step_anchor_{args.scale}.json"


COMMAND = harness.Measurement(
    "prediction",
    run,
    table,
    lambda args: args.measured.stem.replace("train_step", "prediction"),
    flags,
    shared=("scale", "records"),
    check=check,
)

if __name__ == "__main__":
    COMMAND.main()
