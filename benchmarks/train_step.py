"""An update, measured beside PyTorch's in one run: `python -m benchmarks.train_step`.

    --workload anchor    Qwen2.5-7B, rows of 4,096 tokens, every position supervised, bfloat16
    --workload lengths   AffectGPT's own mix of lengths, features and heads; padded, or --pack
    --workload small     a Qwen2 of 40 million parameters and equal rows, for two CPU cores

Weights are random and the same on both sides. With `--peer release|tuned|packed` the twin of
`benchmarks.torch_reference` runs in that tuning on the same device, in turns with JAX, step by
step; both compute the loss of the same clips first, and must agree. `--shape 7b` puts Qwen2.5-7B
under the mix of lengths; without it the mix runs on the small shape, whose ratios hold anywhere.

A step is an update, from a batch in host memory to a finished device. Batches are made beforehand:
the input pipeline is not part of it. Prints a table and writes
`benchmarks/results/train_step_NAME.json`; `--show` prints the table of such files.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from affectgpt_jax import build
from affectgpt_jax.config import ConfigError
from affectgpt_jax.configs import affectgpt_qwen25_7b
from affectgpt_jax.data.packing import Bucket, pack, packed_bucket, round_up
from affectgpt_jax.data.pipeline import choose_lengths
from affectgpt_jax.models.affectgpt import AffectGPT, Batch, init_random_base
from affectgpt_jax.models.flops import train_flops
from affectgpt_jax.models.qwen2 import PUBLISHED, Qwen2Config
from affectgpt_jax.process import keep_freed_memory
from affectgpt_jax.train import compile_steps, tree_shardings
from affectgpt_jax.training import memory, sharding
from affectgpt_jax.training.optimizer import learning_rate_schedule, make_optimizer
from affectgpt_jax.training.step import init_state, make_eval_step, make_train_step
from affectgpt_jax.weights.huggingface import save_base
from benchmarks import environment

RESULTS = Path(__file__).parent / "results"
TUNINGS = ("release", "tuned", "packed")
SHAPES = {
    "small": Qwen2Config(32000, 512, 1408, 8, 8, 2, 64, tie_word_embeddings=True),
    "7b": PUBLISHED["Qwen2.5-7B-Instruct"],
}
# Dense bfloat16 FLOP/s of a device, from NVIDIA's data sheets, by a part of its name.
PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}
BATCHES = 8  # that a run cycles through
# Float32 rounds to 6e-8, and a loss averages over many tokens; bfloat16 rounds to 4e-3.
AGREE = {"float32": 1e-5, "bfloat16": 1e-2}


@dataclasses.dataclass(frozen=True)
class Clip:
    """Tokens of one example, the last of which are supervised."""

    length: int
    targets: int


def draw_clips(rng: np.random.Generator, count: int) -> list[Clip]:
    """Examples of the lengths that AffectGPT trains on under `hybrid` labels.

    The default prompt of 95 (labels) or 98 tokens, a subtitle of 5 to 40, and half of the time
    labels (mean 13, at most 28 tokens), half a description (mean 259, 90 % from 172 to 340 and
    beyond, at most 595); an answer ends with two tokens more.
    """
    clips = []
    for described in rng.random(count) < 0.5:
        mean, spread, low, high = (259, 66, 60, 595) if described else (13, 4, 4, 28)
        answer = int(np.clip(round(rng.normal(mean, spread)), low, high)) + 2
        prompt = (98 if described else 95) + int(rng.integers(5, 41))
        clips.append(Clip(prompt + answer, answer))
    return clips


def make_batch(
    rng: np.random.Generator,
    rows: Sequence[Sequence[Clip]],
    bucket: Bucket,
    vocab_size: int,
    features: dict[str, tuple[int, int]],
    soft_tokens: int,
) -> Batch:
    """Random tokens in rows of clips, one behind the other (layout: `models.affectgpt`)."""
    size, length, targets = len(rows), bucket.length, bucket.targets
    batch = {
        "tokens": rng.integers(vocab_size, size=(size, length), dtype=np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (size, 1)),
        "segment_ids": np.zeros((size, length), np.int32),
        "soft_index": np.zeros((size, length), np.int32),
        "target_positions": np.zeros((size, targets), np.int32),
        "targets": rng.integers(vocab_size, size=(size, targets), dtype=np.int32),
        "target_weights": np.zeros((size, targets), np.float32),
    }
    present = np.zeros((size, bucket.clips), bool)
    for i, row in enumerate(rows):
        first = target = 0
        for number, clip in enumerate(row):
            end, stop = first + clip.length, target + clip.targets
            batch["positions"][i, first:end] = np.arange(clip.length)
            batch["segment_ids"][i, first:end] = number + 1
            soft = slice(first + 5, first + 5 + soft_tokens)
            batch["soft_index"][i, soft] = 1 + number * soft_tokens + np.arange(soft_tokens)
            batch["target_positions"][i, target:stop] = np.arange(end - clip.targets, end) - 1
            batch["target_weights"][i, target:stop] = 1
            present[i, number] = True
            first, target = end, stop
    values = {
        name: rng.standard_normal((size, bucket.clips, *shape)).astype(np.float16)
        for name, shape in features.items()
    }
    return {**batch, "features": values, "present": dict.fromkeys(features, present)}


@dataclasses.dataclass(frozen=True)
class Work:
    """Batches, and the clips in each."""

    batches: list[Batch]
    clips: list[list[Clip]]


def padded(groups: list[list[Clip]], make: Callable[..., Batch], num_buckets: int) -> Work:
    """A row for every clip, batches as long as their longest, in a few lengths."""
    longest = np.array([max(clip.length for clip in group) for group in groups])
    ends = choose_lengths(longest, num_buckets)
    batches = []
    for group, length in zip(groups, longest, strict=True):
        end = next(end for end in ends if end >= length)
        # Room for targets is one number for all batches of a length, or each would be compiled.
        fitting = [c for g, n in zip(groups, longest, strict=True) if n <= end for c in g]
        targets = int(round_up(max(clip.targets for clip in fitting)))
        batches.append(make([[clip] for clip in group], Bucket(end, targets)))
    return Work(batches, groups)


def packed(clips: list[Clip], make: Callable[..., Batch], length: int, rows: int) -> Work:
    """Rows of as many clips as fit; the last rows, which are not full, are left out."""
    lengths, targets = (np.array([getattr(c, n) for c in clips]) for n in ("length", "targets"))
    bucket = packed_bucket(length, lengths, targets, np.ones(len(clips)))
    plan = [[clips[i] for i in row] for row in pack(lengths, targets, bucket)]
    groups = [plan[i : i + rows] for i in range(0, len(plan) - rows - 1, rows)][:BATCHES]
    return Work([make(group, bucket) for group in groups], [sum(g, []) for g in groups])


def make_config(args: argparse.Namespace) -> Any:
    """The paper's config, changed as a workload asks."""
    config = affectgpt_qwen25_7b.get_config()
    config.dtype, config.lora.dropout = args.dtype, 0.0
    config.base_precision, config.unroll_layers = args.base_precision, args.unroll
    config.pack_length = args.pack_length if args.pack else 0
    config.remat, config.attention = args.remat, args.attention
    if args.workload != "lengths":
        config.input = "text"
    return config


