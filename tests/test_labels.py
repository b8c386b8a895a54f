import csv
import subprocess
import sys

import pytest
from published_sets import publish, write_npz, write_rows

from affectgpt_jax.evaluation.datasets import BY_KEY, DATASETS, UNIBENCH
from affectgpt_jax.evaluation.label_files import match_names
from affectgpt_jax.evaluation.readers import read_truth
from affectgpt_jax.labels import main

NPZ = [dataset.key for dataset in DATASETS if "npz" in dataset.labels[-1]]


def run(*arguments):
    main([str(argument) for argument in arguments])


def failure(*arguments):
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    return str(stop.value)


def subtitles_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return {row["name"]: row["subtitle"] for row in csv.DictReader(file)}


def test_the_nine_sets_are_those_of_the_paper():
    sizes = [dataset.size for dataset in DATASETS]
    assert sizes == [411, 1169, 2610, 1241, 686, 4659, 457, 1034, 532, 332]
    assert sum(dataset.unibench for dataset in DATASETS) == 9
    assert UNIBENCH == {
        "basic": ("MER2023", "MER2024", "MELD", "IEMOCAP"),
        "sentiment": ("CMU-MOSI", "CMU-MOSEI", "CH-SIMS", "CH-SIMS v2"),
        "fine": ("OV-MERD+",),
    }
    assert len(BY_KEY) == len({dataset.folder for dataset in DATASETS}) == 10


@pytest.mark.parametrize("key", BY_KEY)
def test_the_published_layout_becomes_a_truth_file(tmp_path, capsys, key):
    expected = publish(tmp_path / "data", key)
    out = tmp_path / "truth" / f"{key}.csv"
    run("--set", key, "--root", tmp_path / "data", "--out", out, "--allow-pickle")
    table = read_truth(out, BY_KEY[key].task)
    assert table.names == tuple(expected)
    for value, true in zip(table.values, expected.values()):
        # Valences were single precision.
        assert value == (pytest.approx(true) if isinstance(true, float) else true)
    name = table.names[0]
    subtitle = {
        "mer2024": f"\u4f60, {name}",
        "ovmerdplus": f"a sentence, {name}",
    }.get(key, f'she said "{name}", twice')
    assert subtitles_of(out)[name] == subtitle
    told = capsys.readouterr().out
    assert f"size: 4 clips, published {BY_KEY[key].size:,}" in told
    assert "without a subtitle" not in told


@pytest.mark.parametrize("key", NPZ)
def test_pickled_labels_need_a_word_of_consent(tmp_path, key):
    publish(tmp_path, key)
    message = failure("--set", key, "--root", tmp_path, "--out", tmp_path / "t.csv")
    assert message.startswith("error: ") and "--allow-pickle" in message
    assert not (tmp_path / "t.csv").exists()


def test_code_in_a_label_file_is_refused_and_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    folder = tmp_path / "meld-process"
    folder.mkdir()
    write_npz(folder / "label.npz", test_corpus={"a": Evil()})
    out = tmp_path / "t.csv"
    message = failure("--set", "meld", "--root", folder, "--out", out, "--allow-pickle")
    assert "only plain containers" in message
    assert not (tmp_path / "ran").exists()


def test_the_file_of_melds_authors_is_enough(tmp_path, capsys):
    folder = tmp_path / "meld-process"
    folder.mkdir()
    header = ["Sr No.", "Utterance", "Speaker", "Emotion", "Dialogue_ID", "Utterance_ID"]
    rows = [("1", "Why do all you\u2019re \u201cquoting\u201d, now?", "Ross", "surprise", 0, 0)]
    write_rows(folder / "test_sent_emo.csv", header, [*rows, ("2", "Oh", "Joey", "joy", 0, 1)])
    out = tmp_path / "meld.csv"
    run("--set=meld", "--root", folder, "--out", out)
    assert subtitles_of(out) == {
        "test_dia0_utt0": "Why do all you\u2019re \u201cquoting\u201d, now?",
        "test_dia0_utt1": "Oh",
    }
    assert read_truth(out, "basic").values == ("surprise", "joy")
    assert "column Utterance" in capsys.readouterr().out


