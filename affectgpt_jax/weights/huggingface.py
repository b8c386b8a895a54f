"""Qwen2 base models in Hugging Face layout: `config.json`, `*.safetensors`, `tokenizer.json`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from affectgpt_jax.models.qwen2 import Qwen2Config

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class WeightsError(ValueError):
    """A base model directory that cannot be read."""


def tensor_name(path: tuple[str, ...]) -> tuple[str, bool]:
    """Hugging Face name of a parameter, and whether it is one of the stacked layers.

    A layer's name holds `{}` where the layer number goes:
    `("layers", "q_proj", "kernel")` -> `("model.layers.{}.self_attn.q_proj.weight", True)`.
    """
    if path == ("lm_head",):
        return "lm_head.weight", False
    if path == ("embed_tokens",):
        return "model.embed_tokens.weight", False
    if path[0] == "norm":
        return "model.norm.weight", False
    _, module, leaf = path
    group = "self_attn." if module in _ATTENTION else "mlp." if module.endswith("_proj") else ""
    leaf = "bias" if leaf == "bias" else "weight"
    return f"model.layers.{{}}.{group}{module}.{leaf}", True


def _transposed(path: tuple[str, ...]) -> bool:
    """Whether Hugging Face stores this parameter as `[out, in]` where we hold `[in, out]`."""
    return path[-1] in ("kernel", "lm_head")


def _keys(path) -> tuple[str, ...]:
    return tuple(entry.key for entry in path)


def read_config(directory: Path) -> Qwen2Config:
    """Read `config.json`.

    Raises:
        WeightsError: no such file, not JSON, or a model this code cannot run.
    """
    path = Path(directory) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")
        return Qwen2Config.from_hf(config)
    except FileNotFoundError:
        raise WeightsError(
            f"{path}: not found; expected the directory of a Qwen2.5 model as Hugging Face lays "
            "it out (config.json, *.safetensors, tokenizer.json)"
        ) from None
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from None


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, in order.

    Raises:
        WeightsError: none is there, the index names one that is not, or cannot be read.
    """
    directory = Path(directory)
    index = directory / _INDEX
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise WeightsError(
                f"{index}: not an index of weights; expected JSON with the key 'weight_map'"
            ) from None
    else:
        names = [_SINGLE]
    for name in names:
        if not (directory / name).is_file():
            raise WeightsError(f"{directory}: no weights: {name} is missing")
    return [directory / name for name in names]


@dataclasses.dataclass(frozen=True)
class BaseIdentity:
    """Which frozen base an adapter belongs to: directory name and SHA-256 of its weights."""

    name: str
    sha256: str


def base_identity(directory: Path) -> BaseIdentity:
    """Hash the model's shape and weights; reads every byte of the latter."""
    shape = dataclasses.asdict(read_config(directory))
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True).encode())
    for path in weight_files(directory):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return BaseIdentity(Path(directory).name, digest.hexdigest())


def load_base(directory: Path, abstract: Any, shardings: Any) -> Any:
    """Load a base straight into sharded, stacked, transposed arrays.

    Args:
        directory: a model directory in Hugging Face layout.
        abstract: the `params` tree of `jax.ShapeDtypeStruct`s to fill; weights are cast to its
            dtypes.
        shardings: a tree of shardings, one a leaf.

    Returns:
        The tree of `jax.Array`s. Each process reads the slices its devices hold, layer by layer.

    Raises:
        WeightsError: a missing, unexpected or wrongly shaped tensor, or an unreadable file; the
            message names tensor and file.
    """
    files = {}
    for path in weight_files(directory):
        try:
            # NumPy, not "flax": that would send every slice through the first device.
            handle = safe_open(path, framework="numpy")
        except SafetensorError as error:
            raise WeightsError(f"{path}: not a whole safetensors file: {error}") from None
        files.update(dict.fromkeys(handle.keys(), handle))
    _check_tensors(directory, files, abstract)

    def load(path, leaf: jax.ShapeDtypeStruct, sharding) -> jax.Array:
        keys = _keys(path)
        name, stacked = tensor_name(keys)
        transposed = _transposed(keys)

        def one(name: str, index: tuple[slice, ...]) -> np.ndarray:
            source = files[name].get_slice(name)
            value = np.asarray(source[index[::-1] if transposed else index])
            return (value.T if transposed else value).astype(leaf.dtype)

        def block(index: tuple[slice, ...]) -> np.ndarray:
            if not stacked:
                return one(name, index)
            layers = range(*index[0].indices(leaf.shape[0]))
            return np.stack([one(name.format(i), index[1:]) for i in layers])

        return jax.make_array_from_callback(leaf.shape, sharding, block)

    return jax.tree_util.tree_map_with_path(load, abstract, shardings)


def _check_tensors(directory: Path, files: Mapping[str, Any], abstract: Any) -> None:
    expected = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        keys = _keys(path)
        name, stacked = tensor_name(keys)
        shape = leaf.shape[1:] if stacked else leaf.shape
        shape = shape[::-1] if _transposed(keys) else shape
        for i in range(leaf.shape[0] if stacked else 1):
            expected[name.format(i)] = shape
    for name, shape in expected.items():
        if name not in files:
            raise WeightsError(f"{directory}: the tensor {name} is missing; expected {shape}")
        found = tuple(files[name].get_slice(name).get_shape())
        if found != shape:
            raise WeightsError(f"{directory}: the tensor {name} is {found}; expected {shape}")
    for name in files:
        # Tied checkpoints may carry the head they share with the embedding.
        if name not in expected and name != "lm_head.weight":
            raise WeightsError(f"{directory}: the tensor {name} is not part of this model")


def save_base(directory: Path, config: Qwen2Config, params: Any) -> None:
    """Write `config.json` and `model.safetensors`, as `transformers` reads them."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, np.ndarray] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        keys = _keys(path)
        name, stacked = tensor_name(keys)
        value = np.asarray(leaf)
        for i, one in enumerate(value if stacked else [value]):
            tensors[name.format(i)] = np.ascontiguousarray(one.T if _transposed(keys) else one)
    save_file(tensors, directory / _SINGLE, metadata={"format": "pt"})
    dtype = jnp.dtype(params["embed_tokens"].dtype).name
    (directory / "config.json").write_text(
        json.dumps(hf_config(config, dtype), indent=2) + "\n", encoding="utf-8"
    )


def hf_config(config: Qwen2Config, dtype: str) -> dict[str, Any]:
    """The `config.json` of a model; `rope_theta` and `torch_dtype` are written in the spelling
    that every version of transformers reads."""
    values = dataclasses.asdict(config)
    del values["qkv_bias"]
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "torch_dtype": dtype,
        **values,
    }