def make_work(args: argparse.Namespace, llm: Qwen2Config, model: AffectGPT) -> tuple[Work, Work]:
    """What JAX and what PyTorch runs: the same clips, packed or padded."""
    rng = np.random.default_rng(args.seed)
    fusion = model.fusion and model.fusion.config
    features = {n: (8, fusion.feature_width(n)) for n in fusion.inputs} if fusion else {}
    soft = sum(fusion.token_counts().values()) if fusion else 0

    def make(rows: Sequence[Sequence[Clip]], bucket: Bucket) -> Batch:
        return make_batch(rng, rows, bucket, llm.vocab_size, features, soft)

    if args.workload != "lengths":
        # The first token has no prediction before it.
        length, rows, targets = (4096, 2, 4095) if args.workload == "anchor" else (256, 4, 128)
        groups = [[Clip(length, targets)] * rows] * BATCHES
        work = Work([make([[c] for c in g], Bucket(length, targets)) for g in groups], groups)
        return work, work
    clips = draw_clips(rng, args.batch * (BATCHES + 2))
    groups = [clips[i : i + args.batch] for i in range(0, args.batch * BATCHES, args.batch)]
    rows = max(1, round(args.batch * np.mean([c.length for c in clips]) / args.pack_length))
    ours = theirs = padded(groups, make, num_buckets=4)
    if args.pack or args.peer == "packed":
        in_rows = packed(clips, make, args.pack_length, rows)
        ours = in_rows if args.pack else ours
        theirs = in_rows if args.peer == "packed" else theirs
    return ours, theirs


