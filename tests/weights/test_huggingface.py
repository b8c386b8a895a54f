"""Hugging Face directories: what is written, what is read, and what is refused."""

import dataclasses
import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import needs_torch
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from safetensors.numpy import load_file, save_file
from tiny_model import LLM, random_tree, relative_error
from trees import assert_same_tree

from affectgpt_jax.models.decoder import (
    ComputeConfig,
    Decoder,
    Llama3RopeScaling,
    init_base,
    lm_head,
)
from affectgpt_jax.models.lora import TARGETS
from affectgpt_jax.models.quantize import PRECISIONS, QuantizedKernel, quantize
from affectgpt_jax.training.sharding import ActivationConstraint, make_mesh, tree_shardings
from affectgpt_jax.weights import streaming
from affectgpt_jax.weights.huggingface import (
    WeightsError,
    base_identity,
    base_tensors,
    load_base,
    read_config,
    save_base,
)

TIED = dataclasses.replace(LLM, tie_word_embeddings=True)
SCALING = Llama3RopeScaling(8.0, 1.0, 4.0, 16)
LLAMA = dataclasses.replace(LLM, qkv_bias=False, rope_scaling=SCALING)
QWEN3 = dataclasses.replace(LLM, qk_norm=True, o_bias=True, tie_word_embeddings=True)
FAMILIES = {"Qwen2": LLM, "Llama": LLAMA, "Qwen3": QWEN3}
NORM, QUERY = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"


def abstract_base(llm=LLM, dtype=jnp.float32, precision=""):
    execution = ComputeConfig(param_dtype=dtype, base_precision=precision)
    module = Decoder(llm, compute=execution)
    return jax.eval_shape(lambda key: init_base(module, key), jax.random.key(0))


def load(directory, llm=LLM, dtype=jnp.float32, mesh="data:-1"):
    abstract = abstract_base(llm, dtype)
    return load_base(directory, abstract, tree_shardings(make_mesh(mesh), abstract))


BASE = random_tree(abstract_base())


@pytest.fixture
def saved(tmp_path):
    """A directory of its own for every test, since some of them damage it."""
    save_base(tmp_path / "base", LLM, BASE)
    return tmp_path / "base"


# --- Round trips ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("llm", [*FAMILIES.values(), TIED], ids=[*FAMILIES, "tied"])
def test_a_saved_base_is_loaded_bit_for_bit(tmp_path, llm, dtype):
    base = random_tree(abstract_base(llm, dtype))
    save_base(tmp_path, llm, base)
    assert read_config(tmp_path) == llm
    assert_same_tree(load(tmp_path, llm, dtype), base)


def test_weights_are_cast_to_the_dtype_of_the_run(saved):
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), BASE)
    assert_same_tree(load(saved, dtype=jnp.bfloat16), expected)


@st.composite
def checkpoints(draw):
    """Any family, its sizes even or odd, its tensors in files of any size and of any type."""
    family = draw(st.sampled_from(sorted(FAMILIES)))
    llm = dataclasses.replace(
        FAMILIES[family],
        vocab_size=draw(st.integers(7, 64)),
        hidden_size=draw(st.sampled_from([8, 12, 32])),
        intermediate_size=draw(st.sampled_from([7, 16, 24])),
        num_hidden_layers=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([2, 16])),
        tie_word_embeddings=draw(st.booleans()),
    )
    return llm, draw(st.sampled_from(["float32", "float16", "bfloat16"]))


MESHES = ["data:8", "fsdp:8", "tensor:8", "fsdp:4,tensor:2", "data:2,fsdp:2,tensor:2"]


# A failing example is shown as it is; shrinking it would take long.
@settings(max_examples=25, phases=[Phase.explicit, Phase.generate])
@given(
    checkpoints(),
    st.sampled_from(["1KB", "6KB", "1GB"]),
    st.sampled_from([jnp.float32, jnp.bfloat16]),
    st.sampled_from(MESHES),
    st.sampled_from([1, 100, 10**6]),
)
def test_every_mesh_holds_what_transformers_saved(checkpoint, file_size, dtype, mesh, block_bytes):
    torch = needs_torch.pytorch("the files are written by transformers")
    import transformers

    llm, stored = checkpoint
    with tempfile.TemporaryDirectory() as temporary, pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming._HostShard, "block_bytes", block_bytes)
        first, directory = Path(temporary, "config"), Path(temporary, "model")
        save_base(first, llm, abstract_ones(llm))  # for its config.json
        config = transformers.AutoConfig.from_pretrained(first)
        reference = transformers.AutoModelForCausalLM.from_config(config)
        reference.to(getattr(torch, stored)).save_pretrained(directory, max_shard_size=file_size)
        assert read_config(directory) == llm
        found = load(directory, llm, dtype, mesh)
        state = reference.state_dict()

    expected = {name: tensor.float().numpy().astype(dtype) for name, tensor in state.items()}
    if llm.tie_word_embeddings:
        del expected["lm_head.weight"]
    assert named_as_hugging_face_does(found, llm).keys() == expected.keys()
    for name, leaf in named_as_hugging_face_does(found, llm).items():
        assert leaf.dtype == dtype and leaf.shape == expected[name].shape, name
        np.testing.assert_array_equal(np.asarray(leaf), expected[name], err_msg=name)


