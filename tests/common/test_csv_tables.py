"""CSV files; the first sheet of a workbook is tested with the lexicon, which has some."""

import csv
import io
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from affectgpt_jax.common import tables
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


MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
STRINGS = f'<sst xmlns="{MAIN}"><si><t>name</t></si><si><t>a</t></si></sst>'
ROWS = (
    '<row><c r="A1" t="s"><v>0</v></c></row>'
    '<row><c r="A2" t="s"><v>1</v></c></row>'
    '<row><c r="A3" t="inlineStr"><is><t>b</t></is></c></row>'
)


def workbook(rows=ROWS, strings=STRINGS, before="", kind=zipfile.ZIP_DEFLATED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", kind) as archive:
        archive.writestr("xl/sharedStrings.xml", strings)
        archive.writestr(
            "xl/worksheets/sheet1.xml",
            f'{before}<worksheet xmlns="{MAIN}"><sheetData>{rows}</sheetData></worksheet>',
        )
    return stream.getvalue()


def test_the_first_sheet_of_a_workbook_is_read():
    assert list(xlsx_rows(workbook(), "f")) == [{"name": "a"}, {"name": "b"}]


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"rows": ROWS + "<row/>" * 70_000}, "sheet1.xml expands from"),
        ({"rows": ROWS + "<a/>" * 1_100}, "sheet1.xml has more than 1,000 elements"),
        ({"strings": STRINGS.replace("name", "x" * 40_000)}, "a cell of 40,000 characters"),
        ({"before": '<!DOCTYPE a [<!ENTITY b "c">]>'}, "defines entities"),
        ({"kind": zipfile.ZIP_BZIP2}, "is compressed in a way that is not read"),
        ({"rows": ROWS.replace("<v>1", "<v>7")}, "list index out of range"),
        ({"rows": '<row><c t="s"><v>0</v></c></row>'}, "'r'"),
    ],
    ids=range(7),
)
def test_a_workbook_that_would_fill_the_memory_is_refused(parts, reason, monkeypatch):
    monkeypatch.setattr(tables, "MAX_SHEET_BYTES", 400_000)
    monkeypatch.setattr(tables, "MAX_ELEMENTS", 1_000)
    with pytest.raises(ReadError) as error:
        list(xlsx_rows(workbook(**parts), "f"))
    assert "f is not a readable xlsx workbook: " in str(error.value) and reason in str(error.value)
