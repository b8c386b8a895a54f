"""Published weights answer without a training: what they say, and what is said of those that do not
fit."""

import json
import shutil

import jax
import needs_torch
import numpy as np
import pytest
from hub_cache import cached, hub_cache  # noqa: F401
from tiny_model import random_tree

from affectgpt_jax import (
    UserError,
    ask_clips,
    build,
    evaluate_run,
    get_config,
    inference,
    load_checkpoint,
    load_run,
    post_training,
    predict,
    restore,
)
from affectgpt_jax.data.pipeline import sequential_batches
from affectgpt_jax.data.records import RecordDataset, RecordSubset
from affectgpt_jax.models.affectgpt import init_trainable
from affectgpt_jax.training.checkpoints import SavedRun
from affectgpt_jax.weights.__main__ import main as weights
from affectgpt_jax.weights.release import save_release

# A model of two steps says the same about every clip, unless it is made to wander.
WANDER = ("--temperature=1.5", "--top-p=0.95", "--seed=3", "--question=ovlabel", "--json")
DEMO = ("--config=demo", "--config.generate.max_new_tokens=8", "--config.generate.batch_size=16")
TINY = build.base_directory("tiny")


@pytest.fixture(scope="module")
def test_clips(trained_run):
    return trained_run.parent / "test"


@pytest.fixture(scope="module")
def exported(trained_run, tmp_path_factory):
    """A run's checkpoint as a .pth, as an adapter, and as a run for a hub."""
    folder = tmp_path_factory.mktemp("exported")
    for how, out in (("release", "x.pth"), ("peft", "adapter"), ("hub", "hub")):
        weights([f"export-{how}", str(trained_run), str(folder / out)])
    return folder


@pytest.fixture
def says(monkeypatch):
    """Answers without a model: what is asked is counted."""
    asked = []

    def answers(self, trainable, dataset, question, feature_from=None):
        for number, entry in enumerate(dataset.index):
            asked.append(entry.name)
            yield number, inference.Answer(f"They feel {entry.emotion}.", 3, False, -1.0)

    monkeypatch.setattr(inference.Generator, "answers", answers)
    return asked


@pytest.fixture
def ask(capsys):
    def run(*flags):
        capsys.readouterr()
        predict.main([*map(str, flags)])
        said = capsys.readouterr()
        return [json.loads(line) for line in said.out.splitlines()], said.err

    return run


@pytest.fixture
def refused(capsys):
    """The sentence that a command line of predict ends with."""

    def run(*flags):
        with pytest.raises(SystemExit) as end:
            predict.main([*map(str, flags)])
        said = capsys.readouterr().err.splitlines()
        message = str(end.value) if end.value.code != 2 else said[-1]
        assert message.startswith("error: ") and "\n" not in message
        return message.removeprefix("error: ")

    return run


@pytest.fixture(scope="module")
def own_answers(trained_run, test_clips):
    """Those of the run itself."""
    run = load_run(trained_run)
    sampled = {"temperature": 1.5, "top_p": 0.95, "seed": 3}
    return ask_clips(run, "ovlabel", records=test_clips, **sampled)


def by_name(answers):
    return {answer["name"]: answer for answer in answers}


def test_what_was_exported_answers_as_the_run_does(
    ask,
    exported,
    own_answers,
    test_clips,
    tmp_path,
    hub_cache,  # noqa: F811
):
    assert len({answer["text"] for answer in own_answers}) > 6, "alike answers prove little"
    cached(hub_cache, "me/adapter", exported / "adapter")
    cached(hub_cache, "me/run", exported / "hub")
    cached(hub_cache, "me/files", exported)
    cached(hub_cache, "me/tiny", TINY)
    before = {path for path in hub_cache.rglob("*")}
    for flags in (
        (exported / "x.pth", *DEMO),
        ("me/adapter", *DEMO, "--config.llm=me/tiny"),
        ("hf:me/run", "--config.llm=hf:me/tiny"),
        ("hf:me/files/x.pth", *DEMO),
    ):
        found, said = ask(
            f"--checkpoint={flags[0]}", *flags[1:], f"--records={test_clips}", *WANDER
        )
        assert by_name(found) == by_name(own_answers)
        assert ("does not say what it was trained with" in said) == (flags[1:2] == DEMO[:1])
    assert {path for path in hub_cache.rglob("*")} == before, "a cache is left as it is"


