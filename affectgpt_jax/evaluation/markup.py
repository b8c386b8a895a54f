"""Text from files and models, made safe for Markdown and for the report page."""

from __future__ import annotations

# Line and paragraph separators, and a byte order mark: they are invisible.
INVISIBLE = "\u2028\u2029\ufeff"


def printable(text: str) -> str:
    """Text without control characters and lone surrogates, which show as `\\x..` and `\\u....`.

    Line ends and tabs stay.
    """
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(
        f"\\x{ord(char):02x}"
        if ord(char) < 0xA0 and not (char.isprintable() or char in "\n\t")
        else f"\\u{ord(char):04x}"
        if char in INVISIBLE
        else char
        for char in text
    )


def escape_markdown(text: str) -> str:
    """The text on one line, so that Markdown, and HTML inside it, shows it as it is."""
    line = " ".join(printable(text).split()).replace("&", "&amp;")
    return "".join(f"\\{char}" if char in "\\`*_{}[]<>#|~!" else char for char in line)
