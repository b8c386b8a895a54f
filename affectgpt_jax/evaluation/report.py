"""From a report to its files: one page, one JSON file, one Markdown table."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from affectgpt_jax.evaluation.page import render_ablation, render_page
from affectgpt_jax.evaluation.summary import Report
from affectgpt_jax.evaluation.tables import Table, as_dict, render_markdown


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
            "report.json": json.dumps(report.as_dict(), indent=1, allow_nan=False) + "\n",
            "report.md": "\n".join(map(render_markdown, report.tables)),
        },
    )


def write_ablation(table: Table, directory: str | Path) -> tuple[Path, ...]:
    """Write `ablation.html`, `ablation.json` and `ablation.md`.

    Raises:
        OSError: the directory cannot be made, or a file cannot be written.
    """
    return _write(
        Path(directory),
        {
            "ablation.html": render_ablation(table),
            "ablation.json": json.dumps(as_dict(table), indent=1, allow_nan=False) + "\n",
            "ablation.md": render_markdown(table),
        },
    )


def _write(directory: Path, files: Mapping[str, str]) -> tuple[Path, ...]:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        temporary = None
        try:
            with tempfile.NamedTemporaryFile(dir=directory, suffix=".tmp", delete=False) as file:
                temporary = file.name
                file.write(text.encode("utf-8"))
            # A temporary file is its owner's alone; a report is as open as the umask allows.
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(temporary, 0o666 & ~mask)
            os.replace(temporary, directory / name)
        except BaseException:
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
            raise
    return tuple(directory / name for name in files)
