"""AffectGPT assembled: soft tokens placed in a prompt, the decoder, the loss.

A model is two Flax modules and plain functions over their parameters:

    base       the frozen decoder, `params` of `Decoder`
    trainable  {"lora": adapters of `Decoder`, "fusion": `params` of `Fusion`}

Only `trainable` is ever differentiated. A batch is a dict of arrays: B rows of T tokens. A row
holds up to C clips, one after another, each a segment with K soft tokens:

    tokens            [B, T] int32     ids; those at the places of soft tokens are not read
    positions         [B, T] int32     rotary positions, from 0 in every segment
    segment_ids       [B, T] int32     0 for padding, 1 ... C for clips
    soft_token_index  [B, T] int32     0, or 1 + c*K + k for soft token k of the row's clip c
    target_positions  [B, S] int32     positions whose hidden states predict a supervised token
    targets           [B, S] int32     the supervised tokens
    target_weights    [B, S] float32   1, or 0 for padding
    features          name -> [B, C, F, d] float16
    present           name -> [B, C] bool, False where the clip, or its feature, is missing
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from affectgpt_jax.models.decoder import (
    LOSS_CHUNK,
    Decoder,
    KVCache,
    init_base,
    init_lora,
    lm_head,
)
from affectgpt_jax.models.fusers import Fusion

Batch = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class AffectGPT:
    """The modules of one model; `fusion` is None for a text-only input mode."""

    decoder: Decoder
    fusion: Fusion | None


def with_compute(model: AffectGPT, **changes: Any) -> AffectGPT:
    """The same model with other fields of its `decoder.ComputeConfig`."""
    compute = dataclasses.replace(model.decoder.compute, **changes)
    return dataclasses.replace(model, decoder=model.decoder.clone(compute=compute))


def init_trainable(model: AffectGPT, key: jax.Array) -> dict[str, Any]:
    """Fresh `trainable` tree, float32."""
    lora_key, fusion_key = jax.random.split(key)
    trainable = {"lora": init_lora(model.decoder, lora_key), "fusion": {}}
    if model.fusion is not None:
        config = model.fusion.config
        features = {name: jnp.zeros((1, 1, config.feature_width(name))) for name in config.inputs}
        present = {name: jnp.ones(1, bool) for name in config.inputs}
        trainable["fusion"] = model.fusion.init(fusion_key, features, present)["params"]
    return trainable


def init_random_base(model: AffectGPT, key: jax.Array) -> Any:
    """Random `base` tree; with `jax.eval_shape` its shapes, which loading and sharding follow."""
    return init_base(model.decoder, key)


def embed_inputs(
    model: AffectGPT, base: Any, trainable: Any, batch: Batch, dropout_key: jax.Array | None
) -> jax.Array:
    """Token embeddings `[B, T, D]` with the soft tokens in their places."""
    with jax.named_scope("embedding"):
        embeds = model.decoder.apply({"params": base}, batch["tokens"], method="embed")
    if model.fusion is None:
        return embeds
    # Rows are the major part of the merged axis, so that each stays on its device.
    features, present = (
        {name: x.reshape(-1, *x.shape[2:]) for name, x in batch[part].items()}
        for part in ("features", "present")
    )
    soft = model.fusion.apply(
        {"params": trainable["fusion"]},
        features,
        present,
        deterministic=dropout_key is None,
        rngs=None if dropout_key is None else {"dropout": dropout_key},
    )
    with jax.named_scope("embedding"):
        soft = soft.reshape(len(embeds), -1, soft.shape[-1])
        index = batch["soft_token_index"][..., None]
        # A gather, so that any number of clips may share a row. Positions without a soft token
        # index out of range: the fill value is not selected, and no gradient flows back.
        source = jnp.where(index > 0, index - 1, soft.shape[1])
        placed = jnp.take_along_axis(soft, source, axis=1, mode="fill", fill_value=0)
        return jnp.where(index > 0, placed.astype(embeds.dtype), embeds)


def hidden_states(
    model: AffectGPT,
    base: Any,
    trainable: Any,
    batch: Batch,
    *,
    dropout_key: jax.Array | None = None,
    keep_cache: bool = False,
) -> tuple[jax.Array, tuple[KVCache, ...] | None]:
    """Final hidden states `[B, T, D]` of whole rows, and the key-value caches if asked for.

    `dropout_key` turns on the dropout of LoRA and Q-Formers; None is evaluation.
    """
    fusion_key = lora_key = None
    if dropout_key is not None:
        fusion_key, lora_key = jax.random.split(dropout_key)
    embeds = embed_inputs(model, base, trainable, batch, fusion_key)
    return model.decoder.apply(
        {"params": base, "lora": trainable["lora"]},
        embeds,
        batch["positions"],
        batch["segment_ids"],
        keep_cache=keep_cache,
        dropout_key=lora_key,
    )


def loss_sum_and_count(
    model: AffectGPT,
    base: Any,
    trainable: Any,
    batch: Batch,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Summed cross-entropy of the supervised tokens and their number, both float32 scalars.

    The sum is unreduced, so that gradient accumulation and data parallelism divide once, by the
    count of the whole batch. Hidden states are gathered at the supervised positions before the
    lm_head: most tokens of a batch belong to prompts, whose logits are not needed.
    """
    states, _ = hidden_states(model, base, trainable, batch, dropout_key=dropout_key)
    compute = model.decoder.compute
    shard = compute.shard
    positions, targets, weights = supervised(batch, shard.data_parallel_size)
    states = states.reshape(len(positions), -1, states.shape[-1])
    states = jnp.take_along_axis(states, positions[..., None], axis=1)
    # Gathered once, before the loop over chunks. Without the constraint the partitioner gathers it
    # in every chunk, and sends the gradient of all logits as well.
    kernel = shard(lm_head(base), (None, "vocab"))
    loss = cross_entropy_sum(states, kernel, targets, weights, compute.loss_chunk_of_all)
    return loss, weights.sum()


