"""LoRA folded into a base: the same function, in a directory that transformers reads."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import needs_torch
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_model import LLM, make_model, random_base, random_trainable, relative_error

from affectgpt_jax.models import lora as lora_module
from affectgpt_jax.models.decoder import Decoder, lm_head
from affectgpt_jax.training import sharding
from affectgpt_jax.weights.huggingface import save_base, weight_files
from affectgpt_jax.weights.merge import merge_kernel, save_merged
from affectgpt_jax.weights.streaming import DTYPES, WeightsError, read_header
from affectgpt_jax.weights.tensors import write_tensors

MODEL = make_model()
CONFIG = MODEL.decoder.lora
LORA = random_trainable(MODEL)["lora"]
FAMILIES = {
    "Qwen2": LLM,
    "Llama": dataclasses.replace(LLM, qkv_bias=False),
    "Qwen3": dataclasses.replace(LLM, qk_norm=True, o_bias=True, tie_word_embeddings=True),
}
TOKENS = np.random.default_rng(0).integers(LLM.vocab_size, size=(2, 7))
QUERY = "model.layers.1.self_attn.q_proj.weight"


def make_base(directory, llm=LLM, dtype=jnp.float32):
    base = random_base(make_model(llm, param_dtype=dtype))
    save_base(directory, llm, base)
    return base


def logits(llm, base, lora=None):
    positions = np.broadcast_to(np.arange(TOKENS.shape[1], dtype=np.int32), TOKENS.shape)
    module = Decoder(llm, CONFIG)

    @jax.jit
    def run(base, lora):
        variables = {"params": base, "lora": lora}
        embeds = module.apply(variables, TOKENS, method="embed")
        states, _ = module.apply(variables, embeds, positions, np.ones_like(positions))
        return states @ lm_head(base)

    return run(base, lora or {})


def all_tensors(directory):
    return {k: v for path in weight_files(directory) for k, v in load_file(path).items()}


def merge_on_device(kernels, lora_a, lora_b, scale):
    """Of every layer."""
    base = {"layers": tuple({"q_proj": {"kernel": jnp.asarray(kernel)}} for kernel in kernels)}
    lora = {"layers": {"q_proj": {"lora_a": lora_a, "lora_b": lora_b}}}
    merged = lora_module.merge(base, lora, scale)["layers"]
    return np.stack([layer["q_proj"]["kernel"] for layer in merged])


@pytest.mark.parametrize(
    ("merge_kernel", "dtype"),
    [
        *((merge_kernel, x) for x in (np.float64, np.float32, np.float16, jnp.bfloat16)),
        *((merge_on_device, x) for x in (np.float32, np.float16, jnp.bfloat16)),
    ],
)
def test_a_kernel_is_merged_in_float32_or_wider_and_rounded_once(merge_kernel, dtype):
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(2, 8, 6)).astype(dtype)
    lora_a, lora_b = (rng.normal(size=s).astype(np.float32) for s in ((2, 8, 3), (2, 3, 6)))
    wide = kernel.astype(np.float64) + 0.5 * lora_a.astype(np.float64) @ lora_b.astype(np.float64)
    merged = merge_kernel(kernel, lora_a, lora_b, 0.5)
    assert merged.dtype == kernel.dtype
    # Half a unit in the last place, and what the sum of three products lost before.
    error = np.abs(merged.astype(np.float64) - wide) / np.abs(wide).max()
    assert error.max() <= jnp.finfo(dtype).eps / 2 + 4 * np.finfo(np.result_type("f4", dtype)).eps


def test_a_merged_tree_computes_what_base_and_adapter_did():
    base = random_base(MODEL)
    merged = lora_module.merge(base, LORA, CONFIG.scale)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    assert merged["embed_tokens"] is base["embed_tokens"]
    for found, layer in zip(merged["layers"], base["layers"], strict=True):
        assert found["q_proj"]["kernel"] is not layer["q_proj"]["kernel"]
        assert found["q_proj"]["bias"] is layer["q_proj"]["bias"]
        assert found["input_layernorm"]["scale"] is layer["input_layernorm"]["scale"]
    # Sums of some tens of float32 terms in another order, two layers deep.
    assert relative_error(logits(LLM, merged), logits(LLM, base, LORA)) < 1e-5
    assert relative_error(logits(LLM, base), logits(LLM, base, LORA)) > 0.1, "nothing to merge"


def test_a_merged_kernel_lies_on_the_devices_that_the_base_has():
    mesh = sharding.make_mesh("data:2,fsdp:2,tensor:2")
    base, lora = (
        jax.device_put(x, sharding.tree_shardings(mesh, x)) for x in (random_base(MODEL), LORA)
    )
    merged = lora_module.merge(base, lora, CONFIG.scale)
    for found, layer in zip(merged["layers"], base["layers"], strict=True):
        places = [x["up_proj"]["kernel"].sharding for x in (layer, found)]
        assert places[0] == places[1] and not places[0].is_fully_replicated


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_computes_the_same_logits_from_a_merged_directory(tmp_path, family):
    torch = needs_torch.pytorch("the reference runs in PyTorch")
    import transformers

    llm = FAMILIES[family]
    base = make_base(tmp_path / "base", llm)
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    (tmp_path / "base" / "LICENSE").write_text("terms")
    save_merged(tmp_path / "base", tmp_path / "out", LORA, CONFIG.scale, shard_bytes=10_000)
    assert len(weight_files(tmp_path / "out")) > 3
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "out" / "LICENSE").read_text() == "terms"
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(reference).__name__ == f"{family}ForCausalLM"
    with torch.no_grad():
        found = reference(torch.tensor(TOKENS)).logits.numpy()
    # As above.
    assert relative_error(found, logits(llm, base, LORA)) < 1e-5


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_a_merged_directory_holds_the_merged_tree_in_the_dtype_of_the_base(tmp_path, dtype):
    base = make_base(tmp_path / "base", dtype=dtype)
    save_merged(tmp_path / "base", tmp_path / "out", LORA, CONFIG.scale)
    for i, layer in enumerate(base["layers"]):
        for name, of in LORA["layers"].items():
            factors = of["lora_a"][i], of["lora_b"][i]
            kernel = merge_kernel(layer[name]["kernel"], *factors, CONFIG.scale)
            layer[name]["kernel"] = jnp.asarray(kernel)
    save_base(tmp_path / "tree", LLM, base)
    found, expected = all_tensors(tmp_path / "out"), all_tensors(tmp_path / "tree")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        if dtype == jnp.bfloat16 or "_proj" not in name:
            np.testing.assert_array_equal(found[name], value)
        else:  # a product and that of its transposed factors may differ in the last bit
            np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-6)
    assert (tmp_path / "out" / "config.json").read_bytes() == (
        tmp_path / "base" / "config.json"
    ).read_bytes()


def test_a_head_of_its_own_is_not_called_tied_in_what_is_merged(tmp_path):
    tied = dataclasses.replace(LLM, tie_word_embeddings=True)
    make_base(tmp_path / "base", tied)
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    save_file(tensors, path)
    save_merged(tmp_path / "base", tmp_path / "out", LORA, CONFIG.scale)
    theirs, mine = (json.loads((tmp_path / x / "config.json").read_text()) for x in ("base", "out"))
    assert theirs["tie_word_embeddings"] and mine == theirs | {"tie_word_embeddings": False}
    merged = all_tensors(tmp_path / "out")["lm_head.weight"]
    np.testing.assert_array_equal(merged, tensors["lm_head.weight"])


def test_files_are_cut_where_they_get_large_and_indexed(tmp_path):
    make_base(tmp_path / "base")
    save_merged(tmp_path / "base", tmp_path / "one", LORA, CONFIG.scale)
    save_merged(tmp_path / "base", tmp_path / "many", LORA, CONFIG.scale, shard_bytes=10_000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()
    one, many = all_tensors(tmp_path / "one"), all_tensors(tmp_path / "many")
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in one.values())
    assert one.keys() == many.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], many[name])
    for path in (tmp_path / "many").glob("*.safetensors"):
        held = load_file(path)
        assert sum(v.nbytes for v in held.values()) <= 10_000 or len(held) == 1


def test_tensors_are_read_and_written_one_by_one(tmp_path):
    path, size = tmp_path / "t.safetensors", 100_000
    on_disk = []

    def read(name):
        on_disk.append(path.stat().st_size)
        return np.full(size, int(name), np.float32)

    like = np.empty(size, np.float32)
    write_tensors(path, {str(i): like for i in range(3)}, read)
    # What was read before a tensor is on disk (but for a buffer) when that tensor is read.
    assert np.diff(on_disk).min() > 4 * size - 10_000
    assert [load_file(path)[str(i)][0] for i in range(3)] == [0, 1, 2]


def test_tensors_of_any_dtype_keep_their_bits(tmp_path):
    rng = np.random.default_rng(0)
    dtypes = {name: np.dtype(dtype) for name, dtype in DTYPES.items()}
    values = {
        name: np.frombuffer(rng.bytes(3 * dtype.itemsize), dtype).reshape(1, 3)
        for name, dtype in dtypes.items()
    }
    values |= {"scalar": np.float16(2.5).reshape(()), "empty": np.zeros((0, 3), np.float64)}
    path = tmp_path / "t.safetensors"
    write_tensors(path, values, values.__getitem__)
    found = read_header(path)
    assert found.keys() == values.keys()
    for name, value in values.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        assert found[name].read().tobytes() == value.tobytes()
        # Wherever the file is mapped, every number stands at a multiple of its size.
        assert found[name].offset % value.dtype.itemsize == 0


# --- What is refused ------------------------------------------------------------------------------


def edit_tensors(directory, change):
    path = directory / "model.safetensors"
    values = load_file(path)
    change(values)
    save_file(values, path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: edit_tensors(d, lambda t: t.pop(QUERY)), [QUERY, "missing"]),
        (
            lambda d: edit_tensors(d, lambda t: t.update({QUERY: np.zeros((64, 31), "f4")})),
            [QUERY, "(64, 31)", "(64, 32)"],
        ),
        (
            lambda d: edit_tensors(d, lambda t: t.update({QUERY: np.zeros((64, 32), "i1")})),
            [QUERY, "type I8", "unquantized"],
        ),
        (lambda d: (d / "model.safetensors").write_bytes(b"x" * 20), ["not a whole"]),
        (lambda d: (d / "model.safetensors").unlink(), ["model.safetensors is missing"]),
    ],
    ids=["missing tensor", "wrong shape", "integers", "garbage", "no weights"],
)
def test_a_base_that_does_not_fit_is_one_error_and_leaves_nothing(tmp_path, damage, words):
    make_base(tmp_path / "base")
    damage(tmp_path / "base")
    with pytest.raises(WeightsError) as error:
        save_merged(tmp_path / "base", tmp_path / "out", LORA, CONFIG.scale)
    for word in (str(tmp_path / "base"), *words):
        assert word in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_without_lora_there_is_nothing_to_merge(tmp_path):
    make_base(tmp_path / "base")
    with pytest.raises(WeightsError, match="no LoRA"):
        save_merged(tmp_path / "base", tmp_path / "out", {}, 1.0)


def test_a_directory_that_exists_is_not_written_over(tmp_path):
    make_base(tmp_path / "base")
    with pytest.raises(WeightsError, match="base exists already"):
        save_merged(tmp_path / "base", tmp_path / "base", LORA, CONFIG.scale)
