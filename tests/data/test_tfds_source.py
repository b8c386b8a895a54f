import copy
import dataclasses
import json
import random
import shutil
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core import file_adapters
from trees import assert_same_tree

import affectgpt_jax
from affectgpt_jax.data import demo, tfds_source
from affectgpt_jax.data.modalities import INPUT_MODES
from affectgpt_jax.data.pipeline import (
    MixtureComponent,
    PromptProcessor,
    TrainPipeline,
    sequential_batches,
)
from affectgpt_jax.data.prompts import load_prompts
from affectgpt_jax.data.records import (
    Record,
    RecordDataset,
    RecordError,
    encode,
    hold_out,
    write_records,
)
from affectgpt_jax.data.tfds_source import TfdsDataset, open_source, write_tfds
from affectgpt_jax.data.tokenizer import Tokenizer
from data_prep import to_tfds

TINY_BASE = Path(affectgpt_jax.__file__).parent / "assets" / "tiny_base"
WIDTHS = {"face": 12, "audio": 16}
SIZES = {"train": 10, "val": 3, "test": 5}
# Strings whose ends, line breaks or bytes a careless store would lose.
TEXTS = ("", "别走! \u2028 second line\n", "nul\0", "\0", " ", "🙂é", '"[quoted]", {braces}')


def make_record(i: int, split: str) -> Record:
    rng = np.random.default_rng(i)
    features = {f: rng.normal(size=(8, d)).astype(np.float16) for f, d in WIDTHS.items()}
    for feature in ((), ("audio",), ("face", "audio"))[i % 3]:
        del features[feature]
    return Record(
        name=f"{split}/clip {i} 名",
        features=features,
        subtitle=TEXTS[i % len(TEXTS)],
        description=TEXTS[(i + 1) % len(TEXTS)],
        labels=TEXTS[: i % len(TEXTS)],
        emotion="angry" if i % 2 else "",
        candidates=("angry", "calm", "") if i % 2 else (),
        valence=(None, -0.0, 1 / 3, 1e-300)[i % 4],
        valence_range=() if i % 3 else (-1 / 3, 0.7),
        caption=TEXTS[(i + 2) % len(TEXTS)],
        question=TEXTS[(i + 3) % len(TEXTS)],
        answer=TEXTS[(i + 4) % len(TEXTS)],
        alternatives=("She smiles, 'so'.", "") if i % 4 == 1 else (),
        preferred="same" if i % 4 == 1 else "",
        source="one" if i < 5 else "two",
    )


def write(path: Path, records, **changes):
    encoders = {"face": "clip-vit-l-14", "audio": "hubert-large"}
    return write_records(path, records, **{"encoders": encoders, "extra": {"seed": 1}} | changes)


