"""The PyTorch twin by itself: its names, its tunings, its recipe, and who else's Q-Former it is."""

import dataclasses

import jax
import needs_torch
import numpy as np
import pytest
from tiny_model import FUSION, LLM, make_batch, make_model, random_base, random_trainable

from affectgpt_jax.data.modalities import MODALITIES
from affectgpt_jax.models.qformer import QFormerConfig
from affectgpt_jax.training.optimizer import OptimizerConfig
from affectgpt_jax.weights.huggingface import save_base

torch = needs_torch.pytorch("the twin runs in PyTorch")
needs_torch.peft("the twin's adapters are PEFT's")

from benchmarks.torch_reference import training  # noqa: E402
from benchmarks.torch_reference.model import TUNINGS, AffectGPT, next_tokens, to_device  # noqa: E402
from benchmarks.torch_reference.qformer import QFormer  # noqa: E402
from benchmarks.torch_reference.weights import (  # noqa: E402
    by_torch_name,
    load_named,
    load_trainable,
)

MODEL = make_model()
QFORMER = QFormerConfig(width=16, heads=4, layers=2, intermediate=24, dropout=0.1)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    save_base(path, LLM, random_base(MODEL))
    return path


def make_twin(
    directory, tuning="tuned", dtype=torch.float32, fusion=FUSION, lora=MODEL.decoder.lora
):
    return AffectGPT.from_pretrained(directory, fusion, lora, dtype=dtype, tuning=TUNINGS[tuning])


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# --- Weights --------------------------------------------------------------------------------------


def test_every_trained_parameter_is_copied_and_no_other(directory):
    twin, trainable = make_twin(directory), random_trainable(MODEL)
    values = by_torch_name(trainable)
    size = sum(leaf.size for leaf in jax.tree.leaves(trainable))
    assert sum(value.size for value in values.values()) == size
    load_trainable(twin, trainable)
    for name, parameter in trained(twin).items():
        np.testing.assert_array_equal(parameter.detach(), values[name])

    projection = values.pop("affectgpt_proj.weight")
    with pytest.raises(ValueError, match="affectgpt_proj.weight is trained on one side only"):
        load_named(twin, values)
    with pytest.raises(ValueError, match=r"affectgpt_proj.weight is \(6, 32\); expected \(32, 6\)"):
        load_named(twin, values | {"affectgpt_proj.weight": projection.T})


# --- Against BLIP-2 -------------------------------------------------------------------------------


def blip2_name(name):
    """Where transformers' `Blip2QFormerModel` keeps a parameter of the twin's."""
    name = name.removeprefix("bert.").replace("embeddings.LayerNorm", "layernorm")
    return name.replace("attention.self.", "attention.attention.")


def test_the_qformer_is_that_of_transformers():
    transformers = pytest.importorskip("transformers", reason="it holds the reference Q-Former")
    torch.manual_seed(0)
    width, length = 10, 7
    qformer = QFormer(QFORMER, width).double().eval()
    for parameter in qformer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    config = transformers.Blip2QFormerConfig(
        hidden_size=QFORMER.width,
        num_hidden_layers=QFORMER.layers,
        num_attention_heads=QFORMER.heads,
        intermediate_size=QFORMER.intermediate,
        layer_norm_eps=QFORMER.norm_eps,
        encoder_hidden_size=width,
        cross_attention_frequency=1,
        use_qformer_text_input=False,
    )
    reference = transformers.Blip2QFormerModel(config).double().eval()
    state = {blip2_name(name): value for name, value in qformer.state_dict().items()}
    reference.load_state_dict(state, strict=True)

    queries = torch.randn(1, 3, QFORMER.width).double()
    states = torch.randn(2, length, width).double()
    mask = torch.tensor([[True] * length, [True] * 3 + [False] * 4])
    with torch.no_grad():
        expected = reference(
            query_embeds=queries.expand(2, -1, -1),
            encoder_hidden_states=states,
            encoder_attention_mask=mask.long(),
        ).last_hidden_state
        found = qformer(queries, states, mask)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)  # float64


# --- Tunings --------------------------------------------------------------------------------------


def loss_and_gradients(twin, batch):
    loss, count = twin.eval().loss_sum_and_count(to_device(batch, twin.tuning, "cpu"))
    loss.backward()
    return loss.item(), count.item(), {name: p.grad for name, p in trained(twin).items()}


