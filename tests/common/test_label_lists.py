"""Lists of labels, as files, people and models write them."""

import json
import time

import hypothesis.strategies as st
import pytest
from hypothesis import given

from affectgpt_jax.common.labels import labels_of_object, parse_labels, read_labels

TWO = [
    "happy, sad",
    "[happy, sad]",
    "['happy', \"sad\"]",
    "['happy' 'sad']",
    "Happy,SAD",
    "happy,, , sad,.",
    "[[happy], [sad]]",
    "[happy, sad",
    "\\[happy, sad\\]",
    # commas, semicolons, brackets and quotes of other scripts
    "happy\uff0csad",
    "[happy\uff0csad]",
    "\u3010happy\u3001sad\u3011",
    "\u300chappy\u300d\u300csad\u300d",
    "[\u201chappy\u201d\uff0c\u201csad\u201d]",
    "\u2018happy\u2019, \u2018sad\u2019",
    "\u00abhappy\u00bb; \u00absad\u00bb",
    "Emotions\uff1ahappy\u3001sad",
    "\uff48\uff41\uff50\uff50\uff59\uff1b\uff53\uff41\uff44",
    "happy\u060c sad",
    "happy\u3002sad\u3002",
    # other separators
    "happy; sad",
    "[happy; sad]",
    "happy | sad",
    "happy / sad",
    "happy & sad",
    "happy + sad",
    "happy\tsad",
    "happy\nsad\n",
    "happy -> sad",
    "<happy><sad>",
    # Markdown, numbers, headings
    "**happy**, **sad**",
    "`happy`, `sad`",
    "- happy\n- sad",
    "* _happy_\n* _sad_",
    "\u2022 happy \u2022 sad",
    "## Emotions\n- **happy**\n- **sad**",
    "1. happy\n2. sad",
    "1) happy, 2) sad",
    "1. happy 2. sad",
    "(a) happy (b) sad",
    "\u2460happy\u2461sad",
    "The emotional labels are: happy, sad.",
    "Answer: [happy, sad]",
    "<answer>happy, sad</answer>",
    "```\nhappy, sad\n```",
    "happy (0.9), sad (0.1)",
    "happy: 90%, sad: 10 %",
    # objects of JSON and Python
    '{"emotions": ["happy", "sad"]}',
    '```json\n{"labels": "happy\uff0csad"}\n```',
    '{"reason": "a smile, a tear", "Open-set labels": ["Happy", "Sad"]}',
    "{'emotion': ['happy', 'sad'], 'reason': None}",
    '[{"emotion": "happy", "score": 0.9}, {"emotion": "sad", "score": 0.1}]',
    '{"happy": 0.9, "sad": 0.1}',
    '{"emotions": {"first": "happy", "second": "sad"}}',
    'Sure: {"emotions": ["happy", "sad"]} as asked.',
]


@pytest.mark.parametrize("text", TWO)
def test_two_labels_are_read_in_whatever_form(text):
    assert read_labels(text) == ["happy", "sad"]


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("", []),
        ("[]", []),
        ("{}", []),
        ("N/A", []),
        ("None", []),
        # an apostrophe, which the lexicon has too, and hyphens are part of a word
        ("don\u2019t care, it's, self-conscious", ["don\u2019t care", "it's", "self-conscious"]),
        ("pleasant and in control", ["pleasant and in control"]),
        ("\u5feb\u4e50\u3001\u60b2\u4f24", ["\u5feb\u4e50", "\u60b2\u4f24"]),
        ("I see a grin.", ["i see a grin"]),
        ("{happy", ["happy"]),
        # the release's own form: commas and quotes alone separate
        ("['angry/displeased', \"don't believe\"]", ["angry/displeased", "don", "t believe"]),
        ("[angry/displeased, sad]", ["angry/displeased", "sad"]),
    ],
)
def test_what_is_no_separator_stays(text, labels):
    assert read_labels(text) == labels


def test_an_object_that_does_not_say_which_texts_are_labels_is_not_guessed_at():
    assert labels_of_object('{"a": "x", "b": "y"}') is None
    assert labels_of_object("no object") is None
    assert labels_of_object('{"emotions": null}') == []


@given(st.lists(st.text(alphabet="abc -", min_size=1).filter(str.strip), max_size=5))
def test_what_the_rule_of_the_release_reads_is_read_the_same(words):
    expected = [word.strip() for word in words if word.strip(" -")]
    words = [word for word in words if word.strip(" -")]
    for text in (str(words), json.dumps(words), ",".join(words), f"[{', '.join(words)}]"):
        assert parse_labels(text) == expected


@given(st.text() | st.text(alphabet="[]{}()'\",;: \n-*#1.aemotion\u3001\uff1a"))
def test_any_text_is_read(text):
    for label in read_labels(text):
        assert label and label == label.strip().lower()


def test_long_texts_are_read_in_linear_time():
    began = time.process_time()
    for part in (".", " ", "'", "a(1", "emotion ", "- ", "{", "['", "> <"):
        read_labels(part * (20_000 // len(part)) + "x")
    assert time.process_time() - began < 10
