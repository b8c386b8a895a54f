"""LoRA adapters as PEFT stores them: `adapter_config.json` beside `adapter_model.safetensors`.

Names map one to one: `layers/q_proj/lora_a[i]` `[in, r]` is
`base_model.model.model.layers.{i}.self_attn.q_proj.lora_A.weight` `[r, in]`. Both sides scale by
alpha / r. What PEFT can do beyond that (DoRA, rank-stabilised scaling, trained biases, ...) is
refused by name, since an adapter read without it would be another model.

Heads and pre-fusion have no place in an adapter. They lie beside it, in `fusion.safetensors`, under
the paths of their parameters; PEFT passes over that file.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict

import jax
import numpy as np

from affectgpt_jax.common.files import new_path
from affectgpt_jax.common.json import read_json, write_json
from affectgpt_jax.models.lora import TARGETS, LoraConfig
from affectgpt_jax.weights import layout
from affectgpt_jax.weights.huggingface import tensor_name
from affectgpt_jax.weights.streaming import StoredTensor, WeightsError, read_header
from affectgpt_jax.weights.tensors import write_tensors

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
# Ours, which PEFT passes over: what an adapter of a model that sees and hears is nothing without.
FUSION = "fusion.safetensors"

# Options that are read here or do not change what a finished adapter computes. (Which modules have
# an adapter is read off the tensors: "target_modules" may be an expression.)
_HARMLESS = frozenset(
    """auto_mapping base_model_name_or_path eva_config exclude_modules inference_mode lora_alpha
    lora_dropout megatron_core peft_version qalora_group_size r revision target_modules""".split()
)
# Values that options may have beside false and empty ones. Initialisations that are not listed may
# take something out of the frozen weights.
_ALLOWED = {
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM",),
}
_PREFIX = "base_model.model."
_MODULE = re.compile(r"base_model\.model\.model\.layers\.\d+\.(?:self_attn|mlp)\.(\w+)\.lora_[AB]")
# Why names of tensors are others than expected, by what is in them, and what to do.
_STRANGERS = {
    "_orig_mod.": "it was saved from a compiled model; save model._orig_mod, or take '_orig_mod.' "
    "out of all names",
    "lora_magnitude": "it is of DoRA, which is not supported",
    "embed": "adapters and copies of embeddings are not read; save the adapter with "
    "save_embedding_layers=False, and train it without embeddings",
    "lm_head": "adapters and copies of the head are not read; train the adapter without it",
    "modules_to_save": "copies of whole modules are not read; train the adapter without them",
    "language_model.": "it was saved from a model around the language model; save the adapter of "
    "the language model alone, or rename the tensors",
    "vision": "it was saved from a model with a vision tower, which is not read",
    "_fsdp_wrapped_module.": "it was saved from a wrapped model; save the one inside",
    "module.": "it was saved from a wrapped model; save model.module, or take 'module.' out of all "
    "names",
    ".default.": "it was saved as the state of a trainer; use save_pretrained, or take '.default' "
    "out of all names",
    "base_model.model.layers.": "it was saved from a model without a head (AutoModel); train with "
    "AutoModelForCausalLM, or put 'model.' before 'layers' in all names",
}


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The settings of an `adapter_config.json`.

    Attributes:
        rank, alpha, dropout: as in `LoraConfig`.
        base: name or path of the base model, "" where none is named.
        refused: options, with their values, that this code cannot honour.
    """

    rank: int
    alpha: float
    dropout: float
    base: str
    refused: Mapping[str, Any]


def lora_layout(path: layout.Path, prefix: str, suffix: str) -> layout.Stored:
    """How PEFT names an adapter, with what stands before and after the factor's name.

    `("layers", "q_proj", "lora_a")` -> `{prefix}model.layers.{}.self_attn.q_proj.lora_A{suffix}`.
    """
    _, target, factor = path
    module = tensor_name(("layers", "{}", target, "kernel")).removesuffix(".weight")
    return layout.Stored(f"{prefix}{module}.lora_{factor[-1].upper()}{suffix}", transposed=True)


def _layout(path: layout.Path) -> layout.Stored:
    return lora_layout(path, _PREFIX, ".weight")


def _fusion_layout(path: layout.Path) -> layout.Stored:
    return layout.Stored(".".join(path))


