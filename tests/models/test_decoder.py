"""The decoder against Hugging Face's, and what packing, caching and rematerialisation promise."""

import dataclasses
import math
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import needs_torch
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from tiny_model import (
    LLM,
    make_batch,
    make_model,
    random_base,
    random_trainable,
    random_tree,
    relative_error,
)

from affectgpt_jax.models import attention
from affectgpt_jax.models.affectgpt import loss_sum_and_count
from affectgpt_jax.models.decoder import (
    PUBLISHED,
    ComputeConfig,
    Decoder,
    DecodeStep,
    KVCache,
    _unstacked,
    init_base,
    init_lora,
    lm_head,
    rms_norm,
    rotary_frequencies,
    rotary_tables,
)
from affectgpt_jax.models.lora import TARGETS, LoraConfig
from affectgpt_jax.training.xla_options import CPU_OPTIONS
from affectgpt_jax.weights.huggingface import load_base, read_config

# Float32 sums of some tens of terms, a few layers deep, added in another order.
FLOAT32 = 1e-5
MODULE = Decoder(LLM)


def abstract_base(module):
    return jax.eval_shape(lambda key: init_base(module, key), jax.random.key(0))


BASE = random_tree(abstract_base(MODULE))


def forward(embeds, positions, segment_ids, module=MODULE, base=BASE):
    return module.apply({"params": base}, embeds, positions, segment_ids)[0]


@jax.jit
def forward_and_back(embeds, positions, segment_ids, cotangent):
    """Hidden states, and the gradient of their product with `cotangent` in the embeddings."""
    out, pullback = jax.vjp(lambda e: forward(e, positions, segment_ids), embeds)
    return out, pullback(cotangent)[0]


def random_embeds(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=(*shape, LLM.hidden_size)).astype(np.float32)


def rows_of(length, rows=1):
    """Positions and segment ids of rows without padding."""
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    return positions, np.ones_like(positions)


# --- Against Hugging Face -------------------------------------------------------------------------


def rope_parameters(theta, original_length=None):
    """Plain rotary positions, or Llama 3's scaled ones for a model first trained at that length."""
    if original_length is None:
        return {"rope_type": "default", "rope_theta": theta}
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original_length,
    }


@st.composite
def models(draw):
    """A transformers config of any of the three families, anywhere in the range of its shapes."""
    family = draw(st.sampled_from(["Qwen2", "Llama", "Qwen3"]))
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    heads = kv_heads * draw(st.integers(1, 3))
    # transformers wants this multiple of Llama, though its head_dim is free.
    hidden_size = 4 * heads if family == "Llama" else draw(st.sampled_from([8, 20, 36]))
    return family, dict(
        vocab_size=draw(st.integers(11, 70)),
        hidden_size=hidden_size,
        intermediate_size=draw(st.integers(5, 40)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=draw(st.sampled_from([2, 6, 16])),
        tie_word_embeddings=draw(st.booleans()),
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-2])),
        rope_parameters=rope_parameters(
            draw(st.sampled_from([100.0, 1e4, 1e6])), draw(st.sampled_from([None, 8, 64]))
        ),
        **({} if family == "Qwen2" else {"attention_bias": draw(st.booleans())}),
    )


def make_reference(family, shape, seed=0):
    import torch
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**shape)
    reference = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in reference.parameters():  # its own start has zero biases and unit norms
        torch.nn.init.normal_(parameter, mean=0.1, std=0.3)
    return reference


def import_reference(reference, max_shard_size="1GB"):
    """Our module and base of a transformers model, by way of its files."""
    with tempfile.TemporaryDirectory() as directory:
        reference.save_pretrained(directory, max_shard_size=max_shard_size)
        module = Decoder(read_config(Path(directory)))
        abstract = abstract_base(module)
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return module, load_base(
            Path(directory), abstract, jax.tree.map(lambda _: device, abstract)
        )


def logits_of(module, base, tokens, positions, segment_ids):
    @jax.jit
    def logits(base):
        embeds = module.apply({"params": base}, tokens, method="embed")
        return forward(embeds, positions, segment_ids, module, base) @ lm_head(base)

    return np.asarray(logits(base))


