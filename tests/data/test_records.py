import ast
import copy
import dataclasses
import hashlib
import inspect
import itertools
import json
import os
import random
import re
import resource
import struct
import weakref
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grain
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from affectgpt_jax.data import records as records_module
from affectgpt_jax.data.modalities import feature_names
from affectgpt_jax.data.records import (
    FORMAT_VERSION,
    IndexEntry,
    Manifest,
    Record,
    RecordDataset,
    RecordError,
    decode,
    encode,
    read_manifest,
    write_records,
)

ENCODERS = {"face": "clip-vit-l-14", "audio": "hubert-large"}
WIDTHS = {"face": 12, "audio": 16}
SHARDS = [f"records-0000{i}-of-00003.array_record" for i in range(3)]


def make_record(i: int, **changes) -> Record:
    rng = np.random.default_rng(i)
    features = {f: rng.normal(size=(8, d)).astype(np.float16) for f, d in WIDTHS.items()}
    if i % 3 == 2:
        del features["audio"]
    record = Record(
        name=f"clip{i:03}",
        features=features,
        subtitle="别走! \u2028 second line\n" if i % 2 else "",
        description="She frowns.",
        labels=("worried", "angry")[: i % 3],
        emotion="angry" if i % 2 else "",
        valence=None if i % 4 == 0 else i / 7,
        source="one" if i < 5 else "two",
    )
    return dataclasses.replace(record, **changes)


def assert_same(a: Record, b: Record) -> None:
    for field in dataclasses.fields(Record):
        if field.name != "features":
            assert getattr(a, field.name) == getattr(b, field.name)
    assert set(a.features) == set(b.features)
    for feature, values in a.features.items():
        assert b.features[feature].dtype == np.float16
        assert b.features[feature].shape == values.shape
        assert b.features[feature].tobytes() == values.astype(np.float16).tobytes()


@pytest.fixture
def directory(tmp_path) -> Path:
    """Ten records in three shards."""
    path = tmp_path / "train"
    write(path)
    return path


def write(path: Path, records=None, **kwargs) -> Manifest:
    records = map(make_record, range(10)) if records is None else records
    return write_records(path, records, **{"encoders": ENCODERS, "records_per_shard": 4} | kwargs)


def edit_manifest(directory: Path, edit) -> None:
    path = directory / "manifest.json"
    fields = json.loads(path.read_text())
    edit(fields)
    path.write_text(json.dumps(fields))


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(data)


features_strategy = st.dictionaries(
    st.sampled_from(feature_names()),
    hnp.arrays(
        np.float16,
        st.tuples(st.integers(1, 9), st.integers(1, 40)),
        elements=st.floats(width=16, allow_nan=False, allow_infinity=False),
    ),
)
record_strategy = st.builds(
    Record,
    name=st.text(min_size=1),
    features=features_strategy,
    subtitle=st.text(),
    description=st.text(),
    labels=st.lists(st.text()).map(tuple),
    emotion=st.text(),
    valence=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    source=st.text(),
)


@settings(
    deadline=None,
    max_examples=100,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(record_strategy)
def test_decode_inverts_encode_bit_for_bit(record):
    assert_same(record, decode(encode(record)))


def test_record_bytes_are_as_documented():
    face, audio = np.ones((2, 3), np.float16), np.full((1, 2), -2, np.float16)
    data = encode(
        Record(name="clip", features={"audio": audio, "face": face}, labels=("sad",), valence=-0.5)
    )
    magic, version, crc, length = struct.unpack_from("<4sIII", data)
    assert (magic, version) == (b"AGPT", FORMAT_VERSION)
    assert crc == zlib.crc32(data[12:])
    assert (16 + length) % 16 == 0
    header = json.loads(data[16 : 16 + length].decode("utf-8"))
    assert header["features"] == [["face", 2, 3], ["audio", 1, 2]]
    assert (header["name"], header["labels"], header["valence"]) == ("clip", ["sad"], -0.5)
    assert data[16 + length :] == struct.pack("<8e", *[1] * 6, -2, -2)


def test_decoded_features_are_aligned_views_of_the_bytes():
    data = encode(make_record(0))
    for values in decode(data).features.values():
        assert not values.flags.owndata and not values.flags.writeable and values.flags.aligned
        assert np.shares_memory(values, np.frombuffer(data, np.uint8))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, ">f4"])
