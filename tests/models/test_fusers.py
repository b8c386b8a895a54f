"""The soft tokens against closed forms, and what happens when a sample lacks a modality."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from affectgpt_jax.data.modalities import MODALITIES
from affectgpt_jax.models.fusers import Fusion, FusionConfig, keep_present
from affectgpt_jax.models.qformer import QFormerConfig

SLOTS = tuple(MODALITIES)
LLM_WIDTH = 12
LENGTHS = {"audio": 3, "face": 4, "frame": 5, "image": 6}
KINDS = ("attention", "mean", "qformer")
# Beside these, a pre-fusion of what the heads make of the features.
ALL_KINDS = (*KINDS, "projected")
# Each Q-Former takes seconds to compile, so these two stand for the others of the same classes.
SLOTS_OF_KIND = {
    "attention": SLOTS,
    "mean": SLOTS,
    "qformer": ("multi", "audio"),
    "projected": ("multi", "audio", "face"),
}

# Sums of some tens of float32 terms of order 1, three to five such sums deep.
FLOAT32 = {"atol": 1e-5, "rtol": 1e-5}


def small(slots: tuple[str, ...] = SLOTS, **changes) -> FusionConfig:
    qformer = QFormerConfig(width=8, heads=2, layers=1, intermediate=16)
    sizes = dict(widths={"video": 6, "audio": 10, "image": 7}, width=9, qformer=qformer)
    return FusionConfig(slots=slots, **(sizes | changes))


def all_of_one_kind(kind: str, slots: tuple[str, ...] = SLOTS) -> FusionConfig:
    """Every slot by the given kind, or by its default where there is no such kind."""
    if kind == "projected":  # a kind of the pre-fusion alone
        return small(slots, kinds={"multi": kind})
    kinds = {"video": kind, "audio": kind}
    if kind != "attention":
        kinds["image"] = kind
    if kind != "mean":
        kinds["multi"] = kind
    return small(slots, kinds=kinds)


def make_features(config: FusionConfig, batch: int, seed: int = 0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    shapes = {name: (batch, LENGTHS[name], config.feature_width(name)) for name in config.inputs}
    return {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}


def all_present(config: FusionConfig, batch: int) -> dict[str, jax.Array]:
    return {name: jnp.ones(batch, bool) for name in config.inputs}


def abstract_params(config: FusionConfig, llm_width: int = LLM_WIDTH) -> dict:
    features = {
        name: jax.ShapeDtypeStruct((1, 8, config.feature_width(name)), jnp.float32)
        for name in config.inputs
    }
    present = {name: jax.ShapeDtypeStruct((1,), bool) for name in config.inputs}
    return jax.eval_shape(Fusion(config, llm_width).init, jax.random.key(0), features, present)[
        "params"
    ]


def make_params(config: FusionConfig, seed: int = 0) -> dict:
    """Normal parameters of variance 1 / in; a Q-Former's own start hardly depends on its input."""
    rng = np.random.default_rng(seed)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        scale = leaf.shape[0] ** -0.5 if leaf.ndim == 2 else 1.0
        return jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree.map(draw, abstract_params(config))


def initial_params(config: FusionConfig, llm_width: int = LLM_WIDTH) -> dict:
    init = jax.jit(Fusion(config, llm_width).init)
    return init(jax.random.key(0), make_features(config, 1), all_present(config, 1))["params"]


@functools.cache
def jitted(config: FusionConfig) -> jax.stages.Wrapped:
    return jax.jit(Fusion(config, LLM_WIDTH).apply)


def apply(config: FusionConfig, params: dict, features: dict, present: dict) -> jax.Array:
    return jitted(config)({"params": params}, features, present)


@functools.cache
def value_and_gradients(config: FusionConfig) -> jax.stages.Wrapped:
    """`f(params, features, present)`: the tokens, and the gradients of a loss of them."""

    def loss(params: dict, features: dict, present: dict) -> tuple[jax.Array, jax.Array]:
        tokens = Fusion(config, LLM_WIDTH).apply({"params": params}, features, present)
        # Its slope is not zero where the tokens are: only the mask can stop the gradient there.
        return jnp.sum((tokens + 1) ** 2), tokens

    def run(*args: dict) -> tuple[jax.Array, dict, dict]:
        gradients, tokens = jax.grad(loss, argnums=(0, 1), has_aux=True)(*args)
        return tokens, *gradients

    return jax.jit(run)


