"""Minimum Bayes risk decoding: of several sampled answers, what agrees with them the most.

The answers that a model samples about a clip stand for what it believes. Of all label lists that
were sampled, and of all sets of sampled labels, the one with the largest mean wheel F against the
samples has the largest expected score by that belief (Kumar & Byrne 2004). No truth is looked at.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np

from affectgpt_jax.evaluation.rewards import Wheels

# Labels of a set at the most, and sampled labels, the most frequent ones, that sets are made of.
LARGEST_SET = 3
WORDS = 8


@dataclasses.dataclass(frozen=True)
class Consensus:
    """What several answers about a clip agree on.

    Attributes:
        labels: the most frequent in the answers first.
        sample: number of the first answer with these labels; None where no answer has them.
        expected_f: mean wheel F against the answers; nan where no answer is on any wheel.
    """

    labels: tuple[str, ...]
    sample: int | None
    expected_f: float


def consensus(
    samples: Sequence[Sequence[str]], wheels: Wheels, *, new_sets: bool = True
) -> Consensus:
    """The list of labels that agrees the most with sampled ones.

    Candidates are the lists themselves and, with `new_sets`, all sets of sampled labels that are no
    larger than the largest list, and have at most `LARGEST_SET` labels. Of equally good ones the
    shortest is taken, then the one that was sampled most often. Where no sample is on any wheel,
    the most frequent list is.

    Args:
        samples: label lists about one clip, without repeats, one or more.
        wheels: by which lists are compared.
        new_sets: whether sets that nobody has sampled are candidates.

    Raises:
        ValueError: no samples.
    """
    samples = [tuple(labels) for labels in samples]
    if not samples:
        raise ValueError("expected one sampled list of labels or more")
    lists = Counter(samples)
    frequency = Counter(word for labels in samples for word in labels)
    # Counters keep the order of first appearance, and sorting is stable.
    words = [word for word, _ in frequency.most_common()]
    # A set by the rank of its words, as it is written: the most frequent first.
    rank = {word: number for number, word in enumerate(words)}
    sets = {tuple(sorted(labels, key=rank.__getitem__)): None for labels, _ in lists.most_common()}
    if new_sets:
        largest = min(LARGEST_SET, max(map(len, lists)))
        for size in range(1, largest + 1):
            sets |= dict.fromkeys(itertools.combinations(words[:WORDS], size))
    candidates = list(sets)
    value = _mean_f(candidates, list(lists), np.array(list(lists.values())), wheels)
    if np.isnan(value).any():  # no sample is on any wheel, so all candidates are alike
        return Consensus(candidates[0], samples.index(lists.most_common(1)[0][0]), float("nan"))

    def quality(number: int) -> tuple[float, int, int]:
        return round(float(value[number]), 12), -len(candidates[number]), -number

    chosen = max(range(len(candidates)), key=quality)
    best, expected = candidates[chosen], float(value[chosen])
    same = (number for number, labels in enumerate(samples) if {*labels} == {*best})
    return Consensus(best, next(same, None), expected)


def _mean_f(
    candidates: Sequence[Sequence[str]],
    samples: Sequence[Sequence[str]],
    weights: np.ndarray,
    wheels: Wheels,
) -> np.ndarray:
    """Mean wheel F of every candidate against the samples that are on a wheel, `[C]`."""
    sets = wheels.sets([*candidates, *samples])
    claimed, true = sets[: len(candidates), None], sets[len(candidates) :]
    hits, sizes, total = wheels.count(claimed & true), wheels.count(claimed), wheels.count(true)
    scored = total > 0  # [S, W]
    f = (2 * hits / np.maximum(sizes + total, 1) * scored).sum(axis=2)
    weights = weights * scored.any(axis=1)
    with np.errstate(invalid="ignore"):
        return (f / np.maximum(scored.sum(axis=1), 1)) @ weights / weights.sum()
