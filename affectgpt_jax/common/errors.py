"""Errors that commands show as one sentence, without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Trouble that a user can mend: a wrong file, flag, value or environment.

    The message is one sentence that says what is wrong, where, what was expected and what to do.
    Commands print it without a traceback and end with status 1. A subclass that code catches as a
    `ValueError` or `RuntimeError` inherits from that as well.
    """


class ReadError(UserError, ValueError):
    """A file that cannot be used: one sentence that names it, and the place in it."""
