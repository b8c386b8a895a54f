"""Confusion tables: clips by true and predicted label."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from affectgpt_jax.evaluation.lexicon import WHEELS, Lexicon, normalise
from affectgpt_jax.evaluation.metrics import SENTIMENTS, EncodedLabels

# Of a set with more true words than this, the rarer ones share a row.
MAX_ROWS = 30
NOTHING = "(none)"
OTHERS = "(others)"


@dataclasses.dataclass(frozen=True, eq=False)
class Confusion:
    """Number of clips by true and predicted label.

    Attributes:
        wheel: 1 to 5; None where the labels are on none.
        rows: what is true.
        columns: what is predicted; `NOTHING` is a prediction without a label on the wheel.
        counts: int64 [rows, columns]. A clip with several labels counts with each of them, so a
            row may sum to more than its clips.
        clips: clips of each row, int64 [rows].
        right: the columns that are right in each row, tuples of column numbers.
    """

    wheel: int | None
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    counts: np.ndarray
    clips: np.ndarray
    right: tuple[tuple[int, ...], ...]

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "wheel": self.wheel,
            "true": list(self.rows),
            "predicted": list(self.columns),
            "clips": self.clips.tolist(),
            "counts": self.counts.tolist(),
        }


def confusions(
    task: str,
    predictions: Sequence[Any],
    truth: Sequence[Any],
    lexicon: Lexicon | None = None,
    level: int = 1,
) -> tuple[Confusion, ...]:
    """One table per wheel, or a single one without a lexicon.

    Rows are the true words of basic and words, the commonest first, the true labels of the wheel
    for fine, and the sign of the valence for sentiment; columns are the labels of the wheel, the
    first predicted words, or the three sentiments, where any other word counts as neutral. Clips
    that the score leaves out are left out.

    Args:
        task: fine, basic, sentiment, words or preference.
        predictions: of each clip, as the score of the task takes them.
        truth: of each clip, in the same order.
        lexicon: what maps words to labels, for fine and basic.
        level: of the wheels.
    """
    if task == "sentiment":
        return (_sentiment(predictions, truth),)
    if task == "words":
        return (_words(predictions, truth),)
    if task == "preference":
        return (_preference(predictions, truth),)
    predicted = EncodedLabels.of(predictions, lexicon)
    true = EncodedLabels.of(truth if task == "fine" else [(word,) for word in truth], lexicon)
    classes = None if task == "fine" else _classes([normalise(word) for word in truth])
    found = []
    for wheel in range(WHEELS):
        p, _ = predicted.on_wheel(lexicon, level, wheel)
        t, _ = true.on_wheel(lexicon, level, wheel)
        scored = t.any(axis=1)
        labels = lexicon.labels[level - 1][wheel]
        rows, member = (labels, t) if classes is None else classes
        found.append(_cross(wheel + 1, rows, labels, member[scored], p[scored], t[scored]))
    return tuple(found)


def _cross(
    wheel: int | None,
    rows: Sequence[str],
    columns: Sequence[str],
    member: np.ndarray,
    predicted: np.ndarray,
    true: np.ndarray,
) -> Confusion:
    """Count clips; `member` is bool [clips, rows], the others are bool [clips, columns]."""
    member = member.astype(np.int64)
    claims = np.column_stack([predicted, ~predicted.any(axis=1)]).astype(np.int64)
    kept = np.flatnonzero(member.any(axis=0))
    # A row of wheel labels is right in its own column, a row of words where those words map to.
    own = rows is columns
    right = [
        (row,) if own else tuple(np.flatnonzero(true[member[:, row] > 0].any(axis=0)).tolist())
        for row in kept.tolist()
    ]
    return Confusion(
        wheel,
        tuple(rows[row] for row in kept),
        (*columns, NOTHING),
        (member.T @ claims)[kept],
        member.sum(axis=0)[kept],
        tuple(right),
    )


def _classes(words: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """The commonest words and bool [clips, words]; the last word stands for all others."""
    common = [word for word, _ in Counter(word for word in words if word).most_common()]
    shown = common if len(common) <= MAX_ROWS else common[: MAX_ROWS - 1]
    names = tuple(shown) if len(shown) == len(common) else (*shown, OTHERS)
    number = {word: n for n, word in enumerate(shown)}
    member = np.zeros((len(words), len(names)), bool)
    for clip, word in enumerate(words):
        if word:
            member[clip, number.get(word, len(names) - 1)] = True
    return names, member


def _words(predictions: Sequence[Sequence[str]], truth: Sequence[str]) -> Confusion:
    words = [normalise(word) for word in truth]
    rows, member = _classes(words)
    known, clips = set(words), np.flatnonzero(member.any(axis=1))
    number = {word: n for n, word in enumerate(rows) if word != OTHERS}
    columns = rows if OTHERS in rows else (*rows, OTHERS)
    predicted = np.zeros((len(words), len(columns)), bool)
    for clip, labels in enumerate(predictions):
        if word := normalise(labels[0]) if labels else "":
            place = number.get(word, len(columns) - 1)
            predicted[clip, place] = True
    table = _cross(None, rows, columns, member[clips], predicted[clips], predicted[clips])
    # Two rare words share a row and a column without being the same.
    right = tuple((n,) if word in known and word != OTHERS else () for n, word in enumerate(rows))
    return dataclasses.replace(table, right=right)


def _two_classes(
    rows: tuple[str, str],
    columns: tuple[str, ...],
    other: str,
    predictions: Sequence[str],
    true: np.ndarray,
) -> Confusion:
    """The table of what counts as the second row where it is its word, and else as the first.

    Args:
        rows, columns: the words.
        other: the column of any other word.
        predictions: of each clip.
        true: int [clips], the row; -1 leaves a clip out.
    """
    words = [normalise(word) for word in predictions]
    place = np.asarray([columns.index(word if word in columns else other) for word in words])
    counts = np.zeros((2, len(columns)), np.int64)
    scored = true >= 0
    np.add.at(counts, (true[scored], place[scored]), 1)
    second = columns.index(rows[1])
    first = tuple(number for number in range(len(columns)) if number != second)
    return Confusion(None, rows, columns, counts, counts.sum(axis=1), (first, (second,)))


def _preference(predictions: Sequence[str], truth: Sequence[str]) -> Confusion:
    rows, columns = ("a1", "a2"), ("a1", "a2", "same", NOTHING)
    true = np.asarray([rows.index(word) if word in rows else -1 for word in truth])
    return _two_classes(rows, columns, NOTHING, predictions, true)


def _sentiment(predictions: Sequence[str], truth: Sequence[float]) -> Confusion:
    value = np.asarray(truth, float)
    true = np.where(value == 0, -1, value > 0)
    return _two_classes(("negative", "positive"), SENTIMENTS, "neutral", predictions, true)