def test_other_numeric_types_are_stored_as_float16(dtype):
    values = np.arange(6).reshape(2, 3)[:, ::-1].astype(dtype)
    stored = decode(encode(Record(name="clip", features={"face": values}))).features["face"]
    assert stored.dtype == np.float16
    np.testing.assert_array_equal(stored, values)


def one_wide(values) -> dict:
    return {"features": {"face": np.asarray(values)}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            one_wide([[1.0, np.nan]]),
            r"'clip000', feature 'face': 1 values are not finite.*\[0, 1\]",
        ),
        (one_wide([[np.inf], [0.0]]), r"'clip000', feature 'face': 1 values are not finite"),
        (one_wide([[1.0], [-7e4]]), r"'clip000', feature 'face': 70000 overflows float16"),
        (one_wide([1.0, 2.0]), r"feature 'face': expected .* \[T, d\], got float64 \[2\]"),
        (one_wide(np.zeros((0, 4))), r"feature 'face': expected a non-empty"),
        (one_wide([["a"]]), r"feature 'face': expected a non-empty numeric"),
        ({"features": {"voice": np.ones((1, 1))}}, r"'clip000': features \['voice'\] are unknown"),
        ({"name": ""}, "empty name"),
        ({"name": 3}, "record 3: name must be a string"),
        ({"subtitle": None}, "'clip000': subtitle must be a string, got None"),
        ({"subtitle": "\ud800"}, "'clip000' cannot be written as UTF-8"),
        ({"labels": "sad"}, "'clip000': labels must be a tuple of strings, got 'sad'"),
        ({"labels": ("sad", None)}, "'clip000': labels must be a tuple of strings"),
        ({"valence": float("nan")}, "'clip000': valence must be a finite number or None"),
        ({"valence": "0.5"}, "'clip000': valence must be a finite number or None"),
    ],
)
def test_encode_refuses_what_it_cannot_keep(changes, message):
    with pytest.raises(RecordError, match=message):
        encode(make_record(0, **changes))


def test_decode_finds_every_flipped_byte():
    data = encode(Record(name="clip", features={"face": np.ones((2, 3))}, subtitle="hello"))
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 0x10
        with pytest.raises(RecordError):
            decode(bytes(damaged))


def test_decode_refuses_truncated_foreign_and_newer_bytes():
    data = encode(make_record(0))
    for end in (0, 3, 15, 16, 40, len(data) - 1):
        with pytest.raises(RecordError):
            decode(data[:end])
    with pytest.raises(RecordError, match="not a record"):
        decode(b"PK\x03\x04" + bytes(100))
    with pytest.raises(RecordError, match="format version 2 is unknown; this code reads version 1"):
        decode(data[:4] + struct.pack("<I", 2) + data[8:])


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[]",
        b"[" * 100_000,
        b"\xff",
        b'{"name": "a"}',
        b'{"name": "a", "features": 1}',
        b'{"name": "a", "features": [["face", 1000, 1000]]}',
        b'{"name": "a", "features": [["face", -1, 2]]}',
        b'{"name": "a", "features": [["face", "1", 2]]}',
        b'{"name": "a", "labels": 1, "features": []}',
        b'{"name": "a", "novelty": 1, "features": []}',
        b'{"name": ["a"], "features": []}',
        b'{"name": "a", "subtitle": 1, "features": []}',
        b'{"name": "a", "labels": [1], "features": []}',
        b'{"name": "a", "valence": 1e999, "features": []}',
        b'{"name": "a", "valence_range": [1, 0], "features": []}',
        b'{"name": "a", "features": [[["face"], 1, 2]]}',
    ],
)
def test_decode_refuses_a_header_that_nobody_wrote_though_its_checksum_fits(header):
    checked = struct.pack("<I", len(header)) + header + bytes(64)
    data = struct.pack("<4sII", b"AGPT", 1, zlib.crc32(checked)) + checked
    with pytest.raises(RecordError):
        decode(data)


