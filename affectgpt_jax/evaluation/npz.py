"""The arrays of npz archives, as lists of plain values."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Sequence
from typing import Any

from affectgpt_jax.common import npy, plain_pickle
from affectgpt_jax.common.errors import ReadError

# Of an array of labels, far more than any set has: as Python's values it takes ten times as much.
MAX_BYTES = 64 * 2**20


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
                    content = npy.read_entry(archive, f"{name}.npy", MAX_BYTES)
                    found[name] = _npy_values(content, f"{where}, {name}", allow_pickle)
    except ReadError:
        raise
    # A damaged archive fails in any layer: zip, deflate, the header, or the values.
    except Exception as error:
        raise ReadError(f"{where} is not a readable npz archive: {npy.reason(error)}") from None
    return found


def _npy_values(content: bytes, where: str, allow_pickle: bool) -> list[Any]:
    stream = io.BytesIO(content)
    shape, dtype = npy.read_header(stream)
    if not dtype.hasobject:
        return npy.read_npy(io.BytesIO(content), len(content)).ravel().tolist()
    if not allow_pickle:
        raise ReadError(
            f"{where} holds pickled Python objects; if you trust its author, say --allow-pickle "
            "(plain containers, text and numbers are read, and nothing is executed)"
        )
    try:
        values = plain_pickle.loads(content[stream.tell() :])
    except plain_pickle.PickleError as error:
        raise ReadError(f"{where}: {error}") from None
    if not isinstance(values, list) or len(values) != math.prod(shape):
        raise ReadError(f"{where}: the pickled values do not fill an array of shape {list(shape)}")
    return values