@pytest.mark.parametrize("tuning", ["release", "packed"])
def test_tunings_change_nothing_but_speed(directory, tuning):
    batch, trainable = make_batch([16, 11, 7, 0]), random_trainable(MODEL)
    results = []
    for name in ("tuned", tuning):
        twin = make_twin(directory, name)
        load_trainable(twin, trainable)
        results.append(loss_and_gradients(twin, batch))
    (loss, count, gradients), (other_loss, other_count, other_gradients) = results
    # The same sums by other kernels, in float32.
    assert loss == pytest.approx(other_loss, rel=1e-6)
    assert count == other_count
    for name, gradient in gradients.items():
        torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tuning", ["release", "tuned"])
def test_samples_that_share_a_row_are_refused_where_attention_would_leak(tuning):
    batch = make_batch([16])
    batch["segment_ids"][0, 8:] = 2
    with pytest.raises(ValueError, match="up to 2 samples.*use the tuning 'packed'"):
        to_device(batch, TUNINGS[tuning], "cpu")
    to_device(batch, TUNINGS["packed"], "cpu")


@pytest.mark.parametrize("tuning", ["release", "tuned"])
def test_in_bfloat16_the_decoder_is_rounded_and_what_is_trained_is_not(directory, tuning):
    batch, trainable = make_batch([16, 11]), random_trainable(MODEL)
    wide, narrow = (
        make_twin(directory, tuning, dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    for twin in (wide, narrow):
        load_trainable(twin, trainable)
    assert narrow.causal_lm.lm_head.weight.dtype == torch.bfloat16
    assert {p.dtype for p in trained(narrow).values()} == {torch.float32}
    expected, _, _ = loss_and_gradients(wide, batch)
    found, _, gradients = loss_and_gradients(narrow, batch)
    assert found != expected
    assert found == pytest.approx(expected, rel=0.05)  # bfloat16 keeps 8 bits
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


def test_labels_stand_one_before_their_token(directory):
    batch = make_batch([16, 7, 0])
    tensors = to_device(batch, TUNINGS["release"], "cpu")
    labels = next_tokens(tensors)
    for row, length in enumerate((16, 7, 0)):
        count = max(0, min(6, length - 4))
        supervised = range(length - 1 - count, length - 1)
        for at in range(labels.shape[1]):
            expected = batch["tokens"][row, at + 1] if at in supervised else -100
            assert labels[row, at] == expected


# --- The recipe -----------------------------------------------------------------------------------


def test_only_adapters_and_fusers_move(directory):
    twin = make_twin(directory)
    before = {name: p.detach().clone() for name, p in twin.named_parameters()}
    optimizer = training.make_optimizer(twin.named_parameters(), OptimizerConfig())
    batch = to_device(make_batch([16, 11]), twin.tuning, "cpu")
    for _ in range(2):  # the first moves no A, whose gradient is zero while B is
        training.train_step(twin, optimizer, batch, learning_rate=1e-2)
    moved = {name for name, p in twin.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trained(twin).keys()


def test_weight_decay_spares_vectors_and_names_with_bias_ln_or_bn():
    shapes = {"a.weight": (2, 2), "a.bias": (2, 2), "norm.weight": (2,), "ln_1.weight": (2, 2)}
    parameters = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    frozen = torch.nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    optimizer = training.make_optimizer(
        [*parameters.items(), ("frozen.weight", frozen)], OptimizerConfig(weight_decay=0.05)
    )
    decayed, spared = optimizer.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0)
    assert [id(p) for p in decayed["params"]] == [id(parameters["a.weight"])]
    assert len(spared["params"]) == 3


def test_dropout_acts_in_training_only(directory):
    fusion = dataclasses.replace(
        FUSION, slots=tuple(MODALITIES)[:1], kinds={"multi": "qformer"}, qformer=QFORMER
    )
    lora = dataclasses.replace(MODEL.decoder.lora, dropout=0.3)
    twin = make_twin(directory, fusion=fusion, lora=lora)
    load = {name: np.asarray(p.detach()) + 0.1 for name, p in trained(twin).items()}
    load_named(twin, load)
    batch = make_batch([16])
    batch["soft_token_index"].clip(max=1, out=batch["soft_token_index"])
    tensors = to_device(batch, twin.tuning, "cpu")
    with torch.no_grad():
        evaluated = [twin.eval().hidden_states(tensors) for _ in range(2)]
        drawn = [twin.train().hidden_states(tensors) for _ in range(2)]
        soft = [twin.embed_inputs(tensors) for _ in range(2)]
    assert torch.equal(*evaluated)
    assert not torch.equal(*drawn)
    assert not torch.equal(*soft)
