"""Greedy decoding against decoding without a cache, and against Hugging Face."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import LLM, make_batch, make_model, random_base, random_trainable

from affectgpt_jax.models.affectgpt import hidden_states
from affectgpt_jax.models.generate import greedy
from affectgpt_jax.weights.huggingface import save_base

MODEL = make_model()
BASE = random_base(MODEL)
TRAINABLE = random_trainable(MODEL)
LENGTHS = [5, 12, 8]
BATCH = make_batch(LENGTHS, width=12)
PAD, NEVER, NEW = 63, -1, 10


@functools.partial(jax.jit, static_argnames=("model", "new"))
def run(trainable, batch, stop, model, new):
    return greedy(model, BASE, trainable, batch, stop, PAD, new)


def generate(batch=BATCH, stop=NEVER, new=NEW, model=MODEL, trainable=TRAINABLE):
    return np.asarray(run(trainable, batch, jnp.array([NEVER, stop], jnp.int32), model, new))


@pytest.fixture(scope="module")
def answers():
    return generate()


def test_greedy_equals_full_passes_without_a_cache(answers):
    width = max(LENGTHS) + NEW
    batch = make_batch(LENGTHS, width=12)
    room = [(0, 0), (0, NEW)]
    for name in ("tokens", "segment_ids", "soft_index"):
        batch[name] = np.pad(batch[name], room)
    batch["positions"] = np.broadcast_to(np.arange(width, dtype=np.int32), (len(LENGTHS), width))

    @jax.jit
    def logits(batch):
        return hidden_states(MODEL, BASE, TRAINABLE, batch)[0] @ BASE["lm_head"]

    ends, rows = np.array(LENGTHS), np.arange(len(LENGTHS))
    for i in range(NEW):
        chosen = np.asarray(logits(batch))[rows, ends - 1].argmax(-1)
        np.testing.assert_array_equal(answers[:, i], chosen, err_msg=f"new token {i}")
        batch["tokens"][rows, ends] = chosen
        batch["segment_ids"][rows, ends] = 1
        ends += 1
    assert len(np.unique(answers)) > NEW, "answers that repeat themselves prove little"


def test_a_row_does_not_depend_on_the_other_rows(answers):
    other = make_batch([12, 3, 8], width=12, seed=9)
    mixed = jax.tree.map(lambda x, y: np.concatenate([x[:1], y[1:2], x[2:]]), BATCH, other)
    found = generate(mixed)
    np.testing.assert_array_equal(found[[0, 2]], answers[[0, 2]])
    assert (found[1] != answers[1]).any()


def test_a_padded_row_equals_a_batch_of_one_without_padding(answers):
    alone = jax.tree.map(lambda x: x[:1], BATCH)
    for name in ("tokens", "positions", "segment_ids", "soft_index"):
        alone[name] = alone[name][:, : LENGTHS[0]]
    np.testing.assert_array_equal(generate(alone)[0], answers[0])


def test_a_stop_id_ends_its_row_only_and_the_rest_is_padding(answers):
    stop = answers[0, 3]  # in the midst of the first row
    expected = answers.copy()
    for row in expected:
        ends = np.flatnonzero(row == stop)
        if len(ends):
            row[ends[0] + 1 :] = PAD
    assert (expected[0] == PAD).any() and (expected[1:] != PAD).any()
    np.testing.assert_array_equal(generate(stop=stop), expected)


@pytest.mark.parametrize("new", [1, 4])
def test_an_answer_is_cut_at_max_new_tokens(answers, new):
    np.testing.assert_array_equal(generate(new=new), answers[:, :new])


def test_a_filler_row_stays_empty_beside_a_real_one(answers):
    empty = BATCH | {"segment_ids": BATCH["segment_ids"] * np.array([[1], [0], [1]])}
    found = generate(empty)
    assert (found[1] == PAD).all()
    np.testing.assert_array_equal(found[[0, 2]], answers[[0, 2]])


def test_a_text_prompt_is_continued_as_hugging_face_does(tmp_path):
    torch = pytest.importorskip("torch", reason="the reference runs in PyTorch")
    import transformers

    model = make_model(fusion=None)
    trainable = jax.tree.map(jnp.zeros_like, random_trainable(model))
    batch = make_batch([9], width=12)
    found = generate(batch, new=16, model=model, trainable=trainable)

    save_base(tmp_path, LLM, BASE)
    reference = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path)
    prompt = torch.tensor(batch["tokens"][:, :9], dtype=torch.long)
    expected = reference.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=16,
        eos_token_id=None,
        pad_token_id=PAD,
    )
    np.testing.assert_array_equal(found[0], expected[0, 9:].numpy())
