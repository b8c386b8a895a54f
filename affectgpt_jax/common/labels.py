"""Lists of labels that are written as text: in files, by people, by language models.

`parse_labels` has the rule of MER-UniBench's release, by which the published scores were made.
`read_labels` reads more than that: lists that the rule takes apart are read in the same way, and so
are those that it leaves in one piece, which would count as one unknown word.
"""

from __future__ import annotations

import ast
import re
from typing import Any

from affectgpt_jax.common.errors import ReadError
from affectgpt_jax.common.json import parse_json

# What people say of two descriptions, a1 and a2; "same": neither is the better one.
PREFERENCES = ("a1", "a2", "same")

# Lists as the release writes and reads them: in brackets, with ASCII commas or quotes alone.
_OF_RELEASE = re.compile(r"\[(?=[^,'\"]*[,'\"])(?!.*\d[.):])[\w ,/'\"\u2019.!?()-]*\]")
# Full-width forms, and the ASCII that they stand for.
_HALF_WIDTH = {0xFF01 + i: 0x21 + i for i in range(94)} | {0x3000: " "}
# What separates labels; and brackets and quotes, which stand around them.
_SEPARATOR = re.compile(
    r"[,;|/&\t\n\r\v\f\x85\u2028\u2029\u2022\u00b7\u30fb\u3001\u3002\u060c\u061b\u2192]"
    r"|[\u3008-\u3011\u3014-\u3017]|[-=]>|>\s?<|\]\s?\[|\s\+\s"
)
_BRACKETS = "[](){}<>"
_QUOTES = "\"'`\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f\u00ab\u00bb\u2039\u203a\u301d\u301e"
# A quote between letters is an apostrophe.
_QUOTE = re.compile(rf"(?<!\w)[{_QUOTES}]+|[{_QUOTES}]+(?!\w)")
_AROUND = f" \u00a0\u3000.:!?*_~#\\{_BRACKETS}{_QUOTES}"
# "1. happy", "(2) sad", "(a) calm", "- calm"; also within a line.
_NUMBERING = re.compile(
    r"(?:^|(?<=[\s\[({]))(?:\(?\d{1,3}[.):]\s+|\([a-z]\)\s+|[-*\u2013\u2014>#]+\s+)"
)
# How sure somebody is: "happy (0.9)", "happy: 90 %".
_WEIGHT = re.compile(r"\s?[:=(]\s?\d{1,9}(?:\.\d{1,9})?\s?%?\s?\)?$")
# What stands before a list, "Emotions:", or, as a title, in its place.
_TOPIC = r"emotion|label|feeling|mood|affect|sentiment|open.?set|answer|result|output"
_KEY = re.compile(_TOPIC, re.IGNORECASE)
_HEADING = re.compile(rf"[^,;:\n]{{0,80}}\b(?:{_TOPIC})[^,;:\n]{{0,80}}:", re.IGNORECASE)
_NO_LABEL = re.compile(rf"|and|or|(?:{_TOPIC})s?")
_MARKUP = re.compile(rf"```\w*|</?(?:{_TOPIC})s?>|[\u2460-\u2473]", re.IGNORECASE)
_NOTHING = {"", "n/a", "none", "null", "nil", "[]", "{}"}
_LONGEST_LITERAL = 4096


def parse_labels(text: str) -> list[str]:
    """The words of a label list, by the rule of the release.

    One leading `[` and one trailing `]` go, then every quote and comma separates; empty words are
    dropped, the others stripped and lower-cased. So `["a", 'b']`, `[a, b]` and `a,b` are the same.
    """
    text = text.strip().removeprefix("[").removesuffix("]")
    for separator in ("'", '"'):
        text = text.replace(separator, ",")
    return [word for part in text.split(",") if (word := part.strip().lower())]


def read_labels(text: str) -> list[str]:
    """The labels of a list, in whatever form it is written; lower-case, in order.

    A list in brackets with ASCII commas or quotes alone, as the release writes it, is read by
    `parse_labels`. Read are also lists with any comma, semicolon, slash, bar or line between the
    labels, in brackets and quotes of any script, with numbers, bullets, Markdown or a heading; and
    objects of JSON or Python, by the key that speaks of emotions or labels.
    """
    if _OF_RELEASE.fullmatch(text.strip()):
        return parse_labels(text)
    if text.strip().lower() in _NOTHING:
        return []
    found = labels_of_object(text)
    return split_labels(text) if found is None else found


def labels_of_object(text: str) -> list[str] | None:
    """The labels in the object of JSON or Python that a text holds, or in its list of them.

    Returns:
        As `read_labels`; None where there is no object, or where it does not say which of its texts
        are labels.
    """
    return _of_value(_literal(text)) if "{" in text else None


def split_labels(text: str) -> list[str]:
    """As `read_labels`, but for text that is no object of JSON or Python."""
    text = _MARKUP.sub("\n", text).translate(_HALF_WIDTH)
    text = _NUMBERING.sub("\n", _HEADING.sub("", text, count=1))
    parts = (part for piece in _SEPARATOR.split(text) for part in _QUOTE.split(piece))
    labels = (_WEIGHT.sub("", part.strip()).strip(_AROUND).lower() for part in parts)
    return [label for label in labels if not _NO_LABEL.fullmatch(label)]


def _literal(text: str) -> Any:
    """The value of the outermost object in a text; None where there is none."""
    start, end = text.find("{"), text.rfind("}") + 1
    if text[:start].rstrip().endswith("["):
        start, end = text.rfind("[", 0, start), max(end, text.rfind("]") + 1)
    text = text[start:end]
    try:
        return parse_json(text, "labels")
    except ReadError:
        pass
    try:
        return ast.literal_eval(text) if len(text) <= _LONGEST_LITERAL else None
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _of_value(value: Any, named: bool = False) -> list[str] | None:
    """The labels in a value; None where it does not say which of its texts they are.

    Args:
        value: of JSON or Python.
        named: whether it stands under a key that speaks of labels.
    """
    match value:
        case bool() | int() | float():
            return []
        case None if named:
            return []
        case str():
            return split_labels(value)
        case dict():
            spoken = [part for key, part in value.items() if _KEY.search(str(key))]
            if spoken:
                return _of_value(spoken, named=True)
            if value and all(type(part) in (int, float) for part in value.values()):
                return _of_value([*value])  # how sure it is of each
            return _of_value([*value.values()], named) if named or len(value) == 1 else None
        case list() | tuple() | set():
            parts = [_of_value(part, named) for part in value]
            return None if None in parts else [label for part in parts for label in part]
    return None
