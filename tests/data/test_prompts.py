import dataclasses
import itertools
import json
import math
import re
import tomllib
from collections import Counter
from importlib.resources import files

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from affectgpt_jax.data.modalities import INPUT_MODES, MODALITIES, placeholders
from affectgpt_jax.data.prompts import (
    LABEL_TYPES,
    PromptError,
    Template,
    load_prompts,
    parse_label,
)
from affectgpt_jax.data.records import Annotations

PLACEHOLDERS = {name: modality.placeholder for name, modality in MODALITIES.items()}
ONE_EACH = dict.fromkeys(PLACEHOLDERS, 1)
SHIPPED = ("default", "compact")
COMPACT, DEFAULT = load_prompts("compact"), load_prompts("default")
CLIP = Annotations(
    name="a",
    subtitle="Stop!",
    description="She smiles.",
    labels=("happy", "calm"),
    emotion="happy",
    candidates=("happy", "sad", "angry"),
    valence=-0.456,
    valence_range=(-3.0, 3.0),
    caption="A door slams.",
    question="Who speaks?",
    answer="Nobody does.",
    alternatives=("He cries.", "She smiles."),
    preferred="a2",
)
EMPTY = Annotations(name="a")

# What a person reads between "Human: " and the question, for a clip in which somebody says "Stop!".
COMPACT_INPUTS = {
    "multi_audio_face_text": "both: <MultiHere> voice: <AudioHere> face: <FaceHere> said: Stop! ",
    "multi_audio_frame_text": "both: <MultiHere> voice: <AudioHere> frame: <FrameHere> "
    "said: Stop! ",
    "multi_audio_face_frame_text": "both: <MultiHere> voice: <AudioHere> face: <FaceHere> "
    "frame: <FrameHere> said: Stop! ",
    "multi_text": "both: <MultiHere> said: Stop! ",
    "audio_face_frame_text": "voice: <AudioHere> face: <FaceHere> frame: <FrameHere> said: Stop! ",
    "audio_face_text": "voice: <AudioHere> face: <FaceHere> said: Stop! ",
    "audio_frame_text": "voice: <AudioHere> frame: <FrameHere> said: Stop! ",
    "audio_face": "voice: <AudioHere> face: <FaceHere> ",
    "audio_text": "voice: <AudioHere> said: Stop! ",
    "face_text": "face: <FaceHere> said: Stop! ",
    "frame_text": "frame: <FrameHere> said: Stop! ",
    "audio": "voice: <AudioHere> ",
    "face": "face: <FaceHere> ",
    "frame": "frame: <FrameHere> ",
    "text": "said: Stop! ",
    "image": "image: <ImageHere> ",
}
# And the question and the answer of every label type.
COMPACT_QA = {
    "description": ("describe?", "She smiles."),
    "ovlabel": ("labels?", "They feel happy, calm."),
    "onehot": ("label?", "They feel happy."),
    "onehot_candidates": ("which of happy, sad, angry?", "It is happy."),
    "sentiment": ("sentiment?", "It is negative."),
    "valence": ("valence -3 to 3?", "It is -0.46."),
    "caption": ("caption?", "A door slams."),
    "qa": ("Who speaks?", "Nobody does."),
    "preference": ("a1: He cries. a2: She smiles. better?", "Better is a2."),
}


def test_every_input_mode_and_label_type_has_an_expected_text():
    assert COMPACT_INPUTS.keys() == INPUT_MODES.keys()
    assert COMPACT_QA.keys() == LABEL_TYPES.keys()


@pytest.mark.parametrize("mode", INPUT_MODES)
@pytest.mark.parametrize("question", [*LABEL_TYPES, "Why is that {so}?"])
def test_the_compact_prompt_reads_as_expected(mode, question):
    found = COMPACT.prompt(INPUT_MODES[mode], ONE_EACH, CLIP, question)
    words = COMPACT_QA[question][0] if question in COMPACT_QA else question
    assert found == f"Human: {COMPACT_INPUTS[mode]}{words} Assistant: "


