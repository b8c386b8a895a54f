"""Frozen encoders: a table of names, and the code that turns images or sound into features.

Weights come from a local directory in Hugging Face's layout, or from the hub's cache; nothing is
downloaded unless that is asked for, and no code that comes with weights is ever run. `transformers`
holds the architectures, PyTorch computes; both are imported when an encoder is loaded, so that
processes which decode stay small.

What all encoders share:

- An image is brought to the encoder's square directly (bilinear, aspect ratio not kept), as the
  AffectGPT release does. The encoder's own processor then has nothing left to resize or crop: only
  its mean and standard deviation apply.
- The 8 windows of a clip are one waveform to normalise: zero mean and unit variance are theirs
  together, padding included. Clips that share a batch know nothing of each other.
- Batches have one size, filled up with zeros, so that a kernel's choice of how to add numbers up
  does not follow from how many clips happened to be readable.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from affectgpt_jax.common import hub
from affectgpt_jax.common.errors import UserError
from affectgpt_jax.common.identity import named_files_sha256
from affectgpt_jax.common.json import read_json
from affectgpt_jax.data.modalities import extracted_features

if TYPE_CHECKING:
    import torch

# What they read of a clip's sound: windows of so many samples, at a rate in Hz.
WINDOWS = 8
RATE = 16_000
WINDOW = 2 * RATE
# The features that those of video, and those of audio, make.
FEATURES = extracted_features()
# Clips in a batch: what fits an encoder of 300 million parameters into 16 GB.
BATCH = {"cpu": 4, "cuda": 16}
PRECISIONS = {"cpu": ("float32", "bfloat16"), "cuda": ("float16", "bfloat16", "float32")}
HUBERT_LAYERS = 4
# Of a window: a mel frame every 160 samples, of which Whisper's convolutions keep every other.
WHISPER_POSITIONS = WINDOW // (2 * 160)
VARIANCE_EPSILON = 1e-7  # that of Wav2Vec2FeatureExtractor
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*")
CONFIGS = ("config.json", "preprocessor_config.json")
# CLIP's, where a directory has no preprocessor_config.json (transformers' OPENAI_CLIP_*).
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

# Where PyTorch or what decodes is not installed.
MISSING = "the package {} is missing: pip install 'affectgpt-jax[features]'"


class EncoderError(UserError, ValueError):
    """An encoder that is unknown, not on this machine, or not the one that its name says."""


def _last_layers(outputs: Any) -> torch.Tensor:
    """The mean over time of the mean of the last four layers, as the release takes HuBERT.

    The last of them after the final layer norm, where an architecture has one: it was so in the
    transformers that the published features come from, while version 5 lists it before.
    """
    layers = [*outputs.hidden_states[-HUBERT_LAYERS:-1], outputs.last_hidden_state]
    return sum(layers[1:], layers[0]).div(len(layers)).mean(dim=1)


def _heard(outputs: Any) -> torch.Tensor:
    """The mean over the positions of a window, without those of the 28 s of silence after it."""
    return outputs.last_hidden_state[:, :WHISPER_POSITIONS].mean(dim=1)


# How outputs become one vector an image or a window.
POOLING: dict[str, Callable[[Any], Any]] = {
    "image_embeds": lambda outputs: outputs.image_embeds,
    "pooler_output": lambda outputs: outputs.pooler_output,
    "last 4 layers, mean over time": _last_layers,
    "last layer, mean over time": _heard,
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """An encoder of any size: its class in transformers, and the output that is used."""

    kind: str  # video or audio
    types: tuple[str, ...]  # what config.json calls it
    model: str
    pooling: str


ARCHITECTURES = {
    "clip": Architecture(
        "video", ("clip", "clip_vision_model"), "CLIPVisionModelWithProjection", "image_embeds"
    ),
    "siglip": Architecture(
        "video", ("siglip", "siglip_vision_model"), "SiglipVisionModel", "pooler_output"
    ),
    "dinov2": Architecture("video", ("dinov2",), "Dinov2Model", "pooler_output"),
    # EVA-CLIP's towers are timm's; transformers wraps them, without code from the hub.
    "timm": Architecture("video", ("timm_wrapper",), "TimmWrapperModel", "pooler_output"),
    "hubert": Architecture("audio", ("hubert",), "HubertModel", "last 4 layers, mean over time"),
    "wavlm": Architecture("audio", ("wavlm",), "WavLMModel", "last 4 layers, mean over time"),
    "data2vec": Architecture(
        "audio", ("data2vec-audio",), "Data2VecAudioModel", "last 4 layers, mean over time"
    ),
    "whisper": Architecture("audio", ("whisper",), "WhisperModel", "last layer, mean over time"),
}


@dataclasses.dataclass(frozen=True)
class Published:
    """Published weights: the hub's name, and the width [d] of their features."""

    architecture: str
    width: int
    repository: str


