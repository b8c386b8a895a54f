"""Step number in, batch out: the order of training data as a pure function.

An epoch's plan (which clips, in which order, with which label type, in which batch) follows from
(seed, epoch) alone. So the state of the data is one integer, the step, and a run continues exactly
where it stopped, on any number of processes.

Batches come in two kinds: rows of one clip each, padded to one of a few lengths, or packed rows of
one length (`data.packing`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

import grain
import numpy as np

from affectgpt_jax.common.errors import UserError
from affectgpt_jax.data.examples import Example, build_examples, soft_token_index
from affectgpt_jax.data.modalities import InputMode
from affectgpt_jax.data.packing import Bucket, pack, packed_bucket, round_up
from affectgpt_jax.data.prompts import PromptError, PromptSet, parse_label
from affectgpt_jax.data.records import Annotations, Records
from affectgpt_jax.data.tokenizer import Tokenizer

# Threads of Grain, and batches that are read ahead. Batches are made in Python and NumPy, a record
# at a time: two threads wait for each other's interpreter lock and, with the data in the page
# cache, give half as many samples/s as one (benchmarks.input_pipeline).
THREADS = 1
AHEAD = 4


class DataError(UserError, ValueError):
    """Data that does not fit the model or the config."""


@dataclasses.dataclass(frozen=True)
class PromptProcessor:
    """Turns clips into model inputs.

    Attributes:
        tokenizer, prompts, mode: of the prompts.
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
        """Assemble a batch of rows of one clip each from one data set; see `collate`.

        Args:
            dataset: where features come from.
            rows: record number and example of each row; None is a filler row without any target.
            bucket: the batch's shape.
        """
        shapes = feature_shapes(self.features, [dataset])
        clips = [[(dataset, self, *row)] if row else [] for row in rows]
        return collate(clips, self, shapes, bucket)


def _of_clip(clip: Annotations, render: Callable[[Annotations], str]) -> str:
    """The result of `render` for a clip; its error names the clip."""
    try:
        return render(clip)
    except PromptError as error:
        raise DataError(f"record {clip.name!r}: {error}") from None


