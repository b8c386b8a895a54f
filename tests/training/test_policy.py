"""The policy loss against a transcript of its definitions in NumPy, and against a bandit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_model import make_batch, make_model, pack_rows, random_base, random_trainable

from affectgpt_jax.models.affectgpt import with_compute
from affectgpt_jax.training import sharding
from affectgpt_jax.training.policy import (
    AGGREGATIONS,
    KL_ESTIMATORS,
    PolicyLossConfig,
    answer_log_probs,
    flat_groups,
    group_advantages,
    policy_loss,
    token_loss,
    token_weights,
)
from affectgpt_jax.training.step import make_train_step

LENGTHS = [[3, 1, 4, 2], [4, 4, 1, 3]]  # tokens of two groups of four answers
LONGEST = 5


def transcript(logits, tokens, rewards, old, rollout, reference, config, aggregation, scale):
    """The loss and its gradient by the logits, one token at a time, from the definitions.

    Args:
        logits: of every token, `[answers][tokens][V]`; all others likewise, `[answers][tokens]`.
        rewards: `[groups][G]`.
    """
    gradient = [np.zeros_like(answer) for answer in logits]
    everything = np.concatenate([np.asarray(r) for r in rewards])
    total, answer = 0.0, 0
    for group in rewards:
        for reward in group:
            advantage = reward - np.mean(group)
            if scale == "group":
                advantage /= (
                    np.sqrt(np.sum((group - np.mean(group)) ** 2) / (len(group) - 1)) + 1e-4
                )
            elif scale == "batch":
                deviation = np.sum((everything - everything.mean()) ** 2) / (len(everything) - 1)
                advantage /= np.sqrt(deviation) + 1e-4
            length = len(tokens[answer])
            divisor = {
                "tokens": sum(map(len, tokens)),
                "answers": length * len(tokens),
                "constant": LONGEST * len(tokens),
            }[aggregation]
            for t in range(length):
                exponentials = np.exp(logits[answer][t] - logits[answer][t].max())
                probabilities = exponentials / exponentials.sum()
                logp = np.log(probabilities[tokens[answer][t]])
                ratio = np.exp(logp - old[answer][t])
                bounded = min(max(ratio, 1 - config.epsilon), 1 + config.epsilon_high)
                weight = min(np.exp(old[answer][t] - rollout[answer][t]), config.weight_cap)
                if ratio * advantage <= bounded * advantage:
                    value, slope = -weight * ratio * advantage, -weight * ratio * advantage
                else:
                    value, slope = -weight * bounded * advantage, 0.0
                d = reference[answer][t] - logp
                kl, kl_slope = {
                    "k2": (d * d / 2, -d),
                    "k3": (np.exp(d) - d - 1, 1 - np.exp(d)),
                }[config.kl]
                total += (value + config.beta * kl) / divisor
                onehot = np.eye(len(probabilities))[tokens[answer][t]]
                by_logits = (slope + config.beta * kl_slope) * (onehot - probabilities)
                gradient[answer][t] += by_logits / divisor
            answer += 1
    return total, gradient


def rows_of(answers, width):
    """Ragged lists as `[rows, width]`, padded with what must not matter."""
    out = np.full((len(answers), width, *np.shape(answers[0][0])), 7.0)
    for row, values in zip(out, answers):
        row[: len(values)] = values
    return jnp.asarray(out)


@pytest.mark.parametrize("kl", KL_ESTIMATORS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_loss_and_gradient_are_those_of_the_definitions(aggregation, scale, kl):
    rng = np.random.default_rng(0)
    lengths = [n for group in LENGTHS for n in group]
    logits = [rng.normal(size=(n, 6)) for n in lengths]
    tokens = [rng.integers(6, size=n) for n in lengths]
    rewards = [rng.random(4) for _ in LENGTHS]

    def near(spread):
        own = [a[np.arange(len(t)), t] - np.log(np.exp(a).sum(1)) for a, t in zip(logits, tokens)]
        return [x + spread * rng.normal(size=x.shape) for x in own]

    old, rollout, reference = near(0.5), near(0.9), near(0.3)
    config = PolicyLossConfig(beta=0.3, kl=kl, weight_cap=1.5)
    with jax.enable_x64(True):
        advantages = group_advantages(np.array(rewards), scale).astype(np.float64).ravel()
        weights = [token_weights(n, aggregation, LONGEST) for n in lengths]
        mask = np.arange(LONGEST) < np.array(lengths)[:, None]
        batch = {
            "advantages": jnp.asarray(np.where(mask, advantages[:, None], 0)),
            "loss_weights": jnp.asarray(np.where(mask, np.array(weights)[:, :1], 0)),
            "count_weights": jnp.asarray(np.where(mask, np.array(weights)[:, 1:], 0)),
            "sampled": jnp.asarray(mask.astype(float)),
            "old_log_probs": rows_of(old, LONGEST),
            "rollout_log_probs": rows_of(rollout, LONGEST),
            "reference_log_probs": rows_of(reference, LONGEST),
        }
        chosen = rows_of(tokens, LONGEST).astype(int) % 6

        def objective(logits):
            log_probs = jax.nn.log_softmax(logits)
            log_probs = jnp.take_along_axis(log_probs, chosen[..., None], axis=-1)[..., 0]
            total, count, metrics = token_loss(config, log_probs, batch)
            return total / count, metrics

        gradient = jax.value_and_grad(objective, has_aux=True)
        (value, metrics), found = gradient(rows_of(logits, LONGEST))
    expected, by_logits = transcript(
        logits, tokens, rewards, old, rollout, reference, config, aggregation, scale
    )
    # Advantages are float32.
    assert float(value) == pytest.approx(expected, rel=1e-5, abs=1e-7)
    for row, slope in zip(np.asarray(found), by_logits, strict=True):
        np.testing.assert_allclose(row[: len(slope)], slope, atol=1e-7)
        assert not row[len(slope) :].any()
    # Clipping is at work on both sides, and so is the cap.
    count = float(batch["count_weights"].sum())
    for name in ("clipped", "capped"):
        assert 0.05 < float(metrics[name]) / count < 0.95
    ratio = np.exp(np.concatenate(near(0)) - np.concatenate(old))
    each = np.repeat(advantages, lengths)
    assert ((ratio > 1.28) & (each > 0)).any() and ((ratio < 0.8) & (each < 0)).any()


def test_the_kl_is_zero_at_the_start_and_its_metric_always_k3():
    log_probs = jnp.asarray([[-1.0, -2.0]])
    ones = jnp.ones((1, 2))
    batch = {
        "advantages": 0 * ones,
        "loss_weights": ones,
        "count_weights": ones,
        "sampled": ones,
        "rollout_log_probs": log_probs,
        "reference_log_probs": log_probs,
    }
    config = PolicyLossConfig(beta=1.0, kl="k2")
    total, count, metrics = token_loss(config, log_probs, batch)
    assert float(total) == 0 and float(metrics["kl"]) == 0 and float(count) == 2
    batch["reference_log_probs"] = log_probs + 1
    _, _, metrics = token_loss(config, log_probs, batch)
    assert float(metrics["kl"]) / 2 == pytest.approx(np.e - 2)


def test_a_supervised_token_has_the_gradient_of_cross_entropy():
    ones = jnp.ones((1, 3))
    batch = {
        "advantages": ones,
        "loss_weights": ones,
        "count_weights": ones,
        "sampled": 0 * ones,
        "rollout_log_probs": 5 * ones,
        "reference_log_probs": 5 * ones,
    }
    config = PolicyLossConfig(beta=1.0)
    slope = jax.grad(lambda x: token_loss(config, x, batch)[0])(jnp.asarray([[-1.0, -2.0, -0.1]]))
    np.testing.assert_allclose(slope, -ones)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_a_bandit_converges_to_the_closed_form(beta):
    """24 actions with known rewards, their logits as parameters, groups sampled on-policy."""
    rng = np.random.default_rng(1)
    rewards = rng.random(24)
    reference = jax.nn.log_softmax(jnp.asarray(rng.normal(size=24)))
    groups, size, steps = 64, 8, 1500
    config = PolicyLossConfig(beta=beta, kl="k2")
    optimizer = optax.adam(optax.linear_schedule(0.05, 0.0, steps))

    def advantages_of(r):  # `group_advantages` with the scale "none", under jit
        return r - r.mean(axis=1, keepdims=True)

    @jax.jit
    def train(logits, key):
        def step(carry, key):
            logits, state, mean = carry
            actions = jax.random.categorical(key, logits, shape=(groups, size))
            log_probs = jax.nn.log_softmax(logits)[actions]
            advantages = advantages_of(jnp.asarray(rewards)[actions])
            ones = jnp.ones((groups, size))
            batch = {
                "advantages": advantages,
                "loss_weights": ones,
                "count_weights": ones,
                "sampled": ones,
                "rollout_log_probs": log_probs,
                "reference_log_probs": reference[actions],
            }

            def objective(logits):
                total, count, _ = token_loss(config, jax.nn.log_softmax(logits)[actions], batch)
                return total / count

            updates, state = optimizer.update(jax.grad(objective)(logits), state)
            logits = optax.apply_updates(logits, updates)
            return (logits, state, 0.99 * mean + 0.01 * jax.nn.softmax(logits)), None

        start = (reference, optimizer.init(reference), jax.nn.softmax(reference))
        (logits, _, mean), _ = jax.lax.scan(step, start, jax.random.split(key, steps))
        return mean

    found = np.asarray(train(reference, jax.random.key(0)))
    if not beta:
        assert found[rewards.argmax()] > 0.98
        return
    # The group's mean, from which its own answer is not left out, shrinks the advantage.
    expected = np.exp(np.asarray(reference) + rewards * (size - 1) / size / beta)
    expected /= expected.sum()
    assert np.abs(found - expected).max() < 0.02


def test_advantages_compare_the_answers_of_a_group():
    rewards = np.array([[0.0, 1.0, 0.5, 0.5], [0.3, 0.3, 0.3, 0.3]])
    assert group_advantages(rewards).tolist() == [[-0.5, 0.5, 0, 0], [0, 0, 0, 0]]
    scaled = group_advantages(rewards, "group")
    np.testing.assert_allclose(scaled[0, 1], 0.5 / (np.sqrt(0.5 / 3) + 1e-4), rtol=1e-6)
    assert not scaled[1].any()
    assert flat_groups(rewards).tolist() == [False, True]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"epsilon": 0.0}, "epsilon is 0.0"),
        ({"beta": -1.0}, "beta is -1.0"),
        ({"kl": "k4"}, "kl is 'k4'"),
        ({"weight_cap": 0.5}, "weight_cap is 0.5"),
    ],
)
def test_settings_out_of_range_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        PolicyLossConfig(**settings)


# --- in a model -----------------------------------------------------------------------------------

MODEL = make_model()
BASE, TRAINABLE = random_base(MODEL), random_trainable(MODEL)
EXTRAS = ("advantages", "loss_weights", "count_weights", "sampled", "rollout_log_probs")


def with_extras(batch, seed=3):
    """A batch with random advantages and log-probabilities of its supervised tokens."""
    rng = np.random.default_rng(seed)
    mask = batch["target_weights"]
    extras = {
        "advantages": rng.normal(size=(len(mask), 1)),
        "loss_weights": 1.0,
        "count_weights": 1.0,
        "sampled": 1.0,
        "rollout_log_probs": rng.normal(-3, 1, size=mask.shape),
        "old_log_probs": rng.normal(-3, 1, size=mask.shape),
        "reference_log_probs": rng.normal(-3, 1, size=mask.shape),
    }
    return batch | {name: (value * mask).astype(np.float32) for name, value in extras.items()}


@functools.cache
def step_of(microbatches, mesh):
    """The model's plain gradient step, compiled, and its weights, on the devices of a mesh."""
    model, trees = MODEL, (TRAINABLE, BASE)
    if mesh:
        model = with_compute(MODEL, shard=sharding.ActivationConstraint(mesh))
        trees = [jax.device_put(x, sharding.tree_shardings(mesh, x)) for x in trees]
    loss = policy_loss(PolicyLossConfig(beta=0.1))
    step = make_train_step(
        model,
        loss,
        optax.sgd(1.0),
        lambda _: 0.0,
        seed=0,
        gradient_accumulation_steps=microbatches,
    )
    return jax.jit(step), *trees


