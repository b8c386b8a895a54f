"""What commands print, on terminals that cannot show all of Unicode."""

from __future__ import annotations

import sys


def escape_what_cannot_be_shown() -> None:
    """Print `\\uXXXX` for a character that the terminal lacks, instead of failing.

    Names, words and answers come from files and models. For commands to call: it changes the
    process's standard streams.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
