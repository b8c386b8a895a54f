"""The evaluation command as a user runs it, on a run of one step and few clips."""

import contextlib
import dataclasses
import errno
import json
import os
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from affectgpt_jax import build, evaluate, inference
from affectgpt_jax.common.files import lock_file
from affectgpt_jax.common.identity import Identity, code_identity
from affectgpt_jax.config import ConfigError
from affectgpt_jax.configs import affectgpt_qwen25_7b
from affectgpt_jax.data import demo
from affectgpt_jax.data.records import write_records
from affectgpt_jax.evaluation import lexicon
from affectgpt_jax.evaluation.extract import label_message
from affectgpt_jax.models.generate import decode, prefill
from affectgpt_jax.report import parse_run

CLIPS = 12


def clips(**changes):
    return (
        dataclasses.replace(record, **changes) for record in demo.World(0).records("test", CLIPS)
    )


def write(directory, records):
    write_records(directory, records, encoders=dict.fromkeys(demo.DEFAULT_FEATURES, "demo"))
    return directory


@pytest.fixture
def run(trained_run, tmp_path):
    return shutil.copytree(trained_run, tmp_path / "run")


def command(run, *flags):
    evaluate.main([f"--workdir={run}", "--bootstrap=20", "--max-new-tokens=8", *map(str, flags)])


def folder(run):
    """Where the last evaluation went."""
    asked = run.glob(f"evaluate/**/{evaluate.ASKED_FILE}")
    return max(asked, key=lambda path: path.stat().st_mtime_ns).parent