# Rows of samples of 1 to 7 tokens, each after 0 to 3 tokens of padding; a row may have none.
layouts = st.lists(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 7)), max_size=3), min_size=1, max_size=3
)


# Every example compiles, so a failing one is shown as it is: shrinking it would take minutes.
@settings(max_examples=20, phases=[Phase.explicit, Phase.generate])
@given(models(), layouts, st.integers(0, 2), st.sampled_from(["4KB", "1GB"]), st.integers(0, 2**31))
def test_logits_equal_hugging_face_for_any_shape_and_layout(
    model, layout, right_padding, max_shard_size, seed
):
    torch = needs_torch.pytorch("the reference runs in PyTorch")
    reference = make_reference(*model, seed)
    module, base = import_reference(reference, max_shard_size)
    length = max(1, right_padding + max(sum(map(sum, row)) for row in layout))
    positions, segment_ids = np.zeros((2, len(layout), length), np.int32)
    rng = np.random.default_rng(seed)
    tokens = rng.integers(module.config.vocab_size, size=segment_ids.shape)
    expected = np.zeros((*tokens.shape, module.config.vocab_size))
    for row, samples in enumerate(layout):
        end = 0
        for number, (gap, count) in enumerate(samples, 1):
            sample = slice(end + gap, end + gap + count)
            end = sample.stop
            segment_ids[row, sample], positions[row, sample] = number, np.arange(count)
            with torch.no_grad():  # every sample by itself, without any mask or padding
                alone = reference(torch.tensor(tokens[None, row, sample])).logits
            expected[row, sample] = alone[0].numpy()

    found = logits_of(module, base, tokens, positions, segment_ids)
    assert np.isfinite(found).all()
    if segment_ids.any():
        real = segment_ids > 0
        assert relative_error(found[real], expected[real]) < FLOAT32


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        ("Qwen2", rope_parameters(1e6)),
        ("Llama", rope_parameters(5e5, original_length=64)),
        ("Qwen3", rope_parameters(1e6)),
    ],
)
def test_a_sequence_of_the_models_full_length_equals_hugging_face(family, rope):
    torch = needs_torch.pytorch("the reference runs in PyTorch")
    length = 256
    shape = dict(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=length,
        rope_parameters=rope,
    )
    reference = make_reference(family, shape)
    module, base = import_reference(reference)
    tokens = np.random.default_rng(0).integers(64, size=(1, length))
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).logits.numpy()
    assert relative_error(logits_of(module, base, tokens, *rows_of(length)), expected) < FLOAT32


def test_llama3_frequencies_equal_hugging_face_and_their_definition():
    torch = needs_torch.pytorch("the reference runs in PyTorch")
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    llm = PUBLISHED["Llama-3.1-8B-Instruct"]
    found = rotary_frequencies(llm.head_dim, llm.rope_theta, llm.rope_scaling)
    plain = 5e5 ** -(np.arange(64) / 64)
    wavelengths = 2 * np.pi / plain
    long, short = wavelengths > 8192, wavelengths < 8192 / 4
    # Rounded once, from float64.
    np.testing.assert_array_equal(found[short], plain[short].astype(np.float32))
    np.testing.assert_array_equal(found[long], (plain[long] / 8).astype(np.float32))
    between = ~short & ~long
    assert between.any()
    assert ((plain / 8 < found) & (found < plain))[between].all()

    config = transformers.LlamaConfig(
        head_dim=128, rope_parameters=rope_parameters(5e5, original_length=8192)
    )
    expected, scale = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    assert scale == 1.0
    # They are a handful of float32 operations there.
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)


