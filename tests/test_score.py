import io
import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pytest

from affectgpt_jax.score import main

SHARED = Path(__file__).parents[1].parent / "shared"
LEXICON = {
    "lexicon.json": '{"name": "by hand", "version": "1", "sources": []}',
    "wheels.csv": "wheel,level1,level2,level3\n"
    + "".join(f"{k},{a},{b},{c}\n" for k in range(1, 6) for a, b, c in ["ABC", "DEF", "DGH"]),
    "synonyms.csv": "word,synonym\na,happy\nf,sad\nh,angry\n",
    "forms.csv": "name,form\nhappy,happily\nsad,sadly\n",
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def lexicon(tmp_path):
    directory = tmp_path / "lexicon"
    directory.mkdir()
    for name, text in LEXICON.items():
        (directory / name).write_text(text, encoding="utf-8")
    return directory


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def score(task, predictions, truth, *more):
    files = predictions if isinstance(predictions, list) else [predictions]
    main([f"--task={task}", "--predictions", *map(str, files), f"--truth={truth}", *map(str, more)])


def failure(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        score(*arguments)
    return str(stop.value)


def test_the_published_score_comes_out(capsys, tmp_path):
    if not (SHARED / "emotion_wheel").is_dir():
        pytest.skip("the official lexicon is not here")
    report = tmp_path / "report.json"
    score(
        "fine",
        SHARED / "reference" / "ov_merd_baseline.csv",
        SHARED / "reference" / "ov_merd_truth.csv",
        f"--lexicon={SHARED / 'emotion_wheel'}",
        f"--json={report}",
    )
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["mean", "55.37", "55.94", "54.85"] in lines
    clips = [line[5] for line in lines if line[:1] == ["wheel"]]
    assert clips == ["327", "328", "324", "327", "316"]
    [result] = json.loads(report.read_text())["results"]
    assert round(result["values"]["f"], 4) == 0.5537
    assert result["lexicon"]["name"] == "official emotion wheels"
    assert result["intervals"]["f"]["low"] < 0.5537 < result["intervals"]["f"]["high"]


def test_the_report_names_lexicon_and_everything_odd(capsys, tmp_path, lexicon):
    predictions = write(
        tmp_path / "p.jsonl",
        "\n".join(
            json.dumps({"name": n, "labels": v})
            for n, v in [("a", ["happily", "zebra"]), ("b", []), ("x", ["sad"])]
        ),
    )
    truth = write(tmp_path / "t.csv", "name,emotion\na,happy\nb,sad\nc,angry\n")
    report = tmp_path / "r.json"
    more = f"--lexicon={lexicon}", "--missing=empty", f"--json={report}", "--bootstrap=50"
    score("basic", predictions, truth, *more)
    out = capsys.readouterr().out
    assert "lexicon: by hand 1 (sha256 " in out
    assert "1 clip without a prediction, scored as empty: 'c'" in out
    assert "1 clip predicted but not in the truth, left out: 'x'" in out
    assert "1 clip with an empty prediction: 'b'" in out
    assert "unknown predicted words: 'zebra' x 1" in out
    assert ["mean", "33.33"] in [line.split() for line in out.splitlines()]
    found = json.loads(report.read_text())
    assert found["settings"] == {
        "task": "basic",
        "level": 1,
        "missing": "empty",
        "bootstrap": 50,
        "seed": 0,
    }
    [result] = found["results"]
    assert result["counts"]["unknown_predicted"] == {"zebra": 1}
    assert {f["what"].split(",")[0]: f["clips"] for f in result["findings"]}[
        "without a prediction"
    ] == ["c"]


def test_labels_that_no_lexicon_knows_come_with_a_warning_before_the_score(
    capsys, tmp_path, lexicon
):
    truth = write(tmp_path / "t.csv", "name,emotion\na,happy\nb,sad\n")
    glued = [{"name": n, "labels": ["happy und sad"]} for n in "ab"]
    predictions = write(tmp_path / "p.jsonl", "".join(json.dumps(x) + "\n" for x in glued))
    score("basic", predictions, truth, f"--lexicon={lexicon}", "--bootstrap=0")
    out = capsys.readouterr().out
    told = (
        "the lexicon does not know most of the predicted labels (100.0%), such as 'happy und sad'"
    )
    assert f"warning: {told}" in out
    assert "'happy und sad' x 2; 2 of 2 labels (100.0%)" in out
    assert out.index("unknown predicted") < out.index("warning: ") < out.index("hit rate")


@pytest.mark.parametrize(
    "text", ["happy\uff0csad", "[happy; sad]", '{"emotions": ["happy"]}', "1. happy"]
)
def test_labels_in_any_form_count(capsys, tmp_path, lexicon, text):
    truth = write(tmp_path / "t.csv", "name,emotion\na,happy\n")
    predictions = write(tmp_path / "p.jsonl", json.dumps({"name": "a", "openset": text}) + "\n")
    score("basic", predictions, truth, f"--lexicon={lexicon}", "--bootstrap=0")
    assert ["mean", "100.00"] in [line.split() for line in capsys.readouterr().out.splitlines()]


def test_missing_predictions_stop_unless_said_otherwise(capsys, tmp_path, lexicon):
    predictions = write(tmp_path / "p.csv", "name,openset\na,happy\n")
    truth = write(tmp_path / "t.csv", "name,emotion\na,happy\nb,sad\n")
    message = failure(capsys, "basic", predictions, truth, f"--lexicon={lexicon}")
    assert message.startswith("error: ") and "no prediction of 1 clip" in message
    assert "--missing=empty" in message


def test_levels_differ(capsys, tmp_path, lexicon):
    # "angry" and "sad" are both of "d", but of different children of it.
    predictions = write(tmp_path / "p.csv", "name,openset\na,angry\n")
    truth = write(tmp_path / "t.csv", "name,openset\na,sad\n")
    for level, expected in ((1, "100.00"), (2, "0.00")):
        score("fine", predictions, truth, f"--lexicon={lexicon}", f"--level={level}")
        out = capsys.readouterr().out
        assert ["mean", *[expected] * 3] in [line.split() for line in out.splitlines()]


def test_sentiment_needs_no_lexicon(capsys, tmp_path):
    path = tmp_path / "x-openset-sentiment.npz"
    np.savez(path, filenames=["a", "b", "c"], fileitems=["positive", "neutral", "positive"])
    truth = write(tmp_path / "t.csv", "name,valence\na,1.0\nb,-0.2\nc,0\n")
    score("sentiment", path, truth)
    out = capsys.readouterr().out
    assert ["score", "100.00", "100.00"] in [line.split() for line in out.splitlines()]
    assert "2 clips scored, the others have valence 0" in out
    assert "lexicon" not in out


def test_preferences_need_no_lexicon(capsys, tmp_path):
    predictions = write(tmp_path / "p.csv", "name,preference\na,a1\nb,a2\nc,a1\n")
    truth = write(tmp_path / "t.csv", "name,preference\na,a1\nb,a2\nc,same\n")
    score("preference", predictions, truth)
    out = capsys.readouterr().out
    assert ["score", "100.00", "100.00"] in [line.split() for line in out.splitlines()]
    assert "2 clips scored, the others prefer neither" in out


def test_several_pairs_of_a_clip_are_told_apart_as_records_tell_them(capsys, tmp_path):
    lines = ["s,a1", "s#2,a2", "t,a1"]
    predictions = write(tmp_path / "p.csv", "\n".join(["name,preference", *lines]) + "\n")
    rows = "s,x,y,a1\ns,x,z,a2\nt,p,q,a2\n"
    truth = write(tmp_path / "track3_emoprefer.csv", "name,a1,a2,preference\n" + rows)
    score("preference", predictions, truth)
    out = capsys.readouterr().out
    assert "3 clips scored" in out and "called NAME#2, ...: 's#2'" in out
    write(tmp_path / "twice.csv", "name,openset\ns,sad\ns,happy\n")
    with pytest.raises(SystemExit, match="1 clip more than once"):
        score("fine", tmp_path / "twice.csv", tmp_path / "twice.csv")


def test_several_files_show_both_protocols(capsys, tmp_path, lexicon):
    truth = write(tmp_path / "t.csv", "name,emotion\n" + "".join(f"c{n},sad\n" for n in range(60)))
    files = []
    for epoch, right in ((30, 20), (40, 50), (60, 30)):
        lines = (f"c{n},{'sad' if n < right else 'happy'}\n" for n in range(60))
        files.append(write(tmp_path / f"{epoch}.csv", "name,openset\n" + "".join(lines)))
    report = tmp_path / "r.json"
    score("basic", files, truth, f"--lexicon={lexicon}", f"--json={report}")
    out = capsys.readouterr().out
    assert f"fixed checkpoint: 50.00 ({files[2]})" in out
    assert f"best of 3, chosen on the test set: 83.33 ({files[1]})" in out
    assert f"{files[1]} minus the fixed one: +33.33" in out
    found = json.loads(report.read_text())
    assert found["protocols"]["chosen_on_test"] is True
    assert found["results"][1]["against_fixed"]["p_value"] < 0.01
    assert found["results"][2]["against_fixed"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task=fine"], "required: --predictions, --truth"),
        (["--task=other", "--predictions=p", "--truth=t"], "invalid choice: 'other'"),
        (["--task=fine", "--predictions=p", "--truth=t", "--seed=-1"], "must be 0 or more"),
        (["--task=fine", "--predictions", "p", "p", "--truth=t"], "names a file twice"),
        (["--task=sentiment", "--predictions=p", "--truth=t", "--lexicon=d"], "has no part in"),
        (["--task=words", "--predictions=p", "--truth=t", "--level=1"], "--level has no part in"),
    ],
)
def test_a_wrong_command_line_is_refused(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_report_that_cannot_be_written_is_named(capsys, tmp_path):
    predictions = write(tmp_path / "p.csv", "name,sentiment\na,positive\n")
    truth = write(tmp_path / "t.csv", "name,valence\na,1\n")
    message = failure(capsys, "sentiment", predictions, truth, f"--json={tmp_path}")
    assert message == f"error: --json={tmp_path} cannot be written: Is a directory"
    (tmp_path / "link.json").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "loop.json").symlink_to(predictions)
    for link in ("link.json", "loop.json"):
        message = failure(capsys, "sentiment", predictions, truth, f"--json={tmp_path / link}")
        assert "a link stands there, which is not followed" in message
    assert not (tmp_path / "elsewhere").exists()


def test_json_goes_to_standard_output_and_into_pipes(tmp_path, capsys):
    predictions = write(tmp_path / "p.jsonl", '{"name": "a", "sentiment": "positive"}\n')
    truth = write(tmp_path / "t.jsonl", '{"name": "a", "valence": 2}\n')
    files = (f"--predictions={predictions}", f"--truth={truth}", "--task=sentiment")
    main([*files, f"--json={tmp_path / 'r.json'}"])
    table, expected = capsys.readouterr().out, json.loads((tmp_path / "r.json").read_text())
    for place in ("-", "/dev/stdout"):
        main([*files, f"--json={place}"])
        out, err = capsys.readouterr()
        assert json.loads(out) == expected and err == table
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(fifo.read_text)
        main([*files, f"--json={fifo}"])
        assert json.loads(read.result()) == expected
    assert capsys.readouterr().out == table and fifo.is_fifo()


def test_the_command_loads_no_accelerator_and_survives_a_plain_terminal(tmp_path, lexicon):
    write(tmp_path / "p.jsonl", '{"name": "\\ud800", "labels": ["\\ud800\u4f60", "sad"]}')
    write(tmp_path / "t.jsonl", '{"name": "\\ud800", "emotion": "sad"}')
    code = """
import sys
from affectgpt_jax.score import main
main(sys.argv[1:])
heavy = {"jax", "jaxlib", "flax", "torch", "pandas", "scipy", "transformers", "absl"}
sys.exit(f"loaded {heavy & set(sys.modules)}" if heavy & set(sys.modules) else 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "--task=basic", "--predictions", str(tmp_path / "p.jsonl")]
        + [f"--truth={tmp_path / 't.jsonl'}", f"--lexicon={lexicon}"],
        capture_output=True,
        text=True,
        env={"PYTHONIOENCODING": "ascii", "XDG_CACHE_HOME": str(tmp_path)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "mean" in done.stdout and "100.00" in done.stdout


def test_of_other_packages_the_metrics_import_numpy_alone():
    modules = "affectgpt_jax.evaluation.metrics, affectgpt_jax.evaluation.readers"
    code = f"import sys; old = set(sys.modules); import {modules}; print(*set(sys.modules) - old)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert "numpy" in loaded
    assert loaded & set(packages_distributions()) <= {"numpy", "affectgpt_jax"}


# Pieces that files are made of: whole ones, near misses and noise.
PIECES = (
    *("name", "openset", "emotion", "valence", "labels", "text", "sentiment", "a", "b", "c"),
    *(
        "happy",
        "sad",
        "['happy', 'sad']",
        "[happy, sad]",
        "nan",
        "NaN",
        "inf",
        "-1.5",
        "0",
        "1e999",
    ),
    *(
        ",",
        '"',
        "'",
        "[",
        "]",
        "{",
        "}",
        ":",
        "\n",
        "\r\n",
        "\r",
        "\t",
        " ",
        "\0",
        "\ufeff",
        "\u2028",
    ),
    *("null", "true", "[]", "{}", '""', "\\", "\\ud800", "\\u0000", "你好", "🙂", "é", "x" * 2000),
    '{"name": "a", "labels": ["happy"]}\n',
    '{"name": "b", "openset": "[sad]"}\n',
    '{"name": "a", "emotion": "sad"}\n',
    '{"name": "a", "valence": 1}\n',
    "name,openset\n",
    "name,emotion\n",
    "name,valence\n",
    "Dialogue_ID,Utterance_ID,Emotion\n",
    "a,happy\n",
    "b,sad\n",
    "a,1\n",
    '0,1,"joy"\n',
)
WHOLE = {
    ("fine", ".csv"): "name,openset\na,\"['happy', 'sad']\"\nb,[sad]\n",
    ("basic", ".csv"): "name,emotion\na,happy\nb,sad\n",
    ("sentiment", ".csv"): "name,valence\na,1\nb,-1\n",
    ("fine", ".jsonl"): '{"name": "a", "openset": ["sad"]}\n{"name": "b", "openset": "happy"}\n',
    ("basic", ".jsonl"): '{"name": "a", "emotion": "sad"}\n{"name": "b", "emotion": "happy"}\n',
    ("sentiment", ".jsonl"): '{"name": "a", "valence": 2}\n{"name": "b", "valence": -0.5}\n',
    ("predictions", ".csv"): "name,openset\na,\"['happy', 'x']\"\nb,positive\n",
    ("predictions", ".jsonl"): '{"name": "a", "labels": ["sad"]}\n{"name": "b", "labels": []}\n',
}


def spoil(source: random.Random, data: bytes) -> bytes:
    """The bytes of a file after a few accidents."""
    for _ in range(source.choice([0, 1, 1, 2, 4])):
        start = source.randrange(len(data) + 1)
        end = min(len(data), start + source.choice([0, 1, 3, 30]))
        piece = source.choice(PIECES).encode() * source.choice([1, 1, 1, 3])
        match source.randrange(7):
            case 0:
                data = data[:start] + piece + data[end:]
            case 1:
                data = data[:start] + data[end:]
            case 2:
                data = data[:start] + source.randbytes(3) + data[end:]
            case 3:
                data = data + data[start:end] + data[start:]
            case 4:
                data = data[:start]
            case 5:
                data = b"".join(source.choice(PIECES).encode() for _ in range(30))
            case 6 if len(data) < 5000:
                codec = source.choice(["utf-16", "utf-8-sig", "gb18030", "cp037", "utf-8"])
                data = data.decode("utf-8", "replace").encode(codec, "replace")
    return data


def archive(source: random.Random, truth: bool) -> bytes:
    stream = io.BytesIO()
    value = source.choice([1, -0.5, "sad", None, float("nan"), [1], {"emo": 1}])
    if truth:
        key = source.choice(["test_corpus", "test1_corpus", "whole_corpus", "other"])
        np.savez(stream, **{key: {"a": {"emo": value, "val": value}, "b": {"emo": 0, "val": 1}}})
    else:
        items = source.choice([["sad", "happy"], ["[]"], [1, 2], [["sad", "x"], ["y", "z"]]])
        np.savez(stream, filenames=["a", "b"], fileitems=items)
    return stream.getvalue()


@pytest.mark.parametrize("task", ["fine", "basic", "sentiment"])
def test_any_file_gives_a_score_or_one_sentence(capsys, tmp_path, lexicon, task):
    scored, refused = 0, set()
    for case in range(400):
        source = random.Random(f"{task} {case}")
        paths = {}
        for side in ("predictions", task):
            suffix = source.choice([".csv", ".jsonl", ".npz"])
            data = (
                archive(source, side == task) if suffix == ".npz" else WHOLE[side, suffix].encode()
            )
            # Mostly one spoilt file, so that the other one does not stop everything first.
            if source.random() < 0.6:
                data = spoil(source, data)
            paths[side] = tmp_path / f"{side}{suffix}"
            paths[side].write_bytes(data)
        more = [] if task == "sentiment" else [f"--lexicon={lexicon}"]
        more += source.choice([["--missing=empty"], ["--allow-pickle"]])
        more += source.choice([["--allow-pickle"], ["--bootstrap=5"]])
        try:
            score(task, paths["predictions"], paths[task], *more, f"--json={tmp_path / 'r.json'}")
        except SystemExit as stop:
            message = str(stop.code)
            assert message.startswith("error: ") and "\n" not in message and len(message) < 900
            refused.add(message.replace(str(tmp_path), "")[:40])
        else:
            scored += 1
            capsys.readouterr()
            # JSON has no NaN, and neither has a score.
            json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)
    # Both ends are reached, by many roads.
    assert scored > 40 and len(refused) > 30


def test_words_need_no_lexicon_and_count_the_first_label(capsys, tmp_path):
    lines = [("a", ["happy", "sad"]), ("b", ["sad", "happy"]), ("c", [])]
    text = "".join(json.dumps({"name": n, "labels": v}) + "\n" for n, v in lines)
    predictions = write(tmp_path / "p.jsonl", text)
    truth = write(tmp_path / "t.csv", "name,emotion\na,happy\nb,happy\nc,sad\n")
    score("words", predictions, truth)
    out = capsys.readouterr().out
    assert ["score", "33.33"] in [line.split() for line in out.splitlines()]
    assert "3 clips scored\n" in out and "lexicon:" not in out