def test_melds_clips_are_found_as_its_authors_ship_them(tmp_path, capsys):
    folder = tmp_path / "MELD.Raw"
    header = ["Utterance", "Emotion", "Dialogue_ID", "Utterance_ID"]
    rows = [("Oh", "joy", 0, 0), ("No", "anger", 0, 1), ("Who", "fear", 38, 4)]
    (folder / "output_repeated_splits_test").mkdir(parents=True)
    write_rows(folder / "test_sent_emo.csv", header, rows)
    for file in ("dia0_utt0.mp4", "dia0_utt1.mp4", "final_videos_testdia0_utt1.mp4", "._x.mp4"):
        (folder / "output_repeated_splits_test" / file).touch()
    run("--set=meld", "--root", tmp_path, "--out", tmp_path / "meld.csv")
    told = capsys.readouterr().out
    place = folder / "output_repeated_splits_test"
    for line in (
        f"video in {place}: 2 are found by other names, as 'dia0_utt0' for 'test_dia0_utt0'",
        f"1 clip without video in {place}: 'test_dia38_utt4'",
        f"1 files in {place} belong to no clip: 'final_videos_testdia0_utt1'",
    ):
        assert f"  {line}\n" in told


@pytest.mark.parametrize(
    ("names", "present", "found"),
    [
        (["a", "b"], ["a", "c"], {"a": "a"}),
        (["test_d1", "test_d2"], ["d1", "d2"], {"test_d1": "d1", "test_d2": "d2"}),
        (["d1", "d11"], ["x_d1", "x_d11"], {"d1": "x_d1", "d11": "x_d11"}),
        (["Ses05F", "Ses05M"], ["ses05f", "SES05M"], {"Ses05F": "ses05f", "Ses05M": "SES05M"}),
        # What stands in front may be a part of a number, so that these are others.
        (["1", "2"], ["11", "12", "21"], {}),
        (["a1"], ["b2"], {}),
        (["a"], [], {}),
    ],
)  # fmt: skip
def test_names_are_matched_by_what_is_there(names, present, found):
    matched, how = match_names(names, present)
    assert matched == found
    assert bool(how) == any(name != other for name, other in found.items())


def test_everything_missing_is_told_by_name_and_number(tmp_path, capsys):
    publish(tmp_path, "mosi", subtitles=False)
    folder = tmp_path / "cmumosi-process"
    labels = {n: {"emo": 0, "val": v} for n, v in {"a": 1, "b": -7.5, "c": 0}.items()}
    write_npz(folder / "label.npz", test_corpus=labels)
    rows = [("a", "words"), ("b", " ")]
    write_rows(folder / "transcription-engchi-polish.csv", ["name", "english"], rows)
    for path in ("subaudio/a.WAV", "subaudio/b.wav", "subvideo/c.avi", "openface_face/b.npy"):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).touch()
    (folder / "openface_face" / "a").mkdir()
    (folder / "openface_face" / "a" / "a.npy").touch()
    run("--set=mosi", "--root", folder, "--out", tmp_path / "t.csv", "--allow-pickle")
    told = capsys.readouterr().out
    for line in (
        "size: 3 clips, published 686",
        "valence: -7.5 to 1; 1 positive, 1 negative, 1 zero, which are not scored",
        "1 clip without a subtitle: 'c'",
        "1 clip with an empty subtitle: 'b'",
        "1 clip with a valence outside -3 to 3: 'b'",
        f"1 clip without audio in {folder / 'subaudio'}: 'c'",
        f"2 clips without video in {folder / 'subvideo'}: 'a', 'b'",
        f"1 clip without face in {folder / 'openface_face'}: 'c'",
    ):
        assert f"  {line}\n" in told
    assert subtitles_of(tmp_path / "t.csv") == {"a": "words", "b": "", "c": ""}


