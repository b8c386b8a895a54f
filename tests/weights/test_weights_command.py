"""`python -m affectgpt_jax.weights`: what it shows, what it writes, what it says when it cannot."""

import dataclasses
import fnmatch
import json
import re
import shutil
import subprocess
import sys
from importlib.resources import files

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file
from tiny_model import FUSION, LLM, make_model, random_base, random_trainable
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from trees import assert_same_tree

from affectgpt_jax import restore
from affectgpt_jax.configs import demo
from affectgpt_jax.configs.affectgpt_qwen25_7b import preference, reinforcement
from affectgpt_jax.data.prompts import load_prompts
from affectgpt_jax.data.tokenizer import CHAT_TOKENS, tokenizer_identities
from affectgpt_jax.models.lora import LoraConfig, merge
from affectgpt_jax.training.checkpoints import CheckpointError, Checkpoints, Manifest, SavedRun
from affectgpt_jax.weights.__main__ import main
from affectgpt_jax.weights.huggingface import base_identity, save_base
from affectgpt_jax.weights.peft import open_adapter
from affectgpt_jax.weights.release import open_release

LORA = LoraConfig(4, 32.0, 0.0)
MODEL = make_model(fusion=FUSION)
STEPS = {3: 0.5, 5: 0.25, 10_001: 0.75}