def report(run):
    return json.loads((folder(run) / "report.json").read_text())


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def refusal(run, *flags):
    with pytest.raises(SystemExit) as stopped:
        command(run, *flags)
    message = str(stopped.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


@pytest.fixture
def says(monkeypatch):
    """Let the model write what a function makes of a clip's name; counts the clips asked about."""
    asked = []

    def install(text_of):
        def batches(self, trainable, dataset, question, feature_from=None):
            for number in reversed(range(len(dataset) * self.group)):
                clip, place = divmod(number, self.group)
                name = dataset.index[clip].name
                asked.append(name)
                text = text_of(name, place) if self.group > 1 else text_of(name)
                yield number, inference.Answer(text, 3, name.endswith("7"), None)

        monkeypatch.setattr(inference.Generator, "answers", batches)
        return asked

    return install


TRUTH = {r.name: r for r in demo.World(0).records("test", CLIPS)}


def test_a_run_is_evaluated_on_its_own_test_set_with_the_checkpoint_of_validation(run, capsys):
    command(run)
    out = capsys.readouterr().out
    best = json.loads((run / "result.json").read_text())["best_step"]
    [found] = report(run)["sets"]
    assert (found["name"], found["task"]) == ("test", "basic")
    assert [r["predictions"] for r in found["results"]] == [f"step {best}"]
    assert f"test, basic, {CLIPS} clips, step {best}: hit rate " in out
    for file in ("report.html", "report.md"):
        assert (run / "evaluate" / file).stat().st_size
    predictions = lines(run / "evaluate" / f"test-step-{best}.jsonl")
    # What training wrote about the same clips with the same checkpoint.
    trained = lines(run / "predictions.jsonl")
    assert [(p["name"], p["labels"]) for p in predictions] == [
        (p["name"], p["labels"]) for p in trained
    ]


def test_scores_are_those_of_what_the_model_says(run, says, capsys):
    """Right about two clips in three; the truth is the words themselves."""
    names = list(TRUTH)
    right = {name for number, name in enumerate(names) if number % 3}
    says(lambda name: f"They feel {TRUTH[name].emotion if name in right else 'zebra'}.")
    test = json.loads((run / "config.json").read_text())["data"]["test"]
    command(run, f"--set=mine:words={test}")
    [found] = report(run)["sets"]
    assert found["results"][0]["values"]["hit"] == pytest.approx(len(right) / CLIPS)
    cut = [name for name in names if name.endswith("7")]
    assert {"what": "whose answer was cut off", "count": 1, "clips": cut} in found["results"][0][
        "findings"
    ]
    assert f"1 clip whose answer was cut off: {cut[0]!r}" in capsys.readouterr().out


def test_descriptions_go_through_the_rules_and_sentiment_through_their_labels(run, says, tmp_path):
    says(lambda name: f"The face is not angry. They feel {TRUTH[name].emotion}.")
    test = json.loads((run / "config.json").read_text())["data"]["test"]
    sets = (f"--set=mine:words={test}", f"--set=signs:sentiment={test}")
    command(run, "--question=description", *sets)
    words, signs = report(run)["sets"]
    assert words["results"][0]["values"]["hit"] == 1
    [signs_file] = folder(run).glob("signs-step-?.jsonl")
    predictions = {p["name"]: p for p in lines(signs_file)}
    for name, record in TRUTH.items():
        if record.emotion in ("furious", "lonely", "ashamed", "terrified"):
            assert predictions[name]["sentiment"] == "negative"
        if record.emotion in ("joyful", "grateful", "content", "relieved"):
            assert predictions[name]["sentiment"] == "positive"
    assert {p["sentiment"] for p in predictions.values()} >= {"positive", "negative"}
    assert "rules 1 on the " in report(run)["system"]


def test_of_several_checkpoints_the_best_on_validation_is_the_fixed_one(run, says):
    says(lambda name: f"They feel {TRUTH[name].emotion}.")
    command(run, "--steps=all")
    best = json.loads((run / "result.json").read_text())["best_step"]
    [found] = report(run)["sets"]
    assert [r["predictions"] for r in found["results"]] == [f"step {3 - best}", f"step {best}"]
    assert found["protocols"]["fixed"] == f"step {best}"
    command(run, "--step", str(3 - best))
    assert report(run)["sets"][0]["protocols"]["fixed"] == f"step {3 - best}"


def test_another_evaluation_goes_beside_and_the_same_one_into_its_place(run, says, capsys):
    says(lambda name: f"They feel {TRUTH[name].emotion}.")
    place = run / "evaluate"
    command(run, "--max-clips=3")

    def files():
        found = (path for path in place.iterdir() if path.is_file())
        return {p.name: p.read_bytes() for p in found if p.name != evaluate.LOCK_FILE}

    first = files()
    assert "holds another evaluation" not in capsys.readouterr().out
    command(run)
    told = f"{place} holds another evaluation, which stays; this one goes to {place / '2'}\n"
    out = capsys.readouterr().out
    assert told in out and f"{place / '2'}: report.html, report.json" in out
    assert files() == first
    assert report(run)["sets"][0]["results"][0]["counts"]["clips"] == CLIPS
    for flags, where in (
        (["--max-clips=3"], place),
        ([], place / "2"),
        (["--seed=1"], place / "3"),
    ):
        command(run, *flags)
        assert folder(run) == where
    # All of them share answers, and one of them must be named for an ablation.
    assert not (place / "2" / "answers").exists()
    with pytest.raises(ValueError, match=f"holds several evaluations; name one: .*{place / '2'}"):
        parse_run(f"a={run}")
    assert parse_run(f"a={place / '2'}") == ("a", str(place / "2" / "report.json"))
    # Of those that were interrupted, there is no report.
    shutil.rmtree(place / "3")
    (place / "report.json").unlink()
    assert parse_run(f"a={run}") == ("a", str(place / "2" / "report.json"))
    (place / "2" / "report.json").unlink()
    assert parse_run(f"a={run}") == ("a", str(place / "report.json"))


def test_a_report_of_before_is_kept(run, says):
    says(lambda name: f"They feel {TRUTH[name].emotion}.")
    (run / "evaluate").mkdir()
    (run / "evaluate" / "report.json").write_text("{}")
    command(run)
    assert (run / "evaluate" / "report.json").read_text() == "{}"
    assert folder(run) == run / "evaluate" / "2"


def test_the_page_shows_the_training_and_what_was_known_of_each_example(run, says):
    says(lambda name: f"They feel {TRUTH[name].emotion}.")
    test = json.loads((run / "config.json").read_text())["data"]["test"]
    command(run, f"--set=mine:words={test}")
    page = (folder(run) / "report.html").read_text(encoding="utf-8")
    assert '<h2 id="training">' in page and 'aria-label="loss by step"' in page
    examples = report(run)["sets"][0]["examples"]
    for example in examples:
        clip, about = TRUTH[example["name"]], dict(example["about"])
        assert about["subtitle"] == clip.subtitle and about["described as"] == clip.description
        lacks = [name for name in ("audio", "face") if name not in clip.features]
        assert sorted(filter(None, about.get("without", "").split(", "))) == lacks
    # Nobody else has a score on these clips.
    assert "Otter" not in page
    # A run without its log, as one that was published, is evaluated as well.
    (run / "metrics.jsonl").unlink()
    command(run, f"--set=mine:words={test}", "--seed=3")
    page = (folder(run) / "report.html").read_text(encoding="utf-8")
    assert '<h2 id="training">' not in page


def test_one_process_at_a_time_evaluates_into_a_folder(run, says):
    asked = says(lambda name: "They feel calm.")
    (run / "evaluate").mkdir()
    with lock_file(run / "evaluate" / evaluate.LOCK_FILE, "it", ""):
        message = refusal(run)
    assert f"{run / 'evaluate'} is in use by process {os.getpid()} on " in message
    assert "or name another --out" in message and not asked


def test_what_nobody_knows_is_said_before_the_score(run, says, capsys):
    says(lambda name: "They feel good grief.")
    command(run)
    lines = capsys.readouterr().out.splitlines()
    (score,) = (i for i, line in enumerate(lines) if "hit rate" in line)
    (unknown,) = (i for i, line in enumerate(lines) if "unknown predicted words: " in line)
    (warning,) = (i for i, line in enumerate(lines) if line.startswith("warning: test: "))
    assert max(unknown, warning) < score
    assert f"'good grief' x {CLIPS}; {CLIPS} of {CLIPS} labels (100.0%)" in lines[unknown]
    assert "does not know most of the predicted labels (100.0%)" in lines[warning]


def test_a_second_run_asks_only_about_what_is_missing(run, says):
    asked = says(lambda name: f"They feel {TRUTH[name].emotion}.")
    command(run, "--max_clips=3")
    assert sorted(asked) == sorted(TRUTH)[:3]
    [file] = (run / "evaluate" / "answers").iterdir()
    file.write_bytes(file.read_bytes()[:-7])  # as a kill leaves it
    command(run)
    assert len(asked) == 3 + CLIPS - 2 and len(set(asked)) == CLIPS
    before = report(run)
    command(run)
    assert len(asked) == CLIPS + 1
    assert report(run) == before
    # Another limit, question or checkpoint is another answer.
    command(run, "--max-new-tokens=5", "--max-clips=3")
    assert len(asked) == CLIPS + 4
    assert len(list((run / "evaluate" / "answers").iterdir())) == 2


def test_answers_of_another_version_of_the_code_are_kept_and_said(run, says, monkeypatch, capsys):
    asked = says(lambda name: f"They feel {TRUTH[name].emotion}.")
    with monkeypatch.context() as upgraded:
        for module in (build, inference):
            upgraded.setattr(module, "code_identity", lambda: Identity("affectgpt_jax", "f" * 64))
        command(run, "--max-clips=3")
    capsys.readouterr()
    command(run)
    assert len(asked) == CLIPS, "an upgrade in the middle asks nothing anew"
    out = capsys.readouterr().out
    assert f"3 of {CLIPS} answers are of another version of the code" in out
    [file] = (run / "evaluate" / "answers").iterdir()
    codes = [line["code"] for line in lines(file)]
    assert codes == ["f" * 64] * 3 + [code_identity().sha256] * (CLIPS - 3)


def test_answers_of_a_run_that_has_been_trained_anew_are_not_used(run, says):
    asked = says(lambda name: f"They feel {TRUTH[name].emotion}.")
    command(run, "--step=2", "--max-clips=2")
    # Another training would leave another checkpoint of step 2; here, it is that of step 1.
    shutil.rmtree(run / "checkpoints" / "2")
    shutil.copytree(run / "checkpoints" / "1", run / "checkpoints" / "2")
    command(run, "--step=2", "--max-clips=2")
    assert len(asked) == 4
    assert len(list((run / "evaluate" / "answers").iterdir())) == 2


def test_sets_are_found_below_a_root_and_the_others_are_named(run, says, tmp_path, capsys):
    says(lambda name: f"They feel {TRUTH[name].emotion}.")
    root = tmp_path / "records"
    assert "found no records there; expected one or more of the folders mer2023, " in refusal(
        run, f"--root={root}"
    )
    for key in ("mer2023", "ovmerdplus"):
        write(root / key, clips())
    test = json.loads((run / "config.json").read_text())["data"]["test"]
    assert "'OV-MERD-' and 'OV-MERD+' would both be written to OV-MERD--step-STEP" in refusal(
        run, f"--root={root}", f"--set=OV-MERD-:words={test}"
    )
    command(run, f"--root={root}", f"--set=signs:sentiment={test}", f"--set=mer2023={test}")
    assert f"no records in {root} of mer2024, meld, iemocap, mosi, " in capsys.readouterr().out
    assert [(s["name"], s["task"]) for s in report(run)["sets"]] == [
        ("signs", "sentiment"), ("MER2023", "basic"), ("OV-MERD+", "fine"),
    ]  # fmt: skip
    # In the shape of Table 2, with the published systems beside.
    table = (run / "evaluate" / "report.md").read_text(encoding="utf-8")
    heads = next(line for line in table.splitlines() if line.startswith("| System"))
    assert heads.split(" | ")[2:5] == ["MER2023", "MER2024", "MELD"]
    assert "| AffectGPT | AVT | 78.54 | 78.80 |" in table and "missing: MER2024, MELD" in table


def test_samples_follow_from_the_seed_and_are_not_taken_for_other_answers(run):
    flags = ("--max-clips=4", "--temperature=2", "--top_p=0.9", "--repetition-penalty=1.2")
    said = []
    for seed, size in ((0, 4), (1, 4), (0, 2)):
        # Of a batch of another size, the same answers: the first file is used again.
        command(run, *flags, f"--seed={seed}", f"--batch-size={size}")
        [file] = folder(run).glob("test-step-?.jsonl")
        said.append([p["text"] for p in lines(file)])
    assert said[0] == said[2] != said[1]
    assert len(list((run / "evaluate" / "answers").iterdir())) == 2
    settings = "temperature 2, top p 0.9, repetition penalty 1.2, seed 0"
    assert settings in report(run)["system"]


def test_consensus_stands_beside_one_answer_with_the_difference_on_the_same_clips(
    run, says, capsys
):
    """One answer is wrong about each clip in two; of four samples three are right about it."""
    names = list(TRUTH)

    def write_answer(name, place=0):
        wrong = place == 0 and names.index(name) % 2
        return f"They feel {'zebra' if wrong else TRUTH[name].emotion}."

    asked = says(write_answer)
    test = json.loads((run / "config.json").read_text())["data"]["test"]
    flags = (f"--set=mine:basic={test}", "--consensus=4", "--top-p=0.95")
    command(run, *flags)
    assert len(asked) == (1 + 1 + 4) * CLIPS
    [found] = report(run)["sets"]
    best = json.loads((run / "result.json").read_text())["best_step"]
    rows = {row["predictions"]: row for row in found["results"]}
    ways = ("most probable", "one sample", "consensus of 4")
    assert list(rows) == [f"step {best}, {way}" for way in ways]
    *alone, agreed = rows.values()
    assert agreed["values"]["hit"] == 1
    for row in alone:
        assert row["values"]["hit"] < 0.8
        assert row["against_fixed"]["difference"] == row["values"]["hit"] - 1
    out = capsys.readouterr().out
    added = 100 * (1 - alone[0]["values"]["hit"])
    assert f"step {best}, most probable: {100 - added:.2f}, to which it adds {added:.2f} (" in out
    assert "best of 3" not in out
    assert "ovlabel, consensus of 4, temperature 1, top p 0.95" in report(run)["system"]
    predictions = lines(run / "evaluate" / f"mine-step-{best}-consensus-of-4.jsonl")
    assert [p["labels"] for p in predictions] == [[TRUTH[name].emotion] for name in names]
    # Half of a group is asked again, and only the rest is written.
    answers = (run / "evaluate" / "answers").iterdir()
    [file] = (file for file in answers if len(lines(file)) == 4 * CLIPS)
    whole = lines(file)
    file.write_text("".join(json.dumps(line) + "\n" for line in whole[:-3]))
    asked.clear()
    command(run, *flags)
    assert len(asked) == 4
    assert lines(file)[:-3] == whole[:-3] and len(lines(file)) == len(whole)
    assert report(run)["sets"] == [found]


def test_checkpoints_and_batches_share_one_program_for_each_prompt_length(run):
    """The run has one length; another limit of new tokens makes programs of its own."""
    counts = prefill._cache_size(), decode._cache_size()
    command(run, "--steps=all", "--batch-size=5", "--max-new-tokens=3")
    assert (prefill._cache_size(), decode._cache_size()) == (counts[0] + 1, counts[1] + 1)


def test_an_interrupted_run_says_that_it_goes_on(run, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(inference.Generator, "answers", interrupt)
    with pytest.raises(SystemExit) as end:
        command(run)
    assert end.value.code == 130
    assert capsys.readouterr().err == "interrupted; the same command goes on from there\n"


def test_the_llm_and_a_server_extract_and_are_not_asked_again(run, says, monkeypatch, capsys):
    says(lambda name: f"{name} feels {TRUTH[name].emotion}.")
    messages = []

    def answer(self, asked):
        for number, message in enumerate(asked):
            messages.append(message)
            name = message.split("Clues: ")[1].split()[0]
            yield number, f"[{TRUTH[name].emotion}]" if name != "demo-test-00003" else "Hm? Well."

    monkeypatch.setattr(evaluate.BaseChat, "answer", answer)
    monkeypatch.setattr(evaluate.ChatServer, "answer", answer)
    monkeypatch.setenv("MY_KEY", "sesame")
    test = json.loads((run / "config.json").read_text())["data"]["test"]
    flags = ["--question=description", f"--set=mine:words={test}"]
    server = ["--base-url=http://localhost:1/v1", "--model=qwen", "--api-key-env=MY_KEY"]
    for extractor in (["--extractor=llm"], ["--extractor=openai", *server]):
        for _ in range(2):
            command(run, *flags, *extractor)
        found = report(run)["sets"][0]["results"][0]
        assert found["values"]["hit"] == pytest.approx((CLIPS - 1) / CLIPS)
        unread = {f["what"]: f["clips"] for f in found["findings"]}
        assert unread["whose labels could not be extracted"] == ["demo-test-00003"]
    assert len(messages) == 2 * CLIPS
    assert messages[0] == label_message(
        f"demo-test-00000 feels {TRUTH['demo-test-00000'].emotion}."
    )
    written = "".join(p.read_text() for p in (run / "evaluate").rglob("*") if p.is_file())
    assert "sesame" not in written + capsys.readouterr().out


def test_another_lexicon_is_refused_unless_it_is_named_or_meant(run, says, tmp_path, monkeypatch):
    says(lambda name: f"They feel {TRUTH[name].emotion}.")
    other = shutil.copytree(lexicon.DEFAULT, tmp_path / "lexicon")
    with (other / "forms.csv").open("a") as file:
        file.write("calm,quietish\n")
    test = json.loads((run / "config.json").read_text())["data"]["test"]
    flags = [f"--set=mine:fine={test}", "--question=ovlabel"]
    command(run, *flags, f"--lexicon={other}")
    monkeypatch.setattr(lexicon, "DEFAULT", other)
    message = refusal(run, *flags)
    assert "checkpoints/2: lexicon: it was trained with" in message
    command(run, *flags, "--allow-other=lexicon")


def test_clips_without_a_truth_are_left_out_and_named(run, says, tmp_path, capsys):
    says(lambda name: f"They feel {TRUTH[name].emotion}.")
    records = list(clips())
    records[4] = dataclasses.replace(records[4], labels=())
    place = write(tmp_path / "some", records)
    command(run, f"--set=ovmerdplus={place}")
    [found] = report(run)["sets"]
    assert (found["name"], found["task"]) == ("OV-MERD+", "fine")
    assert found["results"][0]["counts"]["clips"] == CLIPS - 1
    assert "1 clip without a truth, left out: 'demo-test-00004'" in capsys.readouterr().out
    none = write(tmp_path / "none", clips(emotion="", labels=(), valence=None, candidates=()))
    assert "no record has the labels" in refusal(run, f"--set=ovmerdplus={none}")
    assert "name how it is scored" in refusal(run, f"--set=mine={none}")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--step=7"], "has no checkpoint of step 7; it has [1, 2]"),
        (["--question=onehot"], "was trained on description, ovlabel, but not on --question=oneh"),
        (["--set=a:basic=/nowhere"], "/nowhere/manifest.json is missing"),
        (["--lexicon=/nowhere", "--question=description"], "/nowhere is not a directory"),
        (["--config.mesh=data:3"], "mesh 'data:3'"),
        (
            ["--set=a:words=/nowhere", "--lexicon=/wheels"],
            "--lexicon=/wheels has no part in --question=ovlabel, scored as words; leave it out",
        ),
        (["--set=a:words=/nowhere", "--level=1"], "--level=1 has no part in --question=ovlabel, s"),
        (["--question=ovlabel", "--extractor=rules"], "--extractor=rules has no part in --quest"),
    ],
)
def test_what_a_user_gets_wrong_is_one_sentence(run, flags, said):
    assert said in refusal(run, *flags)


