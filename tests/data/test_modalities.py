"""The registry of modalities, and a new one, the pose, from its records to a trained run."""

import dataclasses
import importlib.resources
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from affectgpt_jax import build, evaluate, import_arrays, load_run, train
from affectgpt_jax.config import ConfigError, validate
from affectgpt_jax.configs import demo as demo_config
from affectgpt_jax.data import demo, modalities
from affectgpt_jax.data.modalities import HEADS, INPUT_MODES, MODALITIES, Head, InputMode, Modality
from affectgpt_jax.data.prompts import PromptError, load_prompts
from affectgpt_jax.data.records import RecordDataset, RecordError, encode, write_records
from affectgpt_jax.models import fusers
from affectgpt_jax.models.affectgpt import init_trainable
from affectgpt_jax.training.step import init_key
from affectgpt_jax.weights import report
from affectgpt_jax.weights.release import save_release
from affectgpt_jax.weights.streaming import WeightsError

FRAMES, WIDTH = 5, 51


class EndsHead(fusers.FusionHead):
    """Two tokens: the first and the last state, projected."""

    @classmethod
    def num_tokens(cls, spec: Head) -> int:
        return 2

    @nn.compact
    def __call__(self, states: jax.Array, deterministic: bool = True) -> jax.Array:
        del deterministic
        return self.project(states[:, jnp.array([0, -1])])


POSE = Modality("pose", "<PoseHere>", "pose", letter="V")
POSE_HEAD = Head("pose", ("ends", "qformer"), num_queries=4, max_positions=4, feature_width=WIDTH)
POSE_MODE = InputMode("multi_audio_pose_text", ("multi", "audio", "pose"), True)


@pytest.fixture
def registry():
    """The tables, which are as they were after the test."""
    tables = (HEADS, MODALITIES, INPUT_MODES, fusers.HEAD_CLASSES)
    before = [dict(table) for table in tables]
    yield
    for table, rows in zip(tables, before, strict=True):
        table.clear()
        table.update(rows)


@pytest.fixture
def pose(registry):
    """The registry with the pose, its head, and an input mode that shows it."""
    fusers.HEAD_CLASSES["ends"] = EndsHead
    modalities.register(POSE, POSE_HEAD, [POSE_MODE])


@pytest.fixture
def prompts(tmp_path):
    """A prompt file with a line for the pose."""
    shipped = importlib.resources.files("affectgpt_jax") / "assets" / "prompts" / "compact.toml"
    text = shipped.read_text(encoding="utf-8")
    path = tmp_path / "prompts.toml"
    path.write_text(text.replace("[inputs]\n", '[inputs]\npose = "pose: {pose} "\n'))
    return path


def with_pose(split, size, width=WIDTH):
    """The demo's clips, all but every fourth with features of the pose."""
    rng = np.random.default_rng(0)
    for i, record in enumerate(demo.World(0).records(split, size)):
        added = {} if i % 4 == 3 else {"pose": rng.normal(size=(FRAMES, width))}
        yield dataclasses.replace(record, features=record.features | added)


def write(directory, split, size, width=WIDTH):
    encoders = dict.fromkeys((*demo.DEFAULT_FEATURES, "pose"), "some encoder")
    write_records(directory, with_pose(split, size, width), encoders=encoders)
    return directory


def pose_config(**changes):
    config = demo_config.get_config()
    config.input = POSE_MODE.name
    config.update_from_flattened_dict(changes)
    return config


# --- the tables that ship -------------------------------------------------------------------------


def test_every_row_of_the_registry_names_others_that_are_there():
    features = modalities.feature_names()
    assert set(features) == {m.name for m in MODALITIES.values() if not m.fused}
    for modality in MODALITIES.values():
        assert set(modality.features) <= set(features)
        assert HEADS[modality.head].is_pre_fusion == bool(modality.fused)
        assert modality.fused or modality.letter in ("A", "V")
    for head in HEADS.values():
        assert head.name in {modality.head for modality in MODALITIES.values()}
        assert all(fusers.head_class(head, kind) for kind in head.kinds)
    for mode in INPUT_MODES.values():
        assert set(mode.slots) <= set(MODALITIES)
        assert list(mode.slots) == [name for name in MODALITIES if name in mode.slots]


