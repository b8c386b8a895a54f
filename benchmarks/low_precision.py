"""What an int8, fp8 or NF4 base costs and saves: `python -m benchmarks.low_precision [--shape 7b]`.

Memory: bytes of published bases by format, exactly, from their shapes. Quality: logits, gradients
and a training run of the shipped tiny base on the demo world, from one start and on the same
batches, against float32; all but the base is float32 too, and bfloat16 throughout stands beside
them for scale. Speed: an update of a model of random weights and whole rows, in turns with that of
the plain base, on the device at hand; a number of this device only.

Prints tables, writes `benchmarks/results/low_precision.json` (`low_precision_7b.json` for that
shape) and a plot of the training runs beside it. `--show` prints the tables of such a file.
Quality takes the training run from `benchmarks.parity`, so PyTorch has to be installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from affectgpt_jax import build
from affectgpt_jax.models.affectgpt import (
    AffectGPT,
    init_random_base,
    init_trainable,
    loss_sum_and_count,
    target_states,
)
from affectgpt_jax.models.decoder import (
    PUBLISHED,
    ComputeConfig,
    Decoder,
    DecoderConfig,
    init_base,
    lm_head,
)
from affectgpt_jax.models.lora import LoraConfig
from affectgpt_jax.models.quantize import PRECISIONS
from affectgpt_jax.training.losses import cross_entropy
from affectgpt_jax.training.optimizer import (
    OptimizerConfig,
    learning_rate_schedule,
    make_optimizer,
)
from affectgpt_jax.training.step import init_key, init_state, make_train_step
from affectgpt_jax.weights.huggingface import load_base
from benchmarks import environment
from benchmarks.workloads import SCALES

RESULTS = Path(__file__).parent / "results"
LOW = PRECISIONS[1:]
BASES = ("Qwen2.5-1.5B-Instruct", "Qwen2.5-7B-Instruct", "Qwen2.5-14B-Instruct")
SEED = 0


class Workload(NamedTuple):
    """A model's shape, the rows of its batch, and how it runs."""

    llm: DecoderConfig
    rows: int
    length: int
    dtype: str
    remat: str


WORKLOADS = {
    "small": Workload(SCALES["small"][0], 4, 256, "float32", "none"),
    # Rematerialised, so that two bases and the activations of long rows fit 80 GB.
    "7b": Workload(SCALES["full"][0], 2, 4096, "bfloat16", "full"),
}


def bytes_of(tree: Any) -> int:
    """What the arrays or shapes of a tree take."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def memory() -> dict[str, dict[str, int]]:
    """Bytes of published bases: {base: {precision: bytes}}; all else is bfloat16."""

    def held(llm: DecoderConfig, precision: str) -> int:
        run = ComputeConfig(jnp.bfloat16, jnp.bfloat16, precision)
        return bytes_of(
            jax.eval_shape(lambda key: init_base(Decoder(llm, None, run), key), jax.random.key(0))
        )

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
    from benchmarks import parity, probes  # with PyTorch, which the tables do without

    formats = {"float32": ("float32", ""), "bfloat16": ("bfloat16", "")}
    formats |= {precision: ("float32", precision) for precision in LOW}
    found: dict[str, Any] = {}
    exact: tuple[np.ndarray, np.ndarray] | None = None
    with tempfile.TemporaryDirectory() as temporary:
        config = parity.make_config("tiny", steps, batch_size=16, seed=SEED, heads="attention")
        case = parity.make_case(config, Path(temporary) / "records", jax.default_backend())
        for name, (dtype, precision) in formats.items():
            config.dtype, config.base_precision = dtype, precision
            model = build.model(config, case.llm)
            base = load(model, case.directory)
            values = probe(
                model, base, parity.random_trainable(model, SEED), case.pipeline.batch(0)
            )
            exact = exact or values
            errors = [parity.relative_error(x, y, y) for x, y in zip(values, exact, strict=True)]
            train = probes.make_train_jax(model, build.optimizer_config(config), steps)
            start = jax.jit(functools.partial(init_trainable, model))(init_key(SEED))
            found[name] = {
                "bytes": bytes_of(base),
                "logits_error": errors[0],
                "gradient_error": errors[1],
                "losses": train(base, start, case.pipeline.batches(0, steps))[1],
            }
    return found


def load(model: AffectGPT, directory: Path) -> Any:
    """A base on one device."""
    init = functools.partial(init_random_base, model)
    abstract = jax.eval_shape(init, jax.random.key(0))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return load_base(directory, abstract, jax.tree.map(lambda _: device, abstract))


def probe(
    model: AffectGPT, base: Any, trainable: Any, batch: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the supervised tokens, and the gradient of the mean loss, all in one vector."""

    @jax.jit
    def run(trainable):
        def loss(trainable):
            total, count = loss_sum_and_count(model, base, trainable, batch)
            return total / count

        states = target_states(model, base, trainable, batch)
        vocabulary = lm_head(base).astype(states.dtype)
        logits = jnp.einsum("bsd,dv->bsv", states, vocabulary, preferred_element_type=jnp.float32)
        return logits, jax.grad(loss)(trainable)

    logits, gradient = run(trainable)
    flat = [np.ravel(leaf) for leaf in jax.tree.leaves(gradient)]
    return np.asarray(logits)[np.asarray(batch["target_weights"]) > 0], np.concatenate(flat)