def supervised(batch: Batch, data_parallel_size: int = 1) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gather the supervised tokens of the rows of each device, padding last.

    Every row has room for the targets of the longest answer. With the padding of all rows at the
    end, whole chunks of the cross-entropy hold padding alone, and are skipped.

    Args:
        batch: see the module's head.
        data_parallel_size: devices that share its rows.

    Returns:
        `[G, N]` each, for G devices of B / G rows: positions in the concatenated tokens of these
        rows; targets; weights, float32.
    """
    rows, length = batch["tokens"].shape
    groups = math.gcd(rows, data_parallel_size)
    start = length * (jnp.arange(rows, dtype=jnp.int32) % (rows // groups))
    weights = batch["target_weights"].astype(jnp.float32)
    positions = batch["target_positions"] + start[:, None]
    found = [x.reshape(groups, -1) for x in (positions, batch["targets"], weights)]
    order = jnp.argsort(found[-1] == 0, axis=1, stable=True)
    return tuple(jnp.take_along_axis(x, order, axis=1) for x in found)


def target_states(
    model: AffectGPT,
    base: Any,
    trainable: Any,
    batch: Batch,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Hidden states `[B, S, D]` that predict the supervised tokens."""
    states, _ = hidden_states(model, base, trainable, batch, dropout_key=dropout_key)
    return jnp.take_along_axis(states, batch["target_positions"][..., None], axis=1)


def cross_entropy_sum(
    states: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    chunk: int = LOSS_CHUNK,
) -> jax.Array:
    """Sum of `-log softmax(states @ kernel)[target]`, weighted by `weights` `[B, S]`, as a
    float32 scalar; the other arguments are those of `token_log_probs`."""
    found = token_log_probs(states, kernel, targets, chunk, needed=weights != 0)
    return -jnp.sum(found * weights)


