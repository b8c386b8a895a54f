"""From a config to the objects that it describes: data, model, tokenizer.

Shared by every command, so that a checkpoint is always evaluated as it was trained.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from affectgpt_jax import cpu
from affectgpt_jax.common import hub
from affectgpt_jax.common.identity import Identity, code_identity, json_sha256
from affectgpt_jax.common.json import read_json, write_json
from affectgpt_jax.common.progress import QUIET_S, Elapsed
from affectgpt_jax.config import ConfigError
from affectgpt_jax.configs.affectgpt_qwen25_7b import data_set
from affectgpt_jax.data import demo
from affectgpt_jax.data.modalities import HEADS, INPUT_MODES, MODALITIES, InputMode
from affectgpt_jax.data.pipeline import MixtureComponent, PromptProcessor
from affectgpt_jax.data.prompts import BUILT_IN, load_prompts
from affectgpt_jax.data.records import (
    EXTRACTION,
    FORMAT_VERSION,
    MANIFEST_FILE,
    Feature,
    Manifest,
    RecordDataset,
    RecordError,
    Records,
    hold_out,
    read_manifest,
    subsample,
)
from affectgpt_jax.data.tokenizer import Tokenizer, tokenizer_identities
from affectgpt_jax.evaluation.lexicon import lexicon_identity
from affectgpt_jax.models.affectgpt import AffectGPT
from affectgpt_jax.models.attention import CausalAttention, Choice, choose, deviation
from affectgpt_jax.models.decoder import PUBLISHED, ComputeConfig, Decoder, DecoderConfig
from affectgpt_jax.models.fusers import Fusion, FusionConfig
from affectgpt_jax.models.lora import LoraConfig
from affectgpt_jax.models.qformer import QFormerConfig
from affectgpt_jax.training.devices import FP8_CAPABILITY
from affectgpt_jax.training.optimizer import OptimizerConfig
from affectgpt_jax.training.sharding import parse_mesh
from affectgpt_jax.weights.huggingface import WeightsError, read_config, weight_files

# Of a base on the hub; none is a pickle, and none is code.
_BASE_FILES = (
    *("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    *("model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
)


def base_directory(llm: str, download: bool = False) -> Path:
    """Directory of `config.llm`: "tiny" for the base that ships with the package, a path, or a
    model of the hub (`common/hub.py`), which is looked up in the hub's cache.

    Args:
        llm: the value of the key.
        download: get from the hub what its cache lacks.

    Raises:
        ConfigError: no such directory.
        HubError: a model of the hub that is not here, or cannot be had.
    """
    if llm == "tiny":
        return Path(str(importlib.resources.files("affectgpt_jax") / "assets" / "tiny_base"))
    if place := hub.parse_place(llm):
        return hub.find(place, "config.llm", _BASE_FILES, _lacks_of_base, download)
    path = Path(llm).expanduser()
    if not path.is_dir():
        raise ConfigError(
            f"config.llm={llm!r} is not a directory; download the model and pass its directory "
            "as --config.llm=/path/to/Qwen2.5-7B-Instruct, or its name on the hub with --download, "
            "as --config.llm=Qwen/Qwen2.5-7B-Instruct (or 'tiny' for the one that ships)"
        )
    return path


def _lacks_of_shape(directory: Path) -> str | None:
    return None if (directory / "config.json").is_file() else "config.json is missing"


def _lacks_of_base(directory: Path) -> str | None:
    if not (directory / "tokenizer.json").is_file():
        return "tokenizer.json is missing"
    try:
        weight_files(directory)
    except WeightsError as error:
        return str(error)
    return _lacks_of_shape(directory)


def base_config(llm: str, download: bool = False) -> DecoderConfig:
    """Shape of `config.llm`; of a published model by its name alone, without any file.

    Args:
        llm: the value of the key.
        download: get what says it, of a model of the hub, where the hub's cache lacks it.

    Raises:
        ConfigError: neither a directory nor a published name.
        HubError: a model of the hub that is not here, or cannot be had.
    """
    if llm in PUBLISHED and not Path(llm).is_dir():
        return PUBLISHED[llm]
    place = hub.parse_place(llm)
    if place is None:
        return read_config(base_directory(llm))
    try:
        found = hub.find(place, "config.llm", ("config.json",), _lacks_of_shape, download)
    except hub.HubError:
        if (name := place.repository.rpartition("/")[2]) in PUBLISHED:
            return PUBLISHED[name]
        raise
    return read_config(found)


def tokenizer(directory: Path, llm: DecoderConfig) -> Tokenizer:
    """The tokenizer of a base.

    Raises:
        ConfigError: it has more tokens than the base.
        TokenizerError: a directory without a tokenizer that can be used.
    """
    found = Tokenizer(directory)
    if found.base_size > llm.vocab_size:
        raise ConfigError(
            f"{directory}: the tokenizer has {found.base_size} tokens, but the model only "
            f"{llm.vocab_size} rows of embeddings; they do not belong together"
        )
    return found


def input_mode(config: ConfigDict, name: str = "") -> InputMode:
    """An input mode, `config.input` by default, as `config.fusion` leaves it."""
    mode = INPUT_MODES[name or config.input]
    return mode.without_pre_fusion() if config.fusion == "none" else mode


def input_modes(config: ConfigDict) -> list[InputMode]:
    """All modes of a config: `config.input` first, then those of its mixture."""
    names = dict.fromkeys(
        [config.input, *(e.input for e in config.data.mixture.values() if e.input)]
    )
    return [input_mode(config, name) for name in names]


def fusion_config(config: ConfigDict) -> FusionConfig:
    """Slots, projectors and pre-fusion of the config's input modes together."""
    readers = [head.name for head in HEADS.values() if not head.is_pre_fusion]
    kinds = {name: config.projectors[name] for name in readers}
    if config.fusion != "none":
        kinds |= {name: config.fusion for name in HEADS if name not in readers}
    return FusionConfig(
        slots=tuple(dict.fromkeys(s for mode in input_modes(config) for s in mode.slots)),
        kinds=kinds,
        widths={name: config.projectors[f"{name}_width"] for name in readers},
        width=config.projectors.fusion_width,
        qformer=QFormerConfig(**config.qformer),
    )