class Ours:
    """The update that `affectgpt_jax.train` compiles."""

    def __init__(self, args: argparse.Namespace, config: Any, llm: Qwen2Config, work: Work):
        # One device, so that both sides have the same.
        self.mesh = sharding.make_mesh("data:1", jax.devices()[:1])
        choice = build.attention(config, llm)
        self.notes = [f"attention {choice.name}: {choice.reason}"]
        shard = sharding.activation_constraint(self.mesh)
        clips = max(batch["segment_ids"].max() for batch in work.batches)
        model = build.model(config, llm, shard, choice.for_rows_of(int(clips)))
        optimizer_config = build.optimizer_config(config)
        optimizer = make_optimizer(optimizer_config, config.steps)
        schedule = learning_rate_schedule(optimizer_config, config.steps)
        abstract_base = sharding.abstract(self.mesh, lambda key: init_random_base(model, key))
        abstract_state = sharding.abstract(self.mesh, lambda key: init_state(model, optimizer, key))
        abstract = {
            b["tokens"].shape[1]: sharding.abstract_batch(self.mesh, b) for b in work.batches
        }
        if config.remat == "auto":
            largest, limit = abstract[max(abstract)], memory.device_limit()
            remat = memory.choose_remat(
                model, self.mesh, abstract_state, abstract_base, largest, 1, limit
            )
            self.notes.append(str(remat))
            model = memory.with_remat(model, remat.policy)
        self.model, self.optimizer_config = model, optimizer_config
        step = make_train_step(model, optimizer, schedule, seed=args.seed)

        def started(init: Callable, shapes: Any, seed: int) -> Any:
            return jax.jit(init, out_shardings=tree_shardings(shapes))(jax.random.key(seed))

        self.base = started(lambda key: init_random_base(model, key), abstract_base, args.seed)
        self.state = started(lambda k: init_state(model, optimizer, k), abstract_state, 1)
        began = time.perf_counter()
        self.steps = compile_steps(step, self.mesh, abstract_state, abstract_base, abstract)
        self.compile_s = time.perf_counter() - began

    def step(self, batch: Batch) -> Any:
        run = self.steps[batch["tokens"].shape[1]]
        self.state, metrics = run(self.state, self.base, sharding.shard_batch(self.mesh, batch))
        return metrics["loss"]

    def finish(self, loss: Any) -> float:
        return float(loss)


class Theirs:
    """The twin's update, from the weights that `ours` starts from."""

    def __init__(self, args: argparse.Namespace, config: Any, llm: Qwen2Config, ours: Ours):
        # Whoever measures JAX alone needs no PyTorch.
        import torch

        from benchmarks.torch_reference import training
        from benchmarks.torch_reference.model import TUNINGS, AffectGPT, to_device
        from benchmarks.torch_reference.weights import load_trainable

        device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--peer: JAX has a GPU and PyTorch has none; install its CUDA build")
        tuning, dtype = TUNINGS[args.peer], getattr(torch, config.dtype)
        fusion = ours.model.fusion and ours.model.fusion.config
        with tempfile.TemporaryDirectory() as directory:
            save_base(Path(directory), llm, jax.device_get(ours.base))
            twin = AffectGPT.from_pretrained(
                directory, fusion, ours.model.qwen2.lora, dtype=dtype, tuning=tuning
            )
        self.twin = twin.to(device).train()
        load_trainable(self.twin, jax.device_get(ours.state["trainable"]))
        self.optimizer = training.make_optimizer(
            self.twin.named_parameters(), ours.optimizer_config
        )
        self.rate = ours.optimizer_config.learning_rate
        self._training, self._torch, self._device = training, torch, device
        self._tensors = lambda batch: to_device(batch, tuning, device)

    def step(self, batch: Batch) -> Any:
        return self._training.train_step(
            self.twin, self.optimizer, self._tensors(batch), learning_rate=self.rate
        )

    def finish(self, loss: Any) -> float:
        return loss.item()

    def loss(self, batch: Batch) -> float:
        with self._torch.no_grad():
            total, count = self.twin.loss_sum_and_count(self._tensors(batch))
        return (total / count).item()