@pytest.fixture(scope="module", autouse=True)
def _no_tensorflow():
    """TFDS loads it where it thinks it needs it."""
    yield
    assert "tensorflow" not in sys.modules


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Record directories by split, and the TFDS data set of them, in shards of four."""
    folder = tmp_path_factory.mktemp("tfds")
    splits = {split: folder / split for split in SIZES}
    for split, size in SIZES.items():
        write(splits[split], (make_record(i, split) for i in range(size)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tfds_source, "RECORDS_PER_SHARD", 4)
        return splits, write_tfds(folder / "out", splits)


@pytest.fixture
def damaged(written, tmp_path) -> Path:
    """A copy of the data set, to break."""
    return Path(shutil.copytree(written[1], tmp_path / "copy"))


def edit(path: Path, change) -> None:
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


# --- the same as the record directory -----------------------------------------------------------


def test_every_split_gives_back_its_records_bit_for_bit_in_order(written):
    splits, directory = written
    for split, path in splits.items():
        ours, theirs = RecordDataset(path), TfdsDataset(directory, split)
        theirs.verify()
        assert len(theirs) == len(ours) == SIZES[split]
        assert theirs.index == ours.index
        for i in range(len(ours)):
            assert encode(theirs[i]) == encode(ours[i]), ours[i].name
            for values in theirs[i].features.values():
                assert values.dtype == np.float16 and not values.flags.writeable
        assert theirs[-1].name == theirs[np.int64(len(ours) - 1)].name == ours[-1].name
        for i in (len(ours), -len(ours) - 1):
            with pytest.raises(IndexError, match=f"no record {i} among {len(ours)}"):
                theirs[i]


def test_the_manifest_is_that_of_the_record_directory_but_for_the_shards(written):
    splits, directory = written
    for split, path in splits.items():
        ours, theirs = RecordDataset(path).manifest, TfdsDataset(directory, split).manifest
        assert dataclasses.replace(theirs, shards=[]) == dataclasses.replace(ours, shards=[])
        assert list(theirs.features) == list(ours.features)
        assert sum(shard["count"] for shard in theirs.shards) == SIZES[split]
        assert all(shard["count"] <= 4 for shard in theirs.shards)


@pytest.fixture(scope="module")
def demo_world(tmp_path_factory):
    """The demo's clips as records and through TFDS, and a processor of them."""
    folder = tmp_path_factory.mktemp("demo")
    encoders = dict.fromkeys(demo.DEFAULT_FEATURES, "demo")
    write_records(folder / "train", demo.World(0).records("train", 48), encoders=encoders)
    write_tfds(folder / "out", {"train": folder / "train"})
    mode = INPUT_MODES["multi_audio_face_text"]
    counts = dict.fromkeys(("multi", "audio", "face"), 1)
    features = {name: demo.SHAPES[name][1] for name in demo.DEFAULT_FEATURES}
    processor = PromptProcessor(
        Tokenizer(TINY_BASE), load_prompts("compact"), mode, counts, features
    )
    return (
        RecordDataset(folder / "train"),
        open_source(f"tfds:{folder / 'out'}:train", "?"),
        processor,
    )


def test_training_batches_are_those_of_the_record_directory(demo_world):
    ours, theirs, processor = demo_world
    assert {len(entry.present) for entry in ours.index} == {1, 2}  # some lack a modality
    pipelines = [
        TrainPipeline(
            [MixtureComponent(dataset, processor, "description+ovlabel+valence")],
            batch_size=8,
            max_tokens=128,
        )
        for dataset in (ours, theirs)
    ]
    batches = [list(pipeline.batches(0, 13)) for pipeline in pipelines]  # over two epochs
    assert len(batches[0]) == 13
    for a, b in zip(*batches, strict=True):
        assert_same_tree(a, b)


def test_evaluation_batches_are_those_of_the_record_directory(demo_world):
    ours, theirs, processor = demo_world
    found = [
        list(
            sequential_batches(
                data, processor, processor.prompt_examples(data, "ovlabel"), batch_size=8
            )
        )
        for data in (ours, theirs)
    ]
    assert sum(len(numbers) for numbers, _ in found[0]) == 48
    for (a_numbers, a), (b_numbers, b) in zip(*found, strict=True):
        np.testing.assert_array_equal(a_numbers, b_numbers)
        assert_same_tree(a, b)


def test_the_same_records_are_held_out(written):
    splits, directory = written
    sides = [hold_out(d, 0.4) for d in (RecordDataset(splits["train"]), TfdsDataset(directory))]
    for ours, theirs in zip(*sides, strict=True):
        assert [record.name for record in ours] == [record.name for record in theirs]


# --- what TFDS makes of it ----------------------------------------------------------------------


def test_tfds_alone_reads_it(written):
    splits, directory = written
    builder = tfds.builder_from_directory(directory)
    assert list(builder.info.splits) == list(SIZES)
    assert builder.info.features["features"]["audio"].shape == (None, 16)
    source, ours = builder.as_data_source("train"), RecordDataset(splits["train"])
    assert len(source) == 10
    for example, record in zip(source, ours, strict=True):
        assert example["name"].decode() == record.name
        assert [label.decode() for label in example["labels"]] == list(record.labels)
        for feature, width in WIDTHS.items():
            expected = record.features.get(feature, np.zeros((0, width)))
            np.testing.assert_array_equal(example["features"][feature], expected)


def test_every_field_of_a_record_has_a_column(written):
    _, directory = written
    schema = tfds.builder_from_directory(directory).info.features
    assert set(schema) == {field.name for field in dataclasses.fields(Record)}


