"""What a step of reinforcement takes on devices that are not here: its rollout and its update.

    prefill      every prompt of the step, and the first token of every answer
    insert       the cache of each prompt, copied into the rows of its answers
    decode       a token of every answer, again and again
    log_probs    those of the start, to which the KL is taken, and with several updates a rollout
                 those before the first
    update       on the rows of `rollouts`, by `planner`

The first three are the programs of `models.generate`. The cache is freed before the update, so a
device must have room for the rollout or the update, whichever takes more. Base, trained parameters
with their optimizer state, and the start's parameters are there throughout. Rewards and all else
that the host does is not counted.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from affectgpt_jax import inference, rollouts
from affectgpt_jax.common.trees import device_nbytes
from affectgpt_jax.config import ConfigError
from affectgpt_jax.data.packing import Bucket, round_up
from affectgpt_jax.data.pipeline import empty_batch
from affectgpt_jax.models import attention, generate
from affectgpt_jax.models.decoder import float32_logits
from affectgpt_jax.models.flops import Flops, forward_flops, train_flops
from affectgpt_jax.models.generate import DecodeState, Decoding, Sampling
from affectgpt_jax.planner import Layout, Planner
from affectgpt_jax.training import memory, policy, roofline, sharding
from affectgpt_jax.training.devices import Device
from affectgpt_jax.training.roofline import Shape, StepTime

PASSES = ("prefill", "insert", "decode", "log_probs", "update")
# Copies of float32 logits that are alive while a token is chosen: logits, and those with noise.
_LOGITS = 2


class RolloutMemory(NamedTuple):
    """Bytes on one device during a rollout.

    Attributes:
        base: frozen weights.
        state: trained parameters and their optimizer state.
        start: trained parameters as they were at the start.
        merged: a copy of the base's kernels with LoRA added, where `rl.merge_lora` asks for one.
        cache: of the answers, and of the prompts that it was copied from.
        work: the largest short-lived buffers: of a layer of the prompts, or logits.
    """

    base: int
    state: int
    start: int
    merged: int
    cache: int
    work: int

    @property
    def total(self) -> int:
        return sum(self)


class Pass(NamedTuple):
    """A program of a step: how often it runs, and what it takes each time."""

    times: int
    each: StepTime


class RolloutPlanner:
    """The abstract step of a config on one kind of device.

    Args:
        config: as `reinforce` reads it, with its section `rl`.
        device: the GPU to plan for.
        prompt: tokens of the longest prompt.
        answer: tokens of the longest answer of a step.
        supervised: tokens, and supervised ones, of the longest example beside the answers.
        efficiency: share of the device's peaks to expect.

    Attributes:
        config: with the rows of an update as its batch size.
        update: the planner of the update.
        prompt_length: of a row of prompts.
        slots: of the cache, at the most.

    Raises:
        ConfigError: values that cannot be run.
        WeightsError: a base that the decoder does not compute.
    """

    def __init__(
        self,
        config: ConfigDict,
        device: Device,
        prompt: int,
        answer: int,
        supervised: tuple[int, int],
        efficiency: float,
    ):
        config, rl = ConfigDict(config), config.rl
        if not 1 <= answer <= rl.max_new_tokens:
            raise ConfigError(
                f"--answer={answer} is not in the 1 to {rl.max_new_tokens} tokens of "
                "config.rl.max_new_tokens"
            )
        if prompt + rl.max_new_tokens > config.max_tokens:
            raise ConfigError(
                f"--prompt={prompt} leaves less than config.rl.max_new_tokens="
                f"{rl.max_new_tokens} of config.max_tokens={config.max_tokens}"
            )
        try:
            settings = policy.PolicyLossConfig(
                rl.epsilon, rl.epsilon_high, rl.beta, rl.kl, rl.weight_cap
            )
        except ValueError as error:
            raise ConfigError(f"config.rl: {error}") from None
        self.config, self.device, self.answer = config, device, answer
        self.prompt_length = int(round_up(prompt))
        self._efficiency = efficiency
        self.update = Planner(
            config,
            device,
            rollouts.update_bucket(rl, prompt, supervised if rl.sft_share else (0, 0)),
            efficiency,
            loss=policy.policy_loss(settings),
            by_token=(*rollouts.BY_TOKEN, *rollouts.later_arrays(rl)),
            shared_prompts=rl.share_prompt,
        )
        self.decoding = Decoding(
            rl.max_new_tokens, (0,), 0, Sampling(rl.temperature, rl.top_p), log_probs=True
        )
        self.slots = self.prompt_length + rl.max_new_tokens - 1

    # --- estimates --------------------------------------------------------------------------------

    def prompts(self, shape: Shape) -> int:
        """Of a step, on one device."""
        return self.config.rl.prompts // (shape.data * shape.fsdp)

    def merges(self, shape: Shape) -> bool:
        """Whether answers are written by a copy of the base with LoRA added."""
        program, base = self.update.program, self.update.abstract(shape)[1]
        return inference.should_merge(
            self.config.rl.merge_lora, program.model, base, self.update.limit
        )

    def _merged_bytes(self, shape: Shape) -> int:
        if not self.merges(shape):
            return 0
        base = self.update.abstract(shape)[1]
        names = self.update.program.model.decoder.lora.targets
        return device_nbytes([layer[name]["kernel"] for layer in base["layers"] for name in names])

    def _kv_bytes(self, shape: Shape) -> int:
        """Of one token's keys and values on a device, in all layers."""
        llm = memory.share_of_model(self.update.program.model, shape.tensor).decoder.config
        itemsize = jnp.dtype(self.config.dtype).itemsize
        return 2 * llm.num_hidden_layers * llm.num_key_value_heads * llm.head_dim * itemsize

    def _layer_bytes(self, shape: Shape) -> int:
        """What a layer of the prompts writes: activations, and scores where XLA attends."""
        llm = memory.share_of_model(self.update.program.model, shape.tensor).decoder.config
        rows, itemsize = self.prompts(shape), jnp.dtype(self.config.dtype).itemsize
        widths = 3 * (llm.intermediate_size + llm.hidden_size)
        scores = 0
        if self.update.backend(shape.tensor).name == "xla":
            scores = memory.score_bytes(llm, rows, self.prompt_length)
        return rows * self.prompt_length * widths * itemsize + scores

    def _logit_bytes(self, shape: Shape) -> int:
        rows = self.prompts(shape) * self.config.rl.group
        return _LOGITS * rows * -(-self.update.llm.vocab_size // shape.tensor) * 4

    def rollout_memory(self, shape: Shape) -> RolloutMemory:
        """What a rollout takes on a device of a mesh."""
        state, base = self.update.abstract(shape)
        prompts, slots = self.prompts(shape), self.config.rl.group * self.slots
        return RolloutMemory(
            base=device_nbytes(base),
            state=device_nbytes(state),
            start=device_nbytes(state["trainable"]),
            merged=self._merged_bytes(shape),
            cache=prompts * (slots + self.prompt_length) * self._kv_bytes(shape),
            work=max(self._layer_bytes(shape), self._logit_bytes(shape)),
        )

    def update_layout(self, shape: Shape, microbatches: int) -> Layout:
        """The update; its memory has the start's parameters in its state."""
        shares = shape.data * shape.fsdp
        answers, supervised, _ = rollouts.row_counts(self.config, shares)
        rows = -(-(answers + supervised) // (microbatches * shares))
        start = device_nbytes(self.update.abstract(shape)[0]["trainable"])
        remat = self.config.remat
        if remat == "auto":
            needs = ((p, self.update.memory(shape, rows, p)) for p in memory.POLICIES)
            least = self.usable - start
            remat = next((p for p, m in needs if m.total <= least), memory.POLICIES[-1])
        layout = self.update.layout(shape, microbatches, rows, remat)
        needed = layout.memory._replace(state=layout.memory.state + start)
        return layout._replace(memory=needed, fits=needed.total <= self.usable)

    @property
    def usable(self) -> int:
        """Bytes of a device that programs may take."""
        return int(memory.USABLE * self.update.limit)

    def microbatches(self, shape: Shape) -> int | None:
        """The fewest microbatches of an update that fit; None if none do."""
        prompts = self.prompts(shape)  # which microbatches share, see `rollouts.check_prompts`
        return next(
            (
                n
                for n in range(1, prompts + 1)
                if not prompts % n and self.update_layout(shape, n).fits
            ),
            None,
        )

    def passes(self, layout: Layout) -> dict[str, Pass]:
        """The programs of a step by name, with times that follow from FLOPs and bytes."""
        rl, shape, llm = self.config.rl, layout.shape, self.update.llm
        state, base = self.update.abstract(shape)
        prompts = self.prompts(shape)
        rows, kv = prompts * rl.group, self._kv_bytes(shape)
        adapters = self.update.program.model.decoder.lora
        lora = None if self.merges(shape) else adapters
        # Of a table of its own, a token reads a row.
        table = 0 if llm.tie_word_embeddings else device_nbytes(base["embed_tokens"])
        weights = (device_nbytes(base) - table) * shape.fsdp * (2 if shape.fsdp > 1 else 1)
        if lora:
            weights += device_nbytes(state["trainable"]["lora"])
        logits = self._logit_bytes(shape)
        layers = llm.num_hidden_layers

        def time(flops: Flops, moved: int, rows: int, length: int) -> StepTime:
            sent = roofline.forward_collectives(self.update.sizes(rows, 1, length), shape)
            return StepTime(
                compute=flops.total
                / shape.tensor
                / roofline.matmul_peak(self.device, self.config.dtype),
                memory=moved / self.device.hbm,
                network=roofline.network_time(sent, shape, self.device) if length else 0.0,
                efficiency=self._efficiency,
            )

        def forward(rows: int, length: int, targets: int, lora: Any) -> Flops:
            flops = forward_flops(train_flops(llm, lora, length, targets))
            return Flops(*(rows * part for part in flops))

        query = llm.num_attention_heads * llm.head_dim
        token = forward(rows, 1, 1, lora)
        token = token._replace(attention=4 * rows * self.slots * query * layers)
        # Those before the update are of all its rows at a time.
        update, length = layout.rows * layout.microbatches, self.update.rows.length
        activations = layers * update * length * 3 * (llm.intermediate_size + llm.hidden_size)
        activations = activations * jnp.dtype(self.config.dtype).itemsize // shape.tensor
        copied = prompts * (1 + rl.group) * self.prompt_length * kv
        return {
            "prefill": Pass(
                1,
                time(
                    forward(prompts, self.prompt_length, rl.group, lora),
                    weights + 2 * layers * self._layer_bytes(shape) + logits,
                    prompts,
                    self.prompt_length,
                ),
            ),
            "insert": Pass(1, time(Flops(0, 0, 0, 0), copied, 0, 0)),
            "decode": Pass(
                self.answer - 1,
                time(token, weights + rows * self.slots * kv + 2 * logits, rows, 1),
            ),
            "log_probs": Pass(
                len(rollouts.later_arrays(rl)),
                time(
                    forward(update, length, self.update.rows.targets, adapters),
                    weights + 2 * activations,
                    update,
                    length,
                ),
            ),
            "update": Pass(rl.updates, layout.time),
        }

    # --- programs ---------------------------------------------------------------------------------

    def lower(self, mesh: Mesh, remat: str) -> dict[str, tuple[jax.stages.Lowered, int]]:
        """The programs of a step for GPUs, and bytes of one device that are there while each runs.

        Its arguments are among them; results and temporaries come on top.

        Args:
            mesh: GPUs to compile for.
            remat: the policy of the update.
        """
        shape, update, rl = Shape(**mesh.shape), self.update, self.config.rl
        # Not the decode step of a CPU, which is what compiles here.
        writer = update.program.on(
            mesh,
            attend=update.backend(shape.tensor).attend,
            attend_cached=attention.cached,
            logits=float32_logits,
        ).model
        program = update.program.on(mesh, remat=remat, attend=update.attention(shape.tensor).attend)
        state, base = program.state, program.base
        there = device_nbytes(base) + device_nbytes(state) + device_nbytes(state["trainable"])
        weights = base, state["trainable"]
        merged = self._merged_bytes(shape)
        if merged:  # the merged base has the base's shapes
            weights = base, {**state["trainable"], "lora": {}}

        size = rl.prompts * rl.group
        bucket = Bucket(self.prompt_length, 0)
        prompts = empty_batch(rl.prompts, bucket, update.features)
        prompts = sharding.abstract_batch(mesh, prompts)
        rows = sharding.abstract_batch(mesh, jax.ShapeDtypeStruct((size, 2), jnp.uint32))
        places, number = (jax.ShapeDtypeStruct(s, jnp.int32) for s in ((size,), ()))
        prefill = generate.prefill.lower(writer, *weights, prompts, self.decoding, number, rows)
        fresh = _laid_out(mesh, prefill.out_info)
        answers = _laid_out(mesh, self._answers(fresh, size))

        [batch] = program.batches.values()
        inputs = {name: x for name, x in batch.items() if name not in update.by_token}
        log_probs = jax.jit(functools.partial(policy.answer_log_probs, program.model))
        before = there + merged + device_nbytes(prompts)
        during = before + device_nbytes(answers)
        after = there + device_nbytes(batch)
        lowered = {
            "prefill": (prefill, before),
            "insert": (
                generate.insert.lower(writer, answers, fresh, self.decoding, places),
                during + device_nbytes(fresh),
            ),
            "decode": (
                generate.decode.lower(writer, *weights, answers, self.decoding, number),
                during,
            ),
            "log_probs": (log_probs.lower(base, state["trainable"], inputs), after),
            "update": (program.lower(update.rows.length), after),
        }
        if not rollouts.later_arrays(rl):
            del lowered["log_probs"]
        return lowered

    def _answers(self, fresh: DecodeState, size: int) -> DecodeState:
        """Shapes of the rows that `generate.init_decode_state` makes for these prompts."""

        def resized(x: Any, sizes: dict[int, int]) -> jax.ShapeDtypeStruct:
            shape = tuple(sizes.get(axis, n) for axis, n in enumerate(x.shape))
            return jax.ShapeDtypeStruct(shape, x.dtype)

        room = {0: size, 1: self.decoding.max_new_tokens}
        return fresh._replace(
            generated=jax.tree.map(lambda x: resized(x, room), fresh.generated),
            cache=jax.tree.map(lambda x: resized(x, {0: size, 2: self.slots}), fresh.cache),
        )


def _laid_out(mesh: Mesh, state: DecodeState) -> DecodeState:
    """Shapes with the shardings that `models.generate` gives their arrays."""

    def placed(x: Any, *axes: str | None) -> jax.ShapeDtypeStruct:
        where = NamedSharding(mesh, P(sharding.BATCH_AXES, *axes))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    def placed_heads(x: Any) -> jax.ShapeDtypeStruct:
        return placed(x, None if x.shape[1] % mesh.shape["tensor"] else "tensor")

    rest = jax.tree.map(placed, state._replace(cache=()))
    return rest._replace(cache=jax.tree.map(placed_heads, state.cache))
