"""The train state and the functions that are compiled: one update, one evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from affectgpt_jax.models.affectgpt import AffectGPT, Batch, init_trainable
from affectgpt_jax.training.losses import LossFunction

# {"trainable": {"lora", "fusion"}, "opt_state", "step": int32}. The base is not part of it.
State = dict[str, Any]


def init_key(seed: int) -> jax.Array:
    """The key that a run's parameters start from; `dropout_key` is independent of it."""
    return jax.random.split(jax.random.key(seed))[0]


def dropout_key(seed: int) -> jax.Array:
    """The key that the dropout of every step is derived from."""
    return jax.random.split(jax.random.key(seed))[1]


def init_state(model: AffectGPT, optimizer: optax.GradientTransformation, key: jax.Array) -> State:
    """Fresh adapters, fusion and optimizer state at step 0."""
    trainable = init_trainable(model, key)
    return {
        "trainable": trainable,
        "opt_state": optimizer.init(trainable),
        "step": jnp.zeros((), jnp.int32),
    }


def make_train_step(
    model: AffectGPT,
    loss: LossFunction,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    seed: int,
    gradient_accumulation_steps: int = 1,
) -> Callable[[State, Any, Batch], tuple[State, dict[str, jax.Array]]]:
    """The function of one update: `(state, base, batch) -> (state, metrics)`.

    Args:
        model: the modules.
        loss: what is minimised, see `training.losses`.
        optimizer: applied to `trainable` only.
        schedule: learning rate, for the metrics.
        seed: of dropout; the mask follows from (seed, step), so a resumed run draws the same.
        gradient_accumulation_steps: microbatches that a batch runs in, one after the other. The
            gradient is that of the whole batch's mean.

    Metrics (float32 scalars): loss, grad_norm, learning_rate, supervised_tokens (the count of the
    loss), and those of the loss itself.
    """
    microbatches = gradient_accumulation_steps

    def train_step(state: State, base: Any, batch: Batch):
        key = jax.random.fold_in(dropout_key(seed), state["step"])

        def objective(trainable, microbatch, microbatch_key):
            total, count, metrics = loss(model, base, trainable, microbatch, microbatch_key)
            return total, (count, metrics)

        gradient = jax.value_and_grad(objective, has_aux=True)
        if microbatches == 1:
            (total, (count, sums)), grads = gradient(state["trainable"], batch, key)
        else:
            # Row i of microbatch m is row i * microbatches + m of the batch: strided, so that every
            # device holds rows of every microbatch and none has to move.
            parts = jax.tree.map(
                lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch
            )

            def add(carry, inputs):
                return jax.tree.map(jnp.add, carry, gradient(state["trainable"], *inputs)), None

            keys = jax.random.split(key, microbatches)
            first = jax.tree.map(lambda x: x[0], (parts, keys))
            shapes = jax.eval_shape(gradient, state["trainable"], *first)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            ((total, (count, sums)), grads), _ = jax.lax.scan(add, zeros, (parts, keys))
        with jax.named_scope("optimizer"):
            count_or_one = jnp.maximum(count, 1)
            grads = jax.tree.map(lambda g: g / count_or_one, grads)
            updates, opt_state = optimizer.update(grads, state["opt_state"], state["trainable"])
            metrics = {
                "loss": total / count_or_one,
                "grad_norm": optax.tree.norm(grads),
                "learning_rate": jnp.asarray(schedule(state["step"]), jnp.float32),
                "supervised_tokens": count,
                **jax.tree.map(lambda x: x / count_or_one, sums),
            }
            state = {
                "trainable": optax.apply_updates(state["trainable"], updates),
                "opt_state": opt_state,
                "step": state["step"] + 1,
            }
        return state, metrics

    return train_step


def make_eval_step(
    model: AffectGPT, loss: LossFunction
) -> Callable[[Any, Any, Batch], tuple[jax.Array, jax.Array]]:
    """`(trainable, base, batch) -> (sum of the loss, its count)`, without dropout."""

    def eval_step(trainable: Any, base: Any, batch: Batch):
        total, count, _ = loss(model, base, trainable, batch, None)
        return total, count

    return eval_step


def nonfinite_leaves(state: State) -> list[str]:
    """Paths of the state's arrays that hold a NaN or infinite value."""
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(state))
    finite = jax.device_get(_each_finite(leaves))
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, good in zip(paths, finite, strict=True)
        if not good
    ]


@jax.jit
def _each_finite(leaves: tuple[jax.Array, ...]) -> list[jax.Array]:
    return [jnp.isfinite(leaf).all() for leaf in leaves]