@pytest.mark.parametrize(
    ("hint", "values"),
    [
        (str, TEXTS),
        (tuple[str, ...], [(), ("",), TEXTS]),
        (float | None, [None, 0.1, -0.0, 1e-320, 2.0**53 + 2]),
        (tuple[float, ...], [(), (-1.0, 1.0), (0.1, 0.2)]),
    ],
)
def test_a_column_keeps_its_values_exactly(hint, values):
    column = tfds_source._COLUMNS[hint]
    features = tfds.features.FeaturesDict({"x": column.feature()})
    for value in values:
        data = features.serialize_example({"x": column.encode(value)})
        found = column.decode(features.deserialize_example_np(data)["x"])
        assert repr(found) == repr(value)  # tells -0.0 from 0.0


def test_a_data_set_of_texts_alone_needs_no_features(tmp_path):
    write(tmp_path / "train", [Record(name="a", features={}, subtitle="hello")])
    record = TfdsDataset(write_tfds(tmp_path / "out", {"train": tmp_path / "train"}))[0]
    assert (record.name, record.subtitle, record.features) == ("a", "hello", {})


def test_a_feature_may_be_missing_from_a_whole_split(tmp_path):
    for split, feature in (("train", "face"), ("test", "audio")):
        values = np.ones((2, WIDTHS[feature]))
        write(tmp_path / split, [Record(name=split, features={feature: values})])
    directory = write_tfds(tmp_path / "out", {s: tmp_path / s for s in ("train", "test")})
    for split, feature in (("train", "face"), ("test", "audio")):
        dataset = TfdsDataset(directory, split)
        assert list(dataset.manifest.features) == list(dataset[0].features) == [feature]


def test_the_same_records_give_the_same_bytes(written, tmp_path):
    splits, directory = written
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tfds_source, "RECORDS_PER_SHARD", 4)
        again = write_tfds(tmp_path, splits)
    files = sorted(path.name for path in directory.iterdir())
    assert files == sorted(path.name for path in again.iterdir())
    for file in files:
        assert (directory / file).read_bytes() == (again / file).read_bytes(), file
    assert [path.name for path in tmp_path.iterdir()] == ["affect_records"]


def test_a_field_that_a_data_set_lacks_is_empty_and_one_that_is_unknown_is_refused(
    written, tmp_path, monkeypatch
):
    splits, directory = written
    older = {n: column for n, column in tfds_source._FIELDS.items() if n != "subtitle"}
    monkeypatch.setattr(tfds_source, "_FIELDS", older)
    old = write_tfds(tmp_path, {"train": splits["train"]})
    with pytest.raises(RecordError, match="'subtitle' that is unknown here; it was written by ano"):
        TfdsDataset(directory)[0]
    monkeypatch.undo()
    assert [record.subtitle for record in TfdsDataset(old)] == [""] * 10


# --- split arithmetic ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train[:80%]", [("train", range(8))]),
        ("train[80%:]", [("train", range(8, 10))]),
        ("train[3:9]", [("train", range(3, 9))]),
        ("train[-2:]", [("train", range(8, 10))]),
        ("train[1shard:]", [("train", range(4, 10))]),
        ("test+val", [("test", range(5)), ("val", range(3))]),
        ("train[6:] + val[:1]", [("train", range(6, 10)), ("val", range(1))]),
        ("all", [("train", range(10)), ("val", range(3)), ("test", range(5))]),
    ],
)
def test_split_arithmetic_is_that_of_tfds(split, expected, written):
    splits, directory = written
    dataset = open_source(f"tfds:{directory}:{split}", "val")
    records = [RecordDataset(splits[name])[i] for name, numbers in expected for i in numbers]
    assert [encode(record) for record in dataset] == [encode(record) for record in records]
    assert [entry.name for entry in dataset.index] == [record.name for record in records]
    manifest = dataset.manifest
    assert (manifest.split, manifest.count) == (split, len(records))
    for feature, facts in manifest.features.items():
        assert facts["present"] == sum(feature in record.features for record in records)
    assert sum(manifest.sources.values()) == len(records)
    dataset.verify()