def test_a_part_of_a_download_is_not_taken_for_a_checkpoint(
    exported,
    tmp_path,
    hub_cache,  # noqa: F811
):
    step = str(SavedRun(exported / "hub").best)
    for kind, name in (
        ("adapter", "adapter_config.json"),
        ("adapter", "adapter_model.safetensors"),
        ("hub", "config.json"),
        ("hub", f"checkpoints/{step}/manifest.json"),
        ("hub", f"checkpoints/{step}/state/_METADATA"),
    ):
        shutil.rmtree(hub_cache, ignore_errors=True)
        snapshot = cached(hub_cache, "me/it", exported / kind)
        assert restore.checkpoint_path("me/it") == snapshot
        (snapshot / name).unlink()
        with pytest.raises(UserError, match="the hub's cache has a part of it: .*--download") as no:
            restore.checkpoint_path("me/it")
        assert f"{name.rpartition('/')[2]} is missing" in str(no.value)


def test_answers_go_on_only_with_the_same_weights_base_and_prompts(
    ask, refused, exported, test_clips, tmp_path, says
):
    out = tmp_path / "answers.jsonl"
    flags = [*DEMO, f"--records={test_clips}", "--first=2", "--question=ovlabel", f"--out={out}"]
    moved = shutil.copy(exported / "x.pth", tmp_path / "x.pth")
    ask(f"--checkpoint={moved}", *flags)
    answers = out.read_text()
    settings = json.loads((tmp_path / "answers.jsonl.settings.json").read_text())
    mine = restore.open_checkpoint(str(moved), get_config("demo"))
    assert settings["checkpoint"] == mine.saved.fingerprint()
    assert settings["base"] == mine.base_identity().sha256
    for name in ("tokenizer", "chat template", "prompts", "code"):
        assert settings[name] == mine.inputs[name].sha256
    _, said = ask(f"--checkpoint={moved}", *flags)
    assert "2 answers are there already" in said and out.read_text() == answers

    base = shutil.copytree(TINY, tmp_path / "base")
    (base / "config.json").write_text(
        (base / "config.json").read_text().replace('"rope_theta": ', '"rope_theta": 1')
    )
    assert "holds answers with base '" in refused(
        f"--checkpoint={moved}", *flags, f"--config.llm={base}"
    )
    assert "holds answers with prompts '" in refused(
        f"--checkpoint={moved}", *flags, "--config.prompts=default"
    )
    moved.unlink()
    scaled(load_run(exported / "hub"), moved)
    assert "holds answers with checkpoint '" in refused(f"--checkpoint={moved}", *flags)


def test_a_checkpoint_is_evaluated(exported, test_clips, tmp_path, says):
    sets = {"mine:words": test_clips}
    config = get_config("demo", label="ovlabel")
    run = load_checkpoint(exported / "adapter", config)
    report = evaluate_run(run, sets=sets, bootstrap=0, out=tmp_path / "out")
    assert report.sets[0].fixed.score.values["hit"] == 1
    assert report.sets[0].fixed.predictions == "adapter"
    lines = (tmp_path / "out" / "mine-adapter.jsonl").read_text().splitlines()
    assert len(lines) == len(says) == 12
    evaluate_run(run, sets=sets, bootstrap=0, out=tmp_path / "out")
    assert len(says) == 12, "what is answered is not asked again"
    evaluate_run(scaled(run, tmp_path / "other.pth"), sets=sets, bootstrap=0, out=tmp_path / "out")
    assert len(says) == 24, "answers of one checkpoint were taken for those of another"
    with pytest.raises(UserError, match="--checkpoint needs --out=DIR"):
        evaluate_run(run, sets=sets)
    with pytest.raises(UserError, match="--steps: .*adapter is one checkpoint; leave it out"):
        evaluate_run(run, sets=sets, steps=["all"], out=tmp_path / "all")


def scaled(run, path):
    """The same model with other weights, as a file of the release."""
    trainable = jax.tree.map(lambda x: np.asarray(x) * 1.001, run.trainable)
    save_release(path, trainable, run.model.decoder.lora, epoch=0)
    return load_checkpoint(path, run.config)


