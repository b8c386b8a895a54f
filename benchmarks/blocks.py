"""Blocks of steps: how the sides of a comparison run them in turns, and what they amount to."""

from __future__ import annotations

import contextlib
import math
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from affectgpt_jax.models.flops import Flops, update_flops
from affectgpt_jax.models.lora import LoraConfig
from benchmarks.harness import spread
from benchmarks.turns import Side, TurnError, alternate
from benchmarks.workloads import Workload

Block = Mapping[str, Any]  # as `sides.block_of` makes it


@contextlib.contextmanager
def workers(
    targets: Mapping[str, tuple[str, Mapping[str, Any]]], *, gpu: bool, leave: bool = False
) -> Iterator[dict[str, Side]]:
    """The sides of a comparison, for as long as the context lasts.

    Sides that leave share a compilation cache, which is gone afterwards; others have none.

    Args:
        targets: name -> "MODULE:CLASS" and the arguments of the class. The class of a side that
            runs in PyTorch is called `Torch`.
        gpu: they share one GPU; a side of JAX may use all of its memory, or half of it where
            another one is there at the same time.
        leave: one is on the device at a time.
    """
    with contextlib.ExitStack() as stack:
        cache = stack.enter_context(tempfile.TemporaryDirectory())
        jax = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
        if leave:
            jax = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_ENABLE_COMPILATION_CACHE": "true"}
        torch = {}
        if gpu:
            whole = leave or len(targets) == 1
            jax["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.9" if whole else "0.45"
            torch["XLA_PYTHON_CLIENT_ALLOCATOR"] = "platform"  # JAX only draws weights there
        yield {
            name: stack.enter_context(
                Side(name, target, arguments, torch if target.endswith(":Torch") else jax)
            )
            for name, (target, arguments) in targets.items()
        }


def take_turns(
    sides: Mapping[str, Side], *, steps: int, block: int, warmup: int, leave: bool
) -> tuple[dict[str, list[Block]], dict[str, dict[str, Any]]]:
    """Let the sides run in turns; returns the blocks of each, and its facts with peak memory.

    Args:
        sides: by name.
        steps: that count, of each; rounded up to whole blocks.
        block: steps of a turn.
        warmup: steps before the first turn of a process.
        leave: end a side's process after each turn, where the device has no room for all.

    Raises:
        TurnError: a side failed, or a loss is not finite.
    """
    kept: dict[str, list[Block]] = {name: [] for name in sides}
    facts: dict[str, dict[str, Any]] = {}
    warm: set[str] = set()
    for turn, name in alternate(sides, math.ceil(steps / block)):
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


def flops_of(workload: Workload, samples: Sequence[Sequence[int]]) -> Flops:
    """Model FLOPs of an update on clips of these `(tokens, supervised tokens)`."""
    lora = workload.config.lora
    lora = LoraConfig(lora.rank, lora.alpha, lora.dropout, tuple(lora.targets))
    return update_flops(workload.llm, lora, samples)


def summarise(
    blocks: Sequence[Block], workload: Workload, peak: float | None = None
) -> dict[str, Any]:
    """Steps by their median and deciles; rates by block, as median, lowest and highest.

    Args:
        blocks: of one side.
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


def ratios(ours: Sequence[Block], theirs: Sequence[Block]) -> dict[str, float]:
    """Samples/s of one side over the other's, block by block of the same turn."""

    def rate(block: Block) -> float:
        return sum(map(len, block["samples"])) / sum(block["seconds"])

    return spread([rate(a) / rate(b) for a, b in zip(ours, theirs, strict=True)])
