"""What a user can get wrong with data and files: every row is one sentence that says what to do.

Settings that are wrong in themselves stand in test_config.py and test_train.py.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from affectgpt_jax import build, train
from affectgpt_jax.data import demo, records
from affectgpt_jax.data.records import RecordDataset, RecordError, write_records
from affectgpt_jax.training import checkpoints

FLAGS = (
    "--config.steps=1",
    "--config.checkpoint_every=1",
    "--config.batch_size=8",
    "--config.num_buckets=1",
    "--config.generate.max_new_tokens=2",
)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory) -> Path:
    """Intact records and an intact base, to be copied and spoiled."""
    folder = tmp_path_factory.mktemp("shipped")
    for split, size in (("train", 24), ("val", 8)):
        write_records(
            folder / split,
            demo.World(0).records(split, size),
            encoders=dict.fromkeys(demo.DEFAULT_FEATURES, "demo"),
            records_per_shard=10,
        )
    shutil.copytree(build.base_directory("tiny"), folder / "base")
    return folder


@pytest.fixture
def folder(shipped, tmp_path) -> Path:
    return shutil.copytree(shipped, tmp_path / "given")


def command(folder: Path, *flags: str) -> list[str]:
    data = [f"--config.data.{split}={folder / split}" for split in ("train", "val")]
    return [
        f"--workdir={folder / 'run'}", f"--config.llm={folder / 'base'}", "--config.data.test=",
        *data, *FLAGS, *flags,
    ]  # fmt: skip


def refusal(folder: Path, *flags: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        train.main(command(folder, *flags))
    message = str(stopped.value)
    assert message.startswith("error: ")
    assert "\n" not in message
    assert "Traceback" not in message
    return message


def shard(folder: Path, number: int = 1) -> Path:
    return folder / "train" / f"records-0000{number}-of-00003.array_record"


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)


def rewrite_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def spoil_tensors(folder: Path, change) -> None:
    path = folder / "base" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def without_chat_tokens(folder: Path) -> None:
    path = folder / "base" / "tokenizer.json"
    data = json.loads(path.read_text())
    data["added_tokens"] = [t for t in data["added_tokens"] if "im_" not in t["content"]]
    path.write_text(json.dumps(data))


def other_width(folder: Path) -> None:
    shutil.rmtree(folder / "train")
    clips = (
        dataclasses.replace(r, features={n: v[:, :512] for n, v in r.features.items()})
        for r in demo.World(0).records("train", 8)
    )
    encoders = dict.fromkeys(demo.DEFAULT_FEATURES, "clip-vit-b")
    write_records(folder / "train", clips, encoders=encoders)


def no_records(folder: Path) -> None:
    rewrite_json(folder / "train" / "manifest.json", count=0, shards=[])
    (folder / "train" / "index.jsonl").write_text("")


def text(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)


BAD_PROMPTS = """
[roles]
human = "H: "
assistant = " A: "
end = "###"
[inputs]
multi = "{multi}"
audio = "{voice}"
face = "{face}"
frame = "{frame}"
image = "{image}"
text = "{subtitle}"
[questions]
[answers]
"""

# What is wrong, how it comes about, more flags, and what the message says.
TABLE = {
    "a missing shard": (
        lambda f: shard(f).unlink(), (),
        "records-00001-of-00003.array_record: size in bytes: found no such file, the manifest",
    ),
    "a truncated shard": (
        lambda f: os.truncate(shard(f), 1000), (),
        "records-00001-of-00003.array_record: size in bytes: found 1000, the manifest expects",
    ),
    "a flipped byte in a shard": (
        lambda f: flip(shard(f), 70_000), (),
        "records-00001-of-00003.array_record: sha256: found",
    ),
    "a flipped byte in a shard that is not hashed": (
        lambda f: flip(shard(f), 70_000), ("--config.data.verify=False", "--config.steps=3"),
        "records-00001-of-00003.array_record, record ",
    ),
    "a flipped byte in the index": (
        lambda f: flip(f / "train" / "index.jsonl", 50), (), "index.jsonl: sha256: found",
    ),
    "no manifest": (
        lambda f: (f / "train" / "manifest.json").unlink(), (),
        "manifest.json is missing: this is not a record directory",
    ),
    "a manifest that is not JSON": (
        lambda f: text(f, "train/manifest.json", "{"), (), "manifest.json: not JSON",
    ),
    "an empty data set": (no_records, (), "train holds no records"),
    "features of another width": (
        other_width, (),
        "the records' audio features (clip-vit-b) are 512 wide, but config.projectors.audio_width "
        "is 1024; set it to 512, or use records of another encoder",
    ),
    "a feature that the records lack": (
        lambda f: None, ("--config.input=frame_text",),
        "reads the feature 'frame', but the records of split 'train' hold only ['audio', 'face']",
    ),
    "a base without weights": (
        lambda f: (f / "base" / "model.safetensors").unlink(), (),
        "base: no weights: model.safetensors is missing",
    ),
    "a base without config": (
        lambda f: (f / "base" / "config.json").unlink(), (), "base/config.json: not found",
    ),
    "a base without tokenizer": (
        lambda f: (f / "base" / "tokenizer.json").unlink(), (), "base/tokenizer.json: not found",
    ),
    "a missing tensor": (
        lambda f: spoil_tensors(f, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")), (),
        "base: the tensor model.layers.1.mlp.up_proj.weight is missing; expected (384, 192)",
    ),
    "a tensor of another shape": (
        lambda f: spoil_tensors(f, lambda t: t.update({"model.norm.weight": np.ones(3, "f")})), (),
        "base/model.safetensors: the tensor model.norm.weight is (3,); expected (192,)",
    ),
    "a tensor that nobody knows": (
        lambda f: spoil_tensors(f, lambda t: t.update({"extra": np.ones(3, "f")})), (),
        "base/model.safetensors: the tensor extra is not part of this model",
    ),
    "truncated weights": (
        lambda f: os.truncate(f / "base" / "model.safetensors", 5000), (),
        "base/model.safetensors: not a whole safetensors file",
    ),
    "another architecture": (
        lambda f: rewrite_json(f / "base" / "config.json", model_type="gpt2"), (),
        "base/config.json: model_type is 'gpt2'; expected",
    ),
    "a tokenizer without the chat tokens": (
        without_chat_tokens, (), "base/tokenizer.json: no token <|im_start|> or <|im_end|>",
    ),
    "a tokenizer that is no JSON": (
        lambda f: text(f, "base/tokenizer.json", "[]"), (), "base/tokenizer.json: not a tokenizer",
    ),
    "a template that names an unknown slot": (
        lambda f: text(f, "mine.toml", BAD_PROMPTS), ("--config.prompts={folder}/mine.toml",),
        "mine.toml: [inputs].audio names the unknown slot {voice}; it may name ['audio']",
    ),
    "an answer that no clip has": (
        lambda f: None, ("--config.label=ovlabel+onehot_candidates", "--config.max_tokens=70"),
        "tokens as onehot_candidates, over --config.max_tokens=70",
    ),
    "a workdir inside a file": (
        lambda f: text(f, "run", ""), (), "run: File exists; the run needs a --workdir that it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("trouble", TABLE)
def test_bad_input_is_one_sentence(trouble, folder):
    spoil, flags, said = TABLE[trouble]
    spoil(folder)
    assert said in refusal(folder, *(flag.format(folder=folder) for flag in flags))


def test_a_workdir_of_another_run_is_left_as_it_is(folder):
    train.main(command(folder))
    before = sorted(p.name for p in (folder / "run" / "checkpoints").iterdir())
    said = refusal(folder, "--config.optimizer.learning_rate=1e-5")
    assert "run holds a run with config.optimizer.learning_rate=0.003, but now it is 1e-05" in said
    assert sorted(p.name for p in (folder / "run" / "checkpoints").iterdir()) == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"features": {"face": np.full((8, 4), np.nan)}}, "feature 'face': 32 values are not fin"),
        ({"features": {"face": np.full((8, 4), 1e6)}}, "1e+06 overflows float16"),
        ({"emotion": "joyous"}, "emotion 'joyous' is not a candidate; use hopeless, ashamed"),
        ({"valence": 1.5}, "valence 1.5 lies outside its range (-1.0, 1.0)"),
        ({"valence_range": (1.0, -1.0)}, "valence_range (1.0, -1.0) is empty"),
        ({"valence_range": (1.0,)}, "valence_range must be (lowest, highest)"),
        ({"alternatives": ("one",)}, "alternatives must be two descriptions or none, got 1"),
        ({"preferred": "a3"}, "preferred is 'a3'; expected one of ('a1', 'a2', 'same')"),
        ({"candidates": "happy"}, "candidates must be a tuple of strings"),
        ({"answer": None}, "answer must be a string, got None"),
    ],
)
def test_a_record_that_says_something_impossible_is_never_written(changes, said, tmp_path):
    (record,) = demo.World(0).records("val", 1)
    with pytest.raises(RecordError) as caught:
        records.encode(dataclasses.replace(record, **changes))
    assert "record 'demo-val-00000'" in str(caught.value)
    assert said in str(caught.value)


def test_a_record_with_nan_bytes_is_refused_when_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_to_float16", lambda record, f: record.features[f])
    clips = list(demo.World(0).records("val", 3))
    bad = {n: np.full_like(v, np.nan) for n, v in clips[1].features.items()}
    clips[1] = dataclasses.replace(clips[1], features=bad)
    write_records(tmp_path, clips, encoders=dict.fromkeys(demo.DEFAULT_FEATURES, "demo"))
    dataset = RecordDataset(tmp_path)
    assert dataset[0].name == "demo-val-00000"
    with pytest.raises(RecordError, match="record 1 .'demo-val-00001'.*values that are not finite"):
        dataset[1]


# A file size limit stands in for a full disk: it needs no mount and no privileges.
LIMITED = """
import resource, runpy, sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
runpy.run_module("affectgpt_jax.train", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("limit", "flags", "said"),
    [
        # the config of the run
        (
            100,
            (),
            "run/config.json: File too large; the run needs a --workdir that it can",
        ),
        # the demo's records
        (
            2_000_000,
            ("--config.data.train=demo",),
            "run/data/demo-0-train: a shard cannot be written",
        ),
        # a checkpoint
        (300_000, (), "run/checkpoints; is the disk full? Those before it are whole"),
    ],
)
def test_a_full_disk_is_one_sentence(limit, flags, said, folder):
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *command(folder, *flags)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    *_, last = done.stderr.strip().splitlines()
    assert last.startswith("error: ")
    assert said in last
    assert "Traceback" not in done.stderr


def test_a_disk_without_room_for_a_checkpoint_is_refused_before_training(folder, monkeypatch):
    usage = shutil.disk_usage(folder)._replace(free=2**20)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: usage)
    said = refusal(folder)
    assert "1 MiB are free, but one checkpoint takes 9 MiB; free some space" in said
