"""Text from outside cannot leave its line or command a terminal."""

import io
import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from affectgpt_jax.common.text import brief, json_line, listed, one_line, print_lines, shorten

ANY_TEXT = st.text(st.characters())  # lone surrogates, too


@given(ANY_TEXT)
def test_no_control_character_line_end_or_surrogate_is_left(text):
    line = one_line(text)
    assert len(line.splitlines()) <= 1
    assert not [c for c in line if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")]
    line.encode("utf-8")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("two\nlines\r\n", r"two\nlines\r\n"),
        ("\x1b[31mred\x9b2J", r"\x1b[31mred\x9b2J"),
        ("a\u2028b\u2029c", r"a\u2028b\u2029c"),
        ("\u202eright to left", r"\u202eright to left"),
        ("half \ud800", r"half \ud800"),
    ],
)
def test_what_is_escaped_can_be_read(text, shown):
    assert one_line(text) == shown


@pytest.mark.parametrize(
    "text", ["开心，愉快　是", "\N{FAMILY}\u200d\N{GIRL}", "می\u200cخواهم", r"a\nb"]
)
def test_text_of_any_script_stays(text):
    assert one_line(text) == text


@given(ANY_TEXT)
def test_json_keeps_its_value(text):
    line = json_line(json.dumps({"text": text}, ensure_ascii=False))
    assert json.loads(line) == {"text": text}
    assert line == one_line(line)


def test_lines_are_printed_one_by_one():
    file = io.StringIO()
    print_lines(["answer: happy\n  labels: sad", "next"], file)
    assert file.getvalue() == "answer: happy\\n  labels: sad\nnext\n"


def test_a_long_value_is_cut_and_an_unprintable_one_is_named():
    assert shorten("a" * 10, 5) == "'aaaa..."
    assert shorten({"key": "\x1b\u202e"}) == r"{'key': '\x1b\u202e'}"
    assert shorten(10**5000) == "an unprintable int"


@pytest.mark.parametrize(
    "value",
    [(), (1,), (1, "a"), [], [[1], {}], {}, {"a": (b"x", None)}, set(), {1}, frozenset({1}), 1.5],
)
def test_a_short_value_is_shown_as_python_shows_it(value):
    assert shorten(value) == repr(value)


def test_only_what_is_shown_of_a_value_is_looked_at():
    nested = []
    for _ in range(100_000):
        nested = [nested]
    assert shorten(nested) == "[" * 20 + "..." + "]" * 20
    twice = ()
    for _ in range(64):  # printed whole, it would have more than 2 ** 64 characters
        twice = (twice, twice)
    assert len(shorten(twice)) == 83
    loop = []
    loop.append(loop)
    assert shorten([loop] * 2).endswith("...")
    assert shorten("a" * 2**22, 5) == "'aaaa..."


def test_a_list_of_names_ends_with_the_number_of_the_others():
    names = [f"clip{i}" for i in range(1_005)]
    assert listed(names[:2]) == "'clip0', 'clip1'"
    assert listed(names[:5]).endswith("'clip4'")
    assert listed(names) == "'clip0', 'clip1', 'clip2', 'clip3', 'clip4' and 1,000 more"
    assert listed(["a\nb"]) == r"'a\nb'"


def test_what_an_error_says_is_cut():
    assert brief(ValueError("a\x1b\n")) == r"a\x1b\n"
    assert brief("x" * 300) == "x" * 300
    assert brief("x" * 10**7) == "x" * 300 + "..."
