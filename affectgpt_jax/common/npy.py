"""NumPy's files of arrays, whose sizes are compared with the file before memory is taken.

Formats: numpy.lib.format, and zip archives of such files. Nothing pickled is loaded.
"""

from __future__ import annotations

import math
import os
import zipfile
from typing import IO

import numpy as np

from affectgpt_jax.common.text import brief

# An entry of an archive that is larger than this, and than this many times what it takes up there,
# is made to fill the memory: features compress to a half at best.
MAX_EXPANDED = 64 * 2**20
MAX_RATIO = 20


def read_npy(file: IO[bytes], size: int) -> np.ndarray:
    """The array of a `.npy` file.

    Args:
        file: at its start.
        size: of the file in bytes.

    Raises:
        ValueError: not such a file, an array of Python objects, or one that is larger than the
            file; the text is the reason.
    """
    shape, dtype = read_header(file)
    if dtype.hasobject:
        raise ValueError("Object arrays cannot be loaded when nothing pickled is")
    if math.prod(shape) * max(dtype.itemsize, 1) > size:
        raise ValueError(
            f"its header names an array {list(shape)}, which {size:,} bytes cannot hold"
        )
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of the array that the rest of a `.npy` file holds.

    Raises:
        ValueError: not such a file.
    """
    try:
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        # Version 3 has names in UTF-8, of the fields of a record, and such arrays are not read.
        shape, _, dtype = read[version](file)
    except KeyError:
        raise ValueError("its version is neither 1 nor 2") from None
    # NumPy parses the header as Python, which may raise any of Python's errors.
    except Exception as error:
        raise ValueError(reason(error)) from None
    if not all(type(n) is int and 0 <= n < 2**63 for n in shape):
        raise ValueError("its header names a shape that no array has")
    return shape, dtype


def read_file(path: str | os.PathLike[str]) -> np.ndarray:
    """The array of a `.npy` file.

    Raises:
        FileNotFoundError: there is none.
        OSError, ValueError: it cannot be read, or as `read_npy`.
    """
    with open(path, "rb") as file:
        return read_npy(file, os.fstat(file.fileno()).st_size)


def open_entry(archive: zipfile.ZipFile, name: str, limit: int = 2**63) -> IO[bytes]:
    """An entry of a zip archive, to be read.

    Args:
        archive: it is open.
        name: of the entry.
        limit: in bytes.

    Raises:
        ValueError: it is larger than `limit`, or expands far more than data does.
        Exception: what `zipfile` raises on damage, also while the entry is read.
    """
    info = archive.getinfo(name)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is compressed in a way that is not read")
    most = min(limit, max(MAX_EXPANDED, MAX_RATIO * info.compress_size))
    if info.file_size > most:
        raise ValueError(
            f"{name} expands from {info.compress_size:,} to {info.file_size:,} bytes; at most "
            f"{most:,} are read"
        )
    return archive.open(name)


def read_entry(archive: zipfile.ZipFile, name: str, limit: int = 2**63) -> bytes:
    """All bytes of an entry; see `open_entry`."""
    with open_entry(archive, name, limit) as file:
        # Without the number, zipfile expands all that is there, whatever its size is said to be.
        return file.read(archive.getinfo(name).file_size)


def read_npz(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """An array of an `.npz` archive.

    Raises:
        KeyError: there is none of this name.
        ValueError: as `read_npy` and `open_entry`.
        Exception: what `zipfile` raises on damage.
    """
    entry = f"{name}.npy"
    with open_entry(archive, entry) as file:
        return read_npy(file, archive.getinfo(entry).file_size)


def reason(error: Exception) -> str:
    """The first line of a message, which libraries may leave empty."""
    lines = str(error).strip().splitlines()
    return brief(lines[0]) if lines else type(error).__name__
