"""Records as a TensorFlow-Datasets data set, written and read without TensorFlow.

A data set of one or several splits, each out of one record directory, lies in `DIR/NAME/VERSION`:

    dataset_info.json, features.json        TFDS's own: splits, schema
    metadata.json                           `{"splits": {split: Manifest}}`, as in `records`
    index-SPLIT.jsonl                       the record directory's index, copied
    affect_records-SPLIT.array_record-*     the records, as `tf.train.Example`

Anything that reads TFDS reads it (`tfds.builder_from_directory(...).as_data_source(split)`);
`TfdsDataset` reads it as `RecordDataset` reads a record directory, record for record.

The schema follows `Annotations`: a text is `Text`, several are a `Sequence` of them, and numbers
are raw float64, since an `Example` would round them to float32. A number that is not there is an
array of none, a modality that a clip lacks is an array of no frames.

Training needs every clip's texts before it starts, but no feature. An `Example` holds both, so the
index is a file of its own: a thirtieth of the bytes, and JSON lines parse faster than a second TFDS
data set without features would.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import functools
import io
import itertools
import os
import re
import shutil
import tempfile
import typing
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import tensorflow_datasets as tfds

from affectgpt_jax.common.files import new_path, sha256_of
from affectgpt_jax.common.json import read_json
from affectgpt_jax.data.modalities import feature_names
from affectgpt_jax.data.records import (
    FORMAT_VERSION,
    INDEX_FILE,
    Annotations,
    IndexEntry,
    Manifest,
    Record,
    RecordDataset,
    RecordError,
    as_manifest,
    expect,
    read_index,
)

INFO_FILE, METADATA_FILE = "dataset_info.json", "metadata.json"
# A shard's records are in memory when it is written; with features as the paper's, some 70 MB.
RECORDS_PER_SHARD = 2048
_SUB_SPLIT = r"[\w-]+(?:\[[^][/]*\])?"
_SPLIT = rf"{_SUB_SPLIT}(?:\s*\+\s*{_SUB_SPLIT})*"
_RESTORE = "restore the data set from its source, or write it again"
_OTHER_VERSION = "it was written by another version of this code: update, or write it again"


@dataclasses.dataclass(frozen=True)
class _Column:
    """How a field of `Annotations` is stored: its TFDS feature and both conversions."""

    feature: Callable[[], Any]
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]


_numbers = functools.partial(
    tfds.features.Tensor, shape=(None,), dtype=np.float64, encoding="bytes"
)
_COLUMNS = {
    str: _Column(tfds.features.Text, str, bytes.decode),
    tuple[str, ...]: _Column(
        lambda: tfds.features.Sequence(tfds.features.Text()),
        list,
        lambda texts: tuple(text.decode() for text in texts),
    ),
    float | None: _Column(
        _numbers,
        lambda number: np.array([] if number is None else [number], np.float64),
        lambda numbers: numbers.item() if numbers.size else None,
    ),
    tuple[float, ...]: _Column(
        _numbers,
        lambda numbers: np.array(numbers, np.float64),
        lambda numbers: tuple(numbers.tolist()),
    ),
}
# So `Annotations` may gain fields of these types, and nothing here has to change.
_FIELDS = {name: _COLUMNS[hint] for name, hint in typing.get_type_hints(Annotations).items()}


# TFDS's better-known GeneratorBasedBuilder holds a split in memory, to sort it, and beyond 1,000
# MiB in files that it opens through TensorFlow. This one keeps the order and shards as it is told.
class AffectRecords(tfds.core.ShardBasedBuilder):
    """TFDS builder of a data set whose splits are record directories.

    Args:
        splits: the record directory of each split; none to read a data set that is there.
        data_dir: where TFDS puts `NAME/VERSION`.

    Raises:
        RecordError: a record directory that is damaged, or a feature whose width or encoder differs
            between splits.
    """

    VERSION = tfds.core.Version("1.0.0")
    # Checksums of downloads, of which there are none; to look for them, TFDS 4.9.10 needs a package
    # (importlib_resources) that it does not install.
    url_infos = None

    def __init__(
        self, *, splits: Mapping[str, str | os.PathLike[str]] | None = None, **kwargs: Any
    ):
        self._directories = {split: Path(path) for split, path in (splits or {}).items()}
        self._records = {split: RecordDataset(path) for split, path in self._directories.items()}
        _check_encoders(self._records)
        super().__init__(**{"file_format": "array_record"} | kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Video clips as precomputed features, with their subtitles and emotion "
            "annotations, for affectgpt_jax.",
            homepage="https://arxiv.org/abs/2501.16566",
            features=_schema(self._records) if self._records else None,
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(splits={}),
        )

    def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list[Callable]]:
        del dl_manager
        return {
            split: [
                functools.partial(self._examples, dataset, start)
                for start in range(0, len(dataset), RECORDS_PER_SHARD)
            ]
            for split, dataset in self._records.items()
        }

    def _examples(self, dataset: RecordDataset, start: int) -> Iterator[tuple[str, dict]]:
        """Key and example of each record of the shard that begins at record `start`."""
        widths = _widths(self._records)
        for i in range(start, min(start + RECORDS_PER_SHARD, len(dataset))):
            record = dataset[i]
            example = {n: _FIELDS[n].encode(getattr(record, n)) for n in _FIELDS}
            if widths:
                example["features"] = {
                    feature: record.features.get(feature, np.zeros((0, width), np.float16))
                    for feature, width in widths.items()
                }
            yield record.name, example

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        """Adds to the shards what `TfdsDataset` needs; TFDS shows its directory when all is there.

        The manifests are the record directories' own but for the shards.
        """
        super()._download_and_prepare(dl_manager, download_config)
        directory = Path(self.data_dir)
        for split, dataset in self._records.items():
            info = self.info.splits[split]
            shards = [
                {
                    "file": path.name,
                    "count": count,
                    "bytes": path.stat().st_size,
                    "sha256": sha256_of(path),
                }
                for path, count in zip(map(Path, info.filepaths), info.shard_lengths, strict=True)
            ]
            manifest = dataclasses.replace(dataset.manifest, split=split, shards=shards)
            self.info.metadata["splits"][split] = dataclasses.asdict(manifest)
            shutil.copyfile(self._directories[split] / INDEX_FILE, directory / _index_file(split))


def _schema(records: Mapping[str, RecordDataset]) -> tfds.features.FeaturesDict:
    """The columns of `Annotations`, with the features that occur in any split."""
    schema = {name: column.feature() for name, column in _FIELDS.items()}
    if widths := _widths(records):
        schema["features"] = tfds.features.FeaturesDict(
            {
                feature: tfds.features.Tensor(
                    shape=(None, width), dtype=np.float16, encoding="bytes"
                )
                for feature, width in widths.items()
            }
        )
    return tfds.features.FeaturesDict(schema)


def _widths(records: Mapping[str, RecordDataset]) -> dict[str, int]:
    """The width of every feature that occurs in any split."""
    return {
        feature: facts["width"]
        for dataset in records.values()
        for feature, facts in dataset.manifest.features.items()
    }


def _index_file(split: str) -> str:
    return f"index-{split}.jsonl"


def write_tfds(
    directory: str | os.PathLike[str], splits: Mapping[str, str | os.PathLike[str]]
) -> Path:
    """Writes a TFDS data set and returns its own directory, `directory/NAME/VERSION`.

    Args:
        directory: where TFDS data sets lie.
        splits: the record directory of each split, by the split's name.

    Raises:
        RecordError: no splits, a name that TFDS cannot have, a record directory that is damaged, a
            feature whose width or encoder differs between splits, a data set that is there, or one
            that cannot be written, as when the disk is full.
    """
    if not splits:
        raise RecordError(f"{directory}: there are no splits to write; name record directories")
    for split in splits:
        if not re.fullmatch(r"[\w-]+", split) or split.lower() == "all":
            raise RecordError(
                f"a TFDS split cannot be called {split!r}; choose another name, of letters, "
                "digits, - and _"
            )
    path = Path(directory) / AffectRecords.name / str(AffectRecords.VERSION)
    # What TFDS itself leaves behind of a process that is killed looks like a data set.
    with new_path(path, RecordError) as partial:
        builder = AffectRecords(splits=splits, data_dir=partial.parent)
        # TFDS announces a download of unknown size, and wants a place for it; there is none.
        try:
            with (
                tempfile.TemporaryDirectory() as downloads,
                contextlib.redirect_stdout(io.StringIO()),
            ):
                builder.download_and_prepare(download_dir=downloads)
        except (OSError, RuntimeError) as error:  # the ArrayRecord writer's is a RuntimeError
            raise RecordError(
                f"{directory} cannot be written: {error}; is the disk full?"
            ) from error
        Path(builder.data_dir).rename(partial)
    return path


def _check_encoders(records: Mapping[str, RecordDataset]) -> None:
    known: dict[str, tuple[str, Any]] = {}
    for split, dataset in records.items():
        for feature, facts in dataset.manifest.features.items():
            mine = facts["width"], facts["encoder"]
            first, expected = known.setdefault(feature, (split, mine))
            if mine != expected:
                raise RecordError(
                    f"{feature!r} is {mine[0]} wide, of encoder {mine[1]!r}, in split {split!r}, "
                    f"but {expected[0]}, of {expected[1]!r}, in {first!r}; extract both with the "
                    "same one, or write two data sets"
                )


def open_source(source: str, default_split: str) -> TfdsDataset:
    """Opens `tfds:DIR` or `tfds:DIR:SPLIT`, where SPLIT may be arithmetic, as `train[:80%]+val`.

    Args:
        source: such a string.
        default_split: what `tfds:DIR` reads.

    Raises:
        RecordError: another form, or as `TfdsDataset`.
    """
    match = re.fullmatch(rf"tfds:(.+?)(?::({_SPLIT}))?", source)
    if match is None:
        raise RecordError(f"{source!r} names no data set; expected tfds:DIR or tfds:DIR:SPLIT")
    return TfdsDataset(Path(match[1]).expanduser(), match[2] or default_split)


@dataclasses.dataclass(frozen=True)
class _Part:
    """Consecutive records of one shard."""

    path: Path
    start: int  # its first record, counted in the shard
    entries: list[IndexEntry]


class TfdsDataset:
    """Random access to a split of a TFDS data set, for any number of threads.

    Has the interface of `RecordDataset`, and gives the records that the split was written from, in
    their order. Opening checks cheaply that what it reads is whole (metadata, the size of every
    shard, the lines and the hash of the index); `verify` reads all. `manifest` counts what is read;
    its shards and its `index_sha256` are those of the whole splits.

    Args:
        directory: what `write_tfds` was given, or returned.
        split: a split or what TFDS's split arithmetic makes of some: `train[:80%]`, `train+val`.

    Raises:
        RecordError: no such directory or split, not such a data set, one that is not whole, or
            splits that do not go together.
    """

    def __init__(self, directory: str | os.PathLike[str], split: str = "train"):
        self._directory = _find(Path(directory))
        builder, manifests = _open(self._directory)
        where = f"{self._directory}, split {split!r}"
        try:
            instructions = builder.info.splits[split].file_instructions
        except (ValueError, KeyError) as error:
            known = ", ".join(f"{name} ({m.count:,} clips)" for name, m in manifests.items())
            reason = str(error).splitlines()[-1].split(". ")[0].removesuffix(".")
            raise RecordError(f"{where} cannot be read: {reason}; it has {known}") from None
        # What ends before it starts, TFDS takes for a shard of less than no records.
        if not instructions or min(i.take for i in instructions) < 1:
            raise RecordError(f"{where} holds no records; name a larger part of it")
        self._manifests = _used(manifests, instructions, where)
        self._check_sizes()
        self._parts = self._locate(instructions)
        self._ends = list(itertools.accumulate(len(part.entries) for part in self._parts))
        self.index = [entry for part in self._parts for entry in part.entries]
        names = Counter(entry.name for entry in self.index)
        if twice := [name for name, times in names.items() if times > 1]:
            raise RecordError(
                f"{where} holds {len(twice)} records more than once, the first is {twice[0]!r}; "
                "name splits that do not overlap"
            )
        self.manifest = self._describe(split, where)
        known = self.manifest.features
        self._shapes = {f: (known[f]["frames"], known[f]["width"]) for f in known}
        self._source = builder.as_data_source(split)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> Record:
        """Reads record `i`; negative numbers count from the end.

        Raises RecordError, naming the shard and the record's number in it, where the bytes are
        damaged or are not the record that index and metadata describe; IndexError past the end.
        """
        if not -len(self) <= i < len(self):
            raise IndexError(f"there is no record {i} among {len(self)}")
        i = range(len(self))[i]
        try:
            record = _to_record(self._source[i])
            found = record.name, {f: array.shape for f, array in record.features.items()}
            expected = self.index[i].name, {f: self._shapes[f] for f in self.index[i].present}
            if found != expected:
                raise RecordError(f"found {found}, index and metadata expect {expected}")
        # Damage shows in any layer: ArrayRecord, protocol buffers, TFDS's features, UTF-8.
        except Exception as error:
            at = bisect.bisect_right(self._ends, i)
            part = self._parts[at]
            number = part.start + len(part.entries) - (self._ends[at] - i)
            where = f"{part.path}, record {number} ({self.index[i].name!r})"
            raise RecordError(f"{where} cannot be read: {_reason(error)}; {_RESTORE}") from error
        return record

    def ceilings(self, mode: str) -> dict[str, float]:
        """Empty: see `Records.ceilings`."""
        return {}

    def verify(self) -> None:
        """Hashes the files of the splits; RecordError at the first that is not as written."""
        self._check_sizes()
        for split, manifest in self._manifests.items():
            read_index(self._directory / _index_file(split), manifest)
            for shard in manifest.shards:
                path = self._directory / shard["file"]
                expect(path, "sha256", sha256_of(path), shard["sha256"])

    def _check_sizes(self) -> None:
        for manifest in self._manifests.values():
            for shard in manifest.shards:
                path = self._directory / shard["file"]
                found = path.stat().st_size if path.is_file() else "no such file"
                expect(path, "size in bytes", found, shard["bytes"])

    def _locate(self, instructions: list[Any]) -> list[_Part]:
        """The index entries that TFDS's instructions read, shard by shard."""
        shards = {}
        for split, manifest in self._manifests.items():
            entries, start = read_index(self._directory / _index_file(split), manifest), 0
            for shard in manifest.shards:
                shards[shard["file"]] = entries[start : start + shard["count"]]
                start += shard["count"]
        return [
            _Part(path, i.skip, shards[path.name][i.skip : i.skip + i.take])
            for i in instructions
            for path in [Path(i.filename)]
        ]

    def _describe(self, split: str, where: str) -> Manifest:
        """The manifest of what is read: of the whole split, that of the split."""
        features: dict[str, dict[str, Any]] = {}
        for manifest in self._manifests.values():
            for feature, facts in manifest.features.items():
                first = features.setdefault(feature, facts | {"present": 0})
                shape, other = ((f["frames"], f["width"]) for f in (first, facts))
                if shape != other:
                    raise RecordError(
                        f"{where}: {feature!r} is {list(shape)} in one of them, {list(other)} in "
                        "another; name one"
                    )
        present = Counter(feature for entry in self.index for feature in entry.present)
        names, manifests = zip(*self._manifests.items(), strict=True)
        return Manifest(
            format_version=FORMAT_VERSION,
            split=split,
            count=len(self.index),
            shards=[shard for manifest in manifests for shard in manifest.shards],
            features={
                f: features[f] | {"present": present[f]} for f in feature_names() if f in features
            },
            sources=dict(Counter(entry.source for entry in self.index)),
            index_sha256="+".join(manifest.index_sha256 for manifest in manifests),
            extra=manifests[0].extra if len(names) == 1 else {m.split: m.extra for m in manifests},
        )


