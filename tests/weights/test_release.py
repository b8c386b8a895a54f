"""Checkpoints of the PyTorch release: its formulas over its file give our soft tokens."""

import dataclasses
import math
import pickle
import re

import jax
import jax.numpy as jnp
import needs_torch
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import LLM, make_model, random_tree, relative_error
from trees import assert_same_tree

from affectgpt_jax.models.affectgpt import init_trainable
from affectgpt_jax.models.fusers import Fusion, FusionConfig
from affectgpt_jax.models.lora import LoraConfig
from affectgpt_jax.models.qformer import QFormerConfig
from affectgpt_jax.weights import torch_zip
from affectgpt_jax.weights.release import open_release, read_release, save_release
from affectgpt_jax.weights.streaming import WeightsError

LORA = LoraConfig(rank=4, alpha=32.0, dropout=0.0)
WIDTHS = {"audio": 10, "face": 6, "image": 7}
QFORMER = QFormerConfig(width=16, heads=4, layers=2, intermediate=24)
FUSION = FusionConfig(
    ("multi", "audio", "face", "image"),
    widths={"video": 6, "audio": 10, "image": 7},
    width=8,
    qformer=QFORMER,
)
KINDS = ("attention", "mean", "qformer")


def fusion_of(pre_fusion="attention", audio="attention", video="attention", **changes):
    return dataclasses.replace(
        FUSION, kinds={"multi": pre_fusion, "audio": audio, "video": video}, **changes
    )


def abstract(fusion=FUSION):
    """Shapes of `trainable`; with the adapters of tiny_model's rank, 4."""
    return jax.eval_shape(lambda k: init_trainable(make_model(fusion=fusion), k), jax.random.key(0))


TRAINABLE = random_tree(abstract())


# --- The release in PyTorch -----------------------------------------------------------------------


def make_release(torch, fusion):
    """The heads and the pre-fusion of the release: its names, its formulas, random weights.

    It builds everything, whatever is used, and saves what it trains and its buffers.
    """
    nn, width, c = torch.nn, fusion.width, fusion.qformer
    rows = {"audio": 8, "video": 32, "multi": 264}
    queries = {"audio": 8, "video": 32, "multi": 16}
    names = {"audio": "audio_position", "video": "video_frame_position", "multi": "multi_position"}
    model = nn.Module()

    def dense_and_norm(inner):
        block = nn.Module()
        block.dense, block.LayerNorm = nn.Linear(inner, c.width), nn.LayerNorm(c.width, eps=1e-12)
        return block

    def attention(states):
        block = nn.Module()
        block.self = nn.Module()
        block.self.query = nn.Linear(c.width, c.width)
        block.self.key, block.self.value = (nn.Linear(states, c.width) for _ in range(2))
        block.output = dense_and_norm(c.width)
        return block

    def qformer(head, states):
        bert = nn.Module()
        bert.embeddings, bert.encoder = nn.Module(), nn.Module()
        bert.embeddings.LayerNorm = nn.LayerNorm(c.width, eps=1e-12)
        bert.embeddings.register_buffer("position_ids", torch.arange(512)[None])
        layers = []
        for _ in range(c.layers):
            layer = nn.Module()
            layer.attention, layer.crossattention = attention(c.width), attention(states)
            layer.intermediate_query = nn.Module()
            layer.intermediate_query.dense = nn.Linear(c.width, c.intermediate)
            layer.output_query = dense_and_norm(c.intermediate)
            layers.append(layer)
        bert.encoder.layer = nn.ModuleList(layers)
        whole = nn.Module()
        whole.bert = bert
        setattr(model, f"{head}_Qformer", whole)
        setattr(model, f"{head}_query_tokens", nn.Parameter(torch.zeros(1, queries[head], c.width)))
        setattr(model, f"{names[head]}_embedding", nn.Embedding(rows[head], states))
        return c.width

    def head(kind, name, states):
        if kind == "qformer":
            return qformer(name, states)
        if kind == "attention":
            setattr(model, f"{name}_attention_mlp", nn.Linear(states, 1))
        return states

    video, audio = fusion.widths["video"], fusion.widths["audio"]
    model.image_llama_proj = nn.Linear(fusion.widths["image"], LLM.hidden_size)
    model.affectgpt_proj = nn.Linear(head(fusion.kinds["video"], "video", video), LLM.hidden_size)
    model.audio_llama_proj = nn.Linear(head(fusion.kinds["audio"], "audio", audio), LLM.hidden_size)
    model.multi_audio_embs = nn.Linear(audio, width)
    model.multi_video_embs = nn.Linear(video, width)
    if fusion.kinds["multi"] == "qformer":
        inner = qformer("multi", width)
    else:
        model.attention_mlp, model.fc_att = nn.Linear(2 * width, width), nn.Linear(width, 2)
        inner = width
    model.multi_llama_proj = nn.Linear(inner, LLM.hidden_size)

    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3)
        if name.endswith("LayerNorm.weight"):
            parameter.data += 1
    return model


