"""From encoder features to the soft tokens of the prompt: one head per modality and the pre-fusion.

A head turns the features of one modality into tokens of the language model's width. The pre-fusion
does so for video and audio together, before the language model sees either (AffectGPT,
arXiv 2501.16566, Eq. 3-7).

A sample may lack a modality: its soft tokens are then exactly zero, and neither values nor
gradients depend on what stands in the feature array at that place.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from affectgpt_jax.models.qformer import QFormer, QFormerConfig

SLOTS = ("multi", "multi_frame", "audio", "face", "frame", "image")
# The visual feature that a pre-fused slot reads, beside audio.
MULTI_VIDEO = {"multi": "face", "multi_frame": "frame"}

# The module that serves a slot: face and frame share one head, and one pre-fusion.
_MODULES = {
    "multi": "multi",
    "multi_frame": "multi",
    "audio": "audio",
    "face": "video",
    "frame": "video",
    "image": "image",
}
# The Q-Former of each module: its queries, and the rows of the position embedding before it.
_QUERIES = {"multi": 16, "audio": 8, "video": 32, "image": 32}
_POSITIONS = {"multi": 264, "audio": 8, "video": 32, "image": 257}

_CHOICES = {
    "pre_fusion": ("attention", "qformer"),
    "video_head": ("attention", "mean", "qformer"),
    "audio_head": ("attention", "mean", "qformer"),
    "image_head": ("mean", "qformer"),
}


@dataclasses.dataclass(frozen=True)
class FusionConfig:
    """Which soft tokens an input mode has, and how they are computed.

    Attributes:
      slots: the soft-token slots of the input mode, in prompt order; each one of `SLOTS`.
      llm_width: width of the language model, hence of every soft token.
      video_width: width of the face and frame features.
      audio_width: width of the audio features.
      image_width: width of the image features.
      pre_fusion: "attention" or "qformer"; read when a slot is pre-fused.
      video_head: "attention", "mean" or "qformer", for face and frame.
      audio_head: "attention", "mean" or "qformer".
      image_head: "mean" or "qformer".
      width: the width to which the pre-fusion projects video and audio.
      qformer: sizes of every Q-Former.

    Raises ValueError for an unknown or repeated slot, and for an unknown choice.
    """

    slots: tuple[str, ...]
    llm_width: int
    video_width: int = 768
    audio_width: int = 1024
    image_width: int = 768
    pre_fusion: str = "attention"
    video_head: str = "attention"
    audio_head: str = "attention"
    image_head: str = "mean"
    width: int = 1024
    qformer: QFormerConfig = QFormerConfig()

    def __post_init__(self) -> None:
        """Rejects slots and choices that do not exist."""
        unknown = [slot for slot in self.slots if slot not in SLOTS]
        if unknown:
            raise ValueError(f"Unknown slots {unknown}: choose from {', '.join(SLOTS)}.")
        if len(set(self.slots)) < len(self.slots):
            raise ValueError(f"A slot stands twice in {self.slots}: name each at most once.")
        for field, choices in _CHOICES.items():
            value = getattr(self, field)
            if value not in choices:
                raise ValueError(f"Unknown {field} {value!r}: choose from {', '.join(choices)}.")

    @property
    def inputs(self) -> tuple[str, ...]:
        """The features that a batch must hold, in the order of `SLOTS`."""
        read = {name for slot in self.slots for name in self.read_by(slot)}
        return tuple(name for name in SLOTS if name in read)

    @staticmethod
    def read_by(slot: str) -> tuple[str, ...]:
        """The features that the tokens of `slot` are computed from."""
        return (MULTI_VIDEO[slot], "audio") if slot in MULTI_VIDEO else (slot,)

    def kind(self, slot: str) -> str:
        """How the tokens of `slot` are computed: "attention", "mean" or "qformer"."""
        return self.pre_fusion if slot in MULTI_VIDEO else getattr(self, f"{_MODULES[slot]}_head")

    def feature_width(self, name: str) -> int:
        """The width `d` of the feature `name`, one of `inputs`."""
        return getattr(self, f"{_MODULES[name]}_width")

    def longest(self, name: str) -> float:
        """How many vectors of the feature `name` a sample may have; infinite without a Q-Former."""
        rows = [
            _POSITIONS[_MODULES[slot]]
            for slot in self.slots
            if self.kind(slot) == "qformer" and name in self.read_by(slot)
        ]
        return min(rows, default=float("inf"))

    def token_counts(self) -> dict[str, int]:
        """The number of soft tokens of each slot, in slot order."""
        return {
            slot: _QUERIES[_MODULES[slot]] if self.kind(slot) == "qformer" else 1
            for slot in self.slots
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


class AttentionHead(nn.Module):
    """One token: the sum of all states, each weighted by a learned scalar of itself, projected."""

    llm_width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, states: Array, deterministic: bool = True) -> Array:
        """Maps `[B, T, d]` to `[B, 1, llm_width]`; it has no dropout."""
        del deterministic
        width = states.shape[-1]
        weights = linear(width, 1, self.dtype, "score")(states)[..., 0]
        pooled = weighted_sum(states, weights)
        return linear(width, self.llm_width, self.dtype, "projection")(pooled)[:, None]


class MeanHead(nn.Module):
    """One token: the mean of all states, projected."""

    llm_width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, states: Array, deterministic: bool = True) -> Array:
        """Maps `[B, T, d]` to `[B, 1, llm_width]`; it has no dropout."""
        del deterministic
        pooled = states.mean(axis=1)
        return linear(states.shape[-1], self.llm_width, self.dtype, "projection")(pooled)[:, None]


class QFormerHead(nn.Module):
    """A Q-Former over the states and their positions, projected: one token per query.

    `module` is the head's name in `Fusion` ("multi", "audio", "video" or "image"). It decides how
    many queries there are and how long a sequence may be.
    """

    config: FusionConfig
    module: str
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, states: Array, deterministic: bool = True, mask: Array | None = None
    ) -> Array:
        """Maps `[B, T, d]` to `[B, num_queries, llm_width]`.

        Only the states where `mask` (`[B, T]` bool, None for everywhere) is True are read. Raises
        ValueError if the sequence is longer than the position embedding.
        """
        config, dtype = self.config, self.dtype
        shape = (_POSITIONS[self.module], states.shape[-1])
        positions = self.param("positions", nn.initializers.normal(1.0), shape)
        states = add_positions(states, positions)
        if mask is None:
            mask = jnp.ones(states.shape[:2], bool)
        qformer = QFormer(config.qformer, _QUERIES[self.module], dtype, name="qformer")
        tokens = qformer(states, mask, deterministic)
        return linear(config.qformer.width, config.llm_width, dtype, "projection")(tokens)


class AttentionPreFusion(nn.Module):
    """One token: the weighted sum of a video and an audio vector, projected (Eq. 5-7).

    The paper maps both vectors to the two weights by one matrix and puts audio first. The released
    checkpoints factor that matrix in two, each with a bias, and put video first; so does this.
    """

    config: FusionConfig
    dtype: jnp.dtype = jnp.float32

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
        return linear(width, self.config.llm_width, dtype, "projection")(fused)[:, None]


class QFormerPreFusion(nn.Module):
    """A Q-Former over the video sequence followed by the audio sequence, projected (Eq. 3-4)."""

    config: FusionConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        video: Array,
        audio: Array,
        video_present: Array,
        audio_present: Array,
        deterministic: bool = True,
    ) -> Array:
        """Maps `[B, Tv, dv]`, `[B, Ta, da]` and their `[B]` bool masks to `[B, 16, llm_width]`.

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
        return QFormerHead(self.config, "multi", dtype, name="head")(states, deterministic, mask)


