"""AdamW with the schedule and the decay mask of the published recipe, through optax."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import optax


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) with linear warm-up and cosine decay.

    The published recipe warms up 1e-6 -> 1e-5 over 5,000 steps and ends its cosine where it
    starts, so its rate stays constant: `final_learning_rate == learning_rate`.

    Attributes:
        learning_rate: after warm-up.
        warmup_learning_rate: at step 0.
        warmup_steps: 0 starts at `learning_rate`.
        final_learning_rate: at the last step.
        weight_decay, beta1, beta2, epsilon: AdamW's.
        clip_norm: bound on the global gradient norm; 0 is off, as in the recipe.

    Raises:
        ValueError: a negative value, or a beta outside [0, 1).
    """

    learning_rate: float = 1e-5
    warmup_learning_rate: float = 1e-6
    warmup_steps: int = 5000
    final_learning_rate: float = 1e-5
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    clip_norm: float = 0.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < float("inf"):  # refuses NaN too
                raise ValueError(f"optimizer.{field.name} is {value}; expected 0 or more")
            if field.name.startswith("beta") and value >= 1:
                raise ValueError(f"optimizer.{field.name} is {value}; expected less than 1")


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by number of updates done, over a run of `steps`."""
    warmup = optax.linear_schedule(
        config.warmup_learning_rate, config.learning_rate, config.warmup_steps
    )
    decay = optax.cosine_decay_schedule(
        config.learning_rate,
        max(steps - config.warmup_steps, 1),
        config.final_learning_rate / config.learning_rate if config.learning_rate else 0.0,
    )
    return optax.join_schedules([warmup, decay], [config.warmup_steps])


def decay_mask(trainable: Any) -> Any:
    """True for the tensors that weight decay moves: no vectors, no biases.

    The recipe exempts 1-D tensors and names that contain "bias", "ln" or "bn". In this tree each of
    them is a leaf called `bias` or `scale`, and none is stacked.
    """

    def decays(path, leaf) -> bool:
        return leaf.ndim > 1 and path[-1].key not in ("bias", "scale")

    return jax.tree_util.tree_map_with_path(decays, trainable)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of `steps` updates."""
    adamw = optax.adamw(
        learning_rate_schedule(config, steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    if not config.clip_norm:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
