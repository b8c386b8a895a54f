"""Step number in, batch out: the order of training data as a pure function.

An epoch's plan (which clips, in which order, with which label type, in which batch) follows from
(seed, epoch) alone. So the state of the data is one integer, the step, and a run continues exactly
where it stopped, on any number of processes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

import grain
import numpy as np

from affectgpt_jax.data.examples import Example, build_examples, soft_index
from affectgpt_jax.data.prompts import LABEL_TYPES, InputMode, PromptError, PromptSet
from affectgpt_jax.data.records import Records
from affectgpt_jax.data.tokenizer import Tokenizer

# Lengths are rounded up to multiples of this, for the sake of aligned matrix products.
LENGTH_MULTIPLE = 4


class DataError(ValueError):
    """Data that does not fit the model or the config."""


@dataclasses.dataclass(frozen=True)
class Bucket:
    """The static shape of a batch: rows of `length` tokens, `targets` of them supervised."""

    length: int
    targets: int


@dataclasses.dataclass(frozen=True)
class View:
    """How clips become model inputs: everything about that but the clips themselves.

    Attributes:
        tokenizer, prompts, mode: what a prompt is made with.
        token_counts: soft tokens per slot.
        features: names of the features that the model reads.
    """

    tokenizer: Tokenizer
    prompts: PromptSet
    mode: InputMode
    token_counts: Mapping[str, int]
    features: tuple[str, ...]

    def prompt_examples(self, dataset: Records, question: str) -> list[Example]:
        """The prompt of every clip for one question, without an answer."""
        return build_examples(self.tokenizer, self._prompts(dataset, question), None)

    def training_examples(self, dataset: Records, label_type: str) -> list[Example]:
        """Prompt and answer of every clip for one label type.

        Raises:
            DataError: a clip has no such answer; the message names it.
        """
        answers = []
        for entry in dataset.index:
            try:
                answers.append(
                    self.prompts.answer(
                        label_type, description=entry.description, labels=entry.labels
                    )
                )
            except PromptError as error:
                raise DataError(f"record {entry.name!r}: {error}") from None
        return build_examples(self.tokenizer, self._prompts(dataset, label_type), answers)

    def _prompts(self, dataset: Records, question: str) -> list[str]:
        prompts = []
        for entry in dataset.index:
            try:
                prompts.append(
                    self.prompts.prompt(self.mode, self.token_counts, entry.subtitle, question)
                )
            except PromptError as error:
                raise DataError(f"record {entry.name!r}: {error}") from None
        return prompts

    def feature_shapes(self, dataset: Records) -> dict[str, tuple[int, int]]:
        """`(frames, width)` of every feature that the model reads.

        Raises:
            DataError: the data set has no such feature at all.
        """
        known = dataset.manifest.features
        for name in self.features:
            if name not in known:
                raise DataError(
                    f"the input mode reads the feature {name!r}, but the records hold only "
                    f"{sorted(known)}; choose another --config.input"
                )
        return {name: (known[name]["frames"], known[name]["width"]) for name in self.features}

    def collate(
        self,
        dataset: Records,
        rows: Sequence[tuple[int, Example] | None],
        bucket: Bucket,
    ) -> dict[str, object]:
        """Assemble a batch (layout: `models.affectgpt`) of right-padded rows, one clip each.

        Args:
            dataset: where features come from.
            rows: record number and example of each row; None is a filler row without any target.
            bucket: the batch's shape.
        """
        size, length, targets = len(rows), bucket.length, bucket.targets
        batch: dict[str, object] = {
            "tokens": np.full((size, length), self.tokenizer.end_id, np.int32),
            "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (size, length)),
            "segment_ids": np.zeros((size, length), np.int32),
            "soft_index": np.zeros((size, length), np.int32),
            "target_positions": np.zeros((size, targets), np.int32),
            "targets": np.zeros((size, targets), np.int32),
            "target_weights": np.zeros((size, targets), np.float32),
        }
        shapes = self.feature_shapes(dataset)
        features = {name: np.zeros((size, *shape), np.float16) for name, shape in shapes.items()}
        present = {name: np.zeros(size, bool) for name in shapes}
        for i, row in enumerate(rows):
            if row is None:
                continue
            number, example = row
            tokens, end, start = example.tokens, len(example), example.answer_start
            batch["tokens"][i, :end] = tokens
            batch["segment_ids"][i, :end] = 1
            batch["soft_index"][i, :end] = soft_index(tokens, self.tokenizer, self.token_counts)
            batch["target_positions"][i, : end - start] = np.arange(start - 1, end - 1)
            batch["targets"][i, : end - start] = tokens[start:]
            batch["target_weights"][i, : end - start] = 1
            if shapes:
                found = dataset[number].features
                for name in shapes:
                    if name in found:
                        features[name][i] = found[name]
                        present[name][i] = True
        return {**batch, "features": features, "present": present}


def choose_lengths(lengths: np.ndarray, count: int) -> tuple[int, ...]:
    """At most `count` row lengths that pad rows of these lengths the least.

    Args:
        lengths: tokens, `[N]`.
        count: lengths to choose, each of which costs one compilation.

    Returns:
        Multiples of `LENGTH_MULTIPLE`, ascending; the last holds the longest row.
    """
    rounded = _round_up(lengths)
    sizes, tally = np.unique(rounded, return_counts=True)
    # cost[j] is the padded tokens of the best split of sizes[:j]; one more length a round.
    total = np.concatenate([[0], np.cumsum(tally)])
    cost, choice = np.concatenate([[0.0], np.full(len(sizes), np.inf)]), []
    for _ in range(min(count, len(sizes))):
        table = np.full((len(sizes) + 1, len(sizes) + 1), np.inf)  # [end, start of last bucket]
        for end in range(1, len(sizes) + 1):
            table[end, :end] = cost[:end] + sizes[end - 1] * (total[end] - total[:end])
        choice.append(table.argmin(axis=1))
        cost = table.min(axis=1)
    ends, end = [], len(sizes)
    for starts in reversed(choice):
        ends.append(int(sizes[end - 1]))
        end = starts[end]
    return tuple(sorted(ends))


def buckets_of(ends: Sequence[int], lengths: np.ndarray, targets: np.ndarray) -> tuple[Bucket, ...]:
    """Buckets of these row lengths, each with room for the targets of every example that fits it.

    Args:
        ends: row lengths, ascending.
        lengths: tokens of every example, `[N]`.
        targets: supervised tokens of every example, `[N]`.
    """
    return tuple(
        Bucket(end, int(_round_up(targets[lengths <= end].max(initial=0)))) for end in ends
    )


def _round_up(n):
    return -(-n // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


def too_long_message(
    dataset: Records, label_types: Sequence[str], lengths: np.ndarray, max_tokens: int
) -> str:
    """What to say of examples over the limit; lengths are `[types, records]`."""
    kind, worst = np.unravel_index(lengths.argmax(), lengths.shape)
    return (
        f"record {dataset.index[worst].name!r} has {lengths[kind, worst]} tokens as "
        f"{label_types[kind]}, over --config.max_tokens={max_tokens}, as have "
        f"{(lengths > max_tokens).sum() - 1} more; raise the limit or pass --config.too_long=drop"
    )


@dataclasses.dataclass(frozen=True)
class PlannedBatch:
    """One batch of an epoch: its bucket, and record and label type of each row (-1: filler)."""

    bucket: int
    records: np.ndarray
    label_types: np.ndarray


class TrainPipeline:
    """The training batches of a data set.

    Attributes:
        buckets: the shapes that batches come in.
        dropped: examples over `max_tokens` that `too_long="drop"` left out.

    Args:
        dataset: the clips.
        view: how they become inputs.
        label: "description", "ovlabel", or "hybrid", which draws one of both at each access.
        batch_size: rows of a global batch.
        max_tokens: limit of an example's length.
        too_long: "error", or "drop" to leave longer examples out and count them.
        num_buckets: the number of row lengths.
        seed: of order and label draw.
        process: (index, count) of this process; batches hold its share of the rows.

    Raises:
        DataError: an example over the limit, nothing left to train on, or a batch size that the
            processes cannot share equally.
    """

    def __init__(
        self,
        dataset: Records,
        view: View,
        *,
        label: str,
        batch_size: int,
        max_tokens: int,
        too_long: str = "error",
        num_buckets: int = 4,
        seed: int = 0,
        process: tuple[int, int] = (0, 1),
    ):
        self._dataset, self._view, self._seed = dataset, view, seed
        self._batch_size, self._process = batch_size, process
        if batch_size % process[1]:
            raise DataError(f"batch_size {batch_size} is not a multiple of {process[1]} processes")
        self._types = LABEL_TYPES if label == "hybrid" else (label,)
        self._examples = [view.training_examples(dataset, kind) for kind in self._types]
        lengths = np.array([[len(e) for e in examples] for examples in self._examples])
        answers = lengths - [[e.answer_start for e in examples] for examples in self._examples]
        self._keep = lengths <= max_tokens
        self.dropped = int((~self._keep).sum())
        if self.dropped and too_long != "drop":
            raise DataError(too_long_message(dataset, self._types, lengths, max_tokens))
        if not self._keep.any():
            raise DataError(f"no example has at most {max_tokens} tokens; raise config.max_tokens")
        self._lengths = lengths  # [types, records]
        # A batch is as long as its longest row. Epoch 0 shows how those lengths are spread, and
        # the longest example there is fits the last bucket, whatever other epochs draw.
        longest = [self._longest_row(*rows) for rows in self._rows(0)]
        ends = choose_lengths(np.array([*longest, lengths[self._keep].max()]), num_buckets)
        self.buckets = buckets_of(ends, lengths[self._keep], answers[self._keep])
        self._first_step = [0]  # of every epoch planned so far, and of the next

    def _rows(self, epoch: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Record and label type of each row (-1: filler) of an epoch's batches.

        Batches are cut from one permutation, not from clips of like length: a loss that is the
        mean over a batch's supervised tokens weighs a label against a description as the published
        recipe does only if both kinds meet in a batch.
        """
        rng = np.random.default_rng([self._seed, epoch])
        count = len(self._dataset)
        order = rng.permutation(count)
        kinds = rng.integers(len(self._types), size=count)
        order = order[self._keep[kinds[order], order]]
        filler = np.full(-len(order) % self._batch_size, -1)
        parts = np.concatenate([order, filler]).reshape(-1, self._batch_size)
        return [(part, kinds[part]) for part in parts]

    def _longest_row(self, records: np.ndarray, kinds: np.ndarray) -> int:
        real = records >= 0
        return int(self._lengths[kinds[real], records[real]].max())

    @functools.lru_cache(maxsize=4)  # noqa: B019 - the pipeline lives as long as the run
    def plan(self, epoch: int) -> tuple[PlannedBatch, ...]:
        """The batches of an epoch: every kept clip once, the last batch padded with filler."""
        ends = [bucket.length for bucket in self.buckets]
        return tuple(
            PlannedBatch(int(np.searchsorted(ends, self._longest_row(*rows))), *rows)
            for rows in self._rows(epoch)
        )

    def locate(self, step: int) -> tuple[int, int]:
        """Epoch of a step, and its place in that epoch's plan."""
        while self._first_step[-1] <= step:
            epoch = len(self._first_step) - 1
            self._first_step.append(self._first_step[-1] + len(self.plan(epoch)))
        epoch = int(np.searchsorted(self._first_step, step, side="right")) - 1
        return epoch, step - self._first_step[epoch]

    def batch(self, step: int) -> dict[str, object]:
        """This process's rows of the batch of a step, as NumPy arrays."""
        epoch, place = self.locate(step)
        planned = self.plan(epoch)[place]
        index, count = self._process
        share = self._batch_size // count
        mine = slice(index * share, (index + 1) * share)
        rows = [
            None if record < 0 else (record, self._examples[kind][record])
            for record, kind in zip(
                planned.records[mine].tolist(), planned.label_types[mine].tolist(), strict=True
            )
        ]
        return self._view.collate(self._dataset, rows, self.buckets[planned.bucket])

    def batches(self, start: int, stop: int, threads: int = 2) -> Iterator[dict[str, object]]:
        """The batches of steps `start ... stop - 1`, read ahead by Grain's threads."""
        self.locate(max(stop - 1, 0))  # threads then only read the table of epochs
        steps = grain.MapDataset.range(start, stop).map(self.batch)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        return iter(steps.to_iter_dataset(options))


