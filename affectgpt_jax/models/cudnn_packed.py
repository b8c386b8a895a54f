"""cuDNN's flash attention over rows of several samples, through JAX's private function.

`jax.nn.dot_product_attention` knows one length per row and no more. cuDNN also takes, per row,
where each segment starts and how long it is; only `jax._src.cudnn.fused_attention_stablehlo` passes
that on. All that depends on it is in this module, which was written against the source of jax
0.10.2, 0.11.2 and 0.12.0 and refuses other versions.

What it means there: `q_offsets` and `kv_offsets` `[B, M + 1]` int32 are the first tokens of the
segments of a row, counted within the row, then -1; `q_seqlen` and `kv_seqlen` `[B, M]` their
lengths, then -1. JAX moves all segments of a batch into one list, with offsets in elements from the
start of the tensor, and cuDNN attends within each. The call is registered with
`custom_partitioning`, which splits batch and heads if query, key and value are split alike.
"""

from __future__ import annotations

import inspect
from typing import NamedTuple

import jax
import jax.numpy as jnp

# From the first version whose source was read up to the first that was not.
_VERSIONS = ((0, 10), (0, 13))
_PARAMETERS = (
    ("query", "key", "value"),
    ("q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets", "scale", "mask_type", "qkv_layout"),
)


class Segments(NamedTuple):
    """The runs of equal segment ids in every row, padding included.

    Attributes:
        offsets: `[B, M + 1]` int32, the first token of each run, then -1; the last column is -1.
        lengths: `[B, M]` int32, tokens of each run, then -1.
        fit: `[B]` bool, whether the row has at most M runs, no two of the same id.
    """

    offsets: jax.Array
    lengths: jax.Array
    fit: jax.Array


def find_segments(segment_ids: jax.Array, max_segments: int) -> Segments:
    """The runs of `segment_ids` `[B, T]`, with M = `max_segments`."""
    batch, length = segment_ids.shape
    before = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    starts = segment_ids != before
    count = starts.sum(axis=1)
    # Absent starts count as `length`, which makes the last run end with the row.
    positions = jnp.where(starts, jnp.arange(length), length)
    first = jnp.sort(positions, axis=1)[:, : max_segments + 1]
    first = jnp.pad(first, ((0, 0), (0, max_segments + 1 - first.shape[1])), constant_values=length)
    used = jnp.arange(max_segments) < count[:, None]
    lengths = jnp.where(used, first[:, 1:] - first[:, :-1], -1)
    offsets = jnp.pad(jnp.where(used, first[:, :-1], -1), ((0, 0), (0, 1)), constant_values=-1)
    ids = jnp.take_along_axis(segment_ids, jnp.minimum(first[:, :-1], length - 1), axis=1)
    same = (ids[:, :, None] == ids[:, None, :]) & used[:, :, None] & used[:, None, :]
    distinct = same.sum(axis=(1, 2)) == used.sum(axis=1)
    fit = (count <= max_segments) & distinct
    return Segments(offsets.astype(jnp.int32), lengths.astype(jnp.int32), fit)


def unavailable() -> str:
    """Why the private function cannot be used in this installation; empty if it can."""
    version = jax.__version_info__[:2]
    if not _VERSIONS[0] <= version < _VERSIONS[1]:
        low, high = (".".join(map(str, v)) for v in _VERSIONS)
        return (
            f"packed rows go through a private function of jax >= {low}, < {high}, and this is "
            f"jax {jax.__version__}"
        )
    try:
        from jax._src.cudnn import fused_attention_stablehlo as private

        parameters = inspect.signature(private.dot_product_attention).parameters
        positional, named = _PARAMETERS
        known = tuple(parameters)[:3] == positional and set(named) <= set(parameters)
        known = known and hasattr(private.MaskType, "PADDING_CAUSAL")
    except (ImportError, AttributeError, TypeError, ValueError):
        known = False
    return "" if known else f"the private function for packed rows of jax {jax.__version__} changed"


def attend(query: jax.Array, key: jax.Array, value: jax.Array, segments: Segments) -> jax.Array:
    """Causal attention within segments.

    Args:
        query: `[B, T, H, d]` bfloat16 or float16.
        key: `[B, T, K, d]`.
        value: `[B, T, K, d]`.
        segments: of at least 2 runs (M), all of which cover the rows.

    Returns:
        `[B, T, H, d]`.

    Raises:
        ValueError: more elements than cuDNN's 32-bit offsets can count.
    """
    from jax._src.cudnn import fused_attention_stablehlo as private

    if query.size >= 2**31:
        raise ValueError(
            f"packed attention over queries of shape {query.shape} has offsets beyond 32 bits; "
            "use a smaller batch, or more microbatches"
        )
    if not _strides_of_key():
        groups = query.shape[2] // key.shape[2]
        key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
    return private.dot_product_attention(
        query,
        key,
        value,
        q_seqlen=segments.lengths,
        kv_seqlen=segments.lengths,
        q_offsets=segments.offsets,
        kv_offsets=segments.offsets,
        scale=query.shape[-1] ** -0.5,
        mask_type=private.MaskType.PADDING_CAUSAL,
        qkv_layout="BTNH",
    )


def _strides_of_key() -> bool:
    """Whether key offsets are counted by the key's heads.

    Up to some version before 0.11.2, JAX counts them by the query's, and with fewer key heads reads
    keys of other segments (jax-ml/jax pull request 39521). There, key heads are repeated.
    """
    return jax.__version_info__ >= (0, 11, 2)
