"""Step number in, batch out: the order of training data as a pure function.

An epoch's plan (which clips, in which order, with which label type, in which batch) follows from
(seed, epoch) alone. So the state of the data is one integer, the step, and a run continues exactly
where it stopped, on any number of processes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import grain
import numpy as np

from affectgpt_jax.data.examples import Example, build_examples, soft_index
from affectgpt_jax.data.prompts import InputMode, PromptError, PromptSet, parse_label
from affectgpt_jax.data.records import Annotations, Records
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
        token_counts: the model's soft tokens per slot; `mode` has some of these slots.
        features: the features that the model reads, and their widths.
    """

    tokenizer: Tokenizer
    prompts: PromptSet
    mode: InputMode
    token_counts: Mapping[str, int]
    features: Mapping[str, int]

    def prompt_examples(self, dataset: Records, question: str) -> list[Example]:
        """The prompt of every clip for one question, without an answer.

        Args:
            dataset: the clips.
            question: a label type, or the text of any question.

        Raises:
            DataError: a clip that cannot be asked; the message names it.
        """
        return build_examples(self.tokenizer, self._prompts(dataset, question), None)

    def training_examples(self, dataset: Records, label_type: str) -> list[Example]:
        """Prompt and answer of every clip for one label type.

        Raises:
            DataError: a clip has no such answer; the message names it.
        """
        prompts = self._prompts(dataset, label_type)
        answers = [
            _of_clip(clip, lambda clip: self.prompts.answer(label_type, clip))
            for clip in dataset.index
        ]
        return build_examples(self.tokenizer, prompts, answers)

    def _prompts(self, dataset: Records, question: str) -> list[str]:
        def prompt(clip: Annotations) -> str:
            return self.prompts.prompt(self.mode, self.token_counts, clip, question)

        return [_of_clip(clip, prompt) for clip in dataset.index]

    def collate(
        self, dataset: Records, rows: Sequence[tuple[int, Example] | None], bucket: Bucket
    ) -> dict[str, object]:
        """Assemble a batch of rows from one data set; see `collate`.

        Args:
            dataset: where features come from.
            rows: record number and example of each row; None is a filler row without any target.
            bucket: the batch's shape.
        """
        shapes = feature_shapes(self.features, [dataset])
        return collate([row and (dataset, self, *row) for row in rows], self, shapes, bucket)


def _of_clip(clip: Annotations, render: Callable[[Annotations], str]) -> str:
    """What `render` makes of a clip; its complaint names the clip."""
    try:
        return render(clip)
    except PromptError as error:
        raise DataError(f"record {clip.name!r}: {error}") from None


def feature_shapes(
    features: Mapping[str, int], datasets: Sequence[Records]
) -> dict[str, tuple[int, int]]:
    """`(frames, width)` of every feature that the model reads, the same in all data sets.

    A feature that no data set has is one frame that is absent everywhere.

    Raises:
        DataError: two data sets differ in a feature's number of frames.
    """
    shapes: dict[str, tuple[int, int]] = {}
    for name, width in features.items():
        found = [
            d.manifest.features[name]["frames"] for d in datasets if name in d.manifest.features
        ]
        if len(set(found)) > 1:
            raise DataError(
                f"the data sets have {' and '.join(map(str, sorted(set(found))))} frames of the "
                f"feature {name!r}; a batch mixes them, so extract all with the same number"
            )
        shapes[name] = (found[0] if found else 1, width)
    return shapes