def test_a_set_without_subtitles_and_media_is_told(tmp_path, capsys):
    publish(tmp_path, "ovmerdplus", subtitles=False)
    run("--set=ovmerdplus", "--root", tmp_path, "--out", tmp_path / "t.csv")
    told = capsys.readouterr().out
    assert "subtitle_eng.csv, so that all clips are without a subtitle" in told
    assert f"no folder {tmp_path / 'ovmerdplus-process' / 'video'}" in told


def test_a_full_set_draws_no_remark_about_its_size(tmp_path, capsys):
    folder = tmp_path / "ovmerd"
    folder.mkdir()
    rows = [(f"c{n}", "[happy, sad]") for n in range(332)]
    write_rows(folder / "track2_train_ovmerd.csv", ["name", "openset"], rows)
    run("--set=ovmerd", "--root", tmp_path, "--out", tmp_path / "t.csv")
    told = capsys.readouterr().out
    assert "332 clips of" in told and "size:" not in told
    assert "openset: 2.00 labels per clip, 2 different: 'happy' 332, 'sad' 332" in told


def test_all_sets_below_a_root(tmp_path, capsys):
    for key in ("mer2023", "meld", "sims", "ovmerdplus"):
        publish(tmp_path / "data", key)
    run("--all", "--root", tmp_path / "data", "--out", tmp_path / "truth", "--allow-pickle")
    written = {path.name for path in (tmp_path / "truth").iterdir()}
    assert written == {"mer2023.csv", "meld.csv", "sims.csv", "ovmerdplus.csv"}
    assert "IEMOCAP: not found (label_4way.npz)" in capsys.readouterr().out
    # One set's own folder is not all sets, though five of them call their label file the same.
    meld = tmp_path / "data" / "meld-process"
    assert "found no" in failure("--all", "--root", meld, "--out", tmp_path, "--allow-pickle")


def test_trouble_is_one_sentence(tmp_path):
    out = tmp_path / "t.csv"
    assert failure("--set=meld", "--root", tmp_path / "no", "--out", out).startswith(
        f"error: --root={tmp_path / 'no'}: found no test_sent_emo.csv or label.npz there"
    )
    publish(tmp_path, "ovmerd")
    folder = tmp_path / "mer2025-dataset"
    arguments = ("--set=ovmerd", "--root", folder)
    message = failure(*arguments, "--out", folder)
    assert message == f"error: --out={folder} cannot be written: Is a directory"
    write_rows(
        folder / "subtitle_chieng.csv", ["name", "english"], [("clip_0", "a"), ("clip_0", "b")]
    )
    assert "two subtitles for 'clip_0'" in failure(*arguments, "--out", out)
    write_rows(folder / "subtitle_chieng.csv", ["name", "chinese"], [("clip_0", "a")])
    assert "no column 'english'" in failure(*arguments, "--out", out)
    write_npz(tmp_path / "label_4way.npz", test_corpus={"a": {"emo": 1}})
    message = failure("--set=iemocap", "--root", tmp_path, "--out", out, "--allow-pickle")
    assert "no array whole_corpus" in message
    lone = {"\ud800": {"emo": "sad"}}
    write_npz(tmp_path / "label-6way.npz", test1_corpus=lone)
    message = failure("--set=mer2023", "--root", tmp_path, "--out", out, "--allow-pickle")
    assert message.startswith("error: ")
    assert not out.exists()


def test_the_command_loads_no_accelerator(tmp_path):
    publish(tmp_path, "ovmerd")
    code = """
import sys
from affectgpt_jax.labels import main
main(sys.argv[1:])
heavy = {"jax", "jaxlib", "flax", "torch", "pandas", "matplotlib", "absl"} & set(sys.modules)
sys.exit(f"loaded {heavy}" if heavy else 0)
"""
    command = [sys.executable, "-c", code, "--set=ovmerd", f"--root={tmp_path}"]
    command.append(f"--out={tmp_path / 't.csv'}")
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
