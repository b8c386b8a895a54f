"""The two sides of the train-step benchmark, each for a process of its own (`benchmarks.turns`).

Both have the same methods and the same start: a base drawn from a seed on the device, adapters and
fusion drawn from another, and the batches of one workload. What they return is plain JSON.
"""

from __future__ import annotations

import dataclasses
import functools
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from affectgpt_jax import build
from affectgpt_jax.common.trees import nbytes
from affectgpt_jax.config import ConfigError
from affectgpt_jax.models.affectgpt import (
    AffectGPT,
    Batch,
    init_random_base,
    init_trainable,
    target_states,
    token_log_probs,
)
from affectgpt_jax.models.attention import causal
from affectgpt_jax.models.decoder import lm_head
from affectgpt_jax.program import compiler_options, make_program
from affectgpt_jax.training import memory, sharding
from benchmarks import harness, workloads
from benchmarks.workloads import Contents, Workload, contents

BASE_SEED, TRAINABLE_SEED = 0, 1
# What has a column for every token, and for every target.
BY_TOKEN = ("tokens", "positions", "segment_ids", "soft_token_index")
BY_TARGET = ("target_positions", "targets", "target_weights")


def one_device() -> jax.sharding.Mesh:
    """A mesh of one device, since the other side has no more."""
    return sharding.make_mesh("data:1", jax.devices()[:1])


def draw_base(model: AffectGPT) -> Any:
    """Random frozen parameters on one device, the same for both sides."""
    return jax.jit(lambda key: init_random_base(model, key))(jax.random.key(BASE_SEED))


def random_trainable(model: AffectGPT, seed: int) -> Any:
    """Adapters and fusion at which every parameter matters, as NumPy arrays.

    Fresh ones have zero biases, unit norms and zero `lora_b`, behind which errors hide.
    """
    abstract = jax.eval_shape(lambda key: init_trainable(model, key), jax.random.key(0))
    return random_parameters(abstract, seed)


def random_parameters(abstract: Any, seed: int) -> Any:
    """Normal values for a tree of shapes, of a size that keeps activations of order 1."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        value, name = rng.standard_normal(leaf.shape, np.float32), path[-1].key
        match name:
            case "scale":
                return 1 + 0.1 * value
            case "bias":
                return 0.1 * value
            case "queries" | "positions":
                return value
            case "lora_a" | "lora_b":
                size = leaf.shape[-2] ** -0.5 * (0.05 if name == "lora_b" else 1)
                return (size * value).astype(jnp.bfloat16).astype(np.float32)
        return value * np.float32(leaf.shape[-2] ** -0.5)

    return jax.tree_util.tree_map_with_path(draw, abstract)


def block_of(seconds: list[float], wait_s: float, losses: list[float], of: list[Contents]) -> dict:
    """What a block of steps returns.

    Args:
        seconds: of every step, from the end of the one before.
        wait_s: that the loop waited for batches.
        losses: the mean loss of each.
        of: what was in each.
    """
    return {
        "seconds": seconds,
        "wait_s": wait_s,
        "losses": losses,
        "places": [found.places for found in of],
        "samples": [found.samples.tolist() for found in of],
    }


def peak_of_process() -> int:
    """The largest resident size of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def ceilings(dtype: str) -> dict[str, float]:
    """What this device does at best: FLOP/s of a large matmul, bytes/s of a large copy."""
    size = 8192 if jax.default_backend() == "gpu" else 2048
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
    matmul, copy = jax.jit(jnp.matmul), jax.jit(lambda x: -x)

    def fastest(function: Any, *inputs: Any) -> float:
        times = []
        for _ in range(6):  # the first one compiles
            began = time.perf_counter()
            jax.block_until_ready(function(*inputs))
            times.append(time.perf_counter() - began)
        return min(times)

    return {
        "flop_per_s": 2 * size**3 / fastest(matmul, a, b),
        "bytes_per_s": 2 * a.nbytes / fastest(copy, a),
    }


# What has no setting: supervised positions are chosen before the lm_head, and their logits made in
# chunks; what the next step needs is read and moved while one runs.
WITHOUT = ("", "gather", "chunks", "overlap")


