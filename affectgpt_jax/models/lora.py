"""Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685) of frozen projections.

A projection `y = x W + b` becomes `y = x W + b + (alpha / r) * dropout(x) A B`, with `A [in, r]`
drawn from U(+-1/sqrt(in)) (PEFT's Kaiming-uniform with a = sqrt 5) and `B [r, out]` zero, so that a
fresh adapter changes nothing. `W` and `b` are frozen; only A and B are trained and saved.
"""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from affectgpt_jax.models.quantize import frozen_dot, initializer

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# What rematerialisation policies call a projection's result. Its two products would be twice as
# much to keep as their sum.
PROJECTED = "projected"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which projections get an adapter, and its size.

    The recipe keeps alpha at 32 for every rank, so the scale is 4 / 2 / 1 at rank 8 / 16 / 32.

    Raises:
        ValueError: an unknown or repeated target, a rank below 1, an alpha that is not
            positive, a dropout outside [0, 1).
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self):
        unknown = [t for t in self.targets if t not in TARGETS]
        if unknown or not self.targets or len(set(self.targets)) != len(self.targets):
            raise ValueError(
                f"lora.targets is {self.targets!r}; expected distinct names out of {TARGETS}"
            )
        if self.rank < 1:
            raise ValueError(f"lora.rank is {self.rank}; expected 1 or more")
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"lora.alpha is {self.alpha}; expected a positive number")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout is {self.dropout}; expected a share in [0, 1)")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def kaiming_uniform(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """U(+-1/sqrt(in)) for a kernel `[in, out]`: torch's Linear default, PEFT's choice for A."""
    bound = shape[0] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def low_rank(x: jax.Array, lora_a: jax.Array, lora_b: jax.Array, scale: float) -> jax.Array:
    """`scale * x A B`, computed in the dtype of `x`.

    Args:
        x: `[..., in]`.
        lora_a: `[in, r]`, of any float dtype.
        lora_b: `[r, out]`.
        scale: applied where it is narrow, so that no array of the output's width is passed over.

    Returns:
        `[..., out]` in the dtype of `x`.

    The gradients of A and B are sums over all tokens. They are written out because the order of
    their operands matters: what autodiff emits makes XLA transpose the wide operand on CPUs.
    """
    return _low_rank_forward(x, lora_a, lora_b, scale)[0]


def _low_rank_forward(x, lora_a, lora_b, scale):
    narrow = x @ lora_a.astype(x.dtype) * jnp.asarray(scale, x.dtype)
    return narrow @ lora_b.astype(x.dtype), (x, narrow, lora_a, lora_b)


def _low_rank_backward(scale, residuals, grad):
    x, narrow, lora_a, lora_b = residuals
    grad_narrow = grad @ lora_b.T.astype(x.dtype) * jnp.asarray(scale, x.dtype)
    grad_x = grad_narrow @ lora_a.T.astype(x.dtype)

    def over_tokens(few: jax.Array, many: jax.Array) -> jax.Array:
        """`few^T many` `[r, n]` for `[..., r]` and `[..., n]`; only `few` is transposed."""
        axes = tuple(range(few.ndim - 1))
        return jax.lax.dot_general(few, many, ((axes, axes), ((), ())))

    # Without the barrier XLA turns the transposed product into one of swapped operands, for which
    # CPUs have no fast kernel.
    grad_a = jax.lax.optimization_barrier(over_tokens(grad_narrow, x)).T
    return grad_x, grad_a.astype(lora_a.dtype), over_tokens(narrow, grad).astype(lora_b.dtype)


low_rank.defvjp(_low_rank_forward, _low_rank_backward)


def dropout(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """Zero a share `rate` of the elements and scale the others by `1 / (1 - rate)`.

    Unlike `nn.Dropout`, which turns 32 random bits into a float for every element, it compares 16:
    drawing masks is a tenth of a step on a CPU. The rate is met to 2^-17.
    """
    width = x.shape[-1]
    pairs = jax.random.bits(key, (*x.shape[:-1], -(-width // 2)), jnp.uint32)
    bits = jax.lax.bitcast_convert_type(pairs, jnp.uint16).reshape(*x.shape[:-1], -1)
    keep = bits[..., :width] >= min(round(rate * 2**16), 2**16 - 1)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


class Projection(nn.Module):
    """A linear layer with frozen `params` (kernel `[in, out]`, bias) and an optional adapter.

    The adapter lives in the collection `lora`; applied without that collection, the layer is the
    plain base model. Dropout draws one mask per projection from the stream `dropout`, as PEFT does.
    """

    features: int
    use_bias: bool
    lora: LoraConfig | None
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    precision: str = ""  # of the kernel: one of quantize.PRECISIONS

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        init = initializer(nn.initializers.normal(0.02), self.precision)
        kernel = self.param("kernel", init, (x.shape[-1], self.features), self.param_dtype)
        y = frozen_dot(x, kernel)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
            y = y + bias.astype(self.dtype)
        if self.lora is None or not (self.is_initializing() or self.has_variable("lora", "lora_a")):
            return checkpoint_name(y, PROJECTED)
        rank = self.lora.rank
        lora_a = self.variable(
            "lora",
            "lora_a",
            lambda: kaiming_uniform(self.make_rng("lora"), (x.shape[-1], rank)),
        ).value
        lora_b = self.variable(
            "lora", "lora_b", lambda: jnp.zeros((rank, self.features), jnp.float32)
        ).value
        if self.lora.dropout and not deterministic:
            with jax.named_scope("dropout"):
                x = dropout(x, self.lora.dropout, self.make_rng("dropout"))
        with jax.named_scope("low_rank"):  # by which profiles tell it from the frozen product
            adapted = low_rank(x, lora_a, lora_b, self.lora.scale)
        return checkpoint_name(y + adapted, PROJECTED)