def update(batch, microbatches=1, mesh=None):
    """The trainable tree after one plain gradient step, which shows the gradient."""
    step, trainable, base = step_of(microbatches, mesh)
    batch = sharding.shard_batch(mesh, batch) if mesh else batch
    start = {"trainable": trainable, "opt_state": optax.sgd(1.0).init(trainable)}
    state, metrics = step(start | {"step": jnp.zeros((), jnp.int32)}, base, batch)
    return state["trainable"], metrics


@pytest.fixture(scope="module")
def padded():
    return with_extras(make_batch([9, 14, 7, 11, 13, 8, 10, 12]))


@pytest.fixture(scope="module")
def expected(padded):
    return update(padded)


def assert_same_update(found, expected):
    (tree, metrics), (expected_tree, expected_metrics) = found, expected
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(expected_tree), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_microbatches_and_devices_give_the_gradient_of_the_whole(padded, expected):
    assert float(expected[1]["grad_norm"]) > 0.1
    assert_same_update(update(padded, microbatches=4), expected)
    assert_same_update(
        update(padded, mesh=sharding.make_mesh("data:2", jax.devices()[:2])), expected
    )


def test_packed_rows_give_the_gradient_of_padded_ones(padded, expected):
    rows = [[0, 1, 2], [3, 4], [5, 6, 7], []]
    extras = [*EXTRAS, "old_log_probs", "reference_log_probs"]
    packed = pack_rows({k: v for k, v in padded.items() if k not in extras}, rows, 36, 18, 3)
    for name in extras:
        packed[name] = np.zeros((4, 18), np.float32)
        for row, members in enumerate(rows):
            values = [padded[name][i][padded["target_weights"][i] > 0] for i in members]
            if values:
                values = np.concatenate(values)
                packed[name][row, : len(values)] = values
    assert_same_update(update(packed), expected)


def test_a_step_makes_rewarded_answers_more_probable(padded):
    log_probs = jax.jit(functools.partial(answer_log_probs, MODEL))
    before = np.asarray(log_probs(BASE, TRAINABLE, padded))
    sign = np.array([1, -1] * 4)[:, None]
    advantages = (0.01 * sign * padded["target_weights"]).astype(np.float32)
    kinds = ("old_log_probs", "rollout_log_probs", "reference_log_probs")
    batch = padded | dict.fromkeys(kinds, before) | {"advantages": advantages}
    tree, metrics = update(batch)
    change = np.asarray(log_probs(BASE, tree, padded)) - before
    assert (change.sum(axis=1) * sign[:, 0] > 0).all()
    count = float(metrics["sampled"])
    assert count == 1 and float(metrics["mismatch"]) < 1e-5
    assert float(metrics["ratio"]) == pytest.approx(1) and float(metrics["kl"]) < 1e-9