def feature_shapes(
    features: Mapping[str, int], datasets: Sequence[Records]
) -> dict[str, tuple[int, int]]:
    """`(frames, width)` of every feature that the model reads, the same in all data sets.

    A feature that no data set has gets one frame, and is absent in every clip.

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


def empty_batch(
    rows: int, bucket: Bucket, shapes: Mapping[str, tuple[int, int]], pad_id: int = 0
) -> dict[str, object]:
    """A batch (layout: `models.affectgpt`) of rows without clips, as NumPy arrays.

    Args:
        rows: of the batch.
        bucket: the shape of its rows.
        shapes: `(frames, width)` of every feature that the model reads.
        pad_id: the token that fills the rows.
    """
    length, targets, clips = bucket.length, bucket.targets, bucket.clips
    return {
        "tokens": np.full((rows, length), pad_id, np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "segment_ids": np.zeros((rows, length), np.int32),
        "soft_token_index": np.zeros((rows, length), np.int32),
        "target_positions": np.zeros((rows, targets), np.int32),
        "targets": np.zeros((rows, targets), np.int32),
        "target_weights": np.zeros((rows, targets), np.float32),
        "features": {n: np.zeros((rows, clips, *shape), np.float16) for n, shape in shapes.items()},
        "present": {name: np.zeros((rows, clips), bool) for name in shapes},
    }


def collate(
    rows: Sequence[Sequence[tuple[Records, PromptProcessor, int, Example]]],
    common: PromptProcessor,
    shapes: Mapping[str, tuple[int, int]],
    bucket: Bucket,
) -> dict[str, object]:
    """Assemble a batch (layout: `models.affectgpt`) of right-padded rows.

    Args:
        rows: for each clip of each row its data set, prompt processor, record number and example in
            it. The clips of a row follow each other; a row without clips is padding.
        common: any processor of the model, for what all of them share.
        shapes: `(frames, width)` of every feature that the model reads.
        bucket: the batch's shape.
    """
    batch = empty_batch(len(rows), bucket, shapes, common.tokenizer.end_id)
    features, present = batch["features"], batch["present"]
    soft_tokens = sum(common.token_counts.values())  # of every clip
    for i, row in enumerate(rows):
        first = target = 0
        for clip, (dataset, processor, number, example) in enumerate(row):
            tokens, answer = example.tokens, example.tokens[example.answer_start :]
            here = slice(first, first + len(tokens))
            soft = soft_token_index(
                tokens, processor.tokenizer, processor.token_counts, processor.mode.slots
            )
            batch["tokens"][i, here] = tokens
            batch["positions"][i, here] = np.arange(len(tokens))
            batch["segment_ids"][i, here] = 1 + clip
            batch["soft_token_index"][i, here] = np.where(soft > 0, soft + clip * soft_tokens, 0)
            there = slice(target, target + len(answer))
            batch["target_positions"][i, there] = np.arange(here.stop - len(answer), here.stop) - 1
            batch["targets"][i, there] = answer
            batch["target_weights"][i, there] = 1
            first, target = here.stop, there.stop
            if shapes:
                found = dataset[number].features
                for name in shapes:
                    if name in found:
                        features[name][i, clip] = found[name]
                        present[name][i, clip] = True
    return batch


def choose_lengths(lengths: np.ndarray, count: int) -> tuple[int, ...]:
    """The row lengths, at most `count`, with the least padding.

    Args:
        lengths: tokens, `[N]`.
        count: lengths to choose, each of which costs one compilation.

    Returns:
        Multiples of `LENGTH_MULTIPLE`, ascending; the last holds the longest row.
    """
    rounded = round_up(lengths)
    sizes, tally = np.unique(rounded, return_counts=True)
    # cost[j] is the number of padded tokens of the best split of sizes[:j]; a round adds a length.
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
    return tuple(Bucket(end, int(round_up(targets[lengths <= end].max(initial=0)))) for end in ends)


def too_long_message(
    dataset: Records, label_types: Sequence[str], lengths: np.ndarray, max_tokens: int
) -> str:
    """The message about examples over the limit; lengths are `[types, records]`."""
    kind, worst = np.unravel_index(lengths.argmax(), lengths.shape)
    return (
        f"record {dataset.index[worst].name!r} has {lengths[kind, worst]} tokens as "
        f"{label_types[kind]}, over --config.max_tokens={max_tokens}, as have "
        f"{(lengths > max_tokens).sum() - 1} more; raise the limit or pass --config.too_long=drop"
    )


@dataclasses.dataclass(frozen=True)
class MixtureComponent:
    """One data set that training draws from.

    Attributes:
        dataset: the clips.
        processor: how they become inputs.
        label: label types, as `prompts.parse_label` reads them; where it names several, each
            access to a clip draws one.
        name: in logs.
        weight: how often an epoch draws each clip. Under 1, epochs alternate between the clips.

    Raises:
        DataError: a weight that is not positive.
    """

    dataset: Records
    processor: PromptProcessor
    label: str
    name: str = "train"
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise DataError(f"data set {self.name!r}: weight is {self.weight}; expected over 0")


class _Draws:
    """The examples of one component, and the order in which training draws them.

    Args:
        component: the data set.
        number: its place in the mixture.
        seed: of order and label draw.
        max_tokens: longer examples are not kept.
    """

    def __init__(self, component: MixtureComponent, number: int, seed: int, max_tokens: int):
        self.component, self._key = component, (seed, number)
        self.types = parse_label(component.label)
        self.examples = [
            component.processor.training_examples(component.dataset, t) for t in self.types
        ]
        self.lengths = np.array([[len(e) for e in examples] for examples in self.examples])
        starts = [[e.answer_start for e in examples] for examples in self.examples]
        self.answers = self.lengths - starts
        self.keep = self.lengths <= max_tokens

    def of_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Record numbers and label types (indices into `types`) of an epoch's kept draws."""
        size = len(self.component.dataset)
        first, end = (math.floor(e * self.component.weight * size) for e in (epoch, epoch + 1))
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
        seed, component = self._key
        rng = np.random.default_rng([seed, number, component])
        size = len(self.component.dataset)
        order = rng.permutation(size)
        return order, rng.integers(len(self.types), size=size)[order]


@dataclasses.dataclass(frozen=True)
class PlannedBatch:
    """One batch of an epoch: its bucket, and for each row's clips component, record and label type,
    `[B, C]` each (-1: no clip)."""

    bucket: int
    components: np.ndarray
    records: np.ndarray
    label_types: np.ndarray

    @property
    def clips(self) -> np.ndarray:
        """How many clips each row holds, `[B]`."""
        return (self.records >= 0).sum(axis=1)