def test_what_is_wrong_with_a_later_step_or_set_shows_before_the_first_answer(run, says, tmp_path):
    asked = says(lambda name: "They feel sad.")
    message = refusal(run, "--steps", "1", "99999")
    assert "--steps: " in message and "has no checkpoint of step 99999; it has [1, 2]" in message
    good, bad = (
        write(tmp_path / name, clips(**changes))
        for name, changes in (("good", {}), ("bad", {"subtitle": "<FaceHere>"}))
    )
    message = refusal(run, f"--set=a:basic={good}", f"--set=b:basic={bad}")
    assert "record 'demo-test-00000': the subtitle holds the reserved text <FaceHere>" in message
    assert not asked


def test_a_run_of_any_questions_may_be_asked_for_descriptions_where_that_is_said():
    config = affectgpt_qwen25_7b.get_config()
    config.label = "qa"
    run = SimpleNamespace(config=config, label_types=("qa",), workdir="runs/llava")
    assert evaluate.choose_question("description", run) == "description"
    for asked in (None, "ovlabel"):
        with pytest.raises(ConfigError, match="runs/llava was trained on qa, but not on"):
            evaluate.choose_question(asked, run)


def test_a_folder_without_a_run_is_one_sentence(run, tmp_path):
    assert "holds no run: config.json is missing" in refusal(tmp_path)
    shutil.rmtree(run / "checkpoints")
    assert "run holds no checkpoint; expected checkpoints/STEP in it" in refusal(run)
    (run / "config.json").write_text("{")
    assert "expected the config of a run" in refusal(run)
    (run / "config.json").write_text('{"seed": 0}')
    assert "is missing; the paper's recipe has" in refusal(run)