def collate(
    rows: Sequence[tuple[Records, View, int, Example] | None],
    model_view: View,
    shapes: Mapping[str, tuple[int, int]],
    bucket: Bucket,
) -> dict[str, object]:
    """Assemble a batch (layout: `models.affectgpt`) of right-padded rows, one clip each.

    Args:
        rows: for each row its data set, its view, and record number and example in it; None is a
            filler row without any target.
        model_view: any view of the model, for what all have in common.
        shapes: `(frames, width)` of every feature that the model reads.
        bucket: the batch's shape.
    """
    size, length, targets = len(rows), bucket.length, bucket.targets
    batch: dict[str, object] = {
        "tokens": np.full((size, length), model_view.tokenizer.end_id, np.int32),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (size, length)),
        "segment_ids": np.zeros((size, length), np.int32),
        "soft_index": np.zeros((size, length), np.int32),
        "target_positions": np.zeros((size, targets), np.int32),
        "targets": np.zeros((size, targets), np.int32),
        "target_weights": np.zeros((size, targets), np.float32),
    }
    features = {name: np.zeros((size, *shape), np.float16) for name, shape in shapes.items()}
    present = {name: np.zeros(size, bool) for name in shapes}
    for i, row in enumerate(rows):
        if row is None:
            continue
        dataset, view, number, example = row
        tokens, end, start = example.tokens, len(example), example.answer_start
        batch["tokens"][i, :end] = tokens
        batch["segment_ids"][i, :end] = 1
        batch["soft_index"][i, :end] = soft_index(
            tokens, view.tokenizer, view.token_counts, view.mode.slots
        )
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
class Source:
    """One data set that training draws from.

    Attributes:
        dataset: the clips.
        view: how they become inputs.
        label: label types, as `prompts.parse_label` reads them; where it names several, each
            access to a clip draws one.
        name: in logs.
        weight: how often an epoch visits each clip. Under 1, epochs take turns with the clips.

    Raises:
        DataError: a weight that is not positive.
    """

    dataset: Records
    view: View
    label: str
    name: str = "train"
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise DataError(f"data set {self.name!r}: weight is {self.weight}; expected over 0")


