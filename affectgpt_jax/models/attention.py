"""Attention over rows that may hold padding and several samples.

Two entry points, because they have different shapes and different fast kernels: `causal` for whole
rows (training and prefill), where the backend is chosen, and `cached` for one new token against a
key-value cache (decoding).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

# (query [B, T, H, d], key [B, T, K, d], value [B, T, K, d], segment_ids [B, T]) -> [B, T, H, d]
CausalAttention = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]

# Finite, so that a row without any allowed key gives a uniform average instead of NaN; such rows
# are padding, and no loss reads them.
_MASKED = -1e30


def _weights(scores: jax.Array, mask: jax.Array, width: int) -> jax.Array:
    """Masked softmax of query-key products over the last axis."""
    return jax.nn.softmax(jnp.where(mask, scores * width**-0.5, _MASKED), axis=-1)


def _attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """Grouped-query attention with an explicit mask `[B, T, S]`; scores and softmax in float32.

    query `[B, T, H, d]`, key and value `[B, S, K, d]` with H a multiple of K: query heads
    `g*H/K ... (g+1)*H/K - 1` share key head g (Ainslie et al. 2023). Returns `[B, T, H, d]`.
    """
    batch, length, heads, width = query.shape
    kv_heads = key.shape[2]
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, width)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, key, preferred_element_type=jnp.float32)
    weights = _weights(scores, mask[:, None, None], width).astype(value.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, value).reshape(query.shape)


def causal(query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Causal self-attention within segments, in plain XLA; runs on every device.

    Args:
        query: `[B, T, H, d]`.
        key: `[B, T, K, d]`.
        value: `[B, T, K, d]`.
        segment_ids: `[B, T]` int32; a token sees earlier tokens of its own segment only, so samples
            packed into one row never see each other. By convention 0 is padding.

    Returns:
        `[B, T, H, d]` in the dtype of `value`.
    """
    positions = jnp.arange(query.shape[1])
    mask = positions[:, None] >= positions[None, :]
    mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])
    return _attend(query, key, value, mask)


def cached(
    query: jax.Array, key_cache: jax.Array, value_cache: jax.Array, key_mask: jax.Array
) -> jax.Array:
    """Attention of new tokens to all valid cache slots.

    Args:
        query: `[B, 1, H, d]`.
        key_cache: `[B, K, S, d]`, the new token's key already written.
        value_cache: `[B, K, S, d]`.
        key_mask: `[B, S]` bool, True for slots that hold a token of this row, the new one included.

    Returns:
        `[B, 1, H, d]`.
    """
    batch, _, heads, width = query.shape
    kv_heads = key_cache.shape[1]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, width)
    scores = jnp.einsum("bkgd,bksd->bkgs", grouped, key_cache, preferred_element_type=jnp.float32)
    weights = _weights(scores, key_mask[:, None, None], width).astype(value_cache.dtype)
    return jnp.einsum("bkgs,bksd->bkgd", weights, value_cache).reshape(query.shape)
