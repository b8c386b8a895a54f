"""Checkpoints: what comes back is what was saved, and only where it belongs."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import assert_same_tree

from affectgpt_jax.common.identity import Identity
from affectgpt_jax.training import sharding
from affectgpt_jax.training.checkpoints import (
    ALLOWED_OTHERS,
    CheckpointError,
    Checkpoints,
    CheckpointWriteError,
    SavedRun,
)
from affectgpt_jax.training.optimizer import OptimizerConfig, make_optimizer

BASE = Identity("Tiny", "0" * 64)
SHAPES = {
    "lora": {"layers": {"q_proj": {"lora_a": (2, 8, 4), "lora_b": (2, 4, 8)}}},
    "fusion": {"audio": {"projection": {"kernel": (6, 8), "bias": (8,)}}},
}
OPTIMIZER = make_optimizer(OptimizerConfig(clip_norm=1.0), 100)


def make_state(seed=0, shapes=SHAPES):
    rng = np.random.default_rng(seed)

    def draw(leaf):
        if leaf.dtype == jnp.int32:
            return jnp.int32(rng.integers(1000))
        return jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)

    trainable = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple))
    state = {
        "trainable": trainable,
        "opt_state": OPTIMIZER.init(trainable),
        "step": jnp.int32(0),
    }
    return jax.tree.map(draw, state)


def abstract(mesh="data:8", shapes=SHAPES):
    return sharding.abstract(sharding.make_mesh(mesh), lambda key: make_state(shapes=shapes))


@pytest.fixture
def saved(tmp_path):
    """A run's directory with a checkpoint of step 7."""
    with Checkpoints(tmp_path, BASE) as checkpoints:
        checkpoints.save(7, make_state(), val_loss=None)
        checkpoints.wait()
    return tmp_path


def steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def save(workdir, *numbers, losses=None, **options):
    """Checkpoints of these steps, each of its own state."""
    with Checkpoints(workdir, BASE, keep=9, **options) as checkpoints:
        for step in numbers:
            checkpoints.save(step, make_state(step), (losses or {}).get(step))


@pytest.mark.parametrize("mesh", ["data:8", "fsdp:8", "data:2,fsdp:2,tensor:2"])
def test_a_sharded_state_is_restored_bit_for_bit_onto_any_layout(tmp_path, mesh):
    state = make_state()
    written_on = sharding.shardings_of(abstract("fsdp:2,tensor:4"))
    with Checkpoints(tmp_path, BASE) as checkpoints:
        checkpoints.save(7, jax.device_put(state, written_on), val_loss=0.5)
        checkpoints.wait()
    with Checkpoints(tmp_path, BASE) as checkpoints:  # as another process would
        assert checkpoints.latest_step() == checkpoints.best_step() == 7
        restored = checkpoints.restore(7, abstract(mesh))
    assert_same_tree(restored, state)
    for leaf, wanted in zip(
        jax.tree.leaves(restored), jax.tree.leaves(abstract(mesh)), strict=True
    ):
        assert leaf.sharding == wanted.sharding


@pytest.mark.parametrize("mesh", ["data:8", "fsdp:8", "data:2,fsdp:2,tensor:2"])
def test_what_is_trained_is_restored_without_the_rest(saved, mesh):
    wanted = abstract(mesh)["trainable"]
    before = sorted(saved.rglob("*"))
    restored = SavedRun(saved).restore(7, BASE, wanted)
    assert_same_tree(restored, make_state()["trainable"])
    for leaf, shape in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding == shape.sharding
    assert sorted(saved.rglob("*")) == before, "reading has written"


@pytest.mark.parametrize("part", ["lora", "fusion"])
def test_a_model_without_adapters_or_without_fusion_is_restored(tmp_path, part):
    shapes = SHAPES | {part: {}}
    with Checkpoints(tmp_path, BASE) as checkpoints:
        checkpoints.save(7, make_state(shapes=shapes), val_loss=None)
        checkpoints.wait()
    restored = SavedRun(tmp_path).restore(7, BASE, abstract(shapes=shapes)["trainable"])
    assert_same_tree(restored, make_state(shapes=shapes)["trainable"])


def test_a_state_may_be_changed_as_soon_as_save_returns(tmp_path):
    expected = make_state()
    state = jax.device_put(make_state(), jax.devices()[0])
    with Checkpoints(tmp_path, BASE) as checkpoints:
        checkpoints.save(1, state, val_loss=None)
        consume = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)
        jax.block_until_ready(consume(state))
        checkpoints.wait()
        assert_same_tree(checkpoints.restore(1, abstract()), expected)


def test_a_run_without_checkpoints_has_no_step(tmp_path):
    with Checkpoints(tmp_path, BASE) as checkpoints:
        assert checkpoints.latest_step() is None
        assert checkpoints.best_step() is None


