"""Greedy decoding with a key-value cache."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from affectgpt_jax.models.affectgpt import AffectGPT, Batch, hidden_states
from affectgpt_jax.models.qwen2 import DecodeStep, KVCache, unembedding


def greedy(
    model: AffectGPT,
    base: Any,
    trainable: Any,
    batch: Batch,
    stop_ids: jax.Array,
    pad_id: int,
    max_new_tokens: int,
) -> jax.Array:
    """Continue every prompt of a batch by its most probable tokens.

    Args:
        model: the modules.
        base: frozen weights.
        trainable: adapters and fusion.
        batch: prompts, right-padded, one sample a row; targets are not read.
        stop_ids: `[n]` int32; a row ends with the first of these that it writes.
        pad_id: written after a row's end.
        max_new_tokens: an answer is cut off there.

    Returns:
        `[B, max_new_tokens]` int32. A row's tokens do not depend on the other rows.
    """
    rows, length = batch["tokens"].shape
    lengths = (batch["segment_ids"] > 0).sum(axis=1, dtype=jnp.int32)
    vocabulary = unembedding(base)

    def next_token(states: jax.Array) -> jax.Array:
        logits = jnp.einsum(
            "bd,dv->bv",
            states,
            vocabulary.astype(states.dtype),
            preferred_element_type=jnp.float32,
        )
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    states, cache = hidden_states(model, base, trainable, batch, keep_cache=True)
    # An empty filler row has no last token; position 0 stands in, and nobody reads what follows.
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    token = next_token(jnp.take_along_axis(states, last, axis=1)[:, 0])
    room = [(0, 0), (0, 0), (0, max_new_tokens - 1), (0, 0), (0, 0)]
    cache = KVCache(*(jnp.pad(x, room) for x in cache))
    slots = jnp.arange(length + max_new_tokens - 1)
    in_prompt = slots < lengths[:, None]

    def unfinished(carry) -> jax.Array:
        i, _, done, _ = carry
        return (i < max_new_tokens) & ~done.all()

    def write(carry):
        """Feed token i - 1 and write token i."""
        i, written, done, cache = carry
        # All rows share a slot, whatever their prompt's length; the rotary position continues each
        # row's own count, and the gap between stays masked.
        slot = length + i - 1
        step = DecodeStep(slot, in_prompt | ((slots >= length) & (slots <= slot)))
        token = jax.lax.dynamic_slice_in_dim(written, i - 1, 1, axis=1)
        states, cache = model.qwen2.apply(
            {"params": base, "lora": trainable["lora"]},
            model.qwen2.apply({"params": base}, token, method="embed"),
            (lengths + i - 1)[:, None],
            cache=cache,
            step=step,
            keep_cache=True,
        )
        token = jnp.where(done, pad_id, next_token(states[:, 0]))
        return i + 1, written.at[:, i].set(token), done | jnp.isin(token, stop_ids), cache

    done = (lengths == 0) | jnp.isin(token, stop_ids)
    written = jnp.full((rows, max_new_tokens), pad_id, jnp.int32)
    written = written.at[:, 0].set(jnp.where(lengths == 0, pad_id, token))
    return jax.lax.while_loop(unfinished, write, (jnp.int32(1), written, done, cache))[1]