def every_presence(config: FusionConfig) -> tuple[int, dict[str, jax.Array]]:
    """A batch size and masks with one sample for every combination of absent modalities."""
    table = np.array(list(itertools.product([False, True], repeat=len(config.inputs))))
    masks = {name: jnp.asarray(table[:, i]) for i, name in enumerate(config.inputs)}
    return len(table), masks


def slot_presence(config: FusionConfig, present: dict) -> np.ndarray:
    """`[B, K]`: whether the tokens of a sample have anything to speak of."""

    def speaks(slot: str) -> np.ndarray:
        return np.logical_or.reduce([present[name] for name in MODALITIES[slot].features])

    columns = [
        np.repeat(speaks(slot)[:, None], count, axis=1)
        for slot, count in config.token_counts().items()
    ]
    return np.concatenate(columns, axis=1)


def float64(tree: dict) -> dict:
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def affine(module: dict, x: np.ndarray) -> np.ndarray:
    return x @ module["kernel"] + module["bias"]


# --- values ---------------------------------------------------------------------------------------


def test_attention_head_is_an_unnormalised_weighted_sum() -> None:
    config = small(("audio",))
    params, features = make_params(config), make_features(config, batch=3)
    actual = apply(config, params, features, all_present(config, 3))

    head, frames = float64(params)["audio"], np.asarray(features["audio"], np.float64)
    pooled = np.zeros((3, config.widths["audio"]))
    for t in range(frames.shape[1]):
        pooled += affine(head["score"], frames[:, t]) * frames[:, t]
    np.testing.assert_allclose(actual[:, 0], affine(head["projection"], pooled), **FLOAT32)


def test_mean_head_projects_the_mean() -> None:
    config = small(("image",))
    params, features = make_params(config), make_features(config, batch=3)
    actual = apply(config, params, features, all_present(config, 3))
    mean = np.asarray(features["image"], np.float64).mean(axis=1)
    expected = affine(float64(params)["image"]["projection"], mean)
    np.testing.assert_allclose(actual[:, 0], expected, **FLOAT32)


@pytest.mark.parametrize("video_present", [True, False])
@pytest.mark.parametrize("audio_present", [True, False])
def test_pre_fusion_attention_is_equations_5_to_7(video_present: bool, audio_present: bool) -> None:
    config = small(("multi",))
    params, features = make_params(config), make_features(config, batch=3)
    present = {"face": jnp.full(3, video_present), "audio": jnp.full(3, audio_present)}
    actual = apply(config, params, features, present)

    multi, arrays = float64(params)["multi"], float64(features)
    video = affine(multi["video_projection"], arrays["face"].mean(axis=1)) * video_present
    audio = affine(multi["audio_projection"], arrays["audio"].mean(axis=1)) * audio_present
    hidden = affine(multi["hidden"], np.concatenate([video, audio], axis=1))
    weights = affine(multi["score"], hidden)
    fused = weights[:, :1] * video + weights[:, 1:] * audio
    expected = affine(multi["projection"], fused) * (video_present or audio_present)
    np.testing.assert_allclose(actual[:, 0], expected, **FLOAT32)


@pytest.mark.parametrize("slots", [("multi", "audio", "face"), ("face", "multi", "audio")])
def test_a_projected_pre_fusion_fuses_the_tokens_of_the_heads(slots: tuple) -> None:
    config = small(slots, kinds={"multi": "projected"})
    params, features = make_params(config), make_features(config, batch=3)
    present = {"face": jnp.array([True, True, False]), "audio": jnp.array([True, False, True])}
    tokens = dict(zip(slots, apply(config, params, features, present).swapaxes(0, 1), strict=True))

    multi = float64(params)["multi"]
    assert multi["video_projection"]["kernel"].shape == (LLM_WIDTH, config.width)
    ones = {name: np.asarray(mask)[:, None] for name, mask in present.items()}
    video = affine(multi["video_projection"], np.float64(tokens["face"])) * ones["face"]
    audio = affine(multi["audio_projection"], np.float64(tokens["audio"])) * ones["audio"]
    weights = affine(
        multi["score"], affine(multi["hidden"], np.concatenate([video, audio], axis=1))
    )
    fused = weights[:, :1] * video + weights[:, 1:] * audio
    np.testing.assert_allclose(tokens["multi"], affine(multi["projection"], fused), **FLOAT32)


