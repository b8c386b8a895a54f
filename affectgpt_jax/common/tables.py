"""Rows of tables: CSV files, read and written, and the first sheet of an xlsx workbook."""

from __future__ import annotations

import csv
import io
import os
import re
import zipfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

from affectgpt_jax.common import npy
from affectgpt_jax.common.errors import ReadError, UserError
from affectgpt_jax.common.files import decode, write_text
from affectgpt_jax.common.text import shorten

# Of a part of a workbook, unpacked: a hundred times those of the release.
MAX_SHEET_BYTES = 32 * 2**20
MAX_ELEMENTS = 2**21
MAX_CELL = 32_767
SHEET = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"


class CsvTable:
    """A CSV file (RFC 4180) with a header; iterating gives line number and cells by column name.

    Blank lines are no rows. Rows are read as they are asked for.

    Args:
        data: the file's bytes, with or without a byte order mark.
        where: what messages call it.
        columns: those it must have; others are handed over as well.
        ignore: columns to leave out, which must stand in the header, and may do so repeatedly.
        encoding: of the file.
        advice: what to do about another encoding, for messages.
        error: the class to raise.

    Attributes:
        header: the names of the columns, those to ignore left out.

    Raises:
        ReadError: another encoding, broken quoting, a missing or repeated column; while iterating,
            a row with more or fewer cells than the header, or a cell of more than 131,072
            characters.
    """

    def __init__(
        self,
        data: bytes,
        where: str,
        columns: Sequence[str] = (),
        *,
        ignore: Collection[str] = (),
        encoding: str = "utf-8",
        advice: str = "save it as UTF-8",
        error: type[UserError] = ReadError,
    ):
        self._where, self._ignore, self._error = where, frozenset(ignore), error
        text = decode(data, where, encoding, advice=advice, error=error)
        # Lenient quoting would let one open quote swallow the rest of the file as a single cell.
        self._reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        self._cells = [cell.strip() for cell in next(self._rows(), ())]
        self.header = [cell for cell in self._cells if cell not in self._ignore]
        if not self._cells:
            raise error(f"{where} is empty; expected a CSV file with a header")
        for column in ignore:
            if column not in self._cells:
                raise error(
                    f"{where}: no column {column!r} to ignore in the header {shorten(self._cells)}"
                )
        for column in columns:
            if column not in self.header:
                shown = shorten(self._cells)
                raise error(
                    f"{where}: no column {column!r} in the header {shown}; expected columns with "
                    "commas between them"
                )
        for column, times in Counter(self.header).items():
            if times > 1:
                raise error(f"{where}: the header has the column {shorten(column)} more than once")

    def _rows(self) -> Iterator[list[str]]:
        try:
            yield from filter(None, self._reader)
        except csv.Error as trouble:
            raise self._error(
                f"{self._where}, line {self._reader.line_num}: not CSV: {trouble}"
            ) from None

    def __iter__(self) -> Iterator[tuple[int, dict[str, str]]]:
        for row in self._rows():
            line = self._reader.line_num
            if len(row) != len(self._cells):
                raise self._error(
                    f"{self._where}, line {line}: expected {len(self._cells)} cells, as in the "
                    f'header, found {len(row)}; a cell with commas needs "double quotes"'
                )
            named = zip(self._cells, row, strict=True)
            yield line, {name: cell for name, cell in named if name not in self._ignore}


def csv_rows(
    data: bytes, where: str, columns: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a `CsvTable`, whose header is read with the first one."""
    yield from CsvTable(data, where, columns)


def write_csv(
    path: str | os.PathLike[str], columns: Sequence[str], rows: Iterable[Mapping[str, Any]]
) -> None:
    """Write or replace a CSV file with a header, whole or not at all.

    Args:
        path: the file.
        columns: in order; a row may lack some of them, and has no others.
        rows: cells by column name.

    Raises:
        OSError: it cannot be written.
        ValueError: a row with another column.
    """
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, stream.getvalue())


def xlsx_rows(data: bytes, where: str) -> Iterator[dict[str, str]]:
    """Cells by column name of each row of a workbook's first sheet, whose first row is the header.

    An empty cell is absent from its row. The format (ECMA-376) is a zip of XML, and text cells
    are all that is needed of it.

    Raises:
        ReadError: not such a file, or one with parts of more than `MAX_SHEET_BYTES` or
            `MAX_ELEMENTS`, or with cells of more than `MAX_CELL` characters, which is the format's
            own limit.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            strings = [_plain_text(item) for item in _elements(archive, "sharedStrings", "si")]
            header: dict[str, str] = {}
            for row in _elements(archive, "worksheets/sheet1", "row"):
                cells = {}
                for cell in row.iter(f"{SHEET}c"):
                    if text := _cell_text(cell, strings):
                        cells[re.match("[A-Z]+", cell.attrib["r"])[0]] = text
                if not header:
                    header = cells
                elif cells:
                    yield {header[column]: cells[column] for column in cells if column in header}
    # A damaged archive fails in any layer: zip, deflate, XML, or the references between cells.
    except Exception as error:
        raise ReadError(f"{where} is not a readable xlsx workbook: {npy.reason(error)}") from None


def _elements(archive: zipfile.ZipFile, part: str, tag: str) -> Iterator[ElementTree.Element]:
    """The elements of a part of the workbook; what they hold is forgotten behind them."""
    text = npy.read_entry(archive, f"xl/{part}.xml", MAX_SHEET_BYTES).decode("utf-8-sig")
    if "<!DOCTYPE" in text:
        raise ValueError(f"xl/{part}.xml defines entities, which the format does not have")
    for count, (_, element) in enumerate(ElementTree.iterparse(io.StringIO(text))):
        if count == MAX_ELEMENTS:
            raise ValueError(f"xl/{part}.xml has more than {MAX_ELEMENTS:,} elements")
        if element.tag == f"{SHEET}{tag}":
            yield element
            element.clear()


def _plain_text(item: ElementTree.Element) -> str:
    """The text of a string item, in one or several formatted runs, without its phonetic guide."""
    runs = [item, *item.findall(f"{SHEET}r")]
    text = "".join(run.findtext(f"{SHEET}t") or "" for run in runs)
    if len(text) > MAX_CELL:
        raise ValueError(f"a cell of {len(text):,} characters, and the format has {MAX_CELL:,}")
    return text


def _cell_text(cell: ElementTree.Element, strings: list[str]) -> str:
    if cell.get("t") == "inlineStr":
        return _plain_text(cell.find(f"{SHEET}is"))
    value = cell.findtext(f"{SHEET}v") or ""
    return strings[int(value)] if cell.get("t") == "s" and value else value
