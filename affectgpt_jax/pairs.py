"""Pairs of answers of which one is preferred: where they come from, and batches of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from affectgpt_jax.data.packing import Bucket, round_up
from affectgpt_jax.data.pipeline import AHEAD, THREADS, DataError, PromptProcessor, feature_shapes
from affectgpt_jax.data.prompts import PromptError
from affectgpt_jax.data.records import Records
from affectgpt_jax.evaluation.rewards import Answered, Reward
from affectgpt_jax.inference import Generator
from affectgpt_jax.rollouts import BY_TOKEN, Row, Written, collate_rows, truths
from affectgpt_jax.training import policy
from affectgpt_jax.training.sharding import shard_whole_batch

# What describes a clip is what records hold two of.
QUESTION = "description"


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two answers to a prompt, as tokens with the end mark.

    Attributes:
        number: of the clip in its data set.
        prompt, better, worse: `[n]` int32 each.
    """

    number: int
    prompt: np.ndarray
    better: np.ndarray
    worse: np.ndarray

    def __len__(self) -> int:
        return len(self.prompt) + len(self.better) + len(self.worse)


def annotated_pairs(dataset: Records, processor: PromptProcessor) -> tuple[list[Pair], int]:
    """The pairs of records, and how many more have two answers that are equally good.

    Raises:
        DataError: a record without alternatives or a preference; the message names it.
    """
    prompts = processor.prompt_examples(dataset, QUESTION)
    numbers, texts = [], []
    for number, entry in enumerate(dataset.index):
        if not entry.preferred:
            raise DataError(
                f"record {entry.name!r} has no preferred one of two alternatives; name records of "
                "preferences in config.dpo.data, or set config.dpo.source=samples"
            )
        if entry.preferred == "same":
            continue
        numbers.append(number)
        better = ("a1", "a2").index(entry.preferred)
        for place in (better, 1 - better):
            clip = dataclasses.replace(entry, description=entry.alternatives[place])
            try:
                texts.append(processor.prompts.answer(QUESTION, clip))
            except PromptError as error:
                raise DataError(f"record {entry.name!r}: {error}") from None
    tokens = [np.asarray(ids, np.int32) for ids in processor.tokenizer.encode(texts)]
    pairs = [
        Pair(number, prompts[number].tokens, *tokens[2 * i : 2 * i + 2])
        for i, number in enumerate(numbers)
    ]
    return pairs, len(dataset) - len(pairs)


def sampled_pairs(
    dataset: Records,
    processor: PromptProcessor,
    question: str,
    generator: Generator,
    trainable: Any,
    reward: Reward,
    gap: float,
    seed: int,
) -> tuple[list[Pair], int]:
    """Best against worst of a model's own samples, and how many clips have none.

    Args:
        dataset: clips to ask about.
        processor: how they become prompts.
        question: that is asked.
        generator: writes a group of samples.
        trainable: of the model.
        reward: tells good from bad.
        gap: of their rewards, at the least.
        seed: of sampling.
    """
    examples = processor.prompt_examples(dataset, question)
    truth = truths(dataset, question, "config.dpo.data")
    known = reward.scorable(truth)
    group = generator.group
    found = dict(generator.generated(trainable, dataset, question, seed=seed))
    pairs = []
    for number in np.flatnonzero(known).tolist():
        answers = [found[number * group + place] for place in range(group)]
        read = [generator.read(answer) for answer in answers]
        labels = [processor.prompts.written_labels(a.text, question) for a in read]
        complete = np.array([not a.cut for a in read])
        framed = np.array([processor.prompts.is_framed(a.text, question) for a in read])
        total = reward(Answered(labels, complete, framed), [truth[number]] * group).total
        best, worst = int(total.argmax()), int(total.argmin())
        if total[best] - total[worst] >= max(gap, policy.FLAT):
            tokens = (answers[i].tokens[: answers[i].counts] for i in (best, worst))
            pairs.append(Pair(number, examples[number].tokens, *tokens))
    return pairs, len(dataset) - len(pairs)