@dataclasses.dataclass(frozen=True)
class Fill:
    """How an epoch fills its rows.

    Attributes:
        clips_per_row: of every row that holds any, `[R]`.
        clips_per_batch: `[batches]`.
        tokens: share of all positions that hold a token.
        targets: share of all places for supervised tokens that hold one.
    """

    clips_per_row: np.ndarray
    clips_per_batch: np.ndarray
    tokens: float
    targets: float


class TrainPipeline:
    """The training batches of one data set or a mixture of several.

    Attributes:
        buckets: the shapes that batches come in.
        dropped: examples over `max_tokens` that `too_long="drop"` left out.

    Args:
        components: the data sets.
        batch_size: rows of a global batch.
        max_tokens: limit of an example's length.
        too_long: "error", or "drop" to leave longer examples out and count them.
        num_buckets: the number of row lengths, where rows hold one clip each.
        pack_length: tokens of a row that holds as many clips as fit; 0 for rows of one clip each.
        seed: of order and label draw.
        process: (index, count) of this process; batches hold its share of the rows.

    Raises:
        DataError: an example over the limit, nothing left to train on, data sets whose features
            differ in shape, a batch size that the processes cannot share equally, or packed rows
            shorter than the limit.
        PromptError: a component's label that names no label types.
    """

    def __init__(
        self,
        components: Sequence[MixtureComponent],
        *,
        batch_size: int,
        max_tokens: int,
        too_long: str = "error",
        num_buckets: int = 4,
        pack_length: int = 0,
        seed: int = 0,
        process: tuple[int, int] = (0, 1),
    ):
        self._seed, self._batch_size, self._process = seed, batch_size, process
        if batch_size % process[1]:
            raise DataError(f"batch_size {batch_size} is not a multiple of {process[1]} processes")
        if 0 < pack_length < max_tokens:
            raise DataError(
                f"pack_length {pack_length} is less than max_tokens {max_tokens}: rows must hold "
                "any example whole"
            )
        self._processor = components[0].processor
        self._shapes = feature_shapes(self._processor.features, [s.dataset for s in components])
        self._draws = [_Draws(s, i, seed, max_tokens) for i, s in enumerate(components)]
        for draws in self._draws:
            if too_long != "drop" and not draws.keep.all():
                raise DataError(
                    too_long_message(
                        draws.component.dataset, draws.types, draws.lengths, max_tokens
                    )
                )
            if not draws.keep.any():
                raise DataError(
                    f"data set {draws.component.name!r} has no example of at most {max_tokens} "
                    "tokens; raise config.max_tokens"
                )
        self.dropped = sum(int((~draws.keep).sum()) for draws in self._draws)
        lengths = np.concatenate([v.lengths[v.keep] for v in self._draws])
        answers = np.concatenate([v.answers[v.keep] for v in self._draws])
        self._packed: Bucket | None = None
        if pack_length:
            weights = [
                np.full(v.keep.sum(), v.component.weight / len(v.types)) for v in self._draws
            ]
            self._packed = packed_bucket(pack_length, lengths, answers, np.concatenate(weights))
            self.buckets = (self._packed,)
        else:
            # A batch is as long as its longest row. Lengths are chosen for the batches of epoch 0;
            # the longest example fits the last bucket, so any other epoch fits too.
            _, _, longest = self._rows(0)
            ends = choose_lengths(np.append(longest, lengths.max()), num_buckets)
            self.buckets = buckets_of(ends, lengths, answers)
        self._first_step = [0]  # of every epoch planned so far, and of the next
        self._planning = threading.Lock()

    def _draws_of(self, epoch: int) -> np.ndarray:
        """Component, record and label type `[3, N]` of an epoch's draws, in their order."""
        parts = []
        for component, draws in enumerate(self._draws):
            records, kinds = draws.of_epoch(epoch)
            parts.append(np.stack([np.full(len(records), component), records, kinds]))
        together = np.concatenate(parts, axis=1)
        if len(parts) > 1:  # the draws of one component are in a random order already
            rng = np.random.default_rng([self._seed, epoch, len(parts)])
            together = together[:, rng.permutation(together.shape[1])]
        return together

    def _sizes(self, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, and supervised ones, `[N]` each, of draws `[3, N]`."""
        sizes = np.zeros((2, draws.shape[1]), np.int64)
        for component, facts in enumerate(self._draws):
            mine = draws[0] == component
            _, records, kinds = draws[:, mine]
            sizes[:, mine] = facts.lengths[kinds, records], facts.answers[kinds, records]
        return sizes[0], sizes[1]

    def _rows(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """An epoch's draws, distributed over rows and batches.

        Batches are cut from one permutation, not from clips of similar length. The loss is a mean
        over the supervised tokens of a batch: it weighs labels against descriptions as in the
        published recipe only if both occur in a batch.

        Returns:
            The draws `[3, N]`; for every batch and row of it the draws there, as columns of
            these, `[batches, B, C]` (-1: none); tokens of each batch's longest row, `[batches]`.
        """
        draws = self._draws_of(epoch)
        lengths, answers = self._sizes(draws)
        if self._packed:
            rows, width = pack(lengths, answers, self._packed), self._packed.clips
        else:
            rows, width = np.arange(len(lengths))[:, None], 1
        table = np.full((-(-len(rows) // self._batch_size) * self._batch_size, width), -1)
        for row, members in zip(table, rows):
            row[: len(members)] = members
        used = np.where(table >= 0, lengths[table], 0).sum(axis=1)
        longest = used.reshape(-1, self._batch_size).max(axis=1)
        return draws, table.reshape(-1, self._batch_size, width), longest

    @functools.lru_cache(maxsize=4)  # noqa: B019 - the pipeline lives as long as the run
    def plan(self, epoch: int) -> tuple[PlannedBatch, ...]:
        """The batches of an epoch: every kept draw, the last batch padded with filler."""
        draws, batches, longest = self._rows(epoch)
        which = np.searchsorted([bucket.length for bucket in self.buckets], longest)
        return tuple(
            PlannedBatch(int(bucket), *np.where(batch >= 0, draws[:, batch], -1))
            for bucket, batch in zip(which, batches, strict=True)
        )

    def locate(self, step: int) -> tuple[int, int]:
        """Epoch of a step, and its place in that epoch's plan."""
        with self._planning:
            while self._first_step[-1] <= step:
                epoch = len(self._first_step) - 1
                self._first_step.append(self._first_step[-1] + len(self.plan(epoch)))
        epoch = int(np.searchsorted(self._first_step, step, side="right")) - 1
        return epoch, step - self._first_step[epoch]

    def planned(self, step: int) -> PlannedBatch:
        """The plan of a step's batch."""
        epoch, place = self.locate(step)
        return self.plan(epoch)[place]

    def samples(self, step: int) -> np.ndarray:
        """The clips of a step's batch, over all processes: tokens and supervised ones, `[N, 2]`."""
        planned = self.planned(step)
        draws = np.stack([planned.components, planned.records, planned.label_types])
        return np.stack(self._sizes(draws[:, planned.records >= 0]), axis=1)

    def component_counts(self, step: int) -> dict[str, int]:
        """How many clips of a step's batch come from each component, over all processes."""
        components = self.planned(step).components
        return {v.component.name: int((components == i).sum()) for i, v in enumerate(self._draws)}

    def fill(self, epoch: int) -> Fill:
        """How full the rows of an epoch are, which must not be empty."""
        plan = self.plan(epoch)
        clips = np.array([batch.clips for batch in plan])
        lengths, answers = self._sizes(self._draws_of(epoch))
        buckets = [self.buckets[batch.bucket] for batch in plan]
        return Fill(
            clips_per_row=clips[clips > 0],
            clips_per_batch=clips.sum(axis=1),
            tokens=lengths.sum() / (self._batch_size * sum(b.length for b in buckets)),
            targets=answers.sum() / (self._batch_size * sum(b.targets for b in buckets)),
        )

    def batch(self, step: int) -> dict[str, object]:
        """This process's rows of the batch of a step, as NumPy arrays."""
        planned = self.planned(step)
        index, count = self._process
        share = self._batch_size // count
        mine = slice(index * share, (index + 1) * share)
        columns = (planned.components, planned.records, planned.label_types)
        rows = [
            [self._example(*clip) for clip in zip(*row) if clip[1] >= 0]
            for row in zip(*(column[mine].tolist() for column in columns))
        ]
        return collate(rows, self._processor, self._shapes, self.buckets[planned.bucket])

    def _example(
        self, component: int, record: int, kind: int
    ) -> tuple[Records, PromptProcessor, int, Example]:
        draws = self._draws[component]
        return (
            draws.component.dataset,
            draws.component.processor,
            record,
            draws.examples[kind][record],
        )

    def filler_batch(self, bucket: Bucket) -> dict[str, object]:
        """A global batch of this shape without any clip, for compiling."""
        end_id = self._processor.tokenizer.end_id
        return empty_batch(self._batch_size, bucket, self._shapes, end_id)

    def filler_batches(self) -> dict[int, dict[str, object]]:
        """A global batch without any clip for every row length."""
        return {bucket.length: self.filler_batch(bucket) for bucket in self.buckets}

    def describe(self) -> list[str]:
        """What a run trains on, in lines for people."""
        components = [draws.component for draws in self._draws]
        lines = [f"dropped {self.dropped} examples over the token limit"] if self.dropped else []
        if len(components) > 1:
            lines += [
                f"{c.name}: {len(c.dataset):,} clips, weight {c.weight:g}, {c.label} from "
                f"{c.processor.mode.name}"
                for c in components
            ]
        clips = sum(len(component.dataset) for component in components)
        lengths = ", ".join(f"{b.length} ({b.targets} supervised)" for b in self.buckets)
        lines.append(f"{clips:,} training clips; row lengths {lengths}")
        return [*lines, self._describe_packing()] if self._packed else lines

    def describe_run(self, steps: int) -> str:
        """How many clips and epochs so many updates are, in one sentence."""
        epoch, _ = self.locate(0)  # small weights may leave epoch 0 empty
        counts = self.fill(epoch).clips_per_batch
        seen, about = steps * counts.mean(), "about " if self._packed else ""
        return (
            f"{steps:,} updates of {self._batch_size:,} rows: {about}{seen:,.0f} clips, "
            f"{steps / len(counts):.1f} epochs of {counts.sum():,}"
        )

    def _describe_packing(self) -> str:
        """What packing makes of the first epoch, in one sentence."""
        epoch, _ = self.locate(0)  # small weights may leave epoch 0 empty
        fill, bucket = self.fill(epoch), self.buckets[0]
        rows, updates = fill.clips_per_row, fill.clips_per_batch
        return (
            f"packed: the first epoch is {len(rows):,} rows of {bucket.length:,} tokens, "
            f"{fill.tokens:.1%} full, in {len(updates):,} updates; clips a row {rows.mean():.1f} "
            f"({rows.min()} to {rows.max()}, room for {bucket.clips}), an update "
            f"{updates.mean():.1f} ({updates.min()} to {updates.max()})"
        )

    def batches(self, start: int, stop: int, threads: int = THREADS) -> Iterator[dict[str, object]]:
        """The batches of steps `start ... stop - 1`, read ahead by Grain's threads."""
        steps = grain.MapDataset.range(start, stop).map(self.batch)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=AHEAD)
        return iter(steps.to_iter_dataset(options))