def test_a_directory_gives_back_its_records_in_order(directory):
    dataset = RecordDataset(directory)
    dataset.verify()
    assert len(dataset) == len(dataset.index) == 10
    for i in range(10):
        expected = make_record(i)
        assert_same(expected, dataset[i])
        fields = {f.name: getattr(expected, f.name) for f in dataclasses.fields(expected)}
        del fields["features"]
        present = ("face",) if i % 3 == 2 else ("face", "audio")
        assert dataset.index[i] == IndexEntry(present=present, **fields)
    assert [record.name for record in dataset] == [entry.name for entry in dataset.index]
    assert dataset[-1].name == dataset[np.int64(9)].name == "clip009"
    for i in (10, -11):
        with pytest.raises(IndexError, match=f"no record {i} among 10"):
            dataset[i]


def test_the_manifest_describes_the_directory(tmp_path):
    manifest = write(tmp_path / "dev", extra={"seed": 1, "note": "é"})
    assert manifest == read_manifest(tmp_path / "dev") == RecordDataset(tmp_path / "dev").manifest
    assert (manifest.format_version, manifest.split, manifest.count) == (FORMAT_VERSION, "dev", 10)
    assert manifest.features == {
        "face": {"frames": 8, "width": 12, "encoder": "clip-vit-l-14", "present": 10},
        "audio": {"frames": 8, "width": 16, "encoder": "hubert-large", "present": 7},
    }
    assert manifest.sources == {"one": 5, "two": 5}
    assert manifest.extra == {"seed": 1, "note": "é"}
    assert [(shard["file"], shard["count"]) for shard in manifest.shards] == [
        *zip(SHARDS, (4, 4, 2), strict=True)
    ]
    for shard in manifest.shards:
        data = (tmp_path / "dev" / shard["file"]).read_bytes()
        assert shard["bytes"] == len(data)
        assert shard["sha256"] == hashlib.sha256(data).hexdigest()
    files = {path.name for path in (tmp_path / "dev").iterdir()}
    assert files == {*SHARDS, "index.jsonl", "manifest.json"}


def test_the_same_records_give_the_same_bytes(tmp_path):
    for path in ("a/train", "b/train"):
        write(tmp_path / path)
    write(tmp_path / "c", split="train")
    for file in (tmp_path / "a/train").iterdir():
        data = file.read_bytes()
        assert data == (tmp_path / "b/train" / file.name).read_bytes()
        assert data == (tmp_path / "c" / file.name).read_bytes()


def test_records_are_streamed(tmp_path):
    alive = weakref.WeakSet()

    def records():
        for i in range(50):
            record = make_record(i)
            alive.add(record)
            assert len(alive) <= 3
            yield record

    write(tmp_path / "train", records(), records_per_shard=20)