def test_answers_that_are_damaged_are_named(run, says):
    says(lambda name: "They feel sad.")
    command(run, "--max-clips=2")
    [file] = (run / "evaluate" / "answers").iterdir()
    file.write_text('{"name": "x"}\n')
    assert "line 1: the key 'code' is missing" in refusal(run)


def test_a_place_that_cannot_be_written_is_one_sentence(run, says, tmp_path):
    says(lambda name: "They feel sad.")
    (tmp_path / "file").write_text("")
    advice = "; the results need a place that can be written, with room, as --out"
    assert advice in refusal(run, f"--out={tmp_path}/file")
    assert advice in refusal(run, f"--out={tmp_path}/file/below/it")
    # A write to a full disk fails without the file's name.
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "write_report", raises(full))
        assert refusal(run) == f"error: {run / 'evaluate'}: No space left on device{advice}"
    unreadable = PermissionError(errno.EACCES, "Permission denied", "/records/manifest.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "open_set", raises(unreadable))
        assert refusal(run) == "error: /records/manifest.json: Permission denied"


def raises(error):
    def fail(*_, **__):
        raise error

    return fail


def test_whoever_has_stopped_reading_is_told_nothing(run, says):
    says(lambda name: "They feel sad.")
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as pipe, contextlib.redirect_stdout(pipe):
        with pytest.raises(SystemExit) as stopped:
            command(run)
    assert stopped.value.code == 1


def test_too_little_memory_is_one_sentence_and_what_else_xla_says_is_not(run, monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError(said)

    monkeypatch.setattr(inference.Generator, "answers", fail)
    said = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 bytes.\n"
    message = refusal(run)
    assert "--batch-size" in message and "--config.generate.merge_lora=false" in message
    said = "INTERNAL: something else"
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        command(run)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--set=demo"], "is not NAME=RECORDS"),
        (["--set=mer2024:fine=x"], "'fine' is not the task of mer2024; expected basic"),
        (["--set=mine:mood=x"], "'mood' is not the task of mine"),
        (["--set=a=x", "--set=a=y"], "names a data set twice"),
        (["--set=a b=x", "--set=a-b=y"], "'a b' and 'a-b' would both be written to a-b-step-STEP"),
        (["--steps", "first"], "'first' is neither a number"),
        (["--steps", "²"], "'²' is neither a number"),
        (["--max-clips=0"], "--max-clips is 0; expected 1 or more"),
        (["--extractor=openai"], "go together"),
        (["--model=x"], "go together"),
        (["--bootstrap=-1"], "--bootstrap is -1; expected 0 or more"),
        (["--seed=4294967296"], "--seed is 4294967296; expected 0 to 4294967295"),
        (["--top-p=0.9"], "temperature 0 takes the most probable token"),
        (["--api-key=sesame"], "unknown argument --api-key"),
        (["--consensus=1"], "--consensus is 1; expected 2 or more answers"),
        (["--consensus=8", "--temperature=0"], "--temperature=0 does not sample"),
        (["--consensus=4", "--steps", "all"], "compares decodings of one checkpoint"),
    ],
)
def test_a_wrong_command_line_is_refused(capsys, flags, said):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--workdir=x", *flags])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_the_modalities_are_those_of_the_input_mode():
    from affectgpt_jax.data.modalities import INPUT_MODES
    from affectgpt_jax.data.pipeline import PromptProcessor

    def letters(mode):
        return evaluate.modalities(PromptProcessor(None, None, INPUT_MODES[mode], {}, {}))

    expected = {
        "multi_audio_face_text": "AVT", "multi_text": "AVT", "audio_text": "AT", "text": "T",
        "face": "V", "image": "V", "audio_face": "AV",
    }  # fmt: skip
    assert {mode: letters(mode) for mode in expected} == expected


