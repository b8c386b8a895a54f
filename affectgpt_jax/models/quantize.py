"""Frozen kernels in 8 or 4 bits, and matmuls with them.

    int8   8-bit integers; activations and gradients too, so that products run on integer units
    fp8    float8 e4m3 in the same way, for GPUs from Hopper on
    nf4    QLoRA's 4-bit NormalFloat (arXiv 2305.14314), widened to the activations' dtype where it
           is used: a quarter of bfloat16's memory, for the speed of bfloat16 at best

Every output of an int8 or fp8 kernel has a scale, and so has every token of what it is multiplied
with. With scales that fine, gradients need neither more bits than int8 (SwitchBack, arXiv
2304.13013) nor e5m2's range (DeepSeek-V3, arXiv 2412.19437).

A kernel is quantized once, when it is loaded, and never trained, so a product needs one derivative:
that by its input. It is written out, since autodiff would keep every layer's widened kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# What holds the values of each; two 4-bit codes share a byte.
_DTYPES = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn, "nf4": jnp.uint8}
PRECISIONS = ("", *_DTYPES)  # "" keeps a kernel as it is

# Quantiles of a normal distribution, scaled to [-1, 1], zero among them (QLoRA, appendix E).
NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
# Weights that share a scale. The scales are bfloat16: 4.25 bits a weight. QLoRA quantizes them once
# more and gets 4.13, which of a 7B model would be 0.1 of 5.7 GB.
NF4_BLOCK = 64
# So small that what has it counts as 0, and so far above float32's least number that what is
# divided by it stays finite.
_LEAST_SCALE = 1e-30


class QuantizedKernel(NamedTuple):
    """A kernel `[..., in, out]` as low-bit numbers and their scales.

    Attributes:
        values: `[..., in, out]` int8 or float8_e4m3fn, or `[..., in / 2, out]` uint8, which holds
            the codes of rows 2i and 2i + 1 in its low and high bits.
        scale: `[..., blocks, out]`: one block of all rows, float32, or blocks of `NF4_BLOCK` rows,
            bfloat16.
    """

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel that this represents."""
        *lead, rows, columns = self.values.shape
        return (*lead, rows * (2 if self.precision == "nf4" else 1), columns)

    @property
    def precision(self) -> str:
        """The precision, one of `PRECISIONS`."""
        return next(name for name, dtype in _DTYPES.items() if self.values.dtype == dtype)


def quantize(kernel: jax.Array, precision: str) -> QuantizedKernel:
    """The nearest `QuantizedKernel` to a kernel `[..., in, out]` of any float dtype.

    Args:
        kernel: what to quantize.
        precision: one of `PRECISIONS` but "".

    Raises:
        ValueError: an odd number of rows for "nf4", which packs two into a byte.
    """
    kernel = kernel.astype(jnp.float32)
    if precision == "nf4":
        return _quantize_nf4(kernel)
    return QuantizedKernel(*_scaled(kernel, _DTYPES[precision], axis=-2))


def _scaled(x: jax.Array, dtype: Any, axis: int) -> tuple[jax.Array, jax.Array]:
    """`x` as numbers of a dtype, times one float32 scale for every slice along `axis`."""
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis, keepdims=True)
    integers = jnp.issubdtype(dtype, jnp.integer)
    limit = float((jnp.iinfo if integers else jnp.finfo)(dtype).max)
    # NaN and infinity go into the scale, and so into every product.
    scale = jnp.maximum(largest / limit, _LEAST_SCALE)
    x = x / scale
    return (jnp.rint(x) if integers else x).astype(dtype), scale


def _divide(x: jax.Array, scale: jax.Array) -> jax.Array:
    """`x / scale`, and 0 where the scale is 0."""
    return x / jnp.where(scale == 0, 1, scale)