def test_no_pickle():
    tree = ast.parse(inspect.getsource(records_module))
    names = [alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not {name.split(".")[0] for name in names} & {"pickle", "cloudpickle", "dill", "marshal"}
    assert not any(
        isinstance(node, ast.Attribute) and node.attr in ("load", "save") for node in ast.walk(tree)
    )


def test_writing_refuses_duplicate_names(tmp_path):
    twice = [make_record(0), make_record(1), make_record(0)]
    with pytest.raises(RecordError, match="record 'clip000' comes twice"):
        write(tmp_path / "train", twice)


@pytest.mark.parametrize("shape", [(8, 13), (7, 12)])
def test_writing_refuses_a_change_of_shape(tmp_path, shape):
    odd = Record(name="odd", features={"face": np.zeros(shape)})
    expected = rf"'odd': feature 'face' is {re.escape(str(list(shape)))}, before it \[8, 12\]"
    with pytest.raises(RecordError, match=expected):
        write(tmp_path / "train", [make_record(0), odd])


def test_writing_refuses_bad_input_and_leaves_nothing_behind(tmp_path):
    nan = make_record(9, features={"face": np.full((8, 12), np.nan)})
    cases = [
        ([], {}, "no records to write"),
        ([make_record(0), nan], {}, "'clip009', feature 'face': 96 values are not finite"),
        (None, {"encoders": {"face": "clip"}}, "'clip000': encoders has no entry .* 'audio'"),
        (None, {"extra": {"array": np.ones(2)}}, "encoders and extra cannot be written as .* JSON"),
        (None, {"extra": {"rate": float("nan")}}, "encoders and extra cannot be written"),
    ]
    for number, (records, kwargs, message) in enumerate(cases):
        path = tmp_path / str(number)
        with pytest.raises(RecordError, match=message):
            write(path, records, **kwargs)
        assert not path.exists() or not list(path.iterdir())
    with pytest.raises(ValueError, match="records_per_shard must be at least 1, got 0"):
        write(tmp_path / "train", records_per_shard=0)


@pytest.mark.parametrize("trouble", [OSError("camera gone"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_no_manifest_and_can_be_repeated(tmp_path, trouble):
    def interrupted():
        yield from map(make_record, range(6))
        raise trouble

    with pytest.raises(type(trouble)):
        write(tmp_path / "train", interrupted())
    with pytest.raises(RecordError, match="manifest.json is missing.*write it again"):
        RecordDataset(tmp_path / "train")
    write(tmp_path / "train")
    RecordDataset(tmp_path / "train").verify()


def test_the_manifest_comes_last(tmp_path, monkeypatch):
    real = records_module.os.replace
    for survivors in range(5):  # three shards, the index, the manifest
        path = tmp_path / str(survivors)
        calls = itertools.count()

        def dies(source, target, calls=calls, survivors=survivors):
            if next(calls) == survivors:
                raise OSError("power cut")
            real(source, target)

        monkeypatch.setattr(records_module.os, "replace", dies)
        with pytest.raises(OSError, match="power cut"):
            write(path)
        assert not (path / "manifest.json").exists()
        monkeypatch.setattr(records_module.os, "replace", real)
        write(path)
        RecordDataset(path).verify()


def test_a_complete_directory_is_not_overwritten(directory):
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    with pytest.raises(RecordError, match="train already holds records; delete it or"):
        write(directory, [make_record(0)])
    assert before == {path.name: path.read_bytes() for path in directory.iterdir()}


def test_disk_trouble_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(
        records_module,
        "ArrayRecordWriter",
        lambda path, options, real=records_module.ArrayRecordWriter: real("/dev/full", options),
    )
    with pytest.raises(RecordError, match="a shard cannot be written .*No space left on device"):
        write(tmp_path / "train")
    assert not list((tmp_path / "train").iterdir())


def test_opening_needs_a_manifest(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(RecordError, match="manifest.json is missing"):
            RecordDataset(path)


def test_opening_refuses_other_versions_and_malformed_manifests(directory):
    edit_manifest(directory, lambda fields: fields.update(format_version=99, novelty=True))
    with pytest.raises(RecordError, match=r"manifest.json: format version 99 .* reads version 1"):
        RecordDataset(directory)
    edit_manifest(directory, lambda fields: fields.update(format_version=1))
    with pytest.raises(RecordError, match=r"manifest.json: the key 'novelty' is unknown"):
        RecordDataset(directory)
    edit_manifest(directory, lambda fields: fields.pop("novelty"))
    edit_manifest(directory, lambda fields: fields["shards"][0].update(count="3"))
    with pytest.raises(RecordError, match=r"manifest.json: shards\[0\].count: expected a whole"):
        RecordDataset(directory)
    for text in ("", "[]", "{}", '{"format_version": 1', "[" * 100_000):
        (directory / "manifest.json").write_text(text)
        with pytest.raises(RecordError, match="manifest.json: .*; restore the directory"):
            RecordDataset(directory)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda m: m.update(count=10**30), "count: expected a whole number of at most 64 bits"),
        (lambda m: m.update(count=11), "count cannot be 11"),
        (lambda m: m["shards"][0].update(count=0), "shards[0].count cannot be 0"),
        (lambda m: m["shards"][0].update(count=-1), "shards[0].count cannot be -1"),
        (lambda m: m["shards"][1].update(file="../a"), "shards[1].file cannot be '../a'"),
        (lambda m: m["shards"][1].update(file="/etc/passwd"), "cannot be '/etc/passwd'"),
        (lambda m: m["features"]["face"].update(width=0), "features.face cannot be [8, 0]"),
        (lambda m: m["features"].update(face=[]), "features.face: expected a JSON object"),
    ],
)
def test_a_manifest_with_impossible_values_is_refused_by_file_and_key(directory, change, key):
    edit_manifest(directory, change)
    with pytest.raises(RecordError) as error:
        RecordDataset(directory)
    assert f"manifest.json: {key}" in str(error.value) or key in str(error.value)
    assert str(error.value).endswith("write it again")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"present": ["voice"]}, "the manifest has no feature 'voice'"),
        ({"present": [["face"]]}, "unhashable"),
        ({"present": 1}, "present is not a list"),
        ({"present": "face"}, "present is not a list"),
        ({"subtitle": 1}, "subtitle must be a string"),
        ({"labels": "sad"}, "labels is not a list"),
        ({"labels": [1]}, "labels must be a tuple of strings"),
        ({"novelty": 1}, "novelty"),
    ],
)
def test_an_index_of_other_types_is_refused_by_line_though_its_hash_fits(
    directory, change, message
):
    path = directory / "index.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")
    lines[2] = json.dumps(json.loads(lines[2]) | change)
    path.write_text("\n".join(lines), encoding="utf-8")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    edit_manifest(directory, lambda fields: fields.update(index_sha256=digest))
    with pytest.raises(RecordError, match=rf"index.jsonl, line 3 was written by .*({message})"):
        RecordDataset(directory)


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2J", os.fsdecode(b"a\xff")])
def test_a_path_that_the_library_cannot_open_is_refused_at_once(name, tmp_path):
    with pytest.raises(RecordError, match="whose name is not UTF-8 or holds control characters"):
        write(tmp_path / name, [make_record(0)])
    (tmp_path / name).mkdir()
    with pytest.raises(RecordError, match="whose name is not UTF-8 or holds control characters"):
        RecordDataset(tmp_path / name)


