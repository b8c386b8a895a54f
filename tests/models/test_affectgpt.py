"""Soft tokens in their places, the loss, and what a gradient step pays for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matmul_flops import matmul_flops
from tiny_model import (
    LLM,
    make_batch,
    make_model,
    random_base,
    random_trainable,
    relative_error,
)

from affectgpt_jax.models.affectgpt import (
    cross_entropy_sum,
    embed_inputs,
    hidden_states,
    init_trainable,
    loss_sum_and_count,
)
from affectgpt_jax.models.flops import train_flops
from affectgpt_jax.training import sharding

MODEL = make_model()
BASE = random_base(MODEL)
TRAINABLE = random_trainable(MODEL)
BATCH = make_batch([16, 11, 7, 0])


# --- Soft tokens ----------------------------------------------------------------------------------


def test_soft_tokens_stand_exactly_where_soft_index_says():
    index = np.random.default_rng(0).integers(0, 4, size=BATCH["tokens"].shape, dtype=np.int32)
    batch = BATCH | {"soft_index": index}
    features, present = ({k: x[:, 0] for k, x in batch[n].items()} for n in ("features", "present"))
    soft = MODEL.fusion.apply({"params": TRAINABLE["fusion"]}, features, present)
    expected = np.array(BASE["embed_tokens"])[batch["tokens"]]
    for row, column in np.argwhere(index > 0):
        expected[row, column] = soft[row, index[row, column] - 1]
    found = embed_inputs(MODEL, BASE, TRAINABLE, batch, None)
    np.testing.assert_array_equal(found, expected)


def test_tokens_under_soft_tokens_do_not_matter():
    beyond = np.where(BATCH["soft_index"] > 0, LLM.vocab_size + 5, BATCH["tokens"])
    found = embed_inputs(MODEL, BASE, TRAINABLE, BATCH | {"tokens": beyond}, None)
    np.testing.assert_array_equal(found, embed_inputs(MODEL, BASE, TRAINABLE, BATCH, None))


def test_a_text_only_model_has_no_soft_tokens_and_no_fusion():
    model = make_model(fusion=None)
    trainable = jax.eval_shape(lambda key: init_trainable(model, key), jax.random.key(0))
    assert trainable["fusion"] == {}
    found = embed_inputs(model, BASE, trainable, BATCH, None)
    np.testing.assert_array_equal(found, np.asarray(BASE["embed_tokens"])[BATCH["tokens"]])


# --- Loss -----------------------------------------------------------------------------------------


def test_loss_is_the_cross_entropy_of_the_supervised_tokens():
    @jax.jit
    def run(batch):
        states, _ = hidden_states(MODEL, BASE, TRAINABLE, batch)
        return states, loss_sum_and_count(MODEL, BASE, TRAINABLE, batch)

    states, (loss, count) = run(BATCH)
    logits = np.asarray(states, np.float64) @ np.asarray(BASE["lm_head"], np.float64)
    log_softmax = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected, supervised = 0.0, 0
    for row in range(len(BATCH["tokens"])):
        for slot in np.flatnonzero(BATCH["target_weights"][row]):
            at, target = BATCH["target_positions"][row, slot], BATCH["targets"][row, slot]
            expected -= log_softmax[row, at, target]
            supervised += 1
    assert supervised == count == 6 + 6 + 3
    # The states are the same: this is the error of one float32 product and one logsumexp.
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def cross_entropy_inputs(rows, columns, width=12, vocabulary=50):
    rng = np.random.default_rng(columns)
    states = rng.normal(size=(rows, columns, width)).astype(np.float32)
    table = rng.normal(size=(width, vocabulary)).astype(np.float32)
    weights = rng.integers(0, 2, size=(rows, columns)).astype(np.float32)
    targets = rng.integers(vocabulary, size=(rows, columns), dtype=np.int32)
    return states, table, targets, weights


@pytest.mark.parametrize("columns", [16, 17], ids=["whole chunks", "a rest"])
def test_chunked_cross_entropy_equals_the_whole_in_values_and_gradients(columns):
    states, table, targets, weights = cross_entropy_inputs(2, columns)

    def value_and_gradients(chunk):
        def loss(states, table):
            return cross_entropy_sum(states, table, targets, weights, chunk)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(states, table)

    whole, chunked = value_and_gradients(targets.size), value_and_gradients(8)
    for found, expected in zip(jax.tree.leaves(chunked), jax.tree.leaves(whole), strict=True):
        assert relative_error(found, expected) < 1e-6  # float32 sums, split at other places


def test_chunked_cross_entropy_never_holds_all_logits():
    rows, columns, vocabulary = 8, 128, 2048
    states, table, targets, weights = cross_entropy_inputs(rows, columns, vocabulary=vocabulary)

    def gradient(states):
        return jax.grad(cross_entropy_sum)(states, table, targets, weights, 64)

    compiled = jax.jit(gradient).lower(states).compile()
    # Logits, their softmax and its gradient: a few blocks of a sixteenth of all logits.
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * rows * columns * vocabulary * 4


def test_chunked_cross_entropy_leaves_rows_on_their_devices():
    states, table, targets, weights = cross_entropy_inputs(8, 64)
    mesh = sharding.make_mesh("data:8")
    batch = sharding.shard_batch(mesh, (states, targets, weights))

    def gradient(states, targets, weights):
        return jax.grad(cross_entropy_sum)(states, table, targets, weights, 64)

    compiled = jax.jit(gradient).lower(*batch).compile()
    assert "all-gather" not in compiled.as_text()


def test_bfloat16_states_give_float32_logits():
    states, table, targets, weights = cross_entropy_inputs(4, 10)
    states, table = (jnp.asarray(x, jnp.bfloat16) for x in (16 * states, table))
    found = cross_entropy_sum(states, table, targets, weights)
    wide = (np.asarray(x, np.float64) for x in (states, table))
    expected = cross_entropy_sum(*(jnp.asarray(x, jnp.float32) for x in wide), targets, weights)
    # Logits reach 200, where bfloat16 steps by 1; products of bfloat16 are exact in float32.
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5)


# --- The cost of a gradient -----------------------------------------------------------------------


def test_no_gradient_of_a_frozen_weight_is_computed():
    model = make_model(fusion=None)
    base, trainable = random_base(model), random_trainable(model)
    rows, length, targets = 2, 16, 6
    batch = make_batch([length] * rows, length, targets)

    def loss(trainable, base):
        return loss_sum_and_count(model, base, trainable, batch)[0]

    flops = train_flops(LLM, model.qwen2.lora, length, targets, causal=False)
    expected = rows * flops.total
    assert matmul_flops(jax.grad(loss), trainable, base) == expected
    full = matmul_flops(jax.grad(loss, argnums=(0, 1)), trainable, base)
    assert full == expected + rows * (flops.frozen + flops.vocabulary) // 2