def test_a_checkpoint_says_in_a_sentence_what_it_lacks(
    refused, exported, trained_run, test_clips, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "affectgpt_jax.restore.base_identity", lambda _: pytest.fail("the base was read")
    )
    pth, adapter, hub = (exported / name for name in ("x.pth", "adapter", "hub"))
    bare = shutil.copytree(adapter, tmp_path / "bare")
    (bare / "fusion.safetensors").unlink()
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pth").write_text("no weights")
    asked = (f"--records={test_clips}", "--first=1")
    for flags, said in (
        ([f"--checkpoint={pth}"], "does not say what model it belongs to; pass its config"),
        ([f"--checkpoint={pth}", "--config.llm=tiny"], "does not say what model it belongs to"),
        (
            [f"--checkpoint={pth}", "--config.label=ovlabel"],
            "--config.label=ovlabel changes a config, and none is named; pass --config=FILE",
        ),
        (
            [f"--checkpoint={pth}", "--config=affectgpt_qwen25_7b"],
            "config.llm='Qwen2.5-7B-Instruct' is not a directory",
        ),
        (
            [f"--checkpoint={pth}", "--config=demo", "--config.lora.rank=8"],
            "the adapter's rank is 16, but config.lora.rank is 8",
        ),
        (
            [f"--checkpoint={pth}", "--config=demo", "--config.fusion=qformer"],
            "its multi head is of type attention, but config.fusion is qformer",
        ),
        (
            [f"--checkpoint={pth}", "--config=demo", "--config.projectors.fusion_width=64"],
            "the tensor multi_audio_embs.bias is (128,); expected (64,); name the base",
        ),
        (
            [f"--checkpoint={adapter}", "--config=demo", "--config.lora.targets=('q_proj',)"],
            "the adapter's targets is (",
        ),
        (
            [f"--checkpoint={adapter}", "--config=demo", "--config.input=face_text"],
            "this config has no place for the tensor audio.",
        ),
        ([f"--checkpoint={bare}", "--config=demo"], "bare is an adapter alone, without the proj"),
        ([f"--checkpoint={hub}", "--config=demo"], "hub is a run, which has its config"),
        ([f"--checkpoint={tmp_path / 'empty'}", "--config=demo"], "holds no trained weights"),
        ([f"--checkpoint={tmp_path / 'text.pth'}", "--config=demo"], "text.pth"),
        ([f"--checkpoint={tmp_path / 'none.pth'}", "--config=demo"], "there is no such checkp"),
        (
            [f"--checkpoint={pth}", "--config=demo", "--step=2"],
            "one checkpoint; leave out --step=2",
        ),
        ([f"--checkpoint={pth}", f"--workdir={trained_run}"], "not allowed with argument"),
        ([], "one of the arguments --workdir --checkpoint is required"),
        ([f"--workdir={trained_run}", "--config=demo"], "--config goes with --checkpoint; a run"),
        (
            [f"--workdir={trained_run}", "--config.prompts=default"],
            "--config.prompts goes with --checkpoint; a run has its config, of which config.llm",
        ),
        ([f"--checkpoint={pth}", "--config=demo", "--wat"], "unknown argument --wat"),
    ):
        assert said in refused(*flags, *asked), flags
    assert "the clips of 'demo' are generated into the directory of a run, and" in refused(
        f"--checkpoint={pth}", "--config=demo"
    )


def test_an_adapter_alone_answers_where_there_is_nothing_else_to_it(exported, tmp_path):
    config = get_config("demo", input="text", label="ovlabel")
    bare = shutil.copytree(exported / "adapter", tmp_path / "bare")
    (bare / "fusion.safetensors").unlink()
    run = load_checkpoint(bare, config)
    assert run.trainable["fusion"] == {}
    assert jax.tree.leaves(run.trainable["lora"])


def test_training_starts_from_an_adapter_with_its_heads(exported, trained_run):
    config = get_config("demo", init_from=str(exported / "adapter"))
    said = []
    run = load_run(trained_run)
    llm = build.base_config("tiny")
    found = restore.initial_weights(config, llm, run.mesh, said.append)
    assert said == [f"starting from the adapter {exported / 'adapter'}"]
    jax.tree.map(np.testing.assert_array_equal, found, run.trainable)


