"""Bytes to rows: CSV, the first sheet of an xlsx workbook, and the arrays of an npz archive."""

from __future__ import annotations

import csv
import io
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from affectgpt_jax.common.errors import UserError
from affectgpt_jax.evaluation import plain_pickle

SHEET = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"


class ReadError(UserError, ValueError):
    """A file that cannot be used: one sentence that names it, and the place in it."""


def read_bytes(path: Path) -> bytes:
    """Everything in a file.

    Raises:
        ReadError: it does not exist or cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ReadError(f"{path} cannot be read: {error.strerror or error}") from None


def decode(data: bytes, where: str) -> str:
    """UTF-8 text, with or without a byte order mark.

    Raises:
        ReadError: another encoding; the message has the line.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ReadError(
            f"{where}, line {line}: byte {data[error.start]:#04x} is not UTF-8; save it as UTF-8"
        ) from None


def whole_lines(path: Path) -> list[str]:
    """The lines of a file that a program adds to; none where there is no file yet.

    What a killed program left unfinished at the end is no line, and is cut off.

    Raises:
        ReadError: a file that cannot be read, or is not UTF-8.
    """
    if not path.exists():
        return []
    data = read_bytes(path)
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with path.open("rb+") as file:
            file.truncate(len(whole))
    return decode(whole, str(path)).split("\n")[:-1]


def csv_rows(
    data: bytes, where: str, columns: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and cells by column name of each row of a CSV file (RFC 4180) with a header.

    Blank lines are no rows.

    Args:
        data: the file's bytes, UTF-8.
        where: what messages call it.
        columns: those it must have; others are handed over as well.

    Raises:
        ReadError: another encoding, broken quoting, a missing or repeated column, or a row with
            more or fewer cells than the header.
    """
    # Lenient quoting would let one open quote swallow the rest of the file as a single cell.
    reader = csv.reader(io.StringIO(decode(data, where), newline=""), strict=True)
    header = None
    try:
        for row in reader:
            if not row:
                continue
            if header is None:
                header = _header(row, where, columns)
            elif len(row) != len(header):
                raise ReadError(
                    f"{where}, line {reader.line_num}: expected {len(header)} cells, as in the "
                    f'header, found {len(row)}; a cell with commas needs "double quotes"'
                )
            else:
                yield reader.line_num, dict(zip(header, row))
    except csv.Error as error:
        raise ReadError(f"{where}, line {reader.line_num}: not CSV: {error}") from None
    if header is None:
        raise ReadError(f"{where} is empty; expected a CSV file with a header")


def _header(row: list[str], where: str, columns: Sequence[str]) -> list[str]:
    header = [cell.strip() for cell in row]
    for column in columns:
        if column not in header:
            raise ReadError(f"{where}: no column {column!r} in the header {shorten(header)}")
    if repeated := [column for column in header if header.count(column) > 1]:
        raise ReadError(f"{where}: the header has column {shorten(repeated[0])} more than once")
    return header


def shorten(value: Any, limit: int = 80) -> str:
    """In one line of printable characters, cut off where it gets long."""
    try:
        text = repr(value)
    # A file may nest deeper than Python prints, or hold longer numbers.
    except (RecursionError, ValueError):
        text = f"an unprintable {type(value).__name__}"
    return text if len(text) <= limit else f"{text[:limit]}..."


def xlsx_rows(data: bytes, where: str) -> Iterator[dict[str, str]]:
    """Cells by column name of each row of a workbook's first sheet, whose first row is the header.

    An empty cell is absent from its row. The format (ECMA-376) is a zip of XML, and text cells
    are all that is needed of it.

    Raises:
        ReadError: not such a file.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            strings = _shared_strings(archive)
            sheet = ElementTree.fromstring(archive.read("xl/worksheets/sheet1.xml"))
        header: dict[str, str] = {}
        for row in sheet.iter(f"{SHEET}row"):
            cells = {}
            for cell in row.iter(f"{SHEET}c"):
                if text := _cell_text(cell, strings):
                    cells[re.match("[A-Z]+", cell.attrib["r"])[0]] = text
            if not header:
                header = cells
            elif cells:
                yield {header[column]: text for column, text in cells.items() if column in header}
    # A damaged archive fails in any layer: zip, deflate, XML, or the references between cells.
    except Exception as error:
        raise ReadError(f"{where} is not a readable xlsx workbook: {_reason(error)}") from None


def _shared_strings(archive: zipfile.ZipFile) -> list[str]:
    root = ElementTree.fromstring(archive.read("xl/sharedStrings.xml"))
    return [_plain_text(item) for item in root.iter(f"{SHEET}si")]


def _plain_text(item: ElementTree.Element) -> str:
    """The text of a string item, in one or several formatted runs, without its phonetic guide."""
    runs = [item, *item.findall(f"{SHEET}r")]
    return "".join(run.findtext(f"{SHEET}t") or "" for run in runs)


def _cell_text(cell: ElementTree.Element, strings: list[str]) -> str:
    if cell.get("t") == "inlineStr":
        return _plain_text(cell.find(f"{SHEET}is"))
    value = cell.findtext(f"{SHEET}v") or ""
    return strings[int(value)] if cell.get("t") == "s" and value else value


def npz_values(
    data: bytes, where: str, names: Sequence[str], allow_pickle: bool
) -> dict[str, list[Any]]:
    """The arrays of an npz archive as lists; of those asked for, the ones that it holds.

    Args:
        data: the file's bytes.
        where: what messages call it.
        names: array names; the others stay unread.
        allow_pickle: read arrays of objects too, through `plain_pickle`, which calls nothing.

    Returns:
        Values by array name, flat; an array without dimensions is a list of one.

    Raises:
        ReadError: a damaged file; objects without `allow_pickle`, or other than plain values.
    """
    found = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for name in names:
                if f"{name}.npy" in archive.namelist():
                    content = archive.read(f"{name}.npy")
                    found[name] = _npy_values(content, f"{where}, {name}", allow_pickle)
    except ReadError:
        raise
    # As above: a damaged archive fails in any layer.
    except Exception as error:
        raise ReadError(f"{where} is not a readable npz archive: {_reason(error)}") from None
    return found


def _npy_values(content: bytes, where: str, allow_pickle: bool) -> list[Any]:
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[version]
    shape, _, dtype = read_header(stream)
    if not dtype.hasobject:
        stream.seek(0)
        return np.lib.format.read_array(stream, allow_pickle=False).ravel().tolist()
    if not allow_pickle:
        raise ReadError(
            f"{where} holds pickled Python objects; if you trust its author, say --allow-pickle "
            "(plain containers, text and numbers are read, and nothing is executed)"
        )
    try:
        values = plain_pickle.loads(content[stream.tell() :])
    except plain_pickle.PickleError as error:
        raise ReadError(f"{where}: {error}") from None
    if not isinstance(values, list) or len(values) != np.prod(shape, dtype=int):
        raise ReadError(f"{where}: the pickled values do not fill an array of shape {shape}")
    return values


def _reason(error: Exception) -> str:
    """The first line of a message, which libraries may leave empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
