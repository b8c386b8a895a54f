"""Merge LoRA into its base, `W + (alpha / r) A B`, for use with plain `transformers`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from affectgpt_jax.common.files import new_path
from affectgpt_jax.common.json import read_json, write_json
from affectgpt_jax.weights.huggingface import calls_own_head_tied, stored_tensors, tensor_name
from affectgpt_jax.weights.streaming import StoredTensor, WeightsError
from affectgpt_jax.weights.tensors import write_tensors

SHARD_BYTES = 5_000_000_000
# What a model directory holds beside the files that are copied: weights in any format.
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth")


def merge_kernel(
    kernel: np.ndarray, lora_a: np.ndarray, lora_b: np.ndarray, scale: float
) -> np.ndarray:
    """`kernel + scale * lora_a @ lora_b`, computed in float32 or wider, in the kernel's dtype.

    Args:
        kernel: `[..., in, out]`.
        lora_a: `[..., in, r]`.
        lora_b: `[..., r, out]`.
        scale: alpha / r.
    """
    wide = np.result_type(np.float32, kernel.dtype)
    merged = (np.asarray(lora_a, wide) * wide.type(scale)) @ np.asarray(lora_b, wide)
    merged += kernel
    return merged.astype(kernel.dtype)


def save_merged(
    base: Path, out: Path, lora: Any, scale: float, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a base directory with LoRA folded in, as `transformers` reads it.

    Tensors are read, merged and written one by one, in the dtype of the base: a model of any size
    takes the memory of its largest tensor. Config, tokenizer and licence files are copied; a config
    that calls a head of its own tied is mended.

    Args:
        base: a model directory in Hugging Face layout.
        out: a new directory.
        lora: `trainable["lora"]`, arrays or NumPy arrays.
        scale: alpha / r.
        shard_bytes: a file holds no more, unless one tensor alone does; several have an index.

    Raises:
        WeightsError: a tensor that the adapter changes is missing or of another shape, the base
            cannot be read or is quantized, or `out` exists.
    """
    base = Path(base)
    tensors = stored_tensors(base)
    factors = _factors(base, lora, tensors)

    def read(name: str) -> np.ndarray:
        value = tensors[name].read()
        if name in factors:
            lora_a, lora_b = factors[name]
            # It is stored as [out, in], and the transpose of a product is that of the factors.
            value = merge_kernel(value, lora_b.T, lora_a.T, scale)
        return value

    shards = list(_split(tensors, shard_bytes))
    with new_path(out, WeightsError) as partial:
        partial.mkdir()
        weight_map = {}
        for number, names in enumerate(shards, start=1):
            file = "model.safetensors"
            if len(shards) > 1:
                file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write_tensors(partial / file, {name: tensors[name] for name in names}, read)
            weight_map |= dict.fromkeys(names, file)
        if len(shards) > 1:
            total = sum(tensor.nbytes for tensor in tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(partial / "model.safetensors.index.json", index)
        for path in sorted(base.iterdir()):
            if path.is_file() and not path.name.endswith(_WEIGHTS):
                shutil.copyfile(path, partial / path.name)
        if calls_own_head_tied(base):
            # Other programs would believe it, and drop the head.
            config = read_json(base / "config.json", dict[str, Any], error=WeightsError)
            write_json(partial / "config.json", config | {"tie_word_embeddings": False})


def _factors(
    base: Path, lora: Any, tensors: Mapping[str, StoredTensor]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The factors `[in, r]` and `[r, out]` of every tensor that the adapter changes."""
    found = {}
    for target, factors in lora.get("layers", {}).items():
        lora_a, lora_b = (np.asarray(factors[key]) for key in ("lora_a", "lora_b"))
        for i, pair in enumerate(zip(lora_a, lora_b, strict=True)):
            name = tensor_name(("layers", i, target, "kernel"))
            shape = (lora_b.shape[-1], lora_a.shape[-2])
            if name not in tensors:
                raise WeightsError(f"{base}: the tensor {name} is missing, but the adapter has it")
            if tensors[name].shape != shape:
                raise WeightsError(
                    f"{base}: the tensor {name} is {tensors[name].shape}, but the adapter is for "
                    f"{shape}"
                )
            found[name] = pair
    if not found:
        raise WeightsError(f"{base}: this model has no LoRA, so there is nothing to merge into it")
    return found


def _split(tensors: Mapping[str, StoredTensor], limit: int) -> Iterator[list[str]]:
    """Names of tensors, file by file."""
    names, total = [], 0
    for name, tensor in tensors.items():
        if names and total + tensor.nbytes > limit:
            yield names
            names, total = [], 0
        names.append(name)
        total += tensor.nbytes
    yield names