PUBLISHED = {
    "clip-vit-l": Published("clip", 768, "openai/clip-vit-large-patch14"),
    "clip-vit-b": Published("clip", 512, "openai/clip-vit-base-patch16"),
    "siglip-so400m": Published("siglip", 1152, "google/siglip-so400m-patch14-384"),
    "siglip-b": Published("siglip", 768, "google/siglip-base-patch16-224"),
    "dinov2-l": Published("dinov2", 1024, "facebook/dinov2-large"),
    "dinov2-b": Published("dinov2", 768, "facebook/dinov2-base"),
    "eva-clip-l": Published("timm", 1024, "timm/eva02_large_patch14_clip_224.merged2b"),
    "hubert-l": Published("hubert", 1024, "TencentGameMate/chinese-hubert-large"),
    "hubert-l-en": Published("hubert", 1024, "facebook/hubert-large-ll60k"),
    "wavlm-l": Published("wavlm", 1024, "microsoft/wavlm-large"),
    "data2vec-l": Published("data2vec", 1024, "facebook/data2vec-audio-large"),
    "whisper-l": Published("whisper", 1280, "openai/whisper-large-v3"),
    "whisper-b": Published("whisper", 512, "openai/whisper-base"),
}


def names(kind: str) -> list[str]:
    """The choices of `--video` or `--audio`: published weights, then bare architectures."""
    published = [n for n, p in PUBLISHED.items() if ARCHITECTURES[p.architecture].kind == kind]
    return published + [n for n, a in ARCHITECTURES.items() if a.kind == kind]


@dataclasses.dataclass(frozen=True)
class EncoderPlace:
    """An encoder before it is loaded.

    Attributes:
        name: what manifests call it.
        architecture: a key of `ARCHITECTURES`.
        width: of its features, as published; None where the directory decides.
        directory: of its weights.
    """

    name: str
    architecture: str
    width: int | None
    directory: Path

    @property
    def kind(self) -> str:
        return ARCHITECTURES[self.architecture].kind

    def files(self) -> list[Path]:
        """Configuration and weights, in a fixed order; safetensors alone where there are some."""
        configs = [path for name in CONFIGS if (path := self.directory / name).is_file()]
        for pattern in ("*.safetensors", "pytorch_model*.bin"):
            if weights := sorted(self.directory.glob(pattern)):
                return configs + weights
        return configs

    def sha256(self) -> str:
        """SHA-256 of the names and contents of `files`."""
        return named_files_sha256(self.files())