def test_orders_are_those_of_the_formats():
    assert modalities.feature_names() == ("face", "frame", "audio", "image")
    assert modalities.placeholders() == (
        "<ImageHere>", "<AudioHere>", "<FrameHere>", "<FaceHere>", "<MultiHere>",
    )  # fmt: skip
    assert modalities.extracted_features() == {"video": ("face", "frame"), "audio": ("audio",)}


def test_projectors_have_the_paper_s_defaults():
    assert modalities.projectors() == {
        "video": "attention", "audio": "attention", "image": "mean",
        "video_width": 768, "audio_width": 1024, "image_width": 768,
    }  # fmt: skip


def test_a_mode_reads_the_features_of_its_slots_once():
    assert INPUT_MODES["multi_audio_frame_text"].features == ("frame", "audio")
    assert INPUT_MODES["multi_text"].features == ("face", "audio")
    assert INPUT_MODES["text"].features == ()


# --- a new modality -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("modality", "head", "modes", "message"),
    [
        (dataclasses.replace(POSE, name="face"), POSE_HEAD, [], "Modality 'face' is registered"),
        (POSE, dataclasses.replace(POSE_HEAD, name="video"), [], "Head 'video' is registered"),
        (POSE, POSE_HEAD, [InputMode("text", (), True)], "InputMode 'text' is registered"),
        (dataclasses.replace(POSE, placeholder="pose"), POSE_HEAD, [], "is 'pose'.*<PoseHere>"),
        (POSE, None, [], "names the head 'pose'; expected one of multi, audio, video, image"),
        (POSE, dataclasses.replace(POSE_HEAD, feature_width=0), [], "feature_width 0"),
        (dataclasses.replace(POSE, head="multi"), None, [], "'multi' of 'pose' .*feature_width 0"),
        (POSE, POSE_HEAD, [InputMode("p", ("hands",), True)], "'hands' is not known.*image, pose"),
        (dataclasses.replace(POSE, head="multi", fused=("pose",)), None, [], "'pose' is not known"),
    ],
)  # fmt: skip
def test_a_row_that_does_not_fit_is_refused_and_nothing_is_added(
    registry, modality, head, modes, message
):
    before = [dict(table) for table in (HEADS, MODALITIES, INPUT_MODES)]
    with pytest.raises(ValueError, match=message):
        modalities.register(modality, head, modes)
    assert [dict(table) for table in (HEADS, MODALITIES, INPUT_MODES)] == before


def test_an_unregistered_modality_is_refused():
    (record,) = with_pose("val", 1)
    with pytest.raises(RecordError, match="pose.*are unknown"):
        encode(record)
    with pytest.raises(ConfigError, match="config.input is 'multi_audio_pose_text'"):
        validate(pose_config())


def test_a_new_modality_trains_and_answers(pose, prompts, tmp_path):
    places = {split: write(tmp_path / split, split, 16) for split in ("train", "val", "test")}
    flags = (
        *(f"--config.data.{split}={place}" for split, place in places.items()),
        *(f"--config.input={POSE_MODE.name}", f"--config.prompts={prompts}"),
        *("--config.steps=2", "--config.checkpoint_every=2", "--config.batch_size=8"),
        *("--config.generate.batch_size=16", "--config.generate.max_new_tokens=2"),
        *("--config.label=ovlabel", "--config.mesh=data:-1"),
    )
    train.main([f"--workdir={tmp_path / 'run'}", *flags])
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert np.isfinite(result["loss_last"])
    assert result["clips"] == 16
    assert "ceilings" not in result  # these are records, not the demo world

    run = load_run(tmp_path / "run")
    start = init_trainable(run.model, init_key(run.config.seed))["fusion"]
    assert run.trainable["fusion"].keys() == start.keys() == {"multi", "audio", "pose"}
    for leaf, before in zip(
        jax.tree.leaves(run.trainable["fusion"]["pose"]), jax.tree.leaves(start["pose"])
    ):
        assert (np.asarray(leaf) != np.asarray(before)).all()
    assert evaluate.modalities(run.processor) == "AVT"