def sequential_batches(
    dataset: Records,
    processor: PromptProcessor,
    examples: Sequence[Example],
    batch_size: int,
    num_buckets: int = 2,
    feature_from: Sequence[int] | None = None,
    numbers: Sequence[int] | None = None,
) -> Iterator[tuple[np.ndarray, dict[str, object]]]:
    """Clips once each, in an order fixed by the examples' lengths: for evaluation.

    Args:
        dataset: the clips.
        processor: how they become inputs.
        examples: one a clip, with or without an answer.
        batch_size: rows of a batch; the last one of a bucket is filled up.
        num_buckets: the number of row lengths.
        feature_from: for each clip the number of the one whose features it gets; its own if None.
            (A permutation gives the control with features shuffled across clips.)
        numbers: the clips to draw; all if None.

    Yields:
        Record numbers of the rows, int `[n]` with n at most `batch_size`, and the batch; the
        longest rows first, so that what does not fit fails at once.
    """
    chosen = np.arange(len(examples)) if numbers is None else np.asarray(numbers)
    lengths = np.array([len(examples[i]) for i in chosen])
    answers = lengths - np.array([examples[i].answer_start for i in chosen])
    buckets = buckets_of(choose_lengths(lengths, num_buckets), lengths, answers)
    which = np.searchsorted([bucket.length for bucket in buckets], lengths)
    features_of = np.arange(len(examples)) if feature_from is None else np.asarray(feature_from)

    def load(job: tuple[Bucket, np.ndarray]) -> tuple[np.ndarray, dict[str, object]]:
        bucket, numbers = job
        rows = [(int(features_of[i]), examples[i]) for i in numbers]
        rows += [None] * (batch_size - len(rows))
        return numbers, processor.collate(dataset, rows, bucket)

    jobs = []
    for i, bucket in reversed(list(enumerate(buckets))):
        members = chosen[which == i]
        jobs += [(bucket, members[j : j + batch_size]) for j in range(0, len(members), batch_size)]
    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=AHEAD)
    yield from grain.MapDataset.source(jobs).map(load).to_iter_dataset(options)
