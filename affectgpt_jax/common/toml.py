"""TOML from outside, with limits on what a small file can make of itself."""

from __future__ import annotations

import re
import tomllib
from typing import Any

from affectgpt_jax.common.errors import ReadError, UserError
from affectgpt_jax.common.files import decode
from affectgpt_jax.common.json import MAX_DEPTH, is_deep
from affectgpt_jax.common.text import brief

# Far more than any file that people write.
MAX_BYTES = 2**20
# A key of so many parts: for each, `tomllib` keeps all that stand before it.
_PART = r"(?:[\w-]+|\"[^\"\n]*\"|'[^'\n]*')[ \t]*\.[ \t]*"
# Not from within a word: each would be read as often as it has characters.
_DEEP_KEY = re.compile(rf"(?<![\w-])(?:{_PART}){{{MAX_DEPTH}}}", re.ASCII)


def parse_toml(data: bytes, where: str, *, error: type[UserError] = ReadError) -> dict[str, Any]:
    """The tables of a TOML document.

    Args:
        data: UTF-8.
        where: what messages call it.
        error: the class to raise.

    Raises:
        ReadError: no TOML, larger than `MAX_BYTES`, or nested deeper than `MAX_DEPTH`.
    """
    if len(data) > MAX_BYTES:
        raise error(f"{where} is larger than {MAX_BYTES:,} bytes, the most that is read of it")
    text = decode(data, where, error=error)
    too_deep = f"{where}: nested deeper than {MAX_DEPTH} levels, the most that is read"
    if _DEEP_KEY.search(text):
        raise error(too_deep)
    try:
        found = tomllib.loads(text)
    except RecursionError:
        raise error(too_deep) from None
    except ValueError as trouble:  # also of numbers with thousands of digits
        raise error(f"{where}: not valid TOML: {brief(trouble)}") from None
    if is_deep(found):
        raise error(too_deep)
    return found