def test_the_demos_ceilings_stand_beside_its_score(run, says, monkeypatch):
    says(lambda name: "They feel sad.")
    monkeypatch.setattr(demo, "SIZES", {**demo.SIZES, "test": 24})
    command(run, "--set=demo=demo", "--max-clips=5")
    [found] = report(run)["sets"]
    assert (found["name"], found["task"]) == ("demo", "words")
    share = found["references"]["ceiling with audio + face + text"]
    assert found["references"]["ceiling with face"] < share <= 1
    assert np.isfinite(share)
    # Published systems have no score on these clips.
    table = (run / "evaluate" / "report.md").read_text(encoding="utf-8")
    heads = next(line for line in table.splitlines() if line.startswith("| System"))
    assert heads == "| System | Modalities | demo |"
    assert "AffectGPT | AVT" not in table
    # Of the run's own test set, training knows the score with the features of other clips.
    result, config = (json.loads((run / f"{n}.json").read_text()) for n in ("result", "config"))
    command(run, f"--set=own:words={config['data']['test']}")
    control = report(run)["sets"][0]["references"]["control: shuffled features"]
    assert control == result["hit_features_shuffled"]
    # But of one checkpoint, asked one question, most probable answers of some length.
    other = 3 - result["best_step"]
    for flags in (
        (f"--step={other}",),
        ("--question=description",),
        ("--temperature=1",),
        ("--max-new-tokens=7",),
    ):
        command(run, f"--set=own:words={config['data']['test']}", *flags)
        assert "control: shuffled features" not in report(run)["sets"][0]["references"], flags


