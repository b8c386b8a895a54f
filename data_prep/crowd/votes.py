"""Votes of a crowd on clips: from the members' probabilities to one word, and as a CSV file."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from affectgpt_jax.common.errors import ReadError
from affectgpt_jax.common.files import read_bytes
from affectgpt_jax.common.tables import csv_rows, write_csv

SENTIMENTS = ("negative", "neutral", "positive")
# A valence of -1 to 1 counts as neutral within this.
NEUTRAL_WITHIN = 0.1


class Vote(NamedTuple):
    """What a crowd says of a clip; a vote that nobody casts is "", and its numbers are 0 or NaN.

    Attributes:
        name: of the clip.
        emotion: the word of most corpora.
        emotion_votes, emotion_members: corpora that say so, of those that vote on emotions.
        emotion_prob: mean probability of the word over the corpora that vote.
        sentiment: negative, neutral or positive.
        sentiment_votes, sentiment_members: the same of the corpora with a valence.
        valence: mean of the corpora, -1 to 1.
        dissent: entropy in nats of the corpora's mean distribution over words.
    """

    name: str
    emotion: str = ""
    emotion_votes: int = 0
    emotion_members: int = 0
    emotion_prob: float = math.nan
    sentiment: str = ""
    sentiment_votes: int = 0
    sentiment_members: int = 0
    valence: float = math.nan
    dissent: float = math.nan


@dataclasses.dataclass(frozen=True, eq=False)
class Ballot:
    """The answers of the members of one corpus, averaged, on N clips.

    Attributes:
        words: its classes, in canonical words; empty where the corpus has no emotions.
        probabilities: `[N, len(words)]`.
        valence: `[N]`, -1 to 1; None where the corpus has none.
    """

    words: tuple[str, ...]
    probabilities: np.ndarray
    valence: np.ndarray | None


def count(names: Sequence[str], ballots: Sequence[Ballot], there: np.ndarray) -> list[Vote]:
    """Count votes: one a corpus, so that a corpus with more members does not outvote others.

    A tie goes to the larger sum of probabilities, or of |valence|, then to the alphabet.

    Args:
        names: of N clips.
        ballots: of the corpora.
        there: bool `[N]`, whether a clip has anything to judge it by.
    """
    votes = []
    for i, name in enumerate(names):
        if not there[i]:
            votes.append(Vote(name))
            continue
        answers = [dict(zip(b.words, b.probabilities[i].tolist())) for b in ballots if b.words]
        valences = [float(b.valence[i]) for b in ballots if b.valence is not None]
        votes.append(Vote(name, *_emotion(answers), *_sentiment(valences), _dissent(answers)))
    return votes


def _emotion(answers: Sequence[Mapping[str, float]]) -> tuple[str, int, int, float]:
    if not answers:
        return "", 0, 0, math.nan
    total: dict[str, float] = {}
    for answer in answers:
        for word, p in answer.items():
            total[word] = total.get(word, 0.0) + p
    chosen = [min(answer, key=lambda word: (-answer[word], word)) for answer in answers]
    word = min(chosen, key=lambda w: (-chosen.count(w), -total[w], w))
    return word, chosen.count(word), len(answers), total[word] / len(answers)


def _sentiment(valences: Sequence[float]) -> tuple[str, int, int, float]:
    if not valences:
        return "", 0, 0, math.nan
    words = [sentiment_of(valence) for valence in valences]
    weight = {w: sum(abs(v) for v, own in zip(valences, words) if own == w) for w in words}
    word = min(words, key=lambda w: (-words.count(w), -weight[w], w))
    return word, words.count(word), len(words), float(np.mean(valences))


def sentiment_of(valence: float) -> str:
    """The word for a valence of -1 to 1."""
    return SENTIMENTS[1 + (valence > NEUTRAL_WITHIN) - (valence < -NEUTRAL_WITHIN)]


def _dissent(answers: Sequence[Mapping[str, float]]) -> float:
    words = {word for answer in answers for word in answer}
    mean = [sum(answer.get(w, 0.0) for answer in answers) / len(answers) for w in sorted(words)]
    return -sum(p * math.log(p) for p in mean if p > 0) if answers else math.nan


def write_votes(path: str | os.PathLike[str], votes: Iterable[Vote]) -> None:
    """Write or replace a CSV file with a row per clip.

    Raises:
        OSError: it cannot be written.
    """
    rows = ({k: _cell(v) for k, v in vote._asdict().items()} for vote in votes)
    write_csv(path, Vote._fields, rows)


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4f}"
    return value


def read_votes(path: str | os.PathLike[str]) -> dict[str, Vote]:
    """The votes in a file by clip name.

    Raises:
        ReadError: no such file, a missing column, a name that is repeated, a number or a sentiment
            that is none.
    """
    path, votes = Path(path), {}
    for line, row in csv_rows(read_bytes(path), str(path), Vote._fields):
        where = f"{path}, line {line}"
        if row["name"] in votes:
            raise ReadError(f"{where}: the clip {row['name']!r} has a row already")
        if row["sentiment"] not in ("", *SENTIMENTS):
            expected = ", ".join(SENTIMENTS)
            raise ReadError(
                f"{where}: the sentiment {row['sentiment']!r} is none of {expected}, or empty"
            )
        values = {
            c: _value(row[c], Vote._field_defaults.get(c, ""), c, where) for c in Vote._fields
        }
        votes[row["name"]] = Vote(**values)
    return votes


def _value(text: str, default: Any, column: str, where: str) -> Any:
    if isinstance(default, str) or (isinstance(default, float) and not text):
        return text or default
    try:
        return type(default)(text)
    except ValueError:
        raise ReadError(f"{where}: expected a number as {column}, found {text!r}") from None
