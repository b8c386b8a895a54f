"""The Q-Former: learned queries that read a sequence of encoder states into a few tokens.

A BERT encoder (BLIP-2, arXiv 2301.12597) whose every layer also cross-attends to the encoder
states and keeps only the feed-forward branch of the queries. AffectGPT uses it as a head and as a
pre-fusion (arXiv 2501.16566, Eq. 3-4).
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

_INIT = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class QFormerConfig:
    """The sizes of a Q-Former; the defaults are BERT-base with two layers.

    `dropout` is the rate on the query embeddings, the attention weights and the output of every
    sublayer. Raises ValueError for a size below 1, a rate outside [0, 1), and heads that
    do not divide the width.
    """

    width: int = 768
    heads: int = 12
    layers: int = 2
    intermediate: int = 3072
    dropout: float = 0.1
    norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        """Rejects sizes and rates out of range, and a width that `heads` does not divide."""
        for field in ("width", "heads", "layers", "intermediate"):
            if getattr(self, field) < 1:
                raise ValueError(f"qformer.{field} is {getattr(self, field)}; expected 1 or more")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"qformer.dropout is {self.dropout}; expected a share in [0, 1)")
        if self.width % self.heads:
            raise ValueError(
                f"The width of the Q-Former ({self.width}) must be a multiple of its heads "
                f"({self.heads})."
            )


def multi_head_attention(
    query: Array,
    key: Array,
    value: Array,
    key_mask: Array | None = None,
    drop: Callable[[Array], Array] = lambda weights: weights,
) -> Array:
    """Scaled dot-product attention, `softmax(q k^T / sqrt(D)) v` per head, with a float32 softmax.

    Args:
      query: `[B, Q, H, D]`.
      key: `[B, S, H, D]`.
      value: `[B, S, H, D]`.
      key_mask: `[B, S]` bool, False for keys that must not be read; None reads all. A row without
        any True yields the plain mean of its values, which keeps it finite.
      drop: applied to the attention weights `[B, H, Q, S]` (float32): the dropout of training.

    Returns:
      `[B, Q, H, D]` in the dtype of `value`.
    """
    logits = jnp.einsum("bqhd,bshd->bhqs", query, key, preferred_element_type=jnp.float32)
    logits *= query.shape[-1] ** -0.5
    if key_mask is not None:
        logits = jnp.where(key_mask[:, None, None, :], logits, jnp.finfo(jnp.float32).min)
    weights = drop(jax.nn.softmax(logits, axis=-1))
    return jnp.einsum("bhqs,bshd->bqhd", weights.astype(value.dtype), value)


def layer_norm(config: QFormerConfig, name: str) -> nn.LayerNorm:
    """A LayerNorm that returns float32 for any input dtype."""
    # The one-pass variance cancels badly beside an eps of 1e-12.
    return nn.LayerNorm(config.norm_eps, dtype=jnp.float32, use_fast_variance=False, name=name)


class Attention(nn.Module):
    """Multi-head attention with its projections, from `[B, Q, width]` to states `[B, S, E]`."""

    config: QFormerConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, queries: Array, states: Array, key_mask: Array | None, deterministic: bool
    ) -> Array:
        """Reads `states` where `key_mask` (`[B, S]` bool; None: everywhere): `[B, Q, width]`."""
        config = self.config

        def heads(name: str, x: Array) -> Array:
            x = nn.Dense(config.width, dtype=self.dtype, kernel_init=_INIT, name=name)(x)
            return x.reshape(*x.shape[:2], config.heads, -1)

        mixed = multi_head_attention(
            heads("query", queries),
            heads("key", states),
            heads("value", states),
            key_mask,
            nn.Dropout(config.dropout, deterministic=deterministic),
        )
        output = nn.Dense(config.width, dtype=self.dtype, kernel_init=_INIT, name="output")
        return output(mixed.reshape(queries.shape))


class FeedForward(nn.Module):
    """`Dense -> erf-GELU -> Dense` on `[B, Q, width]`, of inner width `config.intermediate`."""

    config: QFormerConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, hidden_states: Array) -> Array:
        """Returns `[B, Q, width]`."""
        config = self.config
        inner = nn.Dense(
            config.intermediate, dtype=self.dtype, kernel_init=_INIT, name="intermediate"
        )
        output = nn.Dense(config.width, dtype=self.dtype, kernel_init=_INIT, name="output")
        return output(jax.nn.gelu(inner(hidden_states), approximate=False))


class QFormerLayer(nn.Module):
    """Self-attention, cross-attention and feed-forward, each closed by a post-LayerNorm."""

    config: QFormerConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, hidden_states: Array, encoder_states: Array, encoder_mask: Array, deterministic: bool
    ) -> Array:
        """Maps the queries' `hidden_states` `[B, Q, width]` to the same shape."""
        config, dtype = self.config, self.dtype

        def add_and_norm(name: str, residual: Array, update: Array) -> Array:
            update = nn.Dropout(config.dropout)(update, deterministic=deterministic)
            return layer_norm(config, name)(residual + update).astype(dtype)

        attend = Attention(config, dtype, name="self_attention")
        update = attend(hidden_states, hidden_states, None, deterministic)
        hidden_states = add_and_norm("self_attention_norm", hidden_states, update)

        attend = Attention(config, dtype, name="cross_attention")
        update = attend(hidden_states, encoder_states, encoder_mask, deterministic)
        hidden_states = add_and_norm("cross_attention_norm", hidden_states, update)

        update = FeedForward(config, dtype, name="feed_forward")(hidden_states)
        return add_and_norm("feed_forward_norm", hidden_states, update)


class QFormer(nn.Module):
    """`num_queries` learned queries that read a masked sequence of encoder states.

    Parameters are float32; the computation runs in `dtype`, softmax and LayerNorm in float32.
    """

    config: QFormerConfig
    num_queries: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, encoder_states: Array, encoder_mask: Array, deterministic: bool = True
    ) -> Array:
        """Reads a sequence into `num_queries` vectors.

        Args:
          encoder_states: `[B, S, E]`.
          encoder_mask: `[B, S]` bool. Where it is False, neither values nor gradients depend on
            `encoder_states`, whatever stands there (NaN included). A sample without any True still
            returns finite vectors: the caller decides what becomes of them.
          deterministic: False turns dropout on, and needs the rng collection "dropout".

        Returns:
          `[B, num_queries, width]` in `dtype`.
        """
        config = self.config
        # A weight of zero does not silence a NaN (0 * NaN is NaN): only replacing the value does.
        encoder_states = jnp.where(encoder_mask[..., None], encoder_states, 0).astype(self.dtype)

        queries = self.param("queries", _INIT, (self.num_queries, config.width))
        queries = layer_norm(config, "queries_norm")(queries).astype(self.dtype)
        # Each sample gets its own copy before dropout, for a mask of its own.
        hidden_states = jnp.broadcast_to(queries, (encoder_states.shape[0], *queries.shape))
        hidden_states = nn.Dropout(config.dropout)(hidden_states, deterministic=deterministic)
        for i in range(config.layers):
            layer = QFormerLayer(config, self.dtype, name=f"layer_{i}")
            hidden_states = layer(hidden_states, encoder_states, encoder_mask, deterministic)
        return hidden_states