def find_encoder(text: str, kind: str, download: bool = False) -> EncoderPlace:
    """The encoder for `NAME`, `NAME=DIR` or `NAME=OWNER/MODEL`, of the hub, on the command line.

    Args:
        text: a name of `names(kind)`; a bare architecture needs a directory.
        kind: video or audio.
        download: get weights that are not in the hub's cache.

    Raises:
        EncoderError: an unknown name, or a directory without weights.
        HubError: weights of the hub that are not here, or cannot be had.
    """
    name, _, place = text.partition("=")
    if name not in names(kind):
        known = ", ".join(names(kind))
        raise EncoderError(f"--{kind} {text}: {name!r} is no encoder for {kind}; known are {known}")
    published = PUBLISHED.get(name)
    if not place and not published:
        raise EncoderError(f"--{kind} {name} needs a directory, as in --{kind} {name}=DIR")
    if model := hub.parse_place(place) if place else hub.HubPlace(published.repository):
        advice = f"name its directory, as in --{kind} {name}=DIR"
        # A repository often holds its weights in several formats; PyTorch's is enough.
        patterns = (*CONFIGS, *WEIGHTS)
        directory = hub.find(model, f"--{kind} {text}", patterns, _lacks, download, advice)
    else:
        directory = Path(place).expanduser()
    architecture = published.architecture if published else name
    width = published.width if published else None
    label = name if published else f"{name}:{hub.model_name(directory.resolve())}"
    found = EncoderPlace(label, architecture, width, directory)
    if _lacks(directory):
        raise EncoderError(
            f"--{kind} {text}: {directory} holds no encoder; expected config.json and weights "
            "(model.safetensors or pytorch_model.bin) in Hugging Face's layout"
        )
    # Towers of timm have no type.
    kept = _json(directory / "config.json").get("model_type")
    if kept and kept not in (expected := ARCHITECTURES[architecture].types):
        raise EncoderError(
            f"--{kind} {text}: {directory} holds a {kept} by its config.json, expected "
            f"{' or '.join(expected)}"
        )
    return found


def _lacks(directory: Path) -> str | None:
    """What a directory lacks of an encoder; None where it has all."""
    if not (directory / "config.json").is_file():
        return "config.json is missing"
    found = (path for pattern in ("*.safetensors", "*.bin") for path in directory.glob(pattern))
    return None if any(found) else "its weights are missing"


