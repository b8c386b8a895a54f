"""Adapters of PEFT: written, read, refused; the real library is the judge."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import needs_torch
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tiny_model import LLM, make_model, random_base, random_trainable, relative_error
from trees import assert_same_tree

from affectgpt_jax.models.decoder import Decoder, init_lora, lm_head
from affectgpt_jax.models.lora import TARGETS, LoraConfig
from affectgpt_jax.training.sharding import make_mesh, tree_shardings
from affectgpt_jax.weights.huggingface import WeightsError, save_base
from affectgpt_jax.weights.peft import (
    TENSORS,
    open_adapter,
    read_adapter_config,
    refusal,
    save_adapter,
)

MODEL = make_model()
CONFIG = MODEL.decoder.lora
LORA = random_trainable(MODEL)["lora"]
NAME = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"


def abstract(tree, dtype=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype), tree)


def load(directory, tree, config):
    return open_adapter(directory, tree, config)(tree)


@pytest.fixture
def saved(tmp_path):
    """A directory of its own for every test, since some of them damage it."""
    save_adapter(tmp_path / "adapter", LORA, CONFIG, "Tiny")
    return tmp_path / "adapter"


# --- Round trips ----------------------------------------------------------------------------------


@given(st.data())
def test_any_adapter_comes_back_bit_for_bit(tmp_path_factory, data):
    size = st.integers(1, 5)
    layers, rank = data.draw(size), data.draw(size)
    targets = tuple(data.draw(st.lists(st.sampled_from(TARGETS), min_size=1, unique=True)))
    config = LoraConfig(
        rank, data.draw(st.floats(0.5, 64)), data.draw(st.sampled_from([0, 0.05])), targets
    )
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))

    def draw(*shape):  # any bits: infinities and NaN are kept too
        return rng.integers(0, 2**32, shape, np.uint32).view(np.float32)

    lora = {
        "layers": {
            target: {
                "lora_a": draw(layers, data.draw(size), rank),
                "lora_b": draw(layers, rank, data.draw(size)),
            }
            for target in targets
        }
    }
    directory = tmp_path_factory.mktemp("adapters") / "adapter"
    save_adapter(directory, lora, config)
    found = load(directory, abstract(lora), config)
    bits = jax.tree.map(lambda x: np.asarray(x).view(np.uint32), (found, lora))
    assert_same_tree(*bits)


def test_what_is_written_is_all_that_peft_needs_and_nothing_else(saved):
    assert sorted(path.name for path in saved.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    found = read_adapter_config(saved)
    assert (found.rank, found.alpha, found.base) == (4, 2.0, "Tiny")
    assert not found.refused
    tensors = load_file(saved / "adapter_model.safetensors")
    assert len(tensors) == LLM.num_hidden_layers * len(TARGETS) * 2
    down = LORA["layers"]["down_proj"]["lora_a"]
    np.testing.assert_array_equal(tensors[NAME], np.asarray(down[1]).T)


@pytest.mark.parametrize("mesh", ["data:8", "fsdp:8", "data:2,fsdp:2,tensor:2"])
def test_an_adapter_goes_straight_into_the_layout_of_the_run(saved, mesh):
    wanted = jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
        abstract(LORA),
        tree_shardings(make_mesh(mesh), LORA),
    )
    found = load(saved, wanted, CONFIG)
    assert_same_tree(found, LORA)
    for leaf, expected in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding == expected.sharding


def test_a_half_precision_adapter_is_cast_to_the_dtype_of_the_run(saved):
    path = saved / "adapter_model.safetensors"
    half = {name: value.astype(jnp.bfloat16) for name, value in load_file(path).items()}
    save_file(half, path)
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), LORA)
    assert_same_tree(load(saved, abstract(LORA), CONFIG), expected)


# --- Adapters that are none for us ----------------------------------------------------------------

LAYERS = "base_model.model.model."


def renamed(old, new):
    return lambda tensors: {name.replace(old, new): value for name, value in tensors.items()}


def without_values(part):
    return lambda tensors: {
        name: np.zeros(0, np.float32) if part in name else value for name, value in tensors.items()
    }


def beside(name, *shape):
    return lambda tensors: tensors | {LAYERS + name: np.zeros(shape, np.float32)}


STRANGERS = {
    "compiled": (renamed("base_model.model", "_orig_mod.base_model.model"), "save model._orig_mod"),
    "parallel": (renamed("base_model.model", "module.base_model.model"), "save model.module, or t"),
    "no head": (renamed(LAYERS, "base_model.model."), "train with AutoModelForCausalLM, or put"),
    "around": (renamed(LAYERS, LAYERS + "language_model."), "the adapter of the language model al"),
    "state": (renamed(".weight", ".default.weight"), "use save_pretrained, or take '.default' out"),
    "sharded": (without_values("lora"), "has no values; sharded training (ZeRO-3, FSDP)"),
    "half sharded": (without_values("lora_B"), "has no values; sharded training (ZeRO-3, FSDP)"),
    "empty": (
        lambda tensors: {},
        "holds no tensors; save it again, from the process that has them",
    ),
    "embedding": (beside("embed_tokens.weight", 3, 2), "with save_embedding_layers=False"),
    "embedding's": (beside("embed_tokens.lora_embedding_A", 3, 2), "with save_embedding_layers=F"),
    "head": (beside("lm_head.lora_A.weight", 3, 2), "train the adapter without it"),
    "other": (beside("layers.0.mlp.router.lora_A.weight", 3, 2), "router; only q_proj, k_proj"),
    "gap": (
        lambda tensors: {k: v for k, v in tensors.items() if ".0.mlp.up_proj.lora_A" not in k},
        "layers.0.mlp.up_proj.lora_A.weight is missing",
    ),
    "misshapen": (
        lambda tensors: tensors | {NAME: np.zeros((5, 7), np.float32)},
        "down_proj.lora_A.weight is (5, 7); expected (4, ",
    ),
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_what_training_refuses_is_refused_by_its_cause_and_inspection_says_so(saved, kind):
    assert refusal(saved) is None
    change, words = STRANGERS[kind]
    save_file(change(load_file(saved / "adapter_model.safetensors")), saved / TENSORS)
    with pytest.raises(WeightsError) as error:
        load(saved, abstract(LORA), CONFIG)
    assert words in str(error.value)
    assert words in refusal(saved)


# --- The real library -----------------------------------------------------------------------------


FAMILIES = {
    "Qwen2": LLM,
    "Llama": dataclasses.replace(LLM, qkv_bias=False),
    "Qwen3": dataclasses.replace(LLM, qk_norm=True, o_bias=True, tie_word_embeddings=True),
}


def reference(directory, llm):
    """A random base, and transformers' model of it."""
    needs_torch.peft("the reference is PEFT")
    import transformers

    base = random_base(make_model(llm))
    save_base(directory, llm, base)
    return base, transformers.AutoModelForCausalLM.from_pretrained(directory)