def cycle(work: Work) -> Iterator[tuple[Batch, list[Clip]]]:
    while True:
        yield from zip(work.batches, work.clips, strict=True)


def measure(sides: dict[str, tuple[Any, Work]], steps: int, warmup: int) -> dict[str, list[dict]]:
    """Every step's seconds and what was in it, the sides in turns; warm-up steps are not kept.

    Who goes first alternates, so that nobody always runs on caches that the other one filled.
    """
    feeds = {name: cycle(work) for name, (_, work) in sides.items()}
    kept: dict[str, list[dict]] = {name: [] for name in sides}
    for i in range(warmup + steps):
        for name in list(sides) if i % 2 == 0 else list(sides)[::-1]:
            batch, clips = next(feeds[name])
            began = time.perf_counter()
            side = sides[name][0]
            loss = side.finish(side.step(batch))
            seconds = time.perf_counter() - began
            if not math.isfinite(loss):
                raise ConfigError(f"{name}: the loss of step {i} is {loss}")
            if i >= warmup:
                kept[name].append(
                    {
                        "s": seconds,
                        "samples": len(clips),
                        "tokens": sum(clip.length for clip in clips),
                        "places": batch["tokens"].size,
                        "loss": loss,
                    }
                )
    return kept


def summarise(steps: list[dict], flops_per_token: float, peak: float | None) -> dict[str, Any]:
    """Medians over steps, and rates over all of them."""
    seconds = [step["s"] for step in steps]
    total, tokens = sum(seconds), sum(step["tokens"] for step in steps)
    deciles = statistics.quantiles(seconds, n=10) if len(seconds) > 1 else seconds * 9
    rate = tokens * flops_per_token / total
    return {
        "steps": len(steps),
        "median_s": statistics.median(seconds),
        "p10_s": deciles[0],
        "p90_s": deciles[-1],
        "samples_per_s": sum(step["samples"] for step in steps) / total,
        "tokens_per_s": tokens / total,
        "places_per_s": sum(step["places"] for step in steps) / total,
        "fill": tokens / sum(step["places"] for step in steps),
        "model_flop_per_s": rate,
        "mfu": rate / peak if peak else None,
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """One measurement; returns the report."""
    shape = "7b" if args.workload == "anchor" else args.shape
    llm = SHAPES[shape]
    config = make_config(args)
    # Only the fusion of this model matters here, so no attention is chosen for it.
    work, peer_work = make_work(args, llm, build.model(config, llm, attend=_never))
    ours = Ours(args, config, llm, work)
    sides: dict[str, tuple[Any, Work]] = {"jax": (ours, work)}
    agreement = None
    if args.peer:
        theirs = Theirs(args, config, llm, ours)
        sides[args.peer] = (theirs, peer_work)
        # Before anybody's first update, on a batch that both can read.
        same = work if args.peer == "packed" or not args.pack else peer_work
        batch = same.batches[0]
        found, expected = _loss_of(ours, batch), theirs.loss(batch)
        agreement = {"jax": found, args.peer: expected, "relative": abs(found / expected - 1)}
        if agreement["relative"] > AGREE[args.dtype]:
            raise ConfigError(
                f"losses of the same batch differ: {found} in JAX, {expected} in PyTorch "
                f"({args.peer}); their speeds cannot be compared"
            )
    clips = [clip for group in work.clips for clip in group]
    lora = ours.model.qwen2.lora
    flops = sum(train_flops(llm, lora, clip.length, clip.targets).total for clip in clips)
    per_token = flops / sum(clip.length for clip in clips)
    name = jax.devices()[0].device_kind
    peak = (
        next((v for k, v in PEAKS.items() if k in name), None) if args.dtype != "float32" else None
    )
    kept = measure(sides, args.steps, args.warmup)
    found = {side: summarise(steps, per_token, peak) for side, steps in kept.items()}
    stats = jax.local_devices()[0].memory_stats() or {}
    return {
        "environment": environment.describe(*(["torch", "peft"] if args.peer else [])),
        "settings": {
            "workload": args.workload,
            "shape": shape,
            "dtype": args.dtype,
            "pack_length": config.pack_length,
            "warmup": args.warmup,
            "notes": ours.notes,
            "compile_s": ours.compile_s,
            "model_gflop_per_token": per_token / 1e9,
            "peak_bytes": stats.get(
                "peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            ),
        },
        "loss_of_the_same_batch": agreement,
        "sides": found,
        "ratio": found["jax"]["samples_per_s"] / found[args.peer]["samples_per_s"]
        if args.peer
        else None,
        "steps": kept,
    }


def _never(*_: Any) -> Any:
    raise NotImplementedError


def _loss_of(ours: Ours, batch: Batch) -> float:
    """The mean loss of a batch under the weights that `ours` has now."""
    total, count = jax.jit(make_eval_step(ours.model))(
        ours.state["trainable"], ours.base, sharding.shard_batch(ours.mesh, batch)
    )
    return float(total / count)


def table(reports: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of reports."""
    lines = [
        "| workload | side | step, median (10 to 90 %) | samples/s | tokens/s | full | FLOP/s "
        "| MFU | JAX / PyTorch |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        settings = report["settings"]
        what = f"{settings['workload']}, {settings['shape']}, {settings['dtype']}"
        for side, r in report["sides"].items():
            mfu = f"{r['mfu']:.1%}" if r["mfu"] else ""
            ratio = f"{report['ratio']:.2f}" if report["ratio"] and side != "jax" else ""
            packing = ", packed" if side == "jax" and settings["pack_length"] else ""
            lines.append(
                f"| {what} | {side}{packing} | {1e3 * r['median_s']:.0f} ms "
                f"({1e3 * r['p10_s']:.0f} to {1e3 * r['p90_s']:.0f}) | {r['samples_per_s']:.2f} "
                f"| {r['tokens_per_s']:,.0f} | {r['fill']:.0%} "
                f"| {r['model_flop_per_s'] / 1e9:,.0f} G | {mfu} | {ratio} |"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--workload", choices=("anchor", "lengths", "small"), default="small")
    add("--shape", choices=SHAPES, default="small", help="of the mix of lengths")
    add("--batch", type=int, default=48, help="clips in an update of the mix of lengths")
    add("--pack", action="store_true", help="several clips a row on JAX's side")
    add("--pack-length", type=int, default=2048, help="tokens of a packed row")
    add("--peer", choices=TUNINGS, help="PyTorch in this tuning, in turns")
    add("--steps", type=int, default=20)
    add("--warmup", type=int, default=3)
    add("--dtype", choices=AGREE, help="default: bfloat16 for 7b, float32 for small")
    add("--base-precision", choices=("", "int8", "fp8", "nf4"), default="")
    add("--remat", choices=("auto", "none", "dots", "full"), default="auto")
    add("--attention", choices=("auto", "xla", "cudnn", "cudnn_packed"), default="auto")
    add("--unroll", action="store_true", help="layers in a row instead of a loop")
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="default: benchmarks/results/train_step_NAME.json")
    add("--show", type=Path, nargs="+", help="print the table of such files and stop")
    args = parser.parse_args(argv)
    if args.show:
        print(table([json.loads(path.read_text(encoding="utf-8")) for path in args.show]))
        return
    if args.pack and args.workload != "lengths":
        parser.error("--pack is for --workload lengths; the others have rows of one length")
    large = args.workload == "anchor" or args.shape == "7b"
    args.dtype = args.dtype or ("bfloat16" if large else "float32")
    try:
        report = run(args)
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None
    parts = [args.workload, *(["7b"] if args.shape == "7b" else []), args.base_precision]
    parts += ["packed" if args.pack else "", f"beside_{args.peer}" if args.peer else ""]
    if args.workload == "lengths":
        parts.insert(1, str(args.batch))
    out = args.out or RESULTS / f"train_step_{'_'.join(filter(None, parts))}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for note in report["settings"]["notes"]:
        print(note)
    print(
        f"compiled in {report['settings']['compile_s']:.1f} s; "
        f"{report['settings']['model_gflop_per_token']:.3g} GFLOP a token (models/flops.py)"
    )
    if same := report["loss_of_the_same_batch"]:
        print(f"loss of the same batch: {same}")
    print(table([report]))


if __name__ == "__main__":
    keep_freed_memory()
    main()
