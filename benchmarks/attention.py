"""Attention backends against a reference: `python -m benchmarks.attention`.

Every backend that training may choose, on rows of one sample (those of the workload "anchor") and
on rows of several ("affectgpt", packed), with the heads of the scale's base. The reference is the
whole square of scores in float32. How far output and gradients are from it, and how long both
passes take; a backend that cannot run here stands in the table with its reason.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from affectgpt_jax.config import CHOICES
from benchmarks import harness, workloads
from benchmarks.harness import Report, at_least, seconds_of

BACKENDS = CHOICES["attention"][1:]  # without "auto"
# Scale -> rows of one sample and their tokens, and packed ones as of 48 clips.
SHAPES = {
    "full": {"whole": (2, 4096), "packed": (6, 2048)},
    "small": {"whole": (1, 1024), "packed": (2, 1024)},
    "tiny": {"whole": (2, 64), "packed": (2, 64)},
}
# Rounding to bfloat16 gives a tenth of this, and attention to wrong tokens ten times as much.
BOUND = 0.05


def lengths_of(kind: str, length: int) -> list[int]:
    """Tokens of the samples of a row, between 1 and 3 parts of the mean clip; its end is padding.

    Args:
        kind: "whole" or "packed".
        length: of the row.
    """
    if kind == "whole":
        return [length]
    mean = min(workloads.MEAN_TOKENS, length // 4)
    found, part = [], 0
    while sum(found) + mean * 3 // 2 <= length:
        found.append(mean // 2 + part * mean // 2)
        part = (part + 1) % 3
    return found


def reference(query: Any, key: Any, value: Any, segment_ids: Any) -> Any:
    """Of the interface `attention.CausalAttention`: one square of scores, nothing skipped."""
    import jax
    import jax.numpy as jnp

    rows, length, heads, width = query.shape
    grouped = query.reshape(rows, length, key.shape[2], -1, width)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, key) * width**-0.5
    seen = jnp.tril(segment_ids[:, :, None] == segment_ids[:, None, :])[:, None, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1)
    return jnp.einsum("bkgts,bskd->btkgd", weights, value).reshape(query.shape)


def measure(kind: str, scale: str, dtype: str, repeats: int) -> dict[str, Any]:
    """All backends on rows of a kind; see `run` for what is returned."""
    import jax
    import jax.numpy as jnp

    from affectgpt_jax import build
    from affectgpt_jax.models.attention import choose
    from affectgpt_jax.models.flops import update_flops

    llm, (rows, length) = workloads.SCALES[scale][0], SHAPES[scale][kind]
    samples = lengths_of(kind, length)
    ids = np.repeat(np.arange(1, 1 + len(samples)), samples)
    segment_ids = jnp.asarray(np.tile(np.pad(ids, (0, length - len(ids))), (rows, 1)), jnp.int32)
    real = (segment_ids > 0)[:, :, None, None]
    rng = np.random.default_rng(0)
    heads = (llm.num_attention_heads, *(2 * [llm.num_key_value_heads]), llm.num_attention_heads)
    inputs = [
        jnp.asarray(rng.standard_normal((rows, length, n, llm.head_dim), np.float32), dtype)
        for n in heads
    ]

    def both_passes(attend: Callable) -> Callable:
        @jax.jit
        def run(query, key, value, cotangent):
            def output(*qkv):
                return jnp.where(real, attend(*qkv, segment_ids), 0)

            out, vjp = jax.vjp(output, query, key, value)
            return [jnp.where(real, x, 0) for x in (out, *vjp(cotangent))]

        return run

    with jax.default_matmul_precision("highest"):
        wide = [x.astype(jnp.float32) for x in inputs]
        expected = jax.block_until_ready(both_passes(reference)(*wide))
    flops = rows * update_flops(llm, None, [(n, 0) for n in samples]).attention
    flops //= llm.num_hidden_layers

    @jax.jit
    def apart(found, expected):
        pairs = zip(found, expected, strict=True)
        norm = jnp.linalg.norm
        return [norm(f.astype(jnp.float32) - e) / norm(e) for f, e in pairs]

    platform = build.device_platform()
    capability = build.compute_capability() if platform == "cuda" else (0, 0)

    def backend(name: str) -> dict[str, Any]:
        try:
            choice = choose(name, platform, capability, llm.head_dim, dtype, kind == "packed")
            attend = both_passes(choice.for_rows_of(len(samples)))
            first, *others = (
                seconds_of(lambda: jax.block_until_ready(attend(*inputs)))
                for _ in range(1 + repeats)
            )
            errors = [float(x) for x in apart(attend(*inputs), expected)]
        # A library may raise anything on a GPU that it does not know; the others still count.
        except Exception as error:
            return {"refused": (str(error).splitlines() or [type(error).__name__])[0]}
        errors = dict(zip(("output", "query", "key", "value"), errors, strict=True))
        return {"apart": errors, "first_s": first, "seconds": others}

    found = {name: backend(name) for name in BACKENDS}
    return {"rows": rows, "length": length, "samples": samples, "flops": flops, "backends": found}


def run(args: argparse.Namespace) -> Report:
    """One measurement; returns the report.

    For every kind of rows its shape, the FLOPs of both passes, and for every backend either
    "refused", why it cannot run, or "apart" (`||found - expected|| / ||expected||` of the output
    and the gradients), "first_s" (with compilation) and "seconds" of every repeat.
    """
    return {
        "settings": {"scale": args.scale, "dtype": args.dtype, "bound": BOUND},
        "kinds": {
            kind: measure(kind, args.scale, args.dtype, args.repeats) for kind in SHAPES[args.scale]
        },
    }


def table(reports: Sequence[Report]) -> str:
    """A Markdown table of reports: a row for every backend on every kind of rows."""
    header = ("rows", "backend", "furthest from float32", "both passes, median", "TFLOP/s")
    rows = []
    for report in reports:
        settings = report["settings"]
        for kind, of in report["kinds"].items():
            samples = f", {len(of['samples'])} samples each" if kind == "packed" else ""
            what = f"{of['rows']} x {of['length']:,}{samples}, {settings['dtype']}"
            for name, found in of["backends"].items():
                if "refused" in found:
                    rows.append((what, name, f"not here: {found['refused']}", "", ""))
                    continue
                seconds = statistics.median(found["seconds"])
                furthest = float(np.max([*found["apart"].values()]))  # NaN where one is
                wrong = "" if furthest <= settings["bound"] else " **wrong**"
                rate = of["flops"] / seconds / 1e12
                cells = (f"{furthest:.1e}{wrong}", f"{1e3 * seconds:,.2f} ms", f"{rate:.3g}")
                rows.append((what, name, *cells))
    return harness.markdown(header, rows)


def flags(add: Callable[..., Any]) -> None:
    add("--dtype", choices=CHOICES["dtype"], default="bfloat16")
    add("--repeats", type=at_least(1), default=10, help="timed, of each backend")


COMMAND = harness.Measurement(
    "attention",
    run,
    table,
    lambda args: f"attention_{args.scale}",
    flags,
    shared=("scale",),
)

if __name__ == "__main__":
    COMMAND.main()