def save_adapter(
    directory: Path, lora: Any, config: LoraConfig, base: str = "", fusion: Any = None
) -> None:
    """Write a `lora` tree as an adapter that `peft.PeftModel.from_pretrained` loads, bit for bit.

    Args:
        directory: a new directory.
        lora: `trainable["lora"]`.
        config: its rank, alpha, dropout and targets.
        base: name or path of the base, for PEFT's users.
        fusion: `trainable["fusion"]`, which is written beside the adapter in a file of its own.

    Raises:
        WeightsError: there is no adapter, or the directory exists.
    """
    tensors = layout.to_tensors(lora, _layout)
    if not tensors:
        raise WeightsError(f"{directory}: this model has no LoRA, so there is no adapter to write")
    options = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": list(config.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    with new_path(directory, WeightsError) as partial:
        partial.mkdir()
        write_tensors(partial / TENSORS, tensors, tensors.__getitem__)
        if heads := layout.to_tensors(fusion, _fusion_layout):
            write_tensors(partial / FUSION, heads, heads.__getitem__)
        write_json(partial / CONFIG, options)


def read_adapter_config(directory: Path) -> AdapterConfig:
    """Read `adapter_config.json`.

    Raises:
        WeightsError: no such file, not JSON, or without rank and alpha.
    """
    path = Path(directory) / CONFIG
    advice = "expected the config of a LoRA adapter, with the keys 'r' and 'lora_alpha'"
    options = read_json(path, _Options, error=WeightsError, advice=advice)
    return AdapterConfig(
        rank=options["r"],
        alpha=options["lora_alpha"],
        dropout=options.get("lora_dropout") or 0.0,
        base=options.get("base_model_name_or_path") or "",
        refused={key: value for key, value in options.items() if _refused(key, value)},
    )


class _OptionalOptions(TypedDict, total=False):
    lora_dropout: float | None
    base_model_name_or_path: str | None


class _Options(_OptionalOptions):
    """The options of an adapter that are read here; others are refused or do not matter."""

    r: int
    lora_alpha: float


def _refused(option: str, value: Any) -> bool:
    return bool(value) and option not in _HARMLESS and value not in _ALLOWED.get(option, ())


def adapter_targets(names: Iterable[str]) -> tuple[str, ...]:
    """The projections that have an adapter, by its tensors' names, in the order of `TARGETS`."""
    return _in_order(target for name in names if (target := adapter_target(name)))


def adapter_target(name: str) -> str | None:
    """The projection that a tensor adapts; None where it is not an adapter's."""
    match = _MODULE.match(name)
    return match[1] if match else None


def _in_order(targets: Iterable[str]) -> tuple[str, ...]:
    found = set(targets)
    return (*(t for t in TARGETS if t in found), *sorted(found.difference(TARGETS)))


def adapter_tensors(directory: Path) -> dict[str, StoredTensor]:
    """The tensors of an adapter, by name.

    Raises:
        WeightsError: no such file, or a damaged one.
    """
    path = Path(directory) / TENSORS
    if not path.is_file():
        raise WeightsError(
            f"{path}: not found; PEFT writes it (an adapter_model.bin must be saved again, with "
            "safe_serialization=True)"
        )
    return read_header(path)


def open_adapter(directory: Path, abstract: Any, config: LoraConfig | None) -> Callable[[Any], Any]:
    """Compare a PEFT adapter with a model, without its values.

    Dropout may differ: it is a setting of training, not of the adapter.

    Args:
        directory: of `adapter_config.json` and `adapter_model.safetensors`.
        abstract: the `lora` tree of `jax.ShapeDtypeStruct`s that it is to fill.
        config: of the model that the tree belongs to; None without LoRA.

    Returns:
        What reads the values into such a tree, cast to its dtypes and placed by its shardings,
        where it has them.

    Raises:
        WeightsError: an option that this code lacks, another rank, alpha or set of targets than
            the config's, a missing, unexpected or wrongly shaped tensor, or a damaged file.
    """
    directory = Path(directory)
    found = read_adapter_config(directory)
    for option, value in found.refused.items():
        raise WeightsError(
            f"{directory / CONFIG} has {option}={value!r}, which this code does not support; "
            "expected a plain LoRA adapter"
        )
    tensors = adapter_tensors(directory)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    check_names(directory / TENSORS, shapes)
    check_adapter(directory, found.rank, found.alpha, adapter_targets(shapes), config)
    expected = layout.expected_shapes(abstract, _layout)
    for name in shapes:
        if name not in expected:
            raise WeightsError(
                f"{directory / TENSORS}: the tensor {name} is not part of this model's adapters"
            )
    if trouble := layout.compare_shapes(shapes, expected):
        raise WeightsError(f"{directory / TENSORS}: {trouble}")
    return lambda abstract: layout.from_tensors(
        abstract, _layout, lambda name: tensors[name].read()
    )


def fusion_tensors(directory: Path) -> dict[str, StoredTensor]:
    """The heads and the pre-fusion beside an adapter, by the paths of their parameters.

    Raises:
        WeightsError: a damaged file.
    """
    path = Path(directory) / FUSION
    return read_header(path) if path.is_file() else {}