def test_clips_whose_modalities_conflict_are_scored_apart_from_the_others(
    run, says, tmp_path, capsys
):
    says(lambda name: "They feel sad.")
    records = list(clips(conflict="", candidates=()))
    records[2] = dataclasses.replace(records[2], conflict="face", emotion="blorp")
    records[3] = dataclasses.replace(records[3], conflict="face", emotion="zzyx")
    place = write(tmp_path / "torn", records)
    command(run, f"--set=mine:basic={place}")
    [found] = report(run)["sets"]
    torn, others = found["parts"]
    assert (torn["name"], torn["clips"]) == ("clips whose modalities conflict", 2)
    assert (others["name"], others["clips"]) == ("other clips", CLIPS - 2)
    # Words that no wheel has: there is no score, and that is said wherever scores are.
    assert torn["value"] is None and others["value"] is not None
    why = "no score: none of the true words of 2 clips stands on wheel 1"
    assert why in torn["why_not"]
    assert f"  2 clips whose modalities conflict: {why}" in capsys.readouterr().out
    assert why in (folder(run) / "report.html").read_text(encoding="utf-8")


def test_the_lexicon_of_labels_is_named_where_it_makes_no_score(run, says):
    says(lambda name, place=0: "They feel sad.")
    test = json.loads((run / "config.json").read_text())["data"]["test"]
    identity = lexicon.lexicon_identity()
    command(run, f"--set=mine:words={test}")
    page = (folder(run) / "report.html").read_text(encoding="utf-8")
    assert "No lexicon was asked" in page and report(run)["label_lexicon"] is None
    for flags, level in (
        (["--consensus=2", "--level=2"], ", level 2"),
        (["--question=description", "--extractor=rules"], ""),
    ):
        command(run, f"--set=mine:words={test}", *flags)
        page = (folder(run) / "report.html").read_text(encoding="utf-8")
        named = f"Lexicon (of labels, not of scores): {identity.name}{level}, sha256 <code>"
        assert named in page and identity.sha256 in page and "No lexicon" not in page
        assert report(run)["label_lexicon"]["sha256"] == identity.sha256
        assert report(run)["lexicon"] is None
