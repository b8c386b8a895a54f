"""Pickled plain values, read without running anything.

A pickle is a program for a stack machine, and Python's own machine imports and calls whatever the
program names. This one knows containers, text and numbers. Names stand for data here and are never
looked up: a dialect says what the few that it knows mean, and any other is an error. The dialect of
this module is what NumPy writes for its arrays, types and scalars.

The work and the memory that a pickle takes are bounded by its size: it cannot expand a value that
it holds once into many, use keys that are slow to hash, or nest deeper than `MAX_DEPTH`.
Opcodes: https://github.com/python/cpython/blob/main/Lib/pickletools.py
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from affectgpt_jax.common.text import shorten

VALUES = frozenset(
    """INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
    STRING BINSTRING SHORT_BINSTRING UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8
    SHORT_BINBYTES BINBYTES BINBYTES8""".split()
)
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
CONTAINERS = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
FROM_MARK = {"TUPLE": tuple, "LIST": list, "FROZENSET": frozenset}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
IGNORED = ("PROTO", "FRAME")
# Containers within containers, of a value that is read.
MAX_DEPTH = 100
# Below it whole numbers are their own hashes, so that different ones hardly collide.
MAX_KEY = 2**61 - 1


class PickleError(ValueError):
    """A pickle that is damaged, or holds more than plain values."""


class Array(list):
    """A NumPy array's values, flat; filled by the instruction after the one that makes it."""


@dataclasses.dataclass
class DType:
    """A NumPy type, whose byte order comes with the instruction after the one that makes it."""

    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class Name:
    """A module's attribute, as text."""

    text: str


@dataclasses.dataclass(frozen=True)
class Dialect:
    """What a pickle may hold beside plain containers, text and numbers.

    Attributes:
        construct: the value that a call of a name, with a tuple of arguments, stands for.
        fill: takes a value and the state that the pickle sets on it.
        fetch: the value of a persistent id, which points to data beside the pickle.

    Each raises PickleError for what it does not know.
    """

    construct: Callable[[Name, tuple[Any, ...]], Any]
    fill: Callable[[Any, Any], None]
    fetch: Callable[[Any], Any]


def loads(data: bytes, dialect: Dialect | None = None) -> Any:
    """The value of a pickle; OrderedDicts become dicts.

    Args:
        data: the pickle.
        dialect: default `NUMPY`, under which arrays become flat lists.

    Raises:
        PickleError: damage, an object of a class, a function, or an instruction for either; a value
            that holds itself, is nested too deep, or takes far more memory than the pickle.
    """
    try:
        value = _run(data, dialect or NUMPY)
        _nesting(value, {})
        return value
    except PickleError:
        raise
    # Damage surfaces as any error of the stack, the memo or the values.
    except Exception as error:
        raise PickleError(f"a damaged pickle ({type(error).__name__})") from None


