"""Safetensors files, written tensor by tensor (https://github.com/huggingface/safetensors)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from affectgpt_jax.weights.streaming import DTYPES


def write_tensors(
    path: Path, tensors: Mapping[str, Any], read: Callable[[str], np.ndarray]
) -> None:
    """Write a file with one tensor in memory at a time.

    The format: the header's length in 8 bytes, the header as JSON, the tensors without gaps.

    Args:
        path: the file.
        tensors: arrays, or whatever else has `shape`, `dtype` and `nbytes`, by name.
        read: the values of a name.
    """
    spelled = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
    # Wide elements first, so that all stand at multiples of their size.
    names = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        tensor = tensors[name]
        offsets = [end, end + tensor.nbytes]
        header[name] = {
            "dtype": spelled[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": offsets,
        }
        end = offsets[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(np.ascontiguousarray(read(name)).view(np.uint8).data)