def make_update(workload: Workload, precision: str) -> tuple[Callable[[], None], dict[str, int]]:
    """A function that runs one update of a text-only model and waits for it, and bytes it takes."""
    llm, rows, length, dtype, remat = workload
    run = ComputeConfig(jnp.dtype(dtype), jnp.dtype(dtype), precision, remat)
    model = AffectGPT(Decoder(llm, LoraConfig(dropout=0.0), run), None)
    config = OptimizerConfig()
    optimizer = make_optimizer(config, 1000)
    schedule = learning_rate_schedule(config, 1000)
    tokens = np.random.default_rng(SEED).integers(llm.vocab_size, size=(rows, length + 1))
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    batch = {
        "tokens": tokens[:, :-1].astype(np.int32),
        "positions": positions,
        "segment_ids": np.ones_like(positions),
        "target_positions": positions,
        "targets": tokens[:, 1:].astype(np.int32),
        "target_weights": np.ones((rows, length), np.float32),
    }
    batch = jax.device_put(batch)
    state = jax.jit(lambda key: init_state(model, optimizer, key))(init_key(SEED))
    base = jax.jit(lambda key: init_random_base(model, key))(jax.random.key(SEED))
    step = make_train_step(model, cross_entropy, optimizer, schedule, seed=SEED)
    compiled = jax.jit(step, donate_argnums=0).lower(state, base, batch).compile()
    analysis = compiled.memory_analysis()

    def update() -> None:
        nonlocal state
        state, metrics = compiled(state, base, batch)
        if not math.isfinite(float(metrics["loss"])):  # waits for the device
            raise SystemExit(f"error: the loss with {precision or 'a plain base'} is not finite")

    return update, {"base": bytes_of(base), "temporaries": analysis.temp_size_in_bytes}


def speed(workload: Workload, precision: str, updates: int) -> dict[str, Any]:
    """Seconds of an update with a format and, in turns, with the plain base."""
    plain, low = (make_update(workload, p) for p in ("", precision))
    seconds: tuple[list[float], list[float]] = ([], [])
    for i in range(updates + 2):  # the first two are not counted
        for side, (update, _) in zip(seconds, (plain, low), strict=True):
            began = time.perf_counter()
            update()
            if i >= 2:
                side.append(time.perf_counter() - began)
    ratios = [a / b for a, b in zip(*seconds, strict=True)]
    return {
        "plain_s": seconds[0],
        "seconds": seconds[1],
        "speed_up": statistics.median(ratios),
        "speed_up_quartiles": [float(q) for q in np.quantile(ratios, (0.25, 0.75))],
        "plain_bytes": plain[1],
        "bytes": low[1],
    }