def test_pre_fusion_reads_the_chosen_visual_feature() -> None:
    params = make_params(small(("multi",)))
    features = make_features(small(), batch=2)
    for slot, chosen, other in (("multi", "face", "frame"), ("multi_frame", "frame", "face")):
        config = small((slot,))
        present = all_present(small(), 2)
        tokens = apply(config, params, features, present)
        changed = {chosen: features[chosen] + 1, other: features[other]}
        same = {chosen: features[chosen], other: features[other] + 1}
        audio = {"audio": features["audio"]}
        assert bool((apply(config, params, changed | audio, present) != tokens).any())
        np.testing.assert_array_equal(apply(config, params, same | audio, present), tokens)


@pytest.mark.parametrize("kind", ["attention", "qformer"])
def test_both_fused_slots_share_one_pre_fusion(kind: str) -> None:
    config = small(("multi", "multi_frame"), kinds={"multi": kind})
    features = make_features(config, batch=2)
    features["frame"] = features["face"]
    params = make_params(config)
    assert set(params) == {"multi"}
    tokens = apply(config, params, features, all_present(config, 2))
    first, second = np.split(np.asarray(tokens), 2, axis=1)
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("kind", KINDS)
def test_face_and_frame_share_one_head(kind: str) -> None:
    config = small(("face", "frame"), kinds={"video": kind})
    features = make_features(config, batch=2)
    features["frame"] = features["face"]
    face, frame = jnp.split(
        apply(config, make_params(config), features, all_present(config, 2)), 2, axis=1
    )
    np.testing.assert_array_equal(face, frame)


def test_tokens_stand_in_slot_order() -> None:
    config = small(("image", "face", "audio", "multi", "frame"), kinds={"audio": "qformer"})
    params, features = make_params(config), make_features(config, batch=2)
    present = all_present(config, 2)
    tokens = apply(config, params, features, present)
    assert tokens.shape == (2, 12, LLM_WIDTH)

    starts = {"image": 0, "face": 1, "audio": 2, "multi": 10, "frame": 11}
    for slot, count in config.token_counts().items():
        module = {"face": "video", "frame": "video"}.get(slot, slot)
        alone = dataclasses.replace(config, slots=(slot,))
        expected = apply(alone, {module: params[module]}, features, present)
        assert expected.shape[1] == count
        actual = tokens[:, starts[slot] : starts[slot] + count]
        np.testing.assert_allclose(actual, expected, **FLOAT32)


@pytest.mark.parametrize("slot", ["multi", "audio"])
def test_qformer_sees_the_order_of_the_sequence(slot: str) -> None:
    config = all_of_one_kind("qformer", (slot,))
    params, features = make_params(config), make_features(config, batch=2)
    reversed_in_time = {name: x[:, ::-1] for name, x in features.items()}
    present = all_present(config, 2)
    forward = apply(config, params, features, present)
    backward = apply(config, params, reversed_in_time, present)
    assert (
        float(jnp.abs(forward - backward).max()) > 0.01
    )  # Without positions: rounding, about 1e-6.