def _find(directory: Path) -> Path:
    """The directory of the data set itself."""
    if not directory.is_dir():
        raise RecordError(
            f"{directory} is not a directory; a TFDS source is tfds:DIR or tfds:DIR:SPLIT, as in "
            "tfds:/data:train[:80%]"
        )
    candidates = (directory, directory / AffectRecords.name / str(AffectRecords.VERSION))
    for candidate in candidates:
        if (candidate / INFO_FILE).exists():
            return candidate
    raise RecordError(
        f"{directory} holds no TFDS data set: neither {candidates[0] / INFO_FILE} nor "
        f"{candidates[1] / INFO_FILE} is there; write one with affectgpt to-tfds"
    )


def _open(directory: Path) -> tuple[tfds.core.DatasetBuilder, dict[str, Manifest]]:
    """The TFDS builder of a data set, and the manifest of every split."""
    try:
        builder = tfds.builder_from_directory(directory)
    # A damaged file fails in TFDS, in JSON, or in protocol buffers.
    except Exception as error:
        raise RecordError(f"{directory} is damaged: {_reason(error)}; {_RESTORE}") from error
    if builder.name != AffectRecords.name:
        raise RecordError(
            f"{directory} holds the TFDS data set {builder.name!r}, not one that python -m "
            f"data_prep.to_tfds wrote, {AffectRecords.name!r}"
        )
    path = directory / METADATA_FILE
    splits = read_json(path, _Metadata, error=RecordError, advice=_RESTORE)["splits"]
    versions = {fields["format_version"] for fields in splits.values()}
    if not versions <= {FORMAT_VERSION}:
        raise RecordError(f"{path}: format versions {sorted(versions)}: {_OTHER_VERSION}")
    return builder, {split: as_manifest(fields, str(path)) for split, fields in splits.items()}


