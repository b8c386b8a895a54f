"""Quantized kernels: how far they are from the true ones, and that products with them say so."""

import math
from statistics import NormalDist

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from tiny_model import LLM, make_batch, make_model, random_base, random_trainable

from affectgpt_jax.models.affectgpt import init_random_base, loss_sum_and_count
from affectgpt_jax.models.decoder import PUBLISHED, ComputeConfig, Decoder, init_base
from affectgpt_jax.models.quantize import (
    NF4,
    NF4_BLOCK,
    PRECISIONS,
    QuantizedKernel,
    dequantize,
    frozen_dot,
    quantize,
)

LOW = PRECISIONS[1:]
quantized = jax.jit(quantize, static_argnums=1)


def kernel_of(rows, columns, seed=0):
    """Normal weights, with a column of zeros, one of large weights, and an outlier."""
    kernel = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    kernel[:, 0] = 0
    kernel[:, 1] *= 1e4
    kernel[1, 2] = 50
    return kernel


def widened(kernel):
    return np.asarray(dequantize(kernel, jnp.float32), np.float64)


# --- Rounding -------------------------------------------------------------------------------------

# Weights whose 127th part is a normal number: XLA counts others as zero.
SIZES = st.floats(2.0**-100, 2.0**100, width=32)
WEIGHTS = SIZES | SIZES.map(lambda x: -x) | st.just(0.0)


@given(hnp.arrays(np.float32, (70, 3), elements=WEIGHTS))
def test_int8_is_off_by_half_a_step_at_most(kernel):
    found = quantized(kernel, "int8")
    assert found.values.dtype == jnp.int8 and found.scale.shape == (1, 3)
    assert np.abs(found.values.astype(int)).max() <= 127
    scale = np.asarray(found.scale, np.float64)
    # Half a step, and what float32 rounds of a quotient of up to 127 steps.
    assert (np.abs(widened(found) - kernel) <= scale * (0.5 + 127 * 2**-22)).all()


@given(hnp.arrays(np.float32, (70, 3), elements=WEIGHTS))
def test_fp8_rounds_to_the_nearest_float8(kernel):
    found = quantized(kernel, "fp8")
    assert found.values.dtype == jnp.float8_e4m3fn and found.scale.shape == (1, 3)
    scale = np.asarray(found.scale, np.float64)
    assert np.isfinite(widened(found)).all()
    # Three bits of mantissa: half of 2^-3 of a weight, or of the smallest step, 2^-9.
    bound = np.maximum(np.abs(kernel) * 2**-4, scale * 2**-10) * (1 + 1e-5)
    assert (np.abs(widened(found) - kernel) <= bound).all()
    unit = np.where(found.scale == 0, 1, found.scale)
    expected = (kernel / unit).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(np.asarray(found.values), expected)