@pytest.mark.parametrize("position", [0, 1, 4095, 32767, 131071])
def test_rotary_angles_are_as_good_as_float32_at_every_position(position):
    frequencies = rotary_frequencies(128, 1e6)
    cos, sin = rotary_tables(jnp.full((1, 1), position), frequencies)
    angles = position * 1e6 ** -(np.arange(64) / 64)
    # A frequency and an angle are rounded once each: 2^-24 of the angle, and the tables' own 2^-22.
    allowed = 2 * 2**-24 * angles + 2**-22
    assert (np.abs(np.asarray(cos[0, 0], np.float64) - np.cos(angles)) <= allowed).all()
    assert (np.abs(np.asarray(sin[0, 0], np.float64) - np.sin(angles)) <= allowed).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads is 4; expected a multiple"),
        ({"head_dim": 5}, "head_dim is 5"),
    ],
)
def test_an_impossible_shape_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LLM, **changes)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("Qwen2.5-0.5B-Instruct", 494_032_768),
        ("Qwen2.5-1.5B-Instruct", 1_543_714_304),
        ("Qwen2.5-3B-Instruct", 3_085_938_688),
        ("Qwen2.5-7B-Instruct", 7_615_616_512),
        ("Qwen2.5-14B-Instruct", 14_770_033_664),
        ("Qwen2.5-32B-Instruct", 32_763_876_352),
        ("Qwen2.5-72B-Instruct", 72_706_203_648),
        ("Qwen3-0.6B", 596_049_920),
        ("Qwen3-1.7B", 1_720_574_976),
        ("Qwen3-4B", 4_022_468_096),
        ("Qwen3-8B", 8_190_735_360),
        ("Qwen3-14B", 14_768_307_200),
        ("Qwen3-32B", 32_762_123_264),
        ("Llama-2-7b-chat-hf", 6_738_415_616),
        ("Llama-3.1-8B-Instruct", 8_030_261_248),
    ],
)
def test_published_shapes_have_the_published_parameter_counts(name, count):
    leaves = jax.tree.leaves(abstract_base(Decoder(PUBLISHED[name])))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == count


# --- Rows: padding, packing, single tokens --------------------------------------------------------


def test_right_padding_does_not_change_real_positions():
    embeds, cotangent = random_embeds(2, 14), random_embeds(2, 14, seed=1)
    positions, segment_ids = rows_of(14, 2)
    real = np.arange(14) < 9
    padded = forward_and_back(embeds, positions, segment_ids * real, cotangent * real[:, None])
    alone = forward_and_back(*(x[:, real] for x in (embeds, positions, segment_ids, cotangent)))
    for found, expected in zip(padded, alone, strict=True):
        assert relative_error(found[:, real], expected) < FLOAT32


def test_packed_samples_equal_separate_rows_in_values_and_gradients():
    real = np.arange(14) < np.array([[5], [7]])
    embeds, cotangent = random_embeds(2, 14), random_embeds(2, 14, seed=1) * real[..., None]
    positions, segment_ids = rows_of(14, 2)

    def pack(x):
        """Both samples in the first row; the rest of it and the second row are padding."""
        packed = np.zeros_like(x)
        packed[0, : real.sum()] = x[real]
        return packed

    apart = forward_and_back(embeds, positions, segment_ids * real, cotangent)
    packed = forward_and_back(
        pack(embeds), pack(positions), pack(segment_ids * [[1], [2]]), pack(cotangent)
    )
    for found, expected in zip(packed, apart, strict=True):
        assert relative_error(found[0, : real.sum()], np.asarray(expected)[real]) < FLOAT32
    assert not np.asarray(packed[1])[0, real.sum() :].any(), "padding received a gradient"


def test_a_row_of_padding_stays_finite_in_values_and_gradients():
    embeds = random_embeds(2, 14)
    positions, segment_ids = rows_of(14, 2)
    for x in forward_and_back(embeds, positions, segment_ids * 0, embeds):
        assert np.isfinite(x).all()


def test_a_query_that_may_read_no_key_stays_finite():
    query, key, value = random_embeds(3, 1, 4)[..., :8].reshape(3, 1, 2, 4, 4)
    nothing = jnp.zeros((1, 4), bool)
    query = query[:, :, :1].swapaxes(1, 2)
    assert np.isfinite(attention.cached(query, key, value, nothing)).all()


def test_a_single_token_equals_the_first_of_a_longer_row():
    embeds = random_embeds(2, 14)
    longer = forward_and_back(embeds, *rows_of(14, 2), embeds)[0]
    single = forward_and_back(embeds[:, :1], *rows_of(1, 2), embeds[:, :1])[0]
    assert relative_error(single, longer[:, :1]) < FLOAT32


def test_a_token_id_beyond_the_table_is_clipped_to_its_last_row():
    tokens = jnp.array([[LLM.vocab_size + 3, -1]])
    embeds = MODULE.apply({"params": BASE}, tokens, method="embed")
    np.testing.assert_array_equal(embeds[0, 0], BASE["embed_tokens"][-1])
    assert np.isfinite(embeds).all()