def test_the_newest_and_the_best_on_validation_are_kept(tmp_path):
    state = make_state()
    with Checkpoints(tmp_path, BASE, keep=2) as checkpoints:
        for step, val_loss in enumerate([0.9, 0.3, 0.5, 0.4, 0.6], start=1):
            checkpoints.save(step, state, val_loss)
        checkpoints.wait()
        assert checkpoints.latest_step() == 5
        assert checkpoints.best_step() == 2
    assert steps(tmp_path) == [2, 4, 5]


def test_without_validation_the_newest_is_the_best(tmp_path):
    with Checkpoints(tmp_path, BASE, keep=1) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(), val_loss=None)
        checkpoints.wait()
        assert checkpoints.best_step() == 2
    assert steps(tmp_path) == [2]


def test_of_equal_validation_losses_the_newest_is_the_best(tmp_path):
    save(tmp_path, 9, 10, 11, losses={9: 0.25, 10: 0.25, 11: 0.5})
    with Checkpoints(tmp_path, BASE) as checkpoints:
        assert checkpoints.best_step() == SavedRun(tmp_path).best == 10


# --- What a kill leaves ---------------------------------------------------------------------------


def test_what_a_killed_run_has_left_is_no_checkpoint_and_is_removed(saved):
    folder = saved / "checkpoints"
    shutil.copytree(folder / "7", folder / ".saving-9")
    (folder / ".saving-9" / "manifest.json").unlink()
    shutil.copytree(folder / "7", folder / ".deleting-5")
    assert SavedRun(saved).steps == (7,)
    Checkpoints(saved, BASE, is_main_process=False).close()
    assert (folder / ".saving-9").exists(), "only the first process cleans up"
    with Checkpoints(saved, BASE) as checkpoints:
        assert checkpoints.step_to_resume() == 7
    assert [path.name for path in folder.iterdir()] == ["7"]


def test_a_checkpoint_that_was_not_validated_can_be_later(tmp_path):
    save(tmp_path, 1, 2, losses={1: 0.5})
    with Checkpoints(tmp_path, BASE) as checkpoints:
        assert checkpoints.val_loss(2) is None and checkpoints.best_step() == 1
        checkpoints.set_val_loss(2, 0.25)
        assert checkpoints.val_loss(2) == 0.25 and checkpoints.best_step() == 2
        assert_same_tree(checkpoints.restore(2, abstract()), make_state(2))


