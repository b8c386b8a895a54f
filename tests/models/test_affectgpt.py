"""Soft tokens in their places, the loss, and what a gradient step pays for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matmul_flops import matmul_flops
from plain_attention import plain_attention
from tiny_model import (
    FUSION,
    LLM,
    make_batch,
    make_model,
    pack_rows,
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
    supervised,
    with_compute,
)
from affectgpt_jax.models.flops import train_flops
from affectgpt_jax.models.qformer import QFormerConfig
from affectgpt_jax.training import sharding

MODEL = make_model()
BASE = random_base(MODEL)
TRAINABLE = random_trainable(MODEL)
BATCH = make_batch([16, 11, 7, 0])


# --- Soft tokens ----------------------------------------------------------------------------------


def test_soft_tokens_stand_exactly_where_soft_index_says():
    index = np.random.default_rng(0).integers(0, 4, size=BATCH["tokens"].shape, dtype=np.int32)
    batch = BATCH | {"soft_token_index": index}
    features, present = ({k: x[:, 0] for k, x in batch[n].items()} for n in ("features", "present"))
    soft = MODEL.fusion.apply({"params": TRAINABLE["fusion"]}, features, present)
    expected = np.array(BASE["embed_tokens"])[batch["tokens"]]
    for row, column in np.argwhere(index > 0):
        expected[row, column] = soft[row, index[row, column] - 1]
    found = embed_inputs(MODEL, BASE, TRAINABLE, batch, None)
    np.testing.assert_array_equal(found, expected)


def test_tokens_under_soft_tokens_do_not_matter():
    beyond = np.where(BATCH["soft_token_index"] > 0, LLM.vocab_size + 5, BATCH["tokens"])
    found = embed_inputs(MODEL, BASE, TRAINABLE, BATCH | {"tokens": beyond}, None)
    np.testing.assert_array_equal(found, embed_inputs(MODEL, BASE, TRAINABLE, BATCH, None))


def test_a_text_only_model_has_no_soft_tokens_and_no_fusion():
    model = make_model(fusion=None)
    trainable = jax.eval_shape(lambda key: init_trainable(model, key), jax.random.key(0))
    assert trainable["fusion"] == {}
    found = embed_inputs(model, BASE, trainable, BATCH, None)
    np.testing.assert_array_equal(found, np.asarray(BASE["embed_tokens"])[BATCH["tokens"]])


def test_the_dropout_of_qformers_follows_from_the_key():
    fusion = dataclasses.replace(
        FUSION,
        kinds={"audio": "qformer"},
        qformer=QFormerConfig(width=16, heads=2, layers=1, intermediate=24, dropout=0.5),
    )
    model = make_model(fusion=fusion)
    batch = {**BATCH, "soft_token_index": np.tile(np.arange(16, dtype=np.int32) % 11, (4, 1))}
    embed = jax.jit(functools.partial(embed_inputs, model, BASE, random_trainable(model), batch))
    first, again, other = (np.asarray(embed(jax.random.key(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    # Soft tokens 2 to 9 are the audio's; those of the other heads draw nothing.
    index = batch["soft_token_index"]
    drawn = (index >= 2) & (index <= 9) & BATCH["present"]["audio"]
    assert ((first != other).any(axis=-1) == drawn).all()


# --- Several clips a row --------------------------------------------------------------------------

QFORMER = QFormerConfig(width=16, heads=2, layers=1, intermediate=24, dropout=0.0)
FUSIONS = {
    "attention": FUSION,
    "mean": dataclasses.replace(FUSION, kinds={"video": "mean", "audio": "mean"}),
    "qformer": dataclasses.replace(
        FUSION, kinds=dict.fromkeys(("video", "audio", "multi"), "qformer"), qformer=QFORMER
    ),
    "none": None,
}
CLIPS, WIDTH, TARGETS = 6, 16, 6
ROWS, ROOM = 3, 3  # rows that hold them all, of up to three each, with room to spare
# Products and sums of float32 over other numbers of rows and columns, which add in another order.
FLOAT32 = 1e-5


@functools.cache
def packing_case(fusion):
    """Loss, gradients and hidden states of a batch, as one compiled function per shape."""
    model = make_model(fusion=FUSIONS[fusion])
    base, trainable = random_base(model), random_trainable(model)

    def loss(trainable, batch):
        return loss_sum_and_count(model, base, trainable, batch)

    @jax.jit
    def run(batch):
        (total, count), grads = jax.value_and_grad(loss, has_aux=True)(trainable, batch)
        states, _ = hidden_states(model, base, trainable, batch)
        return total, count, grads, states

    return run


def soft_counts(fusion):
    return FUSIONS[fusion].token_counts() if FUSIONS[fusion] else {}


def clips_alone(fusion, lengths, seed=0, absent=()):
    """Rows of one clip each, with one token of every slot in it; `absent` are (feature, clip)."""
    batch = make_batch(lengths, WIDTH, TARGETS, seed=seed)
    rng, counts = np.random.default_rng(seed), soft_counts(fusion)
    batch["soft_token_index"][:] = 0
    first = 1
    for at, count in enumerate(counts.values(), start=1):
        batch["soft_token_index"][:, at] = first + rng.integers(count, size=len(lengths))
        first += count
    batch["soft_token_index"] *= batch["segment_ids"]
    for name, clip in absent:
        batch["present"][name][clip] = False
        batch["features"][name][clip] = np.nan  # what stands there must not matter
    return batch


def together(fusion, batch, rows):
    soft_tokens = sum(soft_counts(fusion).values())
    return pack_rows(batch, rows, ROOM * WIDTH, ROOM * TARGETS, ROOM, soft_tokens)


def assert_same_gradients(found, expected):
    """In units of the largest entry of a layer: in a Q-Former, gradients of key biases are zero
    but for rounding."""
    leaves = jax.tree_util.tree_leaves_with_path(expected)
    largest = {}
    for path, leaf in leaves:
        largest[path[:-1]] = max(largest.get(path[:-1], 0), np.abs(leaf).max())
    for (path, leaf), other in zip(leaves, jax.tree.leaves(found), strict=True):
        assert np.abs(leaf - other).max() <= FLOAT32 * largest[path[:-1]], path


@pytest.mark.parametrize("fusion", FUSIONS)
@settings(max_examples=15)
@given(
    lengths=st.lists(st.integers(4, WIDTH), min_size=CLIPS, max_size=CLIPS),
    order=st.permutations(range(CLIPS)),
    ends=st.sampled_from([(3, 6), (2, 4), (3, 3), (1, 3), (0, 3), (2, 5)]),
    absent=st.sets(
        st.tuples(st.sampled_from(["audio", "face"]), st.integers(0, CLIPS - 1)), max_size=8
    ),
    seed=st.integers(0, 99),
)
def test_packed_equals_unpacked_forward_and_backward(fusion, lengths, order, ends, absent, seed):
    run = packing_case(fusion)
    alone = clips_alone(fusion, lengths, seed, absent)
    rows = [order[: ends[0]], order[ends[0] : ends[1]], order[ends[1] :]]
    total, count, grads, states = run(alone)
    packed_total, packed_count, packed_grads, packed_states = run(together(fusion, alone, rows))
    assert packed_count == count
    np.testing.assert_allclose(packed_total, total, rtol=FLOAT32)
    for row, members in enumerate(rows):
        first = 0
        for clip in members:
            end = first + lengths[clip]
            expected = states[clip, : lengths[clip]]
            assert relative_error(packed_states[row, first:end], expected) < FLOAT32
            first = end
    assert_same_gradients(packed_grads, grads)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_clip_is_blind_to_those_in_its_row_bit_by_bit(fusion):
    run, lengths = packing_case(fusion), [9, 13, 7, 16, 5, 12]
    rows = [[0, 1, 2], [3, 4], [5]]
    one = clips_alone(fusion, lengths, seed=1)
    other = clips_alone(fusion, lengths, seed=2)
    # Clip 1 keeps its own, all others change their tokens, soft tokens and features.
    for name in ("tokens", "soft_token_index", "targets"):
        other[name][1] = one[name][1]
    for name, x in other["features"].items():
        x[1] = one["features"][name][1]
    mine = slice(lengths[0], lengths[0] + lengths[1])
    found, expected = (run(together(fusion, batch, rows))[-1] for batch in (one, other))
    np.testing.assert_array_equal(found[0, mine], expected[0, mine])
    for outside in (found[0, : mine.start], found[0, mine.stop : mine.stop + lengths[2]]):
        assert not np.isin(outside, expected[0]).all(axis=-1).any()


@pytest.mark.parametrize("fusion", ["attention", "mean", "qformer"])
def test_what_stands_where_no_clip_is_changes_nothing_bit_by_bit(fusion):
    run = packing_case(fusion)
    batch = together(fusion, clips_alone(fusion, [9, 13, 7, 16, 5, 12]), [[0, 1], [2, 3, 4], [5]])
    filled = dict(batch)
    filled["targets"] = np.where(batch["target_weights"] > 0, batch["targets"], 5)
    filled["tokens"] = np.where(batch["segment_ids"] > 0, batch["tokens"], 7)
    filled["features"] = {}
    for name, x in batch["features"].items():
        there = batch["present"][name][..., None, None]
        assert not there.all()
        filled["features"][name] = np.where(there, x, np.float16(np.nan))
    for found, expected in zip(run(filled)[:3], run(batch)[:3], strict=True):
        jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("fusion", ["attention", "mean", "qformer"])
def test_rows_without_clips_have_no_gradient_at_all(fusion):
    batch = together(fusion, clips_alone(fusion, [0] * CLIPS), [[]] * ROWS)
    total, count, grads, _ = packing_case(fusion)(batch)
    assert total == count == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


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
@pytest.mark.parametrize("chunk", [1000, 8], ids=["one block", "many blocks"])
def test_cross_entropy_and_its_gradient_are_exact(columns, chunk):
    states, table, targets, weights = cross_entropy_inputs(2, columns)
    logits = states.astype(np.float64) @ table
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    onehot = np.eye(table.shape[1])[targets]
    expected = -np.sum(np.log(probabilities) * onehot * weights[..., None])
    expected_gradient = (weights[..., None] * (probabilities - onehot)) @ table.T

    function = jax.jit(jax.value_and_grad(cross_entropy_sum), static_argnums=4)
    found, gradient = function(states, table, targets, weights, chunk)
    assert relative_error(found, expected) < 1e-6  # float32 sums
    assert relative_error(gradient, expected_gradient) < 1e-6


@pytest.mark.parametrize("chunk", [1000, 2], ids=["one block", "many blocks"])
def test_a_gradient_of_the_frozen_vocabulary_is_refused(chunk):
    inputs = cross_entropy_inputs(2, 3)
    with pytest.raises(NotImplementedError, match="lm_head is frozen"):
        jax.grad(cross_entropy_sum, argnums=1)(*inputs, chunk)


def test_blocks_of_filler_are_left_out():
    """What is not a number there would be none in the sum, were it only weighted with 0."""
    states, table, targets, weights = cross_entropy_inputs(2, 16)
    weights[:, 4:] = 0  # of blocks of four columns all but the first
    weights[1, 9] = 1  # and one
    expected = jax.value_and_grad(cross_entropy_sum)(states, table, targets, weights, 8)
    for block in (4, 12):
        states[:, block : block + 4] = np.nan
    found = jax.value_and_grad(cross_entropy_sum)(states, table, targets, weights, 8)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert not found[1][:, 4:8].any() and found[1][1, 9].all()


@pytest.mark.parametrize("shares", [1, 2, 4])
def test_supervised_tokens_of_a_devices_rows_come_together_in_order(shares):
    lengths, targets = [16, 5, 9, 0], 6
    batch = make_batch(lengths, targets=targets)
    positions, found, weights = supervised(batch, shares)
    assert positions.shape == found.shape == weights.shape == (shares, 4 // shares * targets)
    states = np.arange(4 * 16).reshape(shares, -1)
    for group in range(shares):
        rows = np.arange(4).reshape(shares, -1)[group]
        real = [(r, s) for r in rows for s in range(targets) if batch["target_weights"][r, s]]
        at = [16 * r + batch["target_positions"][r, s] for r, s in real]
        count = len(real)
        np.testing.assert_array_equal(states[group, positions[group, :count]], at)
        np.testing.assert_array_equal(found[group, :count], [batch["targets"][x] for x in real])
        np.testing.assert_array_equal(weights[group], np.arange(weights.shape[1]) < count)


def test_rows_that_devices_cannot_share_evenly_are_brought_together_as_they_can():
    assert supervised(make_batch([8] * 6), 4)[0].shape == (2, 3 * 6)


def test_chunked_cross_entropy_never_holds_all_logits():
    rows, columns, vocabulary = 8, 128, 2048
    states, table, targets, weights = cross_entropy_inputs(rows, columns, vocabulary=vocabulary)

    def gradient(states):
        return jax.grad(cross_entropy_sum)(states, table, targets, weights, 64)

    compiled = jax.jit(gradient).lower(states).compile()
    # Logits, their softmax and its gradient: a few blocks of a sixteenth of all logits.
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * rows * columns * vocabulary * 4


def test_a_models_loss_holds_the_logits_of_as_many_positions_as_its_execution_says():
    rows, targets = np.shape(BATCH["targets"])
    found = {}
    for chunk in (rows, rows * targets):
        model = with_compute(MODEL, loss_chunk=chunk)
        run = functools.partial(loss_sum_and_count, model)
        traced = str(jax.make_jaxpr(run)(BASE, TRAINABLE, BATCH))
        logits = f"f32[1,{rows * targets},{MODEL.decoder.config.vocab_size}]"
        assert (logits in traced) == (chunk == rows * targets)
        found[chunk], _ = run(BASE, TRAINABLE, BATCH)
    np.testing.assert_allclose(*found.values(), rtol=1e-6)  # sums in another order


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


@pytest.mark.parametrize("remat", ["none", "full"])
def test_no_gradient_of_a_frozen_weight_is_computed(remat):
    model = make_model(fusion=None, attend=plain_attention, remat=remat)
    base, trainable = random_base(model), random_trainable(model)
    rows, length, targets = 2, 16, 6
    batch = make_batch([length] * rows, length, targets)

    def loss(trainable, base):
        return loss_sum_and_count(model, base, trainable, batch)[0]

    flops = train_flops(LLM, model.decoder.lora, length, targets, causal=False)
    expected = rows * flops.total
    found = matmul_flops(jax.grad(loss), trainable, base)
    assert (found == expected) if remat == "none" else (found > expected)

    def loss_of_layers(trainable, layers):
        return loss(trainable, {**base, "layers": layers})

    # Not even where it is asked for: a projection that has an adapter is frozen.
    gradient = jax.grad(loss_of_layers, argnums=(0, 1))
    assert matmul_flops(gradient, trainable, base["layers"]) == found
