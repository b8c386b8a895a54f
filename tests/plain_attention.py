"""Causal attention as one square of scores: nothing is skipped and nothing computed again.

For tests that count the products of a program, which the backends of the package do as they like.
"""

import jax
import jax.numpy as jnp


def plain_attention(query, key, value, segment_ids):
    """Of the interface `attention.CausalAttention`."""
    batch, length, heads, width = query.shape
    kv_heads = key.shape[2]
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, width)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, key) / width**0.5
    mask = jnp.tril(segment_ids[:, :, None] == segment_ids[:, None, :])[:, None, None]
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1)
    return jnp.einsum("bkgts,bskd->btkgd", weights, value).reshape(query.shape)
