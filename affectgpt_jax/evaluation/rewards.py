"""Rewards of single answers: what MER-UniBench measures on a test set, clip by clip.

A reward is a number from 0 to 1 for one answer, less a penalty for labels beyond those of the
truth. All answers of a batch are scored at once, with array look-ups.

The benchmark's F is 2PR / (P + R) of *mean* precision and recall, `wheel_f` is a mean of F's: their
optima differ. `wheel_f_corpus` is the exact gradient of the benchmark's F by the precision and
recall of a clip, so that ascending its mean ascends the reported number.

Labels that share a place on a wheel count once, and words that the lexicon does not know count
nothing, so a list can grow without losing precision. The length penalty counts labels as written.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from affectgpt_jax.common.errors import UserError
from affectgpt_jax.evaluation.lexicon import WHEELS, Lexicon, normalise
from affectgpt_jax.evaluation.metrics import EncodedLabels, Labels

REWARDS = ("wheel_f", "wheel_f_corpus", "hit", "sentiment")


class RewardError(UserError, ValueError):
    """A reward that makes no sense, or clips that it cannot score."""


@dataclasses.dataclass(frozen=True, eq=False)
class Wheels:
    """Some wheels of a lexicon, all their labels side by side.

    Attributes:
        lexicon: what maps words to labels.
        numbers: of the wheels, from 1.
        level: of their labels, 1 or 2.
    """

    lexicon: Lexicon
    numbers: tuple[int, ...] = tuple(range(1, WHEELS + 1))
    level: int = 1

    def __post_init__(self) -> None:
        known = all(type(n) is int and 1 <= n <= WHEELS for n in self.numbers)
        if not self.numbers or not known or len({*self.numbers}) < len(self.numbers):
            raise RewardError(
                f"wheels {self.numbers}; expected some of the numbers 1 to {WHEELS}, each once"
            )

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        sizes = [len(self.lexicon.labels[self.level - 1][number - 1]) for number in self.numbers]
        return np.cumsum([0, *sizes[:-1]])

    def sets(self, labels: Labels) -> np.ndarray:
        """Which labels of the wheels each list names: bool `[N, L]`, L labels of all W wheels."""
        encoded = EncodedLabels.of(labels, self.lexicon)
        return np.concatenate(
            [encoded.on_wheel(self.lexicon, self.level, n - 1)[0] for n in self.numbers], axis=1
        )

    def count(self, sets: np.ndarray) -> np.ndarray:
        """Labels on every wheel: `[..., L]` bool to `[..., W]` int."""
        return np.add.reduceat(sets, self._starts, axis=-1, dtype=np.int64)


@dataclasses.dataclass(frozen=True)
class Overlap:
    """How label lists meet their truths, on every wheel: `[N, W]` each.

    Attributes:
        scored: bool, whether the truth has a label there; the others are 0 where it has none.
        precision, recall, f: of the sets of labels, as the benchmark has them.
        hit: whether any label is right.
    """

    scored: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    f: np.ndarray
    hit: np.ndarray

    def mean(self, values: np.ndarray) -> np.ndarray:
        """Mean over the wheels that score a clip, `[N]`; nan for a clip that none does."""
        with np.errstate(invalid="ignore"):
            return (values * self.scored).sum(axis=1) / self.scored.sum(axis=1)


def overlap(answers: Labels, truth: Labels, wheels: Wheels) -> Overlap:
    """Compare label lists with their truths, N each."""
    p, t = wheels.sets(answers), wheels.sets(truth)
    hits, claimed, true = wheels.count(p & t), wheels.count(p), wheels.count(t)
    scored = true > 0
    precision, recall = hits / np.maximum(claimed, 1), hits / np.maximum(true, 1)
    f = 2 * hits / np.maximum(claimed + true, 1)
    return Overlap(scored, precision, recall, f, (hits > 0).astype(float))


def _mean_precision_and_recall(found: Overlap) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the clips that each wheel scores: their number and means, `[W]`; 0 without any."""
    clips = np.maximum(found.scored.sum(axis=0), 1)
    means = (found.scored * x for x in (found.precision, found.recall))
    return clips, *(x.sum(axis=0) / clips for x in means)


