"""Text from outside (files, models, servers), made safe for a terminal and for one line."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TextIO

# Characters that end a line, move the cursor, start an escape sequence or turn the direction of
# what follows; lone surrogates, which no encoding has; and the byte order mark, which is invisible.
# Joiners and special spaces stay: scripts and emoji need them.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
NAMES_SHOWN = 5
MAX_SHOWN_DEPTH = 20
_BRACKETS = {
    list: ("[", "]"),
    tuple: ("(", ")"),
    dict: ("{", "}"),
    set: ("{", "}"),
    frozenset: ("frozenset({", "})"),
}


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
    """The `repr` of a value, cut off after `limit` characters, in one line.

    Only what is shown is looked at: a few dozen tuples, each of which holds the one before twice,
    would be printed forever.
    """
    text = ""
    for piece in _pieces(value, limit, 0):
        text += one_line(piece)
        if len(text) > limit:
            return f"{text[:limit]}..."
    return text


def brief(error: Exception | str, limit: int = 300) -> str:
    """What an error says, in one line, cut off after `limit` characters.

    Libraries repeat in it what they were given, whatever its size.
    """
    text = one_line(str(error)[: limit + 1])
    return text if len(text) <= limit else f"{text[:limit]}..."


def _pieces(value: Any, limit: int, depth: int) -> Iterator[str]:
    """The `repr` of a value, piece by piece; of text and bytes no more than is shown."""
    kind = type(value)
    if kind in (str, bytes):
        yield repr(value[: limit + 1])
    elif kind not in _BRACKETS:
        try:
            yield repr(value)
        except (RecursionError, ValueError):  # a number of thousands of digits
            yield f"an unprintable {kind.__name__}"
    elif depth == MAX_SHOWN_DEPTH:
        yield "..."
    elif kind in (set, frozenset) and not value:
        yield repr(value)
    else:
        opening, closing = _BRACKETS[kind]
        yield opening
        pairs = value.items() if kind is dict else ((item,) for item in value)
        for number, pair in enumerate(pairs):
            yield ", " if number else ""
            yield from _pieces(pair[0], limit, depth + 1)
            for item in pair[1:]:
                yield ": "
                yield from _pieces(item, limit, depth + 1)
        yield ",)" if kind is tuple and len(value) == 1 else closing


def listed(names: Sequence[str], limit: int = 40) -> str:
    """The first `NAMES_SHOWN` names, each quoted and cut off at `limit`, and how many follow."""
    shown = ", ".join(shorten(name, limit) for name in names[:NAMES_SHOWN])
    more = len(names) - NAMES_SHOWN
    return f"{shown} and {more:,} more" if more > 0 else shown
