"""Read and write files of `torch.save` without PyTorch, and without running their contents.

Since version 1.6, PyTorch writes an uncompressed zip: `NAME/data.pkl` is a pickle of the saved
value, whose tensors point to the raw bytes in `NAME/data/KEY`. Here the pickle goes through the
restricted machine of `plain_pickle`, which calls nothing: plain containers, numbers, text and
tensors are read, any other object is an error, wherever in the file it stands. Tensors stay on disk
until they are asked for.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from affectgpt_jax.common import plain_pickle
from affectgpt_jax.common.files import new_path
from affectgpt_jax.common.plain_pickle import Name, PickleError
from affectgpt_jax.common.text import shorten
from affectgpt_jax.weights.streaming import WeightsError

# Storage classes of PyTorch by the dtype of their elements; later dtypes have no class, and their
# tensors name the dtype themselves.
STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
LATER_DTYPES = {f"torch.{kind}": np.dtype(kind) for kind in ("uint16", "uint32", "uint64")}

_LOCAL_HEADER = 30
_MAX_INT = 2**63
_MAX_AXES = 64
# Of the pickle, which has names and sizes but no values.
_MAX_PICKLE = 256 * 2**20
# PyTorch maps a file into memory where its storages stand at multiples of this many bytes.
_ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class Storage:
    """The bytes in the file that one or more tensors share.

    Attributes:
        where: file and key, for messages.
        data: uint8 `[bytes]`, mapped from the file.
        crc: CRC-32 that they must have.
        dtype: of the elements; None where each tensor says it.
    """

    where: str
    data: np.ndarray
    crc: int
    dtype: np.dtype | None


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file: a strided view of a storage.

    Attributes:
        storage: whose elements it shows.
        dtype: of its elements.
        offset: of its first element in the storage, in elements.
        shape: sizes.
        strides: in elements.
    """

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __post_init__(self):
        whole = (self.offset, *self.shape, *self.strides)
        if (
            not len(self.shape) == len(self.strides) <= _MAX_AXES
            or not all(type(i) is int and 0 <= i < _MAX_INT for i in whole)
            or self.size >= _MAX_INT
        ):
            raise PickleError(
                f"a tensor of shape {shorten(self.shape)} with strides {shorten(self.strides)}"
            )
        available = self.storage.data.size // self.dtype.itemsize
        if self.size and self._last >= available:
            raise PickleError(
                f"a tensor of shape {self.shape} that reaches beyond the {available} elements of "
                f"its storage ({self.storage.where})"
            )

    @property
    def _last(self) -> int:
        """The place in the storage of the last element."""
        return self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides))

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def numpy(self) -> np.ndarray:
        """The values, read from the file.

        Raises:
            WeightsError: the bytes are damaged, or the tensor repeats them to become larger.
        """
        if not self.size:
            return np.empty(self.shape, self.dtype)
        data, itemsize = self.storage.data, self.dtype.itemsize
        if self.size > data.size // itemsize:
            raise WeightsError(
                f"{self.storage.where}: a tensor of shape {self.shape} repeats the elements of its "
                "storage; save it with .contiguous()"
            )
        if zlib.crc32(data) != self.storage.crc:
            raise WeightsError(f"{self.storage.where} is damaged: its checksum is wrong")
        # Not the whole storage, whose size need not be a multiple of an element's.
        elements = data[self.offset * itemsize : (self._last + 1) * itemsize].view(self.dtype)
        # The step along an axis of one element may be any number.
        strides = [step * itemsize if n > 1 else 0 for n, step in zip(self.shape, self.strides)]
        return np.lib.stride_tricks.as_strided(elements, self.shape, strides).copy()


def load(path: Path) -> Any:
    """Read a file of `torch.save`.

    Returns:
        The saved value, with a `Tensor` in the place of each tensor or parameter. OrderedDicts are
        dicts (a state dict's attribute `_metadata` is left out), sizes are tuples, devices text,
        and dtypes `plain_pickle.Name`.

    Raises:
        WeightsError: no such file, another format, damage, or objects of other classes.
    """
    path = Path(path)
    data, entries = _open(path)

    def fetch(identity: Any) -> Storage:
        match identity:
            case ("storage", Name(text=kind), str(key), str(), int(count)):
                return _storage(path, data, entries, kind, key, count)
        raise PickleError("a pickle that points to something else than a tensor's storage")

    dialect = plain_pickle.Dialect(_construct, _fill, fetch)
    start, size, crc = entries["data.pkl"]
    if size > _MAX_PICKLE:
        raise WeightsError(f"{path}: data.pkl has {size:,} bytes; at most {_MAX_PICKLE:,} are read")
    program = data[start : start + size].tobytes()
    if zlib.crc32(program) != crc:
        raise WeightsError(f"{path}: data.pkl is damaged: its checksum is wrong")
    try:
        return plain_pickle.loads(program, dialect)
    except PickleError as error:
        raise WeightsError(f"{path} holds {error}") from None


