"""The walk of data_prep/README.md, command by command, on generated clips and the tiny base; and
what its run says of files that are no records."""

import contextlib
import csv
import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from chromium import Page, browser
from clip_files import BROKEN, face_frames, tone, write_clip, write_talking
from PIL import Image
from small_encoders import save_encoder
from web_client import WRITTEN, serving, video

from affectgpt_jax import predict, score
from affectgpt_jax.__main__ import module_of
from affectgpt_jax.data.records import RecordDataset
from affectgpt_jax.restore import open_run
from data_prep import describe, extract, serve
from data_prep.clips import Clip
from data_prep.extractor import Extractor, extraction_of

README = Path(extract.__file__).with_name("README.md")
CLIPS = {"train": 20, "test": 6}
ENCODERS = {"video": "clip", "audio": "hubert"}
EMOTIONS = ("amused", "furious")  # words that the tiny base knows


def commands():
    """The lines of the block that trains, as lists of words."""
    blocks = re.findall(r"```sh\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    walk = next(block for block in blocks if "affectgpt train" in block)
    return [shlex.split(line) for line in walk.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the walk has been gone."""
    folder, seed = tmp_path_factory.mktemp("walk"), 0
    for split, count in CLIPS.items():
        with open(folder / f"{split}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["name", "subtitle", "labels", "description"])
            for _ in range(count):
                seed += 1
                emotion = EMOTIONS[seed % 2]
                write_talking(folder / "clips" / f"film/{seed:02}.mp4", seed=seed, seconds=0.4)
                writer.writerow(
                    [f"film/{seed:02}", "well", f"[{emotion}]", f"They look {emotion}."]
                )
    shutil.copy(folder / "clips" / "film" / "21.mp4", folder / "new.mp4")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        walk(folder)
    return folder


def walk(folder):
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
        "describe": ["--workers=1"],
    }
    for affectgpt, command, *words in commands():
        assert affectgpt == "affectgpt"
        words = [encoders.get(word, word) for word in words] + small.get(command, [])
        module = module_of(command) + (".__main__" if command == "weights" else "")
        with contextlib.ExitStack() as stack:
            if command == "describe":
                file = stack.enter_context(open("described.txt", "w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(file))
            importlib.import_module(module).main(words)


def test_the_documented_walk_ends_in_a_scored_report(folder):
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


def test_the_training_ends_with_a_score(folder):
    run = folder / "runs" / "mine"
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    assert result["clips_scored"] == CLIPS["test"] and "not_scored" not in result
    assert 0 <= result["f_interval"][0] <= result["f"] <= result["f_interval"][1] <= 1
    # The same from the files that it wrote.
    out = folder / "score.json"
    flags = [f"--predictions={run}/predictions.jsonl", f"--truth={run}/truth.csv", f"--json={out}"]
    score.main(["--task=fine", "--bootstrap=0", *flags])
    (found,) = json.loads(out.read_text(encoding="utf-8"))["results"]
    assert found["values"]["f"] == pytest.approx(result["f"])


def described(folder, capsys, *flags):
    """What `describe --json` writes, and what it says; new folders are relative to the walk's."""
    capsys.readouterr()
    status = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        try:
            describe.main([*flags, "--workdir=runs/mine", "--json", "--workers=1"])
        except SystemExit as error:
            status = error.code
    shown = capsys.readouterr()
    return [json.loads(line) for line in shown.out.splitlines()], shown.err, status


def test_a_file_gets_the_answer_that_its_record_gets(folder, capsys):
    (found,), said, status = described(folder, capsys, "new.mp4", "--subtitle=well")
    assert status == 0 and "not answered" not in said and "note:" not in said
    facts = found["facts"]
    assert (facts["frames"], facts["width"], facts["height"]) == (10, 320, 240)
    assert facts["faces"] == 10 and facts["seconds"] == 0.4 and not facts["silent"]
    assert found["features"] == ["face", "audio"] and found["missing"] == {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        predict.main(["--workdir=runs/mine", "--name=film/21", "--json"])
    expected = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(expected) > 0
    for mine, theirs in zip(found["answers"], expected, strict=True):
        assert theirs.pop("name") == "film/21"
        assert mine == theirs
    # The walk's own command said it for a person, with other words as the subtitle.
    shown = (folder / "described.txt").read_text(encoding="utf-8")
    for answer in expected:
        assert f"new [{answer['question']}] They " in shown
    assert "\n  labels: " in shown


def test_the_features_of_a_file_are_those_of_its_record_bit_by_bit(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        how = extraction_of(open_run(Path("runs/mine")))
        # Alone, and beside others.
        clips = [Clip("new", Path("new.mp4")), Clip("b", Path("clips/film/22.mp4"))]
        for part in (clips, clips[::-1]):
            found = {each.clip.name: each for each in Extractor(how, 1)(part, {"new": "well"})}
            expected = RecordDataset("records/test")[0]
            assert found["new"].record.subtitle == "well"
            for feature in ("face", "audio"):
                values = found["new"].record.features[feature]
                np.testing.assert_array_equal(values, expected.features[feature])
                assert not np.array_equal(values, found["b"].record.features[feature])


@pytest.fixture(scope="module")
def page(folder):
    """A server of the walk's run, with its encoders."""
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.chdir(folder)
        flags = ["--workdir=runs/mine", "--batch-size=2", "--max-seconds=5"]
        service = serve.make_service(serve.parse_arguments(flags), stack)
        yield stack.enter_context(serving(service))


def test_a_dropped_file_gets_the_answer_that_its_record_gets(folder, page):
    content = (folder / "new.mp4").read_bytes()
    status, _, seen = page("/clips", content, content_type="video/mp4")
    assert status == 200 and seen["notes"] == []
    assert seen["facts"] == {
        "length": "0.4 s", "size": "320 x 240, 10 frames", "faces": "in 10 of 10 frames"
    }  # fmt: skip
    assert len(seen["pictures"]["face"]) == 8 and len(seen["sound"]) == 8
    well = {"type": "subtitle", "text": "well"}
    for question in ("description", "ovlabel"):
        _, expected = page.chat({"type": "record", "name": "film/21"}, question)
        for part in ({"type": "clip", "id": seen["clip"]}, video(content)):
            status, found = page.chat(part, well, question)
            assert status == 200 and found["choices"] == expected["choices"]
    status, found = page.chat(video(content[:-2000]), well)
    assert status == 422 and "the file cannot be used: not readable" in found["error"]["message"]


def test_a_file_that_is_too_long_is_not_decoded(folder, page, tmp_path):
    write_clip(tmp_path / "long.wav", None, tone(6.0), audio_codec="pcm_s16le")
    content = (tmp_path / "long.wav").read_bytes()
    status, _, found = page("/clips", content, content_type="audio/wav")
    assert status == 422 and "longer than 5 s, which is the limit" in found["error"]["message"]


def test_a_browser_shows_what_the_model_is_given_of_a_real_clip(folder, page, tmp_path):
    browser()
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with Page(tmp_path / "profile", 390, 844) as shown:
        shown.open(page.url)
        shown.until("document.getElementById('kind').options.length")
        shown.choose_file("#file", folder / "new.mp4")
        shown.until("!document.getElementById('go').disabled && !!document.querySelector('.wave')")
        assert shown.run("document.querySelectorAll('.images img').length") == 8
        shown.run("document.getElementById('subtitle').value = 'well'")
        shown.run("document.getElementById('ask').requestSubmit()")
        shown.until(WRITTEN)
        _, expected = page.chat({"type": "record", "name": "film/21"}, "description")
        answer = shown.run("document.querySelector('.answer p').textContent")
        assert answer == expected["choices"][0]["message"]["content"]
        assert shown.problems == []
        shown.choose_file("#file", tmp_path / "broken.mp4")
        problem = shown.until("document.getElementById('problem').innerText")
        assert "not readable as media" in problem


def test_of_many_files_those_are_answered_that_can_be_read(folder, capsys):
    odd = folder / "odd"
    for name in ("no face", "no audio stream", "cut behind its header", "text"):
        odd.mkdir(exist_ok=True)
        BROKEN[name][1](odd / f"{name.replace(' ', '_')}.mp4", 5)
    write_clip(odd / "silent.mp4", face_frames(10), np.zeros((1, 16_000), np.float32))
    write_clip(folder / "voice.wav", None, tone(3.0), audio_codec="pcm_s16le")
    (odd / "silent.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nwell\n")
    flags = ["odd", "voice.wav", "none.mp4", "--question=ovlabel", "--subtitles=odd"]
    found, said, status = described(folder, capsys, *flags, "--show=shown")
    found = {line["name"]: line for line in found}
    assert list(found) == [
        *("cut_behind_its_header", "no_audio_stream", "no_face", "silent", "text"),
        *("voice", "none"),
    ]
    refused = {
        "cut_behind_its_header": "damaged: the file ends at",
        "text": "not readable as media: Invalid data",
        "none": "no such file",
    }
    for name, line in found.items():
        assert line["refused"].startswith(refused.get(name, ""))
        assert (f"{name}: not answered: " in said) == (name in refused) == bool(line["refused"])
        assert [a["question"] for a in line["answers"]] == ([] if name in refused else ["ovlabel"])
        assert (folder / "shown" / f"{name}.png").is_file() == (name not in refused)
    assert found["voice"]["missing"] == {"face": "no video file"}
    assert found["voice"]["features"] == ["audio"] and found["voice"]["facts"]["seconds"] == 3
    assert found["no_face"]["missing"] == {"face": "no face in 16 frames"}
    assert found["no_audio_stream"]["missing"] == {"audio": "no audio stream"}
    assert "note: silent: its sound is silence" in said and found["silent"]["facts"]["silent"]
    assert found["silent"]["subtitle"] == "well" and found["voice"]["subtitle"] == ""
    assert "note: 6 of 7 clips have no subtitle" in said
    assert (
        status == "error: cut_behind_its_header and 2 more of 7 clips: not answered, as said above"
    )


def test_the_picture_of_a_clip_holds_its_frames_faces_and_sound(folder):
    pixels = np.asarray(Image.open(folder / "pictures" / "new.png").convert("RGB"))
    assert pixels.shape[1] > 1000 and pixels.shape[0] > 500
    # The wall of the clip in each of eight frames; below them, eight faces without it.
    wall = np.abs(pixels.astype(int) - face_frames(1, seed=21)[0, 0, -1]).max(axis=-1) < 12
    columns = wall.any(axis=0)
    assert (np.diff(columns.astype(int)) == 1).sum() >= 8
    orange = (np.abs(pixels.astype(int) - (255, 127, 14)).max(axis=-1) < 3).any(axis=1)
    assert orange.sum() >= 8  # windows of the sound


def test_encoders_are_found_by_what_they_hold(folder, capsys, tmp_path):
    moved = shutil.copytree(folder / "models" / "clip", tmp_path / "moved")
    for text in (f"{moved}", f"clip={moved}"):
        _, said, status = described(folder, capsys, "none.mp4", f"--video={text}")
        assert "no such file" in said and "1 clips" in status
    other = save_encoder("clip", tmp_path, seed=1)
    _, _, status = described(folder, capsys, "new.mp4", f"--video={other}")
    assert f"{other} holds other weights (sha256 " in status and ": --video DIR" in status
    places = folder / "records" / "train" / ".blocks" / "encoders.json"
    kept = places.read_text()
    places.unlink()
    try:
        _, _, status = described(folder, capsys, "new.mp4")
    finally:
        places.write_text(kept)
    # The run has kept what its records say of them.
    records = folder / "records" / "train"
    records.rename(folder / "moved")
    try:
        where = [f"--{kind}={folder}/models/{name}" for kind, name in ENCODERS.items()]
        _, said, _ = described(folder, capsys, "none.mp4", *where)
        _, _, refused = described(folder, capsys, "none.mp4", where[0], f"--audio={other}")
        _, found, _ = described(folder, capsys, "none.mp4", "--trained-on=moved")
    finally:
        (folder / "moved").rename(records)
    assert "none: not answered: no such file" in said and "none: not answered" in found
    assert "holds a clip_vision_model by its config.json, expected hubert" in refused
    assert re.search(r"video encoder clip:clip \(sha256 .*\), but .*: --video DIR", status)
