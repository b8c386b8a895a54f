"""From a report to its files: one page, one JSON file, one Markdown table."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from affectgpt_jax.common.files import write_text
from affectgpt_jax.evaluation.answers import SideBySide
from affectgpt_jax.evaluation.page import render_ablation, render_page
from affectgpt_jax.evaluation.summary import Report
from affectgpt_jax.evaluation.tables import Table, as_dict, render_markdown

REPORT_FILE = "report.json"


def write_report(report: Report, directory: str | Path) -> tuple[Path, ...]:
    """Write `report.html`, `report.json` and `report.md`; each appears whole or not at all.

    Returns:
        Their paths.

    Raises:
        OSError: the directory cannot be made, or a file cannot be written.
    """
    return _write(
        Path(directory),
        {
            "report.html": render_page(report),
            REPORT_FILE: json.dumps(report.as_dict(), indent=1, allow_nan=False) + "\n",
            "report.md": "\n".join(map(render_markdown, report.tables)),
        },
    )


def write_ablation(
    table: Table, directory: str | Path, answers: Sequence[SideBySide] = ()
) -> tuple[Path, ...]:
    """Write `ablation.html`, `ablation.json` and `ablation.md`.

    Args:
        table: of scores.
        directory: where they go.
        answers: of the runs about some clips.

    Raises:
        OSError: the directory cannot be made, or a file cannot be written.
    """
    return _write(
        Path(directory),
        {
            "ablation.html": render_ablation(table, answers),
            "ablation.json": json.dumps(
                as_dict(table) | {"answers": [dataclasses.asdict(a) for a in answers]},
                indent=1,
                allow_nan=False,
            )
            + "\n",
            "ablation.md": render_markdown(table),
        },
    )


def _write(directory: Path, files: Mapping[str, str]) -> tuple[Path, ...]:
    for name, text in files.items():
        write_text(directory / name, text)
    return tuple(directory / name for name in files)