@pytest.mark.parametrize("name", ["a[0:5]", "a?b*", "a\\b", "a%20b", "a\u3000b", "@8"])
def test_a_path_may_hold_any_other_character(name, tmp_path):
    directory = tmp_path / name
    write(directory, [make_record(0)])
    assert_same(make_record(0), RecordDataset(directory)[0])


def test_too_few_file_handles_are_named_as_the_reason(directory):
    dataset = RecordDataset(directory)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(RecordError, match="Too many open files.*ulimit -n"):
            dataset[0]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    # The library keeps a reader that could not open its file.
    assert_same(make_record(0), RecordDataset(directory)[0])


def test_opening_finds_a_missing_shard(directory):
    (directory / SHARDS[1]).unlink()
    with pytest.raises(RecordError, match=rf"{SHARDS[1]}: size in bytes: found no such file"):
        RecordDataset(directory)


def test_opening_finds_a_truncated_shard(directory):
    path = directory / SHARDS[2]
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RecordError, match=rf"{SHARDS[2]}.*found {size - 1}, .* expects {size}"):
        RecordDataset(directory)


def test_opening_finds_an_edited_index(directory):
    path = directory / "index.jsonl"
    original = path.read_text(encoding="utf-8")
    path.write_text(original.replace("frowns", "smiles"), encoding="utf-8")
    with pytest.raises(RecordError, match="index.jsonl: sha256: found .*, the manifest expects"):
        RecordDataset(directory)
    path.write_text(original[: original.rindex('{"name"')], encoding="utf-8")
    with pytest.raises(RecordError, match="index.jsonl: lines: found 9, the manifest expects 10"):
        RecordDataset(directory)
    path.unlink()
    with pytest.raises(RecordError, match="index.jsonl: lines: found 0"):
        RecordDataset(directory)


