"""Attention over rows that may hold padding and several samples.

Two entry points, because they have different shapes and different fast kernels: causal attention
over whole rows (training and prefill), for which `choose` picks a backend, and `cached` for one new
token against a key-value cache (decoding).

The backends are four functions of one signature. `causal` is plain XLA, for every device. `cudnn`
is the flash kernel behind `jax.nn.dot_product_attention`, for rows of one sample. For rows of
several, `cudnn_masked` is the same kernel with a mask, and `cudnn_packed` the kernel that is given
where each sample begins and skips what no sample sees. A row that a kernel would compute wrongly
comes out as NaN, so that no sample ever sees another in silence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from affectgpt_jax.models import cudnn_packed

# (query [B, T, H, d], key [B, T, K, d], value [B, T, K, d], segment_ids [B, T]) -> [B, T, H, d]
CausalAttention = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
# The arguments and the result of `cached`.
CachedAttention = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]

# Queries that `causal` takes at a time: small enough to skip most keys that lie in the future,
# large enough for efficient products. Long rows take larger blocks, since each is compiled.
_BLOCK = 128
_MAX_BLOCKS = 8

# Scores of masked positions, whose softmax weight is then 0. Finite, so that a row without any
# allowed key gives a uniform average instead of NaN; such rows are padding, and no loss reads them.
_MASKED = -1e30

DEFAULT_SEGMENTS = 64
# Segment ids of a prompt and of all answers that share it, see `grouped`.
GROUP = 1024
# What rematerialisation policies call the results of plain XLA's attention: outputs, and
# normalisers of the softmax.
ATTENDED = "attended"


@jax.custom_vjp
def causal(query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Causal self-attention within segments, in plain XLA; runs on every device.

    Queries are taken in blocks, each against the keys up to its end, and the weights of a block are
    computed again in the backward pass (Dao et al. 2022, without its blocks of keys): about half
    the products of a full square, and memory for one block of scores instead of all `T * T`. Scores
    and softmax are float32.

    Args:
        query: `[B, T, H, d]`; heads `g*H/K ... (g+1)*H/K - 1` share key head g (Ainslie et al.
            2023).
        key: `[B, T, K, d]`.
        value: `[B, T, K, d]`.
        segment_ids: `[B, T]` int32; a token sees earlier tokens of its own segment only, so samples
            packed into one row never see each other. By convention 0 is padding. Or `[B, 2, T]`, as
            `grouped` makes them: a token also sees earlier ones of the segment that its second
            id names.

    Returns:
        `[B, T, H, d]` in the dtype of `value`.
    """
    return _causal_forward(query, key, value, segment_ids)[0]