def _run(data: bytes, dialect: Dialect) -> Any:
    import pickletools  # here, because few files need it

    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    # Values that a call copies out of others; an honest pickle uses each of those once.
    copied = 0

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for opcode, argument, _ in pickletools.genops(data):
        match opcode.name:
            case name if name in VALUES:
                stack.append(argument)
            case name if name in CONSTANTS:
                stack.append(CONSTANTS[name])
            case name if name in CONTAINERS:
                stack.append(CONTAINERS[name]())
            case name if name in FROM_MARK:
                items = since_mark()
                if name == "FROZENSET":
                    _check_keys(items)
                stack.append(FROM_MARK[name](items))
            case name if name in TUPLES:
                stack[-TUPLES[name] :] = [tuple(stack[-TUPLES[name] :])]
            case name if name in IGNORED:
                pass
            case "MARK":
                marks.append(len(stack))
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "DICT":
                stack.append(_pairs(since_mark()))
            case "APPEND":
                item = stack.pop()
                list.append(stack[-1], item)
            case "APPENDS":
                items = since_mark()
                list.extend(stack[-1], items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _check_keys([key])
                dict.__setitem__(stack[-1], key, value)
            case "SETITEMS":
                items = since_mark()
                dict.update(stack[-1], _pairs(items))
            case "ADDITEMS":
                items = since_mark()
                _check_keys(items)
                set.update(stack[-1], items)
            case "GLOBAL":
                stack.append(Name(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                if not (isinstance(attribute, str) and isinstance(module, str)):
                    raise PickleError("a pickle with a name that is not text")
                stack.append(Name(f"{module}.{attribute}"))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                if not isinstance(function, Name):
                    raise PickleError("a pickle that calls one of its values")
                stack.append(dialect.construct(function, arguments))
                if isinstance(stack[-1], bytes | str):
                    copied += len(stack[-1])
            case "BUILD":
                state = stack.pop()
                dialect.fill(stack[-1], state)
                if isinstance(stack[-1], Array):
                    copied += len(stack[-1])
            case "BINPERSID":
                stack.append(dialect.fetch(stack.pop()))
            case "STOP":
                return stack.pop()
            case other:
                raise PickleError(f"a pickle with instruction {other}, which plain values lack")
        if copied > len(data):
            raise PickleError("a pickle that copies one value many times")
    raise PickleError("a pickle without an end")


def _pairs(items: list[Any]) -> dict[Any, Any]:
    _check_keys(items[::2])
    return dict(zip(items[::2], items[1::2], strict=True))


def _check_keys(keys: list[Any]) -> None:
    """Refuse keys that take long to hash, such as nested tuples, or to tell apart."""
    for key in keys:
        small = isinstance(key, int | float) and abs(key) < MAX_KEY
        if not small and not isinstance(key, str | bytes | None):
            raise PickleError(
                f"a pickle with the key {shorten(key)}; expected text, or a number of at most 61 "
                "bits"
            )


def _nesting(value: Any, heights: dict[int, int], level: int = 1) -> int:
    """The number of containers within each other; each is looked at once, whatever holds it.

    Args:
        value: a container or not.
        heights: those that are known, by the identity of the container.
        level: of the value. One that holds itself has no last level.
    """
    if not isinstance(value, list | tuple | dict):
        return 0
    height = heights.get(id(value), 0)
    if level + height > MAX_DEPTH:
        raise PickleError(f"a pickle nested deeper than {MAX_DEPTH} levels")
    if not height:
        parts = value.values() if isinstance(value, dict) else value
        height = 1 + max((_nesting(p, heights, level + 1) for p in parts), default=0)
        heights[id(value)] = height
    return height


def _construct(function: Name, arguments: tuple[Any, ...]) -> Any:
    """What NumPy's calls stand for."""
    # NumPy 2 renamed numpy.core.
    match function.text.replace("numpy._core.", "numpy.core."), arguments:
        case "numpy.core.multiarray._reconstruct", (Name("numpy.ndarray"), *_):
            return Array()
        case "numpy.dtype", (str(code), *_) if re.fullmatch(r"[<>|=]?[biufSUO]\d{0,6}", code):
            return DType(np.dtype(code))
        case "numpy.core.multiarray.scalar", (DType(dtype=dtype), bytes(raw)):
            return np.frombuffer(raw, dtype)[0].item()
        # How bytes are written for Python 2.
        case "_codecs.encode", (str(text), "latin1"):
            return text.encode("latin1")
        case "collections.OrderedDict", ():
            return {}
    raise PickleError(
        f"a pickle that would call {shorten(function.text)}; only plain containers and arrays are "
        "read"
    )


def _fill(target: Any, state: tuple[Any, ...]) -> None:
    """The state that NumPy writes after an array or a type."""
    match target, state:
        case DType(), (_, ("<" | ">") as order, *_):
            target.dtype = target.dtype.newbyteorder(order)
        case DType(), (_, "|" | "=", *_):
            pass
        case Array(), (_, tuple(shape), DType(dtype=dtype), _, list(values)) if dtype.hasobject:
            _fill_array(target, shape, values)
        case Array(), (_, tuple(shape), DType(dtype=dtype), _, bytes(raw)) if not dtype.hasobject:
            _fill_array(target, shape, np.frombuffer(raw, dtype).tolist())
        case _:
            raise PickleError("a pickle that sets the state of an object")


def _fill_array(array: Array, shape: tuple[int, ...], values: list[Any]) -> None:
    shapes = ((), (1,)) if len(values) == 1 else ((len(values),),)
    if not all(type(size) is int for size in shape) or shape not in shapes:
        raise PickleError(f"a pickled array of shape {shorten(shape)} with {len(values)} values")
    array[:] = values


def _fetch(identity: Any) -> Any:
    raise PickleError("a pickle that points to data beside it")


NUMPY = Dialect(_construct, _fill, _fetch)
