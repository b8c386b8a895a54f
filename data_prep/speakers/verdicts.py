"""Verdicts of the speaker check as a CSV file: a row per clip, in order."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from affectgpt_jax.common.errors import ReadError
from affectgpt_jax.common.files import read_bytes
from affectgpt_jax.common.tables import csv_rows, write_csv

from .synchrony import VERDICTS

NUMBERS = ("score", "active_share", "voiced_share", "faces", "tracks", "frames")
COLUMNS = ("name", "verdict", *NUMBERS, "network", "reason")


def write_speakers(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write or replace the file of verdicts.

    Args:
        path: the file.
        rows: cells by column of `COLUMNS`; a number that is unknown is absent, None or NaN.

    Raises:
        OSError: it cannot be written.
    """
    write_csv(path, COLUMNS, ({c: _cell(row.get(c)) for c in COLUMNS} for row in rows))


def _cell(value: Any) -> Any:
    if value is None or value != value:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else value


def read_speakers(path: str | os.PathLike[str]) -> dict[str, dict[str, str]]:
    """The rows of a file of verdicts by clip name; `reason` may be missing from it.

    Raises:
        ReadError: no such file, a missing column, a name that is repeated, a verdict that is none
            of `VERDICTS`, or a number that is none.
    """
    path, rows = Path(path), {}
    for line, row in csv_rows(read_bytes(path), str(path), COLUMNS[:-1]):
        where, name = f"{path}, line {line}", row["name"]
        if name in rows:
            raise ReadError(f"{where}: the clip {name!r} has a row already")
        if row["verdict"] not in VERDICTS:
            raise ReadError(
                f"{where}: the verdict {row['verdict']!r} is none of {', '.join(VERDICTS)}"
            )
        for column in NUMBERS:
            if row[column] and not _is_number(row[column]):
                raise ReadError(f"{where}: expected a number as {column}, found {row[column]!r}")
        rows[name] = {"reason": ""} | row
    return rows


def _is_number(text: str) -> bool:
    try:
        return abs(float(text)) < float("inf")
    except ValueError:
        return False
