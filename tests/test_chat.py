"""The base as a chat model: what it says is what it said before it was given adapters."""

import jax
import numpy as np
import pytest

from affectgpt_jax.build import base_config, base_directory
from affectgpt_jax.chat import BaseChat
from affectgpt_jax.data.tokenizer import Tokenizer
from affectgpt_jax.evaluation.chat_server import ChatRefusal
from affectgpt_jax.evaluation.extract import ChatExtractor, ReplyCache
from affectgpt_jax.models.affectgpt import AffectGPT, init_random_base
from affectgpt_jax.models.decoder import Decoder, lm_head
from affectgpt_jax.models.lora import LoraConfig
from affectgpt_jax.training.sharding import make_mesh, tree_shardings
from affectgpt_jax.weights.huggingface import base_identity, load_base

DIRECTORY = base_directory("tiny")
MESSAGES = [
    "happy",
    "Which?",
    "He is happy, and she sad. " * 3,
    "face: smile said: hello",
    "worried",
]


@pytest.fixture(scope="module")
def parts():
    mesh = make_mesh("data:-1")
    qwen2 = Decoder(base_config("tiny"), LoraConfig(rank=4))
    model = AffectGPT(qwen2, None)
    shapes = jax.eval_shape(lambda key: init_random_base(model, key), jax.random.key(0))
    base = load_base(DIRECTORY, shapes, tree_shardings(mesh, shapes))
    return qwen2, base, base_identity(DIRECTORY), Tokenizer(DIRECTORY), mesh


def make_chat(parts, **settings):
    return BaseChat(*parts, **{"batch_size": 8, "max_new_tokens": 5, "num_buckets": 2, **settings})


@pytest.fixture(scope="module")
def replies(parts):
    found = dict(make_chat(parts).answer(MESSAGES))
    return [found[n] for n in range(len(MESSAGES))]


def test_replies_are_the_most_probable_tokens_of_the_plain_base(parts, replies):
    qwen2, base, _, tokenizer, _ = parts
    plain = Decoder(qwen2.config)
    limit = 160

    @jax.jit
    def next_token(tokens, length):
        at = np.arange(limit)[None]
        embeds = plain.apply({"params": base}, tokens, method="embed")
        states, _ = plain.apply({"params": base}, embeds, at, (at < length).astype(int))
        return (states[0, length - 1] @ lm_head(base)).argmax()

    for message, reply in zip(MESSAGES, replies, strict=True):
        ids = tokenizer.encode([tokenizer.chat_prompt(message)])[0].tolist()
        start = len(ids)
        while len(ids) < start + 5:
            padded = np.zeros((1, limit), np.int32)
            padded[0, : len(ids)] = ids
            ids.append(int(next_token(padded, len(ids))))
            if ids[-1] in (tokenizer.end_id, *tokenizer.ids_of_tokens(["<|endoftext|>"])):
                break
        assert reply == tokenizer.decode(ids[start:]).strip()
    assert len(set(replies)) > 1


def test_replies_do_not_depend_on_their_company(parts, replies):
    alone = dict(make_chat(parts).answer(MESSAGES[2:3]))
    assert alone == {0: replies[2]}


def test_replies_say_how_they_ended(parts, replies):
    def nothing():
        raise ChatRefusal("there is nothing to ask")

    asked = [lambda: MESSAGES[0], nothing, *MESSAGES[1:]]
    found = dict(make_chat(parts).replies(asked))
    assert str(found.pop(1)) == "there is nothing to ask"
    ordered = [found[number] for number in sorted(found)]
    assert [reply.text for reply in ordered] == replies
    endless = dict(make_chat(parts, max_new_tokens=200).replies(MESSAGES))
    for number, reply in enumerate(ordered):
        ended = endless[number].text == reply.text
        assert reply.finish == ("stop" if ended else "length")
        assert reply.tokens <= endless[number].tokens
    assert {"length"} <= {reply.finish for reply in ordered}


def test_it_serves_label_extraction(parts, replies, tmp_path):
    asks = ChatExtractor(make_chat(parts), ReplyCache(tmp_path / "cache"), lambda reply: [])
    labels = asks.labels(["They feel happy.", "", "They feel sad."])
    assert labels[1] == [] and len(labels) == 3
    assert len((tmp_path / "cache").read_text().splitlines()) == 2
    assert "tiny_base (sha256 " in asks.identity and "greedy, 5 tokens" in asks.identity


def test_a_model_is_another_one_with_another_template_or_limit(parts, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((DIRECTORY / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    qwen2, base, identity, _, mesh = parts
    other = (qwen2, base, identity, Tokenizer(tmp_path), mesh)
    chats = make_chat(parts), make_chat(parts, max_new_tokens=6), make_chat(other)
    assert len({chat.identity for chat in chats}) == 3