# --- Decoding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("qk_norm", [False, True])
def test_decoding_token_by_token_equals_one_full_pass(qk_norm):
    module = Decoder(dataclasses.replace(LLM, qk_norm=qk_norm))
    base = random_tree(abstract_base(module))
    length, prompt = 7, 3
    embeds = random_embeds(2, length)
    positions, segment_ids = rows_of(length, 2)
    expected, cache = jax.jit(
        lambda e: module.apply({"params": base}, e, positions, segment_ids, keep_cache=True)
    )(embeds)
    assert [type(layer) for layer in cache] == [KVCache] * LLM.num_hidden_layers
    # What the full pass left beyond the prompt must be overwritten before it is read.
    cache = jax.tree.map(lambda x: x.at[:, :, prompt:].set(99.0), cache)

    @jax.jit
    def decode(cache, slot, embed, position):
        step = DecodeStep(slot, jnp.broadcast_to(jnp.arange(length) <= slot, (2, length)))
        return module.apply({"params": base}, embed, position, cache=cache, step=step)

    for t in range(prompt, length):
        at = slice(t, t + 1)
        states, cache = decode(cache, t, embeds[:, at], positions[:, at])
        assert relative_error(states, expected[:, at]) < FLOAT32


# --- Layers ---------------------------------------------------------------------------------------


def test_the_adapters_of_a_layer_are_its_part_of_the_stack_forward_and_backward():
    stack = {"a": jnp.arange(24.0).reshape(3, 2, 4), "b": {"c": jnp.arange(3.0)}}
    weights = [{"a": 1.0 + i, "b": {"c": 10.0 * i}} for i in range(3)]

    def total(layers):
        """Of squares, weighted by layer and leaf; the last layer's `b` has no part in it."""
        parts = [jax.tree.map(lambda w, x: w * (x**2).sum(), *p) for p in zip(weights, layers)]
        parts[2]["b"]["c"] = 0.0
        return sum(jax.tree.leaves(parts))

    def by_index(stack):
        return total([jax.tree.map(lambda x, i=i: x[i], stack) for i in range(3)])

    found = jax.value_and_grad(lambda stack: total(_unstacked(stack)))(stack)
    jax.tree.map(np.testing.assert_array_equal, found, jax.value_and_grad(by_index)(stack))


def test_the_gradient_of_stacked_adapters_adds_up_no_arrays_of_zeros():
    stack = jnp.ones((5, 2, 4))

    def gradient(stack):
        return jax.grad(lambda x: sum((part**2).sum() for part in _unstacked(x)))(stack)

    # Indexing has one addition of whole arrays a layer.
    traced = str(jax.make_jaxpr(gradient)(stack))
    assert "pad" not in traced and "add_any" not in traced


def test_every_layer_has_weights_and_adapters_of_its_own():
    module = Decoder(LLM, LoraConfig(rank=2))
    key = jax.random.key(0)
    base, lora = init_base(module, key), init_lora(module, key)
    assert isinstance(base["layers"], tuple) and len(base["layers"]) == LLM.num_hidden_layers
    first, second = base["layers"]
    assert jax.tree.map(jnp.shape, first) == jax.tree.map(jnp.shape, second)
    for name in TARGETS:
        assert (first[name]["kernel"] != second[name]["kernel"]).all()
        factor = lora["layers"][name]["lora_a"]
        assert (factor[0] != factor[1]).all()


# --- ComputeConfig --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled_gradients():
    """By remat policy: the compiled gradient of a sum of squares with respect to the inputs."""
    llm = dataclasses.replace(LLM, num_hidden_layers=6)
    base = random_tree(abstract_base(Decoder(llm)))
    embeds = random_embeds(4, 32)
    rows = rows_of(32, 4)

    def compile_one(remat):
        module = Decoder(llm, compute=ComputeConfig(remat=remat))
        gradient = jax.grad(lambda e: (forward(e, *rows, module, base) ** 2).sum())
        return jax.jit(gradient).lower(embeds).compile()

    return embeds, {how: compile_one(how) for how in ("none", "save_projections", "full")}