def test_a_flipped_byte_is_found_by_reading_or_by_verify(directory):
    path = directory / SHARDS[1]
    original = path.read_bytes()
    start = original.index(b"AGPT")
    positions = [start, start + 30, start + 400, original.rindex(b"AGPT") + 20]
    for position in [*positions, *random.Random(0).sample(range(len(original)), 4)]:
        path.write_bytes(original)
        dataset = RecordDataset(directory)
        flip(path, position)
        with pytest.raises(RecordError, match=rf"{SHARDS[1]}: sha256: found"):
            dataset.verify()
        broken = []
        for i in range(10):
            try:
                assert_same(make_record(i), dataset[i])
            except RecordError as error:
                number = i - 4
                pattern = (
                    rf"{SHARDS[1]}, record {number} \('clip00{i}'\) cannot be read: .*; restore"
                )
                assert re.search(pattern, str(error))
                broken.append(i)
        if position in positions:
            assert broken == [7 if position == positions[-1] else 4]


def test_a_broken_shard_footer_is_an_error_of_its_records(directory):
    path = directory / SHARDS[0]
    dataset = RecordDataset(directory)
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(RecordError, match=rf"{SHARDS[0]}, record 2 \('clip002'\) cannot be read"):
        dataset[2]
    assert_same(make_record(5), dataset[5])


@pytest.mark.parametrize(
    ("feature", "change", "message"),
    [
        ("audio", {"width": 1024}, r"'audio': \(8, 16\).* expect .*'audio': \(8, 1024\)"),
        ("face", {"frames": 4}, r"'face': \(8, 12\).* expect .*'face': \(4, 12\)"),
    ],
)
def test_reading_finds_a_record_unlike_the_manifest(directory, feature, change, message):
    edit_manifest(directory, lambda fields: fields["features"][feature].update(change))
    with pytest.raises(RecordError, match=rf"{SHARDS[1]}, record 2 \('clip006'\).*{message}"):
        RecordDataset(directory)[6]


def test_reading_finds_a_shard_of_another_directory(directory, tmp_path):
    write(tmp_path / "other", [make_record(i, name=f"film{i:03}") for i in range(10)])
    dataset = RecordDataset(directory)
    (directory / SHARDS[0]).write_bytes((tmp_path / "other" / SHARDS[0]).read_bytes())
    with pytest.raises(RecordError, match="found .'film000'.* expect .'clip000'"):
        dataset[0]


def test_threads_read_the_right_records(directory):
    dataset = RecordDataset(directory)
    expected = [encode(make_record(i)) for i in range(10)]
    order = random.Random(0).choices(range(10), k=4000)
    with ThreadPoolExecutor(8) as pool:
        for i, record in zip(order, pool.map(dataset.__getitem__, order), strict=True):
            assert encode(record) == expected[i]


def test_grain_reads_it_in_threads_and_copies(directory):
    dataset = RecordDataset(directory)
    assert copy.deepcopy(dataset)[3].name == "clip003"  # as when it goes to a worker process
    names = grain.MapDataset.source(dataset).shuffle(seed=1).map(lambda record: record.name)
    options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
    assert sorted(names.to_iter_dataset(options)) == [f"clip{i:03}" for i in range(10)]
