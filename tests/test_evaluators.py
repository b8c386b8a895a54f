"""The held-out score, and its control: answers to the same questions with other clips' features."""

import json
from pathlib import Path

import numpy as np
import pytest

import affectgpt_jax
from affectgpt_jax import evaluators
from affectgpt_jax.configs import demo as demo_config
from affectgpt_jax.data import demo
from affectgpt_jax.data.pipeline import MixtureComponent, PromptProcessor
from affectgpt_jax.data.prompts import INPUT_MODES, load_prompts
from affectgpt_jax.data.records import RecordDataset, write_records
from affectgpt_jax.data.tokenizer import Tokenizer
from affectgpt_jax.inference import Answer, Answers

TINY_BASE = Path(affectgpt_jax.__file__).parent / "assets" / "tiny_base"
CLIPS = 60
TRAINABLE = object()


class ReadsFeatures:
    """Stands in for a generator: every answer is right for the clip whose features it sees."""

    def __init__(self, processor):
        self.processor, self.orders = processor, []

    def answer(self, trainable, dataset, question, feature_from=None):
        assert trainable is TRAINABLE and question == "onehot"
        self.orders.append(feature_from)
        seen = range(len(dataset)) if feature_from is None else feature_from
        texts = [self.processor.prompts.answer(question, dataset.index[i]) for i in seen]
        return Answers([Answer(text, tokens=1, cut=False, log_prob=None) for text in texts])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("records") / "test"
    clips = demo.World(0).records("test", CLIPS)
    write_records(path, clips, encoders=dict.fromkeys(demo.DEFAULT_FEATURES, "demo"))
    return RecordDataset(path)


def score(dataset, workdir, mode, seed=0):
    """The result of a test set, and the orders in which the generator was given features."""
    config, mode = demo_config.get_config(), INPUT_MODES[mode]
    config.label, config.seed = "onehot", seed
    features = {name: demo.SHAPES[name][1] for name in ("audio", "face") if mode.slots}
    counts = dict.fromkeys(mode.slots, 1)
    processor = PromptProcessor(
        Tokenizer(TINY_BASE), load_prompts("compact"), mode, counts, features
    )
    generator = ReadsFeatures(processor)
    test = MixtureComponent(dataset, processor, "onehot", "test")
    result = evaluators.score_test_set(config, workdir, TRAINABLE, generator, test)
    return result, generator.orders


def test_the_control_scores_answers_from_the_features_of_other_clips(dataset, tmp_path):
    result, (own, order) = score(dataset, tmp_path, "multi_audio_face_text")
    assert own is None and result["hit"] == 1
    assert sorted(order) == list(range(CLIPS)), "every clip's features are seen once"
    # A random permutation leaves one clip in its place on average, more than 8 once in a million.
    assert (np.asarray(order) == np.arange(CLIPS)).sum() <= 8
    emotions = np.array([entry.emotion for entry in dataset.index])
    assert result["hit_features_shuffled"] == np.mean(emotions[order] == emotions) < 0.5
    written = [json.loads(line) for line in (tmp_path / "predictions.jsonl").open()]
    assert [line["labels"] for line in written] == [[word] for word in emotions.tolist()]


def test_the_control_is_the_same_again_and_another_for_another_seed(dataset, tmp_path):
    orders = [score(dataset, tmp_path, "audio_face_text", seed)[1][1] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(orders[0], orders[1])
    assert (orders[0] != orders[2]).any()


def test_without_features_there_is_no_control(dataset, tmp_path):
    result, orders = score(dataset, tmp_path, "text")
    assert orders == [None] and result["hit"] == 1
    assert "hit_features_shuffled" not in result
