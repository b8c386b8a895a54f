"""Hugging Face directories: what is written, what is read, and what is refused."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_model import LLM, random_tree, relative_error

from affectgpt_jax.models.qwen2 import Qwen2, init_base, unembedding
from affectgpt_jax.training.sharding import make_mesh, tree_shardings
from affectgpt_jax.weights.huggingface import (
    WeightsError,
    base_identity,
    load_base,
    read_config,
    save_base,
)

TIED = dataclasses.replace(LLM, tie_word_embeddings=True)
NORM, QUERY = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"


def abstract_base(llm=LLM, dtype=jnp.float32):
    shapes = jax.eval_shape(lambda key: init_base(Qwen2(llm), key), jax.random.key(0))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)


def load(directory, llm=LLM, dtype=jnp.float32, mesh="data:-1"):
    abstract = abstract_base(llm, dtype)
    return load_base(directory, abstract, tree_shardings(make_mesh(mesh), abstract))


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


BASE = random_tree(abstract_base())


@pytest.fixture
def saved(tmp_path):
    """A directory of its own for every test, since some of them damage it."""
    save_base(tmp_path / "base", LLM, BASE)
    return tmp_path / "base"


# --- Round trips ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("llm", [LLM, TIED], ids=["untied", "tied"])
def test_a_saved_base_is_loaded_bit_for_bit(tmp_path, llm, dtype):
    base = random_tree(abstract_base(llm, dtype))
    save_base(tmp_path, llm, base)
    assert read_config(tmp_path) == llm
    assert_same(load(tmp_path, llm, dtype), base)


def test_weights_are_cast_to_the_dtype_of_the_run(saved):
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), BASE)
    assert_same(load(saved, dtype=jnp.bfloat16), expected)


@pytest.mark.parametrize("mesh", ["fsdp:8", "data:2,fsdp:2,tensor:2", "tensor:8"])
def test_every_mesh_holds_the_same_weights(saved, mesh):
    base = load(saved, mesh=mesh)
    assert not base["layers"]["up_proj"]["kernel"].is_fully_replicated
    assert_same(base, BASE)


def logits_of(base, llm, tokens):
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    module = Qwen2(llm)

    @jax.jit
    def logits(base):
        embeds = module.apply({"params": base}, tokens, method="embed")
        states, _ = module.apply({"params": base}, embeds, positions, np.ones_like(positions))
        return states @ unembedding(base)

    return logits(base)


@pytest.mark.parametrize("llm", [LLM, TIED], ids=["untied", "tied"])
def test_transformers_reads_a_saved_base(tmp_path, llm):
    torch = pytest.importorskip("torch", reason="the reference runs in PyTorch")
    import transformers

    base = random_tree(abstract_base(llm))
    save_base(tmp_path, llm, base)
    reference = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(llm.vocab_size, size=(2, 7))
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).logits.numpy()
    # Float32 sums of some tens of terms, two layers deep, added in another order.
    assert relative_error(logits_of(base, llm, tokens), expected) < 1e-5


def test_a_checkpoint_in_several_bfloat16_files_is_read_as_one(saved, tmp_path):
    torch = pytest.importorskip("torch", reason="the files are written by transformers")
    import transformers

    reference = transformers.Qwen2ForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    reference.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert read_config(tmp_path) == LLM
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), BASE)
    assert_same(load(tmp_path, dtype=jnp.bfloat16), expected)


def test_a_tied_checkpoint_may_carry_its_head(tmp_path):
    base = random_tree(abstract_base(TIED))
    save_base(tmp_path, TIED, base)
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    assert_same(load(tmp_path, TIED), base)


# --- What is refused ------------------------------------------------------------------------------


def edit_tensors(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut_short(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: edit_tensors(d, lambda t: t.pop(NORM)), [NORM, "missing", "(32,)"]),
        (
            lambda d: edit_tensors(d, lambda t: t.update({"model.extra": np.zeros(1)})),
            ["model.extra", "not part of this model"],
        ),
        (
            lambda d: edit_tensors(d, lambda t: t.update({QUERY: np.zeros((32, 31))})),
            [QUERY, "(32, 31)", "(64, 32)"],
        ),
        (lambda d: (d / "model.safetensors").unlink(), ["model.safetensors is missing"]),
        (lambda d: (d / "model.safetensors").write_bytes(b"garbage"), ["model.safetensors", "not"]),
        (cut_short, ["model.safetensors", "not"]),
        (lambda d: (d / "model.safetensors.index.json").write_text("{"), ["index.json"]),
        (lambda d: (d / "model.safetensors.index.json").write_text("{}"), ["index.json"]),
        (
            lambda d: (d / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {NORM: "model-1.safetensors"}})
            ),
            ["model-1.safetensors is missing"],
        ),
    ],
    ids=[
        "missing tensor",
        "extra tensor",
        "wrong shape",
        "no file",
        "garbage",
        "cut short",
        "garbage index",
        "empty index",
        "missing shard",
    ],
)
def test_damaged_weights_are_one_error_that_names_the_thing(saved, damage, words):
    damage(saved)
    with pytest.raises(WeightsError) as error:
        load(saved)
    for word in (str(saved), *words):
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: (d / "config.json").unlink(), ["not found", "Hugging Face"]),
        (lambda d: (d / "config.json").write_text("{"), []),
        (lambda d: (d / "config.json").write_text("[]"), []),
        (lambda d: (d / "config.json").write_bytes(b"\xff"), []),
        (lambda d: edit_config(d, model_type="llama"), ["llama", "qwen2"]),
        (lambda d: edit_config(d, rope_theta=None), ["rope_theta"]),
    ],
    ids=["missing", "garbage", "a list", "not text", "another model", "missing key"],
)
def test_an_unusable_config_is_one_error_that_names_the_file(saved, damage, words):
    damage(saved)
    with pytest.raises(WeightsError) as error:
        read_config(saved)
    for word in (str(saved / "config.json"), *words):
        assert word in str(error.value)


# --- Identity -------------------------------------------------------------------------------------


def test_a_copy_of_a_base_has_the_same_identity(saved, tmp_path):
    copy = shutil.copytree(saved, tmp_path / "elsewhere" / "base")
    assert base_identity(copy) == base_identity(saved)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: edit_tensors(d, lambda t: np.copyto(t[NORM][:1], 1.5)),
        lambda d: edit_config(d, rope_theta=12345.0),
    ],
    ids=["one weight", "the config"],
)
def test_a_changed_base_has_another_identity(saved, change):
    before = base_identity(saved)
    change(saved)
    after = base_identity(saved)
    assert after.name == before.name and after.sha256 != before.sha256
