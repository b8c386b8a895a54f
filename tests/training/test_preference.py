"""The preference loss against a transcript of its definition, and against what it is to do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from affectgpt_jax.training.preference import PreferenceLossConfig, pair_loss

SIGNS = np.array([[1, 1, -1, -1, -1, 0], [1, -1, 0, 0, 0, 0], [0] * 6], np.float32)


def transcript(log_probs, reference, beta, smoothing, weight):
    """Loss, gradient by the log-probabilities and metrics, pair by pair."""
    total, gradient, margins = 0.0, np.zeros_like(log_probs), []
    for row in range(2):
        margin = 0.0
        for t, sign in enumerate(SIGNS[row]):
            margin += beta * sign * (log_probs[row, t] - reference[row, t])
        sigmoid = 1 / (1 + np.exp(-margin))
        total -= (1 - smoothing) * np.log(sigmoid) + smoothing * np.log(1 - sigmoid)
        slope = -(1 - smoothing) * (1 - sigmoid) + smoothing * sigmoid
        gradient[row] = slope * beta * SIGNS[row]
        for t in np.flatnonzero(SIGNS[row] > 0):
            total -= weight * log_probs[row, t] / (SIGNS[row] > 0).sum()
            gradient[row, t] -= weight / (SIGNS[row] > 0).sum()
        margins.append(margin)
    return total, gradient, margins


@pytest.mark.parametrize(("smoothing", "weight"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.3)])
def test_loss_and_gradient_are_those_of_the_definition(smoothing, weight):
    rng = np.random.default_rng(0)
    log_probs, reference = rng.normal(-2, 1, size=(2, 3, 6))
    config = PreferenceLossConfig(0.7, smoothing, weight)
    with jax.enable_x64(True):
        batch = {"signs": jnp.asarray(SIGNS), "reference_log_probs": jnp.asarray(reference)}

        def objective(x):
            total, count, metrics = pair_loss(config, x, batch)
            return total, (count, metrics)

        gradient = jax.value_and_grad(objective, has_aux=True)
        (total, (count, metrics)), found = gradient(jnp.asarray(log_probs))
    expected, slopes, margins = transcript(log_probs, reference, 0.7, smoothing, weight)
    assert float(total) == pytest.approx(expected, rel=1e-6) and float(count) == 2
    np.testing.assert_allclose(found, slopes, rtol=1e-6)
    assert float(metrics["margin"]) == pytest.approx(sum(margins), rel=1e-6)
    assert float(metrics["accuracy"]) == sum(margin > 0 for margin in margins)
    assert float(metrics["better"] - metrics["worse"]) == pytest.approx(sum(margins), rel=1e-6)


def test_at_the_start_the_loss_is_that_of_a_coin_and_no_pair_is_told_apart():
    log_probs = jnp.asarray(np.random.default_rng(0).normal(size=(3, 6)), jnp.float32)
    batch = {"signs": jnp.asarray(SIGNS), "reference_log_probs": log_probs}
    total, count, metrics = pair_loss(PreferenceLossConfig(), log_probs, batch)
    assert float(total / count) == pytest.approx(np.log(2))
    assert float(metrics["accuracy"]) == float(metrics["margin"]) == 0


def test_preferences_of_a_known_reward_lead_to_the_closed_form():
    """All pairs of 6 answers, preferred as Bradley and Terry have it: the optimum is
    `reference * exp(reward / beta) / Z`."""
    rng = np.random.default_rng(1)
    reward, beta = rng.normal(size=6), 0.5
    reference = jax.nn.log_softmax(jnp.asarray(rng.normal(size=6), jnp.float32))
    better, worse = np.array([(i, j) for i in range(6) for j in range(6) if i != j]).T
    share = jnp.asarray(1 / (1 + np.exp(reward[worse] - reward[better])), jnp.float32)
    chosen = np.stack([better, worse], axis=1)
    signs = jnp.tile(jnp.asarray([[1.0, -1.0]]), (len(chosen), 1))
    batch = {"signs": signs, "reference_log_probs": reference[chosen]}
    config = PreferenceLossConfig(beta)
    optimizer = optax.adam(0.05)

    def objective(logits):
        log_probs = jax.nn.log_softmax(logits)[chosen]

        def each(row):
            one = {name: x[row][None] for name, x in batch.items()}
            return pair_loss(config, log_probs[row][None], one)[0]

        return jnp.sum(share * jax.vmap(each)(jnp.arange(len(chosen))))

    @jax.jit
    def train(logits):
        def step(carry, _):
            logits, state = carry
            updates, state = optimizer.update(jax.grad(objective)(logits), state)
            return (optax.apply_updates(logits, updates), state), None

        return jax.lax.scan(step, (logits, optimizer.init(logits)), None, 600)[0][0]

    found = np.asarray(jax.nn.softmax(train(reference)))
    expected = np.exp(np.asarray(reference) + reward / beta)
    np.testing.assert_allclose(found, expected / expected.sum(), atol=0.01)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"beta": 0.0}, "beta is 0.0"),
        ({"label_smoothing": 0.5}, "label_smoothing is 0.5"),
        ({"nll_weight": -1.0}, "nll_weight is -1.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        PreferenceLossConfig(**settings)
