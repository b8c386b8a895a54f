"""The extraction as a user runs it: what it writes, what it refuses, what does not change it."""

import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path

import needs_torch
import numpy as np
import pytest
from clip_files import BROKEN, face_frames, tone, write_clip, write_talking
from small_encoders import save_encoder

from affectgpt_jax.data.records import RecordDataset
from data_prep import extract, stages
from data_prep.clips import Clip
from data_prep.decoding import Job, decode_clip, in_order
from data_prep.encoders import Encoder, find_encoder

ROOT = Path(__file__).parents[2]
WHOLE = 10


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    return [
        f"--{kind}={name}={save_encoder(name, folder)}"
        for kind, name in (("video", "clip"), ("audio", "hubert"))
    ]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Whole clips of several containers, and one of each way to be broken."""
    folder = tmp_path_factory.mktemp("clips")
    fill(folder, WHOLE, 1)
    return folder


def fill(folder, whole, broken_of_each):
    containers = [
        ("mp4", {}),
        ("avi", {"audio_codec": "pcm_s16le", "rate": 16_000}),
        ("mkv", {"video_codec": "libx264"}),
        ("mov", {}),
    ]
    for i in range(whole):
        suffix, options = containers[i % len(containers)]
        write_talking(folder / f"whole-{i:03}.{suffix}", seed=i, seconds=0.6 + i % 3, **options)
    for kind, (_, make) in BROKEN.items():
        for i in range(broken_of_each):
            make(folder / f"broken-{kind.replace(' ', '_')}-{i}.mp4", seed=1000 + i)


def run(clips, out, encoders, *flags):
    extract.main([f"--clips={clips}", f"--out={out}", *encoders, "--workers=0", *map(str, flags)])


def report(out):
    with open(out / "extraction.csv", newline="", encoding="utf-8") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def contents(out):
    """All that an extraction wrote, but what it keeps to go on."""
    files = [path for path in sorted(out.iterdir()) if path.is_file()]
    return {path.name: path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def extracted(clips, encoders, tmp_path_factory):
    out = tmp_path_factory.mktemp("extracted") / "train"
    run(clips, out, encoders)
    return out


def test_whole_clips_become_records_and_every_other_has_its_reason(extracted):
    rows = report(extracted)
    assert len(rows) == WHOLE + len(BROKEN)
    dataset = RecordDataset(extracted)
    dataset.verify()
    assert [e.name for e in dataset.index] == [f"whole-{i:03}" for i in range(WHOLE)]
    assert {f: (x["frames"], x["width"]) for f, x in dataset.manifest.features.items()} == {
        "face": (8, 24),
        "frame": (8, 24),
        "audio": (8, 32),
    }
    assert dataset.manifest.features["face"]["encoder"] == "clip:clip"
    for kind, (reason, _) in BROKEN.items():
        row = rows[f"broken-{kind.replace(' ', '_')}-0"]
        assert row["status"] == "left out"
        assert row["reason"].startswith(reason)


def test_a_record_holds_what_the_encoders_make_of_the_clip(extracted, clips, encoders):
    record = RecordDataset(extracted)[3]
    decoded = decode_clip(Job(Clip("a", clips / "whole-003.mov"), ("face", "frame", "audio"), 224))
    for feature, flag in (("face", 0), ("frame", 0), ("audio", 1)):
        kind, _, text = encoders[flag].removeprefix("--").partition("=")
        values = Encoder(find_encoder(text, kind))(decoded.arrays[feature][None])[0]
        # Half a step of float16, and of a batch of another size.
        np.testing.assert_allclose(record.features[feature], values, rtol=6e-4, atol=1e-4)


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_writes_the_same_bytes(workers, extracted, clips, encoders, tmp_path):
    run(clips, tmp_path / "train", encoders, f"--workers={workers}")
    assert contents(tmp_path / "train") == contents(extracted)


def test_shares_of_the_work_leave_the_same_bytes(extracted, clips, encoders, tmp_path, capsys):
    out = tmp_path / "train"
    for share in ("2/3", "0/3"):
        run(clips, out, encoders, f"--shard={share}")
        assert f"share {share[0]} of 3 is finished" in capsys.readouterr().out
        assert not contents(out)
    run(clips, out, encoders, "--shard=1/3")
    assert contents(out) == contents(extracted)


def test_a_finished_extraction_is_left_alone(extracted, clips, encoders, capsys):
    before = contents(extracted)
    run(clips, extracted, encoders)
    assert "is complete: nothing has changed" in capsys.readouterr().out
    assert contents(extracted) == before


def test_what_is_finished_is_used_again_and_damage_to_it_is_noticed(
    extracted, clips, encoders, tmp_path, monkeypatch
):
    out = shutil.copytree(extracted, tmp_path / "train")
    (out / "manifest.json").unlink()
    blocks = sorted((out / extract.BLOCKS).glob("*.npz"))
    store = extract.BlockStore(out / extract.BLOCKS)
    lost = {row["name"] for path in blocks[:2] for row in store.rows(path.stem)}
    blocks[0].write_bytes(blocks[0].read_bytes()[:-500])
    blocks[1].unlink()
    decoded = []

    def recorded(function, jobs, *options):
        decoded.extend(job.clip.name for job in jobs)
        return in_order(function, jobs, *options)

    monkeypatch.setattr(stages, "in_order", recorded)
    run(clips, out, encoders)
    assert contents(out) == contents(extracted)
    assert len(decoded) == len(lost) and set(decoded) == lost
    # A byte of the features, which only who reads them sees, as of a block whose clips have some.
    kept = {entry.name for entry in RecordDataset(out).index}
    block = next(b for b in blocks if kept & {row["name"] for row in store.rows(b.stem)})
    (out / "manifest.json").unlink()
    data = bytearray(block.read_bytes())
    with zipfile.ZipFile(block) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
    data[largest.header_offset + 30 + len(largest.filename) + largest.compress_size // 2] ^= 1
    block.write_bytes(data)
    with pytest.raises(SystemExit, match=f"{block.name} is damaged .*delete it, and the same"):
        run(clips, out, encoders)
    assert not (out / "manifest.json").exists()
    block.unlink()
    run(clips, out, encoders)
    assert contents(out) == contents(extracted)


def test_clips_without_a_modality_are_records_where_that_is_allowed(
    extracted, clips, encoders, tmp_path, monkeypatch, capsys
):
    out = shutil.copytree(extracted, tmp_path / "train")
    run_again = [clips, out, encoders, "--allow-missing"]
    with pytest.raises(SystemExit, match="train holds the records of other clips or settings, or"):
        run(*run_again)
    (out / "manifest.json").unlink()
    # Nothing is computed again for it.
    monkeypatch.setattr(extract, "Encoder", None)
    run(*run_again)
    present = {entry.name: entry.present for entry in RecordDataset(out).index}
    assert present["broken-no_audio_stream-0"] == ("face", "frame")
    assert present["broken-no_face-0"] == ("frame", "audio")
    assert present["broken-no_video_stream-0"] == ("audio",)
    assert "broken-empty_file-0" not in present
    assert len(present) == WHOLE + 4
    assert report(out)["broken-no_face-0"]["reason"] == "face: no face in 16 frames"
    assert "incomplete, face: no face in _ frames: 1: 'broken-no_face-0'" in capsys.readouterr().out


def test_one_file_twice_is_reported_and_so_is_one_of_another_split(
    extracted, clips, encoders, tmp_path
):
    folder = tmp_path / "clips"
    folder.mkdir()
    write_talking(folder / "b.mp4", seed=77)
    shutil.copy(folder / "b.mp4", folder / "c.mp4")
    shutil.copy(clips / "whole-002.mkv", folder / "a.mkv")
    run(folder, tmp_path / "test", encoders, f"--against={extracted}")
    rows = report(tmp_path / "test")
    assert {name: row["status"] for name, row in rows.items()} == {
        "a": "left out",
        "b": "ok",
        "c": "left out",
    }
    assert rows["a"]["reason"] == f"the same file is 'whole-002' in {extracted}"
    assert rows["c"]["reason"] == "the same file is 'b'"


def test_a_csv_file_names_clips_files_and_annotations(clips, encoders, tmp_path, capsys):
    table = tmp_path / "clips.csv"
    table.write_text(
        "name,video,labels,subtitle,description\n"
        f'second,{clips / "whole-001.avi"},"[Happy, calm]",hello,Smiles.\n'
        f"first,{clips / 'whole-000.mp4'},sad,,\n"
        "lost,nowhere.mp4,sad,,\n",
        encoding="utf-8",
    )
    extract.main([f"--csv={table}", f"--out={tmp_path / 'out'}", *encoders, "--workers=0"])
    second, first = RecordDataset(tmp_path / "out")
    assert (first.name, first.labels) == ("first", ("sad",))
    assert (second.name, second.labels, second.subtitle) == ("second", ("happy", "calm"), "hello")
    assert second.description == "Smiles."
    assert report(tmp_path / "out")["lost"]["reason"] == "no such file"
    named = tmp_path / "named.csv"
    named.write_text("name,labels\nwhole-004,sad\nwhole-999,sad\n", encoding="utf-8")
    capsys.readouterr()
    run(clips, tmp_path / "named", encoders, f"--csv={named}")
    reason = report(tmp_path / "named")["whole-999"]["reason"]
    assert reason == "face, frame: no video file; audio: no audio file"
    assert "files without a row in the CSV file, left out: 17" in capsys.readouterr().out


def test_faces_may_come_as_arrays(encoders, tmp_path):
    write_clip(tmp_path / "clips" / "a.mp4", np.zeros((9, 48, 64, 3), np.uint8), tone(1.0))
    write_clip(tmp_path / "clips" / "b.mp4", np.zeros((9, 48, 64, 3), np.uint8), tone(1.1))
    (tmp_path / "faces" / "a").mkdir(parents=True)
    track = np.random.default_rng(0).integers(0, 256, (3, 112, 112, 3), np.uint8)
    np.save(tmp_path / "faces" / "a" / "a.npy", track)
    run(tmp_path / "clips", tmp_path / "out", encoders, f"--faces={tmp_path / 'faces'}")
    (record,) = RecordDataset(tmp_path / "out")
    assert len(np.unique(record.features["face"], axis=0)) == 3
    assert report(tmp_path / "out")["b"]["reason"] == "face: no such file"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--clips=nowhere", "--audio=hubert-l"], "nowhere is not a folder; expected one with a f"),
        (["--clips={empty}", "--audio=hubert-l"], "empty: no file ends in any of .mp4"),
        (["--clips={clips}", "--audio=hubert-l"], "chinese-hubert-large is no path"),
        (["--clips={twice}", "--audio=hubert-l"], "a.avi and .*a.mp4 would both be the clip 'a'"),
        (["--csv={table}", "--audio=hubert-l"], "has no clip with a file: expected columns video"),
        (["--clips={clips}", "--csv={wrong}", "--audio=hubert-l"], "the column 'mood' is unknown"),
        (["--clips={clips}", "--audio=hubert-l", "--against={empty}"], "extraction.csv cannot be"),
        (["--clips={clips}", "--audio=hubert-l", "--device=cuda"], "PyTorch finds no GPU here; le"),
        (["--clips={clips}", "--audio=hubert-l", "--precision=float16"], "a CPU has float32 or bf"),
    ],
)
def test_what_a_user_gets_wrong_is_one_sentence(flags, message, clips, tmp_path, monkeypatch):
    needs_torch.pytorch("without it, that is the first thing to be said")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    places = {"clips": clips, "empty": tmp_path / "empty", "twice": tmp_path / "twice"}
    places |= {"table": tmp_path / "table.csv", "wrong": tmp_path / "wrong.csv"}
    places["empty"].mkdir()
    places["twice"].mkdir()
    for suffix in ("avi", "mp4"):
        (places["twice"] / f"a.{suffix}").write_bytes(b"")
    places["table"].write_text("name\na\n")
    places["wrong"].write_text("name,mood\nwhole-000,x\n")
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match=message) as stopped:
        extract.main([f"--out={out}", *(flag.format(**places) for flag in flags)])
    assert str(stopped.value).startswith("error: ")
    assert "\n" not in str(stopped.value)
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--audio=hubert-l"], "give --clips DIR, --csv FILE, or both"),
        (["--clips=c"], "give --video, --audio, or both"),
        (["--clips=c", "--audio=hubert-l", "--features", "face"], "face needs an encoder: --video"),
        (["--clips=c", "--audio=hubert-l", "--batch=0"], "--batch is 0; expected 1 or more"),
        (["--clips=c", "--audio=hubert-l", "--workers=-1"], "--workers is -1; expected 0 or more"),
        (["--clips=c", "--audio=hubert-l", "--against=out"], "--against names out, which is to be"),
    ],
)
def test_flags_that_do_not_go_together_end_in_the_usage(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        extract.main(["--out=out", *flags])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_without_the_extra_the_command_says_how_to_get_it():
    flags = ["extract", "--clips=c", "--audio=hubert-l", "--out=o"]
    missing = f"import sys, runpy; sys.modules['av'] = None; sys.argv = {flags}; "
    code = missing + "runpy.run_module('data_prep.extract', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    advice = "pip install 'affectgpt-jax[features]'"
    assert done.stderr == f"error: the package av is missing: {advice}\n"


def test_no_clip_that_can_be_used_is_one_sentence(encoders, tmp_path):
    write_clip(tmp_path / "clips" / "a.mp4", face_frames(5))
    with pytest.raises(SystemExit, match="none of 1 clips can be used .*audio: no audio stream"):
        run(tmp_path / "clips", tmp_path / "out", encoders)
    assert report(tmp_path / "out")["a"]["status"] == "left out"


class Stopped(BaseException):
    """Neither caught nor cleaned up after, as little as an end of the process is."""


def test_wherever_it_ends_the_same_command_writes_the_same_bytes(
    extracted, clips, encoders, tmp_path, monkeypatch
):
    out = shutil.copytree(extracted, tmp_path / "train")
    blocks = sorted((out / extract.BLOCKS).glob("*.npz"))
    for path in [*(p for p in out.iterdir() if p.is_file()), out / extract.BLOCKS / "finished"]:
        path.unlink()
    for path in blocks[:2]:
        path.unlink()
    # Every file appears by a rename: end before and behind each of them, once.
    replace, moments, ended = os.replace, set(), 0

    def stopping(source, target):
        name = Path(target).name
        for moment in ((name, "before"), (name, "behind")):
            if moment[1] == "behind":
                replace(source, target)
            if moment not in moments:
                moments.add(moment)
                raise Stopped

    monkeypatch.setattr(os, "replace", stopping)
    while True:
        try:
            run(clips, out, encoders)
            break
        except Stopped:
            ended += 1
    # Where encoders are, two blocks, the report, what is finished, a shard, index and manifest.
    assert ended == 2 * 8
    assert contents(out) == contents(extracted)


def test_files_that_change_while_they_are_read_are_not_remembered(
    encoders, tmp_path, monkeypatch, capsys
):
    path = write_talking(tmp_path / "clips" / "a.mp4")
    write_talking(tmp_path / "clips" / "b.mp4")
    whole = path.read_bytes()
    path.write_bytes(whole[:500])  # somebody copies it

    def copied_meanwhile(*work):
        for result in in_order(*work):
            path.write_bytes(whole)
            yield result

    monkeypatch.setattr(stages, "in_order", copied_meanwhile)
    with pytest.raises(
        SystemExit, match="files of the clips 'a' changed while they were read; run"
    ):
        run(tmp_path / "clips", tmp_path / "out", encoders, "--batch=1")
    monkeypatch.setattr(stages, "in_order", in_order)
    capsys.readouterr()
    run(tmp_path / "clips", tmp_path / "out", encoders, "--batch=1")
    assert "1 of 2 clips are finished" in capsys.readouterr().err
    rows = report(tmp_path / "out")
    assert rows["a"]["status"] == "ok" and rows["b"]["reason"] == "the same file is 'a'"


def test_the_order_of_channels_counts_where_a_csv_file_names_arrays(encoders, tmp_path):
    track = np.random.default_rng(0).integers(0, 256, (8, 112, 112, 3), np.uint8)
    np.save(tmp_path / "a.npy", track)
    write_clip(tmp_path / "a.wav", None, tone(1.0), audio_codec="pcm_s16le")
    (tmp_path / "t.csv").write_text("name,audio,face\na,a.wav,a.npy\n", encoding="utf-8")
    command = [f"--csv={tmp_path / 't.csv'}", f"--out={tmp_path / 'out'}", *encoders]
    command += ["--features", "face", "audio", "--workers=0"]
    extract.main(command)
    (bgr,) = RecordDataset(tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    extract.main([*command, "--face-order=rgb"])
    (rgb,) = RecordDataset(tmp_path / "out")
    assert np.abs(bgr.features["face"] - rgb.features["face"]).max() > 0.01
    np.testing.assert_array_equal(bgr.features["audio"], rgb.features["audio"])


def start(command):
    return subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for_blocks(out, count, process):
    """Until so many blocks are finished, or the process is."""
    until = time.monotonic() + 120
    while len(list(out.glob(f"{extract.BLOCKS}/*.npz"))) < count:
        if process.poll() is not None or time.monotonic() > until:
            break
        time.sleep(0.02)


def kill_and_finish(command, out, blocks, seed):
    """Run a command, killed at random moments, and then to its end.

    Args:
        command: what to run.
        out: where its blocks are.
        blocks: after how many more blocks to kill it, time by time; a random moment later.
        seed: of the moments.
    """
    rng = random.Random(seed)
    for more in blocks:
        done = len(list(out.glob(f"{extract.BLOCKS}/*.npz")))
        process = start(command)
        wait_for_blocks(out, done + more, process)
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


def command(clips, out, encoders, *flags):
    flags = [f"--clips={clips}", f"--out={out}", *encoders, *flags]
    return [sys.executable, "-m", "data_prep.extract", *flags]


def test_an_interrupted_and_a_killed_extraction_go_on_and_leave_no_process_behind(
    extracted, clips, encoders, tmp_path
):
    for attempt in range(5):
        out = tmp_path / str(attempt) / "train"
        call = command(clips, out, encoders, "--workers=2")
        process = start(call)
        wait_for_blocks(out, 1, process)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers, too
        _, said = process.communicate(timeout=60)
        if process.returncode != 0:  # on a busy machine it may be over before the signal comes
            break
    assert process.returncode == 128 + signal.SIGINT
    assert said.splitlines()[-1] == "interrupted; the same command goes on from there"
    assert "Traceback" not in said
    assert 1 <= len(list(out.glob(f"{extract.BLOCKS}/*.npz"))) < 5
    kill_and_finish(call, out, [0], seed=0)
    assert contents(out) == contents(extracted)
    deadline = time.monotonic() + 20
    while (left := started_with(str(out))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


def started_with(text):
    """Ids of processes whose command line or whose parent's has a text in it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text in path.read_text() and int(path.parent.name) != os.getpid():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.timeout(1200)  # a minute and a half of an idle core
def test_180_of_200_clips_are_records_and_20_have_names_and_reasons_however_often_it_is_killed(
    encoders, tmp_path
):
    folder = tmp_path / "clips"
    folder.mkdir()
    fill(folder, 180, 2)  # 16 broken ones, and 4 more
    for i, kind in enumerate(("empty file", "text", "cut off", "no face")):
        BROKEN[kind][1](folder / f"broken-{kind.replace(' ', '_')}-2.mp4", seed=2000 + i)
    out = tmp_path / "train"
    subprocess.run(command(folder, out, encoders, "--workers=2"), cwd=ROOT, check=True)
    rows = report(out)
    assert Counter(row["status"] for row in rows.values()) == {"ok": 180, "left out": 20}
    assert len(RecordDataset(out)) == 180
    for name, row in rows.items():
        if row["status"] != "ok":
            kind = name.split("-")[1].replace("_", " ")
            assert row["reason"].startswith(BROKEN[kind][0])
    killed = tmp_path / "killed" / "train"
    again = command(folder, killed, encoders, "--workers=2")
    kill_and_finish(again, killed, [0, 3, 9, 1, 6], seed=1)
    assert contents(killed) == contents(out)
