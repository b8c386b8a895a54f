import itertools
import json
import re
import tomllib
from importlib.resources import files

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from affectgpt_jax.data.prompts import (
    INPUT_MODES,
    LABEL_TYPES,
    PLACEHOLDER_ORDER,
    PLACEHOLDERS,
    PromptError,
    load_prompts,
)

ONE_EACH = dict.fromkeys(PLACEHOLDERS, 1)
SHIPPED = ("default", "compact")
COMPACT, DEFAULT = load_prompts("compact"), load_prompts("default")

# What a person reads between "Human: " and the question, for a clip in which somebody says "Stop!".
COMPACT_INPUTS = {
    "multi_audio_face_text": "both: <MultiHere> voice: <AudioHere> face: <FaceHere> said: Stop! ",
    "audio_face": "voice: <AudioHere> face: <FaceHere> ",
    "audio_text": "voice: <AudioHere> said: Stop! ",
    "face_text": "face: <FaceHere> said: Stop! ",
    "frame_text": "frame: <FrameHere> said: Stop! ",
    "audio": "voice: <AudioHere> ",
    "face": "face: <FaceHere> ",
    "frame": "frame: <FrameHere> ",
    "text": "said: Stop! ",
}


def test_every_input_mode_has_an_expected_prompt():
    assert COMPACT_INPUTS.keys() == INPUT_MODES.keys()


@pytest.mark.parametrize("mode", INPUT_MODES)
@pytest.mark.parametrize(
    ("question", "words"),
    [("description", "describe?"), ("ovlabel", "labels?"), ("Who speaks?", "Who speaks?")],
)
def test_the_compact_prompt_reads_as_expected(mode, question, words):
    found = COMPACT.prompt(INPUT_MODES[mode], ONE_EACH, "Stop!", question)
    assert found == f"Human: {COMPACT_INPUTS[mode]}{words} Assistant: "


def test_the_default_prompt_reads_as_expected():
    found = DEFAULT.prompt(INPUT_MODES["face_text"], ONE_EACH, "Stop!", "What do they feel?")
    assert found == (
        "###Human: The face of the main person is given by these tokens: <Face><FaceHere></Face>. "
        "The person says: <Subtitle>Stop!</Subtitle>. What do they feel? ###Assistant: "
    )


@pytest.mark.parametrize("prompts", [DEFAULT, COMPACT], ids=SHIPPED)
@pytest.mark.parametrize("mode", INPUT_MODES)
@pytest.mark.parametrize("label_type", LABEL_TYPES)
def test_prompts_go_from_fused_to_single_inputs_to_subtitle_to_question(prompts, mode, label_type):
    mode = INPUT_MODES[mode]
    found = prompts.prompt(mode, ONE_EACH, "Stop!", label_type)
    assert re.findall("<[A-Z][a-z]+Here>", found) == [PLACEHOLDERS[slot] for slot in mode.slots]
    order = [slot for slot in ("multi", "audio", "face", "frame") if slot in mode.slots]
    landmarks = [prompts.human.strip(), *(PLACEHOLDERS[slot] for slot in order)]
    landmarks += ["Stop!"] * mode.text
    landmarks += [prompts.questions[label_type], prompts.assistant.strip()]
    places = [found.index(landmark) for landmark in landmarks]
    assert places == sorted(places)
    assert found.count("Stop!") == mode.text
    assert found.startswith(prompts.human)
    assert found.endswith(": ")  # the space is a token of its own before every answer


@pytest.mark.parametrize("prompts", [DEFAULT, COMPACT], ids=SHIPPED)
def test_an_empty_subtitle_leaves_its_line_out(prompts):
    mode = INPUT_MODES["audio_text"]
    found = prompts.prompt(mode, ONE_EACH, "", "ovlabel")
    assert found == prompts.prompt(INPUT_MODES["audio"], ONE_EACH, "Stop!", "ovlabel")


def test_a_slot_has_as_many_placeholders_as_soft_tokens():
    counts = {"multi": 16, "audio": 8, "face": 32}
    found = DEFAULT.prompt(INPUT_MODES["multi_audio_face_text"], counts, "Stop!", "ovlabel")
    for slot, count in counts.items():
        assert PLACEHOLDERS[slot] * count in found
        assert found.count(PLACEHOLDERS[slot]) == count