def named_as_hugging_face_does(base, llm):
    """The arrays of a base by the names and in the orientation of transformers, said in full."""
    found = {"model.embed_tokens.weight": base["embed_tokens"]}
    found["model.norm.weight"] = base["norm"]["scale"]
    if not llm.tie_word_embeddings:
        found["lm_head.weight"] = base["lm_head"].T
    assert len(base["layers"]) == llm.num_hidden_layers
    for i, layer in enumerate(base["layers"]):
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{i}.{name}.weight"] = layer[name]["scale"]
        for name in ("q_norm", "k_norm") if llm.qk_norm else ():
            found[f"model.layers.{i}.self_attn.{name}.weight"] = layer[name]["scale"]
        for name in TARGETS:
            group = "self_attn" if name[0] in "qkvo" else "mlp"
            found[f"model.layers.{i}.{group}.{name}.weight"] = layer[name]["kernel"].T
            if (name[0] in "qkv" and llm.qkv_bias) or (name[0] == "o" and llm.o_bias):
                found[f"model.layers.{i}.{group}.{name}.bias"] = layer[name]["bias"]
    assert len(found) == len(jax.tree.leaves(base))
    return found


@pytest.mark.parametrize("llm", [*FAMILIES.values(), TIED], ids=[*FAMILIES, "tied"])
def test_every_parameter_of_a_base_has_its_name(llm):
    base = random_tree(abstract_base(llm))
    found = base_tensors(base)
    expected = named_as_hugging_face_does(base, llm)
    assert found.keys() == expected.keys()
    for name, (leaf, transposed) in found.items():
        np.testing.assert_array_equal(leaf.T if transposed else leaf, expected[name])


def test_a_quantized_kernel_is_one_parameter():
    found = base_tensors(abstract_base(precision="nf4"))
    plain = base_tensors(abstract_base())
    assert {n: (leaf.shape, t) for n, (leaf, t) in found.items()} == {
        n: (leaf.shape, t) for n, (leaf, t) in plain.items()
    }
    assert isinstance(found[QUERY][0], QuantizedKernel)


def abstract_ones(llm):
    return jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), abstract_base(llm))


def kernels_of(tree):
    return [
        {name: part["kernel"] for name, part in layer.items() if "kernel" in part}
        for layer in tree["layers"]
    ]


@pytest.mark.parametrize("mesh", ["data:8", "fsdp:4,tensor:2"])
@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_kernels_are_quantized_row_by_row_as_they_are_read(saved, precision, mesh, monkeypatch):
    monkeypatch.setattr(streaming._HostShard, "block_bytes", 1)
    abstract = abstract_base(precision=precision)
    found = load_base(saved, abstract, tree_shardings(make_mesh(mesh), abstract))
    assert jax.tree.structure(found) == jax.tree.structure(abstract)
    expected = jax.tree.map(lambda kernel: quantize(kernel, precision), kernels_of(BASE))
    assert_same_tree(kernels_of(found), expected)
    for name in ("bias", "scale"):  # and nothing else is
        for found_layer, layer in zip(found["layers"], BASE["layers"], strict=True):
            for part, leaves in layer.items():
                if name in leaves:
                    assert_same_tree(found_layer[part][name], leaves[name])
    assert_same_tree(found["embed_tokens"], BASE["embed_tokens"])


def test_kernels_are_quantized_from_what_is_stored_not_from_the_dtype_of_the_run(saved):
    abstract = abstract_base(dtype=jnp.bfloat16, precision="int8")
    found = load_base(saved, abstract, tree_shardings(make_mesh("data:8"), abstract))
    for found_layer, layer in zip(found["layers"], BASE["layers"], strict=True):
        kernel = layer["up_proj"]["kernel"]
        assert_same_tree(found_layer["up_proj"]["kernel"], quantize(kernel, "int8"))
        assert found_layer["q_proj"]["bias"].dtype == jnp.bfloat16


