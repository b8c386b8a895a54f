"""LoRA against PEFT, and what its start, its dropout and its size promise."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import needs_torch
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from tiny_model import LLM, random_tree, relative_error

from affectgpt_jax.models.decoder import (
    PUBLISHED,
    Decoder,
    Llama3RopeScaling,
    init_base,
    init_lora,
    lm_head,
)
from affectgpt_jax.models.lora import (
    TARGETS,
    LoraConfig,
    ProjectionWeights,
    dropout,
    hashed_bits,
    project,
)
from affectgpt_jax.models.quantize import dequantize, quantize
from affectgpt_jax.weights.huggingface import save_base, tensor_name

ROWS, LENGTH = 2, 6
POSITIONS = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH))
SEGMENT_IDS = np.ones_like(POSITIONS)


def module_with(rank=4, llm=LLM, **changes):
    return Decoder(llm, LoraConfig(rank, **changes))


def abstract(init, module):
    return jax.eval_shape(lambda key: init(module, key), jax.random.key(0))


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("rank", "parameters"), [(8, 20_185_088), (16, 40_370_176), (32, 80_740_352)]
)
def test_the_7b_model_gets_as_many_parameters_as_table_8_says(rank, parameters):
    module = module_with(rank, PUBLISHED["Qwen2.5-7B-Instruct"])
    assert count(abstract(init_lora, module)) == parameters
    assert count(abstract(init_base, module)) == 7_615_616_512, "adapters leaked into the base"


@pytest.mark.parametrize(("rank", "scale"), [(8, 4), (16, 2), (32, 1)])
def test_the_scale_follows_from_an_alpha_of_32_at_every_rank(rank, scale):
    assert LoraConfig(rank).scale == scale


# --- The product ----------------------------------------------------------------------------------

SCALE, RATE = 2.0, 0.25
IN, RANK, OUTS = 24, 4, (40, 12, 16)


def seed_of(number):
    return jax.random.bits(jax.random.key(number), (2,), jnp.uint32)


SEEDS = [seed_of(10 + i) for i in range(len(OUTS))]


def random_weights(adapted=(0, 1, 2), seed=0):
    """Weights of three projections of one input, the second of them without a bias."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape) / shape[0] ** 0.5, jnp.float32)

    weights = [
        ProjectionWeights(draw(IN, out), draw(out), draw(IN, RANK), draw(RANK, out)) for out in OUTS
    ]
    weights[1] = weights[1]._replace(bias=None)
    return [
        w if i in adapted else w._replace(lora_a=None, lora_b=None) for i, w in enumerate(weights)
    ]


def random_input(seed=1):
    x = np.random.default_rng(seed).normal(size=(3, 70, IN))
    return jnp.asarray(x, jnp.float32)


def random_cotangents(seed=2):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=(3, 70, out)), jnp.float32) for out in OUTS)


def formula(x, weights, cotangents, rate=0.0, seeds=None):
    """Each projection alone, in float64: results, and the gradients of x and of every A and B."""
    x = np.asarray(x, np.float64)
    results, grad_x, grads = [], np.zeros(x.shape), []
    for i, (w, grad) in enumerate(zip(weights, cotangents, strict=True)):
        kernel, bias, a, b = (None if v is None else np.asarray(v, np.float64) for v in w)
        grad = np.asarray(grad, np.float64)
        results.append(x @ kernel + (0 if bias is None else bias))
        grad_x += grad @ kernel.T
        if a is None:
            grads.append((None, None))
            continue
        mask = 1 if seeds is None else np.asarray(dropout(jnp.ones(x.shape), rate, seeds[i]))
        dropped = x * mask
        results[-1] += SCALE * (dropped @ a) @ b
        narrow = SCALE * grad @ b.T
        grad_x += narrow @ a.T * mask
        grads.append(
            (
                np.einsum("bti,btr->ir", dropped, narrow),
                SCALE * np.einsum("btr,bto->ro", dropped @ a, grad),
            )
        )
    return tuple(results), grad_x, grads


