"""Reading the release's prompts, from a source built as its `base_dataset.py` is.

Every sentence here is ours. What the source itself says, run as Python, is the truth that the
prompt file is compared with.
"""

import dataclasses
import hashlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from release_source import INPUTS, SOURCE, TASK

from affectgpt_jax.data.modalities import INPUT_MODES, MODALITIES
from affectgpt_jax.data.prompts import LABEL_TYPES as OUR_LABEL_TYPES
from affectgpt_jax.data.prompts import PromptError, load_prompts
from affectgpt_jax.data.records import Annotations
from data_prep import release_prompts
from data_prep.release_prompts import LABEL_TYPES, MODES, ReleaseError, read_release

ROOT = Path(__file__).parents[2]
ONE_EACH = dict.fromkeys(MODALITIES, 1)


@pytest.fixture
def write(tmp_path):
    """Write a source and give its path."""

    def write(text=SOURCE):
        path = tmp_path / "base_dataset.py"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        return path

    return write


def convert(path, *flags):
    """The file that the command writes."""
    out = path.with_name("release.toml")
    release_prompts.main([f"--source={path}", f"--out={out}", *flags])
    return out


def run_source(text):
    """The class of a source, run as Python without its imports, which only this test may do."""
    names = {}
    exec(compile(re.sub(r"(?m)^(import|from) .*$", "", text), "base_dataset.py", "exec"), names)
    return names["BaseDataset"]


# One clip as the source has it, and as a record of ours.
SAMPLE = {
    "description": "She smiles {x}.",
    "ovlabel": "happy, calm",
    "onehot": "happy",
    "sentiment": "negative",
    "valence": -1.625,
    "caption": "A dog barks.",
    "question": "Who barks?",
    "answer": "A dog.",
    "preference": {"a1": "One {0}.", "a2": "Two.", "p": "a2"},
}
CLIP = Annotations(
    name="clip",
    subtitle="Stop {it}!",
    description="She smiles {x}.",
    labels=("happy", "calm"),
    emotion="happy",
    candidates=("happy", "sad"),
    valence=-1.625,
    valence_range=(-3.0, 3.0),
    caption="A dog barks.",
    question="Who barks?",
    answer="A dog.",
    alternatives=("One {0}.", "Two."),
    preferred="a2",
)


@pytest.mark.parametrize("caption", ["image", "audio"])
def test_the_prompts_are_those_of_the_source_when_it_is_run(caption, write):
    prompts = load_prompts(str(convert(write(), f"--caption={caption}")))
    dataset = run_source(SOURCE)()
    vars(dataset).update(minval=-3, maxval=3, candidate_labels="happy, sad")
    dataset.func_random_prompts = lambda candidates: candidates
    for name, mode in MODES.items():
        for subtitle in (CLIP.subtitle, ""):
            clip = dataclasses.replace(CLIP, subtitle=subtitle)
            found = prompts.prompt(INPUT_MODES[mode], ONE_EACH, clip, "Why {so} \\?")
            assert found == dataset.get_prompt_for_multimodal(name, subtitle, "Why {so} \\?")
    for key, method in LABEL_TYPES.items():
        expected = getattr(dataset, method)(SAMPLE, *([caption] if key == "caption" else []))
        if key == "caption":
            found = [variant.render({}) for variant in prompts.questions[key]]
            assert found == expected["question"]
        else:
            assert prompts.question(key, CLIP) == expected["question"]
        assert prompts.answer(key, CLIP) == expected["answer"] + "###"
    same = {"preference": SAMPLE["preference"] | {"p": "same"}}
    expected = dataset.func_get_qa_preference(same)["answer"]
    found = prompts.answer("preference", dataclasses.replace(CLIP, preferred="same"))
    assert found == expected + "###"


def test_roles_and_inputs_are_found_in_the_prompts(write):
    tables = tomllib.loads(convert(write()).read_text(encoding="utf-8"))
    assert tables["roles"] == {"human": "##Asker: ", "assistant": " ##Answerer: ", "end": "###"}
    assert tables["inputs"]["face"] == "What the face does: <Eye>{face}</Eye>. "
    assert tables["inputs"].keys() == INPUTS.keys()
    assert tables["modes"]["face_text"] == (
        "What the face does: <Eye>{face}</Eye>. Words: <Sub>{subtitle}</Sub>. " + TASK % "question"
    )
    assert tables["questions"]["ovlabel"] == "Name every emotion: {{a}}, \\b."
    assert tables["answers"]["ovlabel"] == "They feel {{{labels}}}."


def test_what_the_release_has_no_prompt_for_is_composed(write):
    prompts = load_prompts(str(convert(write())))
    assert prompts.prompt(INPUT_MODES["audio_face"], ONE_EACH, CLIP, "onehot") == (
        "##Asker: What one hears: <Ear><AudioHere></Ear>. "
        "What the face does: <Eye><FaceHere></Eye>. Name one emotion. ##Answerer: "
    )


