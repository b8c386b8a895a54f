"""The walk of data_prep/README.md from unlabelled clips to a trained run, and its own server."""

import csv
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
from chat_stub import Stub
from small_encoders import save_encoder

from affectgpt_jax.__main__ import module_of
from affectgpt_jax.data.arrays import records_from_csv
from affectgpt_jax.data.records import RecordDataset, write_records
from data_prep import extract
from data_prep.speakers.rendered import rendered

README = Path(extract.__file__).with_name("README.md")
CLIPS, LABELLED = 8, 96


def commands():
    """The lines of the block that describes clips, as lists of words."""
    blocks = re.findall(r"```sh\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (walk,) = (block for block in blocks if "caption describe" in block)
    return [shlex.split(line) for line in walk.splitlines()]


def describes(body):
    """A server that hears and sees the same in all clips, and calls it joyful."""
    content = body["messages"][0]["content"]
    text = content if isinstance(content, str) else content[0]["text"]
    if "list format" in text:
        said = "[joyful, amused]"
    elif "candidates" in text:
        said = "positive"
    else:
        said = " ".join(["The person speaks up and shows it"] * 5) + ", joyful."
    choice = {"message": {"content": said}, "finish_reason": "stop"}
    return 200, {}, json.dumps({"choices": [choice]})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.chdir(tmp_path)
    names = list(rendered(tmp_path / "clips", count=CLIPS))
    with open(tmp_path / "clips.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["name", "subtitle"], *([name, "well"] for name in names)])
    return tmp_path


def write_labelled(folder):
    """Clips that people have labelled: nearly all of them happy, with the features of others."""
    clips = RecordDataset(folder / "records" / "clips")
    found = [clips[i] for i in range(len(clips))]
    arrays = {
        feature: {
            f"old{i:02}": found[i % len(found)].features[feature] + 0.01 * (1 + i)
            for i in range(LABELLED)
        }
        for feature in ("face", "audio")
    }
    with open(folder / "labelled.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "subtitle", "emotion", "valence", "valence_range"])
        for i in range(LABELLED):
            happy = i % 8 != 0
            truth = ["happy", 0.8] if happy else ["sad", 0.7]
            writer.writerow([f"old{i:02}", "well", *truth, "-1, 1"])
    encoders = {name: facts["encoder"] for name, facts in clips.manifest.features.items()}
    records = records_from_csv(folder / "labelled.csv", arrays)
    write_records(folder / "records" / "labelled", records, encoders=encoders)


@pytest.mark.slow
def test_the_documented_walk_ends_in_a_trained_run(folder):
    encoders = {
        "clip-vit-l": f"clip={save_encoder('clip', folder / 'models')}",
        "hubert-l": f"hubert={save_encoder('hubert', folder / 'models')}",
    }
    # What makes it small; the rest is as documented.
    small = {
        ("extract",): ["--workers=1", "--features", "face", "audio"],
        ("crowd", "train"): [
            "--folds=2",
            "--seeds=1",
            "--hidden=16",
            "--epochs=199",
            "--patience=199",
        ],
        ("train",): [
            "--config.projectors.video_width=24",
            "--config.projectors.audio_width=32",
            "--config.steps=2",
            "--config.checkpoint_every=2",
            "--config.optimizer.warmup_steps=1",
            "--config.batch_size=8",
            "--config.data.val_share=0.4",  # of a handful of clips, by their names
            "--config.num_buckets=1",
            "--config.generate.batch_size=8",
            "--config.generate.max_new_tokens=4",
        ],
    }
    with Stub(good=describes) as stub:
        for affectgpt, command, *words in commands():
            assert affectgpt == "affectgpt"
            if [command, *words[:1]] == ["crowd", "train"]:
                write_labelled(folder)
            given = [encoders.get(word, word) for word in words]
            given = [word.replace("http://localhost:8000/v1", stub.url) for word in given]
            given += small.get((command, *words[:1]), small.get((command,), []))
            # The checkout's own, whatever is installed.
            name = module_of(command).removeprefix("affectgpt_jax.")
            name = name if name.startswith("data_prep") else f"affectgpt_jax.{name}"
            module = importlib.import_module(name)
            if hasattr(module, "__path__"):
                module = importlib.import_module(f"{module.__name__}.__main__")
            module.main(given)
    with open(folder / "caption" / "filtered.csv", newline="", encoding="utf-8") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert len(rows) == CLIPS
    # Every other clip has somebody else's voice, or a mouth that is shut.
    verdicts = [row["speaker_value"] for row in rows.values()]
    assert verdicts.count("speaking") >= CLIPS // 2 - 2 and "off_screen" in verdicts
    plus = RecordDataset(folder / "records" / "plus")
    kept = [name for name, row in rows.items() if row["kept"] == "yes"]
    assert [entry.name for entry in plus.index] == kept and len(kept) >= 2
    assert plus[0].labels == ("joyful", "amused") and "shows it" in plus[0].description
    card = (folder / "caption" / "README.md").read_text(encoding="utf-8")
    assert "| mine | 96 | " in card and "off screen" in card
    assert json.loads((folder / "runs/plus/config.json").read_text())["steps"] == 2
    assert (folder / "runs/plus/result.json").is_file()
