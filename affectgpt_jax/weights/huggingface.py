"""Base models in Hugging Face layout: `config.json`, `*.safetensors`, `tokenizer.json`."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from affectgpt_jax.common.files import path_below
from affectgpt_jax.common.hub import model_name
from affectgpt_jax.common.identity import Identity, files_sha256
from affectgpt_jax.common.json import read_json, write_json
from affectgpt_jax.models.decoder import Decoder, DecoderConfig, init_base
from affectgpt_jax.models.quantize import QuantizedKernel, quantize
from affectgpt_jax.weights.hf_config import from_hf, to_hf
from affectgpt_jax.weights.streaming import (
    HOST_BLOCK,
    StoredTensor,
    Target,
    WeightsError,
    fill_all,
    read_header,
)

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# What may stand beside a model's tensors: the head that a tied checkpoint shares with its
# embedding (`read_config` compares them), and the rotary frequencies of Llama's first files, which
# follow from the config.
_REDUNDANT = (_HEAD, ".self_attn.rotary_emb.inv_freq")


def tensor_name(path: tuple[str | int, ...]) -> str:
    """Hugging Face name of a parameter.

    `("layers", 3, "q_proj", "kernel")` -> `"model.layers.3.self_attn.q_proj.weight"`.
    """
    if path == ("lm_head",):
        return _HEAD
    if path == ("embed_tokens",):
        return _EMBEDDING
    if path[0] == "norm":
        return "model.norm.weight"
    _, layer, module, leaf = path
    group = "self_attn." if module in _ATTENTION else "mlp." if module.endswith("_proj") else ""
    leaf = "bias" if leaf == "bias" else "weight"
    return f"model.layers.{layer}.{group}{module}.{leaf}"


def _transposed(path: tuple[str | int, ...]) -> bool:
    """Whether Hugging Face stores this parameter transposed, as `[out, in]`."""
    return path[-1] in ("kernel", "lm_head")


def base_tensors(tree: Any) -> dict[str, tuple[Any, bool]]:
    """The parameters of a base by their Hugging Face names, and whether those store the transpose.

    A quantized kernel is one parameter.
    """
    found = {}
    for path, leaf in _parameters(tree)[0]:
        # An entry of a tuple has an index, one of a dict a key.
        keys = tuple(getattr(entry, "key", getattr(entry, "idx", None)) for entry in path)
        found[tensor_name(keys)] = leaf, _transposed(keys)
    return found


def read_config(directory: Path) -> DecoderConfig:
    """Read `config.json`.

    A head that is stored beside an embedding of other values is a head of its own, whatever the
    config says of ties: merged models are so, and transformers 5 reads them so.

    Raises:
        WeightsError: no such file, not JSON, or a model this code cannot run.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise WeightsError(
            f"{path}: not found; expected the directory of a model as Hugging Face lays "
            "it out (config.json, *.safetensors, tokenizer.json)"
        )
    config = read_json(path, dict[str, Any], error=WeightsError)
    try:
        found = from_hf(config)
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from None
    if found.tie_word_embeddings and has_own_head(directory):
        found = dataclasses.replace(found, tie_word_embeddings=False)
    return found


def calls_own_head_tied(directory: Path) -> bool:
    """Whether `config.json` calls a head tied that is stored with other values than the embedding.

    Raises:
        WeightsError: no such file, or not JSON.
    """
    config = read_json(Path(directory) / "config.json", dict[str, Any], error=WeightsError)
    return bool(config.get("tie_word_embeddings")) and has_own_head(directory)


def has_own_head(directory: Path) -> bool:
    """Whether a head is stored whose values are not those of the embedding.

    Weights that are missing or cannot be read have none; loading says what is wrong with them.
    """
    try:
        stored = stored_tensors(directory)
        head, embedding = stored.get(_HEAD), stored.get(_EMBEDDING)
        if head is None or embedding is None:
            return False
        # Their bytes are compared once, as long as the files are the same.
        files = [path.stat() for path in (head.path, embedding.path)]
        return not _same_values(head, embedding, *((f.st_mtime_ns, f.st_ino) for f in files))
    except WeightsError:
        return False