@pytest.mark.parametrize("label_type", LABEL_TYPES)
def test_the_compact_answer_reads_as_expected(label_type):
    assert COMPACT.answer(label_type, CLIP) == f"{COMPACT_QA[label_type][1]}###"


def test_the_default_prompt_reads_as_expected():
    found = DEFAULT.prompt(INPUT_MODES["face_text"], ONE_EACH, CLIP, "What do they feel?")
    assert found == (
        "###Human: The face of the main person is given by these tokens: <Face><FaceHere></Face>. "
        "The person says: <Subtitle>Stop!</Subtitle>. What do they feel? ###Assistant: "
    )
    found = DEFAULT.prompt(INPUT_MODES["image"], ONE_EACH, CLIP, "valence")
    assert found == (
        "###Human: The picture is given by these tokens: <Image><ImageHere></Image>. How pleasant "
        "is what the person feels, as a number from -3, very unpleasant, over 0, neutral, to 3, "
        "very pleasant? ###Assistant: "
    )


@pytest.mark.parametrize("prompts", [DEFAULT, COMPACT], ids=SHIPPED)
@pytest.mark.parametrize("mode", INPUT_MODES)
@pytest.mark.parametrize("label_type", LABEL_TYPES)
def test_prompts_go_from_fused_to_single_inputs_to_subtitle_to_question(prompts, mode, label_type):
    mode = INPUT_MODES[mode]
    found = prompts.prompt(mode, ONE_EACH, CLIP, label_type)
    assert re.findall("<[A-Z][a-z]+Here>", found) == [PLACEHOLDERS[slot] for slot in mode.slots]
    order = [slot for slot in PLACEHOLDERS if slot in mode.slots]
    landmarks = [prompts.human.strip(), *(PLACEHOLDERS[slot] for slot in order)]
    landmarks += ["Stop!"] * mode.text
    landmarks += [prompts.question(label_type, CLIP), prompts.assistant.strip()]
    places = [found.index(landmark) for landmark in landmarks]
    assert places == sorted(places)
    assert found.count("Stop!") == mode.text
    assert found.startswith(prompts.human)
    assert found.endswith(": ")  # the space is a token of its own before every answer


@pytest.mark.parametrize("prompts", [DEFAULT, COMPACT], ids=SHIPPED)
def test_an_empty_subtitle_leaves_its_line_out(prompts):
    mode = INPUT_MODES["audio_text"]
    found = prompts.prompt(mode, ONE_EACH, EMPTY, "ovlabel")
    assert found == prompts.prompt(INPUT_MODES["audio"], ONE_EACH, CLIP, "ovlabel")


def test_a_slot_has_as_many_placeholders_as_soft_tokens():
    counts = {"multi": 16, "audio": 8, "face": 32}
    found = DEFAULT.prompt(INPUT_MODES["multi_audio_face_text"], counts, CLIP, "ovlabel")
    for slot, count in counts.items():
        assert PLACEHOLDERS[slot] * count in found
        assert found.count(PLACEHOLDERS[slot]) == count


@pytest.mark.parametrize("mode", INPUT_MODES)
def test_without_pre_fusion_a_mode_becomes_the_one_that_sees_the_rest(mode):
    plain = INPUT_MODES[mode].without_pre_fusion()
    found = COMPACT.prompt(plain, ONE_EACH, CLIP, "ovlabel")
    expected = COMPACT.prompt(INPUT_MODES[mode], ONE_EACH, CLIP, "ovlabel")
    assert found == expected.replace("both: <MultiHere> ", "")
    assert INPUT_MODES[plain.name] is plain


def test_answers_read_as_expected():
    assert DEFAULT.answer("ovlabel", CLIP) == "The person feels: happy, calm.###"
    assert DEFAULT.answer("description", CLIP) == "She smiles.###"
    assert DEFAULT.answer("sentiment", CLIP) == "The sentiment is negative.###"


