import pytest

from affectgpt_jax.common.errors import UserError
from affectgpt_jax.common.toml import MAX_BYTES, parse_toml


def test_what_people_write_is_read():
    text = (
        b'\xef\xbb\xbf# of .dots. and "quotes".\n[a.b]\nc = [[1, 2.5], {d = "x.y.z"}]\ne = "..."\n'
    )
    found = {"a": {"b": {"c": [[1, 2.5], {"d": "x.y.z"}], "e": "..."}}}
    assert parse_toml(text, "f") == found
    for deep in (".".join(["a"] * 100) + " = 1", "a = " + "[" * 99 + "]" * 99):
        assert parse_toml(deep.encode(), "f")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a." * 100_000 + "b = 1", "nested deeper than 100 levels"),
        ("[" + "a . " * 50_000 + "b]", "nested deeper than 100 levels"),
        ("\"a\".'b'." * 50_000 + "c = 1", "nested deeper than 100 levels"),
        ("a = " + "[" * 100 + "]" * 100, "nested deeper than 100 levels"),
        ("a = " + "[" * 300 + "]" * 300, "nested deeper than 100 levels"),
        ("a = " + "[" * 100_000, "nested deeper than 100 levels"),
        ("a = " + "{b = " * 100_000, "nested deeper than 100 levels"),
        ("a = " + "9" * 10_000, "not valid TOML: "),
        ("a = 1\na = 2", "not valid TOML: "),
        ("x" * (MAX_BYTES - 1), "not valid TOML: "),
        ('"' * 99_999, "not valid TOML: "),
        ("'\"" * 50_000, "not valid TOML: "),
        (("a." * 99 + "\n") * 5_000, "not valid TOML: "),
        ("a = \x1b[31m", "not valid TOML: "),
        ("x" * (MAX_BYTES + 1), "larger than 1,048,576 bytes"),
        ("a = 1\nb = '\udcff'", "line 2: byte 0xff is not UTF-8"),
    ],
)
def test_what_would_fill_the_memory_or_is_no_toml_is_refused(text, message):
    with pytest.raises(UserError, match=message) as refused:
        parse_toml(text.encode("utf-8", "surrogateescape"), "f")
    assert str(refused.value).startswith("f") and "\x1b" not in str(refused.value)
