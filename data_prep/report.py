"""Report of an extraction: `extraction.csv` with a row per clip, and a summary in a few lines."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from affectgpt_jax.common.files import read_bytes
from affectgpt_jax.common.tables import CsvTable, csv_rows, write_csv
from affectgpt_jax.common.text import listed
from affectgpt_jax.data.modalities import extracted_features
from affectgpt_jax.evaluation.readers import clip_of

REPORT_FILE = "extraction.csv"
FACTS = ("frames", "faces", "width", "height", "seconds", "sha256")
COLUMNS = (
    *("name", "status", "reason"),
    *(feature for features in extracted_features().values() for feature in features),
    *FACTS,
)
OK, LEFT_OUT = "ok", "left out"
REASONS_SHOWN = 20


@dataclasses.dataclass(frozen=True)
class Elsewhere:
    """The clips of other extractions, which this one must not contain.

    Attributes:
        files: by the hash of a clip's files, which clip of which directory has them.
        names: by the name of a clip, the directory that has one of that name.
    """

    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def remarks(self, report: Sequence[Mapping[str, Any]]) -> list[str]:
        """A line about clips that share a name, but no content, with clips of other extractions."""
        shared = [r["name"] for r in report if r["status"] == OK and r["name"] in self.names]
        if not shared:
            return []
        places = ", ".join(sorted({self.names[name] for name in shared}))
        return [
            f"kept, though {places} has other files of that name: {len(shared):,}: {listed(shared)}"
        ]


def read_elsewhere(directories: Sequence[Path]) -> Elsewhere:
    """The clips that the reports of other extractions list as ok.

    Raises:
        ReadError: a directory without such a report, or one that cannot be read.
    """
    files: dict[str, str] = {}
    names: dict[str, str] = {}
    for directory in directories:
        path = directory.expanduser() / REPORT_FILE
        for _, row in csv_rows(read_bytes(path), str(path), ("name", "status", "sha256")):
            if row["status"] == OK:
                names.setdefault(row["name"], str(directory))
                if row["sha256"]:
                    files.setdefault(row["sha256"], f"{row['name']!r} in {directory}")
    return Elsewhere(files, names)


def clip_report(
    rows: Iterable[Mapping[str, Any]],
    features: Sequence[str],
    allow_missing: bool,
    elsewhere: Elsewhere,
) -> list[dict[str, Any]]:
    """A row of `COLUMNS` for each clip, in order.

    Args:
        rows: of each clip: name, problems by feature, facts.
        features: that are wanted.
        allow_missing: whether a clip may lack some of them.
        elsewhere: what must not be here again.
    """
    report, first = [], {}
    for row in rows:
        problems, facts = row["problems"], row["facts"]
        usable = len(problems) < (len(features) if allow_missing else 1)
        reason = reason_of(problems, features)
        digest = facts.get("sha256")
        if usable and digest in elsewhere.files:
            usable, reason = False, f"the same file is {elsewhere.files[digest]}"
        # Rows of one clip, as pairs of descriptions are, have its files on purpose.
        elif usable and digest in first and clip_of(first[digest]) != clip_of(row["name"]):
            usable, reason = False, f"the same file is {first[digest]!r}"
        if usable and digest:
            first.setdefault(digest, row["name"])
        report.append(
            {
                "name": row["name"],
                "status": OK if usable else LEFT_OUT,
                "reason": reason,
                **{f: "yes" for f in features if f not in problems},
                **{fact: facts[fact] for fact in FACTS if fact in facts},
            }
        )
    return report


def reason_of(problems: Mapping[str, str], features: Sequence[str]) -> str:
    """The reasons as one text; a reason for all features is given once."""
    causes: dict[str, list[str]] = {}
    for feature in features:
        if feature in problems:
            causes.setdefault(problems[feature], []).append(feature)
    if len(causes) == 1 and len(problems) == len(features):
        return next(iter(causes))
    return "; ".join(f"{', '.join(names)}: {cause}" for cause, names in causes.items())


def write_report(path: Path, report: Sequence[Mapping[str, Any]]) -> None:
    """Write the CSV file of `COLUMNS`, atomically."""
    write_csv(path, COLUMNS, report)


def copy_report(source: Path, to: Path, names: Collection[str]) -> None:
    """Write the rows of these clips of an extraction's report, if there is one, into `to`.

    Raises:
        ReadError: a report that cannot be read.
        OSError: one that cannot be written.
    """
    path = source / REPORT_FILE
    if path.is_file():
        table = CsvTable(read_bytes(path), str(path), ("name",))
        rows = [row for _, row in table if row["name"] in names]
        write_csv(to / REPORT_FILE, table.header, rows)


def reasons(report: Sequence[Mapping[str, Any]]) -> list[str]:
    """Reasons why clips are left out or lack a modality: a line each, the most frequent first."""
    kinds: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in report:
        if row["reason"]:
            # Names and numbers differ from clip to clip.
            kind = re.sub(r"'[^']*'|\"[^\"]*\"|\d+([.,]\d+)*", "_", row["reason"])
            kinds[row["status"], kind].append(row["name"])
    ordered = sorted(kinds.items(), key=lambda item: -len(item[1]))
    lines = [
        f"{LEFT_OUT if status == LEFT_OUT else 'incomplete'}, {kind}: {len(names):,}: "
        f"{listed(names)}"
        for (status, kind), names in ordered[:REASONS_SHOWN]
    ]
    if more := ordered[REASONS_SHOWN:]:
        lines.append(f"and {len(more)} more reasons of {sum(len(n) for _, n in more):,} clips")
    return lines
