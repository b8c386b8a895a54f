"""The walk of data_prep/README.md, command by command, on generated clips and the tiny base."""

import csv
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
from clip_files import write_talking
from small_encoders import save_encoder

from affectgpt_jax.__main__ import module_of
from affectgpt_jax.data.records import RecordDataset
from data_prep import extract

README = Path(extract.__file__).with_name("README.md")
CLIPS = {"train": 20, "test": 6}
EMOTIONS = ("amused", "furious")  # words that the tiny base knows


def commands():
    """The lines of the block that trains, as lists of words."""
    blocks = re.findall(r"```sh\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    walk = next(block for block in blocks if "affectgpt train" in block)
    return [shlex.split(line) for line in walk.splitlines()]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    seed = 0
    for split, count in CLIPS.items():
        with open(tmp_path / f"{split}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["name", "subtitle", "labels", "description"])
            for _ in range(count):
                seed += 1
                emotion = EMOTIONS[seed % 2]
                write_talking(tmp_path / "clips" / f"film/{seed:02}.mp4", seed=seed, seconds=0.4)
                writer.writerow(
                    [f"film/{seed:02}", "well", f"[{emotion}]", f"They look {emotion}."]
                )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_documented_walk_ends_in_a_scored_report(folder):
    encoders = {
        "clip-vit-l": f"clip={save_encoder('clip', folder / 'models')}",
        "hubert-l": f"hubert={save_encoder('hubert', folder / 'models')}",
    }
    # What makes it small; the rest is as documented.
    small = {
        "extract": ["--workers=1"],
        "train": [
            "--config.projectors.video_width=24",
            "--config.projectors.audio_width=32",
            "--config.steps=40",
            "--config.checkpoint_every=40",
            "--config.optimizer.warmup_steps=5",
            "--config.batch_size=8",
            "--config.num_buckets=1",
            "--config.generate.batch_size=8",
            "--config.generate.max_new_tokens=8",
        ],
        "evaluate": ["--bootstrap=10", "--max-new-tokens=8"],
    }
    for affectgpt, command, *words in commands():
        assert affectgpt == "affectgpt"
        words = [encoders.get(word, word) for word in words] + small.get(command, [])
        module = module_of(command) + (".__main__" if command == "weights" else "")
        importlib.import_module(module).main(words)
    for split, count in CLIPS.items():
        assert len(RecordDataset(folder / "records" / split)) == count
    assert (folder / "statistics" / "distributions.png").is_file()
    assert (folder / "adapter" / "adapter_config.json").is_file()
    report = json.loads((folder / "runs/mine/evaluate/report.json").read_text(encoding="utf-8"))
    (scored,) = report["sets"]
    assert scored["name"] == "mine"
    wheels = scored["results"][0]["wheels"]
    assert [wheel["clips"] for wheel in wheels] == [CLIPS["test"]] * 5
    # Whatever it makes of random encoders: it says one of the two words, and half are right.
    assert scored["results"][0]["values"]["f"] > 0.3