# --- absent modalities ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_absent_modalities_are_exact_zeros_and_never_leak(kind: str, poison: float) -> None:
    config = all_of_one_kind(kind, SLOTS_OF_KIND[kind])
    batch, present = every_presence(config)
    params, features = make_params(config), make_features(config, batch)
    poisoned = {
        name: jnp.where(present[name][:, None, None], x, poison) for name, x in features.items()
    }
    run = value_and_gradients(config)
    tokens, of_params, of_features = run(params, poisoned, present)
    clean_tokens, clean_of_params, _ = run(params, features, present)

    spoken = slot_presence(config, present)
    assert bool((np.asarray(tokens)[~spoken] == 0).all())
    assert bool((np.asarray(tokens)[spoken] != 0).any(axis=-1).all())
    np.testing.assert_array_equal(tokens, clean_tokens)
    jax.tree.map(np.testing.assert_array_equal, of_params, clean_of_params)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(of_params))
    for name, gradient in of_features.items():
        assert bool(jnp.isfinite(gradient).all())
        assert bool((gradient[~present[name]] == 0).all())
        assert bool((gradient[present[name]] != 0).any())


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_batch_without_any_modality_moves_no_parameter(kind: str) -> None:
    config = all_of_one_kind(kind, SLOTS_OF_KIND[kind])
    batch, present = every_presence(config)
    features = jax.tree.map(lambda x: x * jnp.nan, make_features(config, batch))
    absent = jax.tree.map(jnp.zeros_like, present)
    tokens, *gradients = value_and_gradients(config)(make_params(config), features, absent)
    assert all(bool((leaf == 0).all()) for leaf in jax.tree.leaves([tokens, gradients]))


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_sample_does_not_depend_on_its_neighbours(kind: str) -> None:
    config = all_of_one_kind(kind, SLOTS_OF_KIND[kind])
    batch, present = every_presence(config)
    params, features = make_params(config), make_features(config, batch)
    tokens = apply(config, params, features, present)
    for i in range(batch):
        one = slice(i, i + 1)
        alone = apply(
            config,
            params,
            {name: x[one] for name, x in features.items()},
            {name: x[one] for name, x in present.items()},
        )
        np.testing.assert_allclose(tokens[one], alone, **FLOAT32)


def test_pre_fusion_qformer_skips_an_absent_audio_of_any_length() -> None:
    config = small(("multi",), kinds={"multi": "qformer"})
    params, features = make_params(config), make_features(config, batch=2)
    present = {"face": jnp.ones(2, bool), "audio": jnp.zeros(2, bool)}
    shorter = {"face": features["face"], "audio": features["audio"][:, :1]}
    np.testing.assert_allclose(
        apply(config, params, features, present),
        apply(config, params, shorter, present),
        **FLOAT32,
    )


def test_keep_present_selects_samples() -> None:
    values = jnp.array([[1.0, jnp.nan], [2.0, 3.0]])
    np.testing.assert_array_equal(
        keep_present(values, jnp.array([False, True])), [[0.0, 0.0], [2.0, 3.0]]
    )


# --- parameters -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slots", "modules"),
    [
        (("multi", "audio", "face"), {"multi", "audio", "video"}),
        (("multi",), {"multi"}),
        (("audio", "face"), {"audio", "video"}),
        (("face", "frame"), {"video"}),
        (("frame",), {"video"}),
        (("image",), {"image"}),
    ],
)
@pytest.mark.parametrize("kind", ["attention", "qformer"])
def test_only_used_modules_have_parameters(slots: tuple, modules: set, kind: str) -> None:
    config = small(slots, kinds={"multi": kind, "video": kind, "audio": kind})
    assert set(abstract_params(config)) == modules


def test_parameter_count_of_the_paper() -> None:
    params = abstract_params(FusionConfig(("multi", "audio", "face")), llm_width=3584)
    expected = {
        "video": (768 + 1) + (768 * 3584 + 3584),
        "audio": (1024 + 1) + (1024 * 3584 + 3584),
        "multi": (768 * 1024 + 1024)
        + (1024 * 1024 + 1024)
        + (2048 * 1024 + 1024)
        + (1024 * 2 + 2)
        + (1024 * 3584 + 3584),
    }
    counts = {
        name: sum(leaf.size for leaf in jax.tree.leaves(module)) for name, module in params.items()
    }
    assert counts == expected
    assert sum(counts.values()) == 14_042_372


def test_linear_layers_start_uniform_within_one_over_root_in() -> None:
    fan_in = {
        ("audio", "score"): 1024,
        ("audio", "projection"): 1024,
        ("video", "score"): 768,
        ("video", "projection"): 768,
        ("multi", "video_projection"): 768,
        ("multi", "audio_projection"): 1024,
        ("multi", "hidden"): 2048,
        ("multi", "score"): 1024,
        ("multi", "projection"): 1024,
    }
    params = initial_params(FusionConfig(("multi", "audio", "face")), llm_width=256)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        *module, kind = (entry.key for entry in path)
        bound = fan_in[tuple(module)] ** -0.5
        assert leaf.dtype == jnp.float32
        assert kind == "bias" or leaf.shape[0] == fan_in[tuple(module)]
        assert float(jnp.abs(leaf).max()) <= bound, path
        if leaf.size >= 256:
            # A uniform's deviation is bound / sqrt(3), with a standard error of 2.8 % at 256 draws.
            assert np.std(leaf) == pytest.approx(bound / 3**0.5, rel=0.12), path