def test_a_source_names_a_directory_and_maybe_a_split(written, monkeypatch):
    splits, directory = written
    out = directory.parent.parent
    assert len(open_source(f"tfds:{directory}", "test")) == SIZES["test"]
    assert len(open_source(f"tfds:{out}", "val")) == SIZES["val"]
    monkeypatch.setenv("HOME", str(out.parent))
    assert len(open_source("tfds:~/out:val[1:]", "train")) == 2
    monkeypatch.chdir(out.parent)
    assert len(open_source("tfds:out:val", "train")) == 3
    colon = out.parent / "a:b"
    colon.symlink_to(out)
    assert len(open_source(f"tfds:{colon}:test[:1]", "train")) == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("tfds:", "'tfds:' names no data set; expected tfds:DIR or tfds:DIR:SPLIT"),
        ("tfds:/nowhere:train", "/nowhere is not a directory; a TFDS source is tfds:DIR"),
        ("tfds:{out}:train[:80%", r"train\[:80% is not a directory; a TFDS source is tfds:DIR"),
        (
            "tfds:{train}",
            "train holds no TFDS data set: neither .* write one with affectgpt to-tfds",
        ),
        ("tfds:{out}:dev", r"split 'dev' cannot be read: .*Unknown split 'dev'.*val \(3 clips\)"),
        ("tfds:{out}:train[a:b]", r"split 'train\[a:b\]' cannot be read: .*train \(10 clips\)"),
        ("tfds:{out}:train[:200%]", r"cannot be read: .*percent slice boundaries"),
        ("tfds:{out}:train[20:]", r"cannot be read: .*incompatible with 10 examples"),
        ("tfds:{out}:train[:0]", r"split 'train\[:0\]' holds no records"),
        ("tfds:{out}:train[50%:10%]", "holds no records; name a larger part"),
        ("tfds:{out}:val+train[3:1]", "holds no records; name a larger part"),
        (
            "tfds:{out}:train+train[:2]",
            "holds 2 records more than once, the first is 'train/c",
        ),
    ],
)
def test_a_source_that_cannot_be_opened_is_one_sentence(source, message, written):
    splits, directory = written
    with pytest.raises(RecordError, match=message) as error:
        open_source(source.format(out=directory, train=splits["train"]), "train")
    assert "\n" not in str(error.value)


def test_splits_of_other_frames_open_apart_but_not_together(tmp_path):
    for split, frames in (("train", 8), ("test", 4)):
        values = np.ones((frames, 12))
        write(tmp_path / split, [Record(name=split, features={"face": values})])
    directory = write_tfds(tmp_path / "out", {s: tmp_path / s for s in ("train", "test")})
    assert TfdsDataset(directory, "test")[0].features["face"].shape == (4, 12)
    with pytest.raises(RecordError, match=r"'face' is \[8, 12\] in one of them, \[4, 12\] in ano"):
        TfdsDataset(directory, "train+test")


# --- writing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["all", "a b", "", "train[:3]"])
def test_a_split_that_tfds_could_not_name_is_refused(split, written, tmp_path):
    with pytest.raises(RecordError, match="a TFDS split cannot be called"):
        write_tfds(tmp_path, {split: written[0]["train"]})


def test_what_cannot_be_written_is_one_sentence_and_leaves_nothing_to_open(written, tmp_path):
    splits, directory = written
    for split, width, encoder in (("wide", 13, "clip-vit-l-14"), ("other", 12, "dinov2")):
        record = Record(name=split, features={"face": np.ones((8, width))})
        write(tmp_path / split, [record], encoders={"face": encoder})
    broken = Path(shutil.copytree(splits["train"], tmp_path / "broken"))
    shard = next(broken.glob("*.array_record"))
    data = bytearray(shard.read_bytes())
    data[data.index(b"AGPT") + 30] ^= 0xFF
    shard.write_bytes(data)
    cases = [
        ({}, "there are no splits to write"),
        ({"train": tmp_path / "nowhere"}, "nowhere/manifest.json is missing"),
        (
            {"train": splits["train"], "test": tmp_path / "wide"},
            "'face' is 13 wide.* split 'test'",
        ),
        ({"train": splits["train"], "test": tmp_path / "other"}, "of encoder 'dinov2', in split"),
        ({"val": splits["val"], "train": broken}, "array_record, record 0 .* cannot be read"),
    ]
    for sources, message in cases:
        with pytest.raises(RecordError, match=message) as error:
            write_tfds(tmp_path / "out", sources)
        assert "\n" not in str(error.value)
        with pytest.raises(RecordError):
            TfdsDataset(tmp_path / "out")
    write_tfds(tmp_path / "out", {"train": splits["train"]})
    with pytest.raises(RecordError, match="1.0.0 exists already; name another place, or remove it"):
        write_tfds(tmp_path / "out", {"val": splits["val"]})
    assert len(TfdsDataset(tmp_path / "out")) == 10


