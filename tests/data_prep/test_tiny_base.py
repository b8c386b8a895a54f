"""The tiny base model that ships, and the script that made it."""

import json
import sys

import jax
import pytest

from affectgpt_jax.build import base_config, base_directory
from affectgpt_jax.data.tokenizer import Tokenizer
from affectgpt_jax.models.decoder import Decoder, init_base
from affectgpt_jax.weights.huggingface import load_base
from data_prep import tiny_base


@pytest.fixture(scope="module")
def shipped():
    directory = base_directory("tiny")
    module = Decoder(base_config("tiny"))
    abstract = jax.eval_shape(lambda key: init_base(module, key), jax.random.key(0))
    one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = load_base(directory, abstract, jax.tree.map(lambda _: one_device, abstract))
    return module, params, Tokenizer(directory)


def test_from_cue_words_alone_it_names_the_emotion_at_90_percent_of_the_ceiling(shipped):
    score = tiny_base.word_score(*shipped, n=2048)
    assert score["hit"] >= 0.9 * score["ceiling"]


def test_it_has_one_to_three_million_parameters_in_at_most_12_mb(shipped):
    _, params, _ = shipped
    assert 1e6 <= sum(leaf.size for leaf in jax.tree.leaves(params)) <= 3e6
    size = sum(path.stat().st_size for path in base_directory("tiny").iterdir())
    assert size <= 12e6


def test_its_report_is_of_these_weights(shipped):
    module, params, _ = shipped
    report = json.loads((base_directory("tiny") / "training.json").read_text())
    assert report["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert report["words_alone"]["share_of_ceiling"] >= 0.9
    assert module.config == tiny_base.MODEL


def test_the_script_writes_a_whole_model(tmp_path):
    share = tiny_base.train(tmp_path, steps=3, batch_size=4, learning_rate=1e-3)
    assert share < 0.9
    assert Tokenizer(tmp_path).start_id == Tokenizer(base_directory("tiny")).start_id
    assert {p.name for p in tmp_path.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "training.json",
    }  # fmt: skip


def test_a_model_that_learned_too_little_replaces_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_base, "train", lambda *_: 0.89)
    monkeypatch.setattr(sys, "argv", ["tiny_base", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="of the ceiling, not 90 %"):
        tiny_base.main()
    assert list(tmp_path.iterdir()) == []


def test_the_tokenizer_repeats_byte_by_byte(tmp_path):
    import numpy as np

    tiny_base.train_tokenizer(tmp_path / "tokenizer.json", np.random.default_rng(tiny_base.SEED))
    shipped = (base_directory("tiny") / "tokenizer.json").read_bytes()
    assert (tmp_path / "tokenizer.json").read_bytes() == shipped