def open_fusion(directory: Path, abstract: Any) -> Callable[[Any], Any] | None:
    """Compare heads and pre-fusion, as `save_adapter` writes them beside an adapter, with a model.

    Args:
        directory: of the adapter.
        abstract: the `fusion` tree that they are to fill.

    Returns:
        As for `open_adapter`; None where the directory has none.

    Raises:
        WeightsError: tensors of another model, or a damaged file.
    """
    path, tensors = Path(directory) / FUSION, fusion_tensors(directory)
    if not tensors:
        return None
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    expected = layout.expected_shapes(abstract, _fusion_layout)
    advice = "set config.input, config.fusion and config.projectors as it was trained with"
    for name in shapes:
        if name not in expected:
            raise WeightsError(f"{path}: this config has no place for the tensor {name}; {advice}")
    if trouble := layout.compare_shapes(shapes, expected):
        raise WeightsError(f"{path}: {trouble}; {advice}")
    return lambda abstract: layout.from_tensors(
        abstract, _fusion_layout, lambda name: tensors[name].read()
    )


def refusal(directory: Path) -> str | None:
    """Why no run can start from an adapter; None where one can: with its rank, alpha and targets,
    on a base of its shapes.

    Raises:
        WeightsError: a config or tensors that cannot be read.
    """
    config, tensors = read_adapter_config(directory), adapter_tensors(directory)
    if config.refused:
        refused = ", ".join(f"{key}={value!r}" for key, value in config.refused.items())
        return f"{refused} is not supported"
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    try:
        check_names(directory / TENSORS, shapes)
        lora = LoraConfig(config.rank, config.alpha, config.dropout, adapter_targets(shapes))
        # Of every projection, the first layer says the sizes, and the numbers how many there are.
        count = 1 + max(int(name.split(".layers.")[1].split(".")[0]) for name in shapes)
        tree = {}
        for target in lora.targets:
            down, up = (
                shapes.get(_layout(("layers", target, factor)).name.format(0), (0, 0))
                for factor in ("lora_a", "lora_b")
            )
            tree[target] = {
                "lora_a": jax.ShapeDtypeStruct((count, *down[1:], config.rank), np.float32),
                "lora_b": jax.ShapeDtypeStruct((count, config.rank, *up[:1]), np.float32),
            }
        expected = layout.expected_shapes({"layers": tree}, _layout)
        return layout.compare_shapes(shapes, expected)
    except (WeightsError, ValueError) as error:
        return str(error)


def check_names(where: Path, shapes: Mapping[str, layout.Shape]) -> None:
    """Refuse a file whose tensors are no adapters of projections, before it is said what they lack.

    Args:
        where: the file.
        shapes: of its tensors, by name.

    Raises:
        WeightsError: no tensors, one without values, or one of another name; with a cause.
    """
    check_sizes(where, shapes)
    for name in shapes:
        target = adapter_target(name)
        if target is None or not name.endswith((".lora_A.weight", ".lora_B.weight")):
            raise WeightsError(
                f"{where}: the tensor {name} is no adapter of a projection; expected names as "
                f"{_layout(('layers', TARGETS[0], 'lora_a')).name.format(0)}{cause(name)}"
            )
        if target not in TARGETS:
            raise WeightsError(
                f"{where}: the tensor {name} adapts {target}; only {', '.join(TARGETS)} are adapted"
            )


def check_sizes(where: Path, shapes: Mapping[str, layout.Shape]) -> None:
    """Refuse a file without tensors, or with one that has no values.

    Raises:
        WeightsError: it is so; with a cause.
    """
    if not shapes:
        raise WeightsError(
            f"{where} holds no tensors; save it again, from the process that has them"
        )
    for name, shape in shapes.items():
        if 0 in shape:
            raise WeightsError(
                f"{where}: the tensor {name} is {shape} and has no values; sharded training "
                "(ZeRO-3, FSDP) leaves that where shards are not gathered before they are saved"
            )


def cause(name: str) -> str:
    """Why a tensor may have such a name, and what to do, to append to an error; or nothing."""
    return next((f"; {why}" for part, why in _STRANGERS.items() if part in name), "")


def check_adapter(
    where: Path, rank: int, alpha: float, targets: tuple[str, ...], config: LoraConfig | None
) -> None:
    """Compare an adapter with the config of the model that it is to be loaded into.

    Raises:
        WeightsError: they differ; the message has both sides.
    """
    here = (0, (), None)
    if config:
        here = (config.rank, _in_order(config.targets), config.alpha)
    there = (rank, _in_order(targets), alpha)
    for key, ours, theirs in zip(("rank", "targets", "alpha"), here, there):
        if ours != theirs:
            raise WeightsError(
                f"{where}: the adapter's {key} is {theirs}, but config.lora.{key} is {ours}; set "
                "it to the adapter's, or name another adapter"
            )