def tables(report: Mapping[str, Any]) -> str:
    """Markdown tables of a report."""
    lines = ["| GiB of a base | " + " | ".join(report["memory"][BASES[0]]) + " |"]
    lines.append("|---" * (1 + len(PRECISIONS)) + "|")
    for name, held in report["memory"].items():
        cells = (f"{size / 2**30:.2f}" for size in held.values())
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    plain = report["quality"]["float32"]["losses"]
    last = len(plain) // 10
    lines += [
        "",
        f"| tiny base, {len(plain)} updates | logits | gradient | loss apart, mean | at most "
        f"| mean loss of the last {last} |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in report["quality"].items():
        apart = np.abs(np.subtract(row["losses"], plain)) / plain
        lines.append(
            f"| {name} | {row['logits_error']:.2%} | {row['gradient_error']:.2%} "
            f"| {apart.mean():.2%} | {apart.max():.2%} | {np.mean(row['losses'][-last:]):.4f} |"
        )
    workload = report["workload"]
    lines += [
        "",
        f"| {workload['name']}: {workload['rows']} rows of {workload['length']} tokens in "
        f"{workload['dtype']}, on {report['environment']['device']} | update, plain base "
        "| with this base | speed-up | quartiles | MiB of the base | of temporaries |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in report["speed"].items():
        low, high = row["speed_up_quartiles"]
        sizes = (
            f"{row['plain_bytes'][part] / 2**20:,.0f} -> {row['bytes'][part] / 2**20:,.0f}"
            for part in ("base", "temporaries")
        )
        lines.append(
            f"| {name} | {statistics.median(row['plain_s']):.3f} s "
            f"| {statistics.median(row['seconds']):.3f} s | {row['speed_up']:.2f} "
            f"| {low:.2f} to {high:.2f} | " + " | ".join(sizes) + " |"
        )
    return "\n".join(lines)


def plot(quality: Mapping[str, Any], png: Path) -> None:
    """The training runs, and how far each is from the float32 one."""
    # Without pyplot there is neither a display nor a global figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    losses, errors = figure.subplots(1, 2)
    plain = np.array(quality["float32"]["losses"])
    for number, (name, row) in enumerate(quality.items()):
        losses.plot(row["losses"], color=f"C{number}", linewidth=1, label=name)
        if name != "float32":
            apart = np.abs(row["losses"] - plain) / plain
            errors.semilogy(apart, color=f"C{number}", linewidth=1, label=name)
    losses.set(title="loss", xlabel="step")
    errors.set(title="relative difference of the loss from float32", xlabel="step")
    for axes in (losses, errors):
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    FigureCanvasAgg(figure).print_png(png)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=WORKLOADS, default="small", help="of the timed model")
    parser.add_argument("--steps", type=int, default=200, help="updates of the training runs")
    parser.add_argument("--updates", type=int, default=20, help="timed, of each format")
    parser.add_argument("--out", type=Path, help="default: in benchmarks/results")
    parser.add_argument("--show", type=Path, help="print the tables of a result file and stop")
    args = parser.parse_args()
    if args.show:
        print(tables(json.loads(args.show.read_text(encoding="utf-8"))))
        return
    with jax.default_matmul_precision("highest"):
        measured = quality(args.steps)
    workload = WORKLOADS[args.shape]
    report = {
        "environment": environment.describe(),
        "memory": memory(),
        "quality": measured,
        "workload": {"name": args.shape}
        | workload._asdict()
        | {"llm": dataclasses.asdict(workload.llm)},
        "speed": {precision: speed(workload, precision, args.updates) for precision in LOW},
    }
    suffix = "" if args.shape == "small" else f"_{args.shape}"
    out = args.out or RESULTS / f"low_precision{suffix}.json"
    environment.save(report, out)
    plot(measured, out.with_suffix(".png"))
    print(tables(report))


if __name__ == "__main__":
    main()
