"""The Q-Former against BLIP-2's in PyTorch, and what its mask, dropout and initialisers promise."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import needs_torch
import numpy as np
import pytest

from affectgpt_jax.models.qformer import QFormer, QFormerConfig, multi_head_attention

SMALL = QFormerConfig(width=16, heads=4, layers=1, intermediate=24)
QUERIES, BATCH, LENGTH, ENCODER_WIDTH = 3, 4, 5, 10
# The last sample has no valid state.
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0]], bool)
STATES = np.random.default_rng(0).normal(size=(BATCH, LENGTH, ENCODER_WIDTH)).astype(np.float32)


def abstract_params(config: QFormerConfig, num_queries: int, encoder_width: int) -> dict:
    states = jax.ShapeDtypeStruct((1, 1, encoder_width), jnp.float32)
    mask = jax.ShapeDtypeStruct((1, 1), bool)
    init = QFormer(config, num_queries).init
    return jax.eval_shape(init, jax.random.key(0), states, mask)["params"]


def make_params(config: QFormerConfig) -> dict:
    """Normal parameters, so that no bias is 0, no scale 1, and attention is far from uniform."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape), leaf.dtype),
        abstract_params(config, QUERIES, ENCODER_WIDTH),
    )


@functools.partial(jax.jit, static_argnames=("config", "dtype", "deterministic"))
def apply(
    params: dict,
    states: jax.Array,
    mask: jax.Array = MASK,
    config: QFormerConfig = SMALL,
    dtype: jnp.dtype = jnp.float32,
    deterministic: bool = True,
    seed: int = 0,
) -> jax.Array:
    model = QFormer(config, QUERIES, dtype)
    rngs = {"dropout": jax.random.key(seed)}
    return model.apply({"params": params}, states, mask, deterministic, rngs=rngs)


def blip2_state_dict(params: dict, layers: int) -> dict[str, np.ndarray]:
    """The parameters under the names and in the layout of transformers' `Blip2QFormerModel`."""
    state = {}

    def put(name: str, module: dict) -> None:
        weight = module["kernel"].T if "kernel" in module else module["scale"]
        state[f"{name}.weight"] = np.asarray(weight, np.float64)
        state[f"{name}.bias"] = np.asarray(module["bias"], np.float64)

    put("layernorm", params["queries_norm"])
    for i in range(layers):
        layer, prefix = params[f"layer_{i}"], f"encoder.layer.{i}"
        for ours, theirs in (
            ("self_attention", "attention"),
            ("cross_attention", "crossattention"),
        ):
            for name in ("query", "key", "value"):
                put(f"{prefix}.{theirs}.attention.{name}", layer[ours][name])
            put(f"{prefix}.{theirs}.output.dense", layer[ours]["output"])
            put(f"{prefix}.{theirs}.output.LayerNorm", layer[f"{ours}_norm"])
        put(f"{prefix}.intermediate_query.dense", layer["feed_forward"]["intermediate"])
        put(f"{prefix}.output_query.dense", layer["feed_forward"]["output"])
        put(f"{prefix}.output_query.LayerNorm", layer["feed_forward_norm"])
    return state


def test_matches_blip2_in_float64() -> None:
    torch = needs_torch.pytorch("the reference Q-Former is PyTorch's")
    transformers = pytest.importorskip("transformers", reason="it holds the reference Q-Former")
    config = dataclasses.replace(SMALL, layers=2)
    params = make_params(config)
    reference_config = transformers.Blip2QFormerConfig(
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.intermediate,
        layer_norm_eps=config.norm_eps,
        encoder_hidden_size=ENCODER_WIDTH,
        cross_attention_frequency=1,
        use_qformer_text_input=False,
    )
    reference = transformers.Blip2QFormerModel(reference_config).double().eval()
    state = blip2_state_dict(params, config.layers)
    reference.load_state_dict({name: torch.tensor(x) for name, x in state.items()}, strict=True)

    # What a sample without a single valid key returns is up to each implementation.
    valid = MASK.any(axis=1)
    queries = torch.tensor(np.asarray(params["queries"], np.float64))
    with torch.no_grad():
        expected = reference(
            query_embeds=queries.expand(int(valid.sum()), -1, -1),
            encoder_hidden_states=torch.tensor(STATES[valid].astype(np.float64)),
            encoder_attention_mask=torch.tensor(MASK[valid].astype(np.int64)),
        ).last_hidden_state.numpy()

    actual = np.asarray(apply(params, STATES, config=config))[valid]
    # Outputs are of order 1, and float32 rounding over two layers stays below 1e-5; the tanh form
    # of GELU or a wrong order of residual and LayerNorm would differ by more than 1e-4.
    np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=0)