def write_tokenizer(directory):
    vocabulary = {word: i for i, word in enumerate(["a", *CHAT_TOKENS])}
    Tokenizer(WordLevel(vocabulary, unk_token="a")).save(str(directory / "tokenizer.json"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three checkpoints, the second of which is the best, and its base."""
    root = tmp_path_factory.mktemp("run")
    save_base(root / "base", LLM, random_base(MODEL))
    write_tokenizer(root / "base")
    config = demo.get_config()
    config.llm = str(root / "base")
    config.lora.rank, config.lora.alpha = LORA.rank, LORA.alpha
    (root / "work").mkdir()
    (root / "work" / "config.json").write_text(config.to_json())
    base, inputs = base_identity(root / "base"), tokenizer_identities(root / "base")
    with Checkpoints(root / "work", base, keep=9, inputs=inputs) as checkpoints:
        for step, loss in STEPS.items():
            trainable = random_trainable(MODEL, seed=step)
            opt_state = jax.tree.map(jnp.zeros_like, trainable)
            state = {"trainable": trainable, "opt_state": opt_state, "step": jnp.int32(step)}
            checkpoints.save(step, state, loss)
        checkpoints.wait()
    return root


def command(capsys, *arguments):
    """What the command prints; run in this process, since each start costs seconds."""
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def refused(*arguments):
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert str(end.value).startswith("error: ") and "\n" not in str(end.value)
    return str(end.value)


def facts(text):
    return dict(re.split(" {2,}", line, maxsplit=1) for line in text.split("\n\n")[0].splitlines())


def table(text):
    """Part -> tensors, parameters, bytes."""
    rows = [re.split(" {2,}", line) for line in text.strip().split("\n\n")[1].splitlines()[1:]]
    return {row[0]: tuple(int(cell.replace(",", "")) for cell in row[1:4]) for row in rows}


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# --- inspect --------------------------------------------------------------------------------------


def test_a_run_is_shown_with_its_best_checkpoint(run, capsys):
    text = command(capsys, "inspect", run / "work")
    found = facts(text)
    assert found["format"] == "run of affectgpt_jax, 3 checkpoints"
    assert found["steps"] == "3, 5, 10001 (best on validation: 5)"
    assert found["shown"] == "step 5, validation loss 0.2500"
    assert found["base"] == f"base, sha256 {base_identity(run / 'base').sha256}"
    assert "rank 4, alpha 32 (scale 8), on q_proj, k_proj" in found["LoRA"]
    assert found["heads"] == "pre-fusion attention, audio head attention, video head attention"
    trainable = random_trainable(MODEL)
    parts = table(text)
    assert parts["LoRA"] == (14, count(trainable["lora"]), 4 * count(trainable["lora"]))
    assert parts["audio head"][1] == count(trainable["fusion"]["audio"])
    assert parts["total"][1] == count(trainable)
    assert text.rstrip().endswith("float32")


def test_a_checkpoint_may_be_named_in_any_way(run, capsys):
    expected = command(capsys, "inspect", run / "work", "--step", 3)
    assert "step 3, validation loss 0.5000" in expected
    assert command(capsys, "inspect", run / "work" / "checkpoints" / "3") == expected
    assert command(capsys, "inspect", run / "work" / "checkpoints", "--step", 3) == expected


def test_a_base_is_shown_by_its_headers(run, tmp_path, capsys):
    text = command(capsys, "inspect", run / "base")
    found = facts(text)
    assert found["format"] == "base model in Hugging Face layout, 1 safetensors file"
    assert found["family"] == "qwen2 (Qwen2ForCausalLM)"
    assert (
        "layers 2, hidden 32, feed-forward 48, query heads 4, key-value heads 2" in found["sizes"]
    )
    assert (found["head"], found["tokenizer"], found["runs here"]) == ("untied", "yes", "yes")
    assert "sha256" not in found
    base = random_base(MODEL)
    parts = table(text)
    assert parts["embedding"] == (1, base["embed_tokens"].size, base["embed_tokens"].nbytes)
    assert parts["norms"][0] == 2 * LLM.num_hidden_layers + 1
    assert parts["total"][1] == count(base)
    hashed = facts(command(capsys, "inspect", run / "base", "--hash"))
    assert hashed["sha256"] == base_identity(run / "base").sha256

    save_base(tmp_path / "half", LLM, jax.tree.map(lambda x: x.astype(jnp.bfloat16), base))
    assert command(capsys, "inspect", tmp_path / "half").rstrip().endswith("bfloat16")


def test_a_base_of_a_family_that_cannot_run_here_is_shown_too(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "mamba", "hidden_size": 8}')
    tensors = {"backbone.layers.0.mixer.weight": np.zeros((2, 3), np.float16)}
    save_file(tensors, tmp_path / "model.safetensors")
    found = facts(command(capsys, "inspect", tmp_path))
    assert found["family"] == "mamba (unnamed)"
    assert found["runs here"].startswith("no: ") and "'mamba'" in found["runs here"]


def test_an_adapter_and_a_file_of_the_release_are_shown(run, tmp_path, capsys):
    command(capsys, "export-peft", run / "work", tmp_path / "adapter")
    text = command(capsys, "inspect", tmp_path / "adapter")
    found = facts(text)
    assert (found["format"], found["loads here"]) == ("PEFT adapter", "yes")
    assert found["base"] == str(run / "base")
    assert found["LoRA"].startswith("rank 4, alpha 32 (scale 8), on q_proj, k_proj")
    trainable = random_trainable(MODEL)
    assert table(text)["down_proj"] == (4, *sizes_of(trainable["lora"]["layers"]["down_proj"]))
    assert table(text)["video head"][1] == count(trainable["fusion"]["video"])
    assert table(text)["total"][1] == count(trainable)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    found = facts(command(capsys, "inspect", tmp_path / "adapter"))
    assert found["loads here"] == "no: use_dora=True is not supported"

    command(capsys, "export-release", run / "work", tmp_path / "c.pth", "--step", 10_001)
    text = command(capsys, "inspect", tmp_path / "c.pth")
    found = facts(text)
    assert (found["epoch"], found["beside"]) == ("2", "epoch, config")
    assert found["loads here"] == "yes"
    assert found["heads"] == "pre-fusion attention, audio head attention, video head attention"
    assert found["LoRA"].startswith("rank 4, alpha 32 (scale 8)")
    assert table(text)["total"][1] == count(random_trainable(MODEL))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda base: (base / "tokenizer.json").unlink(), "tokenizer.json: not found"),
        (lambda base: (base / "tokenizer.json").write_text("{}"), "tokenizer.json: not a tokenize"),
        (lambda base: edit(base, drop="model.norm.weight"), "model.norm.weight is missing"),
        (lambda base: edit(base, **{"visual.weight": (2, 2)}), "visual.weight is not part of this"),
        (lambda base: edit(base, **{"model.norm.weight": (3,)}), "model.norm.weight is (3,); expe"),
    ],
)
def test_a_base_that_does_not_load_is_not_said_to(run, tmp_path, capsys, change, words):
    base = shutil.copytree(run / "base", tmp_path / "base")
    change(base)
    found = facts(command(capsys, "inspect", base))["runs here"]
    assert found.startswith("no: ") and words in found


def test_a_head_of_its_own_is_shown(run, tmp_path, capsys):
    base = shutil.copytree(run / "base", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    found = facts(command(capsys, "inspect", base))
    assert found["runs here"] == "yes"
    assert found["head"].startswith("untied: another one than the embedding is stored")


def edit(directory, drop=None, file="model.safetensors", **shapes):
    """Leave a tensor out, and add some of ones."""
    tensors = load_file(directory / file)
    tensors.pop(drop, None)
    tensors |= {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    save_file(tensors, directory / file)


def sizes_of(tree):
    return count(tree), 4 * count(tree)


def test_inspecting_reads_headers_only(run, tmp_path, capsys, monkeypatch):
    def no_values(*_, **__):
        raise AssertionError("values were read")

    command(capsys, "export-release", run / "work", tmp_path / "c.pth")
    command(capsys, "export-peft", run / "work", tmp_path / "adapter")
    monkeypatch.setattr("affectgpt_jax.weights.torch_zip.Tensor.numpy", no_values)
    monkeypatch.setattr("affectgpt_jax.training.checkpoints.SavedRun.trainable", no_values)
    monkeypatch.setattr("affectgpt_jax.weights.report.base_identity", no_values)
    for path in (run / "work", run / "base", tmp_path / "adapter", tmp_path / "c.pth"):
        assert table(command(capsys, "inspect", path))["total"][1] > 0


# --- export ---------------------------------------------------------------------------------------


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@pytest.mark.parametrize(("arguments", "step"), [((), 5), (("--step", 3), 3)])
def test_what_is_exported_comes_back_bit_for_bit(run, tmp_path, capsys, arguments, step):
    trainable = random_trainable(MODEL, seed=step)
    shapes = abstract(trainable)
    adapter, file = tmp_path / "adapter", tmp_path / "c.pth"
    said = command(capsys, "export-peft", run / "work", adapter, *arguments)
    assert f"LoRA of step {step} for base" in said
    assert_same_tree(open_adapter(adapter, shapes["lora"], LORA)(shapes["lora"]), trainable["lora"])
    said = command(capsys, "export-release", run / "work", file, *arguments)
    assert f"of step {step}" in said
    read, unused = open_release(file, shapes, LORA)
    found = read(shapes)
    assert_same_tree(found, trainable)
    assert not unused


def test_a_merged_base_holds_base_and_adapter(run, tmp_path, capsys):
    command(capsys, "merge", run / "work", tmp_path / "merged")
    lora = random_trainable(MODEL, seed=5)["lora"]
    save_base(tmp_path / "tree", LLM, merge(random_base(MODEL), lora, LORA.scale))
    found, expected = (load_file(tmp_path / d / "model.safetensors") for d in ("merged", "tree"))
    for name, value in expected.items():
        # One product of all layers against one of each may differ in the last bit.
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-6)
    assert (tmp_path / "merged" / "tokenizer.json").exists()


# --- What is refused ------------------------------------------------------------------------------


def test_places_without_weights_are_refused(run, tmp_path):
    assert "neither a file nor a directory" in refused("inspect", tmp_path / "nowhere")
    assert "no weights of a known kind" in refused("inspect", tmp_path)
    (tmp_path / "checkpoints").mkdir()
    assert "holds no checkpoint" in refused("inspect", tmp_path)
    assert "holds no checkpoint" in refused("export-peft", run / "base", tmp_path / "out")
    (tmp_path / "notes.txt").write_text("hello")
    assert "notes.txt is no zip file" in refused("inspect", tmp_path / "notes.txt")
    words = refused("inspect", run / "base" / "model.safetensors")
    assert "name its directory" in words
    assert "has no checkpoint of step 4; it has [3, 5, 10001]" in refused(
        "merge", run / "work", tmp_path / "out", "--step", 4
    )


def test_what_exists_is_not_written_over(run, tmp_path):
    (tmp_path / "here").mkdir()
    for name in ("export-peft", "export-release", "merge"):
        words = refused(name, run / "work", tmp_path / "here")
        assert f"{tmp_path / 'here'} exists already" in words
    assert not list((tmp_path / "here").iterdir())


def test_another_base_is_not_merged_into(run, tmp_path):
    save_base(tmp_path / "other", LLM, random_base(MODEL, seed=9))
    words = refused("merge", run / "work", tmp_path / "out", "--base", tmp_path / "other")
    for identity in (base_identity(tmp_path / "other"), base_identity(run / "base")):
        assert identity.sha256 in words
    assert not (tmp_path / "out").exists()
    assert "is not a directory" in refused("merge", run / "work", tmp_path / "out", "--base", "/no")


def copy_run(run, tmp_path):
    subprocess.run(["cp", "-r", run / "work", tmp_path / "copy"], check=True)
    return tmp_path / "copy"


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"lora": {"rank": 4}}'])
def test_a_run_without_its_config_is_refused(run, tmp_path, text):
    copy = copy_run(run, tmp_path)
    (copy / "config.json").unlink()
    if text is not None:
        (copy / "config.json").write_text(text)
    assert "expected the config of a run" in refused("export-peft", copy, tmp_path / "out")


@pytest.mark.parametrize("file", ["state/_METADATA", "manifest.json"])
def test_a_damaged_checkpoint_is_refused_by_name(run, tmp_path, file):
    copy = copy_run(run, tmp_path)
    # (Not the arrays: Orbax closes its event loop on the first error, and the reads that are still
    # on their way then complain at random moments.)
    path = copy / "checkpoints" / "5" / file
    path.write_bytes(path.read_bytes()[:20])
    words = refused("export-release", copy, tmp_path / "c.pth")
    assert f"{copy / 'checkpoints' / '5'} is damaged" in words
    assert f"{copy / 'checkpoints' / '5'} is damaged" in refused("inspect", copy)


def test_a_run_is_opened_without_its_model_and_left_as_it_was(run):
    before = {path: path.stat().st_mtime_ns for path in (run / "work").rglob("*")}
    saved = SavedRun(run / "work")
    assert (saved.steps, saved.best) == ((3, 5, 10_001), 5)
    assert [saved.val_loss(step) for step in saved.steps] == [*STEPS.values()]
    assert_same_tree(saved.trainable(3), random_trainable(MODEL, seed=3))
    assert saved.shapes(3) == abstract(random_trainable(MODEL))
    with pytest.raises(CheckpointError, match="no checkpoint of step 7"):
        saved.trainable(7)
    assert before == {path: path.stat().st_mtime_ns for path in (run / "work").rglob("*")}


def test_the_command_ends_with_one_line_and_status_1(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "affectgpt_jax.weights", "inspect", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path} holds no weights")
    assert "Traceback" not in done.stderr and not done.stdout


def test_a_folder_for_the_hub_is_a_run_an_adapter_and_a_card(run, tmp_path, capsys):
    import yaml

    out = tmp_path / "out"
    (run / "work" / "result.json").write_text('{"best_step": 5, "hit": 0.6581, "clips": 2048}')
    assert "read it before you publish" in command(capsys, "export-hub", run / "work", out)
    assert SavedRun(out).steps == (5,)
    assert SavedRun(out).fingerprint(5) == SavedRun(run / "work").fingerprint(5)
    saved = SavedRun(run / "work").trainable(5)
    shapes = SavedRun(out).shapes(5)
    assert_same_tree(open_adapter(out, shapes["lora"], LORA)(shapes["lora"]), saved["lora"])
    config = restore.load_config(out)
    assert (config.llm, config.data.train) == ("base", "demo")
    assert str(run) not in (out / "config.json").read_text() + (out / "README.md").read_text()
    _, metadata, text = (out / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(metadata)["base_model"] == "base"
    assert base_identity(run / "base").sha256 in text and "| 0.658 |" in text
    assert "exists already" in refused("export-hub", run / "work", out)
    # The scores are those of another checkpoint.
    command(capsys, "export_hub", run / "work", tmp_path / "third", "--step", 3)
    assert "0.658" not in (tmp_path / "third" / "README.md").read_text()


def test_a_run_with_prompts_and_a_section_of_its_own_is_exported_without_a_foreign_path(
    run, tmp_path, capsys, monkeypatch
):
    work = shutil.copytree(run / "work", tmp_path / "here" / "work")
    mine = tmp_path / "here" / "mine.toml"
    shipped = files("affectgpt_jax") / "assets" / "prompts" / "compact.toml"
    mine.write_text(shipped.read_text(encoding="utf-8").replace("They feel", "They seem"), "utf-8")
    identity = load_prompts(str(mine)).identity
    config = ConfigDict(json.loads((work / "config.json").read_text()))
    config.prompts, config.rl, config.dpo = str(mine), reinforcement(), preference()
    for section in (config.rl, config.dpo):
        for key in ("start", "data", "lexicon", "test_lexicon"):
            section[key] = str(tmp_path / "here" / key)
    config.rl.start = str(tmp_path / "here" / "models--me--run" / "snapshots" / "0123")
    (work / "config.json").write_text(config.to_json())
    (work / "extraction.json").write_text("{}")
    for step in STEPS:
        manifest = Manifest.read(work / "checkpoints" / str(step))
        inputs = manifest.inputs | {"prompts": identity}
        dataclasses.replace(manifest, inputs=inputs).write(work / "checkpoints" / str(step))
    fingerprint = SavedRun(work).fingerprint(5)
    out, again = tmp_path / "there" / "out", tmp_path / "there" / "again"
    out.parent.mkdir()
    command(capsys, "export-hub", work, out)
    shutil.rmtree(tmp_path / "here")
    written = [path.relative_to(out) for path in out.rglob("*") if path.is_file()]
    for path in written:
        assert str(tmp_path).encode() not in (out / path).read_bytes(), path
    fetched = [str(path) for path in written if path.name != "README.md"]
    for path in fetched:
        assert any(fnmatch.fnmatch(path, known) for known in restore._CHECKPOINT_FILES), path
    assert {"prompts.toml", "extraction.json"} <= {*fetched}
    # It is found wherever the folder is, and exported once more.
    command(capsys, "export-hub", out, again)
    for folder in (out, again):
        monkeypatch.chdir(tmp_path if folder == out else folder)
        found = restore.load_config(folder)
        assert load_prompts(found.prompts).identity.sha256 == identity.sha256
        assert found.rl.start == "me/run" and found.dpo.test_lexicon == "test_lexicon"
        assert SavedRun(folder).fingerprint(5) == fingerprint
        assert SavedRun(folder).inputs(5)["prompts"].sha256 == identity.sha256
    monkeypatch.chdir(tmp_path)
    (out / "prompts.toml").write_bytes(shipped.read_bytes())
    assert "has other prompts than step 5 of" in refused("export-hub", out, tmp_path / "third")
    (out / "prompts.toml").unlink()
    assert "'prompts.toml' is neither a file nor" in refused("export-hub", out, tmp_path / "third")