def _quantize_nf4(kernel: jax.Array) -> QuantizedKernel:
    *lead, rows, columns = kernel.shape
    if rows % 2:
        raise ValueError(f"nf4 packs rows in pairs, but a kernel has {rows} of them")
    filler = [(0, 0)] * len(lead) + [(0, -rows % NF4_BLOCK), (0, 0)]
    blocks = jnp.pad(kernel, filler).reshape(*lead, -1, NF4_BLOCK, columns)
    scale = jnp.max(jnp.abs(blocks), axis=-2).astype(jnp.bfloat16)
    blocks = _divide(blocks, scale[..., None, :].astype(jnp.float32))
    between = (NF4[1:] + NF4[:-1]) / 2
    codes = jnp.searchsorted(between, blocks, method="compare_all").astype(jnp.uint8)
    pairs = codes.reshape(*lead, -1, 2, columns)[..., : rows // 2, :, :]
    return QuantizedKernel(pairs[..., 0, :] | pairs[..., 1, :] << 4, scale)


def dequantize(kernel: QuantizedKernel, dtype: Any) -> jax.Array:
    """The kernel `[..., in, out]` that a quantized one represents."""
    values, scale = kernel.values, kernel.scale.astype(jnp.float32)
    if kernel.precision == "nf4":
        pairs = jnp.stack([values & 15, values >> 4], axis=-2)
        values = jnp.asarray(NF4)[pairs.reshape(kernel.shape)]
        scale = jnp.repeat(scale, NF4_BLOCK, axis=-2)[..., : kernel.shape[-2], :]
    return (values.astype(jnp.float32) * scale).astype(dtype)


def initializer(init: Callable[..., jax.Array], precision: str) -> Callable[..., Any]:
    """An initialiser of kernels whose values come quantized; with "" the one that is given."""
    if not precision:
        return init
    return lambda *args: quantize(init(*args), precision)


class Product(NamedTuple):
    """A matmul whose result is `values * rows * columns`.

    What a low-bit matmul writes is scaled only afterwards. Whoever adds to it may do so before, so
    that no array of its width is passed over for the scales alone.

    Attributes:
        values: `[..., out]`.
        rows: `[..., 1]` float32, or None for ones.
        columns: `[1, out]` float32, or None for ones.
    """

    values: jax.Array
    rows: jax.Array | None = None
    columns: jax.Array | None = None

    def plus(self, narrow: jax.Array, factor: jax.Array) -> jax.Array:
        """The result plus `narrow @ factor`, `[..., r]` times `[r, out]`, in the narrow's dtype."""
        dtype = narrow.dtype
        for_rows, for_columns = (
            1 if scale is None else 1 / scale for scale in (self.rows, self.columns)
        )
        narrow, factor = (narrow * for_rows).astype(dtype), (factor * for_columns).astype(dtype)
        return self._replace(values=self.values.astype(dtype) + narrow @ factor).result(dtype)

    def result(self, dtype: Any) -> jax.Array:
        """The result `[..., out]`."""
        if self.rows is None and self.columns is None:
            return self.values.astype(dtype)
        scales = (scale for scale in (self.rows, self.columns) if scale is not None)
        found = self.values.astype(jnp.float32)
        for scale in scales:
            found *= scale
        return found.astype(dtype)


def frozen_dot(x: jax.Array, kernel: jax.Array | QuantizedKernel) -> jax.Array:
    """`x @ kernel` for `[..., in]` and a frozen kernel `[in, out]`, in the dtype of `x`.

    With an "int8" or "fp8" kernel, every token of `x` is rounded to the kernel's format by a scale
    of its own, and in the backward pass so is every token of the gradient.
    """
    if isinstance(kernel, QuantizedKernel):
        return _quantized_dot(x, kernel)
    return x @ kernel.astype(x.dtype)


@jax.custom_vjp
def _quantized_dot(x: jax.Array, kernel: QuantizedKernel) -> jax.Array:
    return frozen_product(x, kernel).result(x.dtype)


def _forward(x, kernel):
    return _quantized_dot(x, kernel), kernel


def _backward(kernel, grad):
    return frozen_product_transposed(grad, kernel).result(grad.dtype), None


_quantized_dot.defvjp(_forward, _backward)


def frozen_product(x: jax.Array, kernel: jax.Array | QuantizedKernel) -> Product:
    """`frozen_dot` before its scales are applied; not to be differentiated."""
    if not isinstance(kernel, QuantizedKernel):
        return Product(x @ kernel.astype(x.dtype))
    if kernel.precision == "nf4":
        return Product(x @ dequantize(kernel, x.dtype))
    values, rows = _rounded_dot(x, kernel.values, 0, x.dtype)
    return Product(values, rows, kernel.scale)


def frozen_product_transposed(grad: jax.Array, kernel: jax.Array | QuantizedKernel) -> Product:
    """The gradient of `frozen_dot` by `x`, `grad @ kernel^T` for `[..., out]`, in the same form."""
    # Without the barrier XLA keeps what the forward pass has made of every layer's kernels, widened
    # from nf4 or gathered under fsdp, which are to save just that.
    kernel = jax.lax.optimization_barrier(kernel)
    if not isinstance(kernel, QuantizedKernel):
        return Product(grad @ kernel.T.astype(grad.dtype))
    if kernel.precision == "nf4":
        return Product(grad @ dequantize(kernel, grad.dtype).T)
    # The sum runs over the outputs here, so their scales go to the gradient.
    scaled = grad.astype(jnp.float32) * kernel.scale
    return Product(*_rounded_dot(scaled, kernel.values, 1, grad.dtype))


def _rounded_dot(
    x: jax.Array, values: jax.Array, axis: int, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """`x` `[..., n]` times a matrix, summed over the matrix's `axis`, and the scale of every row.

    Every token of `x` is rounded to the matrix's dtype, so that the hardware multiplies numbers of
    one kind. Products of integers are int32; those of float8 are sums in float32, rounded to
    `dtype`, whose range holds them.
    """
    x, scale = _scaled(x, values.dtype, axis=-1)
    wide = jnp.int32 if values.dtype == jnp.int8 else dtype
    contracted = (((x.ndim - 1,), (axis,)), ((), ()))
    return jax.lax.dot_general(x, values, contracted, preferred_element_type=wide), scale