def test_without_pre_fusion_the_fused_slot_is_left_out():
    mode = INPUT_MODES["multi_audio_face_text"].without("multi")
    found = COMPACT.prompt(mode, {"audio": 1, "face": 1}, "Stop!", "ovlabel")
    assert found == "Human: voice: <AudioHere> face: <FaceHere> said: Stop! labels? Assistant: "


def test_answers_read_as_expected():
    labels = ("happy", "calm")
    assert COMPACT.answer("ovlabel", labels=labels) == "They feel happy, calm.###"
    assert DEFAULT.answer("ovlabel", labels=labels) == "The person feels: happy, calm.###"
    for prompts in (COMPACT, DEFAULT):
        assert prompts.answer("description", description="She smiles.") == "She smiles.###"


def test_an_empty_label_list_reads_neutral():
    assert COMPACT.answer("ovlabel") == "They feel neutral.###"


def test_an_empty_description_is_refused_with_a_way_out():
    with pytest.raises(PromptError, match="no description; train it with --config.label=ovlabel"):
        DEFAULT.answer("description", labels=("happy",))


def is_label(text: str) -> bool:
    return text == text.lower().strip(".[]'\"").strip() and "###" not in text


# What splits a label list cannot be part of a label.
labels = st.text(st.characters(codec="utf-8", exclude_characters=",;\n"), min_size=1, max_size=12)


@settings(max_examples=50)
@given(st.lists(labels.filter(is_label), min_size=1, max_size=4, unique=True))
def test_reading_labels_inverts_the_answer(expected):
    for prompts in (DEFAULT, COMPACT):
        text = prompts.answer("ovlabel", labels=tuple(expected))
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


@pytest.mark.parametrize("placeholder", PLACEHOLDER_ORDER)
def test_a_subtitle_may_not_hold_a_placeholder(placeholder):
    with pytest.raises(PromptError, match=f"holds the reserved text {placeholder}"):
        DEFAULT.prompt(INPUT_MODES["audio"], ONE_EACH, f"a {placeholder} b", "ovlabel")


@pytest.mark.parametrize("reserved", [*PLACEHOLDER_ORDER, "###"])
def test_an_answer_may_hold_neither_a_placeholder_nor_its_end(reserved):
    with pytest.raises(PromptError, match=f"holds the reserved text {reserved}"):
        DEFAULT.answer("description", description=f"She smiles. {reserved} He frowns.")
    with pytest.raises(PromptError, match=f"holds the reserved text {reserved}"):
        DEFAULT.answer("ovlabel", labels=("happy", f"a {reserved}"))


BRACES = "{subtitle} {face} {labels} {description} {} {{x}} {0!r"


def test_braces_in_the_texts_of_a_clip_are_literal():
    found = COMPACT.prompt(INPUT_MODES["text"], {}, BRACES, "ovlabel")
    assert found == f"Human: said: {BRACES} labels? Assistant: "
    assert COMPACT.answer("description", description=BRACES) == f"{BRACES}###"
    answer = COMPACT.answer("ovlabel", description="no", labels=(BRACES,))
    assert answer == f"They feel {BRACES}.###"


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
    for field in ("human", "assistant", "end", "inputs", "questions", "answers"):
        assert getattr(copy, field) == getattr(shipped, field)


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
        (b"\xff", "utf-8"),
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
    assert_refused(write(tmp_path / "missing.toml", data), f"[{section}] lacks {key!r}")


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
        ("inputs", "audio", "{} {audio}", "unknown slot {}"),
        ("inputs", "audio", "{audio!r}", "unknown slot {audio!r}"),
        ("questions", "ovlabel", "What of {labels}?", "unknown slot {labels}"),
        ("roles", "human", "{subtitle}", "unknown slot {subtitle}"),
        ("inputs", "multi", "both: ", "must hold the slot {multi} exactly once"),
        ("answers", "ovlabel", "They feel it.", "must hold the slot {labels} exactly once"),
        ("answers", "description", "", "must hold the slot {description} exactly once"),
        ("inputs", "face", "{face} {face}", "must hold the slot {face} exactly once"),
        ("inputs", "face", "{{face}} {face}", "must hold the slot {face} exactly once"),
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
        for a, b in itertools.combinations(prompts.inputs.values(), 2):
            assert re.sub("{.*}", "", a) != re.sub("{.*}", "", b)