TOKENS = np.random.default_rng(0).integers(LLM.vocab_size, size=(2, 7))


def torch_logits(model):
    import torch

    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()


def logits(llm, base, lora, config):
    """Of the same tokens by our decoder."""
    positions = np.broadcast_to(np.arange(TOKENS.shape[1], dtype=np.int32), TOKENS.shape)
    module = Decoder(llm, config)

    @jax.jit
    def run(base, lora):
        variables = {"params": base, "lora": lora}
        embeds = module.apply(variables, TOKENS, method="embed")
        states, _ = module.apply(variables, embeds, positions, np.ones_like(positions))
        return states @ lm_head(base)

    return run(base, lora)


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_computes_the_same_logits_with_an_exported_adapter(tmp_path, saved, family):
    llm = FAMILIES[family]
    base, model = reference(tmp_path / "base", llm)
    assert type(model).__name__ == f"{family}ForCausalLM"
    import peft

    expected = torch_logits(peft.PeftModel.from_pretrained(model, saved))
    # Float32 sums of some tens of terms, two layers deep, added in another order.
    assert relative_error(logits(llm, base, LORA, CONFIG), expected) < 1e-5
    assert relative_error(logits(llm, base, {}, CONFIG), expected) > 0.1, "the adapter does nothing"


def test_autopeft_finds_the_base_of_an_exported_adapter(tmp_path):
    base, _ = reference(tmp_path / "base", LLM)
    import peft

    save_adapter(tmp_path / "adapter", LORA, CONFIG, str(tmp_path / "base"))
    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert relative_error(logits(LLM, base, LORA, CONFIG), torch_logits(model)) < 1e-5


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), TARGETS])
def test_an_adapter_made_by_peft_is_loaded_to_the_same_logits(tmp_path, targets):
    base, model = reference(tmp_path / "base", LLM)
    import peft
    import torch

    torch.manual_seed(0)
    options = {"r": 3, "lora_alpha": 7.5, "lora_dropout": 0.1, "target_modules": list(targets)}
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "theirs")
    config = LoraConfig(3, 7.5, 0.0, targets)
    wanted = jax.eval_shape(lambda key: init_lora(Decoder(LLM, config), key), jax.random.key(0))
    lora = load(tmp_path / "theirs", wanted, config)
    # As above.
    assert relative_error(logits(LLM, base, lora, config), torch_logits(model)) < 1e-5

    save_adapter(tmp_path / "ours", lora, config)
    ours, theirs = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")
    )
    assert ours.keys() == theirs.keys()
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name])


# --- What is refused ------------------------------------------------------------------------------


