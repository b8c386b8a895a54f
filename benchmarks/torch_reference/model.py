"""AffectGPT: a decoder of `transformers` with LoRA of `peft`, fed with soft tokens.

Batches are those of `affectgpt_jax.models.affectgpt`, whose docstring gives their layout.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import peft
import torch
import torch.nn.functional as F
import transformers
from peft.tuners.lora import LoraLayer

from affectgpt_jax.weights.hf_config import to_hf
from benchmarks.torch_reference.fusers import Fusers
from benchmarks.torch_reference.kernels import VARLEN, ChunkedCrossEntropy, Segments
from benchmarks.torch_reference.weights import move_base

if TYPE_CHECKING:
    from affectgpt_jax.models.decoder import DecoderConfig
    from affectgpt_jax.models.fusers import FusionConfig
    from affectgpt_jax.models.lora import LoraConfig

IGNORED = -100  # the label that `F.cross_entropy` leaves out


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How the model runs, as opposed to what it computes.

    Attributes:
        attention: of the decoder, by transformers' name; None is its own choice.
        mask: "padding" hides padding from every query, through a mask `[B, 1, T, T]`; "causal"
            passes none, which is the same for rows that are padded on the right, since no real
            token looks that way, and admits the fastest kernels; "segments" says where the samples
            that share a row lie, for the attention "varlen".
        all_logits: project every position onto the vocabulary at once, instead of the supervised
            ones in chunks.
        cast_adapter_inputs: PEFT's float32 copy of the input of every adapter, which autocast
            converts back.
        compile: compile each decoder layer with `torch.compile`, on a GPU. (On two CPU cores
            compiled layers of 512 wide took 1.1 to 1.2 times as long.)
    """

    attention: str | None
    mask: Literal["padding", "causal", "segments"]
    all_logits: bool
    cast_adapter_inputs: bool
    compile: bool


TUNINGS = {
    # As the release trains: whatever the libraries do by default.
    "release": Tuning(None, "padding", all_logits=True, cast_adapter_inputs=True, compile=False),
    "tuned": Tuning("sdpa", "causal", all_logits=False, cast_adapter_inputs=False, compile=True),
    "packed": Tuning(VARLEN, "segments", all_logits=False, cast_adapter_inputs=False, compile=True),
}


