"""Text from outside (files, models, servers), made safe for a terminal and for one line."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

# Characters that end a line, move the cursor, start an escape sequence or turn the direction of
# what follows; lone surrogates, which no encoding has; and the byte order mark, which is invisible.
# Joiners and special spaces stay: scripts and emoji need them.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
NAMES_SHOWN = 5


def one_line(text: str) -> str:
    r"""Text without control characters and line ends, which become escapes such as `\n`, `\x1b`."""
    return _UNSAFE.sub(lambda char: char[0].encode("unicode_escape").decode("ascii"), text)


def json_line(text: str) -> str:
    r"""JSON without the characters that `one_line` escapes: the same value, with `\u....`.

    Args:
        text: JSON in one line, as `json.dumps(..., ensure_ascii=False)` writes it.
    """
    return _UNSAFE.sub(lambda char: f"\\u{ord(char[0]):04x}", text)


def print_lines(lines: Iterable[str], file: TextIO | None = None) -> None:
    """Print lines that hold text from outside, each through `one_line`, and flush.

    Args:
        lines: without line ends; a line end in one of them is escaped.
        file: where to; standard output if None.
    """
    for line in lines:
        print(one_line(line), file=file)
    (file or sys.stdout).flush()


def say(text: str) -> None:
    """Print a line about the work, in which `one_line` escapes, to standard error."""
    print_lines([text], sys.stderr)


def shorten(value: Any, limit: int = 80) -> str:
    """The `repr` of a value, cut off after `limit` characters, in one line."""
    try:
        text = repr(value)
    # A file may nest deeper than Python prints, or hold longer numbers.
    except (RecursionError, ValueError):
        text = f"an unprintable {type(value).__name__}"
    text = one_line(text)
    return text if len(text) <= limit else f"{text[:limit]}..."


def listed(names: Sequence[str], limit: int = 40) -> str:
    """The first `NAMES_SHOWN` names, each quoted and cut off at `limit`, and how many follow."""
    shown = ", ".join(shorten(name, limit) for name in names[:NAMES_SHOWN])
    more = len(names) - NAMES_SHOWN
    return f"{shown} and {more:,} more" if more > 0 else shown
