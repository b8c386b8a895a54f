"""Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685) of frozen projections.

A projection `y = x W + b` becomes `y = x W + b + (alpha / r) * dropout(x) A B`, with `A [in, r]`
drawn from U(+-1/sqrt(in)) (PEFT's Kaiming-uniform with a = sqrt 5) and `B [r, out]` zero, so that a
fresh adapter changes nothing. `W` and `b` are frozen; only A and B are trained and saved.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from affectgpt_jax.models.quantize import (
    Product,
    QuantizedKernel,
    frozen_dot,
    frozen_product,
    frozen_product_transposed,
    initializer,
)

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# An option of XLA's GPU compiler, which would join small matmuls of one input, such as those of a
# frozen kernel and of its adapter's A, or of q, k and v in a decode step, and copy what it joins.
SEPARATE_MATMULS = ("xla_gpu_dot_merger_threshold_mb", "0")
# What rematerialisation policies call a projection's result and its narrow product. The two wide
# products would be twice as much to keep as their sum.
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


class ProjectionWeights(NamedTuple):
    """What a linear layer multiplies with.

    Attributes:
        kernel: `[in, out]`, frozen.
        bias: `[out]`, frozen, or None.
        lora_a, lora_b: the adapter, `[in, r]` and `[r, out]` float32; None where it has none.
    """

    kernel: jax.Array | QuantizedKernel
    bias: jax.Array | None = None
    lora_a: jax.Array | None = None
    lora_b: jax.Array | None = None


def project(
    x: jax.Array,
    weights: Sequence[ProjectionWeights],
    scale: float,
    rate: float = 0.0,
    seeds: Sequence[jax.Array] | None = None,
) -> tuple[jax.Array, ...]:
    """`x W + b + scale * dropout(x) A B` of several projections of one input.

    Args:
        x: `[..., in]`.
        weights: of each projection.
        scale: alpha / r.
        rate, seeds: of `dropout`, a seed for each projection, as PEFT draws a mask for each; no
            dropout without seeds.

    Returns:
        `[..., out]` for each projection, in the dtype of `x`. Rematerialisation policies know them
        as `PROJECTED`.
    """
    seeds = [None] * len(weights) if seeds is None else seeds
    adapted = [i for i, w in enumerate(weights) if w.lora_a is not None]
    results: list[Any] = [None] * len(weights)
    if adapted:
        chosen = [weights[i] for i in adapted]
        found = _adapted(x, chosen, [seeds[i] for i in adapted], scale, rate)
        for i, y in zip(adapted, found, strict=True):
            results[i] = y
    for i, w in enumerate(weights):
        y = _with_bias(frozen_dot(x, w.kernel), w.bias) if results[i] is None else results[i]
        results[i] = checkpoint_name(y, PROJECTED)
    return tuple(results)


def _with_bias(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    return y if bias is None else y + bias.astype(y.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _adapted(
    x: jax.Array,
    weights: Sequence[ProjectionWeights],
    seeds: Sequence[jax.Array | None],
    scale: float,
    rate: float,
) -> list[jax.Array]:
    """`project` for projections that all have an adapter.

    A rank-16 product costs what reading its wide operand costs. So adapters of one input share its
    read, forward and in the gradients of A; with dropout, each has its own. The frozen product
    comes first in every sum, so that a GPU adds the narrow one to it in the same launch.

    Gradients are written out for three reasons: those sums; the masks, which are drawn again in the
    backward pass, since kept they and what they leave of `x` are a third of what a layer saves; and
    the gradients of A and B, which are summed over all tokens, and over all devices, in float32.
    """
    return _adapted_forward(x, weights, seeds, scale, rate)[0]


def _adapted_forward(x, weights, seeds, scale, rate):
    with jax.named_scope("low_rank"):  # by which profiles tell it from the frozen products
        narrow = [
            checkpoint_name(n * jnp.asarray(scale, x.dtype), PROJECTED)
            for n in _products_with_a(x, [w.lora_a for w in weights], seeds, rate)
        ]
    results = []
    for n, w in zip(narrow, weights, strict=True):
        frozen = frozen_product(x, w.kernel)
        with jax.named_scope("low_rank"):
            y = frozen.plus(n, w.lora_b.astype(x.dtype))
        results.append(_with_bias(y, w.bias))
    return results, (x, narrow, weights, seeds)


def _products_with_a(x, factors, seeds, rate):
    """`dropout(x) A` for every A."""
    factors = [a.astype(x.dtype) for a in factors]
    if any(seed is not None for seed in seeds):
        return [dropout(x, rate, seed) @ a for a, seed in zip(factors, seeds, strict=True)]
    return jnp.split(x @ jnp.concatenate(factors, axis=1), _ends(factors), axis=-1)


def _ends(factors: Sequence[jax.Array]) -> list[int]:
    """Where the columns of one A end and those of the next begin."""
    return np.cumsum([a.shape[1] for a in factors])[:-1].tolist()


def _adapted_backward(scale, rate, residuals, grads):
    x, narrow, weights, seeds = residuals
    # Without the barrier XLA sees that it drew these masks before, and keeps what is left of `x`.
    seeds = jax.lax.optimization_barrier(seeds)
    products = [frozen_product_transposed(g, w.kernel) for g, w in zip(grads, weights, strict=True)]
    # The frozen parts are added up first: where a device has a share of the outputs, XLA then sends
    # one sum to the others, and not each part.
    frozen = products[0]
    if len(products) > 1:
        frozen = Product(functools.reduce(jnp.add, [p.result(x.dtype) for p in products]))
    with jax.named_scope("low_rank"):
        factors = [w.lora_a.astype(x.dtype) for w in weights]
        grads_narrow = [
            g @ w.lora_b.T.astype(x.dtype) * jnp.asarray(scale, x.dtype)
            for g, w in zip(grads, weights, strict=True)
        ]
        if all(seed is None for seed in seeds):
            together = jnp.concatenate(grads_narrow, axis=-1)
            grad_x = frozen.plus(together, jnp.concatenate(factors, axis=1).T)
            grads_a = jnp.split(_over_tokens(together, x).T, _ends(factors), axis=1)
        else:
            grad_x, grads_a = frozen.result(x.dtype), []
            for few, a, seed in zip(grads_narrow, factors, seeds, strict=True):
                # Dropout is a product with its mask: its own transpose.
                grad_x = grad_x + dropout(few @ a.T, rate, seed)
                grads_a.append(_over_tokens(few, dropout(x, rate, seed)).T)
        grads_b = [_over_tokens(few, many) for few, many in zip(narrow, grads, strict=True)]
    nothing = [
        ProjectionWeights(
            kernel=None,
            lora_a=grad_a.astype(w.lora_a.dtype),
            lora_b=grad_b.astype(w.lora_b.dtype),
        )
        for w, grad_a, grad_b in zip(weights, grads_a, grads_b, strict=True)
    ]
    return grad_x, nothing, [None] * len(seeds)


_adapted.defvjp(_adapted_forward, _adapted_backward)


def _over_tokens(few: jax.Array, many: jax.Array) -> jax.Array:
    """`few^T many` `[r, n]` float32 for `[..., r]` and `[..., n]`; only `few` is transposed."""
    axes = tuple(range(few.ndim - 1))
    contracted = ((axes, axes), ((), ()))
    product = jax.lax.dot_general(few, many, contracted, preferred_element_type=jnp.float32)
    # Without the barrier XLA turns a transposed product into one of swapped operands, for which
    # CPUs have no fast kernel.
    return jax.lax.optimization_barrier(product)


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

    Computed in float32 or wider and rounded once to the kernel's dtype, where the kernel lies.

    Args:
        base: the `params` tree of a decoder, of kernels that are not quantized.
        lora: its `lora` tree.
        scale: alpha / r.

    Returns:
        The `params` tree; every other leaf is the same array.
    """
    layers = [dict(layer) for layer in base["layers"]]
    for name, factors in lora.get("layers", {}).items():
        for i, layer in enumerate(layers):
            kernel = layer[name]["kernel"]
            merged = _merged(kernel, factors["lora_a"], factors["lora_b"], i, scale)
            if isinstance(kernel, jax.Array):
                merged = jax.device_put(merged, kernel.sharding)
            layer[name] = {**layer[name], "kernel": merged}
    return {**base, "layers": tuple(layers)}