class Encoder:
    """A loaded encoder: `encoder(batch)` returns features `[B, 8, d]`, float32.

    A batch is uint8 pixels `[B, 8, S, S, 3]` with S the `image_size`, or float32 samples
    `[B, 8, 32000]` at 16 kHz.

    Attributes:
        place: what was loaded.
        width: of the features.
        image_size: of the pixels; 0 for audio.

    Args:
        place: what to load.
        device: of PyTorch.
        precision: float32, or what matrix products round to: bfloat16, on a GPU also float16.

    Raises:
        EncoderError: weights that are damaged, incomplete, or of another width than published.
    """

    def __init__(self, place: EncoderPlace, device: str = "cpu", precision: str = "float32"):
        import torch

        self.place, self._device = place, torch.device(device)
        self._precision = getattr(torch, precision)
        architecture = ARCHITECTURES[place.architecture]
        self._pool = POOLING[architecture.pooling]
        self._layers = architecture.pooling.startswith("last 4")
        model = _load_model(place, architecture.model)
        if place.architecture == "whisper":
            model = model.get_encoder()
        self._model = model.to(self._device).eval()
        self.image_size = 0
        if place.kind == "video":
            self._prepare_images()
        else:
            self._prepare_sound()
        self.width = self(self.empty(1)[:, :1]).shape[-1]
        if place.width not in (None, self.width):
            raise EncoderError(
                f"{place.directory} gives features of width {self.width}, {place.name} has "
                f"{place.width}; call it --{place.kind} {place.architecture}={place.directory}"
            )

    def empty(self, clips: int) -> np.ndarray:
        """A batch of zeros."""
        if self.place.kind == "video":
            return np.zeros((clips, WINDOWS, self.image_size, self.image_size, 3), np.uint8)
        return np.zeros((clips, WINDOWS, WINDOW), np.float32)

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        import torch

        mixed = contextlib.nullcontext()
        if self._precision != torch.float32:
            mixed = torch.autocast(self._device.type, self._precision)
        # float32 is float32, and the same input the same features, on a GPU as well.
        exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
        with torch.inference_mode(), exact:
            inputs = self._inputs(torch.from_numpy(batch).to(self._device))
            with mixed:
                options = {"output_hidden_states": True} if self._layers else {}
                features = self._pool(self._model(**inputs, **options))
        return features.float().cpu().numpy().reshape(*batch.shape[:2], -1)

    def _prepare_images(self) -> None:
        import torch
        from transformers import AutoConfig

        facts = _json(self.place.directory / "preprocessor_config.json")
        config = AutoConfig.from_pretrained(self.place.directory, local_files_only=True)
        config = getattr(config, "vision_config", config)
        if self.place.architecture == "timm":
            timm = config.pretrained_cfg
            self.image_size, mean, std = timm["input_size"][-1], timm["mean"], timm["std"]
        else:
            # A vision tower of variable size (DINOv2) is used at its processor's.
            size = facts.get("crop_size") if facts.get("do_center_crop", True) else None
            size = size or facts.get("size") or config.image_size
            if isinstance(size, dict):
                size = size.get("height") or size.get("shortest_edge")
            self.image_size = int(size)
            mean, std = facts.get("image_mean", MEAN), facts.get("image_std", STD)
        shape = (1, 3, 1, 1)
        mean = torch.tensor(mean, device=self._device).reshape(shape)
        std = torch.tensor(std, device=self._device).reshape(shape)

        def inputs(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
            images = pixels.flatten(0, 1).permute(0, 3, 1, 2)
            return {"pixel_values": (images.float() / 255 - mean) / std}

        self._inputs = inputs

    def _prepare_sound(self) -> None:
        if self.place.architecture == "whisper":
            self._inputs = self._mel
            return
        facts = _json(self.place.directory / "preprocessor_config.json")
        normalise = facts.get("do_normalize", True)

        def inputs(samples: torch.Tensor) -> dict[str, torch.Tensor]:
            if normalise:
                samples = normalised(samples)
            return {"input_values": samples.flatten(0, 1)}

        self._inputs = inputs

    def _mel(self, samples: torch.Tensor) -> dict[str, torch.Tensor]:
        from transformers import WhisperFeatureExtractor

        bins = self._model.config.num_mel_bins
        extractor = WhisperFeatureExtractor(feature_size=bins)
        waveforms = list(samples.flatten(0, 1).cpu().numpy())
        mel = extractor(waveforms, sampling_rate=RATE, return_tensors="pt").input_features
        return {"input_features": mel.to(self._device)}


def has_gpu() -> bool:
    """Whether PyTorch finds a GPU."""
    import torch

    return torch.cuda.is_available()


def normalised(samples: torch.Tensor) -> torch.Tensor:
    """Samples `[B, 8, N]` with zero mean and unit variance over the 8 windows of each clip."""
    mean = samples.mean(dim=(1, 2), keepdim=True)
    variance = samples.var(dim=(1, 2), keepdim=True, correction=0)
    return (samples - mean) / (variance + VARIANCE_EPSILON).sqrt()


def _load_model(place: EncoderPlace, model: str) -> Any:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    verbosity = transformers.utils.logging.get_verbosity()
    # A published file often holds more than is asked for, a text tower; what it lacks is refused.
    transformers.utils.logging.set_verbosity_error()
    try:
        loaded, report = getattr(transformers, model).from_pretrained(
            place.directory,
            local_files_only=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
    # From safetensors, PyTorch, JSON or the architecture, each with errors of its own.
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise EncoderError(f"{place.directory} cannot be loaded as {model}: {reason}") from None
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
    # It masks in training only, and files for recognition do without.
    missing = sorted(key for key in report["missing_keys"] if "masked_spec_embed" not in key)
    if missing:
        raise EncoderError(
            f"{place.directory} lacks {len(missing)} tensors of {model}, the first {missing[0]!r}; "
            f"is it a {place.architecture}?"
        )
    return loaded


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    return read_json(path, dict[str, Any], error=EncoderError)