class Jax:
    """The update that `affectgpt_jax.train` compiles, on one device.

    Args:
        workload: arguments of `workloads.make`.
        records: folder of record sets.
        without: what it does not do, of `WITHOUT`.
    """

    def __init__(self, workload: Mapping[str, Any], records: str, without: str = ""):
        if without not in WITHOUT:
            raise ValueError(f"without is {without!r}; expected one of {WITHOUT}")
        self.workload = workloads.make(**workload)
        config, llm = self.workload.config, self.workload.llm
        self.feed = workloads.feed(self.workload, Path(records))
        if without == "gather":
            self.feed = workloads.EveryPosition(self.feed)
        self._overlap = without != "overlap"
        self.mesh = one_device()
        choice = build.attention(config, llm)
        self.notes = [f"attention {choice.name}: {choice.reason}"]
        program = make_program(
            config,
            self.mesh,
            {bucket.length: self.feed.filler_batch(bucket) for bucket in self.feed.buckets},
            llm=llm,
            attend=choice.for_rows_of(self.feed.buckets[0].clips),
            memory_limit=memory.device_limit(),
        )
        if program.remat:
            self.notes.append(str(program.remat))
        if without == "chunks":
            positions = max(b.targets for b in self.feed.buckets) * config.batch_size
            program = program.on(self.mesh, loss_chunk=positions)
        self.model = program.model
        options = compiler_options(config, self.notes.append)
        began = time.perf_counter()
        self.programs = program.compile(options)
        self.compile_s = time.perf_counter() - began
        self.base = program.init_base(BASE_SEED)
        self.state = program.init_state(TRAINABLE_SEED)
        places = sharding.shardings_of(program.state["trainable"])
        drawn = random_trainable(self.model, TRAINABLE_SEED)
        self.state["trainable"] = jax.device_put(drawn, places)

    def facts(self) -> dict[str, Any]:
        """What it runs on, and how."""
        programs = self.programs.values()
        return {
            "environment": harness.describe(),
            "notes": self.notes,
            "compile_s": self.compile_s,
            "base_bytes": nbytes(self.base),
            "temporary_bytes": max(p.memory_analysis().temp_size_in_bytes for p in programs),
            "program_bytes": max(map(memory.program_bytes, programs)),
            "remat": self.model.decoder.compute.remat,
        }

    def token_losses(self, workload: Mapping[str, Any], records: str) -> list[float]:
        """Cross-entropy of every supervised token of a workload's first batch, without dropout.

        Args:
            workload, records: as for the class; rows may be laid out in another way.
        """
        batch = workloads.feed(workloads.make(**workload), Path(records)).batch(0)
        model = self.model

        @jax.jit
        def losses(base: Any, trainable: Any, batch: Batch) -> jax.Array:
            states = target_states(model, base, trainable, batch)
            return -token_log_probs(states, lm_head(base), batch["targets"])

        placed = sharding.shard_batch(self.mesh, batch)
        found = np.asarray(losses(self.base, self.state["trainable"], placed))
        return found[batch["target_weights"] > 0].tolist()

    def warm_up(self, steps: int) -> None:
        """Run updates that do not count."""
        if steps:
            self.block(0, steps)

    def block(self, first: int, steps: int) -> dict[str, Any]:
        """Run updates as the training loop does: the next batch goes to the device while one runs,
        and a step is waited for when the next one is dispatched."""
        if self._overlap:
            batches = self.feed.batches(first, first + steps)
        else:  # that one reads ahead
            batches = map(self.feed.batch, range(first, first + steps))
        batch = next(batches)
        on_device = jax.block_until_ready(sharding.shard_batch(self.mesh, batch))
        ends, wait_s, losses, of = [time.perf_counter()], 0.0, [], []
        for _ in range(steps):
            run, trained = self.programs[batch["tokens"].shape[1]], batch
            with jax.profiler.TraceAnnotation("dispatch"):
                self.state, metrics = run(self.state, self.base, on_device)
            if not self._overlap:
                metrics["loss"].block_until_ready()
            asked = time.perf_counter()
            with jax.profiler.TraceAnnotation("data_wait"):
                batch = next(batches, None)
            wait_s += time.perf_counter() - asked
            on_device = batch and sharding.shard_batch(self.mesh, batch)
            of.append(contents(trained))
            if losses:
                losses[-1].block_until_ready()
                ends.append(time.perf_counter())
            losses.append(metrics["loss"])
        losses[-1].block_until_ready()
        ends.append(time.perf_counter())
        return block_of(np.diff(ends).tolist(), wait_s, [float(x) for x in losses], of)

    def profile(self, first: int, steps: int, directory: str) -> None:
        """Trace a block of updates into a folder, beside the programs that ran in it."""
        # Operations are looked up in every program of the folder: none of an earlier run may stay.
        for pattern in ("program-*.hlo", "block.json", "about.json"):
            for path in Path(directory).glob(pattern):
                path.unlink()
        jax.profiler.start_trace(directory)
        try:
            found = self.block(first, steps)
        finally:
            jax.profiler.stop_trace()
        for length, program in self.programs.items():
            text = program.as_text()
            (Path(directory) / f"program-{length}.hlo").write_text(text, encoding="utf-8")
        found["ceilings"] = ceilings(self.workload.config.dtype)
        harness.save(found, Path(directory) / "block.json")

    def peak_bytes(self) -> int:
        """The most memory that was in use: the device's, or on a CPU the process's."""
        stats = jax.local_devices()[0].memory_stats() or {}
        return stats.get("peak_bytes_in_use") or peak_of_process()


def make_twin(workload: Workload, tuning: Any, device: str) -> Any:
    """The PyTorch twin on the base and the adapters that the JAX side draws.

    Args:
        workload: decides on its shape and dtype.
        tuning: of `torch_reference.model.TUNINGS`.
        device: "cpu" or "cuda", as JAX's.
    """
    import torch

    from benchmarks.torch_reference import model
    from benchmarks.torch_reference.weights import load_trainable

    jax_model = build.model(workload.config, workload.llm, attend=causal)
    twin = model.AffectGPT.from_base(
        workload.llm,
        draw_base(jax_model),
        jax_model.fusion and jax_model.fusion.config,
        jax_model.decoder.lora,
        dtype=getattr(torch, workload.config.dtype),
        tuning=tuning,
        device=device,
    )
    load_trainable(twin, random_trainable(jax_model, TRAINABLE_SEED))
    return twin