def projected(x, weights, cotangents, rate=0.0, seeds=None):
    """The same of `project`."""

    @jax.jit
    def run(x, weights):
        results, pullback = jax.vjp(lambda x, w: project(x, w, SCALE, rate, seeds), x, weights)
        return results, pullback(cotangents)

    results, (grad_x, grads) = run(x, weights)
    return results, grad_x, [(grad.lora_a, grad.lora_b) for grad in grads]


def assert_close(found, expected, bound=1e-5):  # sums of up to 210 float32 products
    def check(value, exact):
        assert value.shape == exact.shape and relative_error(value, exact) < bound

    jax.tree.map(check, found, expected)


@pytest.mark.parametrize("seeds", [None, SEEDS], ids=["whole", "dropout"])
@pytest.mark.parametrize("adapted", [(0, 1, 2), (0, 2), (1,), ()], ids=str)
def test_projections_of_one_input_equal_the_formula_of_each_alone(adapted, seeds):
    given = random_input(), random_weights(adapted), random_cotangents(), RATE, seeds
    assert_close(projected(*given), formula(*given))
    if seeds is not None:  # that a mask of another projection would show
        for i in adapted:
            others = SEEDS[:i] + [seed_of(99)] + SEEDS[i + 1 :]
            assert relative_error(formula(*given)[0][i], formula(*given[:4], others)[0][i]) > 0.1


# int8 and fp8 round gradients to a scale of their own for each token: other bounds hold there.
@pytest.mark.parametrize("seeds", [None, SEEDS], ids=["whole", "dropout"])
@pytest.mark.parametrize(("precision", "bound"), [("nf4", 1e-5), ("int8", 0.03), ("fp8", 0.1)])
def test_projections_with_quantized_kernels_equal_those_with_the_widened_ones(
    precision, bound, seeds
):
    x, weights, cotangents = random_input(), random_weights((0, 2)), random_cotangents()
    # Kernels with outputs, and one with nothing, that come from adapters alone; an empty token.
    weights[0] = weights[0]._replace(kernel=weights[0].kernel.at[:, :3].set(0))
    weights[2] = weights[2]._replace(kernel=0 * weights[2].kernel)
    x = x.at[0, 5].set(0)
    low = [w._replace(kernel=quantize(w.kernel, precision)) for w in weights]
    wide = [w._replace(kernel=dequantize(w.kernel, jnp.float32)) for w in low]
    results, grad_x, grads = projected(x, low, cotangents, RATE, seeds)
    expected_results, expected_grad_x, expected_grads = formula(x, wide, cotangents, RATE, seeds)
    assert_close((results, grad_x), (expected_results, expected_grad_x), bound)
    # What is trained is multiplied with nothing that was rounded.
    assert_close(grads, expected_grads)


