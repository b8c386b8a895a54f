"""Checkpoints of AffectGPT's PyTorch release: `checkpoint_{epoch:06d}_loss_{loss}.pth`.

A dict of `torch.save`: `model` holds the trained tensors by their PyTorch names, `epoch` a number;
`optimizer`, `scaler` and `config` are not used here (the whole file must still consist of tensors
and plain values, or it is refused). The release builds all heads and the pre-fusion whatever its
input mode reads, so a file usually holds tensors that a config has no place for: those are
reported, never dropped in silence.

Its Linear weights are `[out, in]`, ours `[in, out]`; queries have a leading axis of 1 there. LoRA's
alpha is not in the file: it is 32 at every rank.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from affectgpt_jax.common.text import shorten
from affectgpt_jax.data.modalities import HEADS
from affectgpt_jax.models.lora import LoraConfig
from affectgpt_jax.weights import layout, torch_zip
from affectgpt_jax.weights.peft import (
    adapter_targets,
    cause,
    check_adapter,
    check_sizes,
    lora_layout,
)
from affectgpt_jax.weights.streaming import WeightsError

ALPHA = 32.0
STEPS_PER_EPOCH = 5000

_PROJECTIONS = {
    "multi": "multi_llama_proj",
    "audio": "audio_llama_proj",
    "video": "affectgpt_proj",
    "image": "image_llama_proj",
}
_POSITIONS = {
    "multi": "multi_position_embedding",
    "audio": "audio_position_embedding",
    "video": "video_frame_position_embedding",
}
_LINEARS = {
    ("audio", "score"): "audio_attention_mlp",
    ("video", "score"): "video_attention_mlp",
    ("multi", "video_projection"): "multi_video_embs",
    ("multi", "audio_projection"): "multi_audio_embs",
    ("multi", "hidden"): "attention_mlp",
    ("multi", "score"): "fc_att",
    **{(module, "projection"): name for module, name in _PROJECTIONS.items()},
}
# Inside a Q-Former: BERT's names, with a feed-forward branch of the queries.
_QFORMER = {
    ("self_attention", "output"): "attention.output.dense",
    ("self_attention_norm",): "attention.output.LayerNorm",
    ("cross_attention", "output"): "crossattention.output.dense",
    ("cross_attention_norm",): "crossattention.output.LayerNorm",
    ("feed_forward", "intermediate"): "intermediate_query.dense",
    ("feed_forward", "output"): "output_query.dense",
    ("feed_forward_norm",): "output_query.LayerNorm",
    **{
        (ours, part): f"{theirs}.self.{part}"
        for ours, theirs in (("self_attention", "attention"), ("cross_attention", "crossattention"))
        for part in ("query", "key", "value")
    },
}
_LORA = re.compile(r"llama_model\.(base_model\.model\.model\..+\.lora_[AB])\.default\.weight")
# The heads, and the pre-fusion, by the modules of the release that they consist of.
_OWNERS = {
    **{theirs: ours[0] for ours, theirs in _LINEARS.items()},
    **{theirs: ours for ours, theirs in _POSITIONS.items()},
    **{f"{ours}_{kind}": ours for ours in _POSITIONS for kind in ("Qformer", "query_tokens")},
}
# Buffers, which the release saves along with what it trains.
_BUFFER = re.compile(r"(?:visual|acoustic)_encoder\..+|.+\.(?:position_ids|inv_freq)")


@dataclasses.dataclass(frozen=True)
class ReleaseFile:
    """A checkpoint of the release, its tensors left on disk.

    Attributes:
        path: the file.
        tensors: what was trained, by name, without the prefix `module.` of wrapped models.
        epoch: of training; None where the file has none.
        others: the keys beside `model`.
    """

    path: Path
    tensors: Mapping[str, torch_zip.Tensor]
    epoch: int | None
    others: tuple[str, ...]


def read_release(path: Path) -> ReleaseFile:
    """Read what a checkpoint holds.

    Raises:
        WeightsError: no such file, another format, objects other than tensors and plain values, or
            no dict of tensors under `model`.
    """
    path = Path(path)
    content = torch_zip.load(path)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise WeightsError(
            f"{path} is not a checkpoint of the release; expected a dict with the trained tensors "
            "under the key 'model'"
        )
    tensors = content["model"]
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, torch_zip.Tensor):
            raise WeightsError(
                f"{path}: model[{shorten(name)}] is of type {type(value).__name__}; expected a "
                "tensor"
            )
    if tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    epoch = content.get("epoch")
    others = tuple(key for key in content if isinstance(key, str) and key != "model")
    return ReleaseFile(path, tensors, epoch if isinstance(epoch, int) else None, others)


def release_layout(path: layout.Path) -> layout.Stored:
    """The stored form in the release of a parameter of `trainable`, by its path.

    Raises:
        WeightsError: it has no such parameter: Q-Formers for images are ours alone, as are heads of
            modalities that the release does not have.
    """
    if path[0] == "lora":
        return lora_layout(path[1:], "llama_model.base_model.model.", ".default.weight")
    # The pre-fusion of type Q-Former is a head with two projections before it.
    _, module, *middle, leaf = (part for part in path if part != "head")
    if module not in _PROJECTIONS:
        raise WeightsError(f"the release has no {module} head; use a config.input without it")
    if leaf in ("queries", "positions") or middle[0] == "qformer":
        if module not in _POSITIONS:
            raise WeightsError(
                f"the release has no Q-Former for {module}s; use --config.projectors.{module}=mean"
            )
    if leaf == "queries":
        return layout.Stored(f"{module}_query_tokens", batched=True)
    if leaf == "positions":
        return layout.Stored(f"{_POSITIONS[module]}.weight")
    name = _LINEARS.get((module, *middle)) or f"{module}_Qformer.bert.{_qformer_name(middle)}"
    kind = "bias" if leaf == "bias" else "weight"
    return layout.Stored(f"{name}.{kind}", transposed=leaf == "kernel")


def _qformer_name(middle: list[str]) -> str:
    """`[qformer, layer_1, feed_forward, output]` -> `encoder.layer.1.output_query.dense`."""
    _, part, *rest = middle
    if part == "queries_norm":
        return "embeddings.LayerNorm"
    return f"encoder.layer.{part.removeprefix('layer_')}.{_QFORMER[tuple(rest)]}"


def owner(name: str) -> str | None:
    """The part that a tensor of the release belongs to: "lora", a projector, "multi", or None."""
    return "lora" if _LORA.fullmatch(name) else _OWNERS.get(name.split(".")[0])


def head_kinds(names: Iterable[str]) -> dict[str, str]:
    """Type of every projector, and of the pre-fusion ("multi"), by the names of the tensors."""
    names = set(names)
    kinds = {}
    for module, projection in _PROJECTIONS.items():
        if f"{projection}.weight" in names:
            weights = _LINEARS.get((module, "score"), "")
            if f"{module}_query_tokens" in names:
                kinds[module] = "qformer"
            else:
                kinds[module] = "attention" if f"{weights}.weight" in names else "mean"
    return kinds


def lora_rank_and_targets(tensors: Mapping[str, layout.Shape]) -> tuple[int, tuple[str, ...]]:
    """Rank and projections of the adapters among tensors, by their shapes; 0 without any."""
    peft_names = {match[1]: name for name in tensors if (match := _LORA.fullmatch(name))}
    downward = [tensors[name] for short, name in peft_names.items() if short.endswith("A")]
    ranks = [shape[0] for shape in downward if shape]
    return max(ranks, default=0), adapter_targets(peft_names)


def check_names(file: ReleaseFile) -> None:
    """Refuse a file whose tensors are not those of the release.

    Raises:
        WeightsError: no tensors, one without values, or one of another name; with a cause.
    """
    check_sizes(file.path, {name: tensor.shape for name, tensor in file.tensors.items()})
    for name in file.tensors:
        if owner(name) is None and not _BUFFER.fullmatch(name):
            raise WeightsError(
                f"{file.path}: the tensor {name} is not part of this model{cause(name)}"
            )


def open_release(
    path: Path, abstract: Any, lora: LoraConfig | None
) -> tuple[Callable[[Any], Any], list[str]]:
    """Compare a checkpoint of the release with a model, without its values.

    Args:
        path: the `.pth` file.
        abstract: the `trainable` tree of `jax.ShapeDtypeStruct`s that it is to fill.
        lora: config of its adapters; None without any.

    Returns:
        What reads the values into such a tree, cast to its dtypes and placed by its shardings,
        where it has them; and the names of the tensors that it has no place for, such as heads
        that the config's input mode does not read: show them to the user.

    Raises:
        WeightsError: another rank, alpha, set of targets or type of a head than the config's, a
            missing, unknown or wrongly shaped tensor, or a file that cannot be read.
    """
    file = read_release(path)
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    expected = layout.expected_shapes(abstract, release_layout)
    check_names(file)
    rank, targets = lora_rank_and_targets(shapes)
    if rank or lora:
        check_adapter(file.path, rank, ALPHA, targets, lora)
    for name in shapes:
        known = owner(name) in _PROJECTIONS or _BUFFER.fullmatch(name)
        if name not in expected and not known:
            raise WeightsError(f"{path}: the tensor {name} is not part of this model")
    there = head_kinds(shapes)
    for module, kind in head_kinds(expected).items():
        if there.get(module, kind) != kind:
            key = f"config.{HEADS[module].kind_key}"
            raise WeightsError(
                f"{path}: its {module} head is of type {there[module]}, but {key} is {kind}; set "
                "it to the checkpoint's type"
            )
    if trouble := layout.compare_shapes(shapes, expected):
        raise WeightsError(
            f"{path}: {trouble}; name the base and the config that it was trained with"
        )

    def read(abstract: Any) -> Any:
        return layout.from_tensors(
            abstract, release_layout, lambda name: file.tensors[name].numpy()
        )

    return read, sorted(shapes.keys() - expected.keys())


def save_release(
    path: Path,
    trainable: Any,
    lora: LoraConfig | None,
    *,
    epoch: int,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write adapters, projectors and pre-fusion as the release loads them, bit for bit.

    The file has no `optimizer` and no `scaler`: it can be run and trained on, not resumed.

    Args:
        path: a new file.
        trainable: the tree.
        lora: config of its adapters; None without any.
        epoch: of the release, which are 5,000 steps.
        config: of the run: text, numbers, lists and dicts.

    Raises:
        WeightsError: an alpha other than 32, which the release's code is fixed to, a Q-Former for
            images, which it lacks, or a file that exists.
    """
    if lora and trainable["lora"] and lora.alpha != ALPHA:
        raise WeightsError(
            f"{path}: the release scales every adapter by 32 / rank, but this one was trained "
            f"with config.lora.alpha={lora.alpha}; export it as a PEFT adapter, or train with 32"
        )
    tensors = layout.to_tensors(trainable, release_layout)
    torch_zip.save(path, {"model": tensors, "epoch": epoch, "config": dict(config or {})})
