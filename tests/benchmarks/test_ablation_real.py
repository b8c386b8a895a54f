import re
import shlex
import shutil

import numpy as np
import pytest

from affectgpt_jax.config import parse_command_line
from affectgpt_jax.data.records import Record, write_records
from affectgpt_jax.evaluate import parse_arguments as parse_evaluation
from affectgpt_jax.report import parse_arguments as parse_report
from benchmarks.ablation_real import TABLES, main
from data_prep.caption import __main__ as caption


def write(
    folder, names, encoder="clip", width=4, sound="hubert", features=("face", "audio"), files=()
):
    widths = {"face": width, "frame": width, "image": width, "audio": 6}
    arrays = {feature: np.ones((2, widths[feature]), np.float16) for feature in features}
    records = [Record(name=name, features=arrays) for name in names]
    encoders = {feature: sound if feature == "audio" else encoder for feature in features}
    write_records(folder, records, encoders=encoders)
    if files:
        lines = [f"{name},ok,{digest}" for name, digest in zip(names, files, strict=True)]
        (folder / "extraction.csv").write_text("\n".join(["name,status,sha256", *lines]) + "\n")


@pytest.fixture
def sets(tmp_path):
    for row, names in (("none", "abcd"), ("low", "abc"), ("plus", "ab")):
        write(tmp_path / "records" / f"t4-{row}", names)
    return tmp_path


def run(folder, *arguments, table="4"):
    main([f"--table={table}", "--llm=tiny", f"--records={folder / 'records'}",
          f"--workdir={folder / 'runs'}", *arguments])  # fmt: skip


