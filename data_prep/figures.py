"""Figures of Matplotlib as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from affectgpt_jax.common.files import atomic_write
from affectgpt_jax.common.text import one_line

LABEL_SHOWN = 40  # characters


def save_png(figure: Any, path: Path) -> None:
    """Write a figure without a date or version in it: the same data, the same bytes.

    Raises:
        OSError: it cannot be written.
    """
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120, metadata={"Software": None})


def plain(text: str) -> str:
    """Text from outside for a figure: in one line, not too long, and without formulas."""
    text = one_line(text)
    text = text if len(text) <= LABEL_SHOWN else f"{text[:LABEL_SHOWN]}\u2026"
    return text.replace("$", r"\$")