def test_the_codes_of_nf4_are_quantiles_of_a_normal_distribution():
    """QLoRA's appendix E: eight quantiles above zero, seven below, zero, over the largest."""
    last = 1 - (1 / 30 + 1 / 32) / 2
    quantile = NormalDist().inv_cdf
    above = [quantile(p) for p in np.linspace(last, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(last, 0.5, 8)[:-1]]
    expected = np.array(sorted([*below, 0.0, *above])) / max(above)
    np.testing.assert_allclose(NF4, expected, atol=3e-7)  # the paper computed them in float32
    assert NF4.tolist()[::15] == [-1, 1] and NF4[7] == 0


@given(hnp.arrays(np.float32, (NF4_BLOCK + 6, 3), elements=WEIGHTS))
def test_nf4_takes_the_nearest_code_of_every_weight(kernel):
    found = quantized(kernel, "nf4")
    assert found.values.dtype == jnp.uint8 and found.values.shape == (35, 3)
    assert found.scale.dtype == jnp.bfloat16 and found.scale.shape == (2, 3)
    for block in (slice(0, NF4_BLOCK), slice(NF4_BLOCK, None)):
        scale = np.asarray(found.scale, np.float64)[block.start // NF4_BLOCK]
        largest = np.abs(kernel[block]).max(axis=0).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(scale, largest.astype(np.float64))
        scale[scale == 0] = 1
        off = np.abs(NF4 - (kernel[block] / scale)[..., None])
        # Next to a tie, float32 may choose the other one.
        chosen = np.abs(widened(found)[block] - kernel[block]) / scale
        np.testing.assert_allclose(chosen, off.min(axis=-1), atol=1e-6)


@pytest.mark.parametrize("rows", [2, NF4_BLOCK, 96, 3 * NF4_BLOCK])
@pytest.mark.parametrize("precision", LOW)
def test_a_stack_of_kernels_is_quantized_kernel_by_kernel(precision, rows):
    stack = np.stack([kernel_of(rows, 5, seed) for seed in range(3)])
    found = quantize(stack, precision)
    assert found.shape == stack.shape and found.precision == precision
    for i, kernel in enumerate(stack):
        alone = quantize(kernel, precision)
        jax.tree.map(lambda x, y, i=i: np.testing.assert_array_equal(x[i], y), found, alone)
    assert (widened(found)[..., 0] == 0).all()
    # The shares that Gaussian weights lose: a uniform error of 1/127 of the largest of some 200;
    # 2^-3 of a float's size; QLoRA's code in blocks of 64. An outlier costs its column more.
    lost = np.linalg.norm(widened(found) - stack, axis=1) / (np.linalg.norm(stack, axis=1) + 1e-9)
    bound = {"int8": 0.012, "fp8": 0.04, "nf4": 0.13}[precision]
    assert (lost[:, [1, 3, 4]] <= bound).all()


def test_a_kernel_that_cannot_be_packed_is_refused():
    with pytest.raises(ValueError, match="packs rows in pairs, but a kernel has 7"):
        quantize(jnp.ones((7, 4)), "nf4")


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match=r"base_precision is 'int3'; expected one of \('', 'int8'"):
        ComputeConfig(base_precision="int3")


@pytest.mark.parametrize("precision", LOW)
def test_what_is_not_finite_in_a_kernel_shows(precision):
    kernel = kernel_of(NF4_BLOCK, 4)
    kernel[5, 3] = np.nan
    found = widened(quantize(kernel, precision))
    assert np.isnan(found[5, 3]) and np.isfinite(found[:, :3]).all()


# --- Products -------------------------------------------------------------------------------------

# What rounding may take of a product with Gaussian inputs. Errors of single numbers, relative to
# their size: int8 steps by 1/127 of a token's largest value, 2 to 3 times its usual ones, so is off
# by 0.6 % of these; e4m3 steps by up to 2^-3 of any value, so is off by 2.6 %. NF4 rounds no input,
# and float32 sums are off by 1e-6.
ROUNDED = {"int8": 0.012, "fp8": 0.04, "nf4": 1e-5}
# The outlier's column has four times the scale of others, so that where its gradient is a token's
# largest, an integer's unit is four times as coarse for the others; a float's follows each number.
ROUNDED_BACK = ROUNDED | {"int8": 0.03}


def product_and_gradient(x, kernel, cotangent):
    product, pullback = jax.vjp(lambda x: frozen_dot(x, kernel), x)
    return product, pullback(cotangent)[0]


def share(found, expected):
    """Size of what is wrong, in units of the size of all."""
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("precision", LOW)
def test_a_product_and_its_gradient_are_those_of_the_widened_kernel(precision, dtype):
    rng = np.random.default_rng(0)
    kernel = quantize(kernel_of(96, 40), precision)
    wide = widened(kernel)
    size = np.linalg.norm(wide, axis=0) + 1
    # Tokens of very different sizes, and gradients too: every token has a scale of its own.
    sizes = 10.0 ** np.arange(-3, 3)[:, None]
    x = jnp.asarray(rng.normal(size=(2, 6, 96)) * sizes, dtype)
    cotangent = jnp.asarray(rng.normal(size=(2, 6, 40)) * sizes / size, dtype)
    product, gradient = jax.jit(product_and_gradient)(x, kernel, cotangent)
    assert product.dtype == gradient.dtype == dtype
    # bfloat16 rounds what goes in and comes out, and nf4's kernel, by up to 2^-9 of its size.
    slack = 0 if dtype == jnp.float32 else 0.005
    for token in np.ndindex(2, 6):
        x_token, cotangent_token = (np.asarray(v, np.float64)[token] for v in (x, cotangent))
        # The product's own columns differ in size by 1e4; each is judged in its own unit.
        forward = share(np.asarray(product, np.float64)[token] / size, x_token @ wide / size)
        assert forward < ROUNDED[precision] + slack
        backward = share(gradient[token], wide @ cotangent_token)
        assert backward < ROUNDED_BACK[precision] + slack


def test_an_int8_product_is_the_product_of_integers():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(5, 96)).astype(np.float32)
    kernel = quantize(kernel_of(96, 40), "int8")
    unit = np.abs(x).max(axis=1, keepdims=True) / 127
    integers = np.rint(x / unit).astype(np.int64) @ np.asarray(kernel.values, np.int64)
    expected = integers * np.float64(unit) * np.asarray(kernel.scale, np.float64)
    np.testing.assert_allclose(frozen_dot(x, kernel), expected, rtol=1e-6)


def test_a_float_kernel_is_multiplied_as_it_is():
    x, kernel = jnp.asarray(kernel_of(3, 96), jnp.bfloat16), jnp.asarray(kernel_of(96, 4))
    np.testing.assert_array_equal(frozen_dot(x, kernel), x @ kernel.astype(jnp.bfloat16))


@pytest.mark.parametrize("precision", LOW)
def test_an_input_that_is_not_finite_spoils_its_token_alone(precision):
    x = np.ones((3, 96), np.float32)
    x[1, 5] = np.nan
    product = np.asarray(frozen_dot(x, quantize(kernel_of(96, 4), precision)))
    assert np.isnan(product[1]).all() and np.isfinite(product[[0, 2]]).all()


