"""Clips on disk: precomputed features and annotations in ArrayRecord shards.

A record directory holds one split of a data set:

    manifest.json                           what is here: shapes, encoders, counts, hashes
    index.jsonl                             one line a record, in order: all but feature values
    records-00000-of-00003.array_record     the records, `group_size:1`, uncompressed

The manifest comes last, so a directory that has one is complete. Nothing in the files depends on
the clock or the machine: the same records give the same bytes.

A record is these bytes, little-endian throughout:

    4 bytes     magic `AGPT`
    u32         format version
    u32         crc32 of all that follows
    u32         header length
    header      UTF-8 JSON, padded with spaces so that the buffers start 16-byte aligned
    buffers     float16, C order, in the order of the header's `features: [[name, T, d], ...]`
"""

import bisect
import contextlib
import dataclasses
import errno
import hashlib
import io
import itertools
import json
import math
import os
import re
import struct
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypedDict

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from affectgpt_jax.common.errors import UserError
from affectgpt_jax.common.files import read_bytes, sha256_of
from affectgpt_jax.common.json import check_type, json_lines, parse_json, read_json
from affectgpt_jax.common.labels import PREFERENCES
from affectgpt_jax.common.text import brief, one_line, shorten
from affectgpt_jax.data.modalities import feature_names

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
INDEX_FILE = "index.jsonl"
# The key of `Manifest.extra` with the settings by which encoders made the features, as
# data_prep.extract writes them.
EXTRACTION = "extraction"

# The name of a shard, which lies in the directory itself.
_FILE = re.compile(r"[\w.+-]+")
_MAGIC = b"AGPT"
_PREFIX = struct.Struct("<4sIII")
# Float16 features do not compress. A shard stores its options, so none is left to a default that
# may follow the machine.
_WRITER_OPTIONS = "group_size:1,uncompressed,max_parallelism:1"
_UPDATE = f"this code reads version {FORMAT_VERSION}: update it, or write the data again"
_RESTORE = "restore the directory from its source, or write it again"


class RecordError(UserError, ValueError):
    """A record, or a directory of records, that is damaged or malformed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Annotations:
    """Annotations of a clip. All but the name may be empty; each label type reads some of them."""

    name: str
    subtitle: str = ""
    description: str = ""
    labels: tuple[str, ...] = ()
    emotion: str = ""  # the single true word, where the data set has one
    candidates: tuple[str, ...] = ()  # the words that `emotion` was chosen from
    valence: float | None = None
    valence_range: tuple[float, ...] = ()  # lowest and highest valence of the data set
    caption: str = ""
    question: str = ""
    answer: str = ""  # to `question`
    alternatives: tuple[str, ...] = ()  # two descriptions, "a1" and "a2"
    preferred: str = ""  # the better one of `alternatives`; "same" where neither is
    source: str = ""  # the data set that the clip comes from
    conflict: str = ""  # the modality that contradicts the others, where that is known


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)  # arrays have no single truth value
class Record(Annotations):
    """One clip.

    `features` maps names of `modalities.feature_names()` to arrays `[T, d]`, finite and in the
    range of float16; a modality that the clip lacks has no key. A decoded record holds read-only
    float16 arrays.
    """

    features: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexEntry(Annotations):
    """A `Record` without its feature values; `present` names its features in their order."""

    present: tuple[str, ...]


_TEXTS = (
    *("name", "subtitle", "description", "emotion", "caption", "question", "answer", "source"),
    "conflict",
)
_TUPLES = ("labels", "candidates", "valence_range", "alternatives", "present")


class Shard(TypedDict):
    """A file of records: its name, records, bytes and hash."""

    file: str
    count: int
    bytes: int
    sha256: str


class Feature(TypedDict):
    """A feature of all clips: T, d, what made it, and how many clips have it."""

    frames: int
    width: int
    encoder: str
    present: int


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The contents of `manifest.json`; every clip has its features in the shapes given here."""

    format_version: int
    split: str
    count: int
    shards: list[Shard]
    features: dict[str, Feature]  # by name
    sources: dict[str, int]  # source -> clips
    index_sha256: str
    extra: dict[str, Any]  # the writer's own notes


