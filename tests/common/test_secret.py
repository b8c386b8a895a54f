"""A key is masked in every form in which a server or a library may repeat it."""

import base64
import html
import json
import urllib.parse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from affectgpt_jax.common.secret import Secret

KEY = "sk-proj-Ab3/dEf+6hIjKlMn=pQrStUvWx0123456789"
SECRET = Secret(KEY)


def escaped(pattern):
    return "".join(pattern.format(ord(c)) for c in KEY)


@pytest.mark.parametrize(
    "form",
    [
        KEY,
        KEY.upper(),
        KEY.swapcase(),
        repr(KEY),
        json.dumps(json.dumps(KEY)),
        escaped("\\u{:04x}"),
        escaped("\\\\\\u{:04X}"),
        escaped("\\x{:02x}"),
        escaped("%{:02X}"),
        escaped("%2525{:02x}"),
        escaped("&#{};"),
        escaped("&#x{:x};"),
        urllib.parse.quote(KEY, safe=""),
        html.escape(KEY),
        KEY.encode().hex(),
        base64.b64encode(KEY.encode()).decode(),
        base64.b64encode(f"Bearer {KEY}".encode()).decode(),
        base64.b64encode(f"a:{KEY}".encode()).decode(),
        base64.urlsafe_b64encode(f"me:{KEY}".encode()).decode(),
        "-".join(KEY),
        "\n".join(KEY),
        KEY[:20] + "..." + KEY[20:],
        KEY[:9],
        KEY[-9:],
        KEY.replace("-", "\u2011"),
    ],
)
def test_no_part_of_a_key_is_left_in_any_form(form):
    masked = SECRET.mask(f"Incorrect API key provided: {form}. See the manual.")
    assert masked.startswith("Incorrect API key provided: ") and masked.endswith("See the manual.")
    assert "***" in masked
    rest = masked.removeprefix("Incorrect API key provided: ").removesuffix(" See the manual.")
    assert len(rest.replace("***", "")) <= 12, masked


@given(st.text(), st.text(), st.integers(0, len(KEY) - 6), st.integers(6, len(KEY)))
def test_what_stands_around_it_stays(before, after, start, length):
    part = KEY[start : start + length]
    masked = SECRET.mask(f"{before} {part} {after}")
    assert part not in masked or len([c for c in part if c.isalnum()]) < 6


@given(st.text("zyZY\\%&#u;x \n\u0130ä"))
def test_text_without_it_stays(text):
    assert SECRET.mask(text) == text
    assert Secret("").mask(text) == text


def test_a_short_key_is_masked_whole():
    assert Secret("EMPTY").mask("the key EMPTY is wrong") == "the key *** is wrong"
    assert Secret("-").mask("a - b") == "a - b"  # it has nothing to tell


def test_the_whole_key_is_found_in_a_text():
    assert SECRET.within(f"http://host/{urllib.parse.quote(KEY)}/v1")
    assert not SECRET.within(KEY[:-1]) and not Secret("").within("any")