def load(path, tree, lora):
    read, unused = open_release(path, tree, lora)
    return read(tree), unused


def release_tokens(torch, model, fusion, features):
    """Its soft tokens `[B, K, D]`: pre-fusion, audio, video, image (mean)."""
    c = fusion.qformer

    def attend(block, hidden, states):
        def heads(x):
            return x.view(*x.shape[:2], c.heads, -1).transpose(1, 2)

        query = heads(block.self.query(hidden))
        key, value = heads(block.self.key(states)), heads(block.self.value(states))
        weights = torch.softmax(query @ key.mT / math.sqrt(c.width // c.heads), dim=-1)
        mixed = (weights @ value).transpose(1, 2).reshape(hidden.shape)
        return block.output.LayerNorm(block.output.dense(mixed) + hidden)

    def read(name, position, states):
        states = states + getattr(model, f"{position}_embedding").weight[: states.shape[1]]
        bert = getattr(model, f"{name}_Qformer").bert
        hidden = getattr(model, f"{name}_query_tokens").expand(states.shape[0], -1, -1)
        hidden = bert.embeddings.LayerNorm(hidden)
        for layer in bert.encoder.layer:
            hidden = attend(layer.attention, hidden, hidden)
            hidden = attend(layer.crossattention, hidden, states)
            inner = torch.nn.functional.gelu(layer.intermediate_query.dense(hidden))
            output = layer.output_query
            hidden = output.LayerNorm(output.dense(inner) + hidden)
        return hidden

    def pool(kind, name, position, states):
        if kind == "qformer":
            return read(name, position, states)
        if kind == "mean":
            return states.mean(1, keepdim=True)
        weights = getattr(model, f"{name}_attention_mlp")(states)
        return (states.mT @ weights).mT

    video, audio, image = (features[name] for name in ("face", "audio", "image"))
    if fusion.kinds["multi"] == "qformer":
        joined = torch.cat([model.multi_video_embs(video), model.multi_audio_embs(audio)], 1)
        multi = read("multi", "multi_position", joined)
    else:
        v, a = model.multi_video_embs(video.mean(1)), model.multi_audio_embs(audio.mean(1))
        weights = model.fc_att(model.attention_mlp(torch.cat([v, a], 1)))
        multi = (torch.stack([v, a], 2) @ weights[..., None]).mT
    tokens = [
        model.multi_llama_proj(multi),
        model.audio_llama_proj(pool(fusion.kinds["audio"], "audio", "audio_position", audio)),
        model.affectgpt_proj(pool(fusion.kinds["video"], "video", "video_frame_position", video)),
        model.image_llama_proj(image.mean(1, keepdim=True)),
    ]
    return torch.cat(tokens, 1)


def lora_state(torch, lora=LORA):
    """The adapters of the release's file, random, for tiny_model's decoder."""
    sizes = {
        name: (leaf["lora_a"].shape[1], leaf["lora_b"].shape[2])
        for name, leaf in TRAINABLE["lora"]["layers"].items()
    }
    state = {}
    for i in range(LLM.num_hidden_layers):
        for name, (inner, outer) in sizes.items():
            group = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            prefix = f"llama_model.base_model.model.model.layers.{i}.{group}.{name}"
            state[f"{prefix}.lora_A.default.weight"] = torch.randn(lora.rank, inner)
            state[f"{prefix}.lora_B.default.weight"] = torch.randn(outer, lora.rank)
    return state


def save_torch(torch, path, state, **others):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    beside = {
        "optimizer": optimizer.state_dict(),
        "config": {"run": {"init_lr": 1e-5}, "model": {"lora_r": 4}},
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "epoch": 30,
    }
    torch.save({"model": state} | beside | others, path)
    return path


@pytest.fixture(scope="module")
def torch():
    return needs_torch.pytorch("the release is in PyTorch")


@pytest.fixture
def saved(torch, tmp_path):
    """A file of the release, of its default types, in a directory of its own."""
    state = lora_state(torch) | make_release(torch, FUSION).state_dict()
    return save_torch(torch, tmp_path / "checkpoint_000030_loss_0.1.pth", state)


@pytest.mark.parametrize("pre_fusion", ["attention", "qformer"])
@pytest.mark.parametrize("kind", KINDS)
def test_its_file_gives_its_soft_tokens(torch, tmp_path, pre_fusion, kind):
    fusion = fusion_of(pre_fusion, audio=kind, video=KINDS[KINDS.index(kind) - 1])
    model = make_release(torch, fusion)
    state = lora_state(torch) | model.state_dict()
    path = save_torch(torch, tmp_path / "c.pth", state)
    trainable, unused = load(path, abstract(fusion), LORA)

    rng = np.random.default_rng(0)
    features = {n: rng.normal(size=(3, 5, w)).astype(np.float32) for n, w in WIDTHS.items()}
    present = {name: np.ones(3, bool) for name in features}
    found = jax.jit(Fusion(fusion, LLM.hidden_size).apply)(
        {"params": trainable["fusion"]}, features, present
    )
    with torch.no_grad():
        tensors = {name: torch.tensor(value) for name, value in features.items()}
        expected = release_tokens(torch, model, fusion, tensors).numpy()
    assert found.shape == expected.shape
    # Float32, sums of some tens of terms; one head at a time, so that a small one counts too.
    start = 0
    for count in fusion.token_counts().values():
        rows = slice(start, start + count)
        assert relative_error(found[:, rows], expected[:, rows]) < 1e-5
        start += count
    # Its Q-Formers' buffers have no place here.
    assert all(name.endswith("position_ids") for name in unused)
    assert len(unused) == [fusion.kind(slot) for slot in fusion.slots].count("qformer")


def test_its_adapters_are_read_layer_by_layer_and_transposed(torch, saved):
    trainable, _ = load(saved, abstract(), LORA)
    state = torch.load(saved, weights_only=True)["model"]
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        factors = trainable["lora"]["layers"][name.split(".")[1]]
        for i in range(LLM.num_hidden_layers):
            prefix = f"llama_model.base_model.model.model.layers.{i}.{name}"
            for ours, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
                tensor = state[f"{prefix}.{theirs}.default.weight"].numpy()
                np.testing.assert_array_equal(factors[ours][i], tensor.T)


# --- Round trips ----------------------------------------------------------------------------------

modes = st.lists(
    st.sampled_from(["multi", "audio", "face", "frame", "image"]), min_size=1, unique=True
)


@given(
    modes,
    st.sampled_from(["attention", "qformer"]),
    st.sampled_from(KINDS),
    st.sampled_from(KINDS),
    st.integers(0, 3),
)
def test_whatever_is_trained_comes_back_bit_for_bit(
    tmp_path_factory, slots, pre_fusion, audio, video, seed
):
    fusion = fusion_of(pre_fusion, audio, video, slots=tuple(slots))
    trainable = {"lora": TRAINABLE["lora"], "fusion": random_tree(fusion_shapes(fusion), seed)}
    path = tmp_path_factory.mktemp("release") / "c.pth"
    save_release(path, trainable, LORA, epoch=7, config={"llm": "tiny", "lora": {"rank": 4}})
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trainable)
    found, unused = load(path, shapes, LORA)
    assert_same_tree(found, trainable)
    assert not unused
    file = read_release(path)
    assert file.epoch == 7 and file.others == ("epoch", "config")


SHAPES = {}


def fusion_shapes(fusion):
    """Of the modules that a config uses; each is traced once."""
    shapes = {}
    for slot in fusion.slots:
        alone = dataclasses.replace(fusion, slots=(slot,))
        key = slot, alone.kind(slot)
        if key not in SHAPES:
            SHAPES[key] = abstract(alone)["fusion"]
        shapes |= SHAPES[key]
    return shapes


def test_pytorch_loads_what_is_written_into_the_release(torch, tmp_path):
    fusion = fusion_of("qformer", "attention", "qformer")
    trainable = random_tree(abstract(fusion))
    save_release(tmp_path / "c.pth", trainable, LORA, epoch=2)
    content = torch.load(tmp_path / "c.pth", weights_only=True)
    model = make_release(torch, fusion)
    expected = model.state_dict().keys() | lora_state(torch).keys()
    buffers = {name for name in expected if name.endswith("position_ids")}
    assert content["model"].keys() == expected - buffers
    heads = {k: v for k, v in content["model"].items() if not k.startswith("llama_model")}
    missing = model.load_state_dict(heads, strict=False).missing_keys
    assert set(missing) == buffers
    assert content["epoch"] == 2

    rng = np.random.default_rng(0)
    features = {n: rng.normal(size=(2, 4, w)).astype(np.float32) for n, w in WIDTHS.items()}
    present = {name: np.ones(2, bool) for name in features}
    expected = jax.jit(Fusion(fusion, LLM.hidden_size).apply)(
        {"params": trainable["fusion"]}, features, present
    )
    with torch.no_grad():
        tensors = {name: torch.tensor(value) for name, value in features.items()}
        found = release_tokens(torch, model, fusion, tensors).numpy()
    assert relative_error(found, expected) < 1e-5  # as above


def test_names_are_those_of_the_release(tmp_path):
    """Against the list of key names, written down from its checkpoints."""
    trainable = random_tree(abstract(fusion_of("qformer", "qformer", "attention")))
    save_release(tmp_path / "c.pth", trainable, LORA, epoch=0)
    found = {re.sub(r"\.\d+\.", ".{i}.", name) for name in read_release(tmp_path / "c.pth").tensors}
    linear = "video_attention_mlp affectgpt_proj audio_llama_proj image_llama_proj".split()
    linear += "multi_video_embs multi_audio_embs multi_llama_proj".split()
    bert = ["embeddings.LayerNorm"]
    for block in ("attention", "crossattention"):
        bert += [f"encoder.layer.{{i}}.{block}.self.{part}" for part in ("query", "key", "value")]
        bert += [f"encoder.layer.{{i}}.{block}.output.{part}" for part in ("dense", "LayerNorm")]
    bert += ["encoder.layer.{i}.intermediate_query.dense"]
    bert += [f"encoder.layer.{{i}}.output_query.{part}" for part in ("dense", "LayerNorm")]
    linear += [f"{head}_Qformer.bert.{name}" for head in ("audio", "multi") for name in bert]
    expected = {f"{name}.{kind}" for name in linear for kind in ("weight", "bias")}
    for head in ("audio", "multi"):
        expected |= {f"{head}_query_tokens", f"{head}_position_embedding.weight"}
    for group, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
        expected |= {
            f"llama_model.base_model.model.model.layers.{{i}}.{group}.{name}_proj.lora_{factor}"
            ".default.weight"
            for name in names
            for factor in "AB"
        }
    assert found == expected


# --- What is reported, and what is refused --------------------------------------------------------


def test_heads_that_the_config_does_not_use_are_listed(saved):
    narrow = dataclasses.replace(FUSION, slots=("audio",))
    trainable, unused = load(saved, abstract(narrow), LORA)
    assert [*trainable["fusion"]] == ["audio"]
    modules = "affectgpt_proj attention_mlp fc_att image_llama_proj multi_audio_embs".split()
    modules += "multi_llama_proj multi_video_embs video_attention_mlp".split()
    assert unused == [f"{name}.{kind}" for name in modules for kind in ("bias", "weight")]


def edit(torch, path, change):
    content = torch.load(path, weights_only=True)
    change(content["model"])
    torch.save(content, path)


def assert_refused(path, *words, fusion=FUSION, lora=LORA):
    with pytest.raises(WeightsError) as error:
        load(path, abstract(fusion), lora)
    for word in (str(path), *words):
        assert word in str(error.value)


def test_a_wrapped_model_and_buffers_are_read_over(torch, saved):
    expected, _ = load(saved, abstract(), LORA)
    extra = {
        "visual_encoder.model.embeddings.position_ids": torch.arange(3),
        "acoustic_encoder.something": torch.ones(1),
        "llama_model.base_model.model.model.rotary_emb.inv_freq": torch.ones(2),
    }
    edit(torch, saved, lambda model: model.update(extra))

    def wrap(model):
        for name in list(model):
            model[f"module.{name}"] = model.pop(name)

    edit(torch, saved, wrap)
    found, unused = load(saved, abstract(), LORA)
    assert_same_tree(found, expected)
    assert unused == sorted(extra)
    # Of a wrapped model every name has the prefix; a file in which one lacks it is mixed.
    edit(torch, saved, lambda model: model.update({FIRST: model.pop(f"module.{FIRST}")}))
    assert_refused(saved, "it was saved from a wrapped model")


def test_half_precision_is_cast_to_the_dtype_of_the_run(torch, saved):
    expected, _ = load(saved, abstract(), LORA)

    def halve(model):
        for name in model:
            model[name] = model[name].bfloat16()

    edit(torch, saved, halve)
    found, _ = load(saved, abstract(), LORA)
    assert_same_tree(
        found, jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), expected)
    )