class Fusion(nn.Module):
    """All soft tokens of an input mode; only what its slots use has parameters.

    The submodules are `multi` (the pre-fusion, shared by the slots "multi" and "multi_frame"),
    `audio`, `video` (shared by "face" and "frame") and `image`. Parameters are float32; the
    computation runs in `dtype`.
    """

    config: FusionConfig
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
        kinds = {_MODULES[slot]: config.kind(slot) for slot in config.slots}
        modules = {name: self._module(name, kind) for name, kind in kinds.items()}

        tokens = []
        for slot in config.slots:
            module = modules[_MODULES[slot]]
            if slot in MULTI_VIDEO:
                video, audio = config.read_by(slot)
                valid = present[video] | present[audio]
                slot_tokens = module(
                    states[video], states[audio], present[video], present[audio], deterministic
                )
            else:
                valid = present[slot]
                slot_tokens = module(states[slot], deterministic)
            tokens.append(keep_present(slot_tokens, valid))
        return jnp.concatenate(tokens, axis=1)

    def _module(self, name: str, kind: str) -> nn.Module:
        config, dtype = self.config, self.dtype
        if name == "multi":
            pre_fusion = {"attention": AttentionPreFusion, "qformer": QFormerPreFusion}[kind]
            return pre_fusion(config, dtype, name=name)
        if kind == "qformer":
            return QFormerHead(config, name, dtype, name=name)
        head = {"attention": AttentionHead, "mean": MeanHead}[kind]
        return head(config.llm_width, dtype, name=name)


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