def _open(path: Path) -> tuple[np.ndarray, dict[str, tuple[int, int, int]]]:
    """The file's bytes, mapped, and where each entry stands: start, size, CRC-32.

    Entries go by their names below the archive's only folder, and none is ever a path.
    """
    try:
        data = np.memmap(path, np.uint8, mode="r")
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError:  # an empty file
        raise WeightsError(f"{path} is empty; expected a file of torch.save") from None
    if data[:4].tobytes() != b"PK\x03\x04":
        raise WeightsError(
            f"{path} is no zip file, as torch.save has written since PyTorch 1.6; if it is of an "
            "older version, re-save it: torch.save(torch.load(OLD, weights_only=True), NEW)"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
        names = [info.filename for info in infos]
        folders = [name.split("/")[0] for name in names if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if not folders:
            raise ValueError("it holds no data.pkl")
        names = [name.removeprefix(f"{folders[0]}/") for name in names]
        if len(set(names)) < len(names):
            raise ValueError("it holds two entries of one name")
        entries = {name: _entry(data, info) for name, info in zip(names, infos)}
    # A damaged archive fails in any layer.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise WeightsError(f"{path} is not a whole file of torch.save: {reason}") from None
    start, size, _ = entries.get("byteorder", (0, 0, 0))
    if data[start : start + size].tobytes() == b"big":
        raise WeightsError(f"{path} holds big-endian numbers; re-save it on another machine")
    return data, entries


def _entry(data: np.ndarray, info: zipfile.ZipInfo) -> tuple[int, int, int]:
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise ValueError(f"{info.filename} is compressed or encrypted, which torch.save never does")
    at = info.header_offset
    header = data[at : at + _LOCAL_HEADER].tobytes()
    if not header.startswith(b"PK\x03\x04"):
        raise ValueError(f"{info.filename} does not start where the directory says")
    start = at + _LOCAL_HEADER + sum(struct.unpack_from("<HH", header, 26))
    if start + info.file_size > data.size:
        raise ValueError(f"{info.filename} reaches beyond the end of the file")
    return start, info.file_size, info.CRC


def _storage(
    path: Path,
    data: np.ndarray,
    entries: Mapping[str, tuple[int, int, int]],
    kind: str,
    key: str,
    count: int,
) -> Storage:
    dtype = STORAGES.get(kind.rpartition(".")[2])
    untyped = kind == "torch.storage.UntypedStorage"
    if not kind.startswith("torch.") or not (dtype or untyped):
        raise PickleError(f"a tensor of the kind {shorten(kind)}; expected {', '.join(STORAGES)}")
    if f"data/{key}" not in entries:
        raise PickleError(f"a tensor whose storage {shorten(key)} is missing")
    start, size, crc = entries[f"data/{key}"]
    itemsize = dtype.itemsize if dtype else 1
    if count * itemsize != size:
        raise PickleError(
            f"a tensor whose storage {shorten(key)} has {size} bytes; expected "
            f"{shorten(count * itemsize)}"
        )
    return Storage(f"{path}, data/{key}", data[start : start + size], crc, dtype)


def _construct(name: Name, arguments: tuple[Any, ...]) -> Any:
    """The objects that the calls in a file of `torch.save` construct."""
    match name.text, arguments:
        case "torch._utils._rebuild_tensor_v2", (
            Storage(dtype=np.dtype() as dtype) as storage,
            offset,
            tuple(shape),
            tuple(strides),
            *_,
        ):
            return Tensor(storage, dtype, offset, shape, strides)
        case "torch._utils._rebuild_tensor_v3", (
            Storage(dtype=None) as storage,
            offset,
            tuple(shape),
            tuple(strides),
            _,
            _,
            Name(text=dtype),
            *_,
        ) if dtype in LATER_DTYPES:
            return Tensor(storage, LATER_DTYPES[dtype], offset, shape, strides)
        case "torch._utils._rebuild_parameter", (Tensor() as tensor, *_):
            return tensor
        case "torch.Size", (tuple(sizes),):
            return sizes
        case "torch.device", (str(kind), *_):
            return kind
    # Learning rates may be NumPy's scalars.
    return plain_pickle.NUMPY.construct(name, arguments)


def _fill(target: Any, state: Any) -> None:
    match target, state:
        case dict(), dict():  # attributes of an OrderedDict, such as a state dict's `_metadata`
            return
    plain_pickle.NUMPY.fill(target, state)


def save(path: Path, value: Any) -> None:
    """Write a file that `torch.load(path, weights_only=True)` reads.

    Args:
        path: a file that does not exist yet.
        value: dicts, lists, tuples, text, numbers, None and NumPy arrays, which become tensors.

    Raises:
        WeightsError: the file exists, or cannot be written.
        TypeError: another kind of value.
    """
    arrays: list[np.ndarray] = []
    program = _dumps(value, arrays)
    with new_path(path, WeightsError) as partial, zipfile.ZipFile(partial, "w") as archive:

        def write(name: str, content: bytes) -> None:
            info = zipfile.ZipInfo(f"archive/{name}")
            filler = -(archive.fp.tell() + _LOCAL_HEADER + len(info.filename) + 4) % _ALIGNMENT
            info.extra = struct.pack("<2sH", b"FB", filler) + bytes(filler)
            archive.writestr(info, content)

        write("data.pkl", program)
        write("byteorder", b"little")
        for key, array in enumerate(arrays):
            write(f"data/{key}", array.tobytes())
        write("version", b"3\n")


def _dumps(value: Any, arrays: list[np.ndarray]) -> bytes:
    """The pickle (protocol 2) of a value; its arrays are appended to `arrays` instead."""
    import pickletools  # as in plain_pickle

    codes = {opcode.name: opcode.code.encode("latin-1") for opcode in pickletools.opcodes}
    parts = [codes["PROTO"], b"\x02"]

    def op(name: str, argument: bytes = b"") -> None:
        parts.append(codes[name] + argument)

    def put_name(module: str, attribute: str) -> None:
        op("GLOBAL", f"{module}\n{attribute}\n".encode())

    def put_all(values: Any) -> None:
        op("MARK")
        for one in values:
            put(one)

    def put(value: Any) -> None:
        match value:
            case None:
                op("NONE")
            case bool():
                op("NEWTRUE" if value else "NEWFALSE")
            case int():
                length = value.bit_length() // 8 + 1
                op("LONG1", bytes([length]) + value.to_bytes(length, "little", signed=True))
            case float():
                op("BINFLOAT", struct.pack(">d", value))
            case str():
                text = value.encode("utf-8", "surrogatepass")
                op("BINUNICODE", struct.pack("<I", len(text)) + text)
            case dict():
                op("EMPTY_DICT")
                put_all(itertools.chain.from_iterable(value.items()))
                op("SETITEMS")
            case list():
                op("EMPTY_LIST")
                put_all(value)
                op("APPENDS")
            case tuple():
                put_all(value)
                op("TUPLE")
            case np.ndarray():
                put_tensor(value)
            case _:
                raise TypeError(f"cannot save a {type(value).__name__} as torch.save does")

    def put_tensor(array: np.ndarray) -> None:
        kinds = [name for name, dtype in STORAGES.items() if dtype == array.dtype]
        if not kinds:
            raise TypeError(f"cannot save an array of {array.dtype} as torch.save does")
        put_name("torch._utils", "_rebuild_tensor_v2")
        op("MARK")  # of the arguments
        op("MARK")  # of the storage's identity
        put("storage")
        put_name("torch", kinds[0])
        put(str(len(arrays)))
        put("cpu")
        put(array.size)
        op("TUPLE")
        op("BINPERSID")
        put(0)
        put(array.shape)
        put(tuple(math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim)))
        put(False)  # requires_grad
        put_name("collections", "OrderedDict")  # of hooks
        put(())
        op("REDUCE")
        op("TUPLE")
        op("REDUCE")
        arrays.append(array)

    put(value)
    op("STOP")
    return b"".join(parts)
