"""The predict command as a user runs it, on a run of two steps."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from affectgpt_jax import build, inference, load_run, predict
from affectgpt_jax.common.files import FileInUse
from affectgpt_jax.common.identity import Identity
from affectgpt_jax.data import demo
from affectgpt_jax.data.records import write_records
from affectgpt_jax.evaluation.consensus import consensus
from affectgpt_jax.evaluation.lexicon import load_lexicon
from affectgpt_jax.evaluation.rewards import Wheels
from affectgpt_jax.inference import Generator
from affectgpt_jax.models.decoder import ComputeConfig
from affectgpt_jax.models.generate import Generated, Sampling

# A model of two steps says the same about every clip, unless it is made to wander.
WANDER = ("--temperature=1.5", "--top-p=0.95", "--repetition_penalty=1.1", "--seed=3")
CLIPS = 12


def write(directory, clips, features=demo.DEFAULT_FEATURES):
    write_records(directory, clips, encoders=dict.fromkeys(features, "demo"))


@pytest.fixture(scope="module")
def workdir(trained_run):
    return trained_run


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """A folder with records that the run cannot read."""
    folder = tmp_path_factory.mktemp("others")
    clips = list(demo.World(0).records("test", 4))
    drop = [{"audio": clip.features["audio"]} for clip in clips if "audio" in clip.features]
    write(folder / "faceless", [dataclasses.replace(c, features=f) for c, f in zip(clips, drop)])
    write(folder / "unasking", [dataclasses.replace(clip, question="") for clip in clips])
    return folder


@pytest.fixture
def changed(workdir, tmp_path):
    """A copy of the run whose config can be changed."""

    def change(**keys):
        path = shutil.copytree(workdir, tmp_path / "run") / "config.json"
        config = json.loads(path.read_text())
        for key, value in keys.items():
            *parents, last = key.split(".")
            entry = config
            for parent in parents:
                entry = entry[parent]
            entry[last] = value
        path.write_text(json.dumps(config))
        return path.parent

    return change


@pytest.fixture
def ask(workdir, capsys):
    """`flags -> (standard output, standard error)`."""

    def run(*flags, workdir=workdir):
        capsys.readouterr()
        predict.main([f"--workdir={workdir}", *map(str, flags)])
        return tuple(capsys.readouterr())

    return run


def parsed(text):
    return [json.loads(line) for line in text.splitlines()]


def by_name(lines):
    return {(line["name"], line["question"]): line for line in lines}


def names(*numbers):
    return [f"--name=demo-test-{number:05}" for number in numbers]


# --- Answers --------------------------------------------------------------------------------------


def test_json_lines_say_all_about_every_clip_and_question(ask):
    out, said = ask("--json", *WANDER)
    lines = parsed(out)
    assert sorted((line["question"], line["name"]) for line in lines) == [
        (question, f"demo-test-{i:05}")
        for question in ("description", "ovlabel")
        for i in range(CLIPS)
    ]
    for line in lines:
        assert list(line) == ["name", "question", "text", "labels", "tokens", "cut", "logprob"]
        assert (line["labels"] is None) == (line["question"] == "description")
        assert 1 <= line["tokens"] <= 8 and line["logprob"] < 0
        assert line["tokens"] == 8 or not line["cut"]
    assert len({line["text"] for line in lines}) >= CLIPS, "answers that are alike prove little"
    assert "checkpoint of step " in said and "asking description and ovlabel" in said
    assert f"{2 * CLIPS} of {2 * CLIPS} answers" in said


def test_questions_that_are_asked_together_are_answered_as_alone(ask):
    """Together, what the prompts about a clip begin with is computed once."""
    together = by_name(parsed(ask("--json", *WANDER)[0]))
    for question in ("description", "ovlabel"):
        for key, alone in by_name(
            parsed(ask("--json", f"--question={question}", *WANDER)[0])
        ).items():
            found = together.pop(key)
            assert found.pop("logprob") == pytest.approx(alone.pop("logprob"), abs=1e-4)
            assert found == alone
    assert not together


def test_the_answers_are_those_that_training_scored(ask, workdir):
    scored = parsed((workdir / "predictions.jsonl").read_text())
    lines = parsed(ask("--json", "--question=ovlabel")[0])
    assert [(x["name"], x["text"], x["labels"]) for x in lines] == [
        (x["name"], x["text"], x["labels"]) for x in scored
    ]


@pytest.mark.parametrize("sampling", [(), WANDER], ids=["greedy", "sampled"])
def test_an_answer_streamed_alone_is_the_one_in_a_batch(ask, sampling):
    batch = ask(*names(4, 2, 7), *sampling)[0]
    for number in (2, 4):
        alone = ask(*names(number), *sampling)[0]
        blocks = re.findall(rf"^demo-test-{number:05} \[.*\n(?:  .*\n)*", batch, re.MULTILINE)
        assert alone == "".join(blocks)
        assert re.fullmatch(
            rf"demo-test-{number:05} \[description\] .*\n(  cut at 8 tokens.*\n)?"
            rf"demo-test-{number:05} \[ovlabel\] .*\n  labels: .*\n(  cut at 8 tokens.*\n)?",
            alone,
        )


def test_samples_do_not_depend_on_the_size_of_a_batch_nor_on_the_order(ask):
    whole = by_name(parsed(ask("--json", *WANDER)[0]))
    for flags in (["--batch-size=1"], ["--first=4", "--batch_size=3"], names(9, 0, 3)):
        for key, line in by_name(parsed(ask("--json", *WANDER, *flags)[0])).items():
            # Log-probabilities in float32, from programs of other shapes.
            assert line | {"logprob": 0} == whole[key] | {"logprob": 0}
            assert line["logprob"] == pytest.approx(whole[key]["logprob"], abs=1e-4)


def test_the_answers_do_not_depend_on_the_mesh(ask):
    flags = ("--json", "--question=ovlabel", *WANDER)
    whole = by_name(parsed(ask(*flags)[0]))
    split = by_name(parsed(ask(*flags, "--config.mesh=data:2,fsdp:2,tensor:2")[0]))
    assert {k: line["text"] for k, line in split.items()} == {
        k: line["text"] for k, line in whole.items()
    }


def test_answers_from_merged_weights_are_those_with_adapters_beside_them(ask, workdir, changed):
    run = load_run(workdir)
    assert inference.should_merge("auto", run.model, run.base)
    assert any(np.any(x) for x in jax.tree.leaves(run.trainable["lora"]))
    flags = ("--json", "--question=ovlabel", *WANDER)
    apart = changed(**{"generate.merge_lora": "false"})
    merged, beside = (by_name(parsed(ask(*flags, workdir=w)[0])) for w in (workdir, apart))
    told = ask(*flags, "--config.generate.merge_lora=false")[0]
    assert by_name(parsed(told)) == beside
    for key, line in merged.items():
        assert line["text"] == beside[key]["text"]
        # Sums of float32 in another order.
        assert line["logprob"] == pytest.approx(beside[key]["logprob"], abs=1e-4)
    assert [x["logprob"] for x in merged.values()] != [x["logprob"] for x in beside.values()]


def test_adapters_are_merged_where_a_copy_of_the_weights_fits(workdir, monkeypatch):
    run = load_run(workdir)
    targets = run.model.decoder.lora.targets
    kernels = [layer[name]["kernel"] for layer in run.base["layers"] for name in targets]
    copy = sum(x.addressable_shards[0].data.nbytes for x in kernels)

    def found(limit, **changes):
        monkeypatch.setattr(inference, "device_limit", lambda: limit)
        model = dataclasses.replace(run.model, decoder=run.model.decoder.copy(**changes))
        return {
            how: inference.should_merge(how, model, run.base) for how in ("auto", "true", "false")
        }

    assert found(4 * copy) == {"auto": True, "true": True, "false": False}
    assert found(4 * copy - 1) == {"auto": False, "true": True, "false": False}
    assert found(None)["auto"], "a host has room for a tiny base"
    nothing = dict.fromkeys(("auto", "true", "false"), False)
    assert found(4 * copy, lora=None) == nothing
    assert found(4 * copy, compute=ComputeConfig(base_precision="int8")) == nothing


def test_a_stream_shows_whole_characters_and_no_part_of_the_end_mark(workdir, monkeypatch):
    run = load_run(workdir)
    text = "They feel fröhlich 😀 ## 你好 # "
    [ids] = run.processor.tokenizer.encode([f"{text}###"])
    assert len(ids) > len(text.split()) + 10, "no character is split into bytes"

    def scripted(*_, **__):
        for count in range(1, len(ids) + 1):
            tokens = np.zeros((8, len(ids)), np.int32)
            tokens[0, :count] = ids[:count]
            ended = np.zeros(8, bool) | (count == len(ids))
            yield Generated(tokens, np.full(8, count), ended, np.zeros((8, len(ids))))

    monkeypatch.setattr(inference, "stream", scripted)
    generator = Generator(
        run.model, run.base, run.processor, run.mesh, batch_size=1, max_new_tokens=99
    )
    clips = predict.choose_clips(predict.open_clips(run, None), None, 1)
    shown = [answer.text for answer in generator.stream(run.trainable, clips, "ovlabel")]
    assert len(shown) == len(ids) and shown[-1] == text
    for earlier, later in zip(shown, shown[1:]):
        assert later.startswith(earlier)
        assert "\ufffd" not in earlier and not earlier.endswith("#")
    assert "They feel fröhlich 😀" in shown


def test_any_question_can_be_asked(ask):
    out, _ = ask("--json", "--first=2", "--question=what would help?", "--question=caption")
    assert [line["question"] for line in parsed(out)] == 2 * ["what would help?", "caption"]
    assert "not on caption" in ask("--first=1", "--question=caption")[1]


def test_by_default_a_run_is_asked_what_it_was_trained_on(ask, changed):
    said = ask("--first=1", workdir=changed(label="ovlabel+onehot"))[1]
    assert "asking ovlabel (trained: ovlabel, onehot)" in said


def test_a_run_that_was_trained_on_neither_is_asked_what_it_knows(ask, changed):
    said = ask("--first=1", workdir=changed(label="sentiment"))[1]
    assert "asking sentiment (trained: sentiment)" in said


def test_clips_without_a_modality_are_answered_and_named(ask, workdir, tmp_path):
    clips = list(demo.World(0).records("test", 3))
    clips[1] = dataclasses.replace(clips[1], features={"face": clips[1].features["face"]})
    write(tmp_path / "records", clips)
    out, said = ask(f"--records={tmp_path / 'records'}", "--question=ovlabel", "--json")
    assert len(parsed(out)) == 3
    assert "note: demo-test-00001 of 3 clips: no audio, answered without" in said


def test_a_step_can_be_chosen(workdir, ask):
    said = {step: ask("--first=1", f"--step={step}")[1] for step in (1, 2)}
    runs = {step: load_run(workdir, step) for step in (1, 2)}
    for step, run in runs.items():
        assert f"checkpoint of step {step}" in said[step]
        assert ("the best on validation" in said[step]) == (step == run.best_step)
    assert load_run(workdir).step == runs[1].best_step == runs[2].best_step
    one, two = (jax.tree.leaves(run.trainable) for run in runs.values())
    assert any((x != y).any() for x, y in zip(one, two))


def test_a_run_is_left_as_it_is(ask, workdir):
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}
    ask("--first=1", "--json")
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*")} == before


def test_the_command_answers_on_one_device_with_nothing_but_answers_on_its_output(workdir, ask):
    flags = [f"--workdir={workdir}", "--first=2", "--json", *WANDER]
    command = [sys.executable, "-m", "affectgpt_jax.predict", *flags]
    # Where CI is set, transformers logs twice what it advises.
    environment = os.environ | {"CI": "true"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.lower() and "PyTorch" not in done.stderr, done.stderr
    here = by_name(parsed(ask("--first=2", "--json", *WANDER)[0]))
    found = by_name(parsed(done.stdout))
    assert {k: line["text"] for k, line in found.items()} == {
        k: line["text"] for k, line in here.items()
    }


def test_a_tilde_that_the_shell_leaves_is_the_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    arguments = predict.parse_arguments(["--workdir=~/run", "--out=~/answers.jsonl"])
    assert str(arguments.workdir) == "/home/someone/run"
    assert str(arguments.out) == "/home/someone/answers.jsonl"


# --- A file of answers ----------------------------------------------------------------------------


def test_a_file_is_gone_on_with_where_it_stopped(ask, tmp_path):
    out = tmp_path / "answers.jsonl"
    printed, said = ask(f"--out={out}", *WANDER)
    assert not printed and f"{2 * CLIPS} of {2 * CLIPS} answers" in said
    whole = out.read_text()
    assert by_name(parsed(whole)) == by_name(parsed(ask("--json", *WANDER)[0]))
    lines = whole.splitlines(keepends=True)
    out.write_text("".join(lines[:13]) + lines[13][:30])
    said = ask(f"--out={out}", *WANDER)[1]
    assert "half written" in said and "13 answers are there already" in said
    assert "11 of 11 answers" in said
    again = parsed(out.read_text())
    assert len(again) == 2 * CLIPS
    texts = {key: line["text"] for key, line in by_name(again).items()}
    assert texts == {key: line["text"] for key, line in by_name(parsed(whole)).items()}
    assert f" of {2 * CLIPS} answers" not in ask(f"--out={out}", *WANDER)[1]
    assert parsed(out.read_text()) == again


def test_an_interrupted_command_ends_with_one_sentence_and_goes_on(
    ask, tmp_path, monkeypatch, capsys
):
    out, write_line = tmp_path / "answers.jsonl", predict.AnswerFile.write

    def interrupt(self, line):
        if line["name"] == "demo-test-00003":
            raise KeyboardInterrupt
        write_line(self, line)

    monkeypatch.setattr(predict.AnswerFile, "write", interrupt)
    with pytest.raises(SystemExit) as end:
        ask(f"--out={out}")
    assert end.value.code == 130
    assert capsys.readouterr().err.endswith(
        "interrupted; with --out the same command goes on where it stopped\n"
    )
    assert len(parsed(out.read_text())) == 2 * 3  # both questions about three clips
    monkeypatch.undo()
    ask(f"--out={out}")
    assert len(by_name(parsed(out.read_text()))) == len(parsed(out.read_text())) == 2 * CLIPS


def test_one_process_at_a_time_writes_a_file(tmp_path):
    line = {"name": "a", "question": "q", "text": "t"}
    path = tmp_path / "answers.jsonl"
    with predict.AnswerFile(path, {"seed": 1}) as file:
        file.write(line)
        for settings in ({"seed": 1}, {"seed": 2}):
            with pytest.raises(FileInUse, match=f"{path} is in use by process {os.getpid()} on "):
                predict.AnswerFile(path, settings)
        file.write(line | {"name": "b"})
    assert json.loads((tmp_path / "answers.jsonl.settings.json").read_text()) == {"seed": 1}
    with predict.AnswerFile(path, {"seed": 1}) as file:
        assert sorted(file.answered) == [("a", "q"), ("b", "q")]
    with pytest.raises(predict.PredictError, match="holds answers with seed 1, but now it is 2"):
        predict.AnswerFile(path, {"seed": 2})
    with predict.AnswerFile(path, {"seed": 1}):
        pass  # the refused one holds nothing


def test_a_file_of_one_question_can_be_scored(ask, tmp_path, capsys):
    from affectgpt_jax import score

    out, truth = tmp_path / "answers.jsonl", tmp_path / "truth.csv"
    ask(f"--out={out}", "--question=ovlabel")
    rows = [f"demo-test-{i:05},happy" for i in range(CLIPS)]
    truth.write_text("\n".join(["name,emotion", *rows]) + "\n")
    score.main(["--task=basic", f"--predictions={out}", f"--truth={truth}", "--bootstrap=0"])
    assert f"{CLIPS} clips" in capsys.readouterr().out


# --- What is refused ------------------------------------------------------------------------------


def refusal(ask, *flags, **settings):
    with pytest.raises(SystemExit) as stopped:
        ask(*flags, **settings)
    message = str(stopped.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


def test_too_little_memory_is_one_sentence_and_what_else_xla_says_is_not(ask, monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError(said)

    monkeypatch.setattr(inference.Generator, "answers", fail)
    said = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 bytes.\n"
    message = refusal(ask, "--json")
    assert "--batch-size" in message and "--config.generate.merge_lora=false" in message
    said = "INTERNAL: something else"
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        ask("--json")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--step=7"], "no checkpoint of step 7; it has [1, 2]"),
        (["--name=demo-test-0003"], "did you mean demo-test-00003"),
        (["--name=qqq"], "named 'qqq'; one is demo-test-00000"),
        (["--question=ovlabl"], "did you mean ovlabel?"),
        (["--question=is <FaceHere> glad"], "the question holds the reserved text <FaceHere>"),
        (["--question=qa", "--records={others}/unasking"], "'demo-test-00000': it has nothing for"),
        (["--records=/nowhere"], "/nowhere/manifest.json is missing"),
        (["--records={others}/faceless"], "reads the feature 'face', but the records"),
        (["--config.llm=/nowhere"], "config.llm='/nowhere' is not a directory"),
        (["--config.mesh=data:3"], "mesh 'data:3'"),
        (["--out=/nowhere/answers.jsonl"], "there is no directory /nowhere"),
        (["--consensus=4", "--question=description"], "takes questions that ask for labels"),
    ],
)
def test_what_a_user_gets_wrong_is_one_sentence(ask, others, flags, said):
    assert said in refusal(ask, *(flag.format(others=others) for flag in flags))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--temperature=-1"], "temperature is -1.0"),
        (["--top_p=0.9"], "top_p is 0.9, but temperature 0"),
        (["--seed=-1"], "--seed is -1"),
        (["--first=0"], "--first is 0"),
        (["--batch_size=0"], "--batch-size is 0; expected 1 or more"),
        (["--config.generate.merge_lora=no"], "invalid choice: 'no' (choose from"),
        (["--question="], "--question is empty"),
        (["--name=a", "--name=a"], "--name 'a' is given twice"),
        (["--json", "--out=x"], "not allowed with"),
        (["--consensus=1"], "--consensus is 1; expected 2 or more"),
        (["--consensus=8", "--temperature=0"], "--temperature=0 does not sample; leave it out"),
        (["--lexicon=x"], "read with --consensus only"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused_before_anything_starts(ask, capsys, flags, said):
    with pytest.raises(SystemExit) as stopped:
        ask(*flags, workdir="/nowhere")
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_adapters_that_cannot_be_merged_are_refused_where_one_insists(ask, changed):
    message = refusal(
        ask, "--config.generate.merge_lora=true", workdir=changed(base_precision="int8")
    )
    assert "config.generate.merge_lora='true' cannot add LoRA to quantized weights" in message


def test_a_workdir_that_holds_no_usable_run_is_refused(ask, workdir, changed, tmp_path):
    message = refusal(ask, workdir=tmp_path)
    assert f"{tmp_path} holds no run: config.json is missing" in message
    (tmp_path / "config.json").write_text("{")
    assert "expected the config of a run" in refusal(ask, workdir=tmp_path)
    shutil.copy(workdir / "config.json", tmp_path)
    assert f"{tmp_path} holds no checkpoint" in refusal(ask, workdir=tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    (tmp_path / "checkpoints").mkdir()
    assert f"{tmp_path} holds no checkpoint" in refusal(ask, workdir=tmp_path)
    message = refusal(ask, workdir=changed(**{"fusion": "nonsense"}))
    assert "config.json: config.fusion is 'nonsense'" in message


@pytest.mark.parametrize(
    ("place", "why"), [("", "config.data.test, is empty"), ("gone/test", "gone/test, is not here")]
)
def test_a_run_without_a_test_set_asks_for_records(ask, changed, place, why):
    message = refusal(ask, workdir=changed(**{"data.test": place}))
    assert why in message and "--records" in message


def test_a_run_of_another_shape_is_refused_by_the_name_of_the_leaf(ask, changed):
    message = refusal(ask, workdir=changed(**{"lora.rank": 4}))
    assert "does not fit this config: trainable/lora/layers/" in message


def test_a_run_of_another_base_is_refused(ask, tmp_path):
    from safetensors.numpy import load_file, save_file

    base = shutil.copytree(build.base_directory("tiny"), tmp_path / "other")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert "was trained on the base" in refusal(ask, f"--config.llm={base}")


def other_tokenizer(folder):
    """The tiny base with its emotion words exchanged in the tokenizer, beside the same weights."""
    base = shutil.copytree(build.base_directory("tiny"), folder / "base")
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = (word for word in ("\u0120calm", "\u0120alarmed"))
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (base / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    return base


def test_another_tokenizer_beside_the_same_weights_is_refused(ask, tmp_path):
    message = refusal(ask, f"--config.llm={other_tokenizer(tmp_path)}")
    assert "checkpoints/2: tokenizer: it was trained with tiny_base (sha256 " in message
    assert "and now it is base (sha256 " in message


def test_another_chat_template_is_refused(ask, tmp_path):
    base = shutil.copytree(build.base_directory("tiny"), tmp_path / "base")
    (base / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert "checkpoints/2: chat template: it was" in refusal(ask, f"--config.llm={base}")


def test_other_prompts_are_refused_unless_they_are_meant(ask, changed, tmp_path, capsys):
    prompts = build.Path(build.__file__).parent / "assets" / "prompts" / "compact.toml"
    text = prompts.read_text()
    edited = text.replace("[questions]", "# Only a comment.\n[questions]", 1)
    assert edited != text
    (tmp_path / "mine.toml").write_text(edited)
    run = changed(prompts=str(tmp_path / "mine.toml"))
    assert "is named 'nobody'" in refusal(ask, "--name=nobody", workdir=run)
    (tmp_path / "mine.toml").write_text(edited.replace("Better is", "The better one is", 1))
    message = refusal(ask, "--name=nobody", workdir=run)
    assert "prompts: it was trained with" in message and "pass --allow-other=prompts" in message
    flags = ("--name=nobody", "--allow-other=prompts")
    assert "is named 'nobody'" in refusal(ask, *flags, workdir=run)
    said = capsys.readouterr().err
    assert "note: " in said and "prompts: it was trained with" in said


def test_the_runs_own_test_records_are_said_to_be_others(ask, changed, tmp_path, capsys):
    write(tmp_path / "test", demo.World(1).records("test", 2))
    run = changed(**{"data.test": str(tmp_path / "test")})
    refusal(ask, "--name=nobody", workdir=run)
    assert "test records: it was trained with 12 clips (sha256 " in capsys.readouterr().err
    refusal(ask, "--name=nobody", f"--records={tmp_path / 'test'}")
    assert "test records" not in capsys.readouterr().err


def test_a_file_with_other_answers_is_left_alone(ask, tmp_path):
    out = tmp_path / "answers.jsonl"
    ask(f"--out={out}", "--first=1")
    mine = out.read_text()
    assert "holds answers with seed 0, but now it is 5" in refusal(
        ask, f"--out={out}", "--first=1", "--seed=5"
    )
    message = refusal(ask, f"--out={out}", "--max_new_tokens=3")
    assert "holds answers with max_new_tokens 8, but now it is 3" in message
    assert out.read_text() == mine
    out.write_text(mine + "something else\n")
    assert "line 3: not JSON" in refusal(ask, f"--out={out}")
    out.write_bytes(mine.encode() + b"\xff\n")
    assert "line 3: byte 0xff is not UTF-8" in refusal(ask, f"--out={out}")
    other = tmp_path / "notes.txt"
    other.write_text("mine\n")
    assert "that says how it was made" in refusal(ask, f"--out={other}")
    (tmp_path / "notes.txt.settings.json").write_text("[]")
    assert "that says how it was made" in refusal(ask, f"--out={other}")
    assert other.read_text() == "mine\n"


def test_a_file_is_not_gone_on_with_by_a_run_that_has_been_trained_anew(ask, changed, tmp_path):
    run = changed()
    flags = (f"--out={tmp_path / 'answers.jsonl'}", "--step=2", "--first=1")
    ask(*flags, workdir=run)
    # Another training would leave another checkpoint of step 2; here, it is that of step 1.
    shutil.rmtree(run / "checkpoints" / "2")
    shutil.copytree(run / "checkpoints" / "1", run / "checkpoints" / "2")
    assert "holds answers with checkpoint '" in refusal(ask, *flags, workdir=run)


def test_several_samples_are_brought_to_agreement(ask, workdir):
    """Against the samples themselves, which `Generator` gives as a group."""
    flags = ("--first=3", "--question=ovlabel", *WANDER, "--json", "--consensus=4")
    found = parsed(ask(*flags)[0])
    run = load_run(workdir)
    clips = predict.choose_clips(predict.open_clips(run, None), None, 3)
    generator = Generator(
        run.model,
        run.base,
        run.processor,
        run.mesh,
        batch_size=3,
        max_new_tokens=8,
        sampling=Sampling(1.5, 0.95, 1.1),
        group=4,
        seed=3,
        log_probs=True,
        merge_lora=True,
    )
    answers = generator.answer(run.trainable, clips, "ovlabel").each
    assert [line["name"] for line in found] == [entry.name for entry in clips.index]
    wheels = Wheels(load_lexicon())
    for clip, line in enumerate(found):
        group = answers[4 * clip : 4 * clip + 4]
        labels = inference.read_labels(run.processor, inference.Answers(group))
        agreed = consensus(labels, wheels)
        assert line["labels"] == list(agreed.labels) and line["logprob"] is None
        assert line["tokens"] == sum(answer.tokens for answer in group)
        if agreed.sample is not None:
            assert line["text"] == group[agreed.sample].text
    assert len({answer.text for answer in answers}) > 6, "samples that do not differ prove little"


def test_a_file_is_gone_on_with_by_other_code_which_is_said_once(ask, tmp_path, monkeypatch):
    flags = (f"--out={tmp_path / 'answers.jsonl'}", "--first=1")
    ask(*flags)
    monkeypatch.setattr(build, "code_identity", lambda: Identity("affectgpt_jax", "f" * 64))
    said = ask(*flags)[1]
    assert "answers.jsonl holds answers of another version of the code" in said
    assert "code: it was trained with affectgpt_jax (sha256 " in said
    assert "holds answers of another version" not in ask(*flags)[1]
