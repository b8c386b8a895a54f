"""What an on-policy step asks and learns from, on the host; and rows of several answers."""

import types

import jax
import numpy as np
import pytest
from tiny_model import make_model, random_base, random_trainable

from affectgpt_jax import build
from affectgpt_jax.config import ConfigError, apply_overrides, check_same_run, validate
from affectgpt_jax.configs import affectgpt_qwen25_7b, demo
from affectgpt_jax.data.packing import Bucket
from affectgpt_jax.data.pipeline import DataError, MixtureComponent
from affectgpt_jax.data.records import RecordDataset, RecordSubset
from affectgpt_jax.evaluation.lexicon import load_lexicon
from affectgpt_jax.evaluation.rewards import Reward, Wheels
from affectgpt_jax.models.affectgpt import with_compute
from affectgpt_jax.models.attention import grouped
from affectgpt_jax.models.generate import Generated
from affectgpt_jax.rollouts import (
    BY_TOKEN,
    RolloutData,
    Row,
    SupervisedRows,
    Written,
    collate_rows,
    scorable,
    truths,
    update_rows,
)
from affectgpt_jax.training.policy import PolicyLossConfig, policy_loss

REWARD = Reward("wheel_f", Wheels(load_lexicon()))
MODEL = make_model(fusion=None)
BASE, TRAINABLE = random_base(MODEL), random_trainable(MODEL)
# All that rows of text alone need of a processor.
PLAIN = types.SimpleNamespace(
    tokenizer=types.SimpleNamespace(end_id=63),
    token_counts={},
    mode=types.SimpleNamespace(slots=()),
    features={},
)


def random_rows():
    rng = np.random.default_rng(0)
    rows = []
    for number, lengths in enumerate([(3, 1, 5, 2), (4,), (2, 2), (5, 3, 4, 1)]):
        written = [
            Written(
                rng.integers(60, size=n, dtype=np.int32),
                float(rng.normal()),
                (1.0, 1.0),
                rng.normal(-3, 1, size=n).astype(np.float32) if n > 1 else None,
            )
            for n in lengths
        ]
        prompt = rng.integers(60, size=6 + number, dtype=np.int32)
        rows.append(Row(None, PLAIN, number, prompt, written))
    return rows


def loss_and_gradient(model, batch):
    loss = policy_loss(PolicyLossConfig())

    @jax.jit
    def run(trainable, batch):
        def objective(trainable):
            total, count, metrics = loss(model, BASE, trainable, batch)
            return total, (count, metrics)

        return jax.value_and_grad(objective, has_aux=True)(trainable)

    return run(TRAINABLE, batch)


def test_answers_that_share_their_prompt_have_the_gradient_of_answers_in_rows_of_their_own():
    rows = random_rows()
    alone = [Row(None, PLAIN, r.number, r.prompt, [one]) for r in rows for one in r.written]
    separate = collate_rows(alone, 12, Bucket(16, 8), PLAIN, {})
    together = collate_rows(rows, 5, Bucket(24, 16), PLAIN, {})
    assert sum(r.size[0] for r in alone) > 1.8 * sum(r.size[0] for r in rows)
    shared = with_compute(MODEL, attend=grouped)
    expected, by_expected = loss_and_gradient(MODEL, separate)
    found, by_found = loss_and_gradient(shared, together)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(by_found), jax.tree.leaves(by_expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * float(np.abs(b).max()) + 1e-7, rtol=1e-4)
    # Without groups, an answer would see no prompt.
    blind, _ = loss_and_gradient(MODEL, together)
    assert abs(float(blind[0] - expected[0])) > 1e-2


# --- which clips, which rows ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def config():
    config = demo.get_config()
    config.rl = affectgpt_qwen25_7b.reinforcement()
    config.rl.update({"prompts": 8, "group": 4, "max_new_tokens": 10})
    config.max_tokens = 80
    return config


@pytest.fixture(scope="module")
def processor(config):
    directory = build.base_directory("tiny")
    return build.prompt_processor(config, build.tokenizer(directory, build.base_config("tiny")))


@pytest.fixture(scope="module")
def clips(demo_records):
    return RecordDataset(demo_records["train"])


def changed(config, **rl):
    config = config.copy_and_resolve_references()
    config.rl.update(rl)
    return config