def encode(record: Record) -> bytes:
    """Returns the bytes of a record, in the format that this module's docstring gives.

    Raises:
      RecordError: a field has the wrong type, a feature is not one of
        `modalities.feature_names()`, or its array is not `[T, d]`, empty, not finite, or overflows
        float16.
    """
    where = f"record {record.name!r}"
    if unknown := set(record.features) - set(feature_names()):
        raise RecordError(f"{where}: features {sorted(unknown)} are unknown; use {feature_names()}")
    arrays = {feature: _to_float16(record, feature) for feature in _present(record)}
    shapes = [[feature, *array.shape] for feature, array in arrays.items()]
    header = _to_json(_annotations(record) | {"features": shapes}, where)
    header += b" " * (-(_PREFIX.size + len(header)) % 16)
    buffers = (array.tobytes() for array in arrays.values())
    checked = b"".join([struct.pack("<I", len(header)), header, *buffers])
    return struct.pack("<4sII", _MAGIC, FORMAT_VERSION, zlib.crc32(checked)) + checked


def decode(data: bytes) -> Record:
    """Returns the record that `encode` wrote; its arrays are read-only float16 views of `data`.

    Raises RecordError where the bytes are no record, of another format version, or damaged.
    """
    if len(data) < _PREFIX.size or not data.startswith(_MAGIC):
        raise RecordError("these bytes are not a record: they do not start with its prefix")
    _, version, crc, header_length = _PREFIX.unpack_from(data)
    if version != FORMAT_VERSION:
        raise RecordError(f"format version {version} is unknown; {_UPDATE}")
    if zlib.crc32(memoryview(data)[12:]) != crc:  # 12: the crc covers what comes after it
        raise RecordError("the record is damaged: its checksum does not match")
    offset = _PREFIX.size + header_length
    header = parse_json(data[_PREFIX.size : offset], "its header", dict, error=RecordError)
    features = {}
    try:
        for feature, frames, width in header.pop("features"):
            if frames < 1 or width < 1:  # to NumPy, a negative count is all that is left
                raise RecordError(f"feature {feature!r} has the shape {[frames, width]}")
            values = np.frombuffer(data, "<f2", frames * width, offset)
            # All exponent bits set is infinity or NaN, which `encode` never writes.
            if (values.view("<u2") & 0x7C00 == 0x7C00).any():
                raise RecordError(f"feature {feature!r} holds values that are not finite")
            features[feature] = values.reshape(frames, width)
            offset += values.nbytes
        record = Record(features=features, **_from_json(header))
        _annotations(record)  # refuses what `encode` would not have written
        return record
    except RecordError:
        raise
    # A field that `Annotations` does not have, or shapes that the bytes do not fill.
    except (TypeError, ValueError, KeyError) as error:
        raise RecordError(f"the record was written by another version: {brief(error)}") from None


