"""Scores of predicted label lists."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def hit_rate(
    predictions: Sequence[Sequence[str]], truth: Sequence[str], max_labels: int | None = None
) -> float:
    """Share of clips, 0 to 1, whose true word is among the first `max_labels` predicted ones.

    A budget of labels matters: listing every emotion hits always.

    Args:
        predictions: label list of each clip, the likeliest first.
        truth: the true word of each clip.
        max_labels: labels that count; None counts all.

    Raises:
        ValueError: no clips, or lists of different lengths.
    """
    if not truth or len(predictions) != len(truth):
        raise ValueError(f"expected as many predictions ({len(predictions)}) as truths, 1 or more")
    return float(
        np.mean([word in list(p)[:max_labels] for p, word in zip(predictions, truth, strict=True)])
    )


def labels_per_clip(predictions: Sequence[Sequence[str]]) -> float:
    """Mean length of the label lists."""
    return float(np.mean([len(labels) for labels in predictions]))