def test_an_empty_label_list_reads_neutral():
    assert COMPACT.answer("ovlabel", EMPTY) == "They feel neutral.###"


def test_descriptions_that_are_as_good_get_a_sentence_of_their_own():
    clip = dataclasses.replace(CLIP, preferred="same")
    assert COMPACT.answer("preference", clip) == "Both are alike.###"
    assert COMPACT.read_answer("preference", "Both are alike.###") == "same"
    assert COMPACT.read_answer("preference", "Better is a1.###") == "a1"


@pytest.mark.parametrize(
    ("valence", "word"), [(0.01, "positive"), (-0.01, "negative"), (0.0, "neutral")]
)
def test_the_sign_of_a_valence_is_its_sentiment(valence, word):
    clip = dataclasses.replace(CLIP, valence=valence)
    assert COMPACT.answer("sentiment", clip) == f"It is {word}.###"


@pytest.mark.parametrize("label_type", LABEL_TYPES)
def test_what_a_clip_lacks_for_a_label_type_is_named_with_a_way_out(label_type):
    if label_type == "ovlabel":
        return
    with pytest.raises(PromptError, match="it has no .*; give it one, or choose another"):
        DEFAULT.answer(label_type, EMPTY)
    kind = LABEL_TYPES[label_type]
    if kind.asks or label_type == "valence":
        slot = (*kind.asks, *kind.may_ask)[0]
        with pytest.raises(PromptError, match=rf"nothing for the slot {{{slot}}} of default.toml"):
            DEFAULT.question(label_type, EMPTY)


def test_a_question_with_variants_gives_each_clip_one_of_them_for_good():
    clips = [dataclasses.replace(CLIP, name=f"clip {i}") for i in range(300)]
    asked = [DEFAULT.question("caption", clip) for clip in clips]
    assert asked == [DEFAULT.question("caption", clip) for clip in clips]
    counts = Counter(asked)
    assert len(counts) == 3
    # 100 of 300 each, within 4 standard errors.
    assert all(abs(count - 100) < 4 * math.sqrt(300 * 2 / 9) for count in counts.values())


@pytest.mark.parametrize(
    ("label", "types"),
    [
        ("hybrid", ("description", "ovlabel")),
        ("ovlabel", ("ovlabel",)),
        ("valence+sentiment", ("valence", "sentiment")),
    ],
)
def test_a_label_names_one_or_several_types(label, types):
    assert parse_label(label) == types


@pytest.mark.parametrize("label", ["", "mood", "ovlabel+", "hybrid+valence", "qa+qa"])
def test_a_label_that_names_no_type_or_one_twice_is_refused(label):
    with pytest.raises(PromptError, match="is not a label type; expected|names a type twice"):
        parse_label(label)


def is_label(text: str) -> bool:
    plain = text == text.lower().strip(" -") and " -" not in text and "- " not in text
    return plain and text not in {"and", "or", "none", "null", "nil"}


# Words of any script: what splits a list cannot be part of a label, and full-width letters are read
# as others.
LETTERS = st.characters(categories=["L", "Nd", "M"]).filter(lambda c: not "\uff01" <= c <= "\uff5e")
labels = st.text(LETTERS | st.sampled_from(" -"), min_size=1, max_size=12)


