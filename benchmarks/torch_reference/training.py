"""The published recipe: AdamW in two parameter groups, warm-up and cosine, one update."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from benchmarks.torch_reference.model import AffectGPT

if TYPE_CHECKING:
    from affectgpt_jax.training.optimizer import OptimizerConfig


def make_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig
) -> torch.optim.AdamW:
    """AdamW over what requires a gradient; `train_step` sets the learning rate.

    Weight decay spares vectors and every name that holds "bias", "ln" or "bn".
    """
    decayed, spared = [], []
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            spare = parameter.ndim < 2 or any(part in name for part in ("bias", "ln", "bn"))
            (spared if spare else decayed).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": spared, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate after `step` updates of a run of `steps`."""
    first, peak, last = (
        config.warmup_learning_rate,
        config.learning_rate,
        config.final_learning_rate,
    )
    if step < config.warmup_steps:
        return first + (peak - first) * step / config.warmup_steps
    share = min((step - config.warmup_steps) / max(steps - config.warmup_steps, 1), 1.0)
    return last + (peak - last) * (1 + math.cos(math.pi * share)) / 2


def train_step(
    model: AffectGPT,
    optimizer: torch.optim.Optimizer,
    microbatches: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    learning_rate: float,
    clip_norm: float = 0.0,
) -> torch.Tensor:
    """One update; returns the loss before it, the mean over the supervised tokens of the batch.

    Args:
        model: in the mode that decides on dropout.
        optimizer: of `make_optimizer`.
        microbatches: tensors on the model's device: a batch, or its microbatches, which run one
            after the other.
        learning_rate: of this update.
        clip_norm: bound on the global gradient norm; 0 is off.
    """
    if isinstance(microbatches, Mapping):
        microbatches = [microbatches]
    count = sum(batch["target_weights"].sum() for batch in microbatches).clamp(min=1)
    optimizer.zero_grad(set_to_none=True)
    total = 0
    for batch in microbatches:
        loss, _ = model.loss_sum_and_count(batch)
        loss = loss / count
        loss.backward()
        total = total + loss.detach()
    apply_gradients(optimizer, learning_rate, clip_norm)
    return total


def apply_gradients(
    optimizer: torch.optim.Optimizer, learning_rate: float, clip_norm: float = 0.0
) -> None:
    """Clip the gradients to a global norm, 0 for none, and update at this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    if clip_norm:
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(trained, clip_norm)
    optimizer.step()
