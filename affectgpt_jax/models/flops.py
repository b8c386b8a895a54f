"""Floating-point operations of the matmuls of an update.

Model FLOPs, as the field counts them for MFU (PaLM, arXiv 2204.02311, appendix B): a product of
`[n, in]` with `[in, out]` is 2 n in out, and what is computed again in the backward pass
(rematerialisation, logits in chunks) is not counted. For every token, a weight costs

    2 forward
    2 for the gradient of what it was applied to, since trained parameters lie below it
    2 for its own gradient, if it is trained

so 4 for a frozen weight and 6 for an adapter's. Attention has two products a pair of positions and
head, and twice those again in the backward pass. Left out are the modality heads, which see a few
vectors a sample (under a thousandth of a 7B model's update), and all that is no matrix product.

Only the tokens of samples count. Padding at the end of a row or for targets is computed by the
device and is of no use, so that it lowers the MFU; and in a packed row a token is paired with those
of its own sample alone, whatever the attention kernel computes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from affectgpt_jax.models.decoder import DecoderConfig
from affectgpt_jax.models.lora import LoraConfig


class Flops(NamedTuple):
    """FLOPs by kind of matmul."""

    frozen: int
    adapters: int
    attention: int
    lm_head: int

    @property
    def total(self) -> int:
        return sum(self)


def projection_shapes(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """`(in, out)` of the seven projections of a layer, by name."""
    c = config
    query, key = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    return {
        "q_proj": (c.hidden_size, query),
        "k_proj": (c.hidden_size, key),
        "v_proj": (c.hidden_size, key),
        "o_proj": (query, c.hidden_size),
        "gate_proj": (c.hidden_size, c.intermediate_size),
        "up_proj": (c.hidden_size, c.intermediate_size),
        "down_proj": (c.intermediate_size, c.hidden_size),
    }


def train_flops(
    config: DecoderConfig,
    lora: LoraConfig | None,
    length: int | np.ndarray,
    targets: int | np.ndarray | None = None,
    *,
    causal: bool = True,
) -> Flops:
    """FLOPs of a forward and backward pass over one sequence; divide by `length` for a token's.

    Args:
        config: shape of the frozen decoder.
        lora: its adapters, or None.
        length: tokens of the sequence. Of a packed row, add up its samples: attention is not
            linear in the length. An array of int64 gives arrays of FLOPs.
        targets: positions that are projected onto the vocabulary; None is all of them.
        causal: count the `length * (length + 1) / 2` pairs of positions that a causal mask leaves,
            as a flash kernel computes them; False counts all `length**2`, as plain XLA does.

    Qwen2.5-7B with adapters of rank 16 takes 31.0 GFLOP a token at a length of 4,096.
    """
    c = config
    shapes = projection_shapes(c)
    adapted = [shapes[name] for name in lora.targets] if lora else []
    rank = lora.rank if lora else 0
    pairs = length * (length + 1) // 2 if causal else length**2
    query = c.num_attention_heads * c.head_dim
    return Flops(
        frozen=4 * length * c.num_hidden_layers * sum(i * o for i, o in shapes.values()),
        adapters=6 * length * c.num_hidden_layers * rank * sum(i + o for i, o in adapted),
        attention=3 * 2 * 2 * pairs * c.num_hidden_layers * query,
        lm_head=4 * (length if targets is None else targets) * c.hidden_size * c.vocab_size,
    )


def forward_flops(flops: Flops) -> Flops:
    """Those of the forward pass alone, from those of both."""
    return Flops(flops.frozen // 2, flops.adapters // 3, flops.attention // 3, flops.lm_head // 2)


def update_flops(config: DecoderConfig, lora: LoraConfig | None, samples: Any) -> Flops:
    """FLOPs of an update on samples, however they share rows.

    Args:
        config, lora: as for `train_flops`.
        samples: `[N, 2]` integers, the tokens of every sample and how many of them are supervised.
    """
    lengths, targets = np.asarray(samples, np.int64).reshape(-1, 2).T
    parts = train_flops(config, lora, lengths, targets)
    return Flops(*(int(np.sum(part)) for part in parts))
