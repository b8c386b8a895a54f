"""Text from files and models, made safe to stand in Markdown and in HTML."""

from __future__ import annotations

import html

# Line ends that only Unicode has, and a byte order mark: nobody sees them.
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
    """One line that Markdown, and the HTML within it, takes for text."""
    line = " ".join(printable(text).split()).replace("&", "&amp;")
    return "".join(f"\\{char}" if char in "\\`*_{}[]<>#|~!" else char for char in line)


def escape_html(text: str) -> str:
    """Text for the content of an element or a quoted attribute."""
    return html.escape(printable(text), quote=True)


def isolated(text: str) -> str:
    """Text as an element whose direction of writing does not touch what stands around it."""
    return f"<bdi>{escape_html(text)}</bdi>"