def test_gradients_of_adapters_are_summed_in_float32():
    """Integers, of which bfloat16 holds all that is multiplied but not the sums over tokens."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.integers(0, 2, size=shape)

    x, a, b, cotangent = draw(2, 1000, 24), draw(24, 4), draw(4, 8), draw(2, 1000, 8)
    weights = ProjectionWeights(jnp.zeros((24, 8), jnp.bfloat16), None, *map(jnp.float32, (a, b)))

    def run(weights):
        return project(jnp.bfloat16(x), [weights], 1.0)[0]

    grads = jax.vjp(run, weights)[1](jnp.bfloat16(cotangent))[0]
    expected = (
        np.einsum("bti,btr->ir", x, cotangent @ b.T),
        np.einsum("btr,bto->ro", x @ a, cotangent),
    )
    for found, exact in zip((grads.lora_a, grads.lora_b), expected, strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found, exact)
        assert (exact != exact.astype(jnp.bfloat16)).any()


def reads_of(shape, function, *args):
    """Matmuls of a function that have an operand of this shape."""

    def walk(jaxpr):
        count = 0
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                count += any(x.aval.shape == shape for x in eqn.invars)
            count += sum(map(walk, jaxprs_in_params(eqn.params)))
        return count

    return walk(jax.make_jaxpr(function)(*args).jaxpr)


def test_adapters_share_the_read_of_their_input_unless_each_drops_its_own_part():
    x, weights, cotangents = random_input(), random_weights(), random_cotangents()

    def gradient(seeds):
        return lambda x, w: jax.vjp(lambda *p: project(*p, SCALE, RATE, seeds), x, w)[1](cotangents)

    # Three frozen kernels forward; adapters forward, and in the gradients of A.
    assert reads_of(x.shape, gradient(None), x, weights) == 3 + 1 + 1
    assert reads_of(x.shape, gradient(SEEDS), x, weights) == 3 + 3 + 3


# --- The start ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fresh():
    """Adapters wide enough for their distribution to show: 2 layers of [128, 16] and such."""
    llm = dataclasses.replace(LLM, hidden_size=128, intermediate_size=96)
    module = module_with(16, llm)
    return jax.jit(lambda key: init_lora(module, key))(jax.random.key(0))["layers"]


@pytest.mark.parametrize("target", TARGETS)
def test_a_starts_uniform_and_b_starts_at_zero(fresh, target):
    lora_a = np.asarray(fresh[target]["lora_a"], np.float64)
    bound = lora_a.shape[1] ** -0.5
    assert lora_a.min() >= -bound and lora_a.max() <= bound
    # The empirical distribution function of n draws is within 1.95 / sqrt(n) of the true one, but
    # for a chance of 0.1 % (Kolmogorov).
    sorted_a = np.sort(lora_a, axis=None)
    uniform = np.linspace(-bound, bound, lora_a.size)
    assert np.abs(sorted_a - uniform).max() < 2 * bound * 1.95 / math.sqrt(lora_a.size)
    assert not np.asarray(fresh[target]["lora_b"]).any()


def test_a_differs_between_layers_and_between_projections(fresh):
    draws = [layer for target in TARGETS for layer in np.asarray(fresh[target]["lora_a"])]
    first_values = {float(draw[0, 0] * draw.shape[0] ** 0.5) for draw in draws}
    assert len(first_values) == len(TARGETS) * LLM.num_hidden_layers


def test_fresh_adapters_change_nothing():
    module = module_with()
    base = random_tree(abstract(init_base, module))
    lora = jax.jit(lambda key: init_lora(module, key))(jax.random.key(0))
    embeds = random_embeds()
    run = jax.jit(lambda variables: module.apply(variables, embeds, POSITIONS, SEGMENT_IDS)[0])
    np.testing.assert_array_equal(run({"params": base, "lora": lora}), run({"params": base}))


def test_projections_that_are_not_targets_have_no_adapter():
    tree = abstract(init_lora, module_with(targets=("q_proj", "down_proj")))
    assert set(tree["layers"]) == {"q_proj", "down_proj"}
    assert not abstract(init_lora, Decoder(LLM))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ("q_proj", "lm_head")}, "lm_head"),
        ({"targets": ("q_proj", "q_proj")}, "distinct"),
        ({"targets": ()}, "lora.targets"),
        ({"rank": 0}, "lora.rank is 0"),
        ({"dropout": 1.0}, r"lora.dropout is 1.0; expected a share in \[0, 1\)"),
        ({"dropout": -0.1}, "lora.dropout is -0.1"),
    ],
)
def test_an_impossible_adapter_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**changes)


# --- Against PEFT ---------------------------------------------------------------------------------


def random_embeds():
    rng = np.random.default_rng(0)
    return rng.normal(size=(ROWS, LENGTH, LLM.hidden_size)).astype(np.float32)


SCALING = Llama3RopeScaling(8.0, 1.0, 4.0, original_max_position_embeddings=16)
LLAMA = dataclasses.replace(LLM, qkv_bias=False, rope_scaling=SCALING)
QWEN3 = dataclasses.replace(LLM, qkv_bias=False, qk_norm=True)


@pytest.mark.parametrize(
    ("llm", "targets"),
    [(LLM, TARGETS), (LLM, ("v_proj", "gate_proj")), (LLAMA, TARGETS), (QWEN3, TARGETS)],
    ids=["Qwen2", "two of Qwen2", "Llama", "Qwen3"],
)
def test_logits_and_gradients_equal_peft(llm, targets, tmp_path: Path):
    torch = needs_torch.pytorch("the reference runs in PyTorch")
    peft = needs_torch.peft("the reference is PEFT")
    import transformers

    module = module_with(llm=llm, targets=targets, alpha=3.0)  # a scale of 3/4
    base = random_tree(abstract(init_base, module))
    lora = random_tree(abstract(init_lora, module), seed=1)
    tokens = np.random.default_rng(2).integers(llm.vocab_size, size=(ROWS, LENGTH))
    cotangent = np.random.default_rng(3).normal(size=(ROWS, LENGTH, llm.vocab_size))
    cotangent = cotangent.astype(np.float32)

    def logits(lora):
        embeds = module.apply({"params": base}, tokens, method="embed")
        variables = {"params": base, "lora": lora}
        return module.apply(variables, embeds, POSITIONS, SEGMENT_IDS)[0] @ lm_head(base)

    def value_and_gradient(lora):
        value, pullback = jax.vjp(logits, lora)
        return value, pullback(cotangent)[0]

    value, gradient = jax.jit(value_and_gradient)(lora)

    save_base(tmp_path, llm, base)
    config = peft.LoraConfig(
        r=4, lora_alpha=3.0, lora_dropout=0.0, target_modules=list(targets), task_type="CAUSAL_LM"
    )
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    reference = peft.get_peft_model(reference, config)
    parameters = dict(reference.named_parameters())
    ours = {}  # PEFT's name -> our factor and its gradient, in PyTorch's layout [out, in]
    for target in targets:
        for i in range(llm.num_hidden_layers):
            name = tensor_name(("layers", i, target, "kernel")).removesuffix(".weight")
            for ab in "ab":
                leaf = f"lora_{ab}"
                path = f"base_model.model.{name}.lora_{ab.upper()}.default.weight"
                pair = (tree["layers"][target][leaf][i].T for tree in (lora, gradient))
                ours[path] = tuple(np.asarray(x) for x in pair)
    assert set(ours) == {name for name in parameters if "lora" in name}
    with torch.no_grad():
        for name, (factor, _) in ours.items():
            parameters[name].copy_(torch.tensor(factor))
    expected = reference(torch.tensor(tokens)).logits
    expected.backward(torch.tensor(cotangent))

    # Float32 sums of some tens of terms, two layers deep, added in another order.
    assert relative_error(value, expected.detach().numpy()) < 1e-5
    for name, (_, found) in ours.items():
        assert relative_error(found, parameters[name].grad.numpy()) < 1e-5, name


# --- Dropout --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dropped():
    """`(key or None) -> {projection: dropout(x) / x, [layers, B, K, T, d]}`, read off the KV cache.

    With the frozen kernels of k and v at zero, `A` the identity and `B` the identity over the
    scale, keys at rotary position 0 and values are `dropout(x)` itself.
    """
    width = LLM.num_key_value_heads * LLM.head_dim
    llm = dataclasses.replace(LLM, hidden_size=width)
    module = module_with(width, llm, dropout=RATE, targets=("k_proj", "v_proj"))
    base = random_tree(abstract(init_base, module))
    lora = abstract(init_lora, module)
    identity = jnp.broadcast_to(jnp.eye(width), (llm.num_hidden_layers, width, width))
    for name in ("k_proj", "v_proj"):
        for layer in base["layers"]:
            layer[name] = jax.tree.map(jnp.zeros_like, layer[name])
        lora["layers"][name] = {"lora_a": identity, "lora_b": identity / module.lora.scale}
    ids = np.ones((8, 64), np.int32)
    embeds = np.random.default_rng(0).normal(size=(*ids.shape, width)).astype(np.float32)

    @jax.jit
    def keys_and_values(key):
        return module.apply(
            {"params": base, "lora": lora},
            embeds,
            0 * ids,
            ids,
            keep_cache=True,
            dropout_key=key,
        )[1]

    def run(key):
        caches = keys_and_values(key)
        # Layer 0 reads the same input in every call, deeper layers what dropout left of it.
        return {
            "k_proj": np.stack([cache.key for cache in caches]),
            "v_proj": np.stack([cache.value for cache in caches]),
        }

    return run


def test_dropout_zeroes_its_share_and_scales_the_rest(dropped):
    plain, noisy = dropped(None), dropped(jax.random.key(0))
    for name in plain:
        x, y = plain[name][0], noisy[name][0]
        kept = y != 0
        np.testing.assert_allclose(y[kept], x[kept] / (1 - RATE), rtol=1e-5)
        # Four standard deviations of a share of n independent draws.
        assert abs(kept.mean() - (1 - RATE)) < 4 * math.sqrt(RATE * (1 - RATE) / kept.size)


def test_every_projection_and_layer_draws_its_own_mask(dropped):
    masks = {
        (name, layer): values == 0
        for name, layers in dropped(jax.random.key(0)).items()
        for layer, values in enumerate(layers)
    }
    both = RATE**2  # two independent masks drop the same place this often
    pairs = [(a, b) for a in masks for b in masks if a < b]
    assert len(pairs) == 6
    for a, b in pairs:
        share = (masks[a] & masks[b]).mean()
        assert abs(share - both) < 4 * math.sqrt(both / masks[a].size), (a, b)


def test_dropout_is_a_function_of_its_key_and_off_without_one(dropped):
    first, again, other = (dropped(jax.random.key(seed)) for seed in (0, 0, 1))
    plain = dropped(None)
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
        assert (first[name] != other[name]).any()
        assert plain[name].all(), "a value was dropped without a key"


@pytest.mark.parametrize("rate", [0.05, 1e-3, 0.5, 1 - 1e-6])
def test_neighbours_are_dropped_independently_along_every_axis(rate):
    kept = np.asarray(dropout(jnp.ones((40, 50, 257)), rate, seed_of(3)) != 0)
    for axis in range(3):
        rows = np.moveaxis(kept, axis, 0)
        for apart in (1, 2, 8):
            both = rows[apart:] & rows[:-apart]
            for found, expected in ((kept, 1 - rate), (both, (1 - rate) ** 2)):
                # Five standard deviations of a share.
                spread = math.sqrt(expected * (1 - expected) / found.size)
                assert abs(found.mean() - expected) < 5 * spread, (axis, apart)


def test_the_bits_behind_a_mask_look_random():
    """Of several seeds, two of them one bit apart: bytes are uniform, bits of two are unrelated."""
    seed = seed_of(0)
    seeds = [
        seed,
        seed_of(1),
        seed ^ jnp.array([1, 0], "uint32"),
        seed ^ jnp.array([0, 1], "uint32"),
    ]
    drawn = [np.asarray(hashed_bits(s, (16, 128, 64))) for s in seeds]
    drawn.append(drawn[0].swapaxes(0, 1).reshape(drawn[0].shape))  # the same bits elsewhere
    for words in drawn[:4]:
        for shift in (0, 8, 16, 24):
            counts = np.bincount((words >> shift & 255).ravel(), minlength=256)
            expected = words.size / 256
            chi_square = ((counts - expected) ** 2 / expected).sum()
            # 255 degrees of freedom: five standard deviations.
            assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)
        assert len(np.unique(words)) > 0.999 * words.size  # by chance 1 of 66,000 twice
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            changed = np.unpackbits((a ^ b).view(np.uint8))
            assert abs(changed.mean() - 0.5) < 5 * 0.5 / math.sqrt(changed.size)


def test_every_row_of_many_draws_bits_of_its_own():
    # By one word of 32 bits for a row instead of two, some hundred of so many would be alike.
    rows = np.asarray(hashed_bits(seed_of(4), (60_000, 20, 4))).reshape(-1, 4)
    assert len(set(map(bytes, rows))) == len(rows)


def test_dropout_keeps_nothing_for_the_backward_pass():
    def saved(seeds):
        pull = jax.eval_shape(
            lambda *p: jax.vjp(lambda *q: project(*q, 1.0, 0.1, seeds), *p)[1],
            random_input(),
            random_weights(),
        )
        return sum(leaf.size for leaf in jax.tree.leaves(pull))

    assert saved(SEEDS) == saved(None) + 2 * len(SEEDS)  # the seeds
