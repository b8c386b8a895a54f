"""Direct preference optimisation (DPO, Rafailov et al. 2023, arXiv 2305.18290).

Of two answers to a prompt, one is preferred. With sums over the tokens of each,

    margin = beta ((logp_better - reference_better) - (logp_worse - reference_worse))
    loss   = -(1 - s) log sigmoid(margin) - s log sigmoid(-margin) - w logp_better / tokens_better

where s, the label smoothing, is the share of preferences that are taken to be wrong. The last term
keeps the preferred answer probable: by the margin alone both may fall without end, as long as the
other falls faster (Pang et al. 2024, arXiv 2404.19733, with w = 1; Llama 3, arXiv 2407.21783, with
w = 0.2).

A row of a batch holds one pair, whose answers share the prompt (`attention.grouped`), and `[B, S]`
float32:

    signs                1 for the tokens of the preferred answer, -1 for those of the other
    reference_log_probs  of both under the model that training starts from
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from affectgpt_jax.models.affectgpt import AffectGPT, Batch
from affectgpt_jax.training.losses import LossFunction, Metrics
from affectgpt_jax.training.policy import answer_log_probs


@dataclasses.dataclass(frozen=True)
class PreferenceLossConfig:
    """Settings of `preference_loss`; see the module's head.

    Raises:
        ValueError: a value out of its range.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    nll_weight: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.beta < float("inf"):
            raise ValueError(f"beta is {self.beta}; expected over 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"label_smoothing is {self.label_smoothing}; expected a share in [0, 0.5)"
            )
        if not 0 <= self.nll_weight < float("inf"):
            raise ValueError(f"nll_weight is {self.nll_weight}; expected 0 or more")


def preference_loss(config: PreferenceLossConfig) -> LossFunction:
    """The loss of `training.losses`; `count` is the number of pairs.

    Metrics: `accuracy`, the share of pairs whose margin is positive (the implicit reward prefers
    what the annotators do); `margin`; and `better` and `worse`, the implicit rewards themselves,
    beta times the gain in log-probability.
    """

    def loss(
        model: AffectGPT, base: Any, trainable: Any, batch: Batch, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, Metrics]:
        return pair_loss(config, answer_log_probs(model, base, trainable, batch), batch)

    return loss


def pair_loss(
    config: PreferenceLossConfig, log_probs: jax.Array, batch: Batch
) -> tuple[jax.Array, jax.Array, Metrics]:
    """`preference_loss` from the model's log-probabilities `[B, S]`."""
    signs = batch["signs"]
    gains = config.beta * (log_probs - batch["reference_log_probs"])
    better = jnp.sum(jnp.where(signs > 0, gains, 0), axis=1)
    worse = jnp.sum(jnp.where(signs < 0, gains, 0), axis=1)
    margin = better - worse
    smoothing = config.label_smoothing
    each = -(1 - smoothing) * jax.nn.log_sigmoid(margin) - smoothing * jax.nn.log_sigmoid(-margin)
    tokens = jnp.maximum(jnp.sum(signs > 0, axis=1), 1)
    each -= config.nll_weight * jnp.sum(jnp.where(signs > 0, log_probs, 0), axis=1) / tokens
    pairs = (signs != 0).any(axis=1).astype(jnp.float32)

    def total(values: jax.Array) -> jax.Array:
        return jnp.sum(pairs * jax.lax.stop_gradient(values))

    metrics = {
        "accuracy": total((margin > 0).astype(jnp.float32)),
        "margin": total(margin),
        "better": total(better),
        "worse": total(worse),
    }
    return jnp.sum(pairs * each), jnp.sum(pairs), metrics