def _causal_forward(
    query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    q, k, v = _by_head(query, key.shape[2]), key.swapaxes(1, 2), value.swapaxes(1, 2)
    attended, normalisers = [], []
    for start, end in _blocks(query.shape[1]):
        scores = _masked_scores(q[:, :, :, start:end], k[:, :, :end], segment_ids)
        largest = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = weights.sum(axis=-1, keepdims=True)
        mixed = _times(weights.astype(value.dtype), v[:, :, :end])
        attended.append((mixed / total).astype(value.dtype))
        normalisers.append(largest + jnp.log(total))
    out = checkpoint_name(_by_position(jnp.concatenate(attended, axis=3)), ATTENDED)
    normaliser = checkpoint_name(jnp.concatenate(normalisers, axis=3), ATTENDED)
    return out, (query, key, value, segment_ids, out, normaliser)


def _causal_backward(
    saved: tuple[jax.Array, ...], grad: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    # Without the barrier XLA sees that it had these scores before, and keeps those of every layer.
    saved, grad = jax.lax.optimization_barrier((saved, grad))
    query, key, value, segment_ids, out, normalisers = saved
    scale, kv_heads = query.shape[-1] ** -0.5, key.shape[2]
    k, v = key.swapaxes(1, 2), value.swapaxes(1, 2)
    q, out, grad = (_by_head(x, kv_heads) for x in (query, out, grad))
    # What the softmax's normaliser takes back: sum over keys of weight times its gradient.
    shared = jnp.sum(out * grad, axis=-1, keepdims=True, dtype=jnp.float32)
    grads_q = []
    grad_k, grad_v = (jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    for start, end in _blocks(query.shape[1]):
        here = (slice(None), slice(None), slice(None), slice(start, end))
        keys, values = k[:, :, :end], v[:, :, :end]
        weights = jnp.exp(_masked_scores(q[here], keys, segment_ids) - normalisers[here])
        grad_weights = _times(grad[here], values.swapaxes(2, 3))
        grad_scores = (weights * (grad_weights - shared[here]) * scale).astype(key.dtype)
        grads_q.append(_times(grad_scores, keys))
        grad_k = grad_k.at[:, :, :end].add(_transposed_times(grad_scores, q[here]))
        grad_v = grad_v.at[:, :, :end].add(
            _transposed_times(weights.astype(value.dtype), grad[here])
        )
    return (
        _by_position(jnp.concatenate(grads_q, axis=3)).astype(query.dtype),
        grad_k.swapaxes(1, 2).astype(key.dtype),
        grad_v.swapaxes(1, 2).astype(value.dtype),
        None,
    )


causal.defvjp(_causal_forward, _causal_backward)


def _blocks(length: int) -> list[tuple[int, int]]:
    """The first query of each block, and the one after its last."""
    size = causal_block(length)
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def causal_block(length: int) -> int:
    """Queries that `causal` takes at a time."""
    return max(_BLOCK, -(-length // _MAX_BLOCKS))


def _by_head(x: jax.Array, kv_heads: int) -> jax.Array:
    """`[B, T, H, d]` as `[B, K, H/K, T, d]`: the queries that share a key head lie side by side."""
    batch, length, heads, width = x.shape
    return x.reshape(batch, length, kv_heads, heads // kv_heads, width).transpose(0, 2, 3, 1, 4)


def _by_position(x: jax.Array) -> jax.Array:
    """The inverse of `_by_head`."""
    batch, kv_heads, group, length, width = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(batch, length, kv_heads * group, width)


def _masked_scores(query: jax.Array, key: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Scaled float32 products `[B, K, H/K, t, S]` of queries `[B, K, H/K, t, d]`, which are the
    last t of the S tokens that keys `[B, K, S, d]` are of; `_MASKED` where a token does not see a
    key."""
    queries, keys = query.shape[3], key.shape[2]
    positions = jnp.arange(keys - queries, keys)
    mask = positions[:, None] >= jnp.arange(keys)
    same = _visible(segment_ids[..., keys - queries : keys], segment_ids[..., :keys])
    scores = _times(query, key.swapaxes(2, 3))
    return jnp.where((mask & same)[:, None, None], scores * query.shape[-1] ** -0.5, _MASKED)


def _visible(query_ids: jax.Array, key_ids: jax.Array) -> jax.Array:
    """Whether segments may see each other, `[B, t, S]`, from `[B, t]` and `[B, S]`, or from
    `[B, 2, t]` and `[B, 2, S]`: then a query also sees the segment that its second id names."""
    if query_ids.ndim == 2:
        return query_ids[:, :, None] == key_ids[:, None]
    own, prompt = query_ids[:, 0, :, None], query_ids[:, 1, :, None]
    keys = key_ids[:, 0, None]
    return (own == keys) | (prompt == keys)


def grouped(
    query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array
) -> jax.Array:
    """`causal` for rows in which several answers share a prompt.

    A segment id that is a multiple of `GROUP` is that of a prompt, the ones up to the next multiple
    are those of its answers: an answer sees its prompt and itself, and no other answer. Ids below
    `GROUP` are ordinary ones.
    """
    prompts = jnp.where(segment_ids < GROUP, segment_ids, segment_ids // GROUP * GROUP)
    return causal(query, key, value, jnp.stack([segment_ids, prompts], axis=1))


def grouped_row(prompt: int, sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Positions and segment ids `[T]` int32 of a row for `grouped`.

    Args:
        prompt: its tokens, which stand first.
        sizes: tokens of each answer to it, whose positions all start behind the prompt.
    """
    parts = [np.arange(prompt), *(prompt + np.arange(size) for size in sizes)]
    ids = np.repeat(GROUP + np.arange(len(parts)), [prompt, *sizes])
    return np.concatenate(parts).astype(np.int32), ids.astype(np.int32)


def _times(x: jax.Array, y: jax.Array) -> jax.Array:
    """The float32 matmul `[B, K, G, t, n]` of `[B, K, G, t, m]` and `[B, K, m, n]`."""
    batch, kv_heads, group, rows, inner = x.shape
    flat = x.reshape(batch, kv_heads, group * rows, inner)
    product = jnp.einsum("bkxm,bkmn->bkxn", flat, y, preferred_element_type=jnp.float32)
    return product.reshape(batch, kv_heads, group, rows, y.shape[-1])


def _transposed_times(x: jax.Array, y: jax.Array) -> jax.Array:
    """Float32 `[B, K, S, d]`: the sum over queries of `[B, K, G, t, S]` times `[B, K, G, t, d]`."""
    batch, kv_heads, group, queries, _ = x.shape
    x, y = (a.reshape(batch, kv_heads, group * queries, a.shape[-1]) for a in (x, y))
    return jnp.einsum("bkxs,bkxd->bksd", x, y, preferred_element_type=jnp.float32)


def cudnn(query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """`causal` by cuDNN's flash kernel, for rows of one sample and padding at their end.

    Takes bfloat16 and float16 on NVIDIA GPUs. Padding gives zeros. A row of another form, which the
    kernel cannot express, gives NaN.
    """
    valid = segment_ids > 0
    lengths = valid.sum(axis=1, dtype=jnp.int32)
    one_sample = (segment_ids == segment_ids[:, :1]) | ~valid
    first = jnp.arange(segment_ids.shape[1]) < lengths[:, None]
    fits = (one_sample & (first == valid)).all(axis=1)
    return jax.nn.dot_product_attention(
        query,
        key,
        _nan_unless(fits, value),
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )


def cudnn_masked(
    query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array
) -> jax.Array:
    """`causal` by cuDNN's flash kernel, with a mask of what no token sees beside the future.

    The kernel skips the future and reads a bfloat16 mask `[B, 1, T, T]` for the rest, which all
    heads and layers share. Every row is right, whatever the order of its segments.
    """
    length = query.shape[1]
    # cuDNN's backward pass with a mask wants an even length. The token added comes last, so that
    # no other sees it.
    padding = ((0, 0), (0, length % 2), (0, 0), (0, 0))
    query, key, value = (jnp.pad(x, padding) for x in (query, key, value))
    segment_ids = jnp.pad(segment_ids, padding[:2])
    attended = jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=(segment_ids[:, :, None] == segment_ids[:, None])[:, None],
        is_causal=True,
        implementation="cudnn",
    )
    return attended[:, :length]


def packed_rows(max_segments: int) -> CausalAttention:
    """`causal` by cuDNN's flash kernel, for rows of at most `max_segments` samples and padding.

    A row of more, or one in which a sample's tokens do not stand together, gives NaN.
    """
    # Padding is attended like a sample: then every token lies in a segment, no memory is left
    # unwritten, neither in the output nor in gradients, and segments follow without a gap.
    return functools.partial(_cudnn_packed, max_segments + 1)


def _cudnn_packed(
    max_segments: int,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array,
) -> jax.Array:
    segments = cudnn_packed.find_segments(segment_ids, max_segments)
    value = _nan_unless(segments.fit, value)
    return cudnn_packed.attend(query, key, value, segments)


def _nan_unless(fits: jax.Array, value: jax.Array) -> jax.Array:
    """Values `[B, T, K, d]` with NaN in rows that do not fit.

    Every output is a weighted sum of values, so it is NaN as well; and what multiplies an input is
    fused with the addition of its bias, where a check of the output would be a pass of its own.
    """
    factor = jnp.where(fits, 1.0, jnp.nan).astype(value.dtype)
    return value * factor[:, None, None, None]


class Choice(NamedTuple):
    """A backend, and why it is the one; its rows hold at most `DEFAULT_SEGMENTS` samples."""

    name: str
    reason: str
    attend: CausalAttention

    def for_rows_of(self, samples: int) -> CausalAttention:
        """The same backend for rows of at most so many samples.

        cuDNN's packed layout stores float32 statistics of `[B * samples, H, T]` for the backward
        pass of every layer, so the number had better be no larger than needed.
        """
        return packed_rows(samples) if self.name == "cudnn_packed" else self.attend


def choose(
    requested: str,
    platform: str,
    compute_capability: tuple[int, int],
    head_dim: int,
    dtype: str,
    packed: bool,
    *,
    kv_heads_split: bool = True,
    failed: Mapping[str, str] = MappingProxyType({}),
) -> Choice:
    """The causal attention backend of a run.

    Args:
        requested: the name of one, or "auto" for the fastest that can run.
        platform: "cpu", "cuda", "rocm" or "tpu".
        compute_capability: of the CUDA device, e.g. (9, 0); anything elsewhere.
        head_dim: d.
        dtype: of activations, by name.
        packed: whether rows hold several samples.
        kv_heads_split: whether the devices that share query heads can share key heads as well.
        failed: backends that were tried on the device, and what was wrong with each.

    Raises:
        ValueError: a backend that cannot run here; the message says why.
    """
    where = platform, compute_capability, head_dim, dtype, packed, kv_heads_split
    # The fastest first, by arithmetic: cudnn needs neither offsets nor a mask, but takes no packed
    # rows.
    kernels = ("cudnn", "cudnn_packed", "cudnn_masked")
    refusals = {name: failed.get(name) or _refusal_of_cudnn(name, *where) for name in kernels}
    refusals["xla"] = ""
    if requested == "auto":
        name = next(name for name, refusal in refusals.items() if not refusal)
        fastest = "cudnn_packed" if packed else "cudnn"
        passed_over = dict.fromkeys((fastest, *failed))
        others = "; ".join(f"not {other}: {refusals[other]}" for other in passed_over)
        reason = _REASONS[name] if name == fastest else others
    else:
        if refusals[requested]:
            raise ValueError(f"attention={requested!r} cannot be used: {refusals[requested]}")
        name, reason = requested, "as asked for"
    return Choice(name, reason, _attention(name))


_REASONS = {
    "cudnn": "rows of one sample, on a GPU with cuDNN's flash attention",
    "cudnn_packed": "rows of several samples, on a GPU with cuDNN's packed flash attention",
}


def _attention(name: str) -> CausalAttention:
    return {
        "xla": causal,
        "cudnn": cudnn,
        "cudnn_masked": cudnn_masked,
        "cudnn_packed": packed_rows(DEFAULT_SEGMENTS),
    }[name]


def _refusal_of_cudnn(
    name: str,
    platform: str,
    compute_capability: tuple[int, int],
    head_dim: int,
    dtype: str,
    packed: bool,
    kv_heads_split: bool,
) -> str:
    """Why one of cuDNN's kernels cannot run; empty if it can."""
    if platform != "cuda":
        return f"it needs an NVIDIA GPU, and this is {platform}"
    if compute_capability < (8, 0):
        return "it needs compute capability 8.0 (Ampere), and this GPU has {}.{}".format(
            *compute_capability
        )
    if dtype not in ("bfloat16", "float16"):
        return f"it computes in bfloat16 or float16, not in {dtype}"
    widest = 256 if compute_capability >= (9, 0) else 128
    if head_dim > widest or head_dim % 8:
        return (
            f"it takes heads of up to {widest} in steps of 8 on this GPU, and the base has "
            f"{head_dim}"
        )
    if not kv_heads_split:
        return "the mesh splits query heads over more devices than there are key heads"
    if name == "cudnn":
        return "rows hold several samples, which it cannot tell apart" if packed else ""
    if name == "cudnn_masked":
        return ""
    if compute_capability < (9, 0):
        return "packed rows need compute capability 9.0 (Hopper), and this GPU has {}.{}".format(
            *compute_capability
        )
    return cudnn_packed.unavailable()


def deviation(
    attend: CausalAttention, heads: int, kv_heads: int, head_dim: int, dtype: str, packed: bool
) -> float:
    """How far a backend is from `causal` in float32 on this machine, forward and backward.

    The largest `||found - expected|| / ||expected||` of the output and the three gradients on small
    random rows: one whole, one with padding, and with `packed` of several samples. NaN if any
    value is not finite. A sample that sees another one, or misses a part of itself, gives more
    than 0.3; rounding to bfloat16 less than 0.02.
    """
    length = 120
    ends = [(40, 80, 120), (33, 66, 100)] if packed else [(120,), (70,)]
    segment_ids = jnp.asarray(np.stack([_segment_row(row, length) for row in ends]))
    shapes = [(2, length, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    rng = np.random.default_rng(0)
    inputs = [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]
    real = (segment_ids > 0)[:, :, None, None]

    @functools.partial(jax.jit, static_argnums=0)
    def run(attend, query, key, value, cotangent):
        def output(*qkv):
            return jnp.where(real, attend(*qkv, segment_ids), 0)

        out, vjp = jax.vjp(output, query, key, value)
        return [jnp.where(real, x, 0).astype(jnp.float32) for x in (out, *vjp(cotangent))]

    # float32 products on a GPU are TF32 unless told otherwise.
    with jax.default_matmul_precision("highest"):
        expected = run(causal, *(x.astype(jnp.float32) for x in inputs))
    found = run(attend, *inputs)
    ratios = [
        jnp.linalg.norm(f - e) / jnp.linalg.norm(e) for f, e in zip(found, expected, strict=True)
    ]
    return float(jnp.max(jnp.stack(ratios)))


def _segment_row(ends: tuple[int, ...], length: int) -> np.ndarray:
    """Segment ids `[T]` of samples 1, 2... that end at these tokens, and padding."""
    positions = np.arange(length)
    ids = np.searchsorted(ends, positions, side="right") + 1
    return np.where(positions < ends[-1], ids, 0).astype(np.int32)


def cached(
    query: jax.Array, key_cache: jax.Array, value_cache: jax.Array, key_mask: jax.Array
) -> jax.Array:
    """Attention of new tokens to all valid slots of a layer's cache.

    Args:
        query: `[B, 1, H, d]`.
        key_cache: `[B, K, S, d]`, the new token's key already written.
        value_cache: `[B, K, S, d]`.
        key_mask: `[B, S]` bool, True for slots that hold a token of this row, the new one included.

    Returns:
        `[B, 1, H, d]` in the dtype of the values.
    """
    batch, _, heads, width = query.shape
    kv_heads = key_cache.shape[1]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, width)
    scores = jnp.einsum("bkgd,bksd->bkgs", grouped, key_cache, preferred_element_type=jnp.float32)
    scores = jnp.where(key_mask[:, None, None], scores * width**-0.5, _MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(value_cache.dtype)
    attended = jnp.einsum(
        "bkgs,bksd->bkgd", weights, value_cache, preferred_element_type=jnp.float32
    )
    return attended.astype(value_cache.dtype).reshape(query.shape)
