"""Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685) of frozen projections.

A projection `y = x W + b` becomes `y = x W + b + (alpha / r) * dropout(x) A B`, with `A [in, r]`
drawn from U(+-1/sqrt(in)) (PEFT's Kaiming-uniform with a = sqrt 5) and `B [r, out]` zero, so that a
fresh adapter changes nothing. `W` and `b` are frozen; only A and B are trained and saved.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
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


def kaiming_uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """U(+-1/sqrt(in)), float32, for a kernel `[in, out]`: torch's Linear default, PEFT's for A."""
    bound = shape[0] ** -0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def low_rank(
    x: jax.Array,
    lora_a: jax.Array,
    lora_b: jax.Array,
    scale: float,
    rate: float = 0.0,
    seed: jax.Array | None = None,
) -> jax.Array:
    """`scale * dropout(x) A B`, computed in the dtype of `x`.

    Args:
        x: `[..., in]`.
        lora_a: `[in, r]`, of any float dtype.
        lora_b: `[r, out]`.
        scale: applied where it is narrow, so that no array of the output's width is passed over.
        rate, seed: of `dropout`; none without a seed.

    Returns:
        `[..., out]` in the dtype of `x`.

    Gradients are written out for two reasons. Those of A and B are sums over all tokens, and what
    autodiff emits makes XLA transpose the wide operand on CPUs. And masks are drawn again in the
    backward pass: kept, they and what they leave of `x` are a third of what a layer saves.
    """
    return _low_rank_forward(x, lora_a, lora_b, scale, rate, seed)[0]


def _low_rank_forward(x, lora_a, lora_b, scale, rate, seed):
    dropped = dropout(x, rate, seed)
    narrow = dropped @ lora_a.astype(x.dtype) * jnp.asarray(scale, x.dtype)
    return narrow @ lora_b.astype(x.dtype), (x, narrow, lora_a, lora_b, seed)


def _low_rank_backward(scale, rate, residuals, grad):
    x, narrow, lora_a, lora_b, seed = residuals
    grad_narrow = grad @ lora_b.T.astype(x.dtype) * jnp.asarray(scale, x.dtype)
    # Dropout is a product with its mask: its own transpose.
    grad_x = dropout(grad_narrow @ lora_a.T.astype(x.dtype), rate, seed)

    def over_tokens(few: jax.Array, many: jax.Array) -> jax.Array:
        """`few^T many` `[r, n]` for `[..., r]` and `[..., n]`; only `few` is transposed."""
        axes = tuple(range(few.ndim - 1))
        return jax.lax.dot_general(few, many, ((axes, axes), ((), ())))

    # Without the barrier XLA turns the transposed product into one of swapped operands, for which
    # CPUs have no fast kernel.
    grad_a = jax.lax.optimization_barrier(over_tokens(grad_narrow, dropout(x, rate, seed))).T
    grad_b = over_tokens(narrow, grad)
    return grad_x, grad_a.astype(lora_a.dtype), grad_b.astype(lora_b.dtype), None


low_rank.defvjp(_low_rank_forward, _low_rank_backward)


def dropout(x: jax.Array, rate: float, seed: jax.Array | None) -> jax.Array:
    """Zero a share `rate` of the elements of `x` and scale the others by `1 / (1 - rate)`.

    Args:
        x: `[..., n]`.
        rate: a share in [0, 1).
        seed: `[2]` uint32, on which alone the mask depends, and on the shape; None drops nothing.
    """
    if seed is None:
        return x
    with jax.named_scope("dropout"):
        keep = hashed_bits(seed, x.shape) >= np.uint32(min(round(rate * 2**32), 2**32 - 1))
        return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def hashed_bits(seed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Random uint32 of this shape, `[..., n]`, as a hash of each element's place.

    JAX's generator, threefry, is made to withstand analysis; a mask only has to look random. Two
    rounds of a hash with avalanche cost a seventh of it, little more than the pass over memory.
    An element depends on its own place only, so all layouts of devices draw the same.

    Args:
        seed: `[2]` uint32, itself random.
        shape: of at least one axis; every row along the last has two random words of its own.
    """
    first, second = seed
    for axis in range(len(shape) - 1):
        places = jax.lax.broadcasted_iota(jnp.uint32, shape[:-1], axis) * _STRIDE
        first, second = _mix(first + places), _mix(second + places)
    places = jax.lax.iota(jnp.uint32, shape[-1]) * _STRIDE
    return _mix(_mix(first[..., None] + places) ^ second[..., None])


_STRIDE = np.uint32(0x9E3779B9)  # 2^32 over the golden ratio: neighbours are far apart


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of uint32 in which each bit of the input changes half of the output's.

    C. Wellons's search for such of two multiplications (github.com/skeeto/hash-prospector) found
    the constants.
    """
    x = (x ^ (x >> 16)) * np.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * np.uint32(0xD35A2D97)
    return x ^ (x >> 15)


def merge(base: Any, lora: Any, scale: float) -> Any:
    """A base with its adapters added to its kernels, `W + scale * A B`, which runs without them.

    Computed in float32 or wider and rounded once to the kernel's dtype, where the kernel lies, a
    layer at a time.

    Args:
        base: the `params` tree of a decoder, of kernels that are not quantized.
        lora: its `lora` tree.
        scale: alpha / r.

    Returns:
        The `params` tree; every other leaf is the same array.
    """
    layers = dict(base["layers"])
    for name, factors in lora.get("layers", {}).items():
        kernel = layers[name]["kernel"]
        merged = _merged(kernel, factors["lora_a"], factors["lora_b"], scale)
        if isinstance(kernel, jax.Array):
            merged = jax.device_put(merged, kernel.sharding)
        layers[name] = {**layers[name], "kernel": merged}
    return {**base, "layers": layers}


@functools.partial(jax.jit, static_argnames="scale")
def _merged(kernel: jax.Array, lora_a: jax.Array, lora_b: jax.Array, scale: float) -> jax.Array:
    """Kernels `[L, in, out]` with adapters `[L, in, r]` and `[L, r, out]`."""

    def one_layer(arrays: tuple[jax.Array, ...]) -> jax.Array:
        kernel, lora_a, lora_b = arrays
        wide = jnp.promote_types(kernel.dtype, jnp.float32)
        # A GPU's TF32 has three digits.
        added = jnp.matmul(lora_a.astype(wide) * scale, lora_b.astype(wide), precision="highest")
        return (kernel + added).astype(kernel.dtype)

    return jax.lax.map(one_layer, (kernel, lora_a, lora_b))


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
        seed = None
        if self.lora.dropout and not deterministic:
            seed = jax.random.bits(self.make_rng("dropout"), (2,), jnp.uint32)
        with jax.named_scope("low_rank"):  # by which profiles tell it from the frozen product
            adapted = low_rank(x, lora_a, lora_b, self.lora.scale, self.lora.dropout, seed)
        return checkpoint_name(y + adapted, PROJECTED)
