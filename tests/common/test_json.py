"""JSON with limits and checked types, and files of a record a line."""

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, TypedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from affectgpt_jax.common import json as common_json
from affectgpt_jax.common.errors import ReadError, UserError
from affectgpt_jax.common.files import FileInUse
from affectgpt_jax.common.json import (
    MAX_DEPTH,
    ResumableJsonl,
    check_type,
    json_lines,
    parse_json,
    read_json,
    write_json,
)


class OtherError(UserError):
    pass


class Shard(TypedDict):
    file: str
    count: int


@dataclasses.dataclass(frozen=True)
class Manifest:
    name: str
    shards: tuple[Shard, ...]
    loss: float | None
    sources: dict[str, int] = dataclasses.field(default_factory=dict)


# --- reading ------------------------------------------------------------------------------------

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(values)
def test_any_value_is_read_as_it_was_written(value):
    assert parse_json(json.dumps(value), "f") == value
    assert parse_json(json.dumps(value).encode(), "f") == value


def test_a_file_is_written_and_read(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_json(path, {"a": [1, None]})
    assert path.read_text() == '{\n  "a": [\n    1,\n    null\n  ]\n}\n'
    assert read_json(path) == {"a": [1, None]}
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(path, dict[str, int]) == {"a": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.json: not JSON: 'Expecting value"),
        ("{", "a.json: not JSON"),
        (b"\n\xff", "a.json, line 2: byte 0xff is not UTF-8; make it anew"),
        ("1" * 5000, "a.json: not JSON: .*digits"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', r"a.json: not JSON: .*a key more than once in \['c'"),
        ("[" * 100_000, "a.json: nested deeper than 100 levels"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "a.json: nested deeper than 100 levels"),
        ("[" * 101 + "]" * 101, "a.json: nested deeper than 100 levels"),
        ("[[1], " + "[" * 100 + "]" * 100 + "]", "a.json: nested deeper than 100 levels"),
        ("[]", "a.json: expected a JSON object, found \\[\\]; make it anew"),
    ],
)
def test_what_is_no_document_is_one_sentence(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(OtherError, match=message) as caught:
        read_json(path, dict, error=OtherError, advice="make it anew")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_document_may_be_as_deep_as_the_limit_and_as_wide_as_it_likes():
    text = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert json.dumps(parse_json(text, "f")) == text
    assert len(parse_json("[" + "[]," * 1000 + "[]]", "f")) == 1001
    assert parse_json(json.dumps("[" * 1000), "f") == "[" * 1000


def test_a_large_file_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(common_json, "MAX_BYTES", 10)
    (tmp_path / "a.json").write_text("[1, 2, 3, 4, 5]")
    with pytest.raises(ReadError, match="a.json is larger than 10 bytes"):
        read_json(tmp_path / "a.json")
    with pytest.raises(OtherError, match="b.json cannot be read: No such file.*; make it"):
        read_json(tmp_path / "b.json", error=OtherError, advice="make it")


# --- types --------------------------------------------------------------------------------------


def manifest(**changes):
    return {"name": "a", "shards": [{"file": "f", "count": 1}], "loss": 1.5} | changes


def test_a_dataclass_is_made_of_an_object():
    found = check_type(manifest(loss=2, sources={"x": 1}), Manifest, "f")
    assert found == Manifest("a", ({"file": "f", "count": 1},), 2.0, {"x": 1})
    assert isinstance(found.loss, float)
    assert check_type(manifest(loss=None), Manifest, "f").sources == {}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "f: expected a JSON object, found []"),
        ({"name": "a"}, "f: the key 'loss' is missing"),
        (manifest(other=1), "f: the key 'other' is unknown"),
        (manifest(name=1), "f: name: expected text, found 1"),
        (manifest(name=None), "f: name: expected text, found None"),
        (manifest(loss="1"), "f: loss: expected a number or null, found '1'"),
        (manifest(loss=True), "f: loss: expected a number or null, found True"),
        (manifest(loss=10**400), "f: loss: expected a number or null, found 1000"),
        (manifest(loss=float("nan")), "f: loss: expected a number or null, found nan"),
        (manifest(loss=float("-inf")), "f: loss: expected a number or null, found -inf"),
        (
            manifest(sources={"x": 2**63}),
            "f: sources.x: expected a whole number of at most 64 bits, found 9223372036854775808",
        ),
        (manifest(shards={}), "f: shards: expected a list, found {}"),
        (manifest(shards=[1]), "f: shards[0]: expected a JSON object, found 1"),
        (manifest(shards=[{"file": "f"}]), "f: shards[0]: the key 'count' is missing"),
        (
            manifest(shards=[{"file": "f", "count": 1}, {"file": "f", "count": 1.0}]),
            "f: shards[1].count: expected a whole number, found 1.0",
        ),
        (
            manifest(shards=[{"file": "f", "count": True}]),
            "f: shards[0].count: expected a whole number, found True",
        ),
        (manifest(sources={"x y": "1"}), "f: sources.'x y': expected a whole number, found '1'"),
    ],
)
def test_a_wrong_type_is_refused_by_file_and_key(value, message):
    with pytest.raises(OtherError) as caught:
        check_type(value, Manifest, "f", error=OtherError, advice="mend it")
    assert str(caught.value).startswith(message) and str(caught.value).endswith("; mend it")