@functools.lru_cache(16)
def _same_values(one: StoredTensor, other: StoredTensor, *_files: Any) -> bool:
    if one.shape != other.shape:
        return False
    if len(one.shape) != 2 or 0 in one.shape:
        return True  # no matrix: loading says so
    rows = max(1, HOST_BLOCK * one.shape[0] // max(one.nbytes, other.nbytes, 1))
    blocks = (
        tensor.blocks(0, tensor.shape[0], rows * tensor.nbytes // tensor.shape[0])
        for tensor in (one, other)
    )
    return all(np.array_equal(mine, theirs) for (_, mine), (_, theirs) in zip(*blocks, strict=True))


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, in order.

    Raises:
        WeightsError: none is there, the index names one that is not, cannot be read, or leaves out
            weights that lie beside it.
    """
    directory = Path(directory)
    weight_map = _read_index(directory)
    names = [_SINGLE] if weight_map is None else sorted(set(weight_map.values()))
    for name in names:
        if not path_below(directory, name, WeightsError).is_file():
            pickles = any(directory.glob("*.bin"))
            raise WeightsError(
                f"{directory}: no weights: {name} is missing"
                + (
                    "; *.bin files are not read, since they can run code: convert them with "
                    "from_pretrained and save_pretrained of transformers"
                    if pickles
                    else ""
                )
            )
    if _SINGLE not in names and (directory / _SINGLE).is_file():
        raise WeightsError(
            f"{directory}: holds {_SINGLE} and, by {_INDEX}, the same weights in {len(names)} "
            "other files; remove those that are out of date"
        )
    return [directory / name for name in names]


def _read_index(directory: Path) -> dict[str, str] | None:
    """Tensor -> file name of a checkpoint in several files; None for one in a single file."""
    index = directory / _INDEX
    if not index.is_file():
        return None
    advice = "expected the index that belongs to the *.safetensors beside it"
    weight_map = read_json(index, _Index, error=WeightsError, advice=advice)["weight_map"]
    if not weight_map:
        raise WeightsError(f"{index}: weight_map: it names no tensor; {advice}")
    return weight_map


class _Index(TypedDict):
    """What `model.safetensors.index.json` must have: the file of every tensor."""

    weight_map: dict[str, str]


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint, by name; the index and the files must agree on them."""
    weight_map = _read_index(directory)
    stored: dict[str, StoredTensor] = {}
    for path in weight_files(directory):
        tensors = read_header(path)
        if weight_map is not None:
            named = {name for name, file in weight_map.items() if file == path.name}
            differ = sorted(named ^ tensors.keys())
            if differ:
                lacks = differ[0] in named
                raise WeightsError(
                    f"{path}: {'lacks' if lacks else 'has'} the tensor {differ[0]}, which {_INDEX} "
                    f"{'places' if lacks else 'does not place'} there; take index and files from "
                    "one checkpoint"
                )
        stored.update(tensors)
    return stored


def base_identity(directory: Path) -> Identity:
    """Which frozen base this is: the model's name, and a hash of its shape and weights.

    It reads every byte of the weights, file beside file; again only if the files have changed.
    """
    shape = _identity_shape(read_config(directory))
    files = tuple(weight_files(directory))
    stamps = tuple((s.st_mtime_ns, s.st_ino, s.st_size) for s in (file.stat() for file in files))
    return Identity(model_name(directory), _base_sha256(files, json.dumps(shape), stamps))


@functools.lru_cache(16)
def _base_sha256(files: tuple[Path, ...], shape: str, _stamps: Any) -> str:
    return files_sha256(files, about=json.loads(shape))


def _identity_shape(config: DecoderConfig) -> dict[str, Any]:
    """The fields of a config that enter an identity.

    Fields that came after the first checkpoints count only where they say something: a Qwen2.5
    keeps the identity under which those checkpoints know it.
    """
    shape = dataclasses.asdict(config)
    for name in ("o_bias", "qk_norm", "rope_scaling"):
        if not shape[name]:
            del shape[name]
    return shape


def check_base(directory: Path, config: DecoderConfig) -> None:
    """Compare the stored tensors with those that a base of this shape loads; reads headers alone.

    Raises:
        WeightsError: as `load_base`.
    """
    module = Decoder(config)
    abstract = jax.eval_shape(lambda key: init_base(module, key), jax.random.key(0))
    _check_tensors(directory, stored_tensors(directory), abstract)


def load_base(directory: Path, abstract: Any, shardings: Any) -> Any:
    """Load a base straight into sharded, transposed arrays.

    Args:
        directory: a model directory in Hugging Face layout.
        abstract: the `params` tree of `jax.ShapeDtypeStruct`s to fill; weights are cast to its
            dtypes, or where it has a `QuantizedKernel`, quantized as they are read.
        shardings: a tree of shardings, one a leaf.

    Returns:
        The tree of `jax.Array`s. Each process reads what its devices hold; beside the arrays, host
        memory holds some blocks of rows, not one whole parameter.

    Raises:
        WeightsError: a missing, unexpected or wrongly shaped tensor, an unreadable file, or an
            index that does not belong to its files; the message names tensor and file.
    """
    stored = stored_tensors(Path(directory))
    _check_tensors(directory, stored, abstract)
    treedef = _parameters(abstract)[1]
    targets = {}
    for (name, (leaf, transposed)), placed in zip(
        base_tensors(abstract).items(), treedef.flatten_up_to(shardings), strict=True
    ):
        encode = {"encode": _quantizer(leaf)} if isinstance(leaf, QuantizedKernel) else {}
        targets[name] = Target(leaf, placed, transposed=transposed, **encode)
    fill_all([(target, stored[name]) for name, target in targets.items()])
    return treedef.unflatten(target.value() for target in targets.values())


def _parameters(tree: Any) -> tuple[list[tuple[Any, Any]], Any]:
    """Paths and values of the parameters of a base, a quantized kernel being one, and its
    structure."""
    return jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: isinstance(node, QuantizedKernel)
    )


def _quantizer(kernel: QuantizedKernel) -> Callable[[np.ndarray], QuantizedKernel]:
    """Quantizes rows `[n, in]` of a stored tensor, on the device that JAX computes on.

    A row holds all that is multiplied for one output, so it shares no scale with other rows.
    """
    quantize_rows = _quantize_rows(kernel.precision)
    # The memory of the rows is about to be used again.
    return lambda rows: jax.block_until_ready(quantize_rows(rows))


@functools.cache
def _quantize_rows(precision: str) -> Callable[[np.ndarray], QuantizedKernel]:
    return jax.jit(lambda rows: jax.tree.map(jnp.transpose, quantize(rows.T, precision)))


def _check_tensors(directory: Path, stored: Mapping[str, StoredTensor], abstract: Any) -> None:
    expected = {
        name: leaf.shape[::-1] if transposed else leaf.shape
        for name, (leaf, transposed) in base_tensors(abstract).items()
    }
    for name, shape in expected.items():
        if name not in stored:
            raise WeightsError(f"{directory}: the tensor {name} is missing; expected {shape}")
        if stored[name].shape != shape:
            raise WeightsError(
                f"{stored[name].path}: the tensor {name} is {stored[name].shape}; expected {shape}"
            )
    for name, tensor in stored.items():
        if name not in expected and not name.endswith(_REDUNDANT):
            raise WeightsError(f"{tensor.path}: the tensor {name} is not part of this model")


def save_base(directory: Path, config: DecoderConfig, params: Any) -> None:
    """Write `config.json` and `model.safetensors`, as `transformers` reads them."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, (leaf, transposed) in base_tensors(params).items():
        value = np.asarray(leaf)
        tensors[name] = np.ascontiguousarray(value.T if transposed else value)
    save_file(tensors, directory / _SINGLE, metadata={"format": "pt"})
    dtype = jnp.dtype(params["embed_tokens"].dtype).name
    write_json(directory / "config.json", to_hf(config, dtype))
