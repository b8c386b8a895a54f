"""Safetensors files, tensor by tensor (https://github.com/huggingface/safetensors)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from affectgpt_jax.weights.huggingface import WeightsError

# As the format spells them.
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


class Header(NamedTuple):
    """A tensor without its values."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFiles(NamedTuple):
    """The tensors of one or several files, left on disk.

    Attributes:
        headers: of all tensors, by name.
        read: the values of a name.
    """

    headers: dict[str, Header]
    read: Callable[[str], np.ndarray]


def open_tensors(paths: Iterable[Path]) -> TensorFiles:
    """Read the headers of safetensors files.

    Raises:
        WeightsError: a file that cannot be read, is not whole, or has numbers of an unknown type.
    """
    handles, headers = {}, {}
    for path in paths:
        try:
            handle = safe_open(path, framework="numpy")
        except OSError as error:
            raise WeightsError(f"{path} cannot be read: {error}") from None
        except SafetensorError as error:
            raise WeightsError(f"{path}: not a whole safetensors file: {error}") from None
        for name in handle.keys():
            entry = handle.get_slice(name)
            if entry.get_dtype() not in DTYPES:
                raise WeightsError(
                    f"{path}: the tensor {name} is of the type {entry.get_dtype()}; expected one "
                    f"of {', '.join(DTYPES)}"
                )
            headers[name] = Header(DTYPES[entry.get_dtype()], tuple(entry.get_shape()))
            handles[name] = handle
    return TensorFiles(headers, lambda name: handles[name].get_tensor(name))


def write_tensors(
    path: Path, tensors: Mapping[str, Header], read: Callable[[str], np.ndarray]
) -> None:
    """Write a file with one tensor in memory at a time.

    The format: the header's length in 8 bytes, the header as JSON, the tensors without gaps.

    Args:
        path: the file.
        tensors: their headers, by name.
        read: the values of a name.
    """
    spelled = {dtype: name for name, dtype in DTYPES.items()}
    # Wide elements first, so that all stand at multiples of their size.
    names = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        dtype, shape = tensors[name]
        start, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": spelled[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(np.ascontiguousarray(read(name)).view(np.uint8).data)
