"""The input pipeline without a model: `python -m benchmarks.input_pipeline`.

Reads synthetic records of the real feature shapes from a disk whose pages are in memory, and
assembles batches as training does: in order of the shuffled plan, by Grain's threads, padded and
packed. Then one thread does the same work part by part, so that the table says what a sample costs
where. `--step SECONDS` (of an update of as many clips) adds the share of a step that the loop would
wait.

The record set is whole on every machine; the result has the machine's scale in its name.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from affectgpt_jax.data.examples import soft_token_index
from affectgpt_jax.data.pipeline import THREADS, TrainPipeline
from affectgpt_jax.data.records import decode
from benchmarks import harness, workloads
from benchmarks.harness import Report, at_least

LAYOUTS = {"padded": 0, "packed": 2048}  # pack_length
AIM = 5_000  # samples/s


def read(feed: TrainPipeline, first: int, count: int, threads: int) -> dict[str, float]:
    """Read batches through Grain; samples, and the seconds from the first request to the last.

    Args:
        feed: of training batches.
        first: step to start at.
        count: batches.
        threads: of Grain.
    """
    began, samples = time.perf_counter(), 0
    for batch in feed.batches(first, first + count, threads):
        samples += int(np.asarray(batch["segment_ids"]).max(axis=1).sum())
    return {"samples": samples, "s": time.perf_counter() - began}


def timed(function: Callable[[Any], Any], items: Sequence[Any]) -> float:
    """Microseconds a call, as the median over ten equal parts."""
    size, found = max(1, len(items) // 10), []
    for start in range(0, size * min(10, len(items)), size):
        part = items[start : start + size]
        began = time.perf_counter()
        for item in part:
            function(item)
        found.append((time.perf_counter() - began) / len(part))
    return 1e6 * statistics.median(found)


def by_part(feed: TrainPipeline, dataset: Any, how: Any, batches: int) -> dict[str, float]:
    """Microseconds that a sample costs in each part of making a batch, on one thread.

    Args:
        feed: of training batches.
        dataset: its records.
        how: the processor through which they become inputs.
        batches: how many to take apart.
    """
    rng = np.random.default_rng(0)
    numbers = rng.integers(len(dataset), size=max(200, 48 * batches)).tolist()
    source = dataset._source  # the reader below the checks, which is what they are measured against
    stored = [source[i] for i in numbers]
    examples = how.training_examples(dataset, "ovlabel")
    slots = how.mode.slots
    raw, whole = timed(source.__getitem__, numbers), timed(dataset.__getitem__, numbers)
    decoding = timed(decode, stored)
    soft = timed(
        lambda i: soft_token_index(examples[i].tokens, how.tokenizer, how.token_counts, slots),
        numbers,
    )
    steps = list(range(batches))
    plans = timed(feed.planned, steps)
    samples = sum(int(feed.planned(step).clips.sum()) for step in steps)
    batch = timed(feed.batch, steps) * len(steps) / samples
    return {
        "read from ArrayRecord": raw,
        "check and decode": decoding,
        "compare with the index": max(0.0, whole - raw - decoding),
        "place soft tokens": soft,
        "look up the plan": plans * len(steps) / samples,
        "copy into the batch, and the rest": max(
            0.0, batch - whole - soft - plans * len(steps) / samples
        ),
        "together": batch,
    }


def run(args: argparse.Namespace) -> Report:
    """One measurement; returns the report."""
    layouts = {}
    for layout, pack_length in LAYOUTS.items():
        workload = workloads.make(
            "input",
            args.scale,
            batch=args.batch,
            pack_length=pack_length,
            tokenizer=args.tokenizer,
        )
        began = time.perf_counter()
        dataset = workloads.open_records(workload, args.records)
        opened = time.perf_counter()
        feed = workloads.feed(workload, args.records)
        planned = time.perf_counter()
        per_epoch = len(feed.plan(0))
        count = min(args.batches, per_epoch)
        read(feed, 0, per_epoch, args.threads)  # so that all pages are in memory
        blocks = [read(feed, i * count, count, args.threads) for i in range(args.blocks)]
        rates = [block["samples"] / block["s"] for block in blocks]
        layouts[layout] = {
            "records": len(dataset),
            "samples_per_s": statistics.median(rates),
            "samples_per_s_range": [min(rates), max(rates)],
            "batch_s": statistics.median(block["s"] / count for block in blocks),
            "batches": count,
            "blocks": blocks,
            "open_s": opened - began,
            "tokenise_and_plan_s": planned - opened,
            "us_per_sample": by_part(
                feed, dataset, workloads.prompt_processor(workload), min(count, 20)
            ),
        }
    return {
        "settings": {
            "batch": args.batch,
            "threads": args.threads,
            "cores": harness.cores(),
            "step_s": args.step,
            "aim_samples_per_s": AIM,
        },
        "layouts": layouts,
    }


def table(report: Report) -> str:
    """Markdown tables of a report."""
    settings, layouts = report["settings"], report["layouts"]
    step_s = settings["step_s"]
    header = ["rows", "records", "samples/s (by block)", "a batch"]
    rows = []
    for name, found in layouts.items():
        low, high = found["samples_per_s_range"]
        rate = f"{found['samples_per_s']:,.0f} ({low:,.0f} to {high:,.0f})"
        row = [name, f"{found['records']:,}", rate, f"{1e3 * found['batch_s']:.1f} ms"]
        rows.append(row + ([f"{found['batch_s'] / step_s:.2%}"] if step_s else []))
    parts = [found["us_per_sample"] for found in layouts.values()]
    costs = [[name, *(f"{part[name]:.0f}" for part in parts)] for name in parts[0]]
    return "\n\n".join(
        [
            f"{settings['batch']} clips a batch, {settings['threads']} thread(s) beside the main "
            f"one, {settings['cores']} core(s); the aim is {settings['aim_samples_per_s']:,} "
            "samples/s",
            harness.markdown(header + (["share of a step"] if step_s else []), rows),
            harness.markdown(["one thread, us a sample", *layouts], costs),
        ]
    )


def flags(add: Callable[..., Any]) -> None:
    add("--scale", choices=workloads.SCALES, default="full", help="of the record set")
    add("--batch", type=at_least(1), default=48)
    add("--batches", type=at_least(1), default=100, help="of a block")
    add("--blocks", type=at_least(1), default=5)
    add("--threads", type=at_least(0), default=THREADS, help="of Grain; default: as in training")
    add("--step", type=float, default=0.0, help="seconds of an update, to compare with")


COMMAND = harness.Measurement(
    "input_pipeline",
    run,
    harness.each(table),
    lambda args: harness.whole_or_trial("input", args.scale, "records"),
    flags,
    shared=("tokenizer", "records"),
)

if __name__ == "__main__":
    COMMAND.main()
