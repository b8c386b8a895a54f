"""One update: what it may not depend on (accumulation, layout, filler) and what it must (seed)."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_model import (
    LLM,
    make_batch,
    make_model,
    pack_rows,
    random_base,
    random_trainable,
)

from affectgpt_jax.models.affectgpt import init_random_base
from affectgpt_jax.program import lower_step
from affectgpt_jax.training import sharding
from affectgpt_jax.training.losses import cross_entropy
from affectgpt_jax.training.step import (
    dropout_key,
    init_key,
    init_state,
    make_eval_step,
    make_train_step,
    nonfinite_leaves,
)

# Rows with 6, 6, 3, 0 ... supervised tokens: a mean of the parts' means would show.
LENGTHS = [16, 11, 7, 0, 14, 16, 6, 5]
BATCH = make_batch(LENGTHS)
# The same clips and more, up to three a row; the last row is filler.
PACKED = pack_rows(
    make_batch([*LENGTHS, 9, 13, 16, 8, 5]),
    [[0, 1, 6], [2, 4], [5], [7, 8], [9], [10, 12], [11], []],
    width=40,
    targets=16,
    clips=3,
)
BASE, TRAINABLE = random_base(make_model()), random_trainable(make_model())
# An update that is linear in the gradient. Adam's is near the gradient's sign at first, which turns
# a rounding error near zero into a full step.
SGD = optax.sgd(1.0)
SCHEDULE = optax.linear_schedule(0.0, 1.0, 8)
# Sums of gradients over 8 rows of 16 tokens in float32, in another order.
FLOAT32 = 1e-5


def new_state(step=0):
    # Copies, since a step may consume its state.
    trainable = jax.tree.map(jnp.copy, TRAINABLE)
    return {"trainable": trainable, "opt_state": SGD.init(trainable), "step": jnp.int32(step)}


def jitted_step(microbatches=1, dropout=0.0):
    model = make_model(dropout=dropout)

    @jax.jit
    def step(state, base, batch, seed):
        # The seed is traced, so that another one costs no compilation.
        update = make_train_step(
            model, cross_entropy, SGD, SCHEDULE, seed=seed, gradient_accumulation_steps=microbatches
        )
        return update(state, base, batch)

    return lambda state, batch=BATCH, seed=0: step(state, BASE, batch, seed)


one_device_step = functools.cache(jitted_step)


def assert_same_update(found, expected, start=TRAINABLE):
    """Compare states and metrics; the gradient is what the update subtracted from `start`."""
    (state, metrics), (expected_state, expected_metrics) = found, expected
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=FLOAT32, err_msg=name)
    assert state["step"] == expected_state["step"] == 1
    before, after, wanted = (
        jax.tree_util.tree_leaves_with_path(tree)
        for tree in (start, state["trainable"], expected_state["trainable"])
    )
    changes = {}
    for (path, start), (_, y) in zip(before, wanted, strict=True):
        largest = np.abs(np.asarray(y, np.float64) - start).max()
        changes[path[:-1]] = max(changes.get(path[:-1], 0), largest)
    for (path, start), (_, x), (_, y) in zip(before, after, wanted, strict=True):
        # Subtracting from a parameter rounds to the spacing of its values.
        rounding = np.spacing(np.abs(np.asarray(start)).max())
        start, x, y = (np.asarray(leaf, np.float64) for leaf in (start, x, y))
        largest = np.abs(y - start).max()
        assert largest > 0, path
        if start.size == 1:
            # A score's bias: its gradient is one number, a sum that cancels, and it is the score's
            # weights, whose gradients are sums of the same terms, that say what is little.
            largest = max(largest, changes[path[:-1]])
        assert np.abs(x - y).max() < FLOAT32 * largest + rounding, path


@pytest.mark.parametrize(
    ("microbatches", "batch"),
    [(2, BATCH), (2, PACKED), pytest.param(4, BATCH, marks=pytest.mark.slow)],
)
def test_accumulation_does_not_change_the_update(microbatches, batch):
    expected = one_device_step()(new_state(), batch)
    assert_same_update(one_device_step(microbatches)(new_state(), batch), expected)


def test_the_metrics_describe_the_update():
    state, metrics = one_device_step()(new_state(3))
    gradient = jax.tree.map(lambda x, y: np.asarray(x - y), TRAINABLE, state["trainable"])
    norm = np.sqrt(sum((leaf.astype(np.float64) ** 2).sum() for leaf in jax.tree.leaves(gradient)))
    # The gradient is what a subtraction left of values of order 1.
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
    assert metrics["learning_rate"] == 3 / 8
    assert metrics["supervised_tokens"] == BATCH["target_weights"].sum() == 30
    total, count = jax.jit(make_eval_step(make_model(), cross_entropy))(TRAINABLE, BASE, BATCH)
    np.testing.assert_allclose(metrics["loss"], total / count, rtol=FLOAT32)


def test_what_is_not_finite_in_a_state_is_named():
    state = {"trainable": {"lora": {"a": jnp.ones(3)}, "fusion": {}}, "step": jnp.int32(1)}
    assert nonfinite_leaves(state) == []
    for value in (np.nan, np.inf, -np.inf):
        state["opt_state"] = (jnp.ones(2), {"mu": jnp.ones((2, 2)).at[1, 0].set(value)})
        assert nonfinite_leaves(state) == ["opt_state/1/mu"]


# --- Filler rows ----------------------------------------------------------------------------------


def test_filler_rows_change_nothing():
    real = np.flatnonzero(LENGTHS)
    without = jax.tree.map(lambda x: x[real], BATCH)
    expected = one_device_step()(new_state(), without)
    assert_same_update(one_device_step()(new_state()), expected)


def test_a_batch_of_filler_is_no_update():
    state, metrics = one_device_step()(new_state(), make_batch([0] * len(LENGTHS)))
    assert metrics["loss"] == metrics["grad_norm"] == metrics["supervised_tokens"] == 0
    jax.tree.map(np.testing.assert_array_equal, state["trainable"], TRAINABLE)


# --- Layout ---------------------------------------------------------------------------------------

DROPOUT = 0.25


@pytest.mark.parametrize(
    ("layout", "dropout", "batch"),
    [
        ("data:8", 0.0, BATCH),
        pytest.param("fsdp:8", 0.0, BATCH, marks=pytest.mark.slow),
        ("data:2,fsdp:2,tensor:2", DROPOUT, BATCH),
        ("data:4,fsdp:2", 0.0, PACKED),
    ],
)
def test_eight_devices_do_what_one_does_and_consume_their_state(layout, dropout, batch):
    mesh = sharding.make_mesh(layout)
    model = make_model(dropout=dropout, shard=sharding.ActivationConstraint(mesh))
    abstract_base = sharding.abstract(mesh, lambda key: init_random_base(model, key))
    abstract_state = sharding.abstract(mesh, lambda key: init_state(model, SGD, key))
    step = lower_step(
        make_train_step(model, cross_entropy, SGD, SCHEDULE, seed=0),
        mesh,
        abstract_state,
        abstract_base,
        sharding.abstract_batch(mesh, batch),
    ).compile()
    base = jax.device_put(BASE, sharding.shardings_of(abstract_base))
    state = jax.device_put(new_state(), sharding.shardings_of(abstract_state))
    found = step(state, base, sharding.shard_batch(mesh, batch))
    # The masks of dropout do not depend on the layout either.
    assert_same_update(found, one_device_step(dropout=dropout)(new_state(), batch))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state)), "the state was not donated"
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(base))


# What eight devices can form, and one that leaves axes out.
LAYOUTS = (
    "data:8",
    "fsdp:8",
    "tensor:8",
    "data:2,fsdp:4",
    "data:4,fsdp:2",
    "data:4,tensor:2",
    "data:2,tensor:4",
    "fsdp:4,tensor:2",
    "fsdp:2,tensor:4",
    "data:2,fsdp:2,tensor:2",
)


def tied_or_not(tied, lora):
    """The tiny model with a head of its own or without, with LoRA on every projection or none."""
    llm = dataclasses.replace(LLM, tie_word_embeddings=tied)
    return functools.partial(make_model, llm, lora=lora)


@functools.cache
def case(tied, lora, microbatches):
    """A model, its weights, its batch, and what one device makes of them."""
    new_model = tied_or_not(tied, lora)
    # Rows for eight devices in each part.
    batch = make_batch(LENGTHS * microbatches)
    base, trainable = random_base(new_model()), random_trainable(new_model())
    step = jax.jit(
        make_train_step(
            new_model(),
            cross_entropy,
            SGD,
            SCHEDULE,
            seed=0,
            gradient_accumulation_steps=microbatches,
        ),
    )
    state = {"trainable": trainable, "opt_state": SGD.init(trainable), "step": jnp.int32(0)}
    return new_model, base, state, batch, step(state, base, batch)


QUICK = {
    ("tensor:8", True, True, 1),
    ("fsdp:4,tensor:2", False, True, 2),
    ("data:2,fsdp:2,tensor:2", True, False, 2),
}


@pytest.mark.parametrize(
    ("layout", "tied", "lora", "microbatches"),
    [
        pytest.param(*row, marks=() if row in QUICK else pytest.mark.slow)
        for row in itertools.product(LAYOUTS, (True, False), (True, False), (1, 2))
    ],
)
def test_every_layout_gives_the_loss_and_the_gradient_of_one_device(
    layout, tied, lora, microbatches
):
    new_model, base, state, batch, expected = case(tied, lora, microbatches)
    mesh = sharding.make_mesh(layout)
    model = new_model(shard=sharding.ActivationConstraint(mesh))
    step = make_train_step(
        model, cross_entropy, SGD, SCHEDULE, seed=0, gradient_accumulation_steps=microbatches
    )
    found = jax.jit(step)(
        jax.device_put(state, sharding.tree_shardings(mesh, state)),
        jax.device_put(base, sharding.tree_shardings(mesh, base)),
        sharding.shard_batch(mesh, batch),
    )
    assert_same_update(found, expected, state["trainable"])


# --- Seed -----------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_losses_bit_for_bit():
    def losses(step):
        state, values = new_state(), []
        for _ in range(3):
            state, metrics = step(state)
            values.append(float(metrics["loss"]))
        return values

    # Compiled once more, as in a run that is resumed.
    assert losses(jitted_step(dropout=DROPOUT)) == losses(one_device_step(dropout=DROPOUT))


def test_initialisation_and_dropout_draw_from_keys_of_their_own():
    keys = [key(seed) for key in (init_key, dropout_key) for seed in (0, 1)]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == 4


def test_dropout_follows_from_seed_and_step():
    def loss(seed, step):
        return float(one_device_step(dropout=DROPOUT)(new_state(step), seed=seed)[1]["loss"])

    assert len({loss(0, 0), loss(0, 1), loss(1, 0)}) == 3
    assert loss(0, 1) == loss(0, 1)


def test_every_microbatch_draws_dropout_masks_of_its_own():
    filler = make_batch([0] * 4)

    def loss(microbatch, dropout):
        """Loss of a batch whose rows are the same four in one microbatch and filler in another."""
        rows = jax.tree.map(lambda x: x[:4], BATCH)
        both = (rows, filler) if microbatch == 0 else (filler, rows)
        # Row i of microbatch m is row 2 * i + m of the batch.
        batch = jax.tree.map(lambda *x: np.stack(x, axis=1).reshape(-1, *x[0].shape[1:]), *both)
        return float(one_device_step(2, dropout)(new_state(), batch)[1]["loss"])

    assert loss(0, 0.0) == loss(1, 0.0)
    assert loss(0, DROPOUT) != loss(1, DROPOUT)