def test_types_of_every_kind():
    assert check_type({"file": "f", "count": 1, "more": []}, Shard, "f")["more"] == []
    assert check_type([1, "a"], list[int | str], "f") == [1, "a"]
    assert check_type(["a"], tuple[str, ...], "f") == ("a",)
    assert check_type([1, "a"], tuple[int, str], "f") == (1, "a")
    assert check_type("b", Literal["a", "b"], "f") == "b"
    assert check_type({"a": [None]}, dict[str, Any], "f") == {"a": [None]}
    for value, kind, message in (
        ([1, 1.5], list[int | str], r"\[1\]: expected a whole number or text, found 1.5"),
        ([1, 2], tuple[int, str], r"f: \[1\]: expected text, found 2"),
        ([1], tuple[int, str], r"f: expected 2 values, found \[1\]"),
        ("c", Literal["a", "b"], "expected one of 'a', 'b', found 'c'"),
        (1, Literal[True], "expected one of True, found 1"),
        # The part that is wrong is named, not the whole.
        ([{"count": 1, "file": 2}], list[Shard] | None, r"\[0\].file: expected text, found 2"),
    ):
        with pytest.raises(ReadError, match=message):
            check_type(value, kind, "f")


# --- a record a line ----------------------------------------------------------------------------


def test_lines_are_numbered_and_blank_ones_left_out():
    data = b'{"a": "\xe2\x80\xa8"}\n\n  \n{"a": 2}'
    assert list(json_lines(data, "f")) == [(1, {"a": "\u2028"}), (4, {"a": 2})]
    for line in (b"[]", b"{", b'{"a": 1, "a": 2}'):
        with pytest.raises(ReadError, match="f, line 2: "):
            list(json_lines(b'{"a": 1}\n' + line, "f"))


def opened(path):
    return ResumableJsonl(path, Shard, ("file",), error=OtherError, advice="delete it")


def test_records_are_found_again(tmp_path):
    path = tmp_path / "new" / "a.jsonl"
    file = opened(path)
    assert not path.exists() and not path.parent.exists() and not file.records
    awkward = "\ud800\u2028\n\x1b[31mä"
    file.append({"file": "a", "count": 1})
    with file:
        file.append({"file": awkward, "count": 2})
        file.append({"file": "b", "count": 3, "more": None})
        # On disk at once, so that a kill loses nothing.
        assert opened(path).records == file.records
    file.append({"file": "a", "count": 4})
    again = opened(path)
    assert again.records == file.records and not again.torn
    assert again.records[("a",)] == {"file": "a", "count": 4}
    assert list(again.records) == [("a",), (awkward,), ("b",)]
    data = path.read_bytes()
    assert data.count(b"\n") == 4 and b"\x1b" not in data and "ä".encode() in data


