"""Group-relative policy optimisation: advantages, weights of tokens, and the loss.

GRPO (Shao et al. 2024, arXiv 2402.03300) compares the answers to one prompt with each other. Of
token t of answer i, with reward r_i, mean and standard deviation s of its group of G:

    A_i     = (r_i - mean) / scale              scale: s + 1e-4, that of the whole batch, or 1
    ratio_t = exp(logp_t - old_t)
    l_t     = -w_t min(ratio_t A_i, clip(ratio_t, 1 - epsilon, 1 + epsilon_high) A_i) + beta KL_t
    KL_t    = d^2 / 2 ("k2") or exp(d) - d - 1 ("k3"), with d = reference_t - logp_t

On answers of the policy the gradient of k2 is that of KL(policy || reference), whose optimum is
`reference exp(r / beta') / Z` with `beta' = beta G / (G - 1)`, since the mean of a group has the
answer itself in it. k3 is GRPO's: its value has the KL as its mean, its gradient is another. (The
gradient of the third estimator, -d, is zero on average, so it would hold nothing.)

`old` is the policy that the answers are compared with: the one before the first update on them. `w`
corrects for answers that were written with other probabilities, such as those of merged and rounded
weights: `min(exp(old_t - rollout_t), cap)`, through which no gradient flows.

The loss of a batch is the sum of `l_t` over all tokens by the number of tokens ("tokens"), the mean
over answers of the mean over their tokens ("answers"), or the sum by the number of answers times
the length that an answer may have ("constant", Dr.GRPO, arXiv 2503.20783).

A batch is one of `models.affectgpt` and holds, `[B, S]` float32 each:

    advantages           A_i of every supervised token
    loss_weights         its weight in the sum; 0 for padding
    count_weights        its share of what the sum is divided by
    sampled              1 where the policy wrote it; 0 for a supervised token that stands beside
    rollout_log_probs    when it was written
    old_log_probs        optional; without, the policy itself, and every ratio is 1
    reference_log_probs  optional; without, there is no KL

A supervised token is one with advantage 1: at ratio 1 its gradient is that of cross-entropy.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from affectgpt_jax.models.affectgpt import AffectGPT, Batch, target_states, token_log_probs
from affectgpt_jax.models.decoder import lm_head
from affectgpt_jax.training.losses import LossFunction, Metrics

SCALES = ("group", "batch", "none")
AGGREGATIONS = ("tokens", "answers", "constant")
KL_ESTIMATORS = ("k2", "k3")
# Beside the standard deviation of a group, which may be 0; TRL's value.
EPSILON = 1e-4
# Groups whose rewards spread less teach nothing: they are as good as equal.
FLAT = 1e-6


@dataclasses.dataclass(frozen=True)
class PolicyLossConfig:
    """Settings of `policy_loss`; see the module's head.

    Attributes:
        epsilon, epsilon_high: how far a ratio may fall and rise before it is clipped.
        beta: weight of the KL to the reference.
        kl: estimator of it, one of `KL_ESTIMATORS`.
        weight_cap: of `w`.

    Raises:
        ValueError: a value out of its range.
    """

    epsilon: float = 0.2
    epsilon_high: float = 0.28
    beta: float = 0.0
    kl: str = "k2"
    weight_cap: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < 1 or not 0 < self.epsilon_high < float("inf"):
            raise ValueError(
                f"epsilon is {self.epsilon} and epsilon_high {self.epsilon_high}; expected a share "
                "in (0, 1) and a positive number"
            )
        if not 0 <= self.beta < float("inf"):
            raise ValueError(f"beta is {self.beta}; expected 0 or more")
        if self.kl not in KL_ESTIMATORS:
            raise ValueError(f"kl is {self.kl!r}; expected one of {KL_ESTIMATORS}")
        if not 1 <= self.weight_cap < float("inf"):
            raise ValueError(f"weight_cap is {self.weight_cap}; expected 1 or more")


def answer_log_probs(model: AffectGPT, base: Any, trainable: Any, batch: Batch) -> jax.Array:
    """Log-probabilities `[B, S]` float32 of the supervised tokens, without dropout; 0 for padding.

    They have a gradient by `trainable`.
    """
    states = target_states(model, base, trainable, batch)
    mask = batch["target_weights"] != 0
    compute = model.decoder.compute
    # As for cross-entropy: gathered once, before the loop over chunks.
    kernel = compute.shard(lm_head(base), (None, "vocab"))
    found = token_log_probs(states, kernel, batch["targets"], compute.loss_chunk_of_all, mask)
    return jnp.where(mask, found, 0)


def policy_loss(config: PolicyLossConfig) -> LossFunction:
    """The loss of `training.losses`, for batches as the module's head has them.

    Metrics are means over sampled tokens, to be divided by the first: `sampled`, their share of the
    count; `kl` to the reference by k3; `clipped`, ratios that had no gradient; `ratio`; `mismatch`,
    `|old - rollout|`; `capped`, weights over the cap.
    """

    def loss(
        model: AffectGPT, base: Any, trainable: Any, batch: Batch, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, Metrics]:
        log_probs = answer_log_probs(model, base, trainable, batch)
        return token_loss(config, log_probs, batch)

    return loss


def token_loss(
    config: PolicyLossConfig, log_probs: jax.Array, batch: Batch
) -> tuple[jax.Array, jax.Array, Metrics]:
    """`policy_loss` from the policy's log-probabilities `[B, S]`."""
    fixed = jax.lax.stop_gradient(log_probs)
    old = batch.get("old_log_probs", fixed)
    advantages, sampled = batch["advantages"], batch["sampled"]
    ratio = jnp.exp(log_probs - old)
    clipped = jnp.clip(ratio, 1 - config.epsilon, 1 + config.epsilon_high)
    gain = jnp.minimum(ratio * advantages, clipped * advantages)
    weight = jnp.exp(jnp.where(sampled > 0, old - batch["rollout_log_probs"], 0))
    per_token = -jnp.minimum(weight, config.weight_cap) * gain
    distance = jnp.zeros_like(log_probs)
    if "reference_log_probs" in batch:
        distance = batch["reference_log_probs"] - log_probs
        if config.beta:
            estimates = {
                "k2": distance**2 / 2,
                "k3": jnp.exp(distance) - distance - 1,
            }
            per_token += config.beta * sampled * estimates[config.kl]
    counts = batch["count_weights"]

    def total(values: jax.Array) -> jax.Array:
        return jnp.sum(counts * sampled * jax.lax.stop_gradient(values))

    metrics = {
        "sampled": total(jnp.ones_like(counts)),
        "kl": total(jnp.exp(distance) - distance - 1),
        "clipped": total((gain < ratio * advantages).astype(jnp.float32)),
        "ratio": total(ratio),
        "mismatch": total(jnp.abs(old - batch["rollout_log_probs"])),
        "capped": total((weight > config.weight_cap).astype(jnp.float32)),
    }
    return jnp.sum(batch["loss_weights"] * per_token), jnp.sum(counts), metrics


# --- on the host ----------------------------------------------------------------------------------


def group_advantages(rewards: np.ndarray, scale: str = "none") -> np.ndarray:
    """Advantages `[P, G]` float32 of the rewards of P groups.

    Args:
        rewards: `[P, G]`.
        scale: one of `SCALES`; standard deviations are those of a sample (by n - 1).
    """
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    if scale == "group":
        centred = centred / (rewards.std(axis=1, ddof=1, keepdims=True) + EPSILON)
    elif scale == "batch":
        centred = centred / (rewards.std(ddof=1) + EPSILON)
    return centred.astype(np.float32)


def flat_groups(rewards: np.ndarray) -> np.ndarray:
    """Which groups teach nothing, bool `[P]`, from rewards `[P, G]`."""
    return rewards.std(axis=1) < FLAT


def token_weights(length: int, aggregation: str, longest: int) -> tuple[float, float]:
    """`(loss_weights, count_weights)` of each token of an answer.

    Args:
        length: its tokens, 1 or more.
        aggregation: one of `AGGREGATIONS`.
        longest: tokens that an answer may have.
    """
    match aggregation:
        case "tokens":
            return 1.0, 1.0
        case "answers":
            return 1 / length, 1 / length
        case _:
            return 1 / longest, 1 / length