class Torch:
    """The update of the PyTorch twin; methods as of `Jax`.

    Args:
        workload, records: as for `Jax`.
        tuning: one of the twin's.

    Raises:
        ConfigError: PyTorch lacks JAX's device, or the workload asks for what the twin has not.
    """

    def __init__(self, workload: Mapping[str, Any], records: str, tuning: str):
        import torch

        from benchmarks.torch_reference import model, training

        self._torch, self._training = torch, training
        self.workload = workloads.make(**workload)
        config = self.workload.config
        if config.base_precision:
            raise ConfigError("the twin has no quantized base; leave config.base_precision empty")
        self.device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("JAX has a GPU and PyTorch has none; install PyTorch for CUDA")
        self.feed = workloads.feed(self.workload, Path(records))
        told = model.TUNINGS[tuning]
        self._tuning = dataclasses.replace(told, compile=told.compile and self.device == "cuda")
        self._to_device = functools.partial(
            model.to_device, tuning=self._tuning, device=self.device
        )
        self.twin = make_twin(self.workload, self._tuning, self.device)
        self.optimizer_config = build.optimizer_config(config)
        self.optimizer = training.make_optimizer(
            self.twin.named_parameters(), self.optimizer_config
        )

    def facts(self) -> dict[str, Any]:
        threads = self._torch.get_num_threads()
        return {
            "environment": harness.describe("torch", "peft"),
            "notes": [f"{self._tuning}, {threads} CPU threads"],
        }

    def token_losses(self, workload: Mapping[str, Any], records: str) -> list[float]:
        batch = workloads.feed(workloads.make(**workload), Path(records)).batch(0)
        with self._torch.no_grad():
            tensors = self._to_device(batch)
            found = self.twin.eval().token_losses(tensors).float().cpu().numpy()
        supervised = batch["target_weights"] > 0
        if self._tuning.all_logits:  # one loss for every position of the rows
            by_row = found.reshape(batch["tokens"].shape)
            found = np.take_along_axis(by_row, batch["target_positions"], axis=1)
        return found.reshape(supervised.shape)[supervised].tolist()

    def warm_up(self, steps: int) -> None:
        # `torch.compile` compiles when it first sees a length.
        for bucket in self.feed.buckets if self._tuning.compile else ():
            microbatches = self._microbatches(self.feed.filler_batch(bucket))
            self._training.train_step(self.twin, self.optimizer, microbatches, learning_rate=0.0)
        if steps:
            self.block(0, steps)

    def block(self, first: int, steps: int) -> dict[str, Any]:
        self.twin.train()
        batches = self.feed.batches(first, first + steps)
        batch = next(batches)
        microbatches = self._microbatches(batch)
        stamps, wait_s, losses, of = [self._stamp()], 0.0, [], []
        for i in range(steps):
            rate = self._training.learning_rate(
                self.optimizer_config, first + i, self.workload.config.steps
            )
            losses.append(
                self._training.train_step(
                    self.twin, self.optimizer, microbatches, learning_rate=rate
                )
            )
            stamps.append(self._stamp())
            of.append(contents(batch))
            asked = time.perf_counter()
            batch = next(batches, None)
            wait_s += time.perf_counter() - asked
            microbatches = batch and self._microbatches(batch)
        return block_of(self._seconds(stamps), wait_s, [x.item() for x in losses], of)

    def _microbatches(self, batch: Batch) -> list[Any]:
        """The microbatches of a batch, on the device; rows as JAX's accumulation takes them."""
        # Only compiled programs need rows of a few lengths.
        batch = batch if self._tuning.compile else trimmed(batch)
        count = self.workload.config.gradient_accumulation_steps
        shares = [jax.tree.map(lambda x, i=i: x[i::count], batch) for i in range(count)]
        return [self._to_device(share) for share in shares]

    def _stamp(self) -> Any:
        """A moment on the device's clock, or on a CPU, which nothing runs ahead of, on ours."""
        if self.device == "cpu":
            return time.perf_counter()
        event = self._torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, stamps: list[Any]) -> list[float]:
        if self.device == "cpu":
            return np.diff(stamps).tolist()
        self._torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in zip(stamps, stamps[1:])]

    def peak_bytes(self) -> int:
        on_device = self.device == "cuda"
        return self._torch.cuda.max_memory_allocated() if on_device else peak_of_process()


def trimmed(batch: Batch) -> Batch:
    """A batch without the columns at its end that no row uses."""
    used = {}
    for names, marks in ((BY_TOKEN, batch["segment_ids"]), (BY_TARGET, batch["target_weights"])):
        width = int(np.flatnonzero((marks > 0).any(axis=0)).max(initial=0)) + 1
        used |= dict.fromkeys(names, width)
    return {k: x[:, : used[k]] if k in used else x for k, x in batch.items()}