def write_records(
    directory: str | os.PathLike[str],
    records: Iterable[Record],
    *,
    encoders: dict[str, str],
    records_per_shard: int = 4096,
    split: str | None = None,
    extra: dict[str, Any] | None = None,
) -> Manifest:
    """Writes a record directory and returns its manifest; records are streamed, one at a time.

    `encoders` names the encoder of every feature that occurs, `split` defaults to the directory's
    name, and `extra` is any JSON object. Files appear in `directory` when all are written, the
    manifest last. A write that fails removes what it wrote; one that is killed leaves no manifest
    but a folder `.writing-*`, which may be deleted.

    Raises:
      RecordError: the directory has a manifest, there are no records, two have the same name, a
        feature changes its shape between records or has no encoder, `encode` refuses a record, or
        a shard cannot be written, as when the disk is full.
    """
    directory = Path(directory)
    if records_per_shard < 1:
        raise ValueError(f"records_per_shard must be at least 1, got {records_per_shard}")
    _check_path(directory)
    if (directory / MANIFEST_FILE).exists():
        raise RecordError(f"{directory} already holds records; delete it or write elsewhere")
    # They are needed last; trouble with them must show now, not after hours of extraction.
    _to_json([encoders, extra], "encoders and extra")
    directory.mkdir(parents=True, exist_ok=True)
    # Inside the directory, since that may be a mount point, which a rename cannot cross.
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=directory) as temporary:
        staging = Path(temporary)
        with open(staging / INDEX_FILE, "wb") as index:
            tally = _Tally(encoders, index)
            payloads = (tally.admit(record) for record in records)
            shards = _write_shards(staging, payloads, records_per_shard)
        if not shards:
            raise RecordError(f"{directory}: there are no records to write; check their source")
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            split=directory.absolute().name if split is None else split,
            count=len(tally.names),
            shards=shards,
            features={f: tally.features[f] for f in feature_names() if f in tally.features},
            sources=dict(tally.sources),
            index_sha256=sha256_of(staging / INDEX_FILE),
            extra=extra or {},
        )
        text = json.dumps(dataclasses.asdict(manifest), indent=2, ensure_ascii=False)
        (staging / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")
        for file in [*(shard["file"] for shard in shards), INDEX_FILE, MANIFEST_FILE]:
            os.replace(staging / file, directory / file)
    return manifest


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """Reads the manifest alone; RecordError if missing, malformed or of another version."""
    path = Path(directory) / MANIFEST_FILE
    if not path.is_file():
        why = "this is not a record directory, or its writing was interrupted; write it again"
        raise RecordError(f"{path} is missing: {why}")
    return as_manifest(read_json(path, error=RecordError, advice=_RESTORE), str(path))


class _Versioned(TypedDict):
    format_version: int


def as_manifest(fields: Any, where: str) -> Manifest:
    """A manifest out of parsed JSON; RecordError if malformed or of another version."""
    version = check_type(fields, _Versioned, where, error=RecordError, advice=_RESTORE)
    if (found := version["format_version"]) != FORMAT_VERSION:
        raise RecordError(f"{where}: format version {found} is unknown; {_UPDATE}")
    manifest = check_type(fields, Manifest, where, error=RecordError, advice=_RESTORE)
    for key, value in _impossible(manifest):
        raise RecordError(f"{where}: {key} cannot be {shorten(value)}; {_RESTORE}")
    return manifest


def _impossible(manifest: Manifest) -> Iterator[tuple[str, Any]]:
    """What no manifest says that this code has written: keys and values."""
    for i, shard in enumerate(manifest.shards):
        if not _FILE.fullmatch(shard["file"]):  # it may lead out of the directory
            yield f"shards[{i}].file", shard["file"]
        if shard["count"] < 1:
            yield f"shards[{i}].count", shard["count"]
    if manifest.count != sum(shard["count"] for shard in manifest.shards):
        yield "count", manifest.count
    for name, facts in manifest.features.items():
        if facts["frames"] < 1 or facts["width"] < 1:
            yield f"features.{name}", [facts["frames"], facts["width"]]


class RecordDataset:
    """Random access to the records of a directory, for any number of threads.

    Opening checks cheaply that the directory is whole (the manifest, the size of every shard, the
    lines and the hash of the index) and raises RecordError where it is not; `verify` reads all.
    `index[i]` is an `IndexEntry` that describes record `i` without touching a shard.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self._directory = Path(directory)
        _check_path(self._directory)
        self.manifest = read_manifest(directory)
        known = self.manifest.features
        self._shapes = {f: (known[f]["frames"], known[f]["width"]) for f in known}
        if not self.manifest.count:
            raise RecordError(f"{directory} holds no records; write them again from their source")
        counts = [shard["count"] for shard in self.manifest.shards]
        self._ends = list(itertools.accumulate(counts))
        self._paths = [self._directory / shard["file"] for shard in self.manifest.shards]
        self._check_sizes()
        self.index = read_index(self._directory / INDEX_FILE, self.manifest)
        # With its range given, a shard is opened when it is first read, not here.
        ranges = [f"{path}[0:{count}]" for path, count in zip(self._paths, counts, strict=True)]
        self._source = ArrayRecordDataSource(ranges)

    def __len__(self) -> int:
        return self.manifest.count

    def __getitem__(self, i: int) -> Record:
        """Reads record `i`; negative numbers count from the end.

        Raises RecordError, naming the shard and the record's number in it, where the bytes are
        damaged or are not the record that index and manifest describe; IndexError past the end.
        """
        if not -len(self) <= i < len(self):
            raise IndexError(f"there is no record {i} among {len(self)}")
        i = range(len(self))[i]
        try:
            record = decode(self._source[i])
            found = record.name, {f: array.shape for f, array in record.features.items()}
            expected = self.index[i].name, {f: self._shapes[f] for f in self.index[i].present}
            if found != expected:
                raise RecordError(f"found {found}, index and manifest expect {expected}")
        except (RecordError, RuntimeError) as error:  # the ArrayRecord reader's is a RuntimeError
            shard = bisect.bisect_right(self._ends, i)
            number = i - self._ends[shard] + self.manifest.shards[shard]["count"]
            where = f"{self._paths[shard]}, record {number} ({self.index[i].name!r})"
            advice = _advice(error) or _RESTORE
            raise RecordError(f"{where} cannot be read: {error}; {advice}") from error
        return record

    def ceilings(self, mode: str) -> dict[str, float]:
        """Empty: see `Records.ceilings`."""
        return {}

    def verify(self) -> None:
        """Hashes every file; raises RecordError at the first that differs from the manifest."""
        self._check_sizes()
        read_index(self._directory / INDEX_FILE, self.manifest)
        for path, shard in zip(self._paths, self.manifest.shards, strict=True):
            expect(path, "sha256", sha256_of(path), shard["sha256"])

    def _check_sizes(self) -> None:
        for path, shard in zip(self._paths, self.manifest.shards, strict=True):
            found = path.stat().st_size if path.is_file() else "no such file"
            expect(path, "size in bytes", found, shard["bytes"])


class RecordSubset:
    """Some records of a data set, under the same interface.

    Args:
        dataset: the whole.
        numbers: which of its records, in which order.
    """

    def __init__(self, dataset: "Records", numbers: Sequence[int]):
        self.manifest = dataset.manifest
        self.index = [dataset.index[i] for i in numbers]
        self._dataset, self._numbers = dataset, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, i: int) -> Record:
        return self._dataset[self._numbers[i]]

    def ceilings(self, mode: str) -> dict[str, float]:
        """Those of the whole data set, see `Records.ceilings`."""
        return self._dataset.ceilings(mode)


class MemoryRecords:
    """Records that lie in no directory, under the same interface.

    Args:
        records: as `write_records` takes them.
        like: the manifest of records whose features have the same shapes and encoders.

    Raises:
        RecordError: a record that `write_records` would refuse beside those.
    """

    def __init__(self, records: Sequence[Record], like: Manifest):
        encoders = {name: facts["encoder"] for name, facts in like.features.items()}
        with io.BytesIO() as index:
            tally = _Tally(encoders, index)
            # Shapes are compared with theirs.
            tally.features = {n: {**facts, "present": 0} for n, facts in like.features.items()}
            self._records = [decode(tally.admit(record)) for record in records]
        self.manifest = dataclasses.replace(
            like,
            count=len(records),
            shards=[],
            features=tally.features,
            sources=dict(tally.sources),
            index_sha256="",
            extra={},
        )
        self.index = [
            IndexEntry(
                **{f.name: getattr(record, f.name) for f in dataclasses.fields(Annotations)},
                present=_present(record),
            )
            for record in self._records
        ]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> Record:
        return self._records[i]

    def ceilings(self, mode: str) -> dict[str, float]:
        """Empty: see `Records.ceilings`."""
        return {}


class Records(Protocol):
    """What has the interface of `RecordDataset`: it, parts of it, or another store of records."""

    manifest: Manifest
    index: Sequence[IndexEntry]

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Record: ...

    def ceilings(self, mode: str) -> dict[str, float]:
        """The best possible hit rates, 0 to 1, by input mode: of reference modes, and of `mode`.

        Empty for data sets that do not know them, which is all but generated ones.
        """
        ...


def _name_share(name: str, draw: int) -> float:
    """A number in [0, 1) that depends on the name and on `draw` alone."""
    digest = hashlib.sha256(name.encode("utf-8")).digest()
    return int.from_bytes(digest[8 * draw : 8 * draw + 8], "little") / 2**64


def subsample(dataset: Records, share: float) -> Records:
    """About `share` of the records, 1 for all; a record's name alone decides, as in `hold_out`,
    but independently of it.

    Raises:
      RecordError: nothing is left.
    """
    if share == 1:
        return dataset
    kept = [i for i, e in enumerate(dataset.index) if _name_share(e.name, 1) < share]
    if not kept:
        raise RecordError(f"a share of {share:g} leaves none of {len(dataset)} records; raise it")
    return RecordSubset(dataset, kept)


def hold_out(dataset: Records, share: float) -> tuple[RecordSubset, RecordSubset]:
    """Splits a data set in two, the second with about `share` of the records.

    A record's name alone decides, so it stays on its side when others come or go.

    Raises:
      RecordError: one of the sides would be empty.
    """
    sides: tuple[list[int], list[int]] = ([], [])
    for i, entry in enumerate(dataset.index):
        sides[_name_share(entry.name, 0) < share].append(i)
    if not all(sides):
        raise RecordError(
            f"holding out {share:g} of {len(dataset)} records leaves {len(sides[0])} to train and "
            f"{len(sides[1])} to validate; hold out another share, or name a validation set"
        )
    return RecordSubset(dataset, sides[0]), RecordSubset(dataset, sides[1])


def _present(record: Record) -> tuple[str, ...]:
    return tuple(feature for feature in feature_names() if feature in record.features)


def _annotations(record: Annotations) -> dict[str, Any]:
    """The annotations of a record that are not empty, checked, ready for JSON."""
    where = f"record {record.name!r}"
    fields = {f.name: getattr(record, f.name) for f in dataclasses.fields(Annotations)}
    for field in (*_TEXTS, "preferred"):
        if not isinstance(fields[field], str):
            raise RecordError(f"{where}: {field} must be a string, got {fields[field]!r}")
    if not record.name:
        raise RecordError("a record has an empty name; give each a name of its own")
    for field in ("labels", "candidates", "alternatives"):
        value = fields[field]
        if not isinstance(value, tuple) or not all(isinstance(text, str) for text in value):
            raise RecordError(f"{where}: {field} must be a tuple of strings, got {value!r}")
    if record.valence is not None:
        fields["valence"] = _finite(where, "valence", record.valence, " or None")
    bounds = record.valence_range
    if not isinstance(bounds, tuple) or len(bounds) not in (0, 2):
        raise RecordError(f"{where}: valence_range must be (lowest, highest), got {bounds!r}")
    fields["valence_range"] = bounds = tuple(_finite(where, "valence_range", x) for x in bounds)
    if bounds and not bounds[0] < bounds[1]:
        raise RecordError(f"{where}: valence_range {bounds} is empty; give (lowest, highest)")
    if bounds and record.valence is not None and not bounds[0] <= record.valence <= bounds[1]:
        raise RecordError(f"{where}: valence {record.valence} lies outside its range {bounds}")
    if record.candidates and record.emotion and record.emotion not in record.candidates:
        known = ", ".join(record.candidates)
        raise RecordError(f"{where}: emotion {record.emotion!r} is not a candidate; use {known}")
    if len(record.alternatives) not in (0, 2):
        found = f"got {len(record.alternatives)}"
        raise RecordError(f"{where}: alternatives must be two descriptions or none, {found}")
    if record.preferred and (record.preferred not in PREFERENCES or not record.alternatives):
        raise RecordError(
            f"{where}: preferred is {record.preferred!r}; expected one of {PREFERENCES}, with two "
            "alternatives"
        )
    return {name: value for name, value in fields.items() if value not in ("", (), None)}


def _finite(where: str, field: str, value: Any, otherwise: str = "") -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RecordError(f"{where}: {field} must be a finite number{otherwise}, got {value!r}")
    return float(value)


def _from_json(fields: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `Annotations` out of parsed JSON, which has no tuples."""
    for field in _TUPLES:  # a tuple of a text would be its characters
        if not isinstance(fields.get(field, []), list):
            raise TypeError(f"{field} is not a list")
    return {k: tuple(v) if k in _TUPLES else v for k, v in fields.items()}


def _to_float16(record: Record, feature: str) -> np.ndarray:
    where = f"record {record.name!r}, feature {feature!r}"
    values = np.asarray(record.features[feature])
    if values.ndim != 2 or not values.size or values.dtype.kind not in "fiu":
        found = f"{values.dtype} {list(values.shape)}"
        raise RecordError(f"{where}: expected a non-empty numeric array [T, d], got {found}")
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        found = f"{len(bad)} values are not finite, the first at {bad[0].tolist()}"
        raise RecordError(f"{where}: {found}; extract the clip again or leave the feature out")
    with np.errstate(over="ignore"):
        half = values.astype("<f2")
    if not np.isfinite(half).all():
        found = f"{np.abs(values).max():g} overflows float16, whose largest value is 65504"
        raise RecordError(f"{where}: {found}; check the encoder, or scale its features")
    return half


def _to_json(value: Any, where: str) -> bytes:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8")
    except (ValueError, TypeError) as error:
        raise RecordError(f"{where} cannot be written as UTF-8 JSON: {error}") from error


class _Tally:
    """Admits records one by one and gathers what the manifest says of them together."""

    def __init__(self, encoders: dict[str, str], index: BinaryIO):
        self.encoders, self.index = encoders, index
        self.names: set[str] = set()
        self.features: dict[str, dict[str, Any]] = {}
        self.sources: Counter[str] = Counter()

    def admit(self, record: Record) -> bytes:
        """Checks a record against those before it, adds it to the index, returns its bytes."""
        data = encode(record)
        where = f"record {record.name!r}"
        if record.name in self.names:
            raise RecordError(f"{where} comes twice; names must be unique")
        for feature in _present(record):
            if feature not in self.encoders:
                raise RecordError(f"{where}: encoders has no entry for its feature {feature!r}")
            frames, width = np.shape(record.features[feature])
            new = {"frames": frames, "width": width, "encoder": self.encoders[feature]}
            known = self.features.setdefault(feature, new | {"present": 0})
            expected = [known["frames"], known["width"]]
            if [frames, width] != expected:
                found = f"feature {feature!r} is {[frames, width]}, before it {expected}"
                raise RecordError(f"{where}: {found}; extract all clips with the same settings")
            known["present"] += 1
        self.names.add(record.name)
        self.sources[record.source] += 1
        self.index.write(_to_json(_annotations(record) | {"present": _present(record)}, where))
        self.index.write(b"\n")
        return data


def _write_shards(directory: Path, payloads: Iterator[bytes], per_shard: int) -> list[dict]:
    """Writes the payloads as shards into `directory`; returns the manifest's `shards`."""
    shards = []
    for first in payloads:
        path, count = directory / f"{len(shards)}.partial", 0
        batch = itertools.chain([first], itertools.islice(payloads, per_shard - 1))
        writer = ArrayRecordWriter(str(path), _WRITER_OPTIONS)
        for payload in batch:
            with _write_errors(directory):
                writer.write(payload)
            count += 1
        with _write_errors(directory):
            writer.close()
        facts = {"count": count, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
        shards.append({"file": path.name, **facts})
    for number, shard in enumerate(shards):
        # Only now is the number of shards known, which each name carries.
        file = f"records-{number:05}-of-{len(shards):05}.array_record"
        os.rename(directory / shard["file"], directory / file)
        shard["file"] = file
    return shards


@contextlib.contextmanager
def _write_errors(directory: Path) -> Iterator[None]:
    """The ArrayRecord writer's errors, which are bare RuntimeErrors, as RecordErrors."""
    try:
        yield
    except RuntimeError as error:
        advice = _advice(error) or "is the disk full?"
        raise RecordError(
            f"{directory.parent}: a shard cannot be written ({error}); {advice}"
        ) from error


def _advice(error: Exception) -> str:
    """What to do about an error of the ArrayRecord library, which has only a text."""
    if os.strerror(errno.EMFILE) in str(error):
        return "raise the limit of the shell: ulimit -n 4096"
    if os.strerror(errno.ENOSPC) in str(error):
        return "the disk is full; make room on it"
    return ""


def _check_path(directory: Path) -> None:
    """Refuse a path that the ArrayRecord library cannot open."""
    text = str(directory.absolute())
    if text != one_line(text):
        raise RecordError(
            f"{ascii(text)}: records cannot lie below a folder whose name is not UTF-8 or holds "
            "control characters; rename it"
        )


def read_index(path: Path, manifest: Manifest) -> list[IndexEntry]:
    """Reads an index file; RecordError where it is not the one that the manifest describes."""
    data = read_bytes(path, error=RecordError) if path.is_file() else b""
    lines = data.split(b"\n")[:-1]  # not splitlines(): texts may hold other line separators
    expect(path, "lines", len(lines), manifest.count)
    expect(path, "sha256", hashlib.sha256(data).hexdigest(), manifest.index_sha256)
    entries = []
    for line, fields in json_lines(data, str(path), error=RecordError, advice=_RESTORE):
        try:
            entry = IndexEntry(**_from_json(fields))
            _annotations(entry)
            if unknown := set(entry.present) - manifest.features.keys():
                raise RecordError(f"the manifest has no feature {shorten(min(unknown))}")
        except (RecordError, TypeError, KeyError) as error:
            raise RecordError(
                f"{path}, line {line} was written by another version: {brief(error)}; {_RESTORE}"
            ) from None
        entries.append(entry)
    return entries


def expect(path: Path, quantity: str, found: Any, expected: Any) -> None:
    """Compares a file with its manifest; RecordError, which names the quantity, if they differ."""
    if found != expected:
        what = f"{quantity}: found {found}, the manifest expects {expected}"
        raise RecordError(f"{path}: {what}; {_RESTORE}")