def test_position_tables_have_the_rows_of_the_release() -> None:
    config = all_of_one_kind("qformer")
    params = abstract_params(config)
    shapes = {name: params[name]["positions"].shape for name in ("audio", "video", "image")}
    assert shapes == {"audio": (8, 10), "video": (32, 6), "image": (257, 7)}
    assert params["multi"]["head"]["positions"].shape == (264, config.width)


def test_qformer_heads_start_with_standard_normal_positions() -> None:
    config = all_of_one_kind("qformer", ("image",))
    head = initial_params(config)["image"]
    # 1,799 draws: the standard error of the deviation is 1.7 %, of the mean 2.4 %.
    assert np.std(head["positions"]) == pytest.approx(1.0, rel=0.07)
    assert abs(np.mean(head["positions"])) < 0.1
    # 256 draws: 4.4 %.
    assert np.std(head["qformer"]["queries"]) == pytest.approx(0.02, rel=0.18)
    bound = config.qformer.width**-0.5
    assert 0.8 * bound < float(jnp.abs(head["projection"]["kernel"]).max()) <= bound


# --- the configuration and its errors -------------------------------------------------------------


def test_token_counts_follow_kinds_in_slot_order() -> None:
    assert FusionConfig(("multi", "audio", "face")).token_counts() == dict.fromkeys(
        ("multi", "audio", "face"), 1
    )
    means = FusionConfig(("image", "frame", "audio"), {"video": "mean", "audio": "mean"})
    assert list(means.token_counts().items()) == [("image", 1), ("frame", 1), ("audio", 1)]
    counts = all_of_one_kind("qformer").token_counts()
    assert counts == {
        "multi": 16,
        "multi_frame": 16,
        "audio": 8,
        "face": 32,
        "frame": 32,
        "image": 32,
    }
    assert FusionConfig(()).token_counts() == {}


@pytest.mark.parametrize(
    ("slots", "inputs"),
    [
        (("multi", "audio", "face"), ("audio", "face")),
        (("multi_frame", "audio", "frame"), ("audio", "frame")),
        (("multi", "face", "frame"), ("audio", "face", "frame")),
        (("multi", "multi_frame"), ("audio", "face", "frame")),
        (("multi_frame",), ("audio", "frame")),
        (("face", "audio"), ("audio", "face")),
        (("image",), ("image",)),
        ((), ()),
    ],
)
def test_inputs_are_what_the_slots_read(slots: tuple, inputs: tuple) -> None:
    assert FusionConfig(slots).inputs == inputs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"slots": ("audio", "video")},
            r"slots \['video'\].*multi, multi_frame, audio, face, frame, image",
        ),
        ({"slots": ("audio", "face", "audio")}, "twice"),
        ({"kinds": {"multi": "mean"}}, "fusion 'mean'.*attention, qformer"),
        (
            {"slots": ("multi", "audio"), "kinds": {"multi": "projected"}},
            "fusion='projected' reads the tokens of face and audio, but .* none of face",
        ),
        ({"kinds": {"video": "max"}}, "projectors.video 'max'.*attention, mean, qformer"),
        ({"kinds": {"audio": ""}}, "projectors.audio ''.*attention, mean, qformer"),
        ({"kinds": {"image": "attention"}}, "projectors.image 'attention'.*mean, qformer"),
        ({"kinds": {"face": "mean"}}, r"heads \['face'\] in kinds.*multi.*audio.*video.*image"),
        ({"widths": {"frame": 6}}, r"heads \['frame'\] in widths.*multi.*audio.*video.*image"),
    ],
)
def test_a_wrong_config_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)