def sequential_batches(
    dataset: Records,
    view: View,
    examples: Sequence[Example],
    batch_size: int,
    num_buckets: int = 2,
    feature_from: Sequence[int] | None = None,
    numbers: Sequence[int] | None = None,
) -> Iterator[tuple[np.ndarray, dict[str, object]]]:
    """Clips once each, in an order fixed by the examples' lengths: for evaluation.

    Args:
        dataset: the clips.
        view: how they become inputs.
        examples: one a clip, with or without an answer.
        batch_size: rows of a batch; the last one of a bucket is filled up.
        num_buckets: the number of row lengths.
        feature_from: for each clip the number of the one whose features it gets; its own if None.
            (A permutation gives the control with features shuffled across clips.)
        numbers: the clips to visit; all if None.

    Yields:
        Record numbers of the rows, int `[n]` with n at most `batch_size`, and the batch.
    """
    chosen = np.arange(len(examples)) if numbers is None else np.asarray(numbers)
    lengths = np.array([len(examples[i]) for i in chosen])
    answers = lengths - np.array([examples[i].answer_start for i in chosen])
    buckets = buckets_of(choose_lengths(lengths, num_buckets), lengths, answers)
    which = np.searchsorted([bucket.length for bucket in buckets], lengths)
    source = np.arange(len(examples)) if feature_from is None else np.asarray(feature_from)

    def load(job: tuple[Bucket, np.ndarray]) -> tuple[np.ndarray, dict[str, object]]:
        bucket, numbers = job
        rows = [(int(source[i]), examples[i]) for i in numbers]
        rows += [None] * (batch_size - len(rows))
        return numbers, view.collate(dataset, rows, bucket)

    jobs = []
    for i, bucket in enumerate(buckets):
        members = chosen[which == i]
        jobs += [(bucket, members[j : j + batch_size]) for j in range(0, len(members), batch_size)]
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    yield from grain.MapDataset.source(jobs).map(load).to_iter_dataset(options)
