"""From encoder features to the soft tokens of the prompt: one head per modality and the pre-fusion.

A head turns the features of one modality into tokens of the language model's width. The pre-fusion
does so for video and audio together, before the language model sees either (AffectGPT,
arXiv 2501.16566, Eq. 3-7).

A sample may lack a modality: its soft tokens are then exactly zero, and neither values nor
gradients depend on what stands in the feature array at that place.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jax import Array

from affectgpt_jax.data.modalities import HEADS, MODALITIES, Head
from affectgpt_jax.models.qformer import QFormer, QFormerConfig


@dataclasses.dataclass(frozen=True)
class FusionConfig:
    """Which soft tokens an input mode has, and how they are computed.

    Attributes:
      slots: the soft-token slots of the input mode, in prompt order; names of `MODALITIES`.
      kinds: by head (a name of `modalities.HEADS`), how its tokens are computed; a head that is
        left out has its default.
      widths: by head, the width of the features that it reads, with defaults likewise.
      width: the width to which the pre-fusion projects both of its features.
      qformer: sizes of every Q-Former.

    Raises ValueError for an unknown or repeated slot, and for an unknown head or kind.
    """

    slots: tuple[str, ...]
    kinds: Mapping[str, str] = FrozenDict()
    widths: Mapping[str, int] = FrozenDict()
    width: int = 1024
    qformer: QFormerConfig = QFormerConfig()

    def __post_init__(self) -> None:
        """Fills in the defaults; rejects slots, heads and kinds that do not exist."""
        unknown = [slot for slot in self.slots if slot not in MODALITIES]
        if unknown:
            raise ValueError(f"Unknown slots {unknown}: choose from {', '.join(MODALITIES)}.")
        if len(set(self.slots)) < len(self.slots):
            raise ValueError(f"A slot stands twice in {self.slots}: name each at most once.")
        for field in ("kinds", "widths"):
            given = dict(getattr(self, field))
            if unknown := [name for name in given if name not in HEADS]:
                raise ValueError(f"Unknown heads {unknown} in {field}: choose from {list(HEADS)}.")
            defaults = {
                head.name: head.kinds[0] if field == "kinds" else head.feature_width
                for head in HEADS.values()
            }
            object.__setattr__(self, field, FrozenDict(defaults | given))
        for name, kind in self.kinds.items():
            choices = HEADS[name].kinds
            if kind not in choices:
                raise ValueError(
                    f"Unknown {HEADS[name].kind_key} {kind!r}: choose from {', '.join(choices)}."
                )
        for slot in self.slots:
            lacking = [name for name in self.tokens_read_by(slot) if name not in self.slots]
            if lacking:
                raise ValueError(
                    f"{HEADS[MODALITIES[slot].head].kind_key}={self.kind(slot)!r} reads the tokens "
                    f"of {' and '.join(MODALITIES[slot].fused)}, but the input mode has none of "
                    f"{' and '.join(lacking)}: choose a mode with both, or another kind."
                )

    @property
    def inputs(self) -> tuple[str, ...]:
        """The features that a batch must hold, in the order of `MODALITIES`."""
        read = {name for slot in self.slots for name in MODALITIES[slot].features}
        return tuple(name for name in MODALITIES if name in read)

    def kind(self, slot: str) -> str:
        """How the tokens of `slot` are computed, such as "attention", "mean" or "qformer"."""
        return self.kinds[MODALITIES[slot].head]

    def tokens_read_by(self, slot: str) -> tuple[str, ...]:
        """The slots whose tokens a pre-fusion reads in place of features; none for most kinds."""
        modality = MODALITIES[slot]
        reads = modality.fused and head_class(HEADS[modality.head], self.kind(slot)).reads_tokens
        return modality.fused if reads else ()

    def feature_width(self, name: str) -> int:
        """The width `d` of the feature `name`, one of `inputs`."""
        return self.widths[MODALITIES[name].head]

    def longest(self, name: str) -> float:
        """How many vectors of the feature `name` a sample may have; infinite without a Q-Former."""
        lengths = [
            head_class(head, self.kind(slot)).max_length(head)
            for slot in self.slots
            if name in MODALITIES[slot].features
            for head in [HEADS[MODALITIES[slot].head]]
        ]
        return min(lengths, default=math.inf)

    def token_counts(self) -> dict[str, int]:
        """The number of soft tokens of each slot, in slot order."""
        heads = {slot: HEADS[MODALITIES[slot].head] for slot in self.slots}
        return {
            slot: head_class(head, self.kind(slot)).num_tokens(head) for slot, head in heads.items()
        }


def keep_present(values: Array, present: Array) -> Array:
    """Zeroes the samples of `values` `[B, ...]` for which `present` `[B]` (bool) is False.

    A selection, not a product, so that not even a NaN gets through to values or gradients.
    """
    return jnp.where(present.reshape(-1, *[1] * (values.ndim - 1)), values, 0)


def weighted_sum(states: Array, weights: Array) -> Array:
    """The sum of `states` `[B, T, D]` over T, weighted by `weights` `[B, T]`: `[B, D]`.

    AffectGPT's weights are unconstrained: no softmax, no division by T.
    """
    return jnp.einsum("bt,btd->bd", weights, states)


def add_positions(states: Array, positions: Array) -> Array:
    """Adds the first T rows of `positions` `[rows, D]` to `states` `[B, T, D]`, in its dtype.

    Raises ValueError if the sequence is longer than the table.
    """
    length, rows = states.shape[1], positions.shape[0]
    if length > rows:
        raise ValueError(
            f"A sequence of {length} feature vectors exceeds the {rows} rows of its position "
            f"embedding: pass at most {rows} per sample."
        )
    return states + positions[:length].astype(states.dtype)


def linear(in_features: int, features: int, dtype: jnp.dtype, name: str) -> nn.Dense:
    """A Dense whose weight and bias start as U(-1/sqrt(in), 1/sqrt(in)), PyTorch's default."""
    bound = in_features**-0.5

    def init(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nn.Dense(features, dtype=dtype, kernel_init=init, bias_init=init, name=name)


class FusionHead(nn.Module):
    """A module that computes the soft tokens of a slot; the base of every kind.

    Attributes:
      spec: its row in the registry; its name there is its name in `Fusion`.
      config: of the whole fusion.
      llm_width: width of the language model, hence of every soft token.
      dtype: of the computation.

    `reads_tokens` of a class tells whether it reads the soft tokens of other heads, not features.
    """

    reads_tokens: ClassVar[bool] = False

    spec: Head
    config: FusionConfig
    llm_width: int
    dtype: jnp.dtype = jnp.float32

    @classmethod
    def num_tokens(cls, spec: Head) -> int:
        """How many soft tokens it computes."""
        return 1

    @classmethod
    def max_length(cls, spec: Head) -> float:
        """How many feature vectors a sample may have."""
        return math.inf

    def project(self, states: Array) -> Array:
        """Projects `[..., d]` to `[..., llm_width]`."""
        return linear(states.shape[-1], self.llm_width, self.dtype, "projection")(states)


class AttentionHead(FusionHead):
    """One token: the sum of all states, each weighted by a learned scalar of itself, projected."""

    @nn.compact
    def __call__(self, states: Array, deterministic: bool = True) -> Array:
        """Maps `[B, T, d]` to `[B, 1, llm_width]`; it has no dropout."""
        del deterministic
        weights = linear(states.shape[-1], 1, self.dtype, "score")(states)[..., 0]
        return self.project(weighted_sum(states, weights))[:, None]


class MeanHead(FusionHead):
    """One token: the mean of all states, projected."""

    @nn.compact
    def __call__(self, states: Array, deterministic: bool = True) -> Array:
        """Maps `[B, T, d]` to `[B, 1, llm_width]`; it has no dropout."""
        del deterministic
        return self.project(states.mean(axis=1))[:, None]


class _WithQFormer(FusionHead):
    """A module around a Q-Former, which has the sizes that the registry gives it."""

    @classmethod
    def num_tokens(cls, spec: Head) -> int:
        return spec.num_queries

    @classmethod
    def max_length(cls, spec: Head) -> float:
        return spec.max_positions


class QFormerHead(_WithQFormer):
    """A Q-Former over the states and their positions, projected: one token per query."""

    @nn.compact
    def __call__(
        self, states: Array, deterministic: bool = True, mask: Array | None = None
    ) -> Array:
        """Maps `[B, T, d]` to `[B, num_queries, llm_width]`.

        Only the states where `mask` (`[B, T]` bool, None for everywhere) is True are read. Raises
        ValueError if the sequence is longer than the position embedding.
        """
        config, dtype = self.config, self.dtype
        shape = (self.spec.max_positions, states.shape[-1])
        positions = self.param("positions", nn.initializers.normal(1.0), shape)
        states = add_positions(states, positions)
        if mask is None:
            mask = jnp.ones(states.shape[:2], bool)
        qformer = QFormer(config.qformer, self.spec.num_queries, dtype, name="qformer")
        return self.project(qformer(states, mask, deterministic))


class AttentionPreFusion(FusionHead):
    """One token: the weighted sum of a video and an audio vector, projected (Eq. 5-7).

    The paper maps both vectors to the two weights by one matrix and puts audio first. The released
    checkpoints factor that matrix in two, each with a bias, and put video first; so does this.
    """

    @nn.compact
    def __call__(
        self,
        video: Array,
        audio: Array,
        video_present: Array,
        audio_present: Array,
        deterministic: bool = True,
    ) -> Array:
        """Maps `[B, Tv, dv]`, `[B, Ta, da]` and their `[B]` bool masks to `[B, 1, llm_width]`.

        An absent modality counts as the zero vector, without the bias of its projection. There is
        no dropout.
        """
        del deterministic
        width, dtype = self.config.width, self.dtype
        project_video = linear(video.shape[-1], width, dtype, "video_projection")
        project_audio = linear(audio.shape[-1], width, dtype, "audio_projection")
        video = keep_present(project_video(video.mean(axis=1)), video_present)
        audio = keep_present(project_audio(audio.mean(axis=1)), audio_present)

        hidden = linear(2 * width, width, dtype, "hidden")(jnp.concatenate([video, audio], axis=-1))
        weights = linear(width, 2, dtype, "score")(hidden)
        fused = weighted_sum(jnp.stack([video, audio], axis=1), weights)
        return self.project(fused)[:, None]


class ProjectedPreFusion(AttentionPreFusion):
    """`AttentionPreFusion` of the soft tokens of both heads, not of the features they are made of.

    The paper tries this variant as well, and finds it worse. The release does not have it.
    """

    reads_tokens: ClassVar[bool] = True


class QFormerPreFusion(_WithQFormer):
    """A Q-Former over the video sequence followed by the audio sequence, projected (Eq. 3-4)."""

    @nn.compact
    def __call__(
        self,
        video: Array,
        audio: Array,
        video_present: Array,
        audio_present: Array,
        deterministic: bool = True,
    ) -> Array:
        """Maps `[B, Tv, dv]`, `[B, Ta, da]` and their `[B]` masks to `[B, queries, llm_width]`.

        The Q-Former does not read the states of an absent modality. Raises ValueError if Tv + Ta
        exceeds the position embedding.
        """
        width, dtype = self.config.width, self.dtype
        project_video = linear(video.shape[-1], width, dtype, "video_projection")
        project_audio = linear(audio.shape[-1], width, dtype, "audio_projection")
        states = jnp.concatenate([project_video(video), project_audio(audio)], axis=1)
        video_mask = jnp.broadcast_to(video_present[:, None], video.shape[:2])
        audio_mask = jnp.broadcast_to(audio_present[:, None], audio.shape[:2])
        mask = jnp.concatenate([video_mask, audio_mask], axis=1)
        head = QFormerHead(self.spec, self.config, self.llm_width, dtype, name="head")
        return head(states, deterministic, mask)


# By kind: the modules that read one feature, and those of the pre-fusion, which read two.
HEAD_CLASSES = {"attention": AttentionHead, "mean": MeanHead, "qformer": QFormerHead}
PRE_FUSION_CLASSES = {
    "attention": AttentionPreFusion,
    "qformer": QFormerPreFusion,
    "projected": ProjectedPreFusion,
}


def head_class(spec: Head, kind: str) -> type[FusionHead]:
    """The module that computes the tokens of a head in one of its kinds."""
    return (PRE_FUSION_CLASSES if spec.is_pre_fusion else HEAD_CLASSES)[kind]


class Fusion(nn.Module):
    """All soft tokens of an input mode; only what its slots use has parameters.

    The submodules are those of `modalities.HEADS`, such as `multi` (the pre-fusion, shared by the
    slots "multi" and "multi_frame"), `audio`, `video` (shared by "face" and "frame") and `image`.
    Parameters are float32; the computation runs in `dtype`. `llm_width` is the width of the
    language model, hence of every soft token.
    """

    config: FusionConfig
    llm_width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        features: dict[str, Array],
        present: dict[str, Array],
        deterministic: bool = True,
    ) -> Array:
        """Computes the soft tokens of a batch.

        Args:
          features: `[B, T, d]`, any float dtype, for each of `config.inputs`. T may differ between
            features; further features are ignored.
          present: `[B]` bool for each of `config.inputs`, False where a sample lacks the modality.
          deterministic: False turns on the dropout of the Q-Formers, which then need the rng
            collection "dropout".

        Returns:
          `[B, K, llm_width]` in `dtype`, slot after slot; K is the sum of `config.token_counts()`.
          The tokens of an absent modality are exactly zero, and those of the pre-fusion are where
          both of its modalities are absent.

        Raises:
          ValueError: the config has no slots, an input is missing or of the wrong shape, or a
            sequence is longer than the position embedding of its Q-Former.
        """
        config = self.config
        if not config.slots:
            raise ValueError("An input mode without slots has no soft tokens: leave Fusion out.")
        _check_inputs(config, features, present)
        states = {
            name: keep_present(features[name], present[name]).astype(self.dtype)
            for name in config.inputs
        }
        kinds = {MODALITIES[slot].head: config.kind(slot) for slot in config.slots}
        modules = {}
        for name, kind in kinds.items():
            module = head_class(HEADS[name], kind)
            modules[name] = module(HEADS[name], config, self.llm_width, self.dtype, name=name)

        tokens: dict[str, Array] = {}
        # A pre-fusion that reads tokens comes after the heads that make them.
        for slot in sorted(config.slots, key=lambda slot: bool(config.tokens_read_by(slot))):
            read = MODALITIES[slot].features
            module = modules[MODALITIES[slot].head]
            values = tokens if config.tokens_read_by(slot) else states
            arguments = [values[name] for name in read]
            if MODALITIES[slot].fused:
                arguments += [present[name] for name in read]
            valid = functools.reduce(jnp.logical_or, [present[name] for name in read])
            tokens[slot] = keep_present(module(*arguments, deterministic), valid)
        return jnp.concatenate([tokens[slot] for slot in config.slots], axis=1)


def _check_inputs(
    config: FusionConfig, features: dict[str, Array], present: dict[str, Array]
) -> None:
    for name in config.inputs:
        if name not in features or name not in present:
            raise ValueError(
                f"The slots {config.slots} need {name!r} in both features and present; the batch "
                f"has features {sorted(features)} and present {sorted(present)}."
            )
        shape, width = features[name].shape, config.feature_width(name)
        if len(shape) != 3 or shape[-1] != width:
            raise ValueError(f"features[{name!r}] must be [B, T, {width}], but is {list(shape)}.")