def test_answers_in_the_sentences_of_the_release_are_read(write):
    prompts = load_prompts(str(convert(write())))
    assert prompts.read_answer("onehot", prompts.answer("onehot", CLIP)) == "happy"
    assert prompts.read_answer("valence", prompts.answer("valence", CLIP)) == "-1.62"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"Name one emotion."', '"""Name one emotion."""'),
        ('"Name one emotion."', "'Name one ' + ('emo' + 'tion.')"),
        ("f\"I choose {sample['onehot']}.\"", "'I choose ' + sample['onehot'] + '.'"),
        ("p in ['a1', 'a2']:", 'p in ["a1", "a2"]:'),
        ('f"Better: {p}."', "f'Better: ' + p + f'.'"),
        ('question = "Name one', "question = 'Name two'; question = \"Name one"),
    ],
)
def test_other_spellings_of_the_same_strings_read_the_same(old, new, write):
    assert old in SOURCE
    tables = read_release(write(SOURCE.replace(old, new))).tables
    assert tables == read_release(write()).tables


FACE_ONLY = 'f"##Asker: What the face does: <Eye><FaceHere></Eye>. " \\\n'
# What is wrong: text of the source, what stands there instead, and what the message says.
REFUSED = {
    "prompt from a call": (
        FACE_ONLY,
        "build('x') \\\n",
        "the branch for 'faceonly' assigns prompt from build('x'), expected string literals",
    ),
    "prompt from a number": (FACE_ONLY, "3 \\\n", "assigns prompt from 3, expected string"),
    "prompt from a name": (FACE_ONLY, "head \\\n", "assigns prompt from head, expected string"),
    "a choice": ('"Name one emotion."', "'a' if self.b else 'c'", "from 'a' if self.b else 'c'"),
    "bytes": ('"Name one emotion."', "b'Name one.'", "from b'Name one.', expected"),
    "multiplied": ('"Name one emotion."', "2 * 'Name'", "from 2 * 'Name', expected"),
    "a format call": ('"Name one emotion."', "'{}'.format('x')", "from '{}'.format('x'), expected"),
    "an unknown value": ("{self.candidate_labels}", "{self.words}", "from self.words, expected"),
    "a conversion": ("{self.candidate_labels}", "{self.candidate_labels!r}", "labels!r}, expected"),
    "a format": ("{self.candidate_labels}", "{self.candidate_labels:>9}", "labels:>9}, expected"),
    "other decimals": ("at %.2f.", "at %.3f.", "is 'It is 100%% at %.3f.' % sample['valence']"),
    "another branch": ("if p in ['a1', 'a2']:", "if p != 'same':", "holds if p != 'same'"),
    "no dictionary": (
        "return {\n            'question': sample['question']",
        "return ask(sample)\n        x = {\n            'question': sample['question']",
        "func_get_qa_direct returns ask(sample), expected {'question': ..., 'answer': ...}",
    ),
    "a loop": ("        # several cases\n", "        while True: pass\n", "holds while True: pass"),
    "a bare return": ("return prompt\n", "return\n", "holds return, expected only assignments"),
    "half a character": ('"Name one', '"\\ud800', "expected string literals"),
    "a drawn question from a call": (
        '["What is this?",\n',
        "[ask(),\n",
        "an entry of self.image_caption_prompt_candidates is ask(), expected string literals",
    ),
    "a second list": (
        "self.max_length = model_cfg.max_length",
        "self.image_caption_prompt_candidates = []",
        "expected one list assigned to self.image_caption_prompt_candidates",
    ),
    "two ends": ("        return target\n", "        return qa_pair['answer'] + '#'\n", "end in"),
    "not Python": ("        return prompt\n", "        return = prompt\n", "not valid Python: "),
}  # fmt: skip


def line_of_change(old, new):
    """The line, from 1, on which two texts begin to differ."""
    pairs = zip(old.splitlines(), new.splitlines(), strict=False)
    return next(number for number, (a, b) in enumerate(pairs, 1) if a != b)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_one_sentence_with_its_line(case, write):
    old, new, message = REFUSED[case]
    assert old in SOURCE
    changed = SOURCE.replace(old, new, 1)
    with pytest.raises(ReleaseError) as caught:
        read_release(write(changed))
    told = str(caught.value)
    assert message in told and "\n" not in told
    assert told.startswith(f"base_dataset.py, line {line_of_change(SOURCE, changed)}: ")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("face_or_frame == 'faceonly'", "face_or_frame == 'x'", "has no branch for 'faceonly'"),
        ("def func_get_qa_sentiment", "def ask", "BaseDataset has no method func_get_qa_sentiment"),
        ("def get_prompt_for_multimodal", "def get", "0 classes here have a method get_prompt_for"),
        ("Answerer: \"\n        elif", "Bot: \"\n        elif", "prompts end in one of"),
    ],
)  # fmt: skip
def test_a_source_that_lacks_a_part_is_refused(old, new, message, write):
    assert old in SOURCE
    with pytest.raises(ReleaseError, match=rf"^base_dataset.py, line \d+: .*{message}"):
        read_release(write(SOURCE.replace(old, new, 1)))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<FaceHere>", "<FrameHere>", "[modes].audio_face_frame_text must hold the slot {face}"),
        ("<ImageHere>", "<SmellHere>", "[inputs].image names the unknown slot {smell}"),
        (
            '</Pic>. " \\\n                    + f"',
            "</Pic>. ",
            "[inputs].image names the unknown slot",
        ),
        ("{sample['sentiment']}", "it", "[answers].sentiment must hold the slot {sentiment}"),
        ('"Name one emotion."', "sample['onehot']", "[questions].onehot names the unknown slot"),
    ],
)
def test_a_prompt_shows_what_its_name_says(old, new, message, write):
    assert old in SOURCE
    with pytest.raises(PromptError, match=f"^base_dataset.py: .*{re.escape(message)}"):
        read_release(write(SOURCE.replace(old, new, 1)))


