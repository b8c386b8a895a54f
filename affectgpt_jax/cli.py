"""What commands read and print: flags as people type them, terminals that lack some of Unicode."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence


def flags_with_hyphens(argv: Sequence[str]) -> list[str]:
    """A command line in whose names of flags `_` is as good as `-`; keys of the config stay."""
    return [
        re.sub(r"^--[\w-]+(?![\w.-])", lambda flag: flag[0].replace("_", "-"), arg) for arg in argv
    ]


def escape_what_cannot_be_shown() -> None:
    """Print `\\uXXXX` for a character that the terminal lacks, instead of failing.

    Names, words and answers come from files and models. For commands to call: it changes the
    process's standard streams.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