def test_a_save_ends_on_what_the_save_before_it_met(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    checkpoints = Checkpoints(tmp_path, BASE)
    monkeypatch.setattr("affectgpt_jax.training.checkpoints.Manifest.write", full)
    checkpoints.save(1, make_state(1), 0.5)
    with pytest.raises(CheckpointWriteError, match="No space left on device"):
        checkpoints.save(2, make_state(2), 0.5)


# --- What answers depend on -----------------------------------------------------------------------

INPUTS = {
    name: Identity(name, digit * 64)
    for name, digit in (("tokenizer", "1"), ("training records", "2"), ("prompts", "3"),
                        ("lexicon", "4"), ("code", "5"))
}  # fmt: skip


def resume(workdir, inputs, allow_other=()):
    """What is said, and the step; the next one is saved."""
    said = []
    with Checkpoints(workdir, BASE, keep=9, inputs=inputs) as checkpoints:
        step = checkpoints.step_to_resume(say=said.append, allow_other=allow_other)
        checkpoints.save((step or 0) + 1, make_state(), None)
    return said, step


@pytest.mark.parametrize("name", ["tokenizer", "training records", "prompts", "lexicon"])
def test_another_input_is_refused_by_name_and_both_hashes(tmp_path, name):
    assert resume(tmp_path, INPUTS) == ([], None)
    assert resume(tmp_path, INPUTS) == ([], 1)
    others = INPUTS | {name: Identity("other", "f" * 64)}
    advice = f"pass --allow-other={name}" if name in ALLOWED_OTHERS else "another --workdir"
    words = rf"checkpoints/2: {name}: .*{name} \(sha256 \d+\).*other \(sha256 f+\).*{advice}"
    with pytest.raises(CheckpointError, match=words):
        resume(tmp_path, others)
    with pytest.raises(CheckpointError, match=words):
        SavedRun(tmp_path).check_inputs(2, {name: others[name]})
    with pytest.raises(CheckpointError, match=f"{name} x: it was trained with none"):
        Checkpoints(tmp_path, BASE, inputs={name + " x": others[name]}).step_to_resume()
    SavedRun(tmp_path).check_inputs(2, {key: INPUTS[key] for key in INPUTS if key != name})


def test_a_base_of_another_content_is_refused_before_it_is_read(saved):
    with pytest.raises(CheckpointError, match="checkpoints/7 was trained on the base Tiny"):
        Checkpoints(saved, Identity("Tiny", "1" * 64)).step_to_resume()


@pytest.mark.parametrize("name, flag", [("prompts", ["prompts"]), ("code", [])])
def test_an_input_that_may_be_another_is_said_and_recorded(tmp_path, name, flag):
    resume(tmp_path, INPUTS)
    others = INPUTS | {name: Identity("other", "f" * 64)}
    (said,), step = resume(tmp_path, others, flag)
    assert step == 1 and said.startswith("note: ") and f"{name}: it was trained with" in said
    assert SavedRun(tmp_path).inputs(1) == INPUTS
    assert SavedRun(tmp_path).inputs(2) == others
    assert resume(tmp_path, others) == ([], 2)


# --- What cannot be read back ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a[1]", "a*b", "a?b", "a\\b", os.fsdecode(b"a\xffb")])
def test_a_path_that_the_libraries_misread_is_refused_at_the_start(tmp_path, name):
    with pytest.raises(CheckpointError, match="below a path with '.*' in it; name another --workd"):
        Checkpoints(tmp_path / name / "run", BASE)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("name", ["a[1]", "a?b", "a b", "a]b", "a:b,c;d", "a%20b", "日本", "a\nb"])
def test_a_run_below_another_odd_path_is_read(saved, tmp_path, name):
    shutil.copytree(saved / "checkpoints", tmp_path / name / "checkpoints")
    assert_same_tree(SavedRun(tmp_path / name).trainable(7), make_state()["trainable"])


def test_a_run_below_a_backslash_is_refused_by_its_path(saved, tmp_path):
    shutil.copytree(saved / "checkpoints", tmp_path / "a\\b" / "checkpoints")
    with pytest.raises(CheckpointError, match="cannot be read below a path with .*, or move the r"):
        SavedRun(tmp_path / "a\\b")


@pytest.mark.parametrize("name", ["a[1]", "a\\b"])
def test_what_cannot_be_read_back_is_no_checkpoint(tmp_path, name, monkeypatch):
    # As if the libraries came to misread a path that is not refused.
    monkeypatch.setattr("affectgpt_jax.training.checkpoints.check_path", lambda workdir: None)
    checkpoints = Checkpoints(tmp_path / name, BASE)
    checkpoints.save(1, make_state(1), 0.5)
    with pytest.raises(CheckpointWriteError, match="it cannot be read back"):
        checkpoints.wait()
    assert checkpoints._folder.steps() == []


@pytest.mark.parametrize(
    "state, words",
    [
        (make_state(0) | {"step": jnp.int32(9)}, "step "),
        (make_state(shapes=SHAPES | {"lora": {}}), ".*lora/layers/q_proj/lora_a"),
    ],
)
def test_what_reads_back_as_something_else_is_no_checkpoint(saved, state, words):
    checkpoints = Checkpoints(saved, BASE)
    finished = checkpoints._orbax.wait_until_finished

    def other_bytes():
        finished()
        written = saved / "checkpoints" / ".saving-9" / "state"
        if written.exists():
            shutil.rmtree(written)
            shutil.copytree(saved / "checkpoints" / "7" / "state", written)

    checkpoints._orbax.wait_until_finished = other_bytes
    checkpoints.save(9, state, 0.5)
    with pytest.raises(CheckpointWriteError, match=f"it reads back as something else: {words}"):
        checkpoints.wait()
    assert SavedRun(saved).steps == (7,)


# --- What is damaged ------------------------------------------------------------------------------


def flip(path, place=None):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if place is None else place] ^= 1
    path.write_bytes(data)


def files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)