@pytest.mark.parametrize("remat", ["save_projections", "full"])
def test_rematerialisation_does_not_change_gradients(compiled_gradients, remat):
    embeds, gradients = compiled_gradients
    assert relative_error(gradients[remat](embeds), gradients["none"](embeds)) < FLOAT32


def test_rematerialisation_saves_memory():
    # With adapters, whose gradients read what the projections are given.
    llm = dataclasses.replace(LLM, num_hidden_layers=6)
    batch = make_batch([32] * 4, 32, llm=llm)

    def temporaries(remat):
        model = make_model(llm, fusion=None, remat=remat)
        loss = lambda *inputs: loss_sum_and_count(model, *inputs, batch)[0]  # noqa: E731
        gradient = jax.jit(jax.grad(loss, argnums=1))
        lowered = gradient.lower(random_base(model), random_trainable(model))
        compiled = lowered.compile({option.name: option.value for option in CPU_OPTIONS})
        return compiled.memory_analysis().temp_size_in_bytes

    assert (
        temporaries("full")
        < 0.7 * temporaries("save_projections")
        < 0.7 * 0.7 * temporaries("none")
    )


@pytest.mark.parametrize(("remat", "barriers"), [("none", 0), ("save_projections", 2), ("full", 2)])
def test_a_barrier_keeps_each_recomputed_layer_apart_from_its_first_computation(remat, barriers):
    # Without one XLA would find that it has computed the same before, and keep that instead.
    assert LLM.num_hidden_layers == 2
    module = Decoder(LLM, compute=ComputeConfig(remat=remat, attend=lambda q, k, v, ids: q))
    base = random_tree(abstract_base(module))
    gradient = jax.grad(lambda e: forward(e, *rows_of(8, 2), module, base).sum())
    lowered = jax.jit(gradient).lower(random_embeds(2, 8)).as_text()
    assert lowered.count("stablehlo.optimization_barrier") == barriers


def test_an_unknown_remat_policy_is_refused():
    with pytest.raises(ValueError, match="remat is 'some'"):
        ComputeConfig(remat="some")


def test_bfloat16_norm_is_computed_in_float32():
    rng = np.random.default_rng(0)
    x = jnp.asarray(3 + rng.normal(size=(16, 4096)), jnp.bfloat16)
    scale = jnp.asarray(1 + rng.normal(size=4096), jnp.bfloat16)
    wide, wide_scale = np.asarray(x, np.float64), np.asarray(scale, np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * wide_scale
    # Rounded once, at the end. Where float64 is next to a tie, float32 may round the other way.
    agree = rms_norm(x, scale, 1e-6) == expected.astype(jnp.bfloat16)
    assert agree.mean() > 0.999


def test_bfloat16_attention_has_a_float32_softmax():
    rng = np.random.default_rng(0)
    query, key, value = jnp.asarray(3 * rng.normal(size=(3, 1, 64, 2, 16)), jnp.bfloat16)
    found = attention.causal(query, key, value, jnp.ones((1, 64), jnp.int32))
    q, k, v = (np.asarray(x, np.float64) for x in (query, key, value))
    scores = np.einsum("bthd,bshd->bhts", q, k) / 4
    weights = np.exp(np.where(np.tri(64, dtype=bool), scores, -np.inf))
    weights /= weights.sum(-1, keepdims=True)
    # Scores reach 100, where bfloat16 steps by 0.5: such scores would be off by tens of percent.
    # The weights are rounded to bfloat16 (2^-8) and so is the result.
    assert relative_error(found, np.einsum("bhts,bshd->bthd", weights, v)) < 0.01


def test_bfloat16_run_stays_near_float32():
    half = Decoder(LLM, compute=ComputeConfig(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16))
    base = random_tree(abstract_base(half))
    embeds = np.asarray(jnp.asarray(random_embeds(2, 12), jnp.bfloat16), np.float32)
    expected = jax.jit(lambda: forward(embeds, *rows_of(12, 2), MODULE, base))()
    found = jax.jit(lambda: forward(embeds, *rows_of(12, 2), half, base))()
    assert found.dtype == jnp.bfloat16
    # About twenty roundings of 2^-8 in a row, of random sign.
    assert relative_error(found, expected) < 0.04