FIRST = "llama_model.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.pop(FIRST), [FIRST, "missing", "(4, 32)"]),
        (lambda m: m.pop("audio_llama_proj.weight"), ["audio_llama_proj.weight", "missing"]),
        (lambda m: m.pop("fc_att.bias"), ["fc_att.bias", "missing", "(2,)"]),
        (
            lambda m: m.update({"fc_att.bias": m["fc_att.bias"][:1]}),
            ["fc_att.bias", "(1,)", "(2,)"],
        ),
        (lambda m: m.update({"fc_att.bias": m["fc_att.bias"][0]}), ["fc_att.bias", "()", "(2,)"]),
        (
            lambda m: m.update({"fc_att.bias": m["fc_att.bias"][:1].expand(2**50)}),
            ["fc_att.bias", f"({2**50},)"],
        ),
        (lambda m: m.update(pose_proj=m["fc_att.bias"]), ["pose_proj", "not part of this model"]),
        (
            lambda m: m.update({FIRST.replace("layers.0", "layers.9"): m[FIRST]}),
            ["layers.9", "not part of this model"],
        ),
        (lambda m: m.update({FIRST: m[FIRST][0, 0]}), [FIRST, "()", "(4, 32)"]),
        (lambda m: m.update({FIRST: m[FIRST][:2]}), [FIRST, "(2, 32)", "(4, 32)"]),
        (
            lambda m: m.update({k: v[:2] for k, v in m.items() if "lora_A" in k}),
            ["rank is 2", "config.lora.rank is 4"],
        ),
        (
            lambda m: [m.pop(k) for k in list(m) if "q_proj" in k],
            ["targets is ('k_proj'", "config.lora.targets is ('q_proj'"],
        ),
        (
            lambda m: [m.pop(k) for k in list(m) if "lora" in k],
            ["rank is 0", "config.lora.rank is 4"],
        ),
        (lambda m: m.update(x=3), ["model['x'] is of type int", "expected a tensor"]),
    ],
    ids=[
        "no adapter",
        "no head",
        "no bias",
        "wrong shape",
        "no shape",
        "a shape without end",
        "unknown tensor",
        "unknown layer",
        "adapter without shape",
        "an adapter of another rank",
        "another rank",
        "other targets",
        "no LoRA",
        "not a tensor",
    ],
)
def test_a_file_that_does_not_fit_is_one_error_that_names_the_thing(torch, saved, change, words):
    edit(torch, saved, change)
    assert_refused(saved, *words)


