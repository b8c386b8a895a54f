"""The Q-Former of BLIP-2 (arXiv 2301.12597) with the release's module names.

BERT's post-LayerNorm encoder over learned queries; every layer cross-attends to the encoder states,
and of BERT's two feed-forward branches only that of the queries is there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from affectgpt_jax.models.qformer import QFormerConfig


class SublayerOutput(nn.Module):
    """`LayerNorm(residual + dropout(dense(x)))`: what closes every sublayer of BERT."""

    def __init__(self, config: QFormerConfig, in_features: int):
        super().__init__()
        self.dense = nn.Linear(in_features, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(residual + self.dropout(self.dense(x)))


class Attention(nn.Module):
    """Multi-head attention from queries `[B, Q, width]` to states `[B, S, states_width]`."""

    def __init__(self, config: QFormerConfig, states_width: int):
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        widths = {"query": config.width, "key": states_width, "value": states_width}
        self.self = nn.ModuleDict({k: nn.Linear(n, config.width) for k, n in widths.items()})
        self.output = SublayerOutput(config, config.width)

    def forward(
        self, queries: torch.Tensor, states: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`mask` is bool, broadcast to `[B, heads, Q, S]`; False is not read."""
        query, key, value = (
            self.self[name](x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name, x in (("query", queries), ("key", states), ("value", states))
        )
        mixed = F.scaled_dot_product_attention(
            query, key, value, mask, dropout_p=self.dropout if self.training else 0.0
        )
        return self.output(mixed.transpose(1, 2).flatten(2), queries)


class Layer(nn.Module):
    """Self-attention, cross-attention, feed-forward."""

    def __init__(self, config: QFormerConfig, states_width: int):
        super().__init__()
        self.attention = Attention(config, config.width)
        self.crossattention = Attention(config, states_width)
        self.intermediate_query = nn.ModuleDict(
            {"dense": nn.Linear(config.width, config.intermediate)}
        )
        self.output_query = SublayerOutput(config, config.intermediate)

    def forward(
        self, queries: torch.Tensor, states: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        queries = self.attention(queries, queries)
        queries = self.crossattention(queries, states, mask)
        return self.output_query(F.gelu(self.intermediate_query["dense"](queries)), queries)


class QFormer(nn.Module):
    """Reads encoder states `[B, S, states_width]` into as many vectors as there are queries."""

    def __init__(self, config: QFormerConfig, states_width: int):
        super().__init__()
        layers = nn.ModuleList(Layer(config, states_width) for _ in range(config.layers))
        norm = nn.LayerNorm(config.width, config.norm_eps)
        self.bert = nn.ModuleDict(
            {
                "embeddings": nn.ModuleDict({"LayerNorm": norm}),
                "encoder": nn.ModuleDict({"layer": layers}),
            }
        )
        self.dropout = nn.Dropout(config.dropout)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(
        self, query_tokens: torch.Tensor, states: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """`[B, Q, width]`.

        Args:
            query_tokens: `[1, Q, width]`, a parameter of the caller, where the release keeps it.
            states: `[B, S, states_width]`, finite.
            mask: `[B, S]` bool, False where a state is not read. A sample without any True reads
                all, which keeps it finite: the caller discards it.
        """
        mask = (mask | ~mask.any(dim=1, keepdim=True))[:, None, None]
        queries = self.bert["embeddings"]["LayerNorm"](query_tokens)
        queries = self.dropout(queries.expand(len(states), -1, -1))
        for layer in self.bert["encoder"]["layer"]:
            queries = layer(queries, states, mask)
        return queries