def test_post_training_starts_from_a_checkpoint(exported, tmp_path, hub_cache):  # noqa: F811
    cached(hub_cache, "me/adapter", exported / "adapter")
    for flags, title in (
        ([f"--checkpoint={exported / 'x.pth'}", "--config=demo"], str(exported / "x.pth")),
        (["--checkpoint=me/adapter", "--config=demo"], None),
        ([f"--checkpoint={exported / 'hub'}"], f"of {exported / 'hub'}"),
    ):
        argv = [f"--workdir={tmp_path / 'new'}", *flags, "--config.rl.prompts=8"]
        argv.append("--config.optimizer.learning_rate=0.002")
        own, overrides = post_training.parse_command_line("affectgpt reinforce", "", argv)
        config, load = post_training.open_start(own, "rl", overrides)
        assert (config.rl.prompts, config.optimizer.learning_rate) == (8, 0.002)
        run = load()
        saved = SavedRun(exported / "hub")
        expected = saved.trainable(saved.best)
        jax.tree.map(np.testing.assert_array_equal, run.trainable, expected)
        assert run.title.endswith(title or "")
        post_training.note_start(config.rl, run, restore_lexicon())
        assert config.rl.start_sha256 == run.fingerprint(run.step)


def restore_lexicon():
    from affectgpt_jax.evaluation.lexicon import load_lexicon

    return load_lexicon(None)


# --- The PyTorch twin -----------------------------------------------------------------------------


def greedy(twin, torch, processor, batch, limit):
    """Token by token, the whole row anew for each: text, number of tokens, log-probability."""
    length = int((batch["segment_ids"][0] > 0).sum())
    table = twin.causal_lm.get_input_embeddings()
    end = processor.prompts.end
    ids, total = [], 0.0
    with torch.inference_mode():
        row = twin.embed_inputs(batch)[:1, :length]
        for _ in range(limit):
            states = twin.causal_lm.model(inputs_embeds=row).last_hidden_state[:, -1]
            log_probs = twin.logits(states).log_softmax(-1)[0]
            ids.append(int(log_probs.argmax()))
            total += float(log_probs[ids[-1]])
            text, mark, _ = processor.tokenizer.decode(ids).partition(end)
            if mark or ids[-1] == processor.tokenizer.end_id:
                break
            row = torch.cat([row, table(torch.tensor([ids[-1:]]))], dim=1)
    return text, len(ids), total


def test_a_file_of_the_pytorch_twin_answers_as_the_twin_does(ask, test_clips, tmp_path):
    torch = needs_torch.pytorch("the twin runs in PyTorch")
    needs_torch.peft("the twin's adapters are PEFT's")
    from benchmarks.torch_reference.model import TUNINGS, AffectGPT, to_device
    from benchmarks.torch_reference.weights import load_trainable

    config = get_config("demo")
    llm = build.base_config("tiny")
    lora, fusion = build.check_model(config, llm)
    model = build.model(config, llm)
    abstract = jax.eval_shape(lambda key: init_trainable(model, key), jax.random.key(0))
    tuning = TUNINGS["tuned"]
    twin = AffectGPT.from_pretrained(TINY, fusion, lora, dtype=torch.float32, tuning=tuning).eval()
    load_trainable(twin, random_tree(abstract, seed=5))
    trained = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values())
    sum(p.square().sum() for p in trained.values()).backward()
    optimizer.step()  # the weights are no longer those that came from here
    path = tmp_path / "checkpoint_000059_loss_0.123.pth"
    torch.save(
        {
            "model": {name: p.detach() for name, p in trained.items()},
            "optimizer": optimizer.state_dict(),
            "config": {"model_cls": "affectgpt"},
            "scaler": None,
            "epoch": 59,
        },
        path,
    )

    clips, limit = RecordSubset(RecordDataset(test_clips), range(5)), 12
    names = [f"--name={entry.name}" for entry in clips.index]
    flags = [f"--config.generate.max_new_tokens={limit}", "--config.generate.merge_lora=false"]
    found, _ = ask(
        f"--checkpoint={path}",
        "--config=demo",
        *flags,
        f"--records={test_clips}",
        *names,
        "--question=ovlabel",
        "--question=What does the voice say?",
        "--json",
    )
    processor = build.prompt_processor(config, build.tokenizer(TINY, llm))
    assert len({answer["text"] for answer in found}) > 5, "alike answers prove little"
    assert len(found) == 10
    for answer in found:
        number = [entry.name for entry in clips.index].index(answer["name"])
        clip = RecordSubset(clips, [number])
        examples = processor.prompt_examples(clip, answer["question"])
        [(_, batch)] = sequential_batches(clip, processor, examples, 1, 1)
        text, tokens, log_prob = greedy(
            twin, torch, processor, to_device(batch, tuning, "cpu"), limit
        )
        assert (answer["text"], answer["tokens"]) == (text, tokens)
        assert answer["logprob"] == pytest.approx(log_prob, abs=1e-3)
