"""What is measured: five workloads, in full on a GPU and at a scale that two CPU cores carry.

    anchor     rows of 4,096 random tokens, all supervised: LoRA of a 7B model as others report it
    affectgpt  the paper's recipe on its own lengths, from records on a disk through Grain
    small      rows of 256 tokens, half of them supervised, for ratios on any machine
    decode     answers of 2,610 clips: labels of two dozen tokens, descriptions of 259
    input      the input pipeline alone, as many records as MER-Caption+ has: 31,327

Weights are random: nothing here depends on what a model has learned. Every process that is given
the same arguments sees the same batches.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from ml_collections import ConfigDict

from affectgpt_jax import build
from affectgpt_jax.config import ConfigError
from affectgpt_jax.configs import affectgpt_qwen25_7b
from affectgpt_jax.data.packing import Bucket
from affectgpt_jax.data.pipeline import MixtureComponent, PromptProcessor, TrainPipeline
from affectgpt_jax.data.records import RecordDataset
from affectgpt_jax.models.affectgpt import Batch
from affectgpt_jax.models.decoder import PUBLISHED, DecoderConfig
from benchmarks import synthetic

NAMES = ("anchor", "affectgpt", "small", "decode", "input")
# 40 million parameters: a step of 4 x 256 tokens takes two CPU cores about a second.
SMALL = DecoderConfig(32000, 512, 1408, 8, 8, 2, 64, tie_word_embeddings=True)
TINY = DecoderConfig(704, 32, 48, 2, 2, 1, 16, tie_word_embeddings=True)
# Scale -> shape of the base, dtype, records of a training set.
SCALES = {
    "full": (PUBLISHED["Qwen2.5-7B-Instruct"], "bfloat16", 31_327),
    "small": (SMALL, "float32", 4_096),
    "tiny": (TINY, "float32", 64),  # for tests of the commands themselves
}
MEAN_TOKENS = 255  # of an AffectGPT example under hybrid labels
PACK_LENGTH = {"full": 2048, "small": 1024, "tiny": 1024}
# Layout of rows -> microbatches of 48 clips at full scale, so that activations fit into 80 GB: some
# 6,000 tokens in each, and 4,000 where all logits are held.
MICROBATCHES = {"padded": 6, "release": 8, "packed": 2}


@dataclasses.dataclass(frozen=True)
class Workload:
    """What runs, as both sides of a comparison are told it.

    Attributes:
        name, scale: of `NAMES` and `SCALES`.
        config: the recipe, as `affectgpt_jax.train` reads it.
        llm: shape of the base.
        records: how many the record set has; 0 for rows of random tokens.
        lengths: of the records' texts.
        row: tokens and supervised ones of a row of random tokens.
    """

    name: str
    scale: str
    config: ConfigDict
    llm: DecoderConfig
    records: int
    lengths: synthetic.Lengths = synthetic.AFFECTGPT
    row: tuple[int, int] = (0, 0)


def make(
    name: str,
    scale: str,
    *,
    batch: int = 48,
    pack_length: int = 0,
    gradient_accumulation_steps: int = 1,
    dtype: str = "",
    tokenizer: str = "tiny",
    rows: tuple[int, int] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Workload:
    """A workload by its name.

    Args:
        name: of `NAMES`.
        scale: of `SCALES`.
        batch: clips in an update of "affectgpt" or "input".
        pack_length: tokens of a row that holds several of them; 0 is a row for each.
        gradient_accumulation_steps: microbatches of an update.
        dtype: of the base and of computation; "" is the scale's.
        tokenizer: directory of one; "tiny" is the one that ships.
        rows: of the anchor, and their tokens; None is the scale's.
        settings: keys of the config, dotted, and their values.

    Raises:
        ConfigError: a key that the config does not have, or a value of another type.
    """
    llm, own_dtype, records = SCALES[scale]
    config = affectgpt_qwen25_7b.get_config()
    config.llm = tokenizer
    # The tokenizer that ships spells words of the default prompts letter by letter.
    config.prompts = "compact" if tokenizer == "tiny" else "default"
    config.dtype = dtype or own_dtype
    config.gradient_accumulation_steps = gradient_accumulation_steps
    workload = Workload(name, scale, config, llm, records)
    if name == "anchor":
        config.input, config.lora.dropout = "text", 0.0
        # The last token predicts nothing that is there.
        of_scale = {"full": (2, 4096), "small": (1, 4096), "tiny": (2, 64)}[scale]
        config.batch_size, length = rows or of_scale
        workload = dataclasses.replace(workload, records=0, row=(length, length - 1))
    elif name == "small":
        config.batch_size, config.label, config.lora.dropout = 4, "description", 0.0
        config.num_buckets = 1
        workload = dataclasses.replace(workload, records=64, lengths=synthetic.EQUAL)
    elif name == "decode":
        config.generate.batch_size = {"full": 256, "small": 32, "tiny": 4}[scale]
        clips = {"full": 2_610, "small": 256, "tiny": 8}[scale]
        workload = dataclasses.replace(workload, records=clips)
    else:
        config.batch_size, config.pack_length = batch, pack_length
        if pack_length:  # about as many clips an update
            config.batch_size = max(1, round(batch * MEAN_TOKENS / pack_length))
    for key, value in (settings or {}).items():
        try:
            config.update_from_flattened_dict({key: value})
        except KeyError:
            raise ConfigError(f"the config has no key {key!r}") from None
        except TypeError:
            kind = type(functools.reduce(getattr, key.split("."), config)).__name__
            raise ConfigError(f"config.{key} is {value!r}; expected a value of {kind}") from None
    return workload


def arguments(
    name: str,
    scale: str,
    batch: int,
    layout: str,
    *,
    pack_length: int | None = None,
    gradient_accumulation_steps: int = 0,
    **others: Any,
) -> dict[str, Any]:
    """What `make` is given for rows of a layout.

    Args:
        name, scale, batch: as for `make`.
        layout: of `MICROBATCHES`.
        pack_length: tokens of a packed row; None or 0 is the scale's.
        gradient_accumulation_steps: microbatches of an update; 0 chooses.
        others: more arguments of `make`.
    """
    in_parts = name == "affectgpt" and scale == "full" and batch >= 48
    return {
        "name": name,
        "scale": scale,
        "batch": batch,
        "pack_length": (pack_length or PACK_LENGTH[scale]) if layout == "packed" else 0,
        "gradient_accumulation_steps": gradient_accumulation_steps
        or (MICROBATCHES[layout] if in_parts else 1),
        **others,
    }


def prompt_processor(workload: Workload) -> PromptProcessor:
    """How its records become inputs."""
    directory = build.base_directory(workload.config.llm)
    return build.prompt_processor(workload.config, build.tokenizer(directory, workload.llm))


def open_records(workload: Workload, root: Path) -> RecordDataset:
    """Its record set, which is written where it is not there yet.

    Args:
        workload: one with records.
        root: of all record sets.
    """
    how, of = prompt_processor(workload), workload
    tokenizer = Path(of.config.llm).name
    kind = "equal" if of.lengths is synthetic.EQUAL else "affectgpt"
    directory = root / f"{kind}-{of.records}-{tokenizer}"
    synthetic.write(directory, of.records, of.lengths, how)
    return RecordDataset(directory)


class Feed(Protocol):
    """Batches by the number of their step, as `TrainPipeline` has them."""

    buckets: tuple[Bucket, ...]

    def batch(self, step: int) -> Batch: ...

    def filler_batch(self, bucket: Bucket) -> Batch: ...

    def batches(self, start: int, stop: int) -> Iterator[Batch]: ...


def feed(workload: Workload, root: Path) -> Feed:
    """The batches of a workload that trains."""
    config = workload.config
    if not workload.records:
        return RandomRows(config.batch_size, *workload.row, workload.llm.vocab_size)
    return TrainPipeline(
        [MixtureComponent(open_records(workload, root), prompt_processor(workload), config.label)],
        batch_size=config.batch_size,
        max_tokens=config.max_tokens,
        num_buckets=config.num_buckets,
        pack_length=config.pack_length,
        seed=config.seed,
    )


class RandomRows:
    """Rows of random tokens, the last of which are supervised."""

    def __init__(self, rows: int, length: int, targets: int, vocab_size: int):
        self.buckets = (Bucket(length, targets),)
        self._rows, self._vocab_size = rows, vocab_size

    def batch(self, step: int) -> Batch:
        rng = np.random.default_rng(step)
        (bucket,), rows = self.buckets, self._rows
        tokens = rng.integers(self._vocab_size, size=(rows, bucket.length), dtype=np.int32)
        places = np.arange(bucket.length, dtype=np.int32)
        supervised = places[-bucket.targets :]
        return {
            "tokens": tokens,
            "positions": np.tile(places, (rows, 1)),
            "segment_ids": np.ones_like(tokens),
            "soft_token_index": np.zeros_like(tokens),
            "target_positions": np.tile(supervised - 1, (rows, 1)),
            "targets": tokens[:, supervised],
            "target_weights": np.ones((rows, bucket.targets), np.float32),
            "features": {},
            "present": {},
        }

    def filler_batch(self, bucket: Bucket) -> Batch:
        return self.batch(0)

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        return map(self.batch, range(start, stop))


class EveryPosition:
    """The batches of a feed, with a target at every position: what the lm_head costs where
    supervised positions are not chosen first."""

    def __init__(self, feed: Feed):
        self._feed = feed
        self.buckets = tuple(Bucket(b.length, b.length, b.clips) for b in feed.buckets)

    def batch(self, step: int) -> Batch:
        return self._all(self._feed.batch(step))

    def filler_batch(self, bucket: Bucket) -> Batch:
        same = next(b for b in self._feed.buckets if b.length == bucket.length)
        return self._all(self._feed.filler_batch(same))

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        return map(self._all, self._feed.batches(start, stop))

    @staticmethod
    def _all(batch: Batch) -> Batch:
        # A soft token's placeholder may be no word of the base.
        tokens = np.where(np.asarray(batch["soft_token_index"]) > 0, 0, batch["tokens"])
        places = np.arange(tokens.shape[1], dtype=np.int32)
        return {
            **batch,
            "target_positions": np.tile(places, (len(tokens), 1)),
            "targets": np.roll(tokens, -1, axis=1),
            "target_weights": np.ones(tokens.shape, np.float32),
        }


class Contents(NamedTuple):
    """What is in a batch.

    Attributes:
        places: tokens that its rows have room for.
        samples: tokens and supervised ones of every clip, `[N, 2]`.
    """

    places: int
    samples: np.ndarray


def contents(batch: Batch) -> Contents:
    """Count what is in a batch."""
    segments = np.asarray(batch["segment_ids"])
    rows, width = len(segments), int(segments.max(initial=0)) + 1
    of_targets = np.take_along_axis(segments, np.asarray(batch["target_positions"]), axis=1)
    of_targets = np.where(np.asarray(batch["target_weights"]) > 0, of_targets, 0)
    start = width * np.arange(rows)[:, None]
    tokens, targets = (
        np.bincount((x + start).ravel(), minlength=rows * width).reshape(rows, width)[:, 1:]
        for x in (segments, of_targets)
    )
    there = tokens > 0
    return Contents(segments.size, np.stack([tokens[there], targets[there]], axis=1))