def test_a_flipped_byte_in_any_file_is_refused_by_its_name(saved):
    where = saved / "checkpoints" / "7"
    found = files(where)
    assert len(found) > 8
    for path in found:
        whole = path.read_bytes()
        for place in {0, len(whole) // 2, len(whole) - 1}:
            flip(path, place)
            for read in (
                lambda: Checkpoints(saved, BASE).step_to_resume(),
                lambda: SavedRun(saved).trainable(7),
            ):
                with pytest.raises(CheckpointError) as error:
                    read()
                assert f"{where} is damaged: {path.relative_to(where)}" in str(error.value)
            path.write_bytes(whole)
    assert_same_tree(SavedRun(saved).trainable(7), make_state()["trainable"])


def test_a_truncated_or_missing_file_is_refused_by_its_name(saved):
    where = saved / "checkpoints" / "7"
    for path in files(where):
        whole = path.read_bytes()
        for damage in (lambda p, w: p.write_bytes(w[: len(w) // 2]), lambda p, w: p.unlink()):
            damage(path, whole)
            with pytest.raises(CheckpointError) as error:
                Checkpoints(saved, BASE).step_to_resume()
            assert f"{where} is damaged: {path.relative_to(where)}" in str(error.value)
            path.write_bytes(whole)


def test_a_value_changed_in_the_manifest_is_noticed(saved):
    path = saved / "checkpoints" / "7" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"val_loss": 0.1}))
    with pytest.raises(CheckpointError, match="manifest.json: its own sha256 does not match"):
        SavedRun(saved)


def test_the_newest_intact_checkpoint_is_offered_and_with_a_flag_used(tmp_path):
    save(tmp_path, 3, 5, 7, 9, losses={5: 0.1})
    folder = tmp_path / "checkpoints"
    flip(folder / "9" / "state" / "_METADATA")
    (folder / "7" / "manifest.json").unlink()
    with Checkpoints(tmp_path, BASE, keep=9) as checkpoints:
        with pytest.raises(CheckpointError) as error:
            checkpoints.step_to_resume()
        assert f"{folder / '9'} is damaged: state/_METADATA: sha256" in str(error.value)
        assert "the newest intact checkpoint is that of step 5: pass --fallback" in str(error.value)
        assert "\n" not in str(error.value)
        said = []
        assert checkpoints.step_to_resume(fallback=True, say=said.append) == 5
        assert "set aside, going on from step 5" in said[0]
        assert checkpoints.latest_step() == checkpoints.best_step() == 5
        assert_same_tree(checkpoints.restore(5, abstract()), make_state(5))
        checkpoints.save(7, make_state(7), 0.5)  # as the run comes there again
        checkpoints.wait()
        assert_same_tree(checkpoints.restore(7, abstract()), make_state(7))
    assert sorted(path.name for path in folder.iterdir()) == [
        "3",
        "5",
        "7",
        "7.damaged",
        "9.damaged",
    ]


def test_where_no_checkpoint_is_intact_the_flag_does_not_help(saved):
    flip(saved / "checkpoints" / "7" / "state" / "_METADATA")
    with Checkpoints(saved, BASE) as checkpoints:
        for fallback in (False, True):
            with pytest.raises(CheckpointError, match="no older checkpoint is intact"):
                checkpoints.step_to_resume(fallback)
    assert steps(saved) == [7]


def test_what_cannot_be_written_is_one_error_and_leaves_what_was_there(saved, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    checkpoints = Checkpoints(saved, BASE)
    monkeypatch.setattr("affectgpt_jax.training.checkpoints.Manifest.write", full)
    checkpoints.save(9, make_state(9), 0.5)
    with pytest.raises(CheckpointWriteError, match="is the disk full.*No space left on device"):
        checkpoints.wait()
    monkeypatch.undo()
    with Checkpoints(saved, BASE) as again:
        assert again.step_to_resume() == 7
    assert steps(saved) == [7]


# --- What is refused ------------------------------------------------------------------------------


def assert_refused(workdir, words, base=BASE, shapes=SHAPES):
    wanted = abstract(shapes=shapes)
    errors = []
    with Checkpoints(workdir, base) as checkpoints:
        with pytest.raises(CheckpointError) as error:
            checkpoints.restore(7, wanted)
        errors.append(str(error.value))
    with pytest.raises(CheckpointError) as error:
        SavedRun(workdir).restore(7, base, wanted["trainable"])
    for message in (*errors, str(error.value)):
        for word in ("checkpoints/7", *words):
            assert word in message


def test_a_checkpoint_of_another_base_is_refused_by_both_identities(saved):
    other = Identity("Other", "1" * 64)
    words = [BASE.name, BASE.sha256, other.name, other.sha256, "--config.llm"]
    assert_refused(saved, words, base=other)


def test_another_shape_is_refused_by_the_name_of_the_leaf(saved):
    wider = {
        "layers": {"q_proj": {"lora_a": (2, 8, 16), "lora_b": (2, 16, 8)}},
    }
    words = ["q_proj/lora_a is float32[2, 8, 4] there and float32[2, 8, 16] here"]
    assert_refused(saved, words, shapes=SHAPES | {"lora": wider})


def test_a_leaf_that_the_checkpoint_lacks_is_refused_by_its_name(saved):
    more = {"audio": SHAPES["fusion"]["audio"], "video": {"score": {"bias": (1,)}}}
    assert_refused(saved, ["video/score/bias is missing there"], shapes=SHAPES | {"fusion": more})


def test_a_leaf_that_only_the_checkpoint_has_is_refused_by_its_name(saved):
    words = ["fusion/audio/projection/bias is float32[8] there and missing here"]
    assert_refused(saved, words, shapes=SHAPES | {"fusion": {}})
