"""From a config to the objects that it describes: data, model, tokenizer.

Shared by every command, so that a checkpoint is always evaluated as it was trained.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
from ml_collections import ConfigDict

from affectgpt_jax.config import ConfigError
from affectgpt_jax.data import demo
from affectgpt_jax.data.pipeline import View
from affectgpt_jax.data.prompts import INPUT_MODES, InputMode, load_prompts
from affectgpt_jax.data.records import RecordDataset, Records, hold_out
from affectgpt_jax.data.tokenizer import Tokenizer
from affectgpt_jax.models.affectgpt import AffectGPT
from affectgpt_jax.models.fusers import Fusion, FusionConfig
from affectgpt_jax.models.lora import LoraConfig
from affectgpt_jax.models.qformer import QFormerConfig
from affectgpt_jax.models.qwen2 import PUBLISHED, Execution, Qwen2, Qwen2Config
from affectgpt_jax.training.optimizer import OptimizerConfig
from affectgpt_jax.weights.huggingface import read_config


def base_directory(llm: str) -> Path:
    """Directory of `config.llm`: "tiny" for the base that ships with the package, or a path.

    Raises:
        ConfigError: no such directory.
    """
    if llm == "tiny":
        return Path(str(importlib.resources.files("affectgpt_jax") / "assets" / "tiny_base"))
    path = Path(llm).expanduser()
    if not path.is_dir():
        raise ConfigError(
            f"config.llm={llm!r} is not a directory; download the model and pass its directory "
            "as --config.llm=/path/to/Qwen2.5-7B-Instruct (or 'tiny' for the one that ships)"
        )
    return path


def base_config(llm: str) -> Qwen2Config:
    """Shape of `config.llm`; of a published model by its name alone, without any file.

    Raises:
        ConfigError: neither a directory nor a published name.
    """
    if llm in PUBLISHED and not Path(llm).is_dir():
        return PUBLISHED[llm]
    return read_config(base_directory(llm))


def input_mode(config: ConfigDict) -> InputMode:
    """The input mode, without the pre-fused slot where `config.fusion` is "none".

    Raises:
        ConfigError: an unknown mode.
    """
    if config.input not in INPUT_MODES:
        raise ConfigError(
            f"config.input is {config.input!r}; expected one of {sorted(INPUT_MODES)}"
        )
    mode = INPUT_MODES[config.input]
    return mode.without("multi") if config.fusion == "none" else mode


def fusion_config(config: ConfigDict, llm_width: int) -> FusionConfig:
    """Slots, heads and pre-fusion of the config's input mode."""
    mode, heads = input_mode(config), config.heads
    return FusionConfig(
        slots=mode.slots,
        llm_width=llm_width,
        video_width=heads.video_width,
        audio_width=heads.audio_width,
        image_width=heads.image_width,
        pre_fusion="attention" if config.fusion == "none" else config.fusion,
        multi_video=mode.multi_video,
        video_head=heads.video,
        audio_head=heads.audio,
        image_head=heads.image,
        width=heads.fusion_width,
        qformer=QFormerConfig(**config.qformer),
    )


def model(config: ConfigDict, llm: Qwen2Config, shard: Callable | None = None) -> AffectGPT:
    """The modules of a config.

    Args:
        config: the run's config.
        llm: shape of the base.
        shard: activation constraint; None on one device.

    Raises:
        ConfigError: values that the modules refuse.
    """
    dtype = jnp.dtype(config.dtype)
    execution = Execution(dtype=dtype, param_dtype=dtype, remat=config.remat)
    if shard is not None:
        execution = dataclasses.replace(execution, shard=shard)
    try:
        fusion = fusion_config(config, llm.hidden_size)
        lora = LoraConfig(**{**config.lora, "targets": tuple(config.lora.targets)})
    except ValueError as error:
        raise ConfigError(f"config: {error}") from None
    # The fusion costs next to nothing, and bfloat16 would round features that float16 holds.
    return AffectGPT(Qwen2(llm, lora, execution), Fusion(fusion) if fusion.slots else None)


def optimizer_config(config: ConfigDict) -> OptimizerConfig:
    """The optimizer's settings.

    Raises:
        ConfigError: values that it refuses.
    """
    try:
        return OptimizerConfig(**config.optimizer)
    except ValueError as error:
        raise ConfigError(f"config.{error}") from None


def view(config: ConfigDict, tokenizer: Tokenizer) -> View:
    """How the config turns clips into inputs.

    Raises:
        PromptError: a prompt file that cannot be used.
    """
    fusion = fusion_config(config, llm_width=1)  # the width plays no part in counts and inputs
    return View(
        tokenizer=tokenizer,
        prompts=load_prompts(config.prompts),
        mode=input_mode(config),
        token_counts=fusion.token_counts(),
        features=fusion.inputs,
    )


def check_features(config: ConfigDict, dataset: Records) -> None:
    """Compare the shapes of a data set's features with the config's.

    Raises:
        ConfigError: a feature is missing, of another width, or too long; the message names it.
    """
    fusion = fusion_config(config, llm_width=1)
    for name in fusion.inputs:
        if name not in dataset.manifest.features:
            raise ConfigError(
                f"config.input={config.input!r} reads the feature {name!r}, but the records of "
                f"split {dataset.manifest.split!r} hold only {sorted(dataset.manifest.features)}; "
                "choose another config.input or other records"
            )
        facts = dataset.manifest.features[name]
        limit = fusion.longest(name)
        if facts["frames"] > limit:
            raise ConfigError(
                f"the records' {name} features have {facts['frames']} frames, but the position "
                f"embedding of a qformer has {limit}; use another head, or fewer frames"
            )
        if facts["width"] != fusion.feature_width(name):
            key = "video" if name in ("face", "frame") else name
            raise ConfigError(
                f"the records' {name} features ({facts['encoder']}) are {facts['width']} wide, "
                f"but config.heads.{key}_width is {fusion.feature_width(name)}; set it to "
                f"{facts['width']}, or use records of another encoder"
            )


def datasets(
    config: ConfigDict, workdir: Path, say: Callable[[str], None]
) -> tuple[Records, Records, Records | None]:
    """The training, validation and test clips; generates the demo world's where it is asked for.

    Raises:
        ConfigError: no training data named.
        RecordError: a directory without intact records.
    """
    if not config.data.train:
        raise ConfigError(
            "config.data.train names no records; pass --config.data.train=DIR, or 'demo'"
        )
    train = _open(config, config.data.train, "train", workdir, say)
    if config.data.val:
        val = _open(config, config.data.val, "val", workdir, say)
    else:
        train, val = hold_out(train, config.data.val_share)
    test = _open(config, config.data.test, "test", workdir, say) if config.data.test else None
    for dataset in (train, val, test):
        if dataset is not None:
            check_features(config, dataset)
    names = {entry.name for entry in train.index}
    for split, dataset in (("validation", val), ("test", test)):
        shared = [e.name for e in dataset.index if e.name in names] if dataset else []
        if shared:
            say(f"warning: {len(shared)} {split} clips are training clips too, e.g. {shared[0]!r}")
    return train, val, test


def _open(
    config: ConfigDict, source: str, split: str, workdir: Path, say: Callable[[str], None]
) -> RecordDataset:
    if source != "demo":
        return RecordDataset(Path(source).expanduser())
    directory = workdir / "data" / f"demo-{config.demo_seed}-{split}"
    return demo.materialize(directory, config.demo_seed, split, say)
