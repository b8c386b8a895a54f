"""Reports on weights on disk, from headers and configs alone."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from affectgpt_jax.common.json import read_json
from affectgpt_jax.common.text import one_line
from affectgpt_jax.data.modalities import HEADS
from affectgpt_jax.weights import peft, release
from affectgpt_jax.weights.huggingface import base_identity, calls_own_head_tied, stored_tensors
from affectgpt_jax.weights.streaming import WeightsError

_ATTENTION = re.compile(r"\.(self_attn|attention)\.")
_BASE_PARTS = (
    "embedding",
    "attention",
    "feed-forward",
    "norms",
    "vocabulary projection",
    "other",
)
_SIZES = {
    "num_hidden_layers": "layers",
    "hidden_size": "hidden",
    "intermediate_size": "feed-forward",
    "num_attention_heads": "query heads",
    "num_key_value_heads": "key-value heads",
    "vocab_size": "vocabulary",
}


_OptionalFields = TypedDict(
    "_OptionalFields",
    dict.fromkeys(_SIZES, int | None) | {"architectures": list[str] | None},
    total=False,
)


class _Config(_OptionalFields):
    """The fields of a `config.json` that are shown, of a model of any family."""

    model_type: str


@dataclasses.dataclass(frozen=True)
class Part:
    """Tensors that belong together.

    Attributes:
        name: what they are.
        tensors: how many.
        parameters: numbers in them.
        dtypes: of these numbers.
        nbytes: that they take.
    """

    name: str
    tensors: int
    parameters: int
    dtypes: frozenset[str]
    nbytes: int

    @classmethod
    def of(cls, name: str, arrays: Iterable[Any]) -> Part:
        """Of arrays, or whatever else has a `shape` and a NumPy `dtype`."""
        arrays = [(math.prod(array.shape), np.dtype(array.dtype)) for array in arrays]
        return cls(
            name,
            len(arrays),
            sum(size for size, _ in arrays),
            frozenset(dtype.name for _, dtype in arrays),
            sum(size * dtype.itemsize for size, dtype in arrays),
        )


@dataclasses.dataclass(frozen=True)
class Report:
    """Facts about weights, and the parts that they consist of."""

    facts: Sequence[tuple[str, str]]
    parts: Sequence[Part]

    def render(self) -> str:
        """The facts, and a table of the parts with their sum."""
        width = max(len(name) for name, _ in self.facts)
        lines = [f"{name:<{width}}  {value}" for name, value in self.facts]
        parts = [part for part in self.parts if part.tensors]
        total = Part(
            "total",
            sum(part.tensors for part in parts),
            sum(part.parameters for part in parts),
            frozenset().union(*(part.dtypes for part in parts)),
            sum(part.nbytes for part in parts),
        )
        rows = [("", "tensors", "parameters", "bytes", "dtype")]
        rows += [
            (
                part.name,
                f"{part.tensors:,}",
                f"{part.parameters:,}",
                f"{part.nbytes:,}",
                ", ".join(sorted(part.dtypes)),
            )
            for part in (*parts, total)
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines.append("")
        for name, *numbers, dtypes in rows:
            cells = [name.ljust(widths[0]), *map(str.rjust, numbers, widths[1:-1]), dtypes]
            lines.append("  ".join(cells).rstrip())
        # Names come from the files.
        return "\n".join(map(one_line, lines))


def describe_base(directory: Path, refusal: str | None, hash_weights: bool = False) -> Report:
    """A base model in Hugging Face layout, of any family.

    Args:
        directory: the model's.
        refusal: why it cannot be run here, or None.
        hash_weights: name the SHA-256 that checkpoints know it by, which reads every byte.

    Raises:
        WeightsError: a config or weights that cannot be read.
    """
    path = directory / "config.json"
    config = read_json(path, _Config, error=WeightsError, advice="expected a model's config")
    family = config["model_type"]
    tensors = stored_tensors(directory)
    files = {tensor.path for tensor in tensors.values()}
    head = "tied to the embedding" if config.get("tie_word_embeddings") else "untied"
    if calls_own_head_tied(directory):
        head = "untied: another one than the embedding is stored, though config.json calls it tied"
    sizes = [f"{name} {config[key]:,}" for key, name in _SIZES.items() if config.get(key)]
    facts = [
        ("format", f"base model in Hugging Face layout, {count(len(files), 'safetensors file')}"),
        ("family", f"{family} ({', '.join(config.get('architectures') or ['unnamed'])})"),
        ("sizes", ", ".join(sizes)),
        ("head", head),
        ("tokenizer", "yes" if (directory / "tokenizer.json").is_file() else "no tokenizer.json"),
        ("runs here", f"no: {refusal}" if refusal else "yes"),
    ]
    if hash_weights and not refusal:
        facts.append(("sha256", base_identity(directory).sha256))
    return Report(facts, _group(tensors, _base_part, _BASE_PARTS))


def _base_part(name: str) -> str:
    if "embed_tokens" in name:
        return "embedding"
    if name.startswith("lm_head"):
        return "vocabulary projection"
    if "norm" in name:
        return "norms"
    if _ATTENTION.search(name):
        return "attention"
    return "feed-forward" if ".mlp." in name else "other"


def describe_adapter(directory: Path) -> Report:
    """A PEFT adapter.

    Raises:
        WeightsError: a config or tensors that cannot be read.
    """
    config = peft.read_adapter_config(directory)
    tensors = peft.adapter_tensors(directory)
    targets = peft.adapter_targets(tensors)
    refusal = peft.refusal(directory)
    facts = [
        ("format", "PEFT adapter"),
        ("base", config.base or "not named"),
        ("LoRA", describe_lora(config.rank, config.alpha, targets)),
        ("dropout", str(config.dropout)),
        ("loads here", f"no: {refusal}" if refusal else "yes"),
    ]
    parts = _group(tensors, lambda name: peft.adapter_target(name) or "other", (*targets, "other"))
    beside = peft.fusion_tensors(directory)
    heads = {name: head_name(name) for name in HEADS}
    order = (*heads.values(), "other heads")
    parts += _group(beside, lambda name: heads.get(name.split(".")[0], "other heads"), order)
    return Report(facts, parts)


def describe_release(path: Path) -> Report:
    """A checkpoint of the PyTorch release.

    Raises:
        WeightsError: a file that cannot be read.
    """
    file = release.read_release(path)
    rank, targets = release.lora_rank_and_targets({k: t.shape for k, t in file.tensors.items()})
    kinds = release.head_kinds(file.tensors)
    try:
        release.check_names(file)
        loads = "yes"
    except WeightsError as error:
        loads = f"no: {error}"
    facts = [
        ("format", "checkpoint of the PyTorch release"),
        ("epoch", "not named" if file.epoch is None else str(file.epoch)),
        ("LoRA", describe_lora(rank, release.ALPHA, targets)),
        ("heads", describe_heads(kinds)),
        ("beside", ", ".join(file.others) or "nothing"),
        ("loads here", loads),
    ]
    order = ("LoRA", *map(head_name, HEADS), "other")
    return Report(facts, _group(file.tensors, _release_part, order))


def _release_part(name: str) -> str:
    owner = release.owner(name)
    if owner == "lora":
        return "LoRA"
    return head_name(owner) if owner else "other"


def tree_kinds(fusion: Mapping[str, Any]) -> dict[str, str]:
    """Type of every projector and of the pre-fusion ("multi") of a `fusion` tree."""
    kinds = {}
    for head in HEADS:
        if head in fusion:
            inner = fusion[head].get("head", fusion[head])  # the pre-fusion has one inside
            kind = "attention" if "score" in inner else "mean"
            kinds[head] = "qformer" if "qformer" in inner else kind
    return kinds


def head_name(head: str) -> str:
    """Name of a projector in reports."""
    return "pre-fusion" if HEADS[head].is_pre_fusion else f"{head} head"


def describe_lora(rank: int, alpha: float | None, targets: Sequence[str]) -> str:
    """Rank, scale and targets in words; an alpha of None is not known."""
    if not rank:
        return "none"
    scale = "alpha not named" if alpha is None else f"alpha {alpha:g} (scale {alpha / rank:g})"
    return f"rank {rank}, {scale}, on {', '.join(targets)}"


def describe_heads(kinds: Mapping[str, str]) -> str:
    """Types of the projectors in words."""
    return ", ".join(f"{head_name(h)} {kinds[h]}" for h in HEADS if h in kinds) or "none"


def count(number: int, noun: str) -> str:
    """`1 file`, `2 files`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _group(
    arrays: Mapping[str, Any], part_of: Callable[[str], str], order: Sequence[str]
) -> list[Part]:
    """The arrays by the part that their names belong to."""
    groups: dict[str, list[Any]] = {name: [] for name in order}
    for name, array in arrays.items():
        groups[part_of(name)].append(array)
    return [Part.of(name, group) for name, group in groups.items()]