def test_attention_matches_float64_closed_form() -> None:
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(2, n, 3, 4)) for n in (5, 6, 6))
    mask = np.array([[1, 1, 1, 1, 1, 1], [1, 0, 1, 0, 0, 1]], bool)
    scores = np.einsum("bqhd,bshd->bhqs", query, key) / np.sqrt(4)
    weights = np.exp(scores) * mask[:, None, None]
    weights /= weights.sum(axis=-1, keepdims=True)
    expected = np.einsum("bhqs,bshd->bqhd", weights, value)

    to_jax = [jnp.asarray(x, jnp.float32) for x in (query, key, value)]
    actual = multi_head_attention(*to_jax, jnp.asarray(mask))
    np.testing.assert_allclose(actual, expected, atol=2e-6)  # A few float32 roundings of O(1).


@jax.jit
def gradients(params: dict, states: jax.Array) -> tuple[dict, jax.Array]:
    return jax.grad(lambda *args: jnp.sum(apply(*args) ** 2), argnums=(0, 1))(params, states)


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
def test_masked_states_never_leak(poison: float) -> None:
    params, poisoned = make_params(SMALL), np.where(MASK[..., None], STATES, np.float32(poison))
    tokens = apply(params, poisoned)
    np.testing.assert_array_equal(tokens, apply(params, STATES))
    assert bool(jnp.isfinite(tokens).all())

    of_params, of_states = gradients(params, poisoned)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(of_params))
    assert bool((of_states[~MASK] == 0).all())
    assert bool((of_states[MASK] != 0).all())


def test_masked_sequence_equals_shorter_sequence() -> None:
    params = make_params(SMALL)
    short = apply(params, STATES[1:2, :3], np.ones((1, 3), bool))
    # Sums over other lengths may be taken in another order: a few float32 roundings of O(1).
    np.testing.assert_allclose(apply(params, STATES)[1:2], short, atol=5e-6)


def test_dropout_only_when_not_deterministic() -> None:
    params, same = make_params(SMALL), np.broadcast_to(STATES[:1], STATES.shape)
    draw = functools.partial(apply, params, same, np.ones_like(MASK))
    np.testing.assert_array_equal(draw(seed=0), draw(seed=1))

    dropped = draw(deterministic=False, seed=0)
    np.testing.assert_array_equal(dropped, draw(deterministic=False, seed=0))
    assert bool((dropped != draw(deterministic=False, seed=1)).any())
    assert bool((dropped[0] != dropped[1]).any()), "equal samples must draw masks of their own"


def test_bfloat16_follows_float32() -> None:
    params = make_params(SMALL)
    half = apply(params, STATES, dtype=jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    # bfloat16 keeps 8 bits (0.4 %): some ten roundings of values of order 1 stay below 0.1.
    np.testing.assert_allclose(half.astype(jnp.float32), apply(params, STATES), atol=0.1)


def test_parameters_start_as_in_the_release() -> None:
    config = QFormerConfig(width=64, heads=4, layers=1, intermediate=128)
    states, mask = jnp.zeros((1, 2, 48)), jnp.ones((1, 2), bool)
    params = QFormer(config, num_queries=32).init(jax.random.key(0), states, mask)["params"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        kind = path[-1].key
        assert leaf.dtype == jnp.float32
        if kind == "bias":
            assert bool((leaf == 0).all())
        elif kind == "scale":
            assert bool((leaf == 1).all())
        else:
            # 2,048 draws or more: the standard error of the deviation is at most 1.6 %, of the mean
            # 2.2 % of it; both bounds are above four of them.
            assert np.std(leaf) == pytest.approx(0.02, rel=0.07), path
            assert abs(np.mean(leaf)) < 0.1 * 0.02, path


def test_default_is_bert_base_with_two_layers() -> None:
    params = abstract_params(QFormerConfig(), num_queries=32, encoder_width=1024)
    attention = 4 * (768 * 768 + 768)
    cross_attention = 2 * (768 * 768 + 768) + 2 * (1024 * 768 + 768)
    feed_forward = (768 * 3072 + 3072) + (3072 * 768 + 768)
    norm = 2 * 768
    expected = 2 * (attention + cross_attention + feed_forward + 3 * norm) + norm + 32 * 768
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected


def test_heads_must_divide_width() -> None:
    with pytest.raises(ValueError, match=r"768.*multiple.*7"):
        QFormerConfig(heads=7)
