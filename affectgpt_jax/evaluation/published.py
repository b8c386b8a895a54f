"""Published figures that ship with the package, for comparison."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

from affectgpt_jax.common.errors import ReadError
from affectgpt_jax.common.files import read_bytes
from affectgpt_jax.common.tables import csv_rows

RESULTS = Path(__file__).parent.parent / "assets" / "published" / "results.csv"
LATER = RESULTS.with_name("later.csv")
SOURCE = "arXiv 2501.16566"
MAIN_TABLE = "2/12"  # systems on the nine sets
OV_MERD_TABLE = "10"  # descriptions on OV-MERD
PRIMARY = ("primary", "Fs")


@dataclasses.dataclass(frozen=True)
class System:
    """A row of a published table.

    Attributes:
        name: as the table has it.
        modalities: A, V, T as it was given them; "" where the table does not say.
        values: shares, 0 to 1, by set or group of sets: the primary metric.
        others: shares by set and metric (ACC, Ps, Rs): the further ones.
        source: the paper that says so.
    """

    name: str
    modalities: str
    values: dict[str, float]
    others: dict[tuple[str, str], float]
    source: str = SOURCE


@functools.cache
def read_published(table: str) -> tuple[System, ...]:
    """The rows of a table of the paper, in its order.

    Args:
        table: its number as `results.csv` has it: "2/12", "4", "5", "6", "8", "10", ...

    Raises:
        ReadError: no such table.
    """
    found = _read(RESULTS, table)
    if not found:
        raise ReadError(f"{RESULTS} has no table {table!r}")
    return found


@functools.cache
def read_later(table: str) -> tuple[System, ...]:
    """Systems that came after the paper, in the shape of one of its tables; none for most.

    Of some only the mean over the nine sets is known here.
    """
    return _read(LATER, table)


def _read(path: Path, table: str) -> tuple[System, ...]:
    columns = ("table", "system", "modalities", "dataset", "metric", "value")
    found: dict[tuple[str, str], System] = {}
    for _, row in csv_rows(read_bytes(path), str(path), columns):
        if row["table"] == table:
            key = row["system"], row["modalities"]
            system = found.setdefault(key, System(*key, {}, {}, row.get("source", SOURCE)))
            share = round(float(row["value"]) / 100, 6)
            if row["metric"] in PRIMARY:
                system.values[row["dataset"]] = share
            else:
                system.others[row["dataset"], row["metric"]] = share
    return tuple(found.values())
