"""Attention backends against NumPy in float64; on a GPU (JAX_PLATFORMS=cuda) the cuDNN ones too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax._src.cudnn import fused_attention_stablehlo as private

from affectgpt_jax import build, cpu
from affectgpt_jax.config import ConfigError
from affectgpt_jax.configs import affectgpt_qwen25_7b
from affectgpt_jax.models import attention, cudnn_packed
from affectgpt_jax.models.attention import choose
from affectgpt_jax.models.decoder import PUBLISHED, DecoderConfig
from affectgpt_jax.training.devices import DEVICES

MAX_SEGMENTS = 8
HOPPER, AMPERE = (9, 0), (8, 0)
SMALL = DecoderConfig(16, 16, 16, 1, num_attention_heads=2, num_key_value_heads=1, head_dim=8)


def backend(name, packed):
    """A backend and its dtype, or a skip where the machine cannot run it."""
    if name.startswith("xla"):
        return choose(name, "cpu", (0, 0), 64, "float32", packed).attend, jnp.float32
    platform = build.device_platform()
    capability = build.compute_capability() if platform == "cuda" else (0, 0)
    try:
        found = choose(name, platform, capability, 64, "bfloat16", packed)
    except ValueError as error:
        pytest.skip(f"no GPU for this backend: {error}")
    return found.for_rows_of(MAX_SEGMENTS), jnp.bfloat16


def reference(query, key, value, segment_ids, cotangent):
    """Output and gradients of causal attention within segments, in float64, head by head."""
    query, key, value, cotangent = (
        np.asarray(x).astype(np.float64) for x in (query, key, value, cotangent)
    )
    batch, length, heads, width = query.shape
    group = heads // key.shape[2]
    out, d_query = np.zeros_like(query), np.zeros_like(query)
    d_key, d_value = np.zeros_like(key), np.zeros_like(value)
    for b in range(batch):
        allowed = np.tril(segment_ids[b][:, None] == segment_ids[b][None, :])
        for h in range(heads):
            q, k, v = query[b, :, h], key[b, :, h // group], value[b, :, h // group]
            scores = np.where(allowed, q @ k.T / np.sqrt(width), -np.inf)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            out[b, :, h] = weights @ v
            g = cotangent[b, :, h]
            d_weights = g @ v.T
            d_scores = weights * (d_weights - (weights * d_weights).sum(axis=1, keepdims=True))
            d_query[b, :, h] = d_scores @ k / np.sqrt(width)
            d_key[b, :, h // group] += d_scores.T @ q / np.sqrt(width)
            d_value[b, :, h // group] += weights.T @ g
    return out, d_query, d_key, d_value


@functools.partial(jax.jit, static_argnums=0)
def forward_and_backward(attend, query, key, value, segment_ids, cotangent):
    out, vjp = jax.vjp(lambda *qkv: attend(*qkv, segment_ids), query, key, value)
    return out, *vjp(cotangent)


def inputs(batch, length, heads, kv_heads, width, dtype):
    rng = np.random.default_rng(length)
    shapes = [(batch, length, n, width) for n in (heads, kv_heads, kv_heads, heads)]
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def assert_equal_reference(attend, dtype, shape, segment_ids):
    query, key, value, cotangent = inputs(*shape, dtype)
    real = (segment_ids > 0)[:, :, None, None]
    # No loss reads padding, so its outputs have no gradient.
    cotangent = jnp.where(real, cotangent, 0)
    found = forward_and_backward(attend, query, key, value, jnp.asarray(segment_ids), cotangent)
    expected = reference(query, key, value, segment_ids, cotangent)
    # Sums over up to 300 keys in float32 are good to 1e-6; in bfloat16 the weights themselves are
    # rounded to 2^-9.
    bound = 1e-5 if dtype == jnp.float32 else 2e-2
    for name, f, e in zip(("output", "query", "key", "value"), found, expected, strict=True):
        difference = np.where(real, np.asarray(f, np.float64) - e, 0)
        assert np.linalg.norm(difference) <= bound * max(np.linalg.norm(e), 1), name
    # What padding holds flows into the next layer's products: zero, or at least finite.
    assert all(np.isfinite(np.asarray(f, np.float32)).all() for f in found)


def segment_row(ends, length):
    """Segment ids of samples 1, 2... that end at these tokens, then padding."""
    ids = np.repeat(np.arange(len(ends)) + 1, np.diff([0, *ends]))
    return np.pad(ids, (0, length - len(ids))).astype(np.int32)


def rows(length):
    """Segment ids of a row: up to six samples of any lengths, then padding; or padding alone."""
    ends = st.sets(st.integers(1, length), max_size=6)
    return ends.map(lambda found: segment_row(sorted(found), length))


# Batch, tokens, heads, key heads, width: grouping 1, 2, 4 and 7, odd lengths, more than one block.
SHAPES = [(2, 1, 2, 2, 64), (2, 37, 4, 1, 64), (2, 131, 7, 1, 64), (2, 300, 4, 2, 64)]


@pytest.mark.parametrize("name", ["xla", "cudnn_masked", "cudnn_packed"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_rows_equal_float64_forward_and_backward(name, shape):
    attend, dtype = backend(name, packed=True)

    @settings(max_examples=8)
    @given(st.tuples(rows(shape[1]), rows(shape[1])))
    def check(segment_ids):
        assert_equal_reference(attend, dtype, shape, np.stack(segment_ids))

    check()


@pytest.mark.parametrize("name", ["xla", "cudnn", "cudnn_masked", "cudnn_packed"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_padded_rows_equal_float64_forward_and_backward(name, shape):
    attend, dtype = backend(name, packed=name in ("cudnn_masked", "cudnn_packed"))
    length = st.integers(0, shape[1])

    @settings(max_examples=6)
    @example((shape[1], 0))
    @given(st.tuples(length, length))
    def check(lengths):
        segment_ids = (np.arange(shape[1]) < np.array(lengths)[:, None]).astype(np.int32)
        assert_equal_reference(attend, dtype, shape, segment_ids)

    check()


CACHES = [(4, 1), (4, 37), (8, 128), (11, 400)]  # rows and slots


@pytest.mark.parametrize("attend", [attention.cached, cpu.attend_by_row])
@pytest.mark.parametrize(("batch", "slots"), CACHES)
def test_cached_attention_equals_float64(attend, batch, slots):
    heads, kv_heads, width = 4, 2, 16
    rng = np.random.default_rng(slots)
    query = rng.standard_normal((batch, 1, heads, width))
    keys, values = rng.standard_normal((2, batch, kv_heads, slots, width))
    cached = jax.jit(attend)
    of_row = st.sets(st.integers(0, slots - 1), min_size=1)

    @settings(max_examples=8)
    @given(st.lists(of_row, min_size=batch, max_size=batch))
    def check(readable):
        mask = np.zeros((batch, slots), bool)
        for row, at in zip(mask, readable):
            row[list(at)] = True
        given = (jnp.asarray(x, jnp.float32) for x in (query, keys, values))
        found = cached(*given, mask)
        key, value = (np.repeat(x, 2, axis=1) for x in (keys, values))
        scores = np.einsum("bhd,bhsd->bhs", query[:, 0], key) / np.sqrt(width)
        weights = scipy.special.softmax(np.where(mask[:, None], scores, -np.inf), axis=-1)
        expected = np.einsum("bhs,bhsd->bhd", weights, value)
        # Sums over up to 400 slots in float32.
        np.testing.assert_allclose(found[:, 0], expected, atol=1e-5)

    check()


@pytest.mark.parametrize("name", ["xla", "cudnn_masked", "cudnn_packed"])
def test_packed_equals_unpacked_forward_and_backward(name):
    attend, dtype = backend(name, packed=True)
    lengths = (101, 50, 140)
    ends = np.cumsum(lengths)
    packed_ids = segment_row(ends, 300)[None]
    query, key, value, cotangent = inputs(1, 300, 4, 2, 64, dtype)
    cotangent = jnp.where((packed_ids > 0)[:, :, None, None], cotangent, 0)
    packed = forward_and_backward(attend, query, key, value, jnp.asarray(packed_ids), cotangent)
    for start, end in zip(ends - lengths, ends, strict=True):
        own = (x[:, start:end] for x in (query, key, value))
        ones = jnp.ones((1, end - start), jnp.int32)
        alone = forward_and_backward(attend, *own, ones, cotangent[:, start:end])
        for p, a in zip(packed, alone, strict=True):
            # The same sums over other block boundaries.
            bound = 1e-5 if dtype == jnp.float32 else 2e-2
            difference = np.asarray(p[:, start:end], np.float32) - np.asarray(a, np.float32)
            assert np.linalg.norm(difference) <= bound * np.linalg.norm(np.asarray(a, np.float32))


# Segment ids [2, 300] whose segments do not follow each other in order.
UNORDERED = {
    name: np.stack([row, np.roll(row, 17)]).astype(np.int32)
    for name, row in {
        "descending": 9 - segment_row((90, 130, 290), 300),
        "in turns": np.arange(300) % 3 + 1,
        "with holes": np.where(np.arange(300) % 7 == 0, 0, segment_row((100, 300), 300)),
    }.items()
}


@pytest.mark.parametrize("ids", UNORDERED)
def test_xla_asks_no_order_of_segments(ids):
    assert_equal_reference(attention.causal, jnp.float32, (2, 300, 4, 2, 64), UNORDERED[ids])


def test_xla_keeps_no_square_of_scores_for_the_backward_pass():
    length, heads = 1024, 2

    def layers(query):
        def layer(x, _):
            ids = jnp.ones((1, length), jnp.int32)
            return attention.causal(x, x, x, ids), None

        return jax.lax.scan(layer, query, length=16)[0].sum()

    shape = jax.ShapeDtypeStruct((1, length, heads, 8), jnp.float32)
    compiled = jax.jit(jax.grad(layers)).lower(shape).compile()
    square = heads * length * length * 4
    # Kept, the weights alone of 16 layers would be 9 squares: 16 times what is not in the future.
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * square


# --- cuDNN without a GPU: what it is given, and what that means ------------------------------


def emulated_cudnn(query, key, value, q_seqlen, kv_seqlen, q_offsets, kv_offsets, **options):
    """What cuDNN computes from JAX's arguments: JAX's own conversion, then attention over memory.

    Every segment is `length` tokens from an element offset on, in the flat memory of the tensors.
    What no segment covers is not written, so it is NaN.
    """
    assert options["mask_type"] == private.MaskType.PADDING_CAUSAL
    assert options["qkv_layout"] == "BTNH"
    q_seqlen, kv_seqlen, q_offsets, kv_offsets = (
        np.asarray(x).ravel()
        for x in private._fix_seqlen_offsets(q_seqlen, kv_seqlen, q_offsets, kv_offsets, query, key)
    )
    heads, width = query.shape[2:]
    kv_heads = key.shape[2]
    flat_q, flat_k, flat_v = (np.asarray(x, np.float64).ravel() for x in (query, key, value))
    out = np.full(query.size, np.nan)
    for i, (n, m) in enumerate(zip(q_seqlen, kv_seqlen, strict=True)):
        assert n == m
        q = flat_q[q_offsets[i] :][: n * heads * width].reshape(1, n, heads, width)
        k, v = (
            x[kv_offsets[i] :][: m * kv_heads * width].reshape(1, m, kv_heads, width)
            for x in (flat_k, flat_v)
        )
        if n:
            attended = reference(q, k, v, np.ones((1, n)), np.zeros(q.shape))[0]
            out[q_offsets[i] :][: n * heads * width] = attended.ravel()
    return jnp.asarray(out.reshape(query.shape), query.dtype)


@pytest.mark.parametrize("heads,kv_heads", [(2, 2), (4, 2), (7, 1)])
def test_packed_layout_as_cudnn_reads_it_is_attention_within_segments(monkeypatch, heads, kv_heads):
    monkeypatch.setattr(private, "dot_product_attention", emulated_cudnn)
    attend = attention.packed_rows(MAX_SEGMENTS)

    @settings(max_examples=15)
    @given(st.lists(rows(23), min_size=3, max_size=3))
    def check(segment_ids):
        segment_ids = np.stack(segment_ids)
        query, key, value, cotangent = inputs(3, 23, heads, kv_heads, 8, jnp.float32)
        expected = reference(query, key, value, segment_ids, cotangent)[0]
        found = attend(query, key, value, jnp.asarray(segment_ids))
        np.testing.assert_allclose(found, expected, atol=1e-5)  # one rounding to float32

    check()


def test_segments_are_found_with_their_offsets_and_lengths():
    segment_ids = jnp.array([[1, 1, 2, 3, 3, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
    found = cudnn_packed.find_segments(segment_ids, 4)
    expected = [[0, 2, 3, 5, -1], [0, -1, -1, -1, -1], [0, -1, -1, -1, -1]]
    np.testing.assert_array_equal(found.offsets, expected)
    np.testing.assert_array_equal(found.lengths, [[2, 1, 2, 1], [6, -1, -1, -1], [6, -1, -1, -1]])
    assert found.offsets.dtype == found.lengths.dtype == jnp.int32
    assert found.fit.all()


@pytest.mark.parametrize("length", [3, 9])
def test_rows_with_room_for_more_segments_than_tokens_are_found(length):
    found = cudnn_packed.find_segments(jnp.arange(length)[None], 12)
    np.testing.assert_array_equal(found.lengths[0], [1] * length + [-1] * (12 - length))


@pytest.mark.parametrize(
    "row", [[1, 2, 3, 4, 5, 0], [1, 1, 2, 2, 1, 1]], ids=["too many", "split in two"]
)
def test_a_row_that_the_packed_layout_cannot_express_gives_nan_and_no_other_row(monkeypatch, row):
    monkeypatch.setattr(private, "dot_product_attention", emulated_cudnn)
    query, key, value, _ = inputs(2, 6, 2, 2, 8, jnp.float32)
    out = attention.packed_rows(4)(query, key, value, jnp.array([row, [1, 1, 1, 2, 2, 0]]))
    assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()


@pytest.fixture
def cudnn_by_xla(monkeypatch):
    """`jax.nn.dot_product_attention` with its XLA implementation, whatever is asked for."""
    whole = jax.nn.dot_product_attention

    def attend(*args, implementation, **options):
        assert implementation == "cudnn"
        return whole(*args, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)


def test_what_cudnn_is_asked_is_causal_attention_within_each_length(cudnn_by_xla):
    segment_ids = (np.arange(37) < np.array([37, 12])[:, None]).astype(np.int32)
    assert_equal_reference(attention.cudnn, jnp.float32, (2, 37, 4, 2, 8), segment_ids)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_cudnn_is_asked_with_a_mask_is_attention_within_segments(cudnn_by_xla, shape):
    @settings(max_examples=8)
    @given(st.tuples(rows(shape[1]), rows(shape[1])))
    def check(segment_ids):
        assert_equal_reference(attention.cudnn_masked, jnp.float32, shape, np.stack(segment_ids))

    check()


@pytest.mark.parametrize("ids", UNORDERED)
def test_a_mask_asks_no_order_of_segments(cudnn_by_xla, ids):
    shape = (2, 300, 4, 2, 64)
    assert_equal_reference(attention.cudnn_masked, jnp.float32, shape, UNORDERED[ids])


@pytest.mark.parametrize(
    "row", [[1, 1, 2, 2, 0, 0], [0, 0, 1, 1, 1, 1], [1, 0, 1, 0, 0, 0]], ids=str
)
def test_a_row_that_lengths_cannot_express_gives_nan_and_no_other_row(cudnn_by_xla, row):
    query, key, value, _ = inputs(2, 6, 2, 2, 8, jnp.float32)
    out = attention.cudnn(query, key, value, jnp.array([row, [2, 2, 2, 2, 0, 0]]))
    real = np.array(row) > 0
    assert np.isnan(out[0, real]).any() and np.isfinite(out[1]).all()


@pytest.fixture
def lower_for(monkeypatch):
    """Makes JAX believe in a GPU of a compute capability, with cuDNN 9.10; enough to lower for."""

    def believe(capability):
        asked = {
            "check_cudnn_version": lambda: 91000,
            "check_compute_capability": lambda text: capability >= version(text),
            "is_cuda_compute_capability_equal": lambda text: capability == version(text),
        }
        for name, answer in asked.items():
            monkeypatch.setattr(private, name, answer)

    def version(text):
        return tuple(map(int, text.split(".")))

    return believe


def cudnn_calls(attend, batch, length, heads, kv_heads, width):
    """The lines of the forward and the backward call in StableHLO for CUDA."""
    shapes = [(batch, length, n, width) for n in (heads, kv_heads, kv_heads, heads)]
    query, key, value, cotangent = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes)
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    traced = forward_and_backward.trace(attend, query, key, value, ids, cotangent)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "__cudnn$fmha" in line]
    [forward] = [line for line in calls if "Backward(" not in line]
    [backward] = [line for line in calls if "Backward(" in line]
    return forward, backward


def test_cudnn_lowers_to_flash_attention_with_the_heads_of_the_base(lower_for):
    lower_for(AMPERE)
    for call in cudnn_calls(attention.cudnn, 2, 256, 28, 4, 128):
        assert "PADDING_CAUSAL" in call
        assert "tensor<2x256x28x128xbf16>, tensor<2x256x4x128xbf16>" in call
        assert call.count("tensor<2xi32>") == 2  # one length of query and key per row


@pytest.mark.parametrize("capability", [AMPERE, HOPPER], ids=str)
def test_a_mask_lowers_to_flash_attention_that_skips_the_future(lower_for, capability):
    lower_for(capability)
    forward, backward = cudnn_calls(attention.cudnn_masked, 2, 256, 28, 4, 128)
    for call in (forward, backward):
        assert "fmhaScaleBiasSoftmax" in call
        assert "CAUSAL" in call and "PADDING" not in call
        assert "tensor<2x256x28x128xbf16>, tensor<2x256x4x128xbf16>" in call
        assert "tensor<2x1x256x256xbf16>" in call.split("->")[0]  # one for all heads
    assert "tensor<2x28x256xf32>" in forward.split("->")[-1]  # what the backward pass keeps
    # Older versions ask cuDNN for a gradient of the mask as well (jax-ml/jax pull request 39512).
    if jax.__version_info__ >= (0, 12):
        assert "2x1x256x256" not in backward.split("->")[-1]


def test_a_mask_lowers_for_rows_of_odd_length(lower_for):
    lower_for(AMPERE)
    for call in cudnn_calls(attention.cudnn_masked, 2, 131, 7, 1, 64):
        assert "tensor<2x1x132x132xbf16>" in call  # cuDNN's backward pass refuses 131


def test_packed_lowers_to_flash_attention_with_lengths_and_offsets(lower_for):
    lower_for(HOPPER)
    forward, backward = cudnn_calls(attention.packed_rows(7), 2, 256, 28, 4, 128)
    # jax 0.10 counts key offsets by query heads, so key heads are repeated there.
    kv_heads = 4 if cudnn_packed._strides_of_key() else 28
    for call in (forward, backward):
        assert "PADDING_CAUSAL" in call
        assert f"tensor<2x256x28x128xbf16>, tensor<2x256x{kv_heads}x128xbf16>" in call
        # Seven samples and padding; offsets have one column more.
        assert call.count("tensor<2x8xi32>") == 2 and call.count("tensor<2x9xi32>") == 2
    assert "tensor<16x28x256xf32>" in forward.split("->")[-1]  # what the backward pass keeps


@pytest.mark.gpu_compile
@pytest.mark.parametrize(
    ("device", "name"),
    [("a100-80g", "cudnn_masked"), ("h100-80g", "cudnn_masked"), ("h100-80g", "cudnn_packed")],
)
def test_packed_rows_compile_for_gpus_that_are_not_here(device, name):
    try:
        from affectgpt_jax.training import gpu_compile

        unavailable = gpu_compile.unavailable()
    except ImportError:
        unavailable = "XLA's CUDA compiler is not installed"
    if unavailable:
        pytest.skip(unavailable)
    capability = DEVICES[device].compute_capability
    attend = choose(name, "cuda", capability, 128, "bfloat16", packed=True).for_rows_of(7)
    place = jax.sharding.SingleDeviceSharding(gpu_compile.devices(device, 1)[0])

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    query, key = shape(2, 512, 28, 128), shape(2, 512, 4, 128)
    ids = shape(2, 512, dtype=jnp.int32)
    with gpu_compile.in_place_of_local_gpu(capability):
        lowered = forward_and_backward.lower(attend, query, key, key, ids, query)
    text = lowered.compile().as_text()
    assert text.count('custom_call_target="__cudnn$fmha') == 2
    # Scores of all pairs of tokens, for every head, are nowhere.
    assert "28,512,512]" not in text and "4,7,512,512]" not in text


# --- the choice ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where,packed,name,reason",
    [
        (("cpu", (0, 0), 128, "float32"), False, "xla", "NVIDIA GPU, and this is cpu"),
        (("rocm", (0, 0), 128, "bfloat16"), True, "xla", "NVIDIA GPU, and this is rocm"),
        (("cuda", (7, 5), 128, "bfloat16"), False, "xla", "8.0 (Ampere), and this GPU has 7.5"),
        (("cuda", HOPPER, 128, "float32"), False, "xla", "bfloat16 or float16, not in float32"),
        (("cuda", AMPERE, 256, "bfloat16"), False, "xla", "heads of up to 128"),
        (("cuda", HOPPER, 68, "bfloat16"), False, "xla", "in steps of 8"),
        (("cuda", AMPERE, 128, "bfloat16"), True, "cudnn_masked", "not cudnn_packed: packed rows"),
        (("cuda", AMPERE, 128, "bfloat16"), False, "cudnn", "rows of one sample"),
        (("cuda", HOPPER, 256, "float16"), False, "cudnn", "rows of one sample"),
        (("cuda", HOPPER, 128, "bfloat16"), True, "cudnn_packed", "rows of several samples"),
        (("cpu", (0, 0), 128, "float32"), True, "xla", "not cudnn_packed: it needs an NVIDIA GPU"),
    ],
)
def test_auto_takes_the_fastest_that_can_run_and_says_why(where, packed, name, reason):
    found = choose("auto", *where, packed)
    assert found.name == name
    assert reason in found.reason


def test_packed_rows_are_never_given_to_cudnn_for_single_samples():
    with pytest.raises(ValueError, match="several samples, which it cannot tell apart"):
        choose("cudnn", "cuda", HOPPER, 128, "bfloat16", packed=True)


def test_xla_can_always_be_asked_for():
    found = choose("xla", "cuda", HOPPER, 128, "bfloat16", packed=True)
    assert found == ("xla", "as asked for", attention.causal)


def test_a_mesh_that_splits_query_heads_but_not_key_heads_takes_xla():
    found = choose("auto", "cuda", HOPPER, 128, "bfloat16", False, kv_heads_split=False)
    assert found.name == "xla" and "than there are key heads" in found.reason


def test_an_unknown_version_of_jax_has_no_packed_layout(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 13, 0))
    found = choose("auto", "cuda", HOPPER, 128, "bfloat16", packed=True)
    assert found.name == "cudnn_masked"
    assert "private function of jax >= 0.10, < 0.13" in found.reason


def test_a_private_function_of_another_form_is_not_called(monkeypatch):
    monkeypatch.setattr(private, "dot_product_attention", lambda query, key, value: query)
    found = choose("auto", "cuda", HOPPER, 128, "bfloat16", packed=True)
    assert found.name == "cudnn_masked" and "changed" in found.reason


def one_segment(query, key, value, segment_ids):
    """What a kernel does that knows nothing of segments."""
    return attention.causal(query, key, value, jnp.ones_like(segment_ids))


def test_deviation_is_rounding_for_a_right_backend_and_large_for_one_that_mixes_samples():
    heads = (2, 1, 8, "bfloat16")
    assert attention.deviation(attention.causal, *heads, packed=True) < 0.02
    assert attention.deviation(one_segment, *heads, packed=True) > 0.3


@pytest.fixture
def hopper_by_name(monkeypatch):
    monkeypatch.setattr(build, "device_platform", lambda: "cuda")
    monkeypatch.setattr(build, "compute_capability", lambda: HOPPER)
    config = affectgpt_qwen25_7b.get_config()
    config.mesh = "data:-1"
    return config


def test_a_kernel_that_fails_on_the_device_is_replaced_with_the_reason(hopper_by_name):
    found = build.attention(hopper_by_name, SMALL)
    assert found.name == "xla" and found.attend is attention.causal
    assert found.reason.startswith("not cudnn: on this device it fails with ")


def mixing_samples(count, *args):
    """A packed kernel that mixes samples."""
    return one_segment(*args)


def test_where_the_packed_kernel_is_wrong_the_mask_is_tried(
    monkeypatch, hopper_by_name, cudnn_by_xla
):
    monkeypatch.setattr(attention, "_cudnn_packed", mixing_samples)
    hopper_by_name.pack_length = 2048
    found = build.attention(hopper_by_name, SMALL)
    assert found.name == "cudnn_masked" and found.attend is attention.cudnn_masked
    assert found.reason.startswith("not cudnn_packed: on this device it is ")


def test_where_every_kernel_fails_all_reasons_are_given(monkeypatch, hopper_by_name):
    monkeypatch.setattr(attention, "_cudnn_packed", mixing_samples)
    hopper_by_name.pack_length = 2048
    found = build.attention(hopper_by_name, SMALL)
    assert found.name == "xla"
    assert "not cudnn_packed: on this device it is " in found.reason
    assert "not cudnn_masked: on this device it fails with " in found.reason


def test_a_kernel_that_computes_something_else_is_refused_where_it_was_asked_for(
    monkeypatch, hopper_by_name
):
    monkeypatch.setattr(attention, "_cudnn_packed", mixing_samples)
    hopper_by_name.attention = "cudnn_packed"
    with pytest.raises(ConfigError, match="'cudnn_packed' cannot be used: on this device it is"):
        build.attention(hopper_by_name, SMALL)


def test_an_impossible_backend_is_one_sentence_that_names_the_key():
    config = affectgpt_qwen25_7b.get_config()
    config.attention = "cudnn"
    if build.device_platform() == "cuda":
        pytest.skip("no GPU is what this is about")
    with pytest.raises(ConfigError) as caught:
        build.attention(config, PUBLISHED["Qwen2.5-7B-Instruct"])
    assert str(caught.value) == (
        "config.attention='cudnn' cannot be used: it needs an NVIDIA GPU, and this is cpu; "
        "config.attention=auto takes what can"
    )