def test_other_types_of_heads_are_refused_with_both_sides(saved):
    for fusion, words in (
        (fusion_of(audio="mean"), ["audio head is of type attention", "projectors.audio is mean"]),
        (
            fusion_of(video="qformer"),
            ["video head is of type attention", "projectors.video is qformer"],
        ),
        (fusion_of("qformer"), ["multi head is of type attention", "config.fusion is qformer"]),
    ):
        assert_refused(saved, *words, fusion=fusion)


def test_another_alpha_is_refused_both_ways(saved, tmp_path):
    lora = dataclasses.replace(LORA, alpha=16.0)
    assert_refused(saved, "alpha is 32.0", "config.lora.alpha is 16.0", lora=lora)
    with pytest.raises(WeightsError, match="32 / rank.*config.lora.alpha=16.0"):
        save_release(tmp_path / "c.pth", TRAINABLE, lora, epoch=0)
    assert not (tmp_path / "c.pth").exists()


def test_a_qformer_for_images_is_ours_alone(saved, tmp_path):
    fusion = dataclasses.replace(FUSION, kinds={"image": "qformer"})
    words = "no Q-Former for images.*config.projectors.image=mean"
    with pytest.raises(WeightsError, match=words):
        load(saved, abstract(fusion), LORA)
    with pytest.raises(WeightsError, match=words):
        save_release(tmp_path / "c.pth", random_tree(abstract(fusion)), LORA, epoch=0)
    assert not (tmp_path / "c.pth").exists()