class _Versioned(TypedDict):
    format_version: int


class _Metadata(TypedDict):
    """What the metadata of the data set holds: the manifest of every split."""

    splits: dict[str, _Versioned]


def _reason(error: Exception) -> str:
    """The first line of a message; TFDS adds where it was, and protocol buffers what they saw."""
    return (str(error) or repr(error)).splitlines()[0].removesuffix(".")


def _used(
    manifests: Mapping[str, Manifest], instructions: list[Any], where: str
) -> dict[str, Manifest]:
    """The manifests of the splits that TFDS is to read."""
    read = {Path(i.filename).name: i.examples_in_shard for i in instructions}
    known = {shard["file"]: shard["count"] for m in manifests.values() for shard in m.shards}
    if strange := {file for file, count in read.items() if known.get(file) != count}:
        raise RecordError(
            f"{where}: {INFO_FILE} and {METADATA_FILE} disagree on {min(strange)}; {_RESTORE}"
        )
    return {
        split: manifest
        for split, manifest in manifests.items()
        if any(shard["file"] in read for shard in manifest.shards)
    }


def _to_record(example: Mapping[str, Any]) -> Record:
    example = dict(example)
    features = example.pop("features", {})
    if unknown := example.keys() - _FIELDS.keys():
        raise RecordError(f"it has a field {min(unknown)!r} that is unknown here; {_OTHER_VERSION}")
    return Record(
        features={f: features[f] for f in feature_names() if f in features and len(features[f])},
        **{name: _FIELDS[name].decode(value) for name, value in example.items()},
    )
