"""CSV files; the first sheet of a workbook is tested with the lexicon, which has some."""

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from affectgpt_jax.common.errors import ReadError, UserError
from affectgpt_jax.common.tables import CsvTable, csv_rows, xlsx_rows


class OtherError(UserError):
    pass


cells = st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n\ufeff"), max_size=8)


@given(st.lists(st.tuples(cells, cells), max_size=5))
def test_what_python_writes_is_read(rows):
    stream = io.StringIO(newline="")
    csv.writer(stream).writerows([("a", "b"), *rows])
    table = CsvTable(stream.getvalue().encode(), "f")
    assert table.header == ["a", "b"]
    assert [(row["a"], row["b"]) for _, row in table] == rows


def test_rows_have_the_numbers_of_their_last_lines():
    data = b'\xef\xbb\xbf name ,"text"\r\n\r\na,"two\nlines"\n\n"b ""c""",\n'
    assert list(csv_rows(data, "f", ("text", "name"))) == [
        (4, {"name": "a", "text": "two\nlines"}),
        (6, {"name": 'b "c"', "text": ""}),
    ]


def test_columns_to_ignore_are_left_out_and_may_be_repeated():
    table = CsvTable(b"a,x,b,x\n1,2,3,4\n", "f", ("a",), ignore=["x"])
    assert table.header == ["a", "b"]
    assert list(table) == [(2, {"a": "1", "b": "3"})]
    with pytest.raises(ReadError, match="f: no column 'y' to ignore in the header"):
        CsvTable(b"a,b\n", "f", ignore=["y"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "f is empty; expected a CSV file with a header"),
        (b"\n\r\n", "f is empty"),
        (b"a;b\n1;2\n", r"f: no column 'a' in the header \['a;b'\]; expected columns with commas"),
        (b"A\n1\n", r"f: no column 'a' in the header \['A'\]"),
        (b"a,b,b\n", "f: the header has the column 'b' more than once"),
        (b"a,b\n1,2\n3\n", "f, line 3: expected 2 cells, as in the header, found 1"),
        (b"a,b\n1,2,3\n", "f, line 2: expected 2 cells.*found 3; a cell with commas needs"),
        (b'a,b\n1,"2\n3,4\n', "f, line 3: not CSV: unexpected end of data"),
        (b'a,b\n1,"2"3\n', "f, line 2: not CSV"),
        (b"a\n1\n\xff\n", "f, line 3: byte 0xff is not UTF-8; save it"),
        (b"a\n" + b"1" * 200_000 + b"\n", "f, line 2: not CSV: field larger than"),
        (b"a" * 200_000, "f, line 1: not CSV: field larger than"),
    ],
)
def test_trouble_is_one_sentence_with_the_line(data, message):
    with pytest.raises(OtherError, match=message) as caught:
        list(CsvTable(data, "f", ("a",), error=OtherError))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_million_columns_are_checked_in_a_moment():
    header = ",".join(f"c{n}" for n in range(10**5)).encode()
    assert len(CsvTable(header + b"\n", "f").header) == 10**5


def test_what_is_no_workbook_is_one_sentence():
    with pytest.raises(ReadError, match="f is not a readable xlsx workbook: File is not a zip"):
        list(xlsx_rows(b"no zip", "f"))
