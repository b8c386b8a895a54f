"""What training beyond supervision changes: the same clips asked before and after.

A model is asked greedily, by several samples at temperature 1, and for what the samples agree on.
The differences come with paired bootstrap intervals, over the clips.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
from jax.sharding import Mesh

from affectgpt_jax.data.packing import Bucket, round_up
from affectgpt_jax.data.pipeline import PromptProcessor
from affectgpt_jax.data.records import Records
from affectgpt_jax.evaluation import metrics
from affectgpt_jax.evaluation.consensus import consensus
from affectgpt_jax.evaluation.lexicon import Lexicon
from affectgpt_jax.evaluation.metrics import Score
from affectgpt_jax.evaluation.rewards import Answered, Reward, Wheels, overlap
from affectgpt_jax.inference import Generator, Question, each_question, joined
from affectgpt_jax.training.sharding import shard_whole_batch

RESAMPLES = 2000


class Asked(TypedDict):
    """What a model says about N clips: labels as written; an answer that was cut is None.

    Attributes:
        greedy: of the most probable answer, one a clip.
        samples: of S samples a clip.
    """

    greedy: list[list[str] | None]
    samples: list[list[list[str] | None]]


@dataclasses.dataclass(frozen=True, eq=False)
class Examination:
    """Clips, and how they are asked.

    Attributes:
        dataset, truth: the clips, and labels of each or its valence.
        processor, mesh: of the model.
        question: a label type.
        greedy: writes one answer a prompt.
        sampled: writes a group of samples.
        prompts: asked at a time for samples.
        prompt_length: tokens of a row of prompts.
        seed: of sampling.
        pulse: called before every batch.
    """

    dataset: Records
    truth: Sequence[Any]
    processor: PromptProcessor
    mesh: Mesh
    question: str
    greedy: Generator
    sampled: Generator
    prompts: int
    prompt_length: int
    seed: int
    pulse: Callable[[], None] = lambda: None

    def ask(self, trainable: Any, samples: int) -> Asked:
        """Ask a model about all clips; samples are drawn in whole groups, the same every time."""
        greedy = self.greedy.answer(trainable, self.dataset, self.question)
        draws = -(-samples // self.sampled.group)
        drawn = [self._draw(trainable, draw) for draw in range(draws)]
        each = [sum(parts, [])[:samples] for parts in zip(*drawn, strict=True)]
        return {"greedy": [self._labels(answer) for answer in greedy.each], "samples": each}

    def _labels(self, answer: Any) -> list[str] | None:
        prompts = self.processor.prompts
        return None if answer.cut else prompts.written_labels(answer.text, self.question)

    def _draw(self, trainable: Any, draw: int) -> list[list[list[str] | None]]:
        """One group of samples about every clip."""
        examples = self.processor.prompt_examples(self.dataset, self.question)
        group, found = self.sampled.group, []
        for first in range(0, len(self.dataset), self.prompts):
            self.pulse()
            numbers = range(first, min(first + self.prompts, len(self.dataset)))
            empty = self.prompts - len(numbers)
            rows = [(i, examples[i]) for i in numbers] + [None] * empty
            batch = self.processor.collate(self.dataset, rows, Bucket(self.prompt_length, 0))
            batch = shard_whole_batch(self.mesh, batch)
            names = [self.dataset.index[i].name for i in numbers] + [""] * empty
            seed = int(np.random.SeedSequence([self.seed, draw, 3]).generate_state(1)[0])
            answers = self.sampled.sample(trainable, batch, names, self.question, seed)
            read = [self._labels(self.sampled.read(a)) for a in answers[: len(numbers) * group]]
            found += [read[i : i + group] for i in range(0, len(read), group)]
        return found


def prompt_length(
    processor: PromptProcessor, question: Question, datasets: Sequence[Records]
) -> int:
    """Tokens of a row that holds all prompts of any of these clips."""
    lengths = [
        len(joined(prompts)[0])
        for dataset in datasets
        for prompts in zip(
            *(processor.prompt_examples(dataset, asked) for asked in each_question(question)),
            strict=True,
        )
    ]
    return int(round_up(max(lengths)))


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """The scores of what a model says.

    Attributes:
        metric: the benchmark's primary one: f, hit or weighted_f1.
        greedy: of the most probable answers.
        consensus: of what the samples agree on; None for sentiment.
        sampled: mean reward of each clip's samples, `[N]`.
        hit: share of clips whose most probable answer has a right label, mean over the wheels;
            None for sentiment.
        labels: a greedy answer has on average.
        sampled_labels: a sample has.
        cut: share of samples that were.
    """

    metric: str
    greedy: Score
    consensus: Score | None
    sampled: np.ndarray
    hit: float | None
    labels: float
    sampled_labels: float
    cut: float

    def as_dict(self) -> dict[str, Any]:
        found = {
            "sampled_reward": float(self.sampled.mean()),
            f"greedy_{self.metric}": self.greedy.primary,
            "labels_per_clip": self.labels,
            "sampled_labels_per_clip": self.sampled_labels,
            "cut": self.cut,
        }
        if self.hit is not None and self.metric != "hit":
            found["greedy_hit"] = self.hit
        if self.consensus is not None:
            found[f"consensus_{self.metric}"] = self.consensus.primary
        for name in ("p", "r"):
            if name in self.greedy.values:
                found[f"greedy_{name}"] = self.greedy.values[name]
        if self.metric == "f":
            found["greedy_f_by_wheel"] = [wheel["f"] for wheel in self.greedy.wheels]
        return found


def _whole(lists: Sequence[list[str] | None]) -> list[list[str]]:
    """Labels without repeats; none of an answer that was cut."""
    return [list(dict.fromkeys(labels or ())) for labels in lists]


def sampled_rewards(
    asked: Asked, truth: Sequence[Any], question: str, wheels: Wheels, samples: int
) -> np.ndarray:
    """Mean reward of each clip's samples, `[N]`.

    Args:
        asked: about N clips.
        truth: of each.
        question: that it answers.
        wheels: by which labels are compared.
        samples: of each clip that count.
    """
    flat = [labels for drawn in asked["samples"] for labels in drawn[:samples]]
    complete = np.array([labels is not None for labels in flat])
    each = len(flat) // len(truth)
    everything = [value for value in truth for _ in range(each)]
    reward = Reward("sentiment" if question == "sentiment" else "wheel_f", wheels)
    found = reward(Answered(_whole(flat), complete, complete), everything).score
    return found.reshape(len(truth), each).mean(axis=1)


def outcome(
    asked: Asked,
    truth: Sequence[Any],
    question: str,
    lexicon: Lexicon,
    samples: int,
    agreeing: int = 0,
) -> Outcome:
    """Score what a model says.

    Args:
        asked: about N clips.
        truth: of each.
        question: that it answers.
        lexicon: by which labels are compared.
        samples: of each clip that count for the sampled reward.
        agreeing: of each clip that make the consensus; 0 are all.

    Raises:
        ScoreError: no truth is on some wheel.
    """

    def score(labels: Sequence[Sequence[str]]) -> Score:
        match question:
            case "ovlabel":
                return metrics.score_fine(labels, truth, lexicon)
            case "sentiment":
                return metrics.score_sentiment([(*x, "")[0] for x in labels], truth)
            case _:
                return metrics.score_basic(labels, [words[0] for words in truth], lexicon)

    wheels = Wheels(lexicon)
    most_probable = _whole(asked["greedy"])
    flat = [labels for drawn in asked["samples"] for labels in drawn[:samples]]
    agreed = hit = None
    if question != "sentiment":
        lists = (_whole(drawn[: agreeing or None]) for drawn in asked["samples"])
        agreed = score([consensus(drawn, wheels).labels for drawn in lists])
        met = overlap(most_probable, truth, wheels)
        hit = float(met.mean(met.hit).mean())
    greedy = score(most_probable)
    return Outcome(
        metric=next(iter(greedy.values)),
        greedy=greedy,
        consensus=agreed,
        sampled=sampled_rewards(asked, truth, question, wheels, samples),
        hit=hit,
        labels=metrics.labels_per_clip(most_probable),
        sampled_labels=metrics.labels_per_clip([labels or () for labels in flat]),
        cut=sum(labels is None for labels in flat) / len(flat),
    )


def mean_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The 95 % bootstrap interval of a mean over clips."""
    draws = np.random.default_rng([seed, 4]).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def gains(before: Outcome, after: Outcome, seed: int = 0) -> dict[str, Any]:
    """What changed on the same clips, each with its 95 % paired interval."""
    difference = after.sampled - before.sampled
    found: dict[str, Any] = {
        "sampled_reward_gain": float(difference.mean()),
        "sampled_reward_gain_interval": mean_interval(difference, seed),
    }
    pairs: Mapping[str, tuple[Score | None, Score | None]] = {
        "greedy": (after.greedy, before.greedy),
        "consensus": (after.consensus, before.consensus),
    }
    for name, (new, old) in pairs.items():
        if new is not None and old is not None:
            compared = metrics.compare(new, old, RESAMPLES, seed=seed)
            key = f"{name}_{after.metric}_gain"
            found[key] = compared.difference
            found[f"{key}_interval"] = (compared.interval.low, compared.interval.high)
    return found


def consensus_gain(found: Outcome, seed: int = 0) -> dict[str, Any]:
    """What consensus is above the most probable answers of one model, with its paired interval;
    nothing where there is no consensus."""
    if found.consensus is None:
        return {}
    compared = metrics.compare(found.consensus, found.greedy, RESAMPLES, seed=seed)
    key = f"consensus_over_greedy_{found.metric}"
    interval = compared.interval.low, compared.interval.high
    return {key: compared.difference, f"{key}_interval": interval}