def test_a_model_without_lora_is_written_and_read_without(tmp_path):
    trainable = {"lora": {}, "fusion": TRAINABLE["fusion"]}
    save_release(tmp_path / "c.pth", trainable, None, epoch=0)
    shapes = {"lora": {}, "fusion": abstract()["fusion"]}
    assert_same_tree(load(tmp_path / "c.pth", shapes, None)[0], trainable)
    save_release(tmp_path / "full.pth", TRAINABLE, LORA, epoch=0)
    with pytest.raises(WeightsError, match="rank is 4, but config.lora.rank is 0"):
        load(tmp_path / "full.pth", shapes, None)


@pytest.mark.parametrize("content", [{}, [], {"model": []}, {"state_dict": {}}, 3])
def test_other_contents_are_refused(tmp_path, content):
    torch_zip.save(tmp_path / "c.pth", content)
    assert_refused(tmp_path / "c.pth", "not a checkpoint of the release", "'model'")


def test_objects_anywhere_in_the_file_are_refused(torch, saved):
    content = torch.load(saved, weights_only=True)
    content["config"] = pytest.Config  # a class, as a config object's pickle names one
    torch.save(content, saved)
    load(saved, abstract(), LORA)  # a name alone is text, and nobody reads the config

    class Trap:
        def __reduce__(self):
            return eval, ("1 / 0",)

    content["optimizer"] = Trap()
    torch.save(content, saved, pickle_module=pickle)
    assert_refused(saved, "would call", "eval")
