"""A key or a password that must not be shown, whatever form somebody else gives it."""

from __future__ import annotations

import base64
import re

MASK = "***"
# A part of the secret of this many letters and digits is masked. One of fewer tells little, and
# would stand in words by chance.
PART = 6
# A character as it is, or escaped as in JSON, Python, URLs (also twice) or HTML.
_CHARACTER = re.compile(
    r"\\+(?:u00|x)([0-9a-fA-F]{2})|%(?:25)*([0-9a-fA-F]{2})|&#[xX]0*([0-9a-fA-F]{2});"
    r"|&#0*([0-9]{2,3});|(.)",
    re.DOTALL,
)


class Secret:
    """Finds a secret in text, and masks it.

    It is found whole and in parts of at least `PART` letters and digits, in upper and lower case,
    with its characters escaped, with other characters in between, in hexadecimal and in base64.

    Args:
        text: the secret; "" is in no text.
    """

    def __init__(self, text: str):
        data = text.encode()
        # In base64 it looks otherwise at each of three places; the first and last characters mix
        # with what stands around it.
        encoded = [base64.b64encode(bytes(n) + data).decode()[2 * n :] for n in range(3)]
        forms = [_plain(form) for form in (text, data.hex(), *encoded)]
        self._length = min(PART, len(forms[0]))
        self._parts = {
            form[i : i + self._length]
            for form in forms
            for i in range(len(form) - self._length + 1)
            if self._length
        }
        self._whole = forms[0]

    def within(self, text: str) -> bool:
        """Whether the whole secret stands in a text."""
        return bool(self._whole) and self._whole in _plain(text)

    def mask(self, text: str) -> str:
        """The text with `MASK` where it holds the secret or parts of it."""
        found = [m for m in _CHARACTER.finditer(text) if _character(m)]
        plain = "".join(map(_character, found))
        pieces, end = [], 0
        for i in range(len(plain) - self._length + 1):
            if plain[i : i + self._length] in self._parts:
                start = found[i].start()
                if start > end or not pieces:
                    pieces += [text[end:start], MASK]
                end = found[i + self._length - 1].end()
        return "".join([*pieces, text[end:]])


def _character(match: re.Match[str]) -> str:
    """The letter or digit that is meant, in lower case; "" for another character."""
    *hexadecimal, decimal, itself = match.groups()
    code = next((int(code, 16) for code in hexadecimal if code), 0) or int(decimal or 0)
    character = itself or chr(code)
    return character.lower()[:1] if character.isalnum() else ""


def _plain(text: str) -> str:
    return "".join(map(_character, _CHARACTER.finditer(text)))