class _Visits:
    """The examples of one source, and the endless order in which training visits them.

    Args:
        source: the data set.
        number: its place in the mixture.
        seed: of order and label draw.
        max_tokens: longer examples are not kept.
    """

    def __init__(self, source: Source, number: int, seed: int, max_tokens: int):
        self.source, self._key = source, (seed, number)
        self.types = parse_label(source.label)
        self.examples = [source.view.training_examples(source.dataset, t) for t in self.types]
        self.lengths = np.array([[len(e) for e in examples] for examples in self.examples])
        starts = [[e.answer_start for e in examples] for examples in self.examples]
        self.answers = self.lengths - starts
        self.keep = self.lengths <= max_tokens

    def of_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Record numbers and label types (indices into `types`) of an epoch's kept visits."""
        size = len(self.source.dataset)
        first, end = (math.floor(e * self.source.weight * size) for e in (epoch, epoch + 1))
        passes = range(first // size, -(-end // size))
        drawn = [self._one_pass(number) for number in passes]
        if not drawn:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        mine = slice(first - passes[0] * size, end - passes[0] * size)
        order, kinds = (np.concatenate(part)[mine] for part in zip(*drawn))
        kept = self.keep[kinds, order]
        return order[kept], kinds[kept]

    def _one_pass(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Every clip once, with the label type that this access draws."""
        seed, source = self._key
        rng = np.random.default_rng([seed, number, source])
        size = len(self.source.dataset)
        order = rng.permutation(size)
        return order, rng.integers(len(self.types), size=size)[order]


@dataclasses.dataclass(frozen=True)
class PlannedBatch:
    """One batch of an epoch: its bucket, and for each row source, record and label type (-1:
    filler)."""

    bucket: int
    sources: np.ndarray
    records: np.ndarray
    label_types: np.ndarray


class TrainPipeline:
    """The training batches of one data set or a mixture of several.

    Attributes:
        buckets: the shapes that batches come in.
        dropped: examples over `max_tokens` that `too_long="drop"` left out.

    Args:
        sources: the data sets.
        batch_size: rows of a global batch.
        max_tokens: limit of an example's length.
        too_long: "error", or "drop" to leave longer examples out and count them.
        num_buckets: the number of row lengths.
        seed: of order and label draw.
        process: (index, count) of this process; batches hold its share of the rows.

    Raises:
        DataError: an example over the limit, nothing left to train on, data sets whose features
            differ in shape, or a batch size that the processes cannot share equally.
        PromptError: a source's label that names no label types.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        batch_size: int,
        max_tokens: int,
        too_long: str = "error",
        num_buckets: int = 4,
        seed: int = 0,
        process: tuple[int, int] = (0, 1),
    ):
        self._seed, self._batch_size, self._process = seed, batch_size, process
        if batch_size % process[1]:
            raise DataError(f"batch_size {batch_size} is not a multiple of {process[1]} processes")
        self._view = sources[0].view
        self._shapes = feature_shapes(self._view.features, [s.dataset for s in sources])
        self._visits = [_Visits(s, i, seed, max_tokens) for i, s in enumerate(sources)]
        for visits in self._visits:
            if too_long != "drop" and not visits.keep.all():
                raise DataError(
                    too_long_message(
                        visits.source.dataset, visits.types, visits.lengths, max_tokens
                    )
                )
            if not visits.keep.any():
                raise DataError(
                    f"data set {visits.source.name!r} has no example of at most {max_tokens} "
                    "tokens; raise config.max_tokens"
                )
        self.dropped = sum(int((~visits.keep).sum()) for visits in self._visits)
        # A batch is as long as its longest row. Epoch 0 shows how those lengths are spread, and
        # the longest example there is fits the last bucket, whatever other epochs draw.
        lengths = np.concatenate([v.lengths[v.keep] for v in self._visits])
        answers = np.concatenate([v.answers[v.keep] for v in self._visits])
        longest = [self._longest_row(*rows) for rows in self._rows(0)]
        ends = choose_lengths(np.array([*longest, lengths.max()]), num_buckets)
        self.buckets = buckets_of(ends, lengths, answers)
        self._first_step = [0]  # of every epoch planned so far, and of the next

    def _rows(self, epoch: int) -> list[np.ndarray]:
        """Source, record and label type `[3, rows]` (-1: filler) of an epoch's batches.

        Batches are cut from one permutation, not from clips of like length: a loss that is the
        mean over a batch's supervised tokens weighs a label against a description as the published
        recipe does only if both kinds meet in a batch.
        """
        parts = []
        for source, visits in enumerate(self._visits):
            records, kinds = visits.of_epoch(epoch)
            parts.append(np.stack([np.full(len(records), source), records, kinds]))
        rows = np.concatenate(parts, axis=1)
        if len(parts) > 1:  # the visits of one source are in a random order already
            rng = np.random.default_rng([self._seed, epoch, len(parts)])
            rows = rows[:, rng.permutation(rows.shape[1])]
        filler = np.full((3, -rows.shape[1] % self._batch_size), -1)
        rows = np.concatenate([rows, filler], axis=1)
        return np.split(rows, rows.shape[1] // self._batch_size, axis=1) if rows.size else []

    def _longest_row(self, sources: np.ndarray, records: np.ndarray, kinds: np.ndarray) -> int:
        return max(
            int(self._visits[source].lengths[kind, record])
            for source, record, kind in zip(sources, records, kinds)
            if record >= 0
        )

    @functools.lru_cache(maxsize=4)  # noqa: B019 - the pipeline lives as long as the run
    def plan(self, epoch: int) -> tuple[PlannedBatch, ...]:
        """The batches of an epoch: every kept visit, the last batch padded with filler."""
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

    def planned(self, step: int) -> PlannedBatch:
        """The plan of a step's batch."""
        epoch, place = self.locate(step)
        return self.plan(epoch)[place]

    def mix(self, step: int) -> dict[str, int]:
        """How many rows of a step's batch come from each source, over all processes."""
        sources = self.planned(step).sources
        return {v.source.name: int((sources == i).sum()) for i, v in enumerate(self._visits)}

    def batch(self, step: int) -> dict[str, object]:
        """This process's rows of the batch of a step, as NumPy arrays."""
        planned = self.planned(step)
        index, count = self._process
        share = self._batch_size // count
        mine = slice(index * share, (index + 1) * share)
        columns = (planned.sources, planned.records, planned.label_types)
        rows: list[tuple[Records, View, int, Example] | None] = []
        for source, record, kind in zip(*(column[mine].tolist() for column in columns)):
            if record < 0:
                rows.append(None)
                continue
            visits = self._visits[source]
            example = visits.examples[kind][record]
            rows.append((visits.source.dataset, visits.source.view, record, example))
        return collate(rows, self._view, self._shapes, self.buckets[planned.bucket])

    def filler_batch(self, bucket: Bucket) -> dict[str, object]:
        """A global batch of this shape without any clip, for compiling."""
        return collate([None] * self._batch_size, self._view, self._shapes, bucket)

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