@functools.partial(jax.jit, static_argnames="scale")
def _merged(
    kernel: jax.Array, lora_a: jax.Array, lora_b: jax.Array, layer: jax.Array | int, scale: float
) -> jax.Array:
    """A kernel `[in, out]` with the adapter of its layer out of `[L, in, r]` and `[L, r, out]`."""
    wide = jnp.promote_types(kernel.dtype, jnp.float32)
    lora_a, lora_b = (x[layer].astype(wide) for x in (lora_a, lora_b))
    # A GPU's TF32 has three digits.
    added = jnp.matmul(lora_a * scale, lora_b, precision="highest")
    return (kernel + added).astype(kernel.dtype)


class Projection(nn.Module):
    """The weights of a linear layer: frozen `params` (kernel `[in, out]`, bias), and an optional
    adapter in the collection `lora`.

    Applied without that collection, the layer is the plain base model.
    """

    features: int
    use_bias: bool
    lora: LoraConfig | None
    param_dtype: jnp.dtype
    precision: str = ""  # of the kernel: one of quantize.PRECISIONS

    @nn.compact
    def __call__(self, width: int) -> ProjectionWeights:
        """The weights for inputs `[..., width]`."""
        init = initializer(nn.initializers.normal(0.02), self.precision)
        kernel = self.param("kernel", init, (width, self.features), self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        if self.lora is None or not (self.is_initializing() or self.has_variable("lora", "lora_a")):
            return ProjectionWeights(kernel, bias)
        rank = self.lora.rank
        lora_a = self.variable(
            "lora", "lora_a", lambda: kaiming_uniform(self.make_rng("lora"), (width, rank))
        ).value
        lora_b = self.variable(
            "lora", "lora_b", lambda: jnp.zeros((rank, self.features), jnp.float32)
        ).value
        return ProjectionWeights(kernel, bias, lora_a, lora_b)