def test_what_has_no_place_in_a_prompt_file_is_named_on_the_screen_and_in_the_file(write, capsys):
    text = SOURCE.replace(
        "        return prompt\n",
        "        elif face_or_frame == 'pose_text':\n            prompt = pose()\n"
        "        return prompt\n",
    )
    text = text.replace("def func_random_prompts", "def func_get_qa_rhyme")
    out = convert(write(text.replace(" + '###'", "")))
    told = [
        "left out: [modes].audio_face (the release has no prompt for these inputs)",
        "left out: the prompt 'pose_text' (no input mode here shows the same)",
        "left out: the caption questions about audio (--caption=image)",
        "left out: func_get_qa_rhyme (it is no label type here)",
        "left out: func_get_description_reward (it is no label type here)",
        "assumed: [roles].end = '###' (the source does not say what ends an answer)",
    ]
    assert capsys.readouterr().out.splitlines()[1:] == told
    assert out.read_text().split("\n\n")[0].splitlines()[-6:] == [f"# {line}" for line in told]


def test_the_file_is_the_same_each_time_and_says_how_it_was_made(write, capsys):
    path = write()
    first = convert(path, "--caption=audio").read_bytes()
    assert convert(path, "--caption=audio").read_bytes() == first
    comment = first.decode().split("\n[")[0]
    assert f"base_dataset.py, SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()}" in comment
    command = "--source base_dataset.py --out release.toml --caption audio"
    assert f"affectgpt release-prompts {command}" in comment
    assert str(path.parent) not in comment
    assert all(line.startswith("#") for line in comment.strip().splitlines())


def test_the_end_of_an_answer_is_read(write):
    tables = read_release(write(SOURCE.replace("+ '###'", "+ '</end>'"))).tables
    assert tables["roles"]["end"] == "</end>"


def test_nothing_of_the_source_is_run(tmp_path):
    marker = tmp_path / "run"
    attack = f"__import__('os').system('touch {marker}')"
    path = tmp_path / "base_dataset.py"
    text = SOURCE.replace("import config\n", f"import config\n{attack}\n")
    text = text.replace("class BaseDataset():\n", f"class BaseDataset():\n    {attack}\n")
    text = text.replace("question_only=False", f"question_only={attack}")
    path.write_text(text.replace("    def get_prompt", f"    @{attack}\n    def get_prompt"))
    command = [sys.executable, "-m", "data_prep.release_prompts", f"--source={path}"]
    command.append(f"--out={tmp_path / 'release.toml'}")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not marker.exists()
    # The attack works: what ran it would have been seen.
    run_source(text.split("class")[0] + "class BaseDataset: pass")
    assert marker.exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "line 1: 0 classes here have a method get_prompt_for_multimodal"),
        (b"x = '\xff'", "line 1: not valid Python: "),
        (b"\0", "line 1: not valid Python: "),
        (b"x = " + b"-" * 100_000 + b"1", "line 1: "),
        (b"class A:\n  def get_prompt_for_multimodal(self): pass", "line 2: get_prompt_for_multi"),
    ],
)
def test_a_file_that_is_something_else_is_one_sentence(data, message, tmp_path, capsys):
    path = tmp_path / "base_dataset.py"
    path.write_bytes(data)
    with pytest.raises(SystemExit) as stopped:
        convert(path)
    assert str(stopped.value).startswith(f"error: base_dataset.py, {message}")
    assert "\n" not in str(stopped.value)
    assert not (tmp_path / "release.toml").exists()


def test_missing_files_and_folders_are_one_sentence(write, tmp_path):
    with pytest.raises(SystemExit, match="error: .*none.py: No such file or directory"):
        convert(tmp_path / "none.py")
    path = write()
    with pytest.raises(SystemExit, match="error: --out=.*x.toml cannot be written: "):
        release_prompts.main([f"--source={path}", f"--out={path / 'x.toml'}"])
    with pytest.raises(SystemExit, match="is the source; name another file"):
        release_prompts.main([f"--source={path}", f"--out={path}"])
    assert path.read_text() == SOURCE


def test_file_names_cannot_break_out_of_the_comment(tmp_path):
    path = tmp_path / "base\n[roles]\x1b.py"
    path.write_text(SOURCE)
    assert "modes" in tomllib.loads(convert(path).read_text())


def test_every_input_mode_and_label_type_has_its_place():
    assert {*MODES.values(), "audio_face"} == INPUT_MODES.keys()
    assert LABEL_TYPES.keys() == OUR_LABEL_TYPES.keys()