@pytest.mark.parametrize(
    ("slot", "lengths", "numbers"),
    [
        ("audio", {"audio": 9}, "9 .* 8 "),
        ("face", {"face": 33}, "33 .* 32 "),
        ("image", {"image": 258}, "258 .* 257 "),
        ("multi", {"face": 200, "audio": 65}, "265 .* 264 "),
    ],
)
def test_a_sequence_beyond_the_positions_is_refused(slot: str, lengths: dict, numbers: str) -> None:
    config = all_of_one_kind("qformer", (slot,))
    widths = {name: config.feature_width(name) for name in config.inputs}
    features = {name: jnp.zeros((1, lengths[name], width)) for name, width in widths.items()}
    with pytest.raises(ValueError, match=numbers):
        jax.eval_shape(
            Fusion(config, LLM_WIDTH).init, jax.random.key(0), features, all_present(config, 1)
        )


def test_the_shortest_table_of_positions_that_a_feature_meets_is_its_limit() -> None:
    config = all_of_one_kind("qformer", ("multi", "audio", "face"))
    assert (config.longest("audio"), config.longest("face")) == (8, 32)
    fused = dataclasses.replace(config, kinds={"multi": "qformer", "audio": "mean"})
    assert (fused.longest("audio"), fused.longest("face")) == (264, 264)
    assert dataclasses.replace(fused, kinds={}).longest("audio") == float("inf")


@pytest.mark.parametrize(
    ("features", "present", "message"),
    [
        ({}, {"audio": jnp.ones(1, bool)}, "need 'audio'"),
        ({"audio": jnp.ones((1, 3, 10))}, {}, "need 'audio'"),
        (
            {"audio": jnp.ones((1, 3, 6))},
            {"audio": jnp.ones(1, bool)},
            r"\[B, T, 10\].*\[1, 3, 6\]",
        ),
        ({"audio": jnp.ones((1, 10))}, {"audio": jnp.ones(1, bool)}, r"\[B, T, 10\].*\[1, 10\]"),
    ],
)
def test_a_wrong_batch_is_refused(features: dict, present: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Fusion(small(("audio",)), LLM_WIDTH).init(jax.random.key(0), features, present)


def test_a_mode_without_slots_is_refused() -> None:
    with pytest.raises(ValueError, match="no soft tokens"):
        Fusion(small(()), LLM_WIDTH).init(jax.random.key(0), {}, {})


# --- dtype and dropout ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_follows_float32(kind: str) -> None:
    config = all_of_one_kind(kind, ("audio",) if kind == "qformer" else SLOTS)
    params, features = make_params(config), make_features(config, batch=2)
    present = all_present(config, 2)
    half = jax.jit(Fusion(config, LLM_WIDTH, jnp.bfloat16).apply)(
        {"params": params}, features, present
    )
    assert half.dtype == jnp.bfloat16
    # bfloat16 keeps 8 bits (0.4 %): over ten to twenty roundings the error of a token stays within
    # some percent of its size.
    full = apply(config, params, features, present)
    error = jnp.linalg.norm(half.astype(jnp.float32) - full, axis=-1)
    assert bool((error < 0.05 * jnp.linalg.norm(full, axis=-1)).all())


@pytest.mark.parametrize(
    ("kind", "draws"), [("attention", False), ("mean", False), ("qformer", True)]
)
def test_dropout_only_in_training_and_only_in_qformers(kind: str, draws: bool) -> None:
    config = all_of_one_kind(kind, ("audio",))
    params, features = make_params(config), make_features(config, batch=2)
    present = all_present(config, 2)

    @functools.partial(jax.jit, static_argnames="deterministic")
    def run(seed: int, deterministic: bool) -> jax.Array:
        rngs = {"dropout": jax.random.key(seed)}
        return Fusion(config, LLM_WIDTH).apply(
            {"params": params}, features, present, deterministic, rngs=rngs
        )

    still = run(1, deterministic=True)
    np.testing.assert_array_equal(run(0, deterministic=True), still)
    np.testing.assert_array_equal(run(0, deterministic=False), run(0, deterministic=False))
    assert bool((run(0, deterministic=False) != still).any()) == draws
    assert bool((run(0, deterministic=False) != run(1, deterministic=False)).any()) == draws
