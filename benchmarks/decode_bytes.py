"""Bytes that a decode step moves on a GPU: `python -m benchmarks.decode_bytes`.

XLA's CUDA compiler compiles the decode step of Qwen2.5-7B in bfloat16, with adapters merged, for a
GPU that need not be here (the extra `gpu-compile`). Its program tells what every token reads and
writes, beside what it would at the least: weights and cache read once, logits written once. Nothing
is run or measured.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import harness
from benchmarks.harness import Report

ROWS = (1, 32, 256)
SLOTS = 1024
STATUS = "compiled, not run"
# Room for an answer, whose tokens a step reads and writes as well.
_NEW_TOKENS = 256


def describe(device: str, rows: int, slots: int, config: Any = None) -> dict[str, Any]:
    """Compile a decode step, see `harness.describe_for_gpu`.

    Args:
        device: of `training.devices.DEVICES`.
        rows: that write an answer each.
        slots: of the cache, all of which are read.
        config: a `DecoderConfig`; None is Qwen2.5-7B's.

    Returns:
        Of a token of every row, in GB: `moved`, `movement` (of copies, transposes, fills and the
        like) and `ideal`, which is `weights`, `cache` and `logits`; `launches`; `largest_movement`,
        MB that such a launch writes; `temporaries_gib`; `floor_ms`, with every launch at
        `roofline.BANDWIDTH_SHARE` of the bandwidth or `MATMUL_SHARE` of the peak, whichever takes
        longer; `tokens_per_s` there, and `tokens_per_s_by_bytes`, without the latter; `compile_s`.

    Raises:
        CompilerError: the compiler refuses the step.
    """
    import jax
    import jax.numpy as jnp

    from affectgpt_jax.common.trees import nbytes
    from affectgpt_jax.models import generate
    from affectgpt_jax.models.affectgpt import AffectGPT, init_random_base
    from affectgpt_jax.models.decoder import ComputeConfig, Decoder, DecoderConfig, KVCache
    from affectgpt_jax.training import gpu_compile, hlo, hlo_traffic, roofline, sharding
    from affectgpt_jax.training.devices import DEVICES

    config = config or DecoderConfig()
    whole = sharding.replicated(sharding.make_mesh("data:1", gpu_compile.devices(device, 1)))

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    dtype = jnp.bfloat16
    compute = ComputeConfig(dtype=dtype, param_dtype=dtype)
    model = AffectGPT(Decoder(config, None, compute), None)
    shapes = jax.eval_shape(lambda key: init_random_base(model, key), jax.random.key(0))
    base = jax.tree.map(lambda x: array(x.dtype, *x.shape), shapes)
    of_cache = array(dtype, rows, config.num_key_value_heads, slots, config.head_dim)
    counts = array(jnp.int32, rows)
    state = generate.DecodeState(
        generated=generate.Generated(
            array(jnp.int32, rows, _NEW_TOKENS), counts, array(bool, rows), None
        ),
        lengths=counts,
        limits=counts,
        cache=(KVCache(of_cache, of_cache),) * config.num_hidden_layers,
        seen=None,
        keys=None,
    )
    decoding = generate.Decoding(_NEW_TOKENS, (0,), 0)
    trainable = {"lora": {}, "fusion": {}}
    steps = array(jnp.int32)
    lowered = generate.decode.lower(model, base, trainable, state, decoding, steps)
    began = time.perf_counter()
    compiled = gpu_compile.compile_step(lowered, {})
    seconds = time.perf_counter() - began

    # The loop over tokens is of unknown length, and counted once.
    found = hlo_traffic.launches(hlo.parse(compiled.as_text()), 0)
    moving = [f for f in found if f.kind == hlo_traffic.MOVEMENT]
    # Of a table of its own, a token reads a row.
    table = 0 if config.tie_word_embeddings else nbytes(base["embed_tokens"])
    parts = {
        "weights": nbytes(base) - table,
        "cache": nbytes(state.cache),
        "logits": 4 * rows * config.vocab_size,
    }
    gpu = DEVICES[device]
    bandwidth, peak = roofline.BANDWIDTH_SHARE * gpu.hbm, roofline.MATMUL_SHARE * gpu.flops
    moved = sum(f.bytes for f in found)
    floor = math.fsum(max(f.bytes / bandwidth, f.times * f.flops / peak) for f in found)
    return {
        "device": gpu.name,
        "rows": rows,
        "slots": slots,
        "moved": moved / 1e9,
        "movement": sum(f.bytes for f in moving) / 1e9,
        "ideal": sum(parts.values()) / 1e9,
        **{name: size / 1e9 for name, size in parts.items()},
        "launches": sum(f.times for f in found),
        "largest_movement": max((f.written for f in moving), default=0) / 1e6,
        "temporaries_gib": compiled.memory_analysis().temp_size_in_bytes / 2**30,
        "floor_ms": 1e3 * floor,
        "tokens_per_s": rows / floor,
        "tokens_per_s_by_bytes": rows * bandwidth / moved,
        "compile_s": seconds,
    }


def run(args: argparse.Namespace) -> Report:
    """Every number of rows; returns the report."""
    asked = {"device": args.device, "slots": args.slots}
    steps = [harness.describe_for_gpu("decode_bytes", rows=rows, **asked) for rows in args.rows]
    return {"status": STATUS, "steps": steps}


COLUMNS = {
    "GPU": lambda r: r["device"],
    "rows x slots": lambda r: f"{r['rows']} x {r['slots']:,}",
    "GB a token step": lambda r: f"{r['moved']:.1f}",
    "weights + cache + logits": lambda r: (
        f"{r['weights']:.1f} + {r['cache']:.1f} + {r['logits']:.2f} = {r['ideal']:.1f}"
    ),
    "times that": lambda r: f"{r['moved'] / r['ideal']:.2f}",
    "copied": lambda r: f"{r['movement']:.2f}",
    "launches": lambda r: f"{r['launches']:,}",
    "tokens/s at most: by bytes": lambda r: f"{r['tokens_per_s_by_bytes']:,.0f}",
    "with matmuls": lambda r: f"{r['tokens_per_s']:,.0f}",
}


def table(report: Report) -> str:
    """A Markdown table of decode steps."""
    version = report["environment"]["versions"]["jax"]
    return f"jax {version}, {report['status']}\n\n{harness.columns(COLUMNS, report['steps'])}"


def flags(add: Callable[..., Any]) -> None:
    add("--device", default="h200-141g", help="as of affectgpt_jax.plan; default: h200-141g")
    add("--rows", type=harness.at_least(1), nargs="+", default=list(ROWS))
    add("--slots", type=harness.at_least(1), default=SLOTS, help="of the cache")


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    from affectgpt_jax.training import gpu_compile
    from affectgpt_jax.training.devices import DEVICES

    if args.device not in DEVICES:
        parser.error(f"--device is {args.device!r}; expected one of {', '.join(DEVICES)}")
    if missing := gpu_compile.unavailable():
        parser.error(missing)


def name_of(args: argparse.Namespace) -> str:
    """A result file's name, without its ending: one of every version of jax, and of every GPU."""
    versions: Sequence[str] = importlib.metadata.version("jax").split(".")[:2]
    return f"decode_bytes_{args.device.split('-')[0]}_jax_{'.'.join(versions)}"


COMMAND = harness.Measurement("decode_bytes", run, harness.each(table), name_of, flags, check=check)

if __name__ == "__main__":
    COMMAND.main()
