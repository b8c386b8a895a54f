"""The seam between a config and its compiled update.

From a config, a mesh, the shapes of the batches and a loss to model, optimizer, abstract state and
base, the rematerialisation policy and the compiled steps. Trainers, the planner and the benchmarks
set their steps up here; what runs these steps is `training.loop`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from affectgpt_jax import build
from affectgpt_jax.common.trees import nbytes, parameter_count
from affectgpt_jax.config import ConfigError
from affectgpt_jax.models.affectgpt import AffectGPT, Batch, init_random_base, with_compute
from affectgpt_jax.models.attention import CausalAttention
from affectgpt_jax.models.decoder import DecoderConfig
from affectgpt_jax.models.flops import update_flops
from affectgpt_jax.training import memory, sharding, xla_options
from affectgpt_jax.training.losses import LossFunction, cross_entropy
from affectgpt_jax.training.optimizer import learning_rate_schedule, make_optimizer
from affectgpt_jax.training.step import (
    State,
    init_key,
    init_state,
    make_eval_step,
    make_train_step,
)

COMPILING = "compiling"


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """The update of a config on a mesh, before anything is allocated.

    Attributes:
        config: of the run.
        mesh: the devices; an abstract one is enough for shapes.
        model: the modules, with the attention backend and remat policy that the update runs with.
        loss: what is minimised.
        optimizer: of the trainable parameters.
        schedule: the learning rate by step.
        state: abstract train state (`training.step.State`), with shardings.
        base: abstract frozen weights, with shardings.
        batches: an abstract global batch for every row length, with shardings.
        remat: how the policy was chosen; None where the config names it.
    """

    config: ConfigDict
    mesh: Mesh | AbstractMesh
    model: AffectGPT
    loss: LossFunction
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    state: State
    base: Any
    batches: Mapping[int, Batch]
    remat: memory.Choice | None = None

    def on(
        self, mesh: Mesh | AbstractMesh, batches: Mapping[int, Batch] | None = None, **compute: Any
    ) -> Program:
        """The same update on another mesh.

        Args:
            mesh: the devices.
            batches: global batches by row length, if they change too.
            compute: fields of `models.decoder.ComputeConfig` that change too.
        """
        shard = sharding.ActivationConstraint(mesh)
        return dataclasses.replace(
            self,
            mesh=mesh,
            model=with_compute(self.model, shard=shard, **compute),
            state=sharding.with_shardings(mesh, self.state),
            base=sharding.with_shardings(mesh, self.base),
            batches=_abstract_batches(mesh, self.batches if batches is None else batches),
        )

    def describe(self, base_name: str) -> list[str]:
        """Parameters and the remat policy, in lines for people."""
        config, trainable = self.config, self.state["trainable"]
        lora, fusion = (parameter_count(trainable[part]) for part in ("lora", "fusion"))
        lines = [
            f"{parameter_count(self.base):,} frozen parameters: {base_name}, "
            f"{nbytes(self.base) / 2**20:,.1f} MiB in {config.base_precision or config.dtype}",
            f"{lora + fusion:,} to train: {lora:,} in LoRA, {fusion:,} in projectors and fusion",
        ]
        return lines + ([str(self.remat)] if self.remat else [])

    def flops(self, samples: np.ndarray) -> int:
        """Model FLOPs of an update on samples, `[N, 2]` tokens and supervised ones of each."""
        return update_flops(self.model.decoder.config, self.model.decoder.lora, samples).total

    @functools.cached_property
    def train_step(self) -> Callable[[State, Any, Batch], tuple[State, dict[str, jax.Array]]]:
        """The function of one update, not compiled: `(state, base, batch) -> (state, metrics)`."""
        return make_train_step(
            self.model,
            self.loss,
            self.optimizer,
            self.schedule,
            seed=self.config.seed,
            gradient_accumulation_steps=self.config.gradient_accumulation_steps,
        )

    @functools.cached_property
    def eval_step(self) -> Callable[[Any, Any, Batch], tuple[jax.Array, jax.Array]]:
        """`(trainable, base, batch) -> (sum of the loss, its count)`, compiled when first called
        with batches of a shape."""
        return jax.jit(make_eval_step(self.model, self.loss))

    def lower(self, length: int) -> jax.stages.Lowered:
        """The update for batches of a row length, lowered; the state is donated."""
        batch = self.batches[length]
        return lower_step(self.train_step, self.mesh, self.state, self.base, batch)

    def compile(
        self, compiler_options: Mapping[str, xla_options.Value] | None = None
    ) -> dict[int, Callable]:
        """The compiled update for every row length, compiled side by side.

        An exception, such as Ctrl-C, comes through at once, while threads named `COMPILING` go on:
        nothing ends a compilation but the process.
        """

        def compile_one(length: int) -> Callable:
            return self.lower(length).compile(compiler_options=dict(compiler_options or {}))

        pool = ThreadPoolExecutor(thread_name_prefix=COMPILING)
        try:
            return dict(zip(self.batches, pool.map(compile_one, self.batches), strict=True))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def init_state(self, seed: int) -> State:
        """Fresh adapters, fusion and optimizer state, made where they stay."""
        init = functools.partial(init_state, self.model, self.optimizer)
        return jax.jit(init, out_shardings=sharding.shardings_of(self.state))(init_key(seed))

    def init_base(self, seed: int) -> Any:
        """Random frozen weights, made where they stay, for measurements."""
        init = functools.partial(init_random_base, self.model)
        places = sharding.shardings_of(self.base)
        return jax.jit(init, out_shardings=places)(jax.random.key(seed))


def make_program(
    config: ConfigDict,
    mesh: Mesh | AbstractMesh,
    batches: Mapping[int, Any],
    loss: LossFunction = cross_entropy,
    *,
    llm: DecoderConfig,
    attend: CausalAttention,
    memory_limit: int | None = None,
) -> Program:
    """Set up the update of a config.

    Args:
        config: of the run.
        mesh: the devices.
        batches: a global batch for every row length, arrays or shapes of all its rows.
        loss: what is minimised.
        llm: shape of the base.
        attend: causal attention, see `build.attention`.
        memory_limit: bytes that may be used on one device, by which a remat of "auto" is chosen;
            None where the device cannot say.

    Raises:
        ConfigError: values that the modules or the optimizer refuse, or rows that the mesh cannot
            share.
    """
    check_rows(config, mesh)
    optimizer_config = build.optimizer_config(config)
    optimizer = make_optimizer(optimizer_config, config.steps)
    model = build.model(config, llm, sharding.ActivationConstraint(mesh), attend)
    program = Program(
        config=config,
        mesh=mesh,
        model=model,
        loss=loss,
        optimizer=optimizer,
        schedule=learning_rate_schedule(optimizer_config, config.steps),
        state=sharding.abstract(mesh, functools.partial(init_state, model, optimizer)),
        base=sharding.abstract(mesh, functools.partial(init_random_base, model)),
        batches=_abstract_batches(mesh, batches),
    )
    if config.remat != "auto":
        return program
    choice = memory.choose_remat(
        model,
        mesh,
        program.state,
        program.base,
        program.batches[max(program.batches)],
        config.gradient_accumulation_steps,
        memory_limit,
        loss,
        build.compute_capability() if build.device_platform() == "cuda" else None,
        packed=bool(config.pack_length),
    )
    return dataclasses.replace(
        program, model=with_compute(model, remat=choice.policy), remat=choice
    )


def lower_step(
    train_step: Callable, mesh: Mesh | AbstractMesh, state: State, base: Any, batch: Batch
) -> jax.stages.Lowered:
    """Lower an update for abstract arguments; nothing is allocated, and the state is donated."""
    out = (sharding.shardings_of(state), sharding.replicated(mesh))
    return jax.jit(train_step, donate_argnums=0, out_shardings=out).lower(state, base, batch)


def _abstract_batches(mesh: Mesh | AbstractMesh, batches: Mapping[int, Any]) -> dict[int, Batch]:
    return {length: sharding.abstract_batch(mesh, batch) for length, batch in batches.items()}


def check_rows(config: ConfigDict, mesh: Mesh | AbstractMesh) -> None:
    """Refuse a batch whose rows the mesh cannot share.

    Raises:
        ConfigError: a microbatch is not a multiple of the devices that split it.
    """
    size, microbatches = sharding.data_parallel_size(mesh), config.gradient_accumulation_steps
    rows = config.batch_size // microbatches
    if rows % size:
        raise ConfigError(
            f"config.batch_size={config.batch_size} in config.gradient_accumulation_steps="
            f"{microbatches} microbatches gives {rows} rows at a time, which {size} devices (mesh "
            f"{config.mesh!r}) cannot share equally; use a multiple of {size * microbatches}"
        )


def compiler_options(
    config: ConfigDict, say: Callable[[str], None]
) -> dict[str, xla_options.Value]:
    """XLA's options for the update on these devices; `say` is told of each.

    Raises:
        ConfigError: `config.xla_options` holds something that XLA does not take.
    """
    try:
        options, lines = xla_options.compiler_options(
            build.device_platform(),
            jax.device_count(),
            xla_options.parse(config.xla_options),
            os.environ.get("XLA_FLAGS", ""),
            xla_options.refusal_by_xla,
            # "auto" recomputes nothing on a CPU, which knows no limit of memory.
            recomputing=config.remat not in ("auto", "none"),
        )
    except xla_options.XlaOptionError as error:
        raise ConfigError(f"config.xla_options: {error}") from None
    for line in lines:
        say(f"XLA option {line}")
    return options