def token_log_probs(
    states: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    chunk: int = LOSS_CHUNK,
    needed: jax.Array | None = None,
) -> jax.Array:
    """`log softmax(states @ kernel)[target]`, with float32 logits.

    Args:
        states: `[B, S, D]`.
        kernel: `[D, V]`, the lm_head, frozen: no gradient reaches it.
        targets: `[B, S]` int32.
        chunk: positions per block, on all devices together; the logits of one block are alive at a
            time. A block is a few columns of all rows, so that rows stay on the devices that hold
            them.
        needed: `[B, S]` bool; where there are several blocks, those without any needed position
            are skipped, and their values are 0. None: all are needed.

    Returns:
        `[B, S]` float32.

    Raises:
        NotImplementedError: a gradient with respect to `kernel` is asked for.
    """
    if needed is None:
        needed = jnp.ones(targets.shape, bool)
    with jax.named_scope("lm_head"):
        kernel = kernel.astype(states.dtype)
        return _token_log_probs(states, kernel, targets, chunk, needed)


def _token_log_probs(
    states: jax.Array, kernel: jax.Array, targets: jax.Array, chunk: int, needed: jax.Array
) -> jax.Array:
    rows, columns = targets.shape
    if rows * columns <= chunk:
        return _block_log_probs(states, kernel, targets)
    width = max(1, chunk // rows)

    def blocks(x: jax.Array) -> jax.Array:
        filler = [(0, 0), (0, -columns % width)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, filler).reshape(rows, -1, width, *x.shape[2:]).swapaxes(0, 1)

    def nothing(states, kernel, targets):
        return jnp.zeros(targets.shape, jnp.float32)

    def body(_, inputs):
        states, targets, needed = inputs
        branches = _block_log_probs, nothing
        return None, jax.lax.cond(needed, *branches, states, kernel, targets)

    inputs = blocks(states), blocks(targets), blocks(needed).any(axis=(1, 2))
    found = jax.lax.scan(body, None, inputs)[1]
    return found.swapaxes(0, 1).reshape(rows, -1)[:, :columns]


@jax.custom_vjp
def _block_log_probs(states: jax.Array, kernel: jax.Array, targets: jax.Array) -> jax.Array:
    """`token_log_probs` of one block.

    Its gradient by a state is `(onehot - softmax) @ kernel^T`, which the forward pass computes
    while it has the logits; the backward pass only scales it. Autodiff would either keep the logits
    or recompute them, and its matmul would mix float32 with the kernel's dtype, which GPUs run at a
    fraction of bfloat16's rate.
    """
    return _log_probs_and_exponentials(states, kernel, targets)[0]


def _log_probs_and_exponentials(states, kernel, targets):
    """Log probabilities `[B, S]`; numerator `[B, S, V]` and denominator `[B, S, 1]` of softmax."""
    logits = jnp.einsum("bsd,dv->bsv", states, kernel, preferred_element_type=jnp.float32)
    largest = logits.max(axis=-1, keepdims=True)
    exponentials = jnp.exp(logits - largest)
    total = exponentials.sum(axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)
    return (chosen - largest - jnp.log(total))[..., 0], exponentials, total


def _block_forward(states, kernel, targets):
    if kernel.perturbed:
        raise NotImplementedError("the lm_head is frozen; it has no gradient")
    states, kernel, targets = states.value, kernel.value, targets.value
    log_probs, exponentials, total = _log_probs_and_exponentials(states, kernel, targets)
    hit = jnp.arange(kernel.shape[1]) == targets[..., None]
    slope = (jnp.where(hit, 1.0, 0.0) - exponentials / total).astype(states.dtype)
    return log_probs, jnp.einsum("bsv,dv->bsd", slope, kernel)


def _block_backward(slope, grad):
    return slope * grad[..., None].astype(slope.dtype), None, None


_block_log_probs.defvjp(_block_forward, _block_backward, symbolic_zeros=True)
