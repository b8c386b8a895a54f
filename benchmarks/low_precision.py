"""What an int8, fp8 or NF4 base costs and saves: `python -m benchmarks.low_precision [--shape 7b]`.

Memory: bytes of published bases by format, exactly, from their shapes. Quality: logits, gradients
and a training run of the shipped tiny base on the demo world, from one start and on the same
batches, against float32; all but the base is float32 too, and bfloat16 throughout stands beside
them for scale. Speed: an update of a model of random weights and whole rows, in turns with that of
the plain base, on the device at hand; a number of this device only.

A plot of the training runs goes beside the result file. Quality compares as `benchmarks.parity`
does, so PyTorch has to be installed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from affectgpt_jax.common.trees import nbytes
from affectgpt_jax.models.decoder import PUBLISHED, ComputeConfig, Decoder, DecoderConfig, init_base
from affectgpt_jax.models.quantize import PRECISIONS
from benchmarks import harness
from benchmarks.blocks import ratios, take_turns, workers
from benchmarks.harness import Report, at_least
from benchmarks.pictures import draw_low_precision

LOW = PRECISIONS[1:]
BASES = ("Qwen2.5-1.5B-Instruct", "Qwen2.5-7B-Instruct", "Qwen2.5-14B-Instruct")
SEED = 0
# Shape -> the anchor's scale, its rows and their tokens, and the remat policy. Layers of "7b" are
# computed again, so that the activations of long rows fit beside the base.
SHAPES = {"small": ("small", (4, 256), "none"), "7b": ("full", (2, 4096), "full")}


def memory() -> dict[str, dict[str, int]]:
    """Bytes of published bases: {base: {precision: bytes}}; all else is bfloat16."""

    def held(llm: DecoderConfig, precision: str) -> int:
        compute = ComputeConfig(jnp.bfloat16, jnp.bfloat16, precision)
        decoder = Decoder(llm, None, compute)
        return nbytes(jax.eval_shape(lambda key: init_base(decoder, key), jax.random.key(0)))

    return {
        name: {
            precision or "bfloat16": held(PUBLISHED[name], precision) for precision in PRECISIONS
        }
        for name in BASES
    }


def quality(steps: int) -> dict[str, Any]:
    """How far logits, gradients and a training run are from those of a float32 base.

    Returns:
        For every format: bytes of the base, `||x - float32|| / ||float32||` of the logits and of
        all gradients together at random adapters, and the loss before every update.
    """
    from benchmarks import probes  # with PyTorch, which the tables do without
    from benchmarks.sides import random_trainable

    formats = {"float32": ("float32", ""), "bfloat16": ("bfloat16", "")}
    formats |= {precision: ("float32", precision) for precision in LOW}
    found: dict[str, Any] = {}
    exact: tuple[np.ndarray, np.ndarray] | None = None
    with tempfile.TemporaryDirectory() as temporary:
        config = probes.make_config("tiny", steps, batch_size=16, seed=SEED, heads="attention")
        case = probes.make_case(config, Path(temporary) / "records", jax.default_backend())
        for name, (dtype, precision) in formats.items():
            program = probes.program_of(case, dtype=dtype, base_precision=precision)
            base = probes.load(case, program)
            drawn = random_trainable(program.model, SEED)
            values = probes.make_probe_jax(program.model)(base, drawn, case.pipeline.batch(0))
            gradients = [values[f"gradients of {part}"] for part in ("LoRA", "fusers")]
            flat = [np.ravel(x) for tensors in gradients for x in tensors.values()]
            values = values["logits"]["logits"], np.concatenate(flat)
            exact = exact or values
            errors = [probes.relative_error(x, y, y) for x, y in zip(values, exact, strict=True)]
            train = probes.make_train_jax(program.train_step, program.optimizer)
            start = program.init_state(SEED)["trainable"]
            found[name] = {
                "bytes": nbytes(base),
                "logits_error": errors[0],
                "gradient_error": errors[1],
                "losses": train(base, start, case.pipeline.batches(0, steps))[1],
            }
    return found


def speed(shape: str, precision: str, updates: int) -> dict[str, Any]:
    """Seconds of an update with a format and, in turns, with the plain base.

    Raises:
        TurnError: a side failed, or a loss is not finite.
    """
    scale, rows, remat = SHAPES[shape]
    told = {"name": "anchor", "scale": scale, "rows": rows}
    targets = {}
    for name in ("", precision):
        settings = {"base_precision": name, "remat": remat}
        arguments = {"workload": told | {"settings": settings}, "records": ""}
        targets[name] = ("benchmarks.sides:Jax", arguments)
    with workers(targets, gpu=scale == "full") as sides:
        kept, facts = take_turns(sides, steps=updates, block=1, warmup=2, leave=False)
    plain, low = ([block["seconds"][0] for block in blocks] for blocks in kept.values())
    sizes = ({part: of[f"{part}_bytes"] for part in ("base", "temporary")} for of in facts.values())
    return {
        "plain_s": plain,
        "seconds": low,
        "speed_up": ratios(kept[precision], kept[""]),
        **dict(zip(("plain_bytes", "bytes"), sizes, strict=True)),
    }


def run(args: argparse.Namespace) -> Report:
    """One measurement; returns the report.

    Raises:
        TurnError: a side of the speed's comparison failed.
    """
    # Before this process takes hold of a GPU.
    speeds = {precision: speed(args.shape, precision, args.updates) for precision in LOW}
    with jax.default_matmul_precision("highest"):
        measured = quality(args.steps)
    scale, (rows, length), remat = SHAPES[args.shape]
    return {
        "memory": memory(),
        "quality": measured,
        "workload": {
            "name": args.shape,
            "rows": rows,
            "length": length,
            "dtype": "bfloat16" if scale == "full" else "float32",
            "remat": remat,
        },
        "speed": speeds,
    }


def table(report: Report) -> str:
    """Markdown tables of a report."""
    plain, workload = report["quality"]["float32"]["losses"], report["workload"]
    last = len(plain) // 10

    def apart(row: Report) -> np.ndarray:
        return np.abs(np.subtract(row["losses"], plain)) / plain

    def mib(part: str) -> Callable[[Any], str]:
        sizes = ("plain_bytes", "bytes")
        return lambda item: " -> ".join(f"{item[1][key][part] / 2**20:,.0f}" for key in sizes)

    memory_rows = [
        (name, *(f"{size / 2**30:.2f}" for size in sizes.values()))
        for name, sizes in report["memory"].items()
    ]
    quality_columns = {
        f"tiny base, {len(plain)} updates": lambda item: item[0],
        "logits": lambda item: f"{item[1]['logits_error']:.2%}",
        "gradient": lambda item: f"{item[1]['gradient_error']:.2%}",
        "loss apart, mean": lambda item: f"{apart(item[1]).mean():.2%}",
        "at most": lambda item: f"{apart(item[1]).max():.2%}",
        f"mean loss of the last {last}": lambda item: f"{np.mean(item[1]['losses'][-last:]):.4f}",
    }
    what = (
        f"{workload['name']}: {workload['rows']} rows of {workload['length']} tokens in "
        f"{workload['dtype']}, on {report['environment']['device']}"
    )
    speed_columns = {
        what: lambda item: item[0],
        "update, plain base": lambda item: f"{statistics.median(item[1]['plain_s']):.3f} s",
        "with this base": lambda item: f"{statistics.median(item[1]['seconds']):.3f} s",
        "speed-up (by update)": lambda item: harness.spread_in_words(item[1]["speed_up"]),
        "MiB of the base": mib("base"),
        "of temporaries": mib("temporary"),
    }
    return "\n\n".join(
        (
            harness.markdown(("GiB of a base", *report["memory"][BASES[0]]), memory_rows),
            harness.columns(quality_columns, report["quality"].items()),
            harness.columns(speed_columns, report["speed"].items()),
        )
    )


def plot(_: argparse.Namespace, report: Report, path: Path) -> None:
    """Draw the training runs beside the result file."""
    draw_low_precision(report, path.with_suffix(".png"))


def flags(add: Callable[..., Any]) -> None:
    add("--shape", choices=SHAPES, default="small", help="of the timed model")
    add("--steps", type=at_least(10), default=200, help="updates of the training runs")
    add("--updates", type=at_least(1), default=20, help="timed, of each format")


COMMAND = harness.Measurement(
    "low_precision",
    run,
    harness.each(table),
    lambda args: "low_precision" + ("" if args.shape == "small" else f"_{args.shape}"),
    flags,
    finish=plot,
)

if __name__ == "__main__":
    COMMAND.main()