def test_a_disk_that_cannot_be_written_is_reported_and_leaves_nothing(
    written, tmp_path, monkeypatch
):
    splits, _ = written
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match="file/out/.* cannot be written: .*Not a directory"):
        write_tfds(tmp_path / "file" / "out", splits)
    full = types.SimpleNamespace(
        ArrayRecordWriter=lambda path, options: ArrayRecordWriter("/dev/full", options)
    )
    monkeypatch.setattr(file_adapters, "array_record_module", full)
    with pytest.raises(RecordError, match="out cannot be written: .*No space left on device"):
        write_tfds(tmp_path / "out", splits)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_what_a_killed_process_leaves_is_hidden(written, tmp_path, monkeypatch):
    splits, _ = written
    out, write_all, found = tmp_path / "out", tfds_source.AffectRecords._download_and_prepare, []

    def look(self, *given, **more):
        write_all(self, *given, **more)
        found.extend(p.relative_to(out).parts for p in out.rglob("*") if p.is_file())

    monkeypatch.setattr(tfds_source.AffectRecords, "_download_and_prepare", look)
    write_tfds(out, splits)
    assert found and all(any(part.startswith(".") for part in parts) for parts in found)
    assert [path.name for path in (out / "affect_records").iterdir()] == ["1.0.0"]


# --- damage -------------------------------------------------------------------------------------


def test_opening_finds_what_is_missing_or_cut(damaged):
    shard = next(damaged.glob("*-train.array_record-00001-*"))
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(RecordError, match=f"{shard.name}: size in bytes: found {len(data) - 1}, "):
        TfdsDataset(damaged)
    assert len(TfdsDataset(damaged, "val")) == 3  # the other splits are whole
    shard.unlink()
    with pytest.raises(RecordError, match=f"{shard.name}: size in bytes: found no such file"):
        TfdsDataset(damaged)
    shard.write_bytes(data)
    index = damaged / "index-train.jsonl"
    text = index.read_text(encoding="utf-8")
    index.write_text(text.replace("angry", "happy"), encoding="utf-8")
    with pytest.raises(RecordError, match="index-train.jsonl: sha256: found"):
        TfdsDataset(damaged)
    index.unlink()
    with pytest.raises(RecordError, match="index-train.jsonl: lines: found 0, the manifest expect"):
        TfdsDataset(damaged)


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json", "metadata.json"])
@pytest.mark.parametrize("text", ["", "[]", "{", '{"splits": 3}'])
def test_opening_finds_damaged_metadata(file, text, damaged):
    (damaged / file).write_text(text)
    with pytest.raises(RecordError, match=f"{damaged}.*; restore the data set from") as error:
        TfdsDataset(damaged)
    assert "\n" not in str(error.value)


def test_opening_refuses_other_versions_and_metadata_that_disagree(damaged):
    path = damaged / "metadata.json"
    edit(path, lambda fields: fields["splits"]["val"].update(format_version=99))
    with pytest.raises(RecordError, match=r"metadata.json: format versions \[1, 99\]: it was writ"):
        TfdsDataset(damaged)
    edit(path, lambda fields: fields["splits"]["val"].update(format_version=1))
    edit(damaged / "dataset_info.json", lambda info: info["splits"][0].update(shardLengths=["9"]))
    with pytest.raises(RecordError, match="dataset_info.json and metadata.json disagree on affect"):
        TfdsDataset(damaged)
    path.unlink()
    with pytest.raises(RecordError, match="metadata.json cannot be read: No such file"):
        TfdsDataset(damaged)