class PairData:
    """Batches of pairs, a row each; a `loop.TrainingData`.

    Args:
        config: of the run.
        dataset: of the clips that the pairs are about.
        processor: how they become inputs.
        pairs: one or more.
        process: this process's rank and the number of ranks.

    Attributes:
        rows, bucket, shapes: of a batch, over all processes.
        reference: what `reference_log_probs` gives, which batches then hold; None until it is set.

    Raises:
        DataError: a pair with an answer that is longer than `config.max_tokens`.
    """

    def __init__(
        self,
        config: ConfigDict,
        dataset: Records,
        processor: PromptProcessor,
        pairs: Sequence[Pair],
        process: tuple[int, int] = (0, 1),
    ):
        self._seed, self.rows, self._process = config.seed, config.dpo.pairs, process
        self.dataset, self.processor, self.pairs = dataset, processor, pairs
        longest = max(pairs, key=lambda p: len(p.prompt) + max(len(p.better), len(p.worse)))
        tokens = len(longest.prompt) + max(len(longest.better), len(longest.worse))
        if tokens > config.max_tokens:
            raise DataError(
                f"an answer about record {dataset.index[longest.number].name!r} ends at token "
                f"{tokens}, over config.max_tokens={config.max_tokens}; raise it"
            )
        supervised = max(len(pair) - len(pair.prompt) for pair in pairs)
        self.bucket = Bucket(int(round_up(max(map(len, pairs)))), int(round_up(supervised)))
        self.shapes = feature_shapes(processor.features, [dataset])
        self.reference: list[np.ndarray] | None = None

    @functools.lru_cache(maxsize=4)  # noqa: B019 - it lives as long as the run
    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch, 5]).permutation(len(self.pairs))

    def numbers(self, step: int) -> np.ndarray:
        """The pairs of a step: an epoch has every one once."""
        places = np.arange(step * self.rows, (step + 1) * self.rows)
        epochs, places = np.divmod(places, len(self.pairs))
        return np.array([self._order(int(e))[p] for e, p in zip(epochs, places, strict=True)])

    def collate(self, numbers: Sequence[int], rows: int) -> dict[str, Any]:
        """A batch of these pairs for `training.preference`, with padding up to so many rows."""
        signs = (1.0, -1.0)
        chosen = [self.pairs[number] for number in numbers]
        made = [
            Row(
                self.dataset,
                self.processor,
                pair.number,
                pair.prompt,
                [Written(t, s, (0, 0), None) for t, s in zip((pair.better, pair.worse), signs)],
            )
            for pair in chosen
        ]
        batch = collate_rows(made, rows, self.bucket, self.processor, self.shapes)
        batch["signs"] = batch["advantages"]
        for name in BY_TOKEN:
            del batch[name]
        batch["reference_log_probs"] = np.zeros_like(batch["signs"])
        if self.reference is not None:
            for i, number in enumerate(numbers):
                known = self.reference[number]
                batch["reference_log_probs"][i, : len(known)] = known
        return batch

    def batch(self, step: int) -> dict[str, Any]:
        """This process's rows of a step."""
        index, count = self._process
        share = self.rows // count
        return self.collate(self.numbers(step)[index * share : (index + 1) * share], share)

    def batches(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        steps = grain.MapDataset.range(start, stop).map(self.batch)
        options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=AHEAD)
        return iter(steps.to_iter_dataset(options))

    def whole(self) -> Iterator[tuple[range, dict[str, Any]]]:
        """All pairs once, in order: their numbers, and global batches."""
        for first in range(0, len(self.pairs), self.rows):
            numbers = range(first, min(first + self.rows, len(self.pairs)))
            yield numbers, self.collate(numbers, self.rows)

    def samples(self, step: int) -> np.ndarray:
        chosen = (self.pairs[number] for number in self.numbers(step))
        return np.array([(len(pair), len(pair) - len(pair.prompt)) for pair in chosen])

    def component_counts(self, step: int) -> dict[str, int]:
        return {"pairs": self.rows}

    def describe(self) -> str:
        """How many pairs there are, and how long both sides are, which a model may learn from."""
        sides = [np.mean([len(getattr(p, s)) for p in self.pairs]) for s in ("better", "worse")]
        return (
            f"{len(self.pairs):,} pairs; the preferred answer has {sides[0]:.1f} tokens on "
            f"average, the other {sides[1]:.1f}; rows of {self.bucket.length} tokens"
        )


def reference_log_probs(
    log_probs: Callable[[Any], Any], mesh: Mesh, data: PairData, pulse: Callable[[], None]
) -> list[np.ndarray]:
    """Log-probabilities of the tokens of every pair, the preferred answer's first.

    Args:
        log_probs: `batch -> [B, S]`, of the model that training starts from; replicated, so that
            every process can read all of it.
        mesh: where batches go.
        data: the pairs.
        pulse: called before every batch.
    """
    found = []
    for numbers, batch in data.whole():
        pulse()
        values = np.asarray(log_probs(shard_whole_batch(mesh, batch)))
        sizes = [len(data.pairs[i]) - len(data.pairs[i].prompt) for i in numbers]
        found += [row[:size] for row, size in zip(values, sizes)]
    return found