def test_every_run_sees_as_many_clips_and_stands_in_the_report(sets, capsys):
    run(sets, "--batch-size=96", "--share=0.5")
    lines = capsys.readouterr().out.splitlines()
    *notes, note = [line for line in lines if line.startswith("#")]
    nothing = "not checked, since records/unibench has no records yet"
    assert notes == [f"# leaks of t4-{name}: {nothing}" for name in ("none", "low", "plus")]
    assert note == "# left out, without records: t4-low-e, t4-low-s"
    train = [shlex.split(line) for line in lines if line.startswith("sbatch")]
    assert len(train) == 3
    for words, name in zip(train, ("none", "low", "plus"), strict=True):
        config, flags = parse_command_line(words[2:])
        assert (config.batch_size, config.steps) == (96, 450_000 // 96)
        assert (config.projectors.video_width, config.projectors.audio_width) == (4, 6)
        assert config.data.train == str(sets / "records" / f"t4-{name}")
        assert flags.workdir == sets / "runs" / name
    evaluations = [line for line in lines if line.startswith("affectgpt evaluate")]
    assert len(evaluations) == 3
    report = parse_report(shlex.split(lines[-1])[2:])
    assert report.ablation == "4" and len(report.runs) == 3


@pytest.mark.parametrize(
    ("change", "arguments", "told"),
    [
        (lambda f: write(f / "records" / "t4-low-e", "ab", "siglip"), (), "with the same encoders"),
        (lambda f: write(f / "test", "bxy"), ("--against={}/test",), "has 1 clips of .*test: 'b'"),
        (lambda f: None, ("--share=2",), "--share above 0 and at most 1"),
    ],
)
def test_what_cannot_be_compared_is_refused(change, arguments, told, sets, capsys):
    change(sets)
    with pytest.raises(SystemExit) as ended:
        run(sets, *(argument.format(sets) for argument in arguments))
    assert re.search(told, f"{ended.value.code}{capsys.readouterr().err}")


def test_clips_of_the_tests_are_found_by_their_files_else_by_name(tmp_path, capsys):
    for name, files in (("none", "123"), ("plus", "124")):
        write(tmp_path / "records" / f"t4-{name}", "abc", files=files)
    tests = tmp_path / "tests"
    # Another clip of the same name, as its file tells.
    write(tests / "mer2024", "axy", files="789")
    run(tmp_path, f"--tests={tests}")
    said = capsys.readouterr().out
    assert f"# leaks of t4-none from {tests / 'mer2024'}: none, by the hashes of their file" in said
    # The same file under another name, in any folder.
    write(tests / "more" / "mine", "vwz", files="564")
    with pytest.raises(SystemExit, match="t4-plus has 1 clips of .*more/mine: 'c'"):
        run(tmp_path, f"--tests={tests}")
    # Without hashes, and with features that tell nothing, names count.
    (tests / "more" / "mine" / "extraction.csv").unlink()
    run(tmp_path, f"--tests={tests}")
    nothing = "none by name; not checked by content, none in common"
    assert f"t4-plus from {tests / 'more' / 'mine'}: {nothing}" in capsys.readouterr().out
    (tests / "mer2024" / "extraction.csv").unlink()
    with pytest.raises(SystemExit, match="t4-none has 1 clips of .*mer2024: 'a'"):
        run(tmp_path, f"--tests={tests}")


def test_rows_are_asked_about_tests_that_have_what_they_see(tmp_path, capsys):
    records, tests = tmp_path / "records", tmp_path / "tests"
    write(records / "t3-emovit", "ab", features=("image",))
    write(records / "t3-llava", "cd", features=("image",))
    write(records / "t3-videochat", "ef", features=("frame",))
    write(records / "t3-wavcaps", "gh", features=("audio",))
    write(records / "t3-mafw", "ij")
    write(tests / "mer2024", "xy", features=("face", "frame", "audio"))
    run(tmp_path, f"--tests={tests}", table="3")
    lines = capsys.readouterr().out.splitlines()
    left_out = "since the tests lack what they see: t3-llava (image), t3-emovit (image)"
    assert f"# left out, {left_out}" in lines
    asked = [shlex.split(line)[2:] for line in lines if line.startswith("affectgpt evaluate")]
    assert [parse_evaluation(words).question for words in asked] == ["description"] * 2 + [None]
    assert len(parse_report(shlex.split(lines[-1])[2:]).runs) == 3

    write(records / "t4-none", "kl", sound="wavlm")
    with pytest.raises(SystemExit, match="t4-none has the feature audio of wavlm, and t3-wavcaps"):
        run(tmp_path, f"--tests={tests}", table="3")


def test_rows_of_figure_4_have_tests_and_encoders_of_their_own(tmp_path, capsys):
    records, tests = tmp_path / "records", tmp_path / "tests"
    write(records / "f4-clip", "abc")
    write(records / "f4-wavlm", "abc", sound="wavlm")
    with pytest.raises(SystemExit):
        run(tmp_path, f"--tests={tests}", table="fig4")
    assert "put {row} into the path" in capsys.readouterr().err
    for row, sound in (("clip", "hubert"), ("wavlm", "wavlm")):
        write(tests / row / "mer2024", "xyz", sound=sound)
    run(tmp_path, f"--tests={tests}/{{row}}", table="fig4")
    said = capsys.readouterr().out
    assert f"--workdir={tmp_path / 'runs' / 'wavlm'} --root={tests / 'wavlm'}" in said
    assert "warning" not in said
    # As wide as the row's own, and of another encoder.
    shutil.rmtree(tests / "wavlm")
    write(tests / "wavlm" / "mer2024", "xyz")
    run(tmp_path, f"--tests={tests}/{{row}}", table="fig4")
    assert "are of the encoder 'hubert', but those of the training" in capsys.readouterr().out
    write(records / "f4-data2vec", "abc", sound="wavlm")
    with pytest.raises(SystemExit, match="f4-wavlm and f4-data2vec have the same encoders"):
        run(tmp_path, table="fig4")


def test_encoders_are_compared_on_the_same_clips(sets, capsys):
    write(sets / "records" / "f4-clip", "abc")
    write(sets / "records" / "f4-siglip", "abc", "siglip", 5)
    run(sets, table="fig4")
    assert "--config.projectors.video_width=5" in capsys.readouterr().out
    write(sets / "records" / "f4-dinov2", "ab", "dinov2")
    with pytest.raises(SystemExit, match="f4-dinov2 and f4-clip have other clips: 'c'"):
        run(sets, table="fig4")
    with pytest.raises(SystemExit, match="has records of 0 of the rows of 3"):
        main(["--table=3", "--llm=x", f"--records={sets / 'runs'}", "--workdir=w"])


def test_pairs_that_name_an_emotion_are_told_how_to_be_made(sets, capsys):
    for name in ("t3-videochat", "t3-wavcaps", "t3-wavcaps-emotion"):
        feature = "frame" if name == "t3-videochat" else "audio"
        write(sets / "records" / name, "ab", features=(feature,))
    run(sets, table="3")
    made = [x for x in capsys.readouterr().out.splitlines() if " is made by: " in x]
    [(_, _, command)] = [line.partition(" is made by: ") for line in made]
    assert made[0].startswith("# t3-videochat-emotion is made by: affectgpt caption labels ")
    arguments = caption.parse_arguments(shlex.split(command)[2:])
    assert arguments.records == sets / "records" / "t3-videochat"
    assert arguments.write == sets / "records" / "t3-videochat-emotion"


def test_rows_are_those_of_the_paper():
    assert len(TABLES["3"]) == 14 and len(TABLES["4"]) == 5 and len(TABLES["fig4"]) == 6