@pytest.mark.parametrize("torn", [b'{"file": "b", "cou', b'{"file": "b", "count": 2}', b"\0\0\0"])
def test_half_a_line_goes_when_the_next_one_comes(tmp_path, torn):
    path = tmp_path / "a.jsonl"
    whole = b'{"file": "a", "count": 1}\n'
    path.write_bytes(whole + torn)
    file = opened(path)
    assert file.torn and list(file.records) == [("a",)]
    assert path.read_bytes() == whole + torn  # who only looks changes nothing
    file.append({"file": "b", "count": 2})
    file.append({"file": "c", "count": 3})
    again = opened(path)
    assert list(again.records) == [("a",), ("b",), ("c",)] and not again.torn


def test_one_at_a_time_writes_and_nobody_goes_on_from_what_has_changed(tmp_path):
    path = tmp_path / "a.jsonl"
    first, second = opened(path), opened(path)
    with first:
        first.append({"file": "a", "count": 1})
        for write in (lambda: second.__enter__(), lambda: second.append({"file": "b", "count": 1})):
            with pytest.raises(FileInUse, match="a.jsonl is being written by another process"):
                write()
    with pytest.raises(ReadError, match="a.jsonl has changed since it was read, from 0 to 26 byt"):
        second.append({"file": "b", "count": 1})
    # Half a line that another writer has written meanwhile is not cut off.
    torn = opened(path)
    path.write_bytes(path.read_bytes() + b'{"file": "c"')
    half = opened(path)
    path.write_bytes(path.read_bytes() + b', "count": 1}\n')
    for stale in (torn, half):
        with pytest.raises(ReadError, match="has changed since it was read"):
            stale.append({"file": "d", "count": 1})
    assert list(opened(path).records) == [("a",), ("c",)]


def test_a_file_of_half_a_line_alone(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"fi')
    with opened(path) as file:
        file.append({"file": "a", "count": 1})
    assert list(opened(path).records) == [("a",)]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"file": "b"}',
        '{"file": "b", "count": "2"}',
        "[" * 100_000,
        '{"file": "b", "cou{"file": "c", "count": 1}',  # two writers at once
    ],
)
def test_other_damage_is_refused_by_file_and_line(tmp_path, line):
    path = tmp_path / "a.jsonl"
    data = f'{{"file": "a", "count": 1}}\n{line}\n{{"file": "c", "count": 1}}\n'.encode()
    path.write_bytes(data)
    with pytest.raises(OtherError, match="a.jsonl, line 2: .*; delete it"):
        opened(path)
    assert path.read_bytes() == data


def test_trouble_with_the_disk_shows_before_the_work(tmp_path):
    (tmp_path / "a").write_text("")
    file = opened(tmp_path / "b" / "c.jsonl")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(OSError), file:
        raise AssertionError("opened below a file")


def test_no_link_is_appended_to(tmp_path):
    mine = tmp_path / "mine"
    mine.write_text('{"file": "a", "count": 1}\nhalf')
    (tmp_path / "a.jsonl").symlink_to(mine)
    file = opened(tmp_path / "a.jsonl")
    with pytest.raises(OSError):
        file.append({"file": "b", "count": 2})
    assert mine.read_text().endswith("half")


def test_a_record_that_json_lacks_is_not_written(tmp_path):
    with pytest.raises(ValueError), opened(tmp_path / "a.jsonl") as file:
        file.append({"file": "a", "count": float("nan")})
    assert (tmp_path / "a.jsonl").read_bytes() == b""


def test_a_killed_writer_leaves_whole_records(tmp_path):
    path = tmp_path / "a.jsonl"
    code = """
import os, signal, sys
from tests.common.test_json import opened
with opened(sys.argv[1]) as file:
    for n in range(3):
        file.append({"file": str(n), "count": n})
    os.kill(os.getpid(), signal.SIGKILL)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=root, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(opened(path).records) == 3