@settings(max_examples=50)
@given(st.lists(labels.filter(is_label), min_size=1, max_size=4, unique=True))
def test_reading_labels_inverts_the_answer(expected):
    for prompts in (DEFAULT, COMPACT):
        text = prompts.answer("ovlabel", dataclasses.replace(CLIP, labels=tuple(expected)))
        for written in (text, f" {text}", text + " and more###", text.removesuffix("###")):
            assert prompts.read_labels(written) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("###", []),
        ("They feel .", []),
        ("happy, sad", ["happy", "sad"]),  # no frame
        ("They feel happy, sad", ["happy", "sad"]),  # cut off before the end of the frame
        ("They feel Happy, SAD.", ["happy", "sad"]),
        ("['happy', \"sad\"]", ["happy", "sad"]),
        ("They feel [happy, sad].", ["happy", "sad"]),
        ("They feel happy; sad\nangry.", ["happy", "sad", "angry"]),
        ("They feel sad, happy, Sad, happy.", ["sad", "happy"]),
        ("They feel happy,, , sad,.", ["happy", "sad"]),
        ("They feel happy.### They feel sad.", ["happy"]),
        ("I see a grin.", ["i see a grin"]),
        ("They feel at peace with it.", ["at peace with it"]),
    ],
)
def test_reading_labels_copes_with_what_models_write(text, expected):
    assert COMPACT.read_labels(text) == expected


@pytest.mark.parametrize("placeholder", placeholders())
def test_a_subtitle_may_not_hold_a_placeholder(placeholder):
    with pytest.raises(PromptError, match=f"holds the reserved text {placeholder}"):
        clip = dataclasses.replace(CLIP, subtitle=f"a {placeholder} b")
        DEFAULT.prompt(INPUT_MODES["audio"], ONE_EACH, clip, "ovlabel")
    with pytest.raises(PromptError, match=f"the question holds the reserved text {placeholder}"):
        DEFAULT.prompt(INPUT_MODES["audio"], ONE_EACH, CLIP, f"What is {placeholder}?")


@pytest.mark.parametrize("reserved", [*placeholders(), "###"])
def test_an_answer_may_hold_neither_a_placeholder_nor_its_end(reserved):
    with pytest.raises(PromptError, match=f"holds the reserved text {reserved}"):
        clip = dataclasses.replace(CLIP, description=f"She smiles. {reserved} He frowns.")
        DEFAULT.answer("description", clip)
    with pytest.raises(PromptError, match=f"holds the reserved text {reserved}"):
        DEFAULT.answer("ovlabel", dataclasses.replace(CLIP, labels=("happy", f"a {reserved}")))


BRACES = "{subtitle} {face} {labels} {description} {} {{x}} {0!r"


def test_braces_in_the_texts_of_a_clip_are_literal():
    clip = Annotations(name="a", subtitle=BRACES, description=BRACES, labels=(BRACES,))
    found = COMPACT.prompt(INPUT_MODES["text"], {}, clip, BRACES)
    assert found == f"Human: said: {BRACES} {BRACES} Assistant: "
    assert COMPACT.answer("description", clip) == f"{BRACES}###"
    assert COMPACT.answer("ovlabel", clip) == f"They feel {BRACES}.###"


@given(st.text(), st.text(), st.text())
def test_templates_are_format_strings(before, value, after):
    text = "".join(part.replace("{", "{{").replace("}", "}}") for part in (before, "\0", after))
    template = Template(text.replace("\0", "{slot}", 1))
    assert template.slots == ("slot",)
    if "\0" not in before:
        assert template.render({"slot": value}) == before + value + after


