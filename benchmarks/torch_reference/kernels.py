"""What a well-tuned PyTorch run has beyond the libraries' defaults: attention over rows of several
samples without a mask, and a cross-entropy that never holds all logits."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
import transformers

try:  # PyTorch 2.10 and later
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None

# Positions whose logits are alive at once, as on the other side (`models.affectgpt.LOSS_CHUNK`).
LOSS_CHUNK = 1024
VARLEN = "varlen"  # the name under which transformers finds `varlen_attention`


@dataclasses.dataclass(frozen=True)
class Segments:
    """Where the samples of a batch lie when its rows are put one behind the other.

    Padding counts as samples, so that every position belongs to one.

    Attributes:
        ends: position after each sample's last.
        offsets: 0 and `ends`, int32 on the device.
        longest: tokens of the longest one.
    """

    ends: list[int]
    offsets: torch.Tensor
    longest: int

    @classmethod
    def of(cls, segment_ids: torch.Tensor, device: torch.device | str) -> Segments:
        """Of `segment_ids` `[B, T]` in host memory."""
        length = segment_ids.shape[1]
        flat = segment_ids.flatten()
        changes = flat[1:] != flat[:-1]
        changes[length - 1 :: length] = True  # a sample ends with its row
        ends = [*(changes.nonzero().flatten() + 1).tolist(), len(flat)]
        offsets = torch.tensor([0, *ends], dtype=torch.int32)
        longest = int(offsets.diff().max())
        return cls(ends, offsets.to(device, non_blocking=True), longest)


@torch.compiler.disable  # a loop over samples would be compiled for every set of lengths
def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    *,
    segments: Segments,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within samples, in the form in which transformers calls attention.

    PyTorch's own flash kernel for variable lengths on a GPU that has it; elsewhere sample by
    sample, so that scores between two samples are not computed there either.

    Args:
        module: not read.
        query: `[B, H, T, d]`.
        key, value: `[B, K, T, d]`.
        attention_mask: not read.
        scaling: of the scores.
        segments: where samples lie.

    Returns:
        `[B, T, H, d]`.
    """
    batch, heads, length, width = query.shape
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]  # [B*T, heads, d]
    if query.is_cuda and varlen_attn is not None:
        offsets, longest = segments.offsets, segments.longest
        mixed = varlen_attn(
            *rows,
            offsets,
            offsets,
            longest,
            longest,
            scale=scaling,
            window_size=(-1, 0),  # causal
            enable_gqa=True,
        )
        return mixed.view(batch, length, heads, width), None
    parts, start = [], 0
    for end in segments.ends:
        q, k, v = (x[start:end].transpose(0, 1)[None] for x in rows)
        mixed = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=True
        )
        parts.append(mixed[0].transpose(0, 1))
        start = end
    return torch.cat(parts).view(batch, length, heads, width), None


transformers.AttentionInterface.register(VARLEN, varlen_attention)


class ChunkedCrossEntropy(torch.autograd.Function):
    """`-log softmax(states @ lm_head^T)[label]` by position, the logits of a chunk at a time.

    The lm_head is frozen, so all that the backward pass needs is the gradient by the states,
    which is made while the logits are there: two matmuls instead of three.
    """

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, lm_head: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """Float32 `[N]` of states `[N, D]`, lm_head `[V, D]` and labels `[N]`."""
        losses = states.new_empty(len(states), dtype=torch.float32)
        slopes = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        for start in range(0, len(states), LOSS_CHUNK):
            here = slice(start, start + LOSS_CHUNK)
            logits = F.linear(states[here], lm_head).float()
            losses[here] = F.cross_entropy(logits, labels[here], reduction="none")
            if slopes is not None:
                slope = logits.softmax(dim=-1)
                slope.scatter_add_(
                    1, labels[here, None], torch.full_like(slope[:, :1], -1, dtype=slope.dtype)
                )
                slopes[here] = slope.to(states.dtype) @ lm_head
        ctx.save_for_backward(slopes)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (slopes,) = ctx.saved_tensors
        return slopes * grad[:, None].to(slopes.dtype), None, None