def test_an_epoch_asks_about_every_clip_once_in_an_order_of_the_seed(config, clips, processor):
    data = RolloutData(config, clips, processor, REWARD)
    epochs = [np.concatenate([data.numbers(8 * e + s) for s in range(8)]) for e in (0, 1)]
    assert all(sorted(epoch) == list(range(64)) for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()
    again = RolloutData(config, clips, processor, REWARD)
    assert again.numbers(11).tolist() == data.numbers(11).tolist()
    # Two processes hold the two halves of one's rows.
    whole = data.batch(3)
    halves = [RolloutData(config, clips, processor, REWARD, (i, 2), 2).batch(3) for i in (0, 1)]
    for name in ("tokens", "segment_ids", "soft_token_index"):
        both = np.concatenate([half[name] for half in halves])
        np.testing.assert_array_equal(both, whole[name])
    assert whole["tokens"].shape == (8, data.prompt_length)


def test_clips_that_no_wheel_knows_and_prompts_that_are_too_long_are_left_out_by_count(
    config, clips, processor
):
    few = RecordSubset(clips, range(20))
    unknown = [types.SimpleNamespace(**vars(entry)) for entry in few.index]
    few.index = unknown
    for entry in unknown[:3]:
        entry.labels = ("qqq",)
    unknown[5].subtitle = "word " * 60
    data = RolloutData(config, few, processor, REWARD)
    assert data.left_out == (3, 1)
    asked = np.concatenate([data.numbers(s) for s in range(20)])
    assert {*asked.tolist()} == {*range(20)} - {0, 1, 2, 5}
    assert "3 left out that no wheel knows, 1 whose prompts are too long" in data.describe()[0]
    with pytest.raises(DataError, match="prompts=17 clips, but only 16 of 20"):
        RolloutData(changed(config, prompts=17), few, processor, REWARD)
    unknown[7].labels = ()
    with pytest.raises(DataError, match=f"record {unknown[7].name!r} has no labels"):
        RolloutData(config, few, processor, REWARD)


def test_the_truth_is_what_the_question_asks_for(clips):
    entry = clips.index[0]
    assert truths(clips, "ovlabel", "config.rl.data")[0] == list(entry.labels)
    assert truths(clips, "onehot", "config.rl.data")[0] == [entry.emotion]
    assert truths(clips, "sentiment", "config.rl.data")[0] == entry.valence


def test_clips_that_can_be_scored_are_the_first_or_their_key_is_named(clips):
    few = RecordSubset(clips, range(4))
    few.index = [types.SimpleNamespace(**vars(entry)) for entry in few.index]
    few.index[0].labels = ("qqq",)
    found = scorable(few, REWARD, "ovlabel", 2, "config.data.val")
    assert [entry.name for entry in found.index] == [entry.name for entry in few.index[1:3]]
    for entry in few.index:
        entry.labels = ("qqq",)
    with pytest.raises(DataError, match="none of the 4 clips of config.data.val has a label on a"):
        scorable(few, REWARD, "ovlabel", 2, "config.data.val")
    few.index[1].labels = ()
    with pytest.raises(DataError, match="name other records in config.data.test"):
        scorable(few, REWARD, "ovlabel", 2, "config.data.test")
    for entry in few.index:
        entry.valence = 0.0
    reward = Reward("sentiment", REWARD.wheels)
    with pytest.raises(DataError, match="has a valence other than 0"):
        scorable(few, reward, "sentiment", 2, "config.data.val")


def answer(tokens, ended=True):
    size = len(tokens)
    padded = np.array([*tokens, *[0] * (10 - size)], np.int32)
    return Generated(padded, np.int32(size), np.bool_(ended), -np.arange(10, dtype=np.float32))


ANSWERS = [answer([g + 1] * (g + 2), ended=g != 3) for _ in range(2) for g in range(4)]
TOTALS = np.array([[0.0, 1.0, 0.5, 0.5], [0.7, 0.7, 0.7, 0.7]])


def rows_with(config, clips, processor, **rl):
    config = changed(config, **rl)
    data = RolloutData(config, clips, processor, REWARD)
    return update_rows(config.rl, data, 0, np.array([4, 9]), ANSWERS, TOTALS)


def test_flat_groups_and_cut_answers_are_left_out(config, clips, processor):
    rows, kept = rows_with(config, clips, processor)
    assert kept == 0.5 and [row.number for row in rows] == [4]
    assert [w.advantage for w in rows[0].written] == [-0.5, 0.5, 0.0]
    assert [w.tokens.tolist() for w in rows[0].written] == [[1] * 2, [2] * 3, [3] * 4]
    assert rows[0].written[1].log_probs.tolist() == [0, -1, -2]
    everything, kept = rows_with(config, clips, processor, drop_flat=False, mask_cut=False)
    assert kept == 1 and [len(row.written) for row in everything] == [4, 4]
    alone, _ = rows_with(config, clips, processor, share_prompt=False)
    assert [(row.number, len(row.written)) for row in alone] == [(4, 1)] * 3


def test_the_best_answer_of_each_group_is_what_supervision_would_be_given(config, clips, processor):
    rows, kept = rows_with(config, clips, processor, method="best")
    assert kept == 1
    found = [(row.number, [w.tokens.tolist() for w in row.written]) for row in rows]
    assert found == [(4, [[2] * 3]), (9, [[1] * 2])]
    assert all(w.advantage == 1 for row in rows for w in row.written)


def test_weights_are_those_of_the_aggregation(config, clips, processor):
    rows, _ = rows_with(config, clips, processor, loss="constant")
    assert [w.weights for w in rows[0].written] == [(0.1, 1 / n) for n in (2, 3, 4)]


def test_supervised_rows_stand_beside_the_answers_and_follow_from_the_step(
    config, clips, processor
):
    component = MixtureComponent(clips, processor, "description")
    supervised = SupervisedRows([component], 80, seed=3)
    config = changed(config, sft_share=0.25)
    data = RolloutData(config, clips, processor, REWARD, supervised=supervised)
    assert (data.answer_rows, data.supervised_rows, data.rows) == (8, 2, 10)
    numbers = np.array([4, 9])
    rows, kept = update_rows(config.rl, data, 5, numbers, ANSWERS, TOTALS)
    assert kept == 0.5 and len(rows) == 1 + 2
    again, _ = update_rows(config.rl, data, 5, numbers, ANSWERS, TOTALS)
    other, _ = update_rows(config.rl, data, 6, numbers, ANSWERS, TOTALS)
    assert [r.number for r in rows] == [r.number for r in again] != [r.number for r in other]
    batch = collate_rows(rows, data.rows, data.bucket, processor, data.shapes)
    expected = processor.training_examples(clips, "description")[rows[1].number]
    targets = expected.tokens[expected.answer_start :]
    here = batch["target_weights"][1] > 0
    np.testing.assert_array_equal(batch["targets"][1][here], targets)
    assert batch["advantages"][1][here].tolist() == [1] * len(targets)
    assert not batch["sampled"][1].any() and batch["sampled"][0].sum() == 2 + 3 + 4
    assert {name: x.shape for name, x in batch.items() if name in BY_TOKEN} == dict.fromkeys(
        BY_TOKEN, (10, data.bucket.targets)
    )
    with pytest.raises(DataError, match="no example of at most 5 tokens"):
        SupervisedRows([component], 5, seed=3)


def test_what_is_learned_from_does_not_depend_on_the_devices(config, clips, processor, tmp_path):
    supervised = SupervisedRows([MixtureComponent(clips, processor, "description")], 80, seed=3)
    config = changed(config, sft_share=0.3)  # of 8 rows of answers: 3 examples
    on = {
        shares: RolloutData(config, clips, processor, REWARD, shares=shares, supervised=supervised)
        for shares in (1, 2, 8)
    }
    assert {shares: data.rows for shares, data in on.items()} == {1: 11, 2: 12, 8: 16}
    drawn = [
        [(row.number, len(row.written)) for row in rows]
        for rows, _ in (
            update_rows(config.rl, data, 5, np.array([4, 9]), ANSWERS, TOTALS)
            for data in on.values()
        )
    ]
    assert drawn[0] == drawn[1] == drawn[2] and len(drawn[0]) == 1 + 3
    assert "8 of answers and 3 supervised, and 1 of padding" in on[2].describe()[1]
    assert on[1].describe()[1].endswith("8 of answers and 3 supervised")
    # So a run goes on on others: no one has set its number of rows.
    workdir = tmp_path / "run"
    (workdir / "checkpoints" / "1").mkdir(parents=True)
    config.batch_size = on[1].rows
    (workdir / "config.json").write_text(config.to_json())
    config.batch_size = on[2].rows
    check_same_run(config, workdir)
    with pytest.raises(ConfigError, match="config.rl.sft_share=0.3, but now it is 0.4"):
        check_same_run(changed(config, sft_share=0.4), workdir)


def test_a_control_takes_the_truth_of_another_clip(config, clips, processor):
    plain = RolloutData(config, clips, processor, REWARD).truth
    shuffled = RolloutData(changed(config, shuffle_rewards=True), clips, processor, REWARD).truth
    assert sorted(plain) == sorted(shuffled) and plain != shuffled


# --- the section of the config --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("rl.group=1", "config.rl.group is 1; expected 2 or more: an answer is compared"),
        ("rl.reward=bleu", "config.rl.reward is 'bleu'"),
        ("rl.question=description", "config.rl.question is 'description'"),
        ("rl.question=sentiment", "does not fit config.rl.question='sentiment'"),
        ("rl.top_p=0.0", "config.rl.top_p is 0.0"),
        ("rl.temperature=0", "config.rl.temperature is 0.0; expected over 0"),
        ("rl.temperature=0.7", "config.rl.temperature is 0.7; config.rl.method='grpo' takes 1"),
        ("rl.top_p=0.9", "config.rl.top_p is 0.9; config.rl.method='grpo' takes 1 alone"),
        ("rl.stop_kl=-1", "config.rl.stop_kl is -1.0"),
        ("rl.beta=-1", "config.rl.beta is -1.0; expected 0 or more"),
        ("rl.epsilon=2", "config.rl.epsilon is 2.0; expected over 0 and under 1"),
        ("rl.epsilon_high=0", "config.rl.epsilon_high is 0.0; expected over 0"),
        ("rl.weight_cap=0.5", "config.rl.weight_cap is 0.5; expected 1 or more"),
        ("rl.gruop=8", "did you mean config.rl.group"),
        ("rl.group=many", "config.rl.group is 'many'; expected int, as in 4"),
        ("rl.group.size=2", "config.rl.group is a single value"),
        ("rl.drop_flat=maybe", "expected bool"),
    ],
)
def test_keys_that_make_no_sense_are_refused_by_name(config, flag, said):
    config = config.copy_and_resolve_references()
    with pytest.raises(ConfigError) as refused:
        apply_overrides(config, [f"--config.{flag}"])
        validate(config)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("beta", 0.0, "config.dpo.beta is 0.0; expected over 0"),
        ("beta", -1.0, "config.dpo.beta is -1.0; expected over 0"),
        ("nll_weight", -0.1, "config.dpo.nll_weight is -0.1; expected 0 or more"),
        ("label_smoothing", -0.1, "config.dpo.label_smoothing is -0.1; expected 0 or more"),
        ("label_smoothing", 0.5, "config.dpo.label_smoothing is 0.5; expected under 0.5"),
        ("val_share", 1.0, "config.dpo.val_share is 1.0; expected over 0 and under 1"),
    ],
)
def test_so_are_those_of_preferences(key, value, said):
    config = demo.get_config()
    config.dpo = affectgpt_qwen25_7b.preference()
    config.dpo[key] = value
    with pytest.raises(ConfigError, match=said):
        validate(config)