def test_a_new_modality_has_its_place_in_prompt_tokenizer_and_model(pose, prompts):
    config = pose_config(prompts=str(prompts))
    directory, llm = build.base_directory("tiny"), build.base_config("tiny")
    tokenizer = build.tokenizer(directory, llm)
    known = list(tokenizer.placeholder_ids)
    assert known == [*modalities.placeholders()]
    assert known[-1] == "<PoseHere>"  # last, so that all others keep their ids
    processor = build.prompt_processor(config, tokenizer)
    assert processor.features == {"audio": 1024, "face": 768, "pose": WIDTH}
    assert processor.token_counts == {"multi": 1, "audio": 1, "pose": 2}
    (clip,) = with_pose("val", 1)
    found = processor.prompts.prompt(processor.mode, processor.token_counts, clip, "ovlabel")
    assert "voice: <AudioHere> pose: <PoseHere><PoseHere> said: " in found
    with pytest.raises(PromptError, match="the question holds a placeholder|<PoseHere>"):
        processor.prompts.prompt(processor.mode, processor.token_counts, clip, "Is <PoseHere> so?")
    model = build.model(config, llm)
    shapes = jax.eval_shape(lambda key: init_trainable(model, key), jax.random.key(0))
    kernel = shapes["fusion"]["pose"]["projection"]["kernel"]
    assert kernel.shape == (WIDTH, llm.hidden_size)
    # The same head as a Q-Former, which the registry sizes.
    config = pose_config(prompts=str(prompts), **{"projectors.pose": "qformer"})
    assert build.prompt_processor(config, tokenizer).token_counts["pose"] == 4
    assert build.fusion_config(config).longest("pose") == 4
    assert report.head_name("pose") == "pose head"


def test_what_a_new_modality_lacks_is_said(pose, prompts, tmp_path):
    config = pose_config(prompts=str(prompts))
    dataset = RecordDataset(write(tmp_path / "wide", "val", 4, width=34))
    with pytest.raises(ConfigError, match=r"34 wide, but config.projectors.pose_width is 51"):
        build.check_features(config, dataset, POSE_MODE)
    build.check_features(pose_config(**{"projectors.pose_width": 34}), dataset, POSE_MODE)
    write_records(
        tmp_path / "plain",
        demo.World(0).records("val", 4),
        encoders=dict.fromkeys(demo.DEFAULT_FEATURES, "demo"),
    )
    with pytest.raises(ConfigError, match="reads the feature 'pose', but the records"):
        build.check_features(config, RecordDataset(tmp_path / "plain"), POSE_MODE)
    with pytest.raises(ConfigError, match="5 frames, but the position embedding .* has 4"):
        build.check_features(
            pose_config(**{"projectors.pose": "qformer", "projectors.pose_width": 34}),
            dataset,
            POSE_MODE,
        )
    validate(config)
    for change, message in (
        ({"projectors.pose": "mean"}, "config.projectors.pose is 'mean'; expected one of .*ends"),
        ({"projectors.pose_width": 0}, "config.projectors.pose_width is 0; expected 1 or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            validate(pose_config(**change))
    del config.projectors.pose_width
    with pytest.raises(ConfigError, match="config.projectors.pose_width is missing"):
        validate(config)
    with pytest.raises(PromptError, match=r"compact.toml: \[inputs\] lacks 'pose'"):
        load_prompts("compact")


def test_a_new_modality_is_imported_by_a_flag_of_its_name(pose):
    flags = ["--csv=a.csv", "--out=b", "--pose=c", "--encoder", "pose=openpose"]
    assert str(import_arrays.parse_arguments(flags).pose) == "c"


def test_the_demo_world_and_the_release_know_no_new_modality(pose, tmp_path, monkeypatch):
    monkeypatch.setitem(demo.SIZES, "val", 4)
    dataset = demo.materialize(tmp_path / "val", 0, "val")
    assert list(dataset.ceilings("face")) == list(demo.MAIN_CEILINGS)
    trainable = {"lora": {}, "fusion": {"pose": {"projection": {"kernel": np.zeros((2, 3))}}}}
    with pytest.raises(WeightsError, match="the release has no pose head"):
        save_release(tmp_path / "c.pth", trainable, None, epoch=0)