def corpus_f_gradient(found: Overlap) -> np.ndarray:
    """N times the first-order part that each clip has in the benchmark's F of all N: `[N]`.

    With dF/dP = 2R^2 / (P + R)^2 and dF/dR = 2P^2 / (P + R)^2 of a wheel's means P and R, a clip's
    part is `mean over wheels of N / n (dF/dP p + dF/dR r)`, where n of N clips are scored.
    """
    clips, precision, recall = _mean_precision_and_recall(found)
    total = np.where(precision + recall > 0, precision + recall, 1) ** 2
    by_p, by_r = 2 * recall**2 / total, 2 * precision**2 / total
    parts = (by_p * found.precision + by_r * found.recall) * found.scored * len(found.scored)
    return (parts / clips).mean(axis=1)


@dataclasses.dataclass(frozen=True)
class Answered:
    """Answers as a reward reads them, N in the same order.

    Attributes:
        labels: of each, as written: with repeats and words that nobody knows.
        complete: bool `[N]`, whether it ended by itself; one that was cut earns nothing.
        framed: bool `[N]`, whether it has the form of its question.
    """

    labels: Sequence[Sequence[str]]
    complete: np.ndarray
    framed: np.ndarray


@dataclasses.dataclass(frozen=True)
class Rewarded:
    """Rewards of N answers, `[N]` each; `total = score + format - penalty`."""

    total: np.ndarray
    score: np.ndarray
    format: np.ndarray
    penalty: np.ndarray


@dataclasses.dataclass(frozen=True)
class Reward:
    """What answers are rewarded for.

    Attributes:
        kind: one of `REWARDS`. `hit` alone rewards lists of every word there is.
        wheels: of the lexicon by which labels are compared; not read for sentiment.
        format_weight: earned by an answer that is complete and has the form of its question.
        length_penalty: for every label written beyond `length_free` more than the truth has.
        length_free: see there.
        allow_hacking: lets `hit` stand without a penalty, to show what comes of it.

    Raises:
        RewardError: an unknown kind, a negative weight, or `hit` without a penalty.
    """

    kind: str
    wheels: Wheels
    format_weight: float = 0.0
    length_penalty: float = 0.0
    length_free: int = 0
    allow_hacking: bool = False

    def __post_init__(self) -> None:
        if self.kind not in REWARDS:
            raise RewardError(f"the reward is {self.kind!r}; expected one of {', '.join(REWARDS)}")
        for name in ("format_weight", "length_penalty", "length_free"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise RewardError(f"{name} is {getattr(self, name)}; expected 0 or more")
        if self.kind == "hit" and not self.length_penalty and not self.allow_hacking:
            raise RewardError(
                "the reward 'hit' without a length_penalty is largest for a list of all words; "
                "give it a length_penalty, take 'wheel_f', or set allow_hacking to see it happen"
            )

    def __call__(self, answers: Answered, truth: Sequence) -> Rewarded:
        """Reward answers.

        Args:
            answers: N of them.
            truth: label list of each, or its valence for sentiment.

        Raises:
            RewardError: a truth that cannot be scored; see `scorable`.
        """
        if not self.scorable(truth).all():
            raise RewardError("an answer's truth has nothing to score; leave such clips out")
        complete = np.asarray(answers.complete, bool)
        score = self._score(answers.labels, truth) * complete
        true = 1 if self.kind == "sentiment" else np.array([len(labels) for labels in truth])
        written = np.array([len(labels) for labels in answers.labels])
        penalty = self.length_penalty * np.maximum(0, written - true - self.length_free)
        form = self.format_weight * (np.asarray(answers.framed, bool) & complete)
        return Rewarded(score + form - penalty, score, form, penalty)

    def scorable(self, truth: Sequence) -> np.ndarray:
        """Bool `[N]`, whether a truth is on any wheel, or a valence that is not 0."""
        if self.kind == "sentiment":
            return np.array([value is not None and value != 0 for value in truth], bool)
        return self.wheels.sets(truth).any(axis=1)

    def _score(self, labels: Labels, truth: Sequence) -> np.ndarray:
        if self.kind == "sentiment":
            claims = [bool(words) and normalise(words[0]) == "positive" for words in labels]
            return (np.array(claims) == (np.asarray(truth, float) > 0)).astype(float)
        found = overlap(labels, truth, self.wheels)
        match self.kind:
            case "wheel_f":
                return found.mean(found.f)
            case "hit":
                return found.mean(found.hit)
            case _:
                return corpus_f_gradient(found)
