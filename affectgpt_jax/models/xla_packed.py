"""Attention over packed rows in plain XLA, block by block, for CPUs.

A row of 1,024 tokens that holds four samples has four times as many pairs of tokens up to its
diagonal as its samples have. Which pairs of blocks share a sample is known when the batch is; a
loop runs over these alone, with FlashAttention's running softmax (Dao et al. 2022, arXiv
2205.14135) and gradients from saved normalisers. A pair's scores fit into a core's cache, which is
half of what is gained. Devices of many cores would starve in such a loop, and have kernels of their
own.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

BLOCK = 64  # tokens of a block: smaller ones skip more, larger ones make better products

# Finite, so that a row without any allowed key gives a uniform average instead of NaN; such rows
# are padding, and no loss reads them.
MASKED = -1e30


class Pairs(NamedTuple):
    """Pairs of blocks that a loop visits: key blocks of a query block one after another.

    Attributes:
        count: int32 scalar.
        row, query, key: `[P]` int32, P the most that there could be.
        first: `[P]` bool, whether a query block begins.
    """

    count: jax.Array
    row: jax.Array
    query: jax.Array
    key: jax.Array
    first: jax.Array


def find_pairs(segment_ids: jax.Array) -> Pairs:
    """Pairs of blocks up to the diagonal whose segments may meet; `segment_ids` is `[B, n, c]`.

    Ranges of ids are compared, which is exact where a row's segments follow in ascending order and
    too much, never too little, where they do not. Padding counts as the last segment.
    """
    batch, blocks, _ = segment_ids.shape
    ids = jnp.where(segment_ids > 0, segment_ids, jnp.iinfo(segment_ids.dtype).max)
    low, high = ids.min(axis=2), ids.max(axis=2)
    meet = (low[:, None, :] <= high[:, :, None]) & (high[:, None, :] >= low[:, :, None])
    meet &= jnp.tril(jnp.ones((blocks, blocks), bool))
    most = batch * blocks * (blocks + 1) // 2
    row, query, key = (x.astype(jnp.int32) for x in jnp.nonzero(meet, size=most, fill_value=0))
    same = (row[1:] == row[:-1]) & (query[1:] == query[:-1])
    first = jnp.concatenate([jnp.ones(1, bool), ~same])
    return Pairs(meet.sum(dtype=jnp.int32), row, query, key, first)


@jax.custom_vjp
def attend(query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """`attention.causal`, at a cost that follows from the samples of a row instead of its length.

    Args:
        query: `[B, T, H, d]`.
        key, value: `[B, T, K, d]`.
        segment_ids: `[B, T]` int32.

    Returns:
        `[B, T, H, d]` in the dtype of `value`.
    """
    return _forward(query, key, value, segment_ids)[0]


def _forward(
    query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    kv_heads = key.shape[2]
    ids = _in_blocks(segment_ids)
    pairs = find_pairs(ids)
    q, k, v = _blocks(query, kv_heads), _blocks(key, kv_heads), _blocks(value, kv_heads)

    def visit(pair, state):
        # Of this query block, over the keys so far: the largest score, the sum of exponentials
        # below it and the sum of values that they weigh.
        largest, total, mixed, out, normalisers = state
        row, at = pairs.row[pair], (pairs.row[pair], pairs.query[pair])
        keys = (row, pairs.key[pair])
        largest = jnp.where(pairs.first[pair], MASKED, largest)
        scores = _scores(_get(q, at), _get(k, keys), ids, at, keys)
        higher = jnp.maximum(largest, scores.max(axis=-1, keepdims=True))
        weights = jnp.exp(scores - higher)
        before = jnp.where(pairs.first[pair], 0, jnp.exp(largest - higher))
        total = total * before + weights.sum(axis=-1, keepdims=True)
        mixed = mixed * before + _times(weights.astype(v.dtype), _get(v, keys))
        # The last visit to a query block leaves its result.
        out = _put(out, at, (mixed / total).astype(v.dtype))
        return higher, total, mixed, out, _put(normalisers, at, higher + jnp.log(total))

    column = (*q.shape[:-1], 1)
    state = (
        jnp.zeros(column[2:], jnp.float32),
        jnp.zeros(column[2:], jnp.float32),
        jnp.zeros(q.shape[2:], jnp.float32),
        jnp.zeros(q.shape, value.dtype),
        jnp.zeros(column, jnp.float32),
    )
    *_, out, normalisers = jax.lax.fori_loop(0, pairs.count, visit, state)
    out = _rows(out, query.shape)
    return out, (query, key, value, segment_ids, out, normalisers)


def _backward(
    saved: tuple[jax.Array, ...], grad: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    query, key, value, segment_ids, out, normalisers = saved
    kv_heads, scale = key.shape[2], query.shape[-1] ** -0.5
    ids = _in_blocks(segment_ids)
    pairs = find_pairs(ids)
    q, k, v, g = (_blocks(x, kv_heads) for x in (query, key, value, grad))
    # What the softmax's normaliser takes back: sum over keys of weight times its gradient.
    shared = jnp.sum(_blocks(out, kv_heads) * g, axis=-1, keepdims=True, dtype=jnp.float32)

    def visit(pair, grads):
        grad_q, grad_k, grad_v = grads
        at = (pairs.row[pair], pairs.query[pair])
        keys = (pairs.row[pair], pairs.key[pair])
        q_here, k_here, v_here, g_here = _get(q, at), _get(k, keys), _get(v, keys), _get(g, at)
        weights = jnp.exp(_scores(q_here, k_here, ids, at, keys) - _get(normalisers, at))
        grad_weights = _times(g_here, v_here.swapaxes(1, 2))
        grad_scores = (weights * (grad_weights - _get(shared, at)) * scale).astype(k.dtype)
        return (
            _add(grad_q, at, _times(grad_scores, k_here)),
            _add(grad_k, keys, transposed_times(grad_scores, q_here)),
            _add(grad_v, keys, transposed_times(weights.astype(v.dtype), g_here)),
        )

    grads = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    grads = jax.lax.fori_loop(0, pairs.count, visit, grads)
    like = (query, key, value)
    return *(_rows(x, y.shape).astype(y.dtype) for x, y in zip(grads, like, strict=True)), None


attend.defvjp(_forward, _backward)


def _in_blocks(segment_ids: jax.Array) -> jax.Array:
    """Segment ids `[B, T]` as `[B, n, c]`, with padding at the end."""
    batch, length = segment_ids.shape
    padded = jnp.pad(segment_ids, ((0, 0), (0, -length % BLOCK)))
    return padded.reshape(batch, -1, BLOCK)


def _blocks(x: jax.Array, kv_heads: int) -> jax.Array:
    """`[B, T, H, d]` as blocks `[B, n, K, H/K * c, d]`: all that meets the same keys together."""
    batch, length, heads, width = x.shape
    x = jnp.pad(x, ((0, 0), (0, -length % BLOCK), (0, 0), (0, 0)))
    x = x.reshape(batch, -1, BLOCK, kv_heads, heads // kv_heads, width)
    return x.transpose(0, 1, 3, 4, 2, 5).reshape(
        batch, -1, kv_heads, heads // kv_heads * BLOCK, width
    )


def _rows(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `_blocks`, of this shape."""
    batch, length, heads, width = shape
    kv_heads = x.shape[2]
    x = x.reshape(batch, -1, kv_heads, heads // kv_heads, BLOCK, width)
    return x.transpose(0, 1, 4, 2, 3, 5).reshape(batch, -1, heads, width)[:, :length]


def _get(x: jax.Array, at: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Block `x[row, block]`."""
    return jax.lax.dynamic_slice(x, (*at, *[0] * (x.ndim - 2)), (1, 1, *x.shape[2:]))[0, 0]


def _put(x: jax.Array, at: tuple[jax.Array, jax.Array], block: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(x, block[None, None], (*at, *[0] * (x.ndim - 2)))


def _add(x: jax.Array, at: tuple[jax.Array, jax.Array], block: jax.Array) -> jax.Array:
    return _put(x, at, _get(x, at) + block)


_times = functools.partial(jnp.einsum, "kxm,kmn->kxn", preferred_element_type=jnp.float32)


def transposed_times(x: jax.Array, y: jax.Array) -> jax.Array:
    """Float32 sums over queries, `x^T y` `[..., S, d]`, of scores `[..., t, S]` and `[..., t, d]`.

    As `(y^T x)^T`, which transposes what is narrow: XLA's CPU backend multiplies by a transposed
    left operand at a third of the speed. Without the barriers it would turn one into the other.
    """
    turned = jax.lax.optimization_barrier(y.swapaxes(-1, -2))
    product = jnp.matmul(turned, x, preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(product).swapaxes(-1, -2)


def _scores(
    query: jax.Array,
    key: jax.Array,
    ids: jax.Array,
    at: tuple[jax.Array, jax.Array],
    keys: tuple[jax.Array, jax.Array],
) -> jax.Array:
    """Scaled products `[K, G*c, c]` of blocks `[K, G*c, d]` and `[K, c, d]`; where a token does not
    see a key, a number that no exponential survives."""
    places = jnp.arange(BLOCK)
    sees = (at[1] > keys[1]) | (places[:, None] >= places)
    sees &= _get(ids, at)[:, None] == _get(ids, keys)[None, :]
    sees = jnp.tile(sees, (query.shape[1] // BLOCK, 1))
    scores = _times(query, key.swapaxes(1, 2)) * query.shape[-1] ** -0.5
    return jnp.where(sees, scores, MASKED)