def edit_config(directory, **changes):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory, change):
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def assert_refused(directory, *words, config=CONFIG):
    with pytest.raises(WeightsError) as error:
        load(directory, abstract(LORA), config)
    for word in (str(directory), *words):
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_dora", True),
        ("use_rslora", True),
        ("use_qalora", True),
        ("lora_bias", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("rank_pattern", {"q_proj": 8}),
        ("alpha_pattern", {"q_proj": 8}),
        ("modules_to_save", ["lm_head"]),
        ("layers_to_transform", [0]),
        ("layer_replication", [[0, 1]]),
        ("fan_in_fan_out", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("trainable_token_indices", [1]),
        ("target_parameters", ["x"]),
        ("peft_type", "IA3"),
        ("task_type", "SEQ_CLS"),
        ("an_option_of_the_future", {"x": 1}),
    ],
)
def test_an_option_that_changes_the_adapter_is_refused_by_name(saved, option, value):
    edit_config(saved, **{option: value})
    assert_refused(saved, "adapter_config.json", f"{option}={value!r}")


def test_options_that_are_off_or_do_not_matter_are_read_over(saved):
    off = ("use_dora", "layer_replication", "modules_to_save", "an_option_of_the_future")
    edit_config(saved, **dict.fromkeys(off))
    edit_config(saved, rank_pattern={}, revision="main", peft_version="9", lora_dropout=0.3)
    edit_config(saved, init_lora_weights="gaussian", target_modules="all-linear")
    assert_same_tree(load(saved, abstract(LORA), CONFIG), LORA)
    assert read_adapter_config(saved).dropout == 0.3


def test_another_rank_alpha_or_set_of_targets_is_refused_with_both_sides(saved):
    assert_refused(saved, "rank is 4", "config.lora.rank is 8", config=LoraConfig(8, 2.0))
    assert_refused(saved, "alpha is 2.0", "config.lora.alpha is 32.0", config=LoraConfig(4, 32.0))
    narrow = LoraConfig(4, 2.0, targets=("v_proj", "q_proj"))
    words = ["targets is ('q_proj', 'k_proj'", "config.lora.targets is ('q_proj', 'v_proj')"]
    assert_refused(saved, *words, config=narrow)
    assert_refused(saved, "rank is 4", "config.lora.rank is 0", config=None)


def test_the_order_of_targets_does_not_matter(saved):
    config = LoraConfig(4, 2.0, targets=TARGETS[::-1])
    assert_same_tree(load(saved, abstract(LORA), config), LORA)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: edit_tensors(d, lambda t: t.pop(NAME)), [NAME, "missing", "(4, 48)"]),
        (
            lambda d: edit_tensors(d, lambda t: t.update({NAME: np.zeros((4, 47), "f4")})),
            [NAME, "(4, 47)", "(4, 48)"],
        ),
        (
            lambda d: edit_tensors(d, lambda t: t.update({"base_model.x": np.zeros(1)})),
            ["base_model.x", "is no adapter of a projection"],
        ),
        (
            lambda d: edit_tensors(
                d, lambda t: t.update({NAME.replace("layers.1", "layers.2"): t[NAME]})
            ),
            ["layers.2", "not part of"],
        ),
        (lambda d: (d / "adapter_model.safetensors").unlink(), ["not found", "safe_serialization"]),
        (lambda d: (d / "adapter_model.safetensors").write_bytes(b"x" * 20), ["not a whole"]),
        (lambda d: (d / "adapter_config.json").unlink(), ["adapter_config.json", "cannot be read"]),
        (lambda d: (d / "adapter_config.json").write_text("{"), ["LoRA adapter"]),
        (lambda d: (d / "adapter_config.json").write_text("[]"), ["LoRA adapter"]),
        (lambda d: (d / "adapter_config.json").write_bytes(b"\xff"), ["LoRA adapter"]),
        (lambda d: edit_config(d, r="many"), ["r: expected", "'many'"]),
    ],
    ids=[
        "missing tensor",
        "wrong shape",
        "extra tensor",
        "extra layer",
        "no tensors",
        "garbage tensors",
        "no config",
        "broken config",
        "a list",
        "not text",
        "rank of text",
    ],
)
def test_damage_is_one_error_that_names_the_thing(saved, damage, words):
    damage(saved)
    assert_refused(saved, *words)


def test_a_model_without_lora_has_no_adapter_to_write(tmp_path):
    with pytest.raises(WeightsError, match="no LoRA"):
        save_adapter(tmp_path / "adapter", {}, CONFIG)
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_over_and_nothing_is_left_half(saved, tmp_path, monkeypatch):
    with pytest.raises(WeightsError, match="exists already"):
        save_adapter(saved, LORA, CONFIG)
    assert_same_tree(load(saved, abstract(LORA), CONFIG), LORA)
    shutil.rmtree(saved)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dumps", full)
    with pytest.raises(WeightsError, match="cannot be written.*No space left"):
        save_adapter(saved, LORA, CONFIG)
    assert not list(tmp_path.iterdir())