# XLA has no fp8 product for CPUs, and widens all layers before the loop.
@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_the_backward_pass_keeps_no_widened_kernel(precision):
    layers, width = 16, 128
    kernels = jax.eval_shape(lambda: quantize(jnp.ones((layers, width, width)), precision))

    def loss(x, kernels):
        return jax.lax.scan(lambda x, k: (jnp.tanh(frozen_dot(x, k)), None), x, kernels)[0].sum()

    x = jax.ShapeDtypeStruct((2, width), jnp.float32)
    compiled = jax.jit(jax.grad(loss)).lower(x, kernels).compile()
    one = 4 * width * width
    # One layer's kernel in steps from codes to float32, and sixteen layers' small activations.
    assert compiled.memory_analysis().temp_size_in_bytes < 6 * one < layers * one / 2


# --- The decoder ----------------------------------------------------------------------------------


def quantize_base(base, precision):
    """A base as loading would quantize it."""

    def leaf(path, x):
        return quantize(x, precision) if path[-1].key == "kernel" else x

    return jax.tree_util.tree_map_with_path(leaf, base)


def is_quantized(node):
    return isinstance(node, QuantizedKernel)


def widen_base(base):
    def widen(node):
        return dequantize(node, jnp.float32) if is_quantized(node) else node

    return jax.tree.map(widen, base, is_leaf=is_quantized)


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("precision", LOW)
def test_the_gradient_of_adapters_is_that_of_a_widened_base(precision, remat):
    plain, low = make_model(), make_model(base_precision=precision, remat=remat)
    base = quantize_base(random_base(plain), precision)
    trainable, batch = random_trainable(plain), make_batch([16, 9])

    def gradient(model, base):
        loss = lambda trainable: loss_sum_and_count(model, base, trainable, batch)[0]  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(trainable)

    (loss, found), (expected_loss, expected) = (
        gradient(low, base),
        gradient(plain, widen_base(base)),
    )
    # Roundings of seven products and seven gradients a layer, two layers deep, of random sign, and
    # a narrow model has no averages to hide them in.
    bound = {"int8": 0.05, "fp8": 0.3, "nf4": 1e-4}[precision]
    assert abs(loss - expected_loss) / expected_loss < bound / 10
    flat = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (found, expected))
    assert share(*flat) < bound


def abstract_base(precision, llm=LLM, dtype=jnp.float32):
    run = ComputeConfig(dtype=dtype, param_dtype=dtype, base_precision=precision)
    return jax.eval_shape(lambda key: init_base(Decoder(llm, None, run), key), jax.random.key(0))


def test_a_quantized_base_has_the_names_and_the_shapes_of_a_plain_one():
    plain, low = (
        jax.tree_util.tree_leaves_with_path(abstract_base(precision), is_leaf=is_quantized)
        for precision in ("", "nf4")
    )
    assert [(path, leaf.shape) for path, leaf in low] == [(p, leaf.shape) for p, leaf in plain]
    kernels = [path for path, leaf in low if is_quantized(leaf)]
    assert len(kernels) == 7 * LLM.num_hidden_layers and all(
        path[-1].key == "kernel" for path in kernels
    )


def test_a_random_quantized_base_is_a_random_base_quantized():
    def start(model):
        return jax.jit(lambda key: init_random_base(model, key))(jax.random.key(3))["layers"]

    plain, low = start(make_model()), start(make_model(base_precision="int8"))
    for quantized_layer, layer in zip(low, plain, strict=True):
        for name in ("q_proj", "down_proj"):
            found, expected = quantized_layer[name]["kernel"], np.asarray(layer[name]["kernel"])
            assert (np.abs(widened(found) - expected) <= 0.51 * np.asarray(found.scale)).all()


@pytest.mark.parametrize(
    ("precision", "per_weight", "per_output"), [("", 2, 0), ("int8", 1, 4), ("fp8", 1, 4)]
)
def test_the_7b_base_takes_as_many_bytes_as_its_format_says(precision, per_weight, per_output):
    assert held_by_7b(precision) == 28 * (233_046_016 * per_weight + 49_664 * per_output) + REST


def test_the_7b_base_takes_four_and_a_quarter_bits_a_weight_in_nf4():
    assert held_by_7b("nf4") == 28 * 233_046_016 * 4.25 / 8 + REST


# Of Qwen2.5-7B: weights and outputs of a layer's projections, counted by hand, and the bytes of all
# else in bfloat16: embedding and head, q-k-v biases, norms.
assert 3584 * (3584 + 512 + 512 + 3584 + 3 * 18944) == 233_046_016
assert 3584 + 512 + 512 + 3584 + 18944 + 18944 + 3584 == 49_664
REST = 2 * (2 * 152064 * 3584 + 28 * (3584 + 2 * 512 + 2 * 3584) + 3584)


def held_by_7b(precision):
    shapes = abstract_base(precision, PUBLISHED["Qwen2.5-7B-Instruct"], jnp.bfloat16)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
