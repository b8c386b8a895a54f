"""The arrays of npz archives, as lists of plain values."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from affectgpt_jax.common import plain_pickle
from affectgpt_jax.common.errors import ReadError


def npz_values(
    data: bytes, where: str, names: Sequence[str], allow_pickle: bool
) -> dict[str, list[Any]]:
    """The arrays of an npz archive as lists; of those asked for, the ones that it holds.

    Args:
        data: the file's bytes.
        where: what messages call it.
        names: array names; the others stay unread.
        allow_pickle: read arrays of objects too, through `plain_pickle`, which calls nothing.

    Returns:
        Values by array name, flat; an array without dimensions is a list of one.

    Raises:
        ReadError: a damaged file; objects without `allow_pickle`, or other than plain values.
    """
    found = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for name in names:
                if f"{name}.npy" in archive.namelist():
                    content = archive.read(f"{name}.npy")
                    found[name] = _npy_values(content, f"{where}, {name}", allow_pickle)
    except ReadError:
        raise
    # A damaged archive fails in any layer: zip, deflate, the header, or the values.
    except Exception as error:
        raise ReadError(f"{where} is not a readable npz archive: {_reason(error)}") from None
    return found


def _npy_values(content: bytes, where: str, allow_pickle: bool) -> list[Any]:
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[version]
    shape, _, dtype = read_header(stream)
    if not dtype.hasobject:
        stream.seek(0)
        return np.lib.format.read_array(stream, allow_pickle=False).ravel().tolist()
    if not allow_pickle:
        raise ReadError(
            f"{where} holds pickled Python objects; if you trust its author, say --allow-pickle "
            "(plain containers, text and numbers are read, and nothing is executed)"
        )
    try:
        values = plain_pickle.loads(content[stream.tell() :])
    except plain_pickle.PickleError as error:
        raise ReadError(f"{where}: {error}") from None
    if not isinstance(values, list) or len(values) != np.prod(shape, dtype=int):
        raise ReadError(f"{where}: the pickled values do not fill an array of shape {shape}")
    return values


def _reason(error: Exception) -> str:
    """The first line of a message, which libraries may leave empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