class AffectGPT(Fusers):
    """The model; its language model is called `llama_model` whatever it is, as in the release.

    The decoder is frozen. Where its weights are not float32, it computes in their dtype under
    autocast; adapters and fusers are float32 always.
    """

    def __init__(
        self,
        llama_model: peft.PeftModel | transformers.PreTrainedModel,
        fusion: FusionConfig | None,
        tuning: Tuning = TUNINGS["tuned"],
    ):
        super().__init__(fusion, llama_model.config.hidden_size)
        self.llama_model, self.tuning = llama_model, tuning
        for module in llama_model.modules():
            if isinstance(module, LoraLayer):
                module.cast_input_dtype_enabled = tuning.cast_adapter_inputs

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        fusion: FusionConfig | None,
        lora: LoraConfig | None,
        *,
        dtype: torch.dtype = torch.float32,
        tuning: Tuning = TUNINGS["tuned"],
    ) -> AffectGPT:
        """The language model of a local directory, with fresh adapters and fusers.

        Args:
            directory: in Hugging Face layout.
            fusion: soft tokens and their heads; None for text only.
            lora: the adapters; None for none.
            dtype: of the frozen weights, and of the decoder's computation.
            tuning: how it runs.
        """
        llama_model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, attn_implementation=tuning.attention
        ).requires_grad_(False)
        return cls(with_adapters(llama_model, lora), fusion, tuning)

    @classmethod
    def from_base(
        cls,
        llm: DecoderConfig,
        base: Mapping[str, Any],
        fusion: FusionConfig | None,
        lora: LoraConfig | None,
        *,
        dtype: torch.dtype,
        tuning: Tuning,
        device: torch.device | str,
    ) -> AffectGPT:
        """The same on the frozen parameters that the JAX side holds, copied on the device.

        Args:
            llm: shape of the decoder.
            base: its parameters, a tree of JAX arrays, which is emptied as they are copied.
            fusion, lora, dtype, tuning: as for `from_pretrained`.
            device: where `base` is.
        """
        fields = to_hf(llm, str(dtype).removeprefix("torch."))
        config = transformers.AutoConfig.for_model(**fields)
        with torch.device(device):
            llama_model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=tuning.attention
            ).requires_grad_(False)
        move_base(llama_model, base)
        model = cls(with_adapters(llama_model, lora), fusion, tuning).to(device)
        if tuning.compile and model.causal_lm.device.type == "cuda":
            for layer in model.causal_lm.model.layers:
                layer.compile(dynamic=False)  # a batch has one of a few lengths
        return model

    @property
    def causal_lm(self) -> transformers.PreTrainedModel:
        """The language model without PEFT's wrappers, adapters included."""
        wrapped = isinstance(self.llama_model, peft.PeftModel)
        return self.llama_model.get_base_model() if wrapped else self.llama_model

    def autocast(self) -> contextlib.AbstractContextManager:
        """What the decoder runs under."""
        dtype, device = self.causal_lm.dtype, self.causal_lm.device.type
        return torch.autocast(device, dtype, enabled=dtype != torch.float32)

    def embed_inputs(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Token embeddings `[B, T, D]` with the soft tokens in their places."""
        table = self.causal_lm.get_input_embeddings()
        # Placeholders may lie beyond the table; what is looked up for them is replaced.
        embeds = table(batch["tokens"].clamp(max=table.num_embeddings - 1))
        if self.fusion is None:
            return embeds
        features, present = (
            {name: x.flatten(0, 1) for name, x in batch[part].items()}
            for part in ("features", "present")
        )
        soft = self.soft_tokens(features, present).to(embeds.dtype)
        soft = soft.reshape(len(embeds), -1, soft.shape[-1])
        index = batch["soft_token_index"][..., None]
        placed = soft.gather(1, (index - 1).clamp(min=0).expand_as(embeds))
        return torch.where(index > 0, placed, embeds)

    def hidden_states(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Final hidden states `[B, T, D]`."""
        embeds = self.embed_inputs(batch)
        with self.autocast():
            return self.causal_lm.model(
                inputs_embeds=embeds,
                attention_mask=self._attention_mask(batch["segment_ids"]),
                position_ids=batch["positions"],
                use_cache=False,
                segments=batch.get("segments"),  # what attention does not know, it leaves
            ).last_hidden_state

    def _attention_mask(self, segment_ids: torch.Tensor) -> Any:
        if self.tuning.mask == "padding":
            return segment_ids > 0
        # Models with several types of layers, Qwen's among them, take a mapping as it is. For a
        # plain None, transformers looks through the positions for packed rows, and waits for them.
        typed = getattr(self.causal_lm.config, "layer_types", None)
        return {"full_attention": None} if typed else None

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Float32 logits `[..., V]` of hidden states `[..., D]`."""
        with self.autocast():
            return self.causal_lm.lm_head(states).float()

    def supervised_logits(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """`[B, S, V]` float32 at the target positions."""
        return self.logits(self._target_states(batch))

    def _target_states(self, batch: Mapping[str, Any]) -> torch.Tensor:
        states = self.hidden_states(batch)
        return states.gather(
            1, batch["target_positions"][..., None].expand(-1, -1, states.shape[-1])
        )

    def token_losses(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Cross-entropy by position, float32 `[N]`, in the order of the rows; 0 where nothing is
        supervised. N is all positions or all targets of the batch."""
        if self.tuning.all_logits:
            logits, labels = self.logits(self.hidden_states(batch)), next_tokens(batch)
            return F.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
            )
        states, lm_head = self._target_states(batch), self.causal_lm.lm_head.weight
        losses = ChunkedCrossEntropy.apply(
            states.flatten(0, 1).to(lm_head.dtype), lm_head, batch["targets"].flatten()
        )
        return losses * batch["target_weights"].flatten()

    def loss_sum_and_count(self, batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed cross-entropy of the supervised tokens, and their number, float32 scalars."""
        return self.token_losses(batch).sum(), batch["target_weights"].sum()


def with_adapters(
    llama_model: transformers.PreTrainedModel, lora: LoraConfig | None
) -> peft.PeftModel | transformers.PreTrainedModel:
    """The decoder with fresh adapters of PEFT, or as it is."""
    if lora is None:
        return llama_model
    adapters = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
    )
    return peft.get_peft_model(llama_model, adapters)


def next_tokens(batch: Mapping[str, Any]) -> torch.Tensor:
    """The supervised token that each position predicts, `[B, T]`, `IGNORED` elsewhere."""
    rows, length = batch["tokens"].shape
    # Filler targets go to a column that is cut off.
    at = batch["target_positions"].where(batch["target_weights"] > 0, length)
    labels = at.new_full((rows, length + 1), IGNORED)
    return labels.scatter_(1, at, batch["targets"])[:, :length]


def to_device(batch: Mapping[str, Any], tuning: Tuning, device: torch.device | str) -> dict:
    """A NumPy batch as tensors.

    Raises:
        ValueError: samples share a row, which only the mask "segments" keeps apart.
    """
    if batch["segment_ids"].max(initial=0) > 1 and tuning.mask != "segments":
        raise ValueError(
            f"rows hold up to {batch['segment_ids'].max()} samples, between which the mask "
            f"{tuning.mask!r} lets attention leak; use the tuning 'packed'"
        )

    def convert(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: convert(part) for name, part in value.items()}
        tensor = torch.from_numpy(np.ascontiguousarray(value))
        tensor = tensor.long() if tensor.dtype == torch.int32 else tensor
        # Only from pinned memory does a copy run beside the device's work.
        tensor = tensor.pin_memory() if torch.device(device).type == "cuda" else tensor
        return tensor.to(device, non_blocking=True)

    tensors = {name: convert(value) for name, value in batch.items()}
    if tuning.mask == "segments":
        tensors["segments"] = Segments.of(torch.tensor(batch["segment_ids"]), device)
    return tensors
