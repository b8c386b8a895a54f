"""Records of given lengths, and what is counted in a batch."""

import numpy as np
import pytest

from affectgpt_jax.config import ConfigError
from affectgpt_jax.data.examples import build_examples
from affectgpt_jax.data.records import Annotations
from benchmarks import synthetic, workloads
from benchmarks.workloads import contents


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("records")


def first_batches(root, name, steps, **how):
    feed = workloads.feed(workloads.make(name, "tiny", **how), root)
    return feed, list(feed.batches(0, steps))


def test_lengths_are_those_of_the_published_recipe():
    rng = np.random.default_rng(0)
    drawn = {
        kind: np.array(
            [synthetic.draw(getattr(synthetic.AFFECTGPT, kind), s) for s in rng.random(20_000)]
        )
        for kind in ("subtitle", "labels", "description")
    }
    assert abs(drawn["labels"].mean() - 13) < 0.2 and drawn["labels"].max() <= 28
    assert abs(drawn["description"].mean() - 259) < 2 and drawn["description"].max() <= 595
    found = np.percentile(drawn["description"], [10, 50, 90])
    assert np.abs(found - [172, 262, 340]).max() < 4
    assert synthetic.draw(synthetic.AFFECTGPT.description, 0.99) == 431
    assert drawn["subtitle"].min() == 5 and drawn["subtitle"].max() == 40


def test_texts_have_the_tokens_that_are_asked_for():
    how, rng = (
        workloads.prompt_processor(workloads.make("affectgpt", "tiny")),
        np.random.default_rng(0),
    )
    texts, start = synthetic.Texts(how), how.prompts.prompt

    def tokens(question, **annotations):
        clip = Annotations(name="clip", **annotations)
        prompt = start(how.mode, how.token_counts, clip, question)
        answers = [how.prompts.answer(question, clip)]
        (example,) = build_examples(how.tokenizer, [prompt], answers)
        return example.answer_start, len(example) - example.answer_start

    for count in range(70, 600, 53):
        description = texts.description(rng, count)
        assert tokens("description", description=description)[1] == count
    for count in range(6, 31):
        assert tokens("ovlabel", labels=texts.labels(rng, count))[1] == count
    for count in range(103, 140):
        subtitle = texts.subtitle(rng, count)
        assert tokens("description", subtitle=subtitle, description="calm")[0] == count


def test_records_have_lengths_in_the_range_of_the_recipe(root):
    workload = workloads.make("affectgpt", "tiny")
    how, dataset = workloads.prompt_processor(workload), workloads.open_records(workload, root)
    lengths, end = synthetic.AFFECTGPT, synthetic.END_TOKENS
    prompts = [len(p) for p in how.prompt_examples(dataset, "description")]
    assert min(prompts) >= lengths.prompt + 5 and max(prompts) <= lengths.prompt + 40
    answers = {
        kind: [len(e) - e.answer_start for e in how.training_examples(dataset, kind)]
        for kind in ("ovlabel", "description")
    }
    assert 6 + end <= min(answers["ovlabel"]) and max(answers["ovlabel"]) <= 28 + end
    assert 68 + end <= min(answers["description"]) and max(answers["description"]) <= 595 + end


def test_a_set_that_is_there_is_not_written_again(root):
    workload = workloads.make("decode", "tiny")
    workloads.open_records(workload, root)
    files = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    workloads.open_records(workload, root)
    assert files == {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


def test_rows_of_the_small_workload_are_equal_and_full(root):
    _, batches = first_batches(root, "small", 3)
    for batch in batches:
        assert batch["tokens"].shape == (4, 256)
        places, samples = contents(batch)
        assert places == 1024 and samples.tolist() == [[256, 128]] * 4


def test_rows_of_the_anchor_have_every_position_supervised(root):
    feed, (batch,) = first_batches(root, "anchor", 1)
    places, samples = contents(batch)
    assert places == 128 and samples.tolist() == [[64, 63]] * 2
    at = batch["target_positions"]
    np.testing.assert_array_equal(
        np.take_along_axis(batch["tokens"], at + 1, axis=1), batch["targets"]
    )
    assert (feed.batch(0)["tokens"] == batch["tokens"]).all()
    assert (feed.batch(1)["tokens"] != batch["tokens"]).any()


def test_contents_counts_every_clip_of_a_packed_row():
    batch = {
        "segment_ids": np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 0, 0]]),
        "target_positions": np.array([[1, 3, 0], [1, 2, 0]]),
        "target_weights": np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]]),
    }
    places, samples = contents(batch)
    assert places == 12 and samples.tolist() == [[3, 1], [2, 1], [4, 2]]


def test_packed_and_padded_epochs_hold_the_same_clips(root):
    found = {}
    for length in (0, 1024):
        feed, _ = first_batches(root, "affectgpt", 0, batch=8, pack_length=length)
        epoch = feed.batches(0, len(feed.plan(0)))
        found[length] = sum(len(contents(batch).samples) for batch in epoch)
    assert found == {0: 64, 1024: 64}


def test_an_unknown_key_is_refused():
    with pytest.raises(ConfigError, match="the config has no key 'no.such'"):
        workloads.make("small", "tiny", settings={"no.such": 1})


def test_a_tokenizer_without_words_is_refused():
    class Letters:
        base_size = 26

        def decode(self, ids):
            return chr(97 + ids[0])

    with pytest.raises(ValueError, match="has 0 words of one token; expected 64"):
        synthetic.words_of_one_token(Letters(), 64)