def device_platform() -> str:
    """ "cuda", "rocm", "cpu" or "tpu": JAX calls the first two "gpu"."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        return device.platform
    return "cuda" if "cuda" in device.client.platform_version else "rocm"


def compute_capability() -> tuple[int, int]:
    """Of the CUDA device, e.g. (9, 0)."""
    major, minor = jax.devices()[0].compute_capability.split(".")
    return int(major), int(minor)


def attention(config: ConfigDict, llm: DecoderConfig) -> Choice:
    """The causal attention of a config on the devices that are here.

    A kernel of a library is first compared with plain XLA on this device, with the heads of the
    base, which takes a few seconds. Of an "auto", the next one is tried where one fails.

    Raises:
        ConfigError: `config.attention` names a backend that cannot be used here, or whose result
            is wrong.
    """
    platform, capability, split = device_platform(), (0, 0), True
    if platform == "cuda":
        capability = compute_capability()
        split = kv_heads_split(llm, parse_mesh(config.mesh, jax.device_count())[2])
    packed = config.pack_length > 0
    where = (platform, capability, llm.head_dim, config.dtype, packed)
    failed: dict[str, str] = {}
    while True:
        try:
            choice = choose(config.attention, *where, kv_heads_split=split, failed=failed)
        except ValueError as error:
            raise ConfigError(f"config.{error}; config.attention=auto takes what can") from None
        if choice.name == "xla":
            return choice
        # All but cudnn are tested with several samples a row, whatever the rows of this run are.
        doubt = _doubt(choice.attend, llm, config.dtype, choice.name != "cudnn")
        if not doubt:
            return choice
        failed[choice.name] = doubt


def kv_heads_split(llm: DecoderConfig, shares: int) -> bool:
    """Whether key heads are split over the devices wherever query heads are."""
    # Heads whose number the devices do not divide are replicated (sharding.ActivationConstraint).
    return not llm.num_key_value_heads % shares or llm.num_attention_heads % shares > 0


# Rounding to bfloat16 gives a tenth of this, and attention to wrong tokens ten times as much.
_DEVIATION = 0.05


def _doubt(attend: CausalAttention, llm: DecoderConfig, dtype: str, packed: bool) -> str:
    """Why the result of a kernel on this device is wrong; empty if it is right."""
    heads = llm.num_attention_heads, llm.num_key_value_heads, llm.head_dim
    try:
        found = deviation(attend, *heads, dtype, packed)
    # A library may raise anything on a GPU that it does not know; another backend is used then.
    except Exception as error:
        return f"on this device it fails with {type(error).__name__}: {_first_line(error)}"
    if found <= _DEVIATION:
        return ""
    return f"on this device it is {found:.2g} off plain XLA, expected at most {_DEVIATION}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["no message"])[0]


def check_model(
    config: ConfigDict, llm: DecoderConfig, capability: tuple[int, int] | None = None
) -> tuple[LoraConfig | None, FusionConfig]:
    """Adapters and fusion of a config, before a model is made of them.

    Args:
        config: the run's config.
        llm: shape of the base.
        capability: compute capability of the GPU that it is for; None is the one that is here.

    Raises:
        ConfigError: values that the modules refuse.
    """
    if config.base_precision == "nf4" and (llm.hidden_size % 2 or llm.intermediate_size % 2):
        raise ConfigError(
            f"config.base_precision='nf4' packs inputs in pairs, but this base has a hidden_size "
            f"of {llm.hidden_size} and an intermediate_size of {llm.intermediate_size}; use int8"
        )
    if config.base_precision == "fp8":
        if capability is None and device_platform() == "cuda":
            capability = compute_capability()
        # XLA would widen the weights in every layer: slower than bfloat16. (CPUs are for tests.)
        if capability is not None and capability < FP8_CAPABILITY:
            raise ConfigError(
                "config.base_precision='fp8' needs a GPU that multiplies fp8, compute capability "
                "{}.{} (Ada, Hopper) or later, and this one has {}.{}; use int8 or nf4".format(
                    *FP8_CAPABILITY, *capability
                )
            )
    try:
        fusion = fusion_config(config)
        lora = None
        if config.lora.rank:
            lora = LoraConfig(**{**config.lora, "targets": tuple(config.lora.targets)})
    except ValueError as error:
        raise ConfigError(f"config: {error}") from None
    if lora is None and not fusion.slots:
        raise ConfigError(
            f"config.input={config.input!r} with config.lora.rank=0 leaves nothing to train; give "
            "the model LoRA or an input with features"
        )
    return lora, fusion


def model(
    config: ConfigDict,
    llm: DecoderConfig,
    shard: Any = None,
    attend: CausalAttention | None = None,
) -> AffectGPT:
    """The modules of a config.

    Args:
        config: the run's config. A remat of "auto" is "none" here: training chooses it anew when
            it knows the shapes of its batches, and nothing else has a backward pass.
        llm: shape of the base.
        shard: `sharding.ActivationConstraint`; None on one device.
        attend: causal attention; None is what `attention` chooses.

    Raises:
        ConfigError: values that the modules refuse.
    """
    lora, fusion = check_model(config, llm)
    dtype = jnp.dtype(config.dtype)
    compute = ComputeConfig(
        dtype=dtype,
        param_dtype=dtype,
        base_precision=config.base_precision,
        remat="none" if config.remat == "auto" else config.remat,
        attend=attend or attention(config, llm).attend,
        **cpu.decoding(),
    )
    if shard is not None:
        compute = dataclasses.replace(compute, shard=shard)
    # The fusion costs next to nothing, and bfloat16 would round features that float16 holds.
    return AffectGPT(
        Decoder(llm, lora, compute), Fusion(fusion, llm.hidden_size) if fusion.slots else None
    )


def optimizer_config(config: ConfigDict) -> OptimizerConfig:
    """The optimizer's settings.

    Raises:
        ConfigError: values that it refuses.
    """
    try:
        return OptimizerConfig(**config.optimizer)
    except ValueError as error:
        raise ConfigError(f"config.{error}") from None


def prompt_processor(config: ConfigDict, tokenizer: Tokenizer, mode: str = "") -> PromptProcessor:
    """How the config turns clips into inputs, in an input mode, `config.input` by default.

    Raises:
        PromptError: a prompt file that cannot be used.
    """
    fusion = fusion_config(config)
    return PromptProcessor(
        tokenizer=tokenizer,
        prompts=load_prompts(config.prompts),
        mode=input_mode(config, mode),
        token_counts=fusion.token_counts(),
        features={name: fusion.feature_width(name) for name in fusion.inputs},
    )


def inputs(config: ConfigDict, directory: Path, data: Data | None = None) -> dict[str, Identity]:
    """What the answers of a run depend on beside its base: by what it is, as checkpoints keep it.

    Args:
        config: the run's config.
        directory: of its base.
        data: the clips that it is trained on and measured by, for which it takes the lexicon that
            ships; None leaves both out.

    Raises:
        PromptError, TokenizerError: a prompt file or a tokenizer that cannot be used.
    """
    found = {
        **tokenizer_identities(directory),
        "prompts": load_prompts(config.prompts).identity,
        "code": code_identity(),
    }
    if data is not None:
        sets = {f"training records ({part.name})": part for part in data.train}
        sets |= {f"validation records ({part.name})": part for part in data.val}
        if data.test is not None:
            sets[TEST_RECORDS] = data.test
        found |= {name: records_identity(part.dataset) for name, part in sets.items()}
        found["lexicon"] = lexicon_identity()
    return found


def records_identity(records: Records) -> Identity:
    """Which records these are, by the hashes in their manifest; of a part, those of the whole."""
    manifest = dataclasses.asdict(records.manifest)
    return Identity(f"{records.manifest.count:,} clips", json_sha256(manifest))


def check_features(config: ConfigDict, dataset: Records, mode: InputMode) -> None:
    """Compare the shapes of a data set's features with what its input mode reads.

    Raises:
        ConfigError: a feature is missing, of another width, or too long; the message names it.
    """
    _check_features(config, dataset.manifest.features, dataset.manifest.split, mode)


def _check_features(
    config: ConfigDict, features: Mapping[str, Mapping[str, Any]], split: str, mode: InputMode
) -> None:
    fusion = fusion_config(config)
    for name in mode.features:
        if name not in features:
            raise ConfigError(
                f"the input mode {mode.name!r} reads the feature {name!r}, but the records of "
                f"split {split!r} hold only {sorted(features)}; choose another config.input or "
                "other records"
            )
    for name in fusion.inputs:
        facts = features.get(name)
        if facts is None:
            continue
        limit = fusion.longest(name)
        if facts["frames"] > limit:
            raise ConfigError(
                f"the records' {name} features have {facts['frames']} frames, but the position "
                f"embedding of a qformer has {limit}; use another head, or fewer frames"
            )
        if facts["width"] != fusion.feature_width(name):
            key = HEADS[MODALITIES[name].head].width_key
            raise ConfigError(
                f"the records' {name} features ({facts['encoder']}) are {facts['width']} wide, "
                f"but config.{key} is {fusion.feature_width(name)}; set it to "
                f"{facts['width']}, or use records of another encoder"
            )


class MadeBy(NamedTuple):
    """The encoder of a feature, and the hash of its weights, "" where nothing says it."""

    name: str
    sha256: str


def _made_by(manifest: Manifest, mode: InputMode) -> dict[str, MadeBy]:
    """Of the features that an input mode reads and records have."""
    settings = manifest.extra.get(EXTRACTION, {}).get("encoders", {})
    return {
        name: MadeBy(facts["encoder"], settings.get(MODALITIES[name].encoder, {}).get("sha256", ""))
        for name, facts in manifest.features.items()
        if name in mode.features
    }


def _gather(found: Iterable[Mapping[str, MadeBy]]) -> dict[str, set[MadeBy]]:
    encoders: dict[str, set[MadeBy]] = {}
    for made in found:
        for name, encoder in made.items():
            encoders.setdefault(name, set()).add(encoder)
    return encoders


def training_encoders(config: ConfigDict, workdir: Path) -> dict[str, set[MadeBy]]:
    """By feature, the encoders of the records that a run was trained on, as far as it has kept them
    or its records are here."""
    if (kept := workdir / EXTRACTION_FILE).is_file():
        facts = read_json(kept, dict[str, Any])
        extra = {EXTRACTION: facts[EXTRACTION]}
        manifest = Manifest(FORMAT_VERSION, "", 0, [], facts["features"], {}, "", extra)
        return _gather(_made_by(manifest, mode) for mode in input_modes(config))
    return _gather(
        _made_by(manifest, input_mode(config, entry["input"]))
        for entry in training_sets(config).values()
        if entry["source"]
        and (manifest := _declared(config, entry["source"], missing_ok=True)) is not None
    )


def check_encoders(
    trained: Mapping[str, Collection[MadeBy]],
    manifest: Manifest,
    mode: InputMode,
    split: str,
    say: Callable[[str], None],
) -> None:
    """Compare what made the features of records with what made those that a model is trained on.

    Features of another encoder mean nothing to the model, though they may be as wide. An encoder is
    the same by its name or by the hash of its weights; of names that somebody chose, as at an
    import, two may be the same encoder.

    Args:
        trained: by feature, the encoders of the training records; without one, nothing is compared.
        manifest: of the records.
        mode: whose features are read.
        split: what the records are called.
        say: told of names that differ where only one side, or none, has a hash.

    Raises:
        ConfigError: another encoder.
    """
    for name, mine in _made_by(manifest, mode).items():
        theirs = trained.get(name)
        if not theirs or any(mine.name == t.name or mine.sha256 == t.sha256 != "" for t in theirs):
            continue
        known = ", ".join(sorted(encoder.name for encoder in theirs))
        found = (
            f"the {name} features of the {split} records are of the encoder {mine.name!r}, but "
            f"those of the training records of {known!r}, so the model cannot read them"
        )
        if mine.sha256 and all(encoder.sha256 for encoder in theirs):
            raise ConfigError(f"{found}; extract both with the same encoder")
        say(f"warning: {found}, unless both names are of the same encoder")


# What `inputs` calls the run's own test set.
TEST_RECORDS = "test records"


@dataclasses.dataclass(frozen=True)
class Data:
    """The clips of a run, each set with its processor and label types."""

    train: list[MixtureComponent]
    val: list[MixtureComponent]
    test: MixtureComponent | None

    @property
    def held_out(self) -> list[MixtureComponent]:
        """What is evaluated: the validation sets, and the test set if there is one."""
        return [*self.val, *([self.test] if self.test else [])]


def data(
    config: ConfigDict, workdir: Path, tokenizer: Tokenizer, say: Callable[[str], None]
) -> Data:
    """Open the clips of a config; generates the demo world's where it is asked for.

    Raises:
        ConfigError: no training data named, features that do not fit or are of another encoder,
            or, where `strict_leaks` is set, clips that are in training and evaluation.
        RecordError: a directory without intact records.
        PromptError: a prompt file that cannot be used.
    """
    check_data(config)
    sets = training_sets(config)

    def source(name: str, place: str, split: str, entry: Mapping[str, Any]) -> MixtureComponent:
        mode = entry["input"] or config.input
        dataset = open_records(config, place, split, workdir, say)
        check_features(config, dataset, input_mode(config, mode))
        label = entry["label"] or config.label
        how = prompt_processor(config, tokenizer, mode)
        return MixtureComponent(dataset, how, label, name, entry["weight"])

    train, val = [], []
    for name, entry in sets.items():
        whole = source(name, entry["source"], "train", entry)
        mine, held_out = split_training(config, whole.dataset, entry["share"])
        if held_out is not None:
            val.append(dataclasses.replace(whole, dataset=held_out))
        train.append(dataclasses.replace(whole, dataset=mine))
    plain = data_set(config.data.train).to_dict()
    if config.data.val:
        val = [source("val", config.data.val, "val", plain)]
    test = source("test", config.data.test, "test", plain) if config.data.test else None
    found = Data(train, val, test)
    trained = _gather(_made_by(c.dataset.manifest, c.processor.mode) for c in train)
    for split, components in (("validation", val if config.data.val else []), ("test", [test])):
        for part in filter(None, components):
            check_encoders(trained, part.dataset.manifest, part.processor.mode, split, say)
    _check_leaks(config, found, say)
    return found


def training_sets(config: ConfigDict) -> dict[str, dict[str, Any]]:
    """The data sets that a config trains on by name, as `data_set` describes each."""
    return config.data.mixture.to_dict() or {"train": data_set(config.data.train).to_dict()}


def split_training(
    config: ConfigDict, whole: Records, share: float
) -> tuple[Records, Records | None]:
    """The clips of a training set that a config trains on, and those that it holds out of them."""
    whole = subsample(whole, share)
    return (whole, None) if config.data.val else hold_out(whole, config.data.val_share)


def trained_names(config: ConfigDict, workdir: Path) -> tuple[set[str], list[str]]:
    """The names of the clips that a run was trained on, and its sources that are not here.

    Indexes are read and nothing is hashed or generated.
    """
    config = config.copy_and_resolve_references()
    config.data.verify = False
    names, missing = set(), []
    for entry in training_sets(config).values():
        place = entry["source"]
        generated = _demo_directory(config, place, "train", workdir)
        try:
            if not place or generated and not (generated / MANIFEST_FILE).is_file():
                raise RecordError(f"{place or 'a source without a name'} is not here")
            whole = open_records(config, place, "train", workdir, say=lambda line: None)
            mine, _ = split_training(config, whole, entry["share"])
        except (RecordError, ImportError):  # TFDS need not be installed where a run was taken to
            missing.append(place)
        else:
            names |= {clip.name for clip in mine.index}
    return names, missing


# The prompts of an exported run that are none of the built-in sets, beside its config.
PROMPTS_FILE = "prompts.toml"


def prompts_of(workdir: Path, name: str) -> str:
    """`config.prompts` of a run, which may be the file that an export has put beside its config."""
    beside = workdir / PROMPTS_FILE
    return str(beside) if name == PROMPTS_FILE and beside.is_file() else name


def prompt_file(workdir: Path, name: str) -> tuple[Path, Identity] | None:
    """The file that `config.prompts` of a run names, and what it holds; None of a built-in set.

    Raises:
        PromptError: it is not there, or cannot be used.
    """
    if name in BUILT_IN:
        return None
    path = Path(prompts_of(workdir, name)).expanduser()
    return path, load_prompts(str(path)).identity


# What a run keeps of the extraction of its records, which need not stay where they are.
EXTRACTION_FILE = "extraction.json"


def keep_extraction(workdir: Path, train: Sequence[MixtureComponent]) -> None:
    """Write how the features of the training records were made; nothing where they do not say it,
    or by several encoders, or where faces that are read were taken in several ways."""
    manifests = [component.dataset.manifest for component in train]
    found = [manifest.extra.get(EXTRACTION, {}) for manifest in manifests]
    keys = ["encoders"]
    if any("face" in component.processor.mode.features for component in train):
        keys.append("faces")
    if found[0].get("encoders") and all(
        s.get(key) == found[0].get(key) for s in found for key in keys
    ):
        facts = {"features": manifests[0].features, EXTRACTION: found[0]}
        write_json(workdir / EXTRACTION_FILE, facts)


def training_clips(config: ConfigDict) -> int | None:
    """How many clips an epoch of a config has, by manifests alone; None where one is not here."""
    if not config.data.train and not config.data.mixture:
        return None
    total = 0.0
    for entry in training_sets(config).values():
        if demo.world_seed(entry["source"], config.demo_seed) is not None:
            count = demo.SIZES["train"]
        elif (manifest := Path(entry["source"]).expanduser() / MANIFEST_FILE).is_file():
            count = read_manifest(manifest.parent).count
        else:
            return None
        total += entry["weight"] * entry["share"] * count
    return round(total if config.data.val else total * (1 - config.data.val_share))


def check_data(config: ConfigDict) -> None:
    """Refuse prompts and records that do not fit, before any is written, read or hashed.

    Raises:
        ConfigError: no training data named, features that do not fit, or of another encoder.
        RecordError: a directory without records.
        PromptError: a prompt file that cannot be used.
    """
    if not config.data.train and not config.data.mixture:
        raise ConfigError(
            "config.data.train names no records; pass --config.data.train=DIR, or 'demo'"
        )
    load_prompts(config.prompts)
    sets = training_sets(config).values()
    places = [(entry["source"], "train", entry["input"]) for entry in sets]
    places += [(config.data[split], split, "") for split in ("val", "test") if config.data[split]]
    trained = []
    for place, split, name in places:
        if (manifest := _declared(config, place)) is None:
            continue
        mode = input_mode(config, name)
        _check_features(config, manifest.features, split, mode)
        if split == "train":
            trained.append(_made_by(manifest, mode))
        else:  # what is not refused is said when all are open
            split = {"val": "validation"}.get(split, split)
            check_encoders(_gather(trained), manifest, mode, split, lambda text: None)


def _declared(config: ConfigDict, place: str, missing_ok: bool = False) -> Manifest | None:
    """The manifest of a source string, without a look at any record; None of a TensorFlow data set,
    and where there are no records, if these may be missing.

    Raises:
        RecordError: a directory without records.
    """
    if (seed := demo.world_seed(place, config.demo_seed)) is not None:
        encoder = demo.encoder_name(seed)
        features = {
            name: Feature(frames=frames, width=width, encoder=encoder, present=0)
            for name in demo.features_for(fusion_config(config).inputs)
            for frames, width in [demo.SHAPES[name]]
        }
        return Manifest(FORMAT_VERSION, "", 0, [], features, {}, "", {})
    directory = Path(place).expanduser()
    if place.startswith("tfds:") or (missing_ok and not (directory / MANIFEST_FILE).is_file()):
        return None
    return read_manifest(directory)


def _check_leaks(config: ConfigDict, data: Data, say: Callable[[str], None]) -> None:
    """Find clips, by name, that are in training and in evaluation."""
    names = {entry.name: s.name for s in data.train for entry in s.dataset.index}
    for split, sources in (("validation", data.val), ("test", [data.test] if data.test else [])):
        shared = [e.name for s in sources for e in s.dataset.index if e.name in names]
        if not shared:
            continue
        found = (
            f"{len(shared)} {split} clips are training clips too, e.g. {shared[0]!r} of the set "
            f"{names[shared[0]]!r}"
        )
        report_leak(config, found, say)


def report_leak(config: ConfigDict, found: str, say: Callable[[str], None]) -> None:
    """Say that clips are in two sets, or refuse it where `strict_leaks` is set.

    Raises:
        ConfigError: it is.
    """
    if config.strict_leaks:
        raise ConfigError(f"{found}; take them out of one, or pass --config.strict_leaks=False")
    say(f"warning: {found}")


def _demo_directory(config: ConfigDict, place: str, split: str, workdir: Path) -> Path | None:
    """Where `open_records` generates a split; None where the source is no demo world."""
    seed = demo.world_seed(place, config.demo_seed)
    if seed is None:
        return None
    features = demo.features_for(fusion_config(config).inputs)
    extra = "".join(f"-{name}" for name in features if name not in demo.DEFAULT_FEATURES)
    return workdir / "data" / f"demo-{seed}-{split}{extra}"


def open_records(
    config: ConfigDict, place: str, split: str, workdir: Path, say: Callable[[str], None]
) -> Records:
    """The data set of a source string; every shard is hashed unless `data.verify` is off.

    Args:
        config: the run's config.
        place: a record directory, "tfds:DIR:SPLIT", "demo" or "demo:WORLD".
        split: of the demo world, which is generated under `workdir` where it is not there yet.
        workdir: the run's directory.
        say: told what takes long.

    Raises:
        RecordError: a directory without intact records.
    """
    seed = demo.world_seed(place, config.demo_seed)
    if seed is not None:
        features = demo.features_for(fusion_config(config).inputs)
        directory = _demo_directory(config, place, split, workdir)
        dataset = demo.materialize(directory, seed, split, say, features)
    elif place.startswith("tfds:"):
        from affectgpt_jax.data.tfds_source import open_source  # loads TFDS

        dataset = open_source(place, split)
    else:
        dataset = RecordDataset(Path(place).expanduser())
    if config.data.verify:
        main = not jax.process_index()
        what = f"hashing the records of {place}"
        with Elapsed(what, quiet_s=QUIET_S, stream=sys.stderr, enabled=main):
            dataset.verify()
    return dataset
