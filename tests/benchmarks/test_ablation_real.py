import re
import shlex

import numpy as np
import pytest

from affectgpt_jax.config import parse_command_line
from affectgpt_jax.data.records import Record, write_records
from affectgpt_jax.report import parse_arguments as parse_report
from benchmarks.ablation_real import TABLES, main
from data_prep.caption import __main__ as caption


def write(folder, names, encoder="clip", width=4):
    features = {"face": np.ones((2, width), np.float16), "audio": np.ones((2, 6), np.float16)}
    records = [Record(name=name, features=features) for name in names]
    write_records(folder, records, encoders={"face": encoder, "audio": "hubert"})


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
    note, *lines = capsys.readouterr().out.splitlines()
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
    for name in ("t3-llava", "t3-wavcaps", "t3-wavcaps-emotion"):
        write(sets / "records" / name, "ab")
    run(sets, table="3")
    made = [x for x in capsys.readouterr().out.splitlines() if " is made by: " in x]
    [(_, _, command)] = [line.partition(" is made by: ") for line in made]
    assert made[0].startswith("# t3-llava-emotion is made by: affectgpt caption labels ")
    arguments = caption.parse_arguments(shlex.split(command)[2:])
    assert arguments.records == sets / "records" / "t3-llava"
    assert arguments.write == sets / "records" / "t3-llava-emotion"


def test_rows_are_those_of_the_paper():
    assert len(TABLES["3"]) == 14 and len(TABLES["4"]) == 5 and len(TABLES["fig4"]) == 6