def write(path, sections) -> str:
    """Strings in TOML are written as in JSON."""
    lines = []
    for section, keys in sections.items():
        if not isinstance(keys, dict):
            lines.insert(0, f"{section} = {json.dumps(keys)}")
            continue
        lines.append(f"[{section}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def sections() -> dict:
    resource = files("affectgpt_jax") / "assets" / "prompts" / "default.toml"
    return tomllib.loads(resource.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_copy_of_a_shipped_set_is_the_same_set(name, tmp_path):
    shipped = load_prompts(name)
    resource = files("affectgpt_jax") / "assets" / "prompts" / f"{name}.toml"
    copy = load_prompts(write(tmp_path / "mine.toml", tomllib.loads(resource.read_text("utf-8"))))
    clips = [CLIP, dataclasses.replace(CLIP, name="b", preferred="same")]
    for clip, mode, label_type in itertools.product(clips, INPUT_MODES.values(), LABEL_TYPES):
        found, expected = (p.prompt(mode, ONE_EACH, clip, label_type) for p in (copy, shipped))
        assert found == expected
        assert copy.answer(label_type, clip) == shipped.answer(label_type, clip)


# --- whole prompts by input mode ------------------------------------------------------------------


def test_a_whole_prompt_of_a_mode_replaces_its_parts(tmp_path):
    data = sections()
    data["modes"] = {
        "multi_audio_frame_text": "{question} {{of}} {audio}/{frame}/{multi}: {subtitle}! ",
    }
    prompts = load_prompts(write(tmp_path / "mine.toml", data))
    mode = INPUT_MODES["multi_audio_frame_text"]
    counts = {"multi_frame": 2, "audio": 1, "frame": 1}
    assert prompts.prompt(mode, counts, CLIP, "What?") == (
        "What? {of} <AudioHere>/<FrameHere>/<MultiHere><MultiHere>: Stop!! "
    )
    assert prompts.prompt(mode, counts, EMPTY, "What?").endswith(": ! ")
    other = INPUT_MODES["audio"]
    assert prompts.prompt(other, ONE_EACH, CLIP, "ovlabel") == DEFAULT.prompt(
        other, ONE_EACH, CLIP, "ovlabel"
    )


@pytest.mark.parametrize(
    ("mode", "template", "message"),
    [
        ("text", "{subtitle} {face} {question}", "unknown slot {face}"),
        ("audio", "{audio} {subtitle} {question}", "unknown slot {subtitle}"),
        ("text", "{question}", "must hold the slot {subtitle} exactly once"),
        ("text", "{subtitle}", "must hold the slot {question} exactly once"),
        ("multi_text", "{multi} {multi} {subtitle} {question}", "{multi} exactly once"),
        ("text", "{subtitle} {question} }", "Single '}' encountered"),
        ("speech", "{question}", "[modes] has the unknown key 'speech'"),
    ],
)
def test_a_whole_prompt_holds_each_input_of_its_mode_once(tmp_path, mode, template, message):
    data = sections() | {"modes": {mode: template}}
    assert_refused(write(tmp_path / "mine.toml", data), "[modes]", message)


def assert_refused(source: str, *expected: str) -> None:
    with pytest.raises(PromptError) as caught:
        load_prompts(source)
    message = str(caught.value)
    assert "\n" not in message
    for part in (source, *expected):
        assert part in message


SECTIONS = ("roles", "inputs", "questions", "answers")


def test_a_missing_file_is_an_error(tmp_path):
    assert_refused(str(tmp_path / "none.toml"), "neither a file nor one of the built-in sets")
    assert_refused("defualt", "default", "compact")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[roles\n", "not valid TOML"),
        (b"human = 1\nhuman = 2", "not valid TOML"),
        (b"\xff", "is not UTF-8"),
    ],
)
def test_a_file_that_is_not_toml_is_an_error(tmp_path, data, message):
    (tmp_path / "mine.toml").write_bytes(data)
    assert_refused(str(tmp_path / "mine.toml"), message)


@pytest.mark.parametrize("section", SECTIONS)
def test_sections_are_all_there_and_are_tables(tmp_path, section):
    data = sections()
    data[section] = "text"
    assert_refused(write(tmp_path / "text.toml", data), f"[{section}] must be a table")
    del data[section]
    assert_refused(write(tmp_path / "missing.toml", data), f"lacks {section!r}")


def test_an_unknown_section_is_an_error(tmp_path):
    data = sections() | {"system": {"text": "You are kind."}}
    assert_refused(write(tmp_path / "mine.toml", data), "unknown key 'system'")


KEYS = [(section, key) for section, keys in sections().items() for key in keys]


@pytest.mark.parametrize(("section", "key"), KEYS)
def test_keys_are_all_there_and_are_strings(tmp_path, section, key):
    data = sections()
    data[section][key] = 3
    assert_refused(write(tmp_path / "number.toml", data), f"[{section}].{key} must be a string")
    del data[section][key]
    path = write(tmp_path / "missing.toml", data)
    if section in ("roles", "inputs"):
        assert_refused(path, f"[{section}] lacks {key!r}")
    elif key != "preference_same":
        assert_refused(path, f"{key!r} must stand in [questions] and in [answers]")


def test_a_label_type_may_be_left_out_and_is_missed_when_it_is_needed(tmp_path):
    data = sections()
    del data["questions"]["caption"], data["answers"]["caption"], data["answers"]["preference_same"]
    prompts = load_prompts(write(tmp_path / "mine.toml", data))
    with pytest.raises(PromptError, match=r"mine.toml has no \[questions\].caption, which"):
        prompts.prompt(INPUT_MODES["audio"], ONE_EACH, CLIP, "caption")
    with pytest.raises(PromptError, match=r"mine.toml has no \[answers\].caption"):
        prompts.answer("caption", CLIP)
    with pytest.raises(PromptError, match=r"no \[answers\].preference_same"):
        prompts.answer("preference", dataclasses.replace(CLIP, preferred="same"))


def test_a_question_may_have_variants_but_not_none(tmp_path):
    data = sections()
    data["questions"]["caption"] = []
    assert_refused(write(tmp_path / "none.toml", data), "[questions].caption is an empty list")
    data["questions"]["caption"] = ["What?", 3]
    assert_refused(write(tmp_path / "odd.toml", data), "[questions].caption must be a string")


@pytest.mark.parametrize("section", SECTIONS)
def test_an_unknown_key_is_an_error(tmp_path, section):
    data = sections()
    data[section]["mood"] = "sad"
    assert_refused(write(tmp_path / "mine.toml", data), f"[{section}] has the unknown key 'mood'")


@pytest.mark.parametrize(
    ("section", "key", "template", "message"),
    [
        ("inputs", "face", "face: {voice} {face}", "unknown slot {voice}"),
        ("inputs", "text", "said: {text}", "unknown slot {text}"),
        ("inputs", "audio", "{} {audio}", "{} is not a slot"),
        ("inputs", "audio", "{audio!r}", "{audio} is not a slot"),
        ("inputs", "audio", "{audio} {", "Single '{' encountered"),
        ("questions", "onehot_candidates", "Which?", "must hold the slot {candidates}"),
        ("questions", "preference", "{first}?", "must hold the slot {second}"),
        ("questions", "valence", "{low} to {top}?", "unknown slot {top}"),
        ("answers", "preference_same", "{preferred}", "unknown slot {preferred}"),
        ("questions", "ovlabel", "What of {labels}?", "unknown slot {labels}"),
        ("roles", "human", "{subtitle}", "unknown slot {subtitle}"),
        ("inputs", "multi", "both: ", "must hold the slot {multi} exactly once"),
        ("answers", "ovlabel", "They feel it.", "must hold the slot {labels} exactly once"),
        ("answers", "description", "", "must hold the slot {description} exactly once"),
        ("inputs", "face", "{face} {face}", "must hold the slot {face} exactly once"),
        ("roles", "end", "", "is empty"),
    ],
)
def test_a_template_holds_exactly_its_slot(tmp_path, section, key, template, message):
    data = sections()
    data[section][key] = template
    assert_refused(write(tmp_path / "mine.toml", data), f"[{section}].{key}", message)


def test_slots_are_told_apart_by_every_shipped_set():
    """Inputs that read alike would leave the model to guess what a soft token is."""
    for prompts in (DEFAULT, COMPACT):
        fills = dict.fromkeys([*PLACEHOLDERS, "subtitle"], "")
        texts = [t.render(fills) for t in prompts.inputs.values()]
        assert len(set(texts)) == len(texts)
