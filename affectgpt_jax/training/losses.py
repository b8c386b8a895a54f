"""Losses that the train step can be given.

A loss is a function `(model, base, trainable, batch, key) -> (sum, count, metrics)`:

    model      the modules, `models.affectgpt.AffectGPT`
    base       the frozen weights
    trainable  {"lora", "fusion"}, by which it is differentiated
    batch      a dict of arrays; supervised losses read the layout of `models.affectgpt`
    key        of dropout and of what else it draws; None is evaluation, without dropout
    sum        float32 scalar, summed over whatever `count` counts
    count      float32 scalar, by which the train step divides once, over the whole batch
    metrics    name -> float32 scalar, summed in the same way and divided by the same count

The sum is unreduced, so that gradient accumulation and data parallelism give the mean over the
whole batch, not a mean of means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from affectgpt_jax.models.affectgpt import AffectGPT, Batch, loss_sum_and_count

Metrics = Mapping[str, jax.Array]
LossFunction = Callable[
    [AffectGPT, Any, Any, Batch, jax.Array | None], tuple[jax.Array, jax.Array, Metrics]
]


def cross_entropy(
    model: AffectGPT, base: Any, trainable: Any, batch: Batch, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, Metrics]:
    """Next-token cross-entropy of the supervised tokens; `count` is their number."""
    total, count = loss_sum_and_count(model, base, trainable, batch, key)
    return total, count, {}