@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_every_mesh_computes_the_same_with_a_quantized_base(saved, precision):
    tokens = np.random.default_rng(0).integers(LLM.vocab_size, size=(8, 7))
    found = []
    for mesh in ("data:8", "data:2,fsdp:2,tensor:2"):
        abstract = abstract_base(precision=precision)
        base = load_base(saved, abstract, tree_shardings(make_mesh(mesh), abstract))
        shard = ActivationConstraint(make_mesh(mesh))
        found.append(logits_of(base, LLM, tokens, shard, precision))
    # Sums in another order, and where that moves a number over the edge between two steps of int8
    # or float8, one step of that one of hundreds.
    assert relative_error(*found) < {"int8": 0.01, "fp8": 0.05, "nf4": 1e-5}[precision]


def test_a_mesh_splits_what_it_loads(saved):
    base = load(saved, mesh="fsdp:8")
    for layer in base["layers"]:
        assert not layer["up_proj"]["kernel"].is_fully_replicated
    assert_same_tree(base, BASE)


def logits_of(base, llm, tokens, shard=ComputeConfig.shard, precision=""):
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    module = Decoder(llm, compute=ComputeConfig(base_precision=precision, shard=shard))

    @jax.jit
    def logits(base):
        embeds = module.apply({"params": base}, tokens, method="embed")
        states, _ = module.apply({"params": base}, embeds, positions, np.ones_like(positions))
        return states @ lm_head(base)

    return logits(base)


@pytest.mark.parametrize("mesh", ["data:8", "fsdp:8", "data:2,fsdp:2,tensor:2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_a_saved_base_and_every_mesh_computes_the_same(tmp_path, family, mesh):
    torch = needs_torch.pytorch("the reference runs in PyTorch")
    import transformers

    llm = FAMILIES[family]
    save_base(tmp_path, llm, random_tree(abstract_base(llm)))
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(reference).__name__ == f"{family}ForCausalLM"
    tokens = np.random.default_rng(0).integers(llm.vocab_size, size=(8, 7))
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).logits.numpy()
    found = logits_of(
        load(tmp_path, llm, mesh=mesh), llm, tokens, ActivationConstraint(make_mesh(mesh))
    )
    # Float32 sums of some tens of terms, two layers deep, added in another order.
    assert relative_error(found, expected) < 1e-5


def test_rotary_frequencies_of_early_llamas_are_not_needed(tmp_path):
    base = random_tree(abstract_base(LLAMA))
    save_base(tmp_path, LLAMA, base)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(tmp_path, lambda t: t.update({name: np.ones(8, np.float32)}))
    assert_same_tree(load(tmp_path, LLAMA), base)


def test_a_tied_checkpoint_may_carry_its_head(tmp_path):
    base = random_tree(abstract_base(TIED))
    save_base(tmp_path, TIED, base)
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    assert read_config(tmp_path) == TIED
    assert_same_tree(load(tmp_path, TIED), base)


def other_head(tensors):
    """As after a merge that trained the head: one value of it is another, in its last row."""
    head = tensors["model.embed_tokens.weight"].copy()
    head[-1, -1] += 1
    tensors["lm_head.weight"] = head


def test_a_head_of_its_own_is_not_dropped_though_the_config_says_tied(tmp_path):
    base = random_tree(abstract_base(TIED))
    save_base(tmp_path, TIED, base)
    tied = base_identity(tmp_path)
    edit_tensors(tmp_path, other_head)
    llm = read_config(tmp_path)
    assert llm == dataclasses.replace(TIED, tie_word_embeddings=False)
    head = np.array(base["embed_tokens"]).T
    head[-1, -1] += 1
    assert_same_tree(load(tmp_path, llm), base | {"lm_head": head})
    assert base_identity(tmp_path).sha256 != tied.sha256
    # Compared by values: a head in another precision than its embedding may be the same.
    halves = np.asarray(base["embed_tokens"]).astype(np.float16)
    edit_tensors(
        tmp_path,
        lambda t: t.update(
            {"model.embed_tokens.weight": halves, "lm_head.weight": halves.astype(np.float32)}
        ),
    )
    assert read_config(tmp_path) == TIED


def test_transformers_computes_the_same_with_a_head_of_its_own(tmp_path):
    torch = needs_torch.pytorch("the reference runs in PyTorch")
    import transformers

    save_base(tmp_path, TIED, random_tree(abstract_base(TIED)))
    edit_tensors(tmp_path, other_head)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(TIED.vocab_size, size=(2, 7))
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).logits.numpy()
    llm = read_config(tmp_path)
    assert relative_error(logits_of(load(tmp_path, llm), llm, tokens), expected) < 1e-5


