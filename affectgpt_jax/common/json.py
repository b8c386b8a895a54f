"""JSON from outside, with limits and checked types, and files of one record a line.

The types of a document are said in Python: `dict[str, int]`, `tuple[int, str]`, `float | None`, a
`TypedDict` (an object that may have more keys), or a dataclass (an object with exactly these keys,
of which an instance is made). A value of another type is refused by file and key.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
import types
import typing
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Self

from affectgpt_jax.common.errors import ReadError, UserError
from affectgpt_jax.common.files import decode, naming, open_to_append, read_bytes, write_text
from affectgpt_jax.common.text import json_line, shorten

# Far more than any document has that this package reads as a whole; in memory it is several times
# as large.
MAX_BYTES = 64 * 2**20
MAX_DEPTH = 100
# Of a whole number, as the formats have that other languages read.
MAX_INT = 2**63 - 1

_NAMES = {
    Any: "any value",
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
    list: "a list",
    tuple: "a list",
    dict: "a JSON object",
}


class _Mismatch(Exception):
    """A value of another type than expected: its key, and what is wrong with it."""

    def __init__(self, key: str, what: str):
        self.key, self.what = key, what


def read_json(
    path: str | os.PathLike[str],
    kind: Any = Any,
    *,
    error: type[UserError] = ReadError,
    advice: str = "",
) -> Any:
    """A JSON file.

    Args:
        path: the file, in UTF-8.
        kind: the type that its value must have.
        error: the class to raise.
        advice: what to do about a file that is not so, for messages.

    Raises:
        ReadError: it cannot be read, is larger than `MAX_BYTES`, or as `parse_json`.
    """
    try:
        data = read_bytes(path, MAX_BYTES)
    except ReadError as trouble:
        raise error(f"{trouble}{_ending(advice)}") from None
    return parse_json(data, str(path), kind, error=error, advice=advice)


def parse_json(
    data: bytes | str,
    where: str,
    kind: Any = Any,
    *,
    error: type[UserError] = ReadError,
    advice: str = "",
) -> Any:
    """The value of a JSON text.

    Args:
        data: UTF-8 bytes, or text.
        where: what messages call it.
        kind, error, advice: as for `read_json`.

    Raises:
        ReadError: no JSON, nested deeper than `MAX_DEPTH`, an object with a key twice, or a value
            of another type than `kind`; the message has the key.
    """
    ending = _ending(advice)
    if isinstance(data, bytes):
        text = decode(data, where, advice=advice or "save it as UTF-8", error=error)
    else:
        text = data
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys)
        # Most texts cannot be that deep, and need no second look.
        if text.count("[") + text.count("{") > MAX_DEPTH and is_deep(value):
            raise RecursionError
    except RecursionError:
        raise error(
            f"{where}: nested deeper than {MAX_DEPTH} levels, the most that is read{ending}"
        ) from None
    except ValueError as trouble:
        raise error(f"{where}: not JSON: {shorten(str(trouble), 200)}{ending}") from None
    return check_type(value, kind, where, error=error, advice=advice)


def _ending(advice: str) -> str:
    return f"; {advice}" if advice else ""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key more than once in {[key for key, _ in pairs]}")
    return found


def is_deep(value: Any) -> bool:
    """Whether dicts and lists are nested deeper than `MAX_DEPTH`, the outermost counted."""
    level = [value]
    for _ in range(MAX_DEPTH):
        nested = [v for v in level if isinstance(v, dict | list)]
        level = [x for v in nested for x in (v.values() if isinstance(v, dict) else v)]
    return any(isinstance(v, dict | list) for v in level)


def write_json(path: str | os.PathLike[str], value: Any, indent: int | None = 2) -> None:
    """Write or replace a JSON file, whole or not at all.

    Raises:
        OSError: as `files.atomic_write`.
        ValueError, TypeError: a value that JSON does not have.
    """
    write_text(path, json.dumps(value, indent=indent) + "\n")


# --- types --------------------------------------------------------------------------------------


def check_type(
    value: Any, kind: Any, where: str, *, error: type[UserError] = ReadError, advice: str = ""
) -> Any:
    """A value out of JSON as the type that it must have.

    Args:
        value: the value; its lists become tuples, and its objects dataclasses, where `kind` has
            them.
        kind: as this module says.
        where, error, advice: as for `parse_json`.

    Raises:
        ReadError: it is of another type; the message has the key.
    """
    try:
        return _checked(value, kind, "")
    except _Mismatch as mismatch:
        place = f"{where}: {mismatch.key}" if mismatch.key else where
        raise error(f"{place}: {mismatch.what}{_ending(advice)}") from None


def _checked(value: Any, kind: Any, key: str) -> Any:
    origin, arguments, has_fields = _taken_apart(kind)
    if origin is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _checked_union(value, arguments, key)
    if origin is typing.Literal:
        if any(type(value) is type(choice) and value == choice for choice in arguments):
            return value
        choices = ", ".join(map(repr, arguments))
        raise _Mismatch(key, f"expected one of {choices}, found {shorten(value)}")
    if has_fields:
        return _checked_fields(value, kind, key)
    if origin is float and type(value) in (int, float):
        # JSON has no NaN and no infinity, but Python reads them, and 1e999.
        if not -sys.float_info.max <= value <= sys.float_info.max:
            raise _Mismatch(key, f"expected a finite number, found {shorten(value)}")
        return float(value)
    if origin is int and type(value) is int and abs(value) > MAX_INT:
        raise _Mismatch(key, f"expected a whole number of at most 64 bits, found {shorten(value)}")
    # Not isinstance: to Python, true and false are whole numbers.
    if type(value) is not (list if origin is tuple else origin):
        raise _mismatch(value, kind, key)
    if origin is tuple and arguments and Ellipsis not in arguments:
        if len(value) != len(arguments):
            raise _Mismatch(key, f"expected {len(arguments)} values, found {shorten(value)}")
        return tuple(
            _checked(v, k, f"{key}[{i}]") for i, (v, k) in enumerate(zip(value, arguments))
        )
    if origin in (list, tuple) and arguments:
        return origin(_checked(v, arguments[0], f"{key}[{i}]") for i, v in enumerate(value))
    if origin is dict and arguments:
        return {k: _checked(v, arguments[1], _below(key, k)) for k, v in value.items()}
    return value


@functools.cache
def _taken_apart(kind: Any) -> tuple[Any, tuple[Any, ...], bool]:
    """Origin and arguments of a type, and whether it is an object of known keys."""
    has_fields = typing.is_typeddict(kind) or dataclasses.is_dataclass(kind)
    return typing.get_origin(kind) or kind, typing.get_args(kind), has_fields


def _checked_union(value: Any, kinds: tuple[Any, ...], key: str) -> Any:
    within = None
    for kind in kinds:
        try:
            return _checked(value, kind, key)
        except _Mismatch as mismatch:
            if mismatch.key != key:  # the value has the type, and one inside of it has not
                within = mismatch
    raise within or _mismatch(value, kinds, key)


def _checked_fields(value: Any, kind: Any, key: str) -> Any:
    if type(value) is not dict:
        raise _mismatch(value, dict, key)
    hints, required = _fields(kind)
    if missing := sorted(required - value.keys()):
        raise _Mismatch(key, f"the key {missing[0]!r} is missing")
    unknown = sorted(value.keys() - hints.keys())
    if unknown and dataclasses.is_dataclass(kind):
        raise _Mismatch(key, f"the key {shorten(unknown[0])} is unknown")
    known = {k: _checked(value[k], hint, _below(key, k)) for k, hint in hints.items() if k in value}
    return kind(**known) if dataclasses.is_dataclass(kind) else value | known


@functools.cache
def _fields(kind: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """Types by key, and the keys that must be there."""
    hints = typing.get_type_hints(kind)
    if not dataclasses.is_dataclass(kind):
        return hints, kind.__required_keys__
    missing = dataclasses.MISSING
    required = (
        field.name
        for field in dataclasses.fields(kind)
        if field.default is missing and field.default_factory is missing
    )
    return hints, frozenset(required)


def _below(key: str, name: str) -> str:
    name = name if name.isidentifier() else shorten(name, 40)
    return f"{key}.{name}" if key else name


def _mismatch(value: Any, kind: Any, key: str) -> _Mismatch:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    # Unions of the same types are the same to Python, in whatever order they were written.
    names = sorted(_NAMES.get(typing.get_origin(k) or k, "a JSON object") for k in kinds)
    return _Mismatch(key, f"expected {' or '.join(names)}, found {shorten(value)}")


# --- a record a line ----------------------------------------------------------------------------


def json_lines(
    data: bytes,
    where: str,
    kind: Any = dict,
    *,
    error: type[UserError] = ReadError,
    advice: str = "",
) -> Iterator[tuple[int, Any]]:
    """Line number and value of each line of a JSONL file; blank lines have none.

    Args:
        data: the file's bytes, UTF-8.
        where, kind, error, advice: as for `parse_json`, of each line.

    Raises:
        ReadError: as `parse_json`; the message has the line.
    """
    # Not splitlines(), which takes characters that JSON may hold inside a text for line ends.
    for number, line in enumerate(decode(data, where, error=error).split("\n"), start=1):
        if line.strip():
            place = f"{where}, line {number}"
            yield number, parse_json(line, place, kind, error=error, advice=advice)


class ResumableJsonl:
    """Records that a program appends to a JSONL file, and finds again when it is started anew.

    A killed program leaves half a line at most, the last one: it is no record, and goes when the
    next one is written. Any other damage is refused.

    Used as a context manager, it opens the file at once, so that trouble shows before the work, and
    keeps other writers out until it is closed.

    Args:
        path: the file; it and its folder are made with the first record.
        kind: of a record, a `TypedDict`.
        keys: the keys whose values tell records apart; of two that have them in common, the later
            one counts.
        error, advice: as for `read_json`.

    Attributes:
        records: by the values of `keys`, a tuple of them, the records that are there.
        torn: whether half a line was found.

    Raises:
        ReadError: a file that cannot be read, or a line that is not a record.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        kind: Any,
        keys: tuple[str, ...],
        *,
        error: type[UserError] = ReadError,
        advice: str = "",
    ):
        self.path = Path(path)
        self.records: dict[tuple[Hashable, ...], dict[str, Any]] = {}
        self.torn = False
        self._keys, self._file = keys, None
        self._size = self._whole = 0  # bytes of the file, and of its whole lines
        if os.path.lexists(self.path):
            data = read_bytes(self.path, error=error)
            whole = data[: data.rfind(b"\n") + 1]
            self.torn = len(whole) < len(data)
            self._size, self._whole = len(data), len(whole)
            lines = json_lines(whole, str(self.path), kind, error=error, advice=advice)
            self.records = {self._key(record): record for _, record in lines}

    def _key(self, record: Mapping[str, Any]) -> tuple[Hashable, ...]:
        return tuple(record[key] for key in self._keys)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record; it is with the operating system when this returns.

        Raises:
            FileInUse, ReadError: another process writes the file, or has written it.
            OSError: the file cannot be written.
        """
        if self._file is None:
            with self:
                self.append(record)
            return
        # Readable as it is, but for what no file or terminal should be given, such as surrogates.
        line = json_line(json.dumps(record, ensure_ascii=False, allow_nan=False)) + "\n"
        with naming(self.path):
            self._file.write(line)
            self._file.flush()
        self._size = self._whole = self._whole + len(line.encode())
        self.records[self._key(record)] = dict(record)

    def _open(self) -> IO[str]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = open_to_append(self.path, alone=True)
        try:
            size = os.fstat(file.fileno()).st_size
            if size != self._size:
                raise ReadError(
                    f"{self.path} has changed since it was read, from {self._size:,} to {size:,} "
                    "bytes; run this again, and one at a time"
                )
            if self._whole < size:
                with naming(self.path):
                    file.truncate(self._whole)
                self._size = self._whole
        except BaseException:
            file.close()
            raise
        return file

    def __enter__(self) -> Self:
        self._file = self._open()
        return self

    def __exit__(self, *_: object) -> None:
        file, self._file = self._file, None
        with naming(self.path):  # what could not be written is tried again
            file.close()
