"""The soft tokens: one head per modality and the pre-fusion, with the release's parameter names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from benchmarks.torch_reference.qformer import QFormer

if TYPE_CHECKING:
    from affectgpt_jax.models.fusers import FusionConfig

# Slot -> the head that serves it.
HEADS = {
    "multi": "multi",
    "multi_frame": "multi",
    "audio": "audio",
    "face": "video",
    "frame": "video",
    "image": "image",
}
# The release is not regular: names of the projection and the position embedding of each head.
PROJECTIONS = {
    "multi": "multi_llama_proj",
    "audio": "audio_llama_proj",
    "video": "affectgpt_proj",
    "image": "image_llama_proj",
}
POSITIONS = {
    "multi": "multi_position_embedding",
    "audio": "audio_position_embedding",
    "video": "video_frame_position_embedding",
    "image": "image_position_embedding",
}
NUM_POSITIONS = {"multi": 264, "audio": 8, "video": 32, "image": 257}
NUM_QUERIES = {"multi": 16, "audio": 8, "video": 32, "image": 32}


def keep_present(x: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """`x` `[B, ...]` with zeros where `present` `[B]` is False, whatever stood there."""
    return torch.where(present.view(-1, *[1] * (x.ndim - 1)), x, 0)


class Fusers(nn.Module):
    """Features to soft tokens; holds only the parameters that the slots of `fusion` use.

    Everything is float32: the parameters are few, and the features float16.
    """

    def __init__(self, fusion: FusionConfig | None, llm_width: int):
        super().__init__()
        self.fusion = fusion
        kinds = {HEADS[slot]: fusion.kind(slot) for slot in fusion.slots} if fusion else {}
        for head, kind in kinds.items():
            width = fusion.width if head == "multi" else fusion.widths[head]
            if head == "multi":
                self.multi_video_embs = nn.Linear(fusion.widths["video"], width)
                self.multi_audio_embs = nn.Linear(fusion.widths["audio"], width)
            if kind == "qformer":
                queries = torch.empty(1, NUM_QUERIES[head], fusion.qformer.width).normal_(std=0.02)
                setattr(self, f"{head}_query_tokens", nn.Parameter(queries))
                setattr(self, POSITIONS[head], nn.Embedding(NUM_POSITIONS[head], width))
                setattr(self, f"{head}_Qformer", QFormer(fusion.qformer, width))
                width = fusion.qformer.width
            elif head == "multi":
                self.attention_mlp = nn.Linear(2 * width, width)
                self.fc_att = nn.Linear(width, 2)
            elif kind == "attention":
                setattr(self, f"{head}_attention_mlp", nn.Linear(width, 1))
            setattr(self, PROJECTIONS[head], nn.Linear(width, llm_width))

    def soft_tokens(
        self, features: Mapping[str, torch.Tensor], present: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """`[B, K, llm_width]`, slot after slot; zeros for the slots of an absent modality.

        Args:
            features: name -> `[B, F, d]`.
            present: name -> `[B]` bool.
        """
        states = {
            name: keep_present(features[name].float(), present[name]) for name in self.fusion.inputs
        }
        tokens = []
        for slot in self.fusion.slots:
            if HEADS[slot] == "multi":
                video = {"multi": "face", "multi_frame": "frame"}[slot]
                pair = (present[video], present["audio"])
                fused = self.pre_fuse(states[video], states["audio"], *pair)
                tokens.append(keep_present(fused, pair[0] | pair[1]))
            else:
                mask = present[slot][:, None].expand(states[slot].shape[:2])
                pooled = self.pool(HEADS[slot], self.fusion.kind(slot), states[slot], mask)
                tokens.append(keep_present(self.project(HEADS[slot], pooled), present[slot]))
        return torch.cat(tokens, dim=1)

    def pre_fuse(
        self,
        video: torch.Tensor,
        audio: torch.Tensor,
        video_present: torch.Tensor,
        audio_present: torch.Tensor,
    ) -> torch.Tensor:
        """Video `[B, Tv, dv]` and audio `[B, Ta, da]` to `[B, 1 or 16, llm_width]`."""
        if self.fusion.kinds["multi"] == "qformer":
            states = torch.cat([self.multi_video_embs(video), self.multi_audio_embs(audio)], dim=1)
            mask = torch.cat(
                [
                    video_present[:, None].expand(video.shape[:2]),
                    audio_present[:, None].expand(audio.shape[:2]),
                ],
                dim=1,
            )
            return self.project("multi", self.pool("multi", "qformer", states, mask))
        video = keep_present(self.multi_video_embs(video.mean(dim=1)), video_present)
        audio = keep_present(self.multi_audio_embs(audio.mean(dim=1)), audio_present)
        weights = self.fc_att(self.attention_mlp(torch.cat([video, audio], dim=-1)))
        fused = torch.einsum("bm,bmd->bd", weights, torch.stack([video, audio], dim=1))
        return self.project("multi", fused[:, None])

    def pool(self, head: str, kind: str, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """States `[B, T, d]` to what is projected, `[B, 1, d]` or `[B, queries, qformer width]`."""
        if kind == "mean":
            return states.mean(dim=1, keepdim=True)
        if kind == "attention":  # neither a softmax nor a division by T
            scores = getattr(self, f"{head}_attention_mlp")(states)
            return torch.einsum("btx,btd->bxd", scores, states)
        positions = getattr(self, POSITIONS[head]).weight[: states.shape[1]]
        queries = getattr(self, f"{head}_query_tokens")
        return getattr(self, f"{head}_Qformer")(queries, states + positions, mask)

    def project(self, head: str, pooled: torch.Tensor) -> torch.Tensor:
        """To the language model's width."""
        return getattr(self, PROJECTIONS[head])(pooled)
