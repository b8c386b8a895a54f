"""The optimizer against PyTorch's AdamW, and the learning rate against its closed form."""

import math

import jax
import jax.numpy as jnp
import needs_torch
import numpy as np
import pytest

from affectgpt_jax.training.optimizer import (
    OptimizerConfig,
    decay_mask,
    learning_rate_schedule,
    make_optimizer,
)

# --- AdamW ----------------------------------------------------------------------------------------

# Path -> shape and whether the recipe decays it: matrices, but neither vectors nor biases.
TENSORS = {
    "lora/layers/q_proj/lora_a": ((2, 5, 3), True),
    "fusion/multi/projection/kernel": ((4, 6), True),
    "fusion/multi/projection/bias": ((6,), False),
    "fusion/video/qformer/attention/bias": ((2, 3), False),
    "fusion/video/qformer/norm/scale": ((6,), False),
    "fusion/video/positions": ((7, 4), True),
    "fusion/video/temperature": ((4,), False),  # a vector by another name
}


def nested(flat):
    tree = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def draw(seed):
    rng = np.random.default_rng(seed)
    return {p: rng.normal(size=s).astype(np.float32) for p, (s, _) in TENSORS.items()}


def test_decay_spares_vectors_and_biases():
    expected = nested({path: decays for path, (_, decays) in TENSORS.items()})
    assert decay_mask(nested(draw(0))) == expected


@pytest.mark.parametrize("clip_norm", [0.0, 0.5], ids=["unclipped", "clipped"])
def test_ten_updates_equal_adamw_of_pytorch(clip_norm):
    torch = needs_torch.pytorch("the reference runs in PyTorch")
    # A large epsilon, so that an update depends on the size of a gradient, and clipping shows.
    config = OptimizerConfig(
        learning_rate=1e-2,
        warmup_learning_rate=1e-3,
        warmup_steps=4,
        final_learning_rate=1e-3,
        weight_decay=0.3,
        beta1=0.8,
        beta2=0.95,
        epsilon=0.1,
        clip_norm=clip_norm,
    )
    steps = 10
    optimizer, schedule = make_optimizer(config, steps), learning_rate_schedule(config, steps)
    params = nested(draw(0))
    state = optimizer.init(params)

    @jax.jit
    def update(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    theirs = {path: torch.nn.Parameter(torch.tensor(x)) for path, x in draw(0).items()}
    reference = torch.optim.AdamW(
        [
            {"params": [theirs[p] for p, (_, d) in TENSORS.items() if d], "weight_decay": 0.3},
            {"params": [theirs[p] for p, (_, d) in TENSORS.items() if not d], "weight_decay": 0},
        ],
        betas=(0.8, 0.95),
        eps=0.1,
    )
    for step in range(steps):
        gradients = draw(1 + step)
        params, state = update(params, state, nested(gradients))
        for path, parameter in theirs.items():
            parameter.grad = torch.tensor(gradients[path])
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(theirs.values(), clip_norm)
        for group in reference.param_groups:
            group["lr"] = float(schedule(step))
        reference.step()
    expected = nested({path: parameter.detach().numpy() for path, parameter in theirs.items()})
    # Values of order 1, each the sum of eleven float32 terms.
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), params, expected
    )


# --- The learning rate ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "rate"),
    [(0, 1e-6), (2500, 5.5e-6), (5000, 1e-5), (5001, 1e-5), (150_000, 1e-5), (300_000, 1e-5)],
)
def test_the_recipe_warms_up_and_then_stays_constant(step, rate):
    schedule = learning_rate_schedule(OptimizerConfig(), 300_000)
    np.testing.assert_allclose(schedule(step), rate, rtol=1e-6)  # float32


@pytest.mark.parametrize("step", [0, 10, 30, 55, 70, 110, 200])
def test_a_final_rate_below_the_first_is_reached_along_a_cosine(step):
    config = OptimizerConfig(
        learning_rate=1.0, warmup_learning_rate=0.2, warmup_steps=10, final_learning_rate=0.1
    )
    if step < 10:
        expected = 0.2 + 0.8 * step / 10
    else:
        share = min((step - 10) / 100, 1)
        expected = 0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2
    np.testing.assert_allclose(learning_rate_schedule(config, 110)(step), expected, rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 100])
def test_without_warm_up_a_run_starts_at_the_full_rate(steps):
    schedule = learning_rate_schedule(OptimizerConfig(warmup_steps=0), steps)
    np.testing.assert_allclose(schedule(0), 1e-5, rtol=1e-6)


def test_a_run_shorter_than_its_warm_up_never_reaches_the_full_rate():
    schedule = learning_rate_schedule(OptimizerConfig(), 100)
    np.testing.assert_allclose(schedule(99), 1e-6 + 9e-6 * 99 / 5000, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": -1e-5}, "optimizer.learning_rate is -1e-05; expected 0 or more"),
        ({"clip_norm": -1.0}, "optimizer.clip_norm is -1.0"),
        ({"beta2": 1.0}, "optimizer.beta2 is 1.0; expected less than 1"),
    ],
)
def test_an_impossible_setting_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**changes)