# --- What is refused ------------------------------------------------------------------------------


def edit_tensors(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut_short(directory, name="model.safetensors"):
    path = directory / name
    path.write_bytes(path.read_bytes()[:-1])


def split(directory):
    """The same checkpoint in two files with an index: norms in the second."""
    single = directory / "model.safetensors"
    tensors = load_file(single)
    single.unlink()
    weight_map = {name: SECOND if "norm" in name else FIRST for name in tensors}
    for file in (FIRST, SECOND):
        save_file({n: tensors[n] for n, f in weight_map.items() if f == file}, directory / file)
    write_index(directory, weight_map)


def write_index(directory, weight_map):
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


def edit_index(directory, change):
    index = directory / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    change(weight_map)
    write_index(directory, weight_map)


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: edit_tensors(d, lambda t: t.pop(NORM)), [NORM, "missing", "(32,)"]),
        (
            lambda d: edit_tensors(d, lambda t: t.update({"model.extra": np.zeros(1, np.float32)})),
            ["model.extra", "not part of this model"],
        ),
        (
            lambda d: edit_tensors(d, lambda t: t.update({QUERY: np.zeros((32, 31))})),
            [QUERY, "(32, 31)", "(64, 32)"],
        ),
        (
            lambda d: edit_tensors(d, lambda t: t.update({QUERY: np.zeros((64, 32), np.int8)})),
            [QUERY, "I8", "BF16"],
        ),
        (lambda d: (d / "model.safetensors").unlink(), ["model.safetensors is missing"]),
        (
            lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
            ["model.safetensors is missing", "*.bin", "save_pretrained"],
        ),
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
        "quantized",
        "no file",
        "pickles only",
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
        (lambda d: (d / SECOND).unlink(), [f"{SECOND} is missing"]),
        (lambda d: cut_short(d, SECOND), [SECOND, "not a whole safetensors file"]),
        (
            lambda d: shutil.copy(d / FIRST, d / SECOND),
            [SECOND, "lm_head.weight", "does not place"],
        ),
        (
            lambda d: edit_index(d, lambda m: m.update({"model.extra": SECOND})),
            [SECOND, "model.extra", "lacks"],
        ),
        (
            lambda d: edit_index(d, lambda m: m.update({NORM: FIRST})),
            [FIRST, NORM, "lacks"],
        ),
        (lambda d: edit_index(d, lambda m: m.pop(NORM)), [SECOND, NORM, "does not place"]),
        (lambda d: edit_index(d, lambda m: m.update({NORM: 2})), ["index.json"]),
        (lambda d: shutil.copy(d / FIRST, d / "model.safetensors"), ["out of date"]),
    ],
    ids=[
        "missing file",
        "cut short",
        "a file twice",
        "index names another tensor",
        "index names another file",
        "index lacks a tensor",
        "garbage in the index",
        "one file and several",
    ],
)
def test_an_index_and_files_that_disagree_are_one_error(saved, damage, words):
    split(saved)
    assert_same_tree(load(saved), BASE)
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
        (lambda d: edit_config(d, model_type="mixtral"), ["mixtral", "qwen2"]),
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


@pytest.mark.parametrize("in_two_files", [False, True])
def test_the_identity_of_a_qwen2_is_the_one_that_checkpoints_know(saved, in_two_files):
    if in_two_files:
        split(saved)
    shape = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_theta": 500.0,
        "rms_norm_eps": 1e-3,
        "tie_word_embeddings": False,
        "qkv_bias": True,
    }
    expected = hashlib.sha256(json.dumps(shape, sort_keys=True).encode())
    for path in sorted(saved.glob("*.safetensors")):
        expected.update(hashlib.sha256(path.read_bytes()).digest())
    assert base_identity(saved).sha256 == expected.hexdigest()


def test_a_copy_of_a_base_has_the_same_identity(saved, tmp_path):
    copy = shutil.copytree(saved, tmp_path / "elsewhere" / "base")
    assert base_identity(copy) == base_identity(saved)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: edit_tensors(d, lambda t: np.copyto(t[NORM][:1], 1.5)),
        lambda d: edit_config(d, rope_theta=12345.0),
        lambda d: edit_config(d, model_type="qwen3"),
        lambda d: edit_config(
            d, rope_scaling={"rope_type": "llama3", **dataclasses.asdict(SCALING)}
        ),
    ],
    ids=["one weight", "the config", "norms of queries and keys", "scaled positions"],
)
def test_a_changed_base_has_another_identity(saved, change):
    before = base_identity(saved)
    change(saved)
    after = base_identity(saved)
    assert after.name == before.name and after.sha256 != before.sha256
