"""The held-out score, and its control: answers to the same questions with other clips' features."""

import csv
import dataclasses
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import affectgpt_jax
from affectgpt_jax import build, evaluators
from affectgpt_jax import score as score_command
from affectgpt_jax.configs import demo as demo_config
from affectgpt_jax.data import demo
from affectgpt_jax.data.modalities import INPUT_MODES
from affectgpt_jax.data.pipeline import MixtureComponent, PromptProcessor
from affectgpt_jax.data.prompts import LABEL_TYPES, load_prompts
from affectgpt_jax.data.records import MemoryRecords, RecordDataset, write_records
from affectgpt_jax.data.tokenizer import Tokenizer
from affectgpt_jax.inference import Answer, Answers

TINY_BASE = Path(affectgpt_jax.__file__).parent / "assets" / "tiny_base"
CLIPS = 60
TRAINABLE = object()


class ReadsFeatures:
    """Stands in for a generator: every answer is right for the clip whose features it sees."""

    def __init__(self, processor):
        self.processor, self.orders = processor, []

    def answer(self, trainable, dataset, question, feature_from=None, progress=None):
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


# --- Every mode and label type --------------------------------------------------------------------


def held_out(records, mode, label):
    """A config and the test set that it names."""
    config = demo_config.get_config()
    config.update({"input": mode, "label": label})
    config.data.update({split: str(path) for split, path in records.items()})
    tokenizer = build.tokenizer(build.base_directory("tiny"), build.base_config("tiny"))
    return config, build.data(config, records["train"].parent, tokenizer, say=print).test


def scored(config, test, workdir, texts):
    """`score_test_set` with a model that writes these answers; and which clips' features it saw."""
    seen = []

    def answer(trainable, dataset, question, feature_from=None, progress=None):
        seen.append(feature_from)
        return Answers([Answer(text, 3, number == 0, None) for number, text in enumerate(texts)])

    generator = SimpleNamespace(answer=answer)
    return evaluators.score_test_set(config, workdir, None, generator, test), seen


def right_answers(test, label):
    """What a perfect model writes: the answers that it would be trained on."""
    processor, dataset = test.processor, test.dataset
    question = evaluators.question_for_test_set(SimpleNamespace(label=label))
    examples = processor.training_examples(dataset, question)
    return [
        processor.tokenizer.decode(example.tokens[example.answer_start : -1])
        for example in examples
    ]


# All modes beside all label types; nothing depends on which meets which.
@pytest.mark.parametrize(("mode", "label"), [*zip(INPUT_MODES, itertools.cycle(LABEL_TYPES))])
def test_every_label_type_with_a_true_answer_is_scored(mode, label, demo_records, tmp_path):
    config, test = held_out(demo_records, mode, label)
    result, seen = scored(config, test, tmp_path, right_answers(test, label))
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").open()]
    assert [line["name"] for line in lines] == [entry.name for entry in test.dataset.index]
    has_truth = label in ("ovlabel", "onehot", "onehot_candidates", "sentiment")
    assert all(("labels" in line) == has_truth for line in lines)
    assert ("hit" in result) == has_truth
    assert ("not_scored" in result) != has_truth
    assert result["answers_cut"] == 1
    if has_truth:
        assert result["hit"] == 1
    # Without features there is nothing to shuffle.
    shuffles = has_truth and mode != "text"
    assert ("hit_features_shuffled" in result) == shuffles
    assert len(seen) == 1 + shuffles and seen[0] is None
    if shuffles:
        assert sorted(seen[1]) == list(range(16)) and not np.array_equal(seen[1], range(16))


def test_the_answers_of_a_hybrid_are_its_labels(demo_records, tmp_path):
    config, test = held_out(demo_records, "audio_text", "hybrid")
    texts = ["They feel nothing."] + right_answers(test, "ovlabel")[1:]
    result, _ = scored(config, test, tmp_path, texts)
    assert result["hit"] == 15 / 16
    with (tmp_path / "truth.csv").open(newline="") as file:
        rows = [*csv.reader(file)]
    assert rows == [["name", "emotion"], *([e.name, e.emotion] for e in test.dataset.index)]


def labelled(records, lists):
    """A test set of the demo world whose clips have these labels and no single true word."""
    config, test = held_out(records, "audio_text", "ovlabel")
    clips = [
        dataclasses.replace(test.dataset[i], emotion="", candidates=(), labels=labels)
        for i, labels in enumerate(lists)
    ]
    dataset = MemoryRecords(clips, test.dataset.manifest)
    return config, dataclasses.replace(test, dataset=dataset)


def test_clips_with_lists_of_labels_are_scored_by_their_f(demo_records, tmp_path):
    lists = [("happy", "proud"), ("angry",), (), ("sad",)]
    config, test = labelled(demo_records, lists)
    written = [["happy", "proud"], ["sad"], ["afraid"], ["sad"]]
    texts = [test.processor.prompts.write_labels(words, "ovlabel") for words in written]
    result, seen = scored(config, test, tmp_path, texts)
    # Right, wrong, without a truth, right: precision and recall are 2 / 3 on every wheel.
    assert [result[name] for name in "fpr"] == pytest.approx([2 / 3] * 3)
    assert result["clips"] == 4 and result["clips_scored"] == 3
    assert result["f_interval"][0] < 2 / 3 < result["f_interval"][1] <= 1
    # The model writes the same whatever it is shown.
    assert result["f_features_shuffled"] == result["f"] and len(seen) == 2
    assert "hit" not in result and "not_scored" not in result
    out = tmp_path / "score.json"
    files = [f"--predictions={tmp_path}/predictions.jsonl", f"--truth={tmp_path}/truth.csv"]
    score_command.main(["--task=fine", "--bootstrap=0", "--missing=empty", *files, f"--json={out}"])
    (found,) = json.loads(out.read_text())["results"]
    assert found["values"]["f"] == pytest.approx(2 / 3)


def test_without_any_truth_there_is_no_truth_file(demo_records, tmp_path):
    (tmp_path / "truth.csv").write_text("of an earlier end\n")
    config, test = labelled(demo_records, [(), ()])
    result, _ = scored(config, test, tmp_path, ["They feel sad."] * 2)
    assert result["not_scored"] == "2 of 2 clips name no true answer"
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.jsonl"]
    # Words that are on no wheel are no truth either.
    config, test = labelled(demo_records, [("qqq",), ("zzz",)])
    result, _ = scored(config, test, tmp_path, ["They feel sad."] * 2)
    assert result["not_scored"].startswith("the labels of the clips: ") and "f" not in result


def test_a_process_beside_the_main_one_writes_nothing(demo_records, tmp_path):
    config, test = held_out(demo_records, "text", "sentiment")
    answers = Answers([Answer(t, 3, False, None) for t in right_answers(test, "sentiment")])
    generator = SimpleNamespace(answer=lambda *_, **__: answers)
    found = evaluators.score_test_set(config, tmp_path, None, generator, test, write=False)
    assert found["hit"] == 1
    assert not list(tmp_path.iterdir())