def test_several_updates_of_a_rollout_take_a_constant_rate(config):
    """optax counts updates, so that a schedule would run by them and not by steps."""
    config = changed(config, updates=2)
    rates = config.optimizer
    rates.warmup_steps, rates.final_learning_rate = 0, rates.learning_rate
    validate(config)
    for key, value in (("warmup_steps", 5), ("final_learning_rate", rates.learning_rate / 2)):
        other = config.copy_and_resolve_references()
        other.optimizer[key] = value
        with pytest.raises(ConfigError, match="config.rl.updates=2 takes a constant learning rate"):
            validate(other)
        validate(changed(other, updates=1))


def test_answers_of_a_quantized_base_are_not_written_by_merged_weights(config):
    config = changed(config, merge_lora="true")
    validate(config)
    config.base_precision = "int8"
    with pytest.raises(ConfigError, match="config.rl.merge_lora='true' cannot add LoRA to quant"):
        validate(config)


def test_the_best_of_a_group_may_be_sampled_in_any_way(config):
    config = changed(config, method="best", temperature=0.7, top_p=0.9)
    validate(config)


def test_overrides_have_the_type_of_their_key(config):
    config = config.copy_and_resolve_references()
    flags = ["rl.wheels=(1, 3)", "rl.beta=1", "rl.drop_flat=false", "llm=7", "steps=3"]
    rest = apply_overrides(config, [*(f"--config.{flag}" for flag in flags), "--other"])
    assert rest == ["--other"]
    assert config.rl.wheels == (1, 3) and config.rl.beta == 1.0 and config.rl.drop_flat is False
    assert config.llm == "7" and config.steps == 3
    validate(config)