def test_the_data_set_of_somebody_else_is_refused_by_name(tmp_path):
    class SomebodyElses(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        name = "somebody_elses"
        url_infos = None

        def _info(self):
            features = tfds.features.FeaturesDict({"name": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield 0, {"name": "a"}

    builder = SomebodyElses(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    with pytest.raises(RecordError, match="holds the TFDS data set 'somebody_elses', not one that"):
        TfdsDataset(builder.data_dir)


def test_a_flipped_byte_is_never_read_as_another_record(written, damaged):
    """ArrayRecord hashes its chunks, and index and metadata say what to expect."""
    splits, _ = written
    expected = [encode(record) for record in RecordDataset(splits["train"])]
    path = next(damaged.glob("*-train.array_record-00000-*"))
    original = path.read_bytes()
    found = 0
    for position in random.Random(0).sample(range(len(original)), 60):
        data = bytearray(original)
        data[position] ^= 0xFF
        path.write_bytes(data)
        dataset = TfdsDataset(damaged)
        with pytest.raises(RecordError, match=f"{path.name}: sha256: found"):
            dataset.verify()
        for i in range(10):
            try:
                assert encode(dataset[i]) == expected[i]
            except RecordError as error:
                assert f"{path.name}, record {i} (" in str(error)
                assert "; restore the data set from its source" in str(error)
                found += 1
    assert found


def test_an_error_tells_the_place_of_a_record_in_a_part(damaged):
    shard = next(damaged.glob("*-train.array_record-00001-*"))
    shard.write_bytes(bytes(shard.stat().st_size))
    dataset = TfdsDataset(damaged, "val+train[5:]")
    assert [dataset[i].name for i in range(3)] == [f"val/clip {i} 名" for i in range(3)]
    with pytest.raises(RecordError, match=rf"{shard.name}, record 1 \('train/clip 5"):
        dataset[3]
    with pytest.raises(RecordError, match=rf"{shard.name}, record 3 \('train/clip 7"):
        dataset[5]


# --- threads and the command --------------------------------------------------------------------


def test_threads_and_copies_read_the_right_records(written):
    splits, directory = written
    dataset = TfdsDataset(directory)
    expected = [encode(record) for record in RecordDataset(splits["train"])]
    order = random.Random(0).choices(range(10), k=1000)
    with ThreadPoolExecutor(8) as pool:
        for i, record in zip(order, pool.map(dataset.__getitem__, order), strict=True):
            assert encode(record) == expected[i]
    # As when Grain hands it to a worker process.
    assert encode(copy.deepcopy(dataset)[7]) == expected[7]


def test_the_command_writes_what_training_opens(written, tmp_path, capsys):
    splits, _ = written
    out = tmp_path / "out"
    to_tfds.main(["--out", str(out), "--records", str(splits["train"]), f"dev={splits['val']}"])
    said = capsys.readouterr().out
    assert said.splitlines() == [
        str(out / "affect_records" / "1.0.0"),
        "train: 10 clips, 1 shards, face [8, 12], audio [8, 16]",
        "dev: 3 clips, 1 shards, face [8, 12], audio [8, 16]",
        f"train on it with --config.data.train=tfds:{out}:train",
    ]
    assert len(open_source(said.split("=")[1].strip(), "?")) == 10


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (["train={train}", "train={val}"], "are both the split 'train'; name them apart, as in"),
        (["{out}"], "manifest.json is missing"),
        (["all={train}"], "a TFDS split cannot be called 'all'"),
    ],
)
def test_the_command_ends_with_one_sentence(records, message, written, tmp_path):
    splits, _ = written
    names = {"train": splits["train"], "val": splits["val"], "out": tmp_path}
    records = [record.format(**names) for record in records]
    with pytest.raises(SystemExit, match=message) as stopped:
        to_tfds.main(["--out", str(tmp_path / "out"), "--records", *records])
    assert str(stopped.value).startswith("error: ") and "\n" not in str(stopped.value)
