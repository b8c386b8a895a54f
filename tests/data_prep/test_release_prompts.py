"""Reading the release's prompts, from a source built as its `base_dataset.py` is.

Every sentence here is ours. What the source itself would say, run as Python, is the truth that the
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
from hypothesis import given, settings
from hypothesis import strategies as st

from affectgpt_jax.data.prompts import INPUT_MODES, PLACEHOLDERS, PromptSet, load_prompts
from affectgpt_jax.data.prompts import LABEL_TYPES as OUR_LABEL_TYPES
from affectgpt_jax.data.records import Annotations
from data_prep import release_prompts
from data_prep.release_prompts import LABEL_TYPES, MODES, ReleaseError, read_release

ROOT = Path(__file__).parents[2]
ONE_EACH = dict.fromkeys(PLACEHOLDERS, 1)

# Literal text of the source, by key; a pair stands around what is interpolated.
SENTENCES = {
    "human": "##Asker: ",
    "multi": ("Both at once: <Mix>", "</Mix>. "),
    "audio": ("What one hears: <Ear>", "</Ear>. "),
    "face": ("What the face does: <Eye>", "</Eye>. "),
    "frame": ("What the picture shows: <Eye>", "</Eye>. "),
    "image": ("A still: <Pic>", "</Pic>. "),
    "text": ("Words: <Sub>", "</Sub>. "),
    "task": ("Take all of it and answer. ", " ##Answerer: "),
    "description": 'How does the person feel,\tand "why"?',
    "ovlabel": "Name every emotion.",
    "ovlabel answer": ("They feel ", "."),
    "onehot": "Name one emotion.",
    "onehot answer": ("It is ", "."),
    "onehot_candidates": ("Choose one of: ", "."),
    "onehot_candidates answer": ("I choose ", "."),
    "valence scale": ("A ﬂoating-point number between ", " and ", ". "),
    "valence ends": ("Here ", " is worst, 0 neutral, and ", " best. "),
    "valence task": "How good is it, on a scale? ",
    "valence order": "Write the number.",
    "valence answer": ("It is 100% at ", "."),
    "sentiment": "Good, bad or neither?",
    "sentiment answer": ("It is ", " to them."),
    "image captions": ("What is this?", "Say what the picture shows."),
    "audio captions": ("What sounds here?", "Say what one hears.", "Describe the noise."),
    "preference": ("Two texts. a1: ", " \t\t\t a2: ", " Which is better?"),
    "preference answer": ("Better: ", "."),
    "preference same": "They're equal.",
}


def quoted(text: str, quote: str = '"') -> str:
    """A string literal without its prefix, written otherwise than `ast.unparse` would."""
    escapes = {"\\": "\\\\", quote: "\\" + quote, "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    body = "".join(escapes.get(c) or (c if c.isprintable() else f"\\U{ord(c):08x}") for c in text)
    return f"{quote}{body}{quote}"


def f(*parts: str, quote: str = '"') -> str:
    """An f-string: literal text and expressions, in turn."""
    doubled = [p.replace("{", "{{").replace("}", "}}") for p in parts[::2]]
    body = [f"{{{p}}}" for p in parts[1::2]]
    texts = [quoted(text, quote)[1:-1] for text in doubled]
    return (
        "f"
        + quote
        + "".join(text + expression for text, expression in zip(texts, [*body, ""], strict=True))
        + quote
    )


# The order in which the release's branches stand, with what each shows.
SHOWN = {
    "faceframe": ("audio", "frame", "face", "text"),
    "face": ("audio", "face", "text"),
    "frame": ("audio", "frame", "text"),
    "audioonly": ("audio",),
    "textonly": ("text",),
    "faceonly": ("face",),
    "frameonly": ("frame",),
    "image": ("image",),
    "audio_text": ("audio", "text"),
    "face_text": ("face", "text"),
    "frame_text": ("frame", "text"),
    "multiface_text": ("multi", "text"),
    "multiface_audio_face_text": ("multi", "audio", "face", "text"),
    "multiframe_audio_frame_text": ("multi", "audio", "frame", "text"),
    "multiface_audio_face_frame_text": ("multi", "audio", "face", "frame", "text"),
}
HEADLESS = ("audio_text", "face_text", "frame_text")  # without the asker's role, in the release


def branches(s) -> str:
    lines = []
    for number, (name, shown) in enumerate(SHOWN.items()):
        if name == "multiface_text":
            lines.append("\n        ## from here on with the fused token    ")
        lines.append(f"        {'elif' if number else 'if'} face_or_frame == '{name}': # {shown}")
        if "text" in shown:
            lines.append("            assert subtitle is not None")
        operands = []
        for slot in shown:
            before, after = s[slot]
            head = s["human"] if not operands and name not in HEADLESS else ""
            if slot == "text":
                operands.append(f(head + before, "subtitle", after))
            else:
                operands.append(f(head + before + PLACEHOLDERS[slot] + after))
        operands.append(f(s["task"][0], "user_message", s["task"][1]))
        lines.append("            prompt =  " + " \\\n                    + ".join(operands))
    return "\n".join(lines)


# Between @ stand literals; the layout, down to stray spaces, is the release's.
SKELETON = """import os
import torch
from my_affectgpt.models.tokenizer import load_tokenizer_from_LLM
import config

class BaseDataset():
    def __init__(self, vis_processor=None, model_cfg=None):

        self.vis_processor = vis_processor
        self.image_caption_prompt_candidates = [@image captions@]

        self.audio_caption_prompt_candidates = [@audio captions@]
        if model_cfg is None: return
        self.max_length = model_cfg.max_length

    def func_random_prompts(self, candidates):
        index = random.randint(0, len(candidates) - 1)
        return candidates[index]

    def func_get_qa_description(self, sample, question_only=False):
        question = @description@

        if question_only:
            return question
        else:
            return {
                'question': question, 
                'answer':sample['description'],
                }

    def func_get_qa_ovlabel(self, sample, question_only=False):
        question = @ovlabel@

        if question_only:
            return question
        else:
            return {
                'question': question,
                'answer':  @ovlabel answer@
                }

    def func_get_qa_onehot_w_candidates(self, sample, question_only=False):
        question = @onehot_candidates@

        if question_only:
            return question
        else:
            return {
                'question': question,
                'answer':   @onehot_candidates answer@
                }

    def func_get_qa_onehot_wo_candidates(self, sample, question_only=False):
        question = @onehot@

        if question_only:
            return question
        else:
            return {
                'question': question,
                'answer':  @onehot answer@
                }

    def func_get_qa_valence(self, sample, question_only=False):
        question = @valence task@ \\
                 + @valence scale@ \\
                 + @valence ends@ \\
                 + @valence order@

        if question_only:
            return question
        else:
            return {
                'question': question,
                'answer': @valence answer@ %(sample['valence']),
                }

    def func_get_qa_sentiment(self, sample, question_only=False):
        question = @sentiment@

        if question_only:
            return question
        else:
            return {
                'question': question,
                'answer':  @sentiment answer@,
                }

    def func_get_qa_direct(self, sample):
        return {
            'question': sample['question'],
            'answer':   sample['answer'],
            }

    def func_get_qa_caption(self, sample, modality):
        if modality == 'image':
            return {
            'question': self.func_random_prompts(self.image_caption_prompt_candidates),
            'answer':   sample['caption'],
            }
        elif modality == 'audio':
            return {
            'question': self.func_random_prompts(self.audio_caption_prompt_candidates),
            'answer':   sample['caption'],
            }

    def func_get_qa_preference(self, sample):

        a1 = sample['preference']['a1']
        a2 = sample['preference']['a2']
        p  = sample['preference']['p']

        question = @preference@

        assert p in ['a1', 'a2', 'same']
        if p in ['a1', 'a2']:
            answer = @preference answer@
        else:
            answer = @preference same@

        return {
            'question': question,
            'answer':   answer,
            }

    def func_get_description_reward(self, sample):
        reward = sample['reward']
        question = f"Judge: {sample['description']}"
        answer = f'{reward} it.'
        return {
            'question': question,
            'answer':   answer,
        }

    ## who shows what
    def get_prompt_for_multimodal(self, face_or_frame, subtitle, user_message):

        # several cases
@branches@
        return prompt

    def __getitem__(self, index):
        qa_pair = self.get_qa_pairs(self.dataset, index)
        target = qa_pair['answer'] + '###'
        return target
"""


def source(s=SENTENCES) -> str:
    """A file built as the release's `base_dataset.py` is, with the sentences `s`."""

    def around(key: str, *expressions: str) -> str:
        texts = s[key]
        parts = [part for pair in zip(texts, [*expressions, ""]) for part in pair]
        return f(*parts[:-1])

    percent = "%.2f".join(text.replace("%", "%%") for text in s["valence answer"])
    literals = {
        "image captions": (",\n" + 48 * " ").join(map(quoted, s["image captions"])),
        "audio captions": ", ".join(map(quoted, s["audio captions"])),
        "description": quoted(s["description"]),
        "ovlabel": quoted(s["ovlabel"], "'"),
        "ovlabel answer": around("ovlabel answer", "sample['ovlabel']"),
        "onehot": quoted(s["onehot"]),
        "onehot answer": around("onehot answer", "sample['onehot']"),
        "onehot_candidates": around("onehot_candidates", "self.candidate_labels"),
        "onehot_candidates answer": around("onehot_candidates answer", "sample['onehot']"),
        "valence task": f(s["valence task"]),
        "valence scale": around("valence scale", "self.minval", "self.maxval"),
        "valence ends": around("valence ends", "self.minval", "self.maxval"),
        "valence order": f(s["valence order"]),
        "valence answer": quoted(percent, "'"),
        "sentiment": quoted(s["sentiment"]),
        "sentiment answer": around("sentiment answer", "sample['sentiment']"),
        "preference": around("preference", "a1", "a2"),
        "preference answer": around("preference answer", "p"),
        "preference same": f(s["preference same"], quote="'"),
        "branches": branches(s),
    }
    return re.sub(r"@([\w ]+)@", lambda match: literals[match[1]], SKELETON)


@pytest.fixture
def write(tmp_path):
    """Write a source and give its path."""

    def write(text: str) -> Path:
        path = tmp_path / "base_dataset.py"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        return path

    return write


def run_source(text: str) -> type:
    """The class of a source, run as Python without its imports, which only this test may do."""
    text = re.sub(r"(?m)^(import|from) .*$", "", text)
    names: dict = {}
    exec(compile(text, "base_dataset.py", "exec"), names)
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
SCALE = {"minval": -3, "maxval": 3, "candidate_labels": "happy, sad"}
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


def assert_speaks_as(text: str, prompts: PromptSet, caption: str = "image") -> None:
    """Compare what a prompt set renders with what a source says when it is run."""
    dataset = run_source(text)()
    vars(dataset).update(SCALE)
    dataset.func_random_prompts = lambda candidates: candidates
    for name, mode in MODES.items():
        for subtitle in (CLIP.subtitle, ""):
            clip = dataclasses.replace(CLIP, subtitle=subtitle)
            found = prompts.prompt(INPUT_MODES[mode], ONE_EACH, clip, "Why {so} \\?")
            assert found == dataset.get_prompt_for_multimodal(name, subtitle, "Why {so} \\?")
    for key, kind in LABEL_TYPES.items():
        more = (caption,) if key == "caption" else ()
        expected = getattr(dataset, kind.method)(SAMPLE, *more)
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


EXPECTED = {
    "roles": {"human": "##Asker: ", "assistant": " ##Answerer: ", "end": "###"},
    "inputs": {
        "multi": "Both at once: <Mix>{multi}</Mix>. ",
        "audio": "What one hears: <Ear>{audio}</Ear>. ",
        "face": "What the face does: <Eye>{face}</Eye>. ",
        "frame": "What the picture shows: <Eye>{frame}</Eye>. ",
        "image": "A still: <Pic>{image}</Pic>. ",
        "text": "Words: <Sub>{subtitle}</Sub>. ",
    },
    "questions": {
        "description": 'How does the person feel,\tand "why"?',
        "ovlabel": "Name every emotion.",
        "onehot": "Name one emotion.",
        "onehot_candidates": "Choose one of: {candidates}.",
        "sentiment": "Good, bad or neither?",
        "valence": "How good is it, on a scale? A ﬂoating-point number between {low} and {high}. "
        "Here {low} is worst, 0 neutral, and {high} best. Write the number.",
        "caption": ["What is this?", "Say what the picture shows."],
        "qa": "{question}",
        "preference": "Two texts. a1: {first} \t\t\t a2: {second} Which is better?",
    },
    "answers": {
        "description": "{description}",
        "ovlabel": "They feel {labels}.",
        "onehot": "It is {emotion}.",
        "onehot_candidates": "I choose {emotion}.",
        "sentiment": "It is {sentiment} to them.",
        "valence": "It is 100% at {valence}.",
        "caption": "{caption}",
        "qa": "{answer}",
        "preference": "Better: {preferred}.",
        "preference_same": "They're equal.",
    },
}
TASK = "Take all of it and answer. {question} ##Answerer: "


def convert(path: Path, *flags: str) -> dict:
    """The tables of the file that the command writes."""
    out = path.with_name("release.toml")
    release_prompts.main([f"--source={path}", f"--out={out}", *flags])
    return tomllib.loads(out.read_text(encoding="utf-8"))


def test_the_file_holds_the_sentences_of_the_source(write):
    tables = convert(write(source()))
    modes = tables.pop("modes")
    assert tables == EXPECTED
    assert modes.keys() == set(MODES.values())
    assert modes["audio"] == "##Asker: What one hears: <Ear>{audio}</Ear>. " + TASK
    assert modes["face_text"] == (
        "What the face does: <Eye>{face}</Eye>. Words: <Sub>{subtitle}</Sub>. " + TASK
    )
    assert modes["multi_audio_frame_text"] == (
        "##Asker: Both at once: <Mix>{multi}</Mix>. What one hears: <Ear>{audio}</Ear>. "
        "What the picture shows: <Eye>{frame}</Eye>. Words: <Sub>{subtitle}</Sub>. " + TASK
    )


@pytest.mark.parametrize("caption", ["image", "audio"])
def test_the_loaded_prompts_are_those_of_the_source_when_it_is_run(caption, write):
    path = write(source())
    convert(path, f"--caption={caption}")
    assert_speaks_as(source(), load_prompts(str(path.with_name("release.toml"))), caption)


# Whatever a Python string can hold, and much of what escapes or formats.
literal = st.lists(
    st.sampled_from(
        [*"{}\"'\\%$#\t\n\r\x7f\u2028ﬂ\U0001f600 ", "{{face}}", "\\N{DASH}", "%s", "%%"]
    )
    | st.characters(codec="utf-8"),
    max_size=4,
).map("".join)


@settings(max_examples=60)
@given(data=st.data())
def test_any_sentences_survive(data, tmp_path_factory):
    def drawn(value):
        if isinstance(value, tuple):
            return tuple(drawn(part) for part in value)
        return data.draw(literal) + value

    text = source({key: drawn(value) for key, value in SENTENCES.items()})
    path = tmp_path_factory.mktemp("any") / "base_dataset.py"
    path.write_text(text, encoding="utf-8", newline="")
    tables, notes = read_release(path)
    out = path.with_name("release.toml")
    header = release_prompts.header(path, out, "image", notes)
    out.write_text(release_prompts.to_toml(tables, header), encoding="utf-8", newline="\n")
    assert_speaks_as(text, load_prompts(str(out)))


def test_braces_that_are_text_are_written_twice(write):
    braces = {"ovlabel": "Is {this} it}?", "ovlabel answer": ("{", "}}.")}
    tables = convert(write(source(SENTENCES | braces)))
    assert tables["questions"]["ovlabel"] == "Is {{this}} it}}?"
    assert tables["answers"]["ovlabel"] == "{{{labels}}}}}."


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            """f"What one hears: <Ear><AudioHere></Ear>. \"""",
            "(\"What one \" 'hears: <Ear>' f'<AudioHere></Ear>. ')",
        ),
        ("'Name every emotion.'", '"""Name every emotion."""'),
        ("'Name every emotion.'", "'Name every ' + ('emo' + 'tion.')"),
        ("""f"They feel {sample['ovlabel']}.\"""", "'They feel %s.' % sample[\"ovlabel\"]"),
        ("""f"I choose {sample['onehot']}.\"""", "'I choose ' + sample['onehot'] + '.'"),
        (
            "'It is 100%% at %.2f.' %(sample['valence'])",
            "f\"It is 100% at {sample['valence']:.2f}.\"",
        ),
        ("%(sample['valence'])", "% (sample['valence'],)"),
        ("p in ['a1', 'a2']:", 'p in ["a1", "a2"]:'),
        ('f"Better: {p}."', "f'Better: ' + p + f'.'"),
        ('question = "Name one', "question = 'Name two'; question = \"Name one"),
        ("'question': question,\n            'answer'", "'question': question, 'answer'"),
        ("        ## from here", "        # naïve\n        ## from here"),
    ],
)
def test_other_spellings_of_the_same_strings_read_the_same(old, new, write):
    assert old in source()
    tables = read_release(write(source().replace(old, new))).tables
    assert tables == read_release(write(source())).tables


def test_the_same_source_gives_the_same_bytes(write, capsys):
    path = write(source())
    convert(path)
    first, said = path.with_name("release.toml").read_bytes(), capsys.readouterr().out
    convert(path)
    assert path.with_name("release.toml").read_bytes() == first
    assert capsys.readouterr().out == said


def test_the_file_says_what_it_was_made_from_and_how(write):
    path = write(source())
    convert(path, "--caption=audio")
    comment = path.with_name("release.toml").read_text().split("\n[")[0]
    assert f"base_dataset.py, SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()}" in comment
    assert (
        "python -m data_prep.release_prompts --source base_dataset.py --out release.toml "
        "--caption audio"
    ) in comment
    assert str(path.parent) not in comment
    assert all(line.startswith("#") for line in comment.strip().splitlines())


def line_of_change(old: str, new: str) -> int:
    """The line, from 1, on which two texts begin to differ."""
    pairs = zip(old.splitlines(), new.splitlines(), strict=False)
    return next(number for number, (a, b) in enumerate(pairs, 1) if a != b)


FACE_ONLY = 'f"##Asker: What the face does: <Eye><FaceHere></Eye>. " \\\n'
BAD = {
    # what is wrong: (text of the source, what stands there instead, what the message says, and by
    # how many lines it is off, where a name is refused only when it is used)
    "prompt from a call": (
        FACE_ONLY,
        "build('x') \\\n",
        "the branch for 'faceonly' assigns prompt from a call, expected concatenated string",
    ),
    "prompt from a number": (FACE_ONLY, "3 \\\n", "assigns prompt from 3, expected concatenated"),
    "prompt from a name": (FACE_ONLY, "head \\\n", "assigns prompt from head, expected"),
    "prompt from a choice": (
        "question = \"Name one emotion.\"",
        "question = 'Name one.' if self.short else 'Name one emotion.'",
        "func_get_qa_onehot_wo_candidates assigns question from a conditional expression",
    ),
    "prompt from bytes": ("'Name every emotion.'", "b'Name every emotion.'", "from b'Name every"),
    "strings multiplied": ("'Name every emotion.'", "2 * 'Name'", "from 2 * 'Name', expected"),
    "prompt from a format call": (
        "'Name every emotion.'",
        "'Name every {}.'.format('emotion')",
        "assigns question from a call",
    ),
    "unknown interpolation": (
        "##Asker: Words: <Sub>{subtitle}",
        "##Asker: Words: <Sub>{self.words}",
        "'textonly' assigns prompt from a string with {self.words}, for which there is no slot",
    ),
    "interpolation with a conversion": (
        "{sample['ovlabel']}", "{sample['ovlabel']!r}", "{sample['ovlabel']!r}, for which there is"
    ),
    "interpolation with a format": (
        "{sample['ovlabel']}", "{sample['ovlabel']:>9}", "{sample['ovlabel']:>9}, for which there"
    ),
    "valence with other decimals": ("%.2f", "%.3f", "{sample['valence']:.3f}, for which there is"),
    "valence without a format": ("%.2f", "%s", "a string with {sample['valence']}, for which"),
    "more % than values": ("at %.2f", "%.2f at %.2f", "whose % do not match its 1 values"),
    "question with another slot": (
        "'Name every emotion.'",
        "f\"Name {sample['onehot']}.\"",
        "the question of func_get_qa_ovlabel holds {emotion}, expected no slot",
        6,
    ),
    "answer without its slot": (
        "They feel {sample['ovlabel']}.",
        "They feel it.",
        "the answer of func_get_qa_ovlabel holds no slot, expected {labels}",
    ),
    "answer with its slot twice": (
        "It is {sample['sentiment']}", "{sample['sentiment']} {sample['sentiment']}",
        "holds {sentiment}, {sentiment}, expected {sentiment}",
    ),
    "an answer for both that names one": (
        "f'They\\'re equal.'",
        "f'They are like {p}.'",
        "the answer of func_get_qa_preference holds {preferred}, expected no slot",
        4,
    ),
    "another branch in a question": (
        "if p in ['a1', 'a2']:", "if p != 'same':", "branches on p != 'same', expected question_"
    ),
    "another branch in the prompts": (
        "elif face_or_frame == 'image'", "elif face_or_frame in ['image']", "branches on face_or_fr"
    ),
    "a modality more": (
        "elif modality == 'audio':", "elif modality == 'smell':", "branches on modality == 'smell'"
    ),
    "not a dict": (
        "return {\n            'question': sample['question']",
        "return ask(sample)\n        x = {\n            'question': sample['question']",
        "func_get_qa_direct returns a call, expected {'question': ..., 'answer': ...}",
    ),
    "another key": ("'answer':sample['desc", "'reply':sample['desc", "returns {'question': qu", -2),
    "augmented assignment": (
        "        question = 'Name every emotion.'",
        "        question += 'Name every emotion.'",
        "func_get_qa_ovlabel holds question += 'Name every emotion.', expected only assignments",
    ),
    "two names at once": ("a1 = sample['preference']['a1']", "a1, a2 = sample, 2", "holds a1, a2"),
    "a loop": ("        # several cases\n", "        while True: pass\n", "holds while True: pass"),
    "a bare return": (
        "return prompt\n", "return\n", "holds return, expected only assignments of strings"
    ),
    "half a character": ("'Name every", "'\\ud800", "has half a character (a lone surrogate)", 6),
    "a second name": (
        "self.max_length = ", "self.image_caption_prompt_candidates = ", "assigned a second time"
    ),
    "a caption question from a call": (
        "\"Say what the picture shows.\"]", "ask()]", "an entry of self.image_caption_prompt_"
    ),
    "a second end": (
        "        return target\n", "        return qa_pair['answer'] + '#'\n", "expected one"
    ),
    "a second class": (
        "        return target\n",
        "class Other:\n    def get_prompt_for_multimodal(self): pass\n",
        "a second class has a method get_prompt_for_multimodal",
    ),
    "a second method": (
        "    def func_get_qa_sentiment(",
        "    def func_get_qa_valence(",
        "BaseDataset has a second method func_get_qa_valence",
    ),
    "not Python": ("        return prompt\n", "        return = prompt\n", "not valid Python: "),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_understood_is_one_sentence_with_its_line(case, write):
    old, new, message, *off = BAD[case]
    text = source()
    assert old in text
    changed = text.replace(old, new, 1)
    with pytest.raises(ReleaseError) as caught:
        read_release(write(changed))
    said = str(caught.value)
    assert message in said
    assert "\n" not in said
    line = int(re.match(r"base_dataset.py, line (\d+): ", said)[1])
    assert line == line_of_change(text, changed) + sum(off)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("face", "<FaceHere>", "<FrameHere>", "holds {audio}, {frame}, {question}, {subtitle}"),
        (
            "face",
            "<FaceHere>",
            "",
            "holds {audio}, {question}, {subtitle}, expected {audio}, {face}",
        ),
        ("face", "<FaceHere>", "<FaceHere><FaceHere>", "holds {audio}, {face}, {face}, {question}"),
        ("image", "<ImageHere>", "<SmellHere>", "holds {question}, {smell}, expected {image}"),
        ("textonly", "{subtitle}", "{user_message}", "holds {question}, {question}, expected"),
        ("audioonly", "{user_message}", "", "holds {audio}, expected {audio}, {question}"),
        ("frame_text", " ##Answerer: ", " ##Bot: ", "ends in ' ##Bot: ' after the question, that"),
        (
            "image",
            '. " \\\n                    + f"',
            ". ",
            "the first literal of the branch for 'image'",
        ),
    ],
)
def test_a_prompt_shows_what_its_name_says(name, old, new, message, write):
    head, tail = source().split(f"face_or_frame == '{name}'")
    assert old in tail.split("face_or_frame ==")[0]
    text = f"{head}face_or_frame == '{name}'{tail.replace(old, new, 1)}"
    line = head.count("\n") + 1
    with pytest.raises(ReleaseError, match=f"line {line}: (the first literal of )?the branch for"):
        read_release(write(text))
    with pytest.raises(ReleaseError, match=re.escape(message)):
        read_release(write(text))


def without_branch(name: str) -> str:
    return re.sub(rf"(?s)        elif face_or_frame == '{name}'.*?(?=        elif)", "", source())


@pytest.mark.parametrize("name", ["audioonly", "textonly", "faceonly", "frameonly", "image"])
def test_a_prompt_that_introduces_an_input_must_be_there(name, write):
    with pytest.raises(ReleaseError, match=f"get_prompt_for_multimodal has no branch for '{name}'"):
        read_release(write(without_branch(name)))


def test_other_prompts_may_be_missing_and_are_named(write, capsys):
    tables = convert(write(without_branch("multiframe_audio_frame_text")))
    assert tables["modes"].keys() == set(MODES.values()) - {"multi_audio_frame_text"}
    assert (
        "left out: [modes].multi_audio_frame_text "
        "(the source has no branch for 'multiframe_audio_frame_text')"
    ) in capsys.readouterr().out.splitlines()


def without_method(name: str) -> str:
    return re.sub(rf"(?s)    def {name}\(.*?\n\n(?=    (def|##))", "", source())


@pytest.mark.parametrize("key", LABEL_TYPES)
def test_a_label_type_that_the_source_lacks_is_named(key, write, capsys):
    method = LABEL_TYPES[key].method
    path = write(without_method(method))
    tables = convert(path)
    assert tables["questions"].keys() == LABEL_TYPES.keys() - {key}
    assert {k.removesuffix("_same") for k in tables["answers"]} == LABEL_TYPES.keys() - {key}
    said = f"left out: the label type {key} (the source has no method {method})"
    assert said in capsys.readouterr().out.splitlines()
    assert f"# {said}" in path.with_name("release.toml").read_text().splitlines()


def test_what_has_no_place_in_a_prompt_file_is_named(write, capsys):
    text = source()
    text = text.replace(
        "        return prompt\n",
        "        elif face_or_frame == 'pose_text':\n            prompt = pose(subtitle)\n"
        "        else:\n            raise ValueError(face_or_frame)\n        return prompt\n",
    )
    text = text.replace("def func_random_prompts", "def func_get_qa_rhyme")
    text = text.replace(" + '###'", "")
    text = re.sub(r"self.image_caption_prompt_candidates = (?s:.*?)\]", "self.x = ask()", text)
    tables = convert(write(text))
    assert capsys.readouterr().out.splitlines()[1:] == [
        "left out: the else of get_prompt_for_multimodal (every input mode here has a name)",
        "left out: the prompt 'pose_text' (no input mode here shows the same)",
        "left out: [modes].audio_face (the release has no prompt for these inputs)",
        "left out: the label type caption (self.image_caption_prompt_candidates is no list in the "
        "source)",
        "left out: func_get_qa_rhyme (it is no label type here)",
        "left out: func_get_description_reward (rewards are no label type here)",
        "assumed: [roles].end = '###' (the source does not say what ends an answer)",
    ]
    assert "caption" not in {*tables["questions"], *tables["answers"]}
    assert tables["roles"]["end"] == "###"


def test_the_end_of_an_answer_is_read(write):
    tables = convert(write(source().replace("+ '###'", "+ '</end>'")))
    assert tables["roles"]["end"] == "</end>"


def test_nothing_of_the_source_is_run(tmp_path):
    marker = tmp_path / "run"
    attack = f"__import__('os').system('touch {marker}')"
    path = tmp_path / "base_dataset.py"
    text = source().replace("import config\n", f"import config\n{attack}\n")
    text = text.replace("class BaseDataset():\n", f"class BaseDataset():\n    {attack}\n")
    text = text.replace("question_only=False", f"question_only={attack}")
    path.write_text(text.replace("    def get_prompt", f"    @{attack}\n    def get_prompt"))
    done = subprocess.run(
        [sys.executable, "-m", "data_prep.release_prompts", f"--source={path}"]
        + [f"--out={tmp_path / 'release.toml'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert tomllib.loads((tmp_path / "release.toml").read_text())["questions"]["qa"] == "{question}"
    assert not marker.exists()
    # Where it would be an interpolation, it is refused.
    path.write_text(source().replace("{sample['ovlabel']}", f"{{{attack}}}".replace("'", '"')))
    with pytest.raises(ReleaseError):
        read_release(path)
    assert not marker.exists()
    # The attack works: what ran it would have been seen.
    run_source(text.split("class")[0] + "class BaseDataset: pass")
    assert marker.exists()


@settings(max_examples=150)
@given(data=st.data())
def test_a_damaged_source_gives_one_sentence_or_the_same_kind_of_file(data, tmp_path_factory):
    text = source()
    start = data.draw(st.integers(0, len(text) - 1))
    end = start + data.draw(st.integers(0, 40))
    insert = data.draw(
        st.sampled_from(["", "'", '"', "{", "}", "(", ")", "\n", " ", "#", "x", "%"])
    )
    path = tmp_path_factory.mktemp("damaged") / "base_dataset.py"
    path.write_text(text[:start] + insert + text[end:], encoding="utf-8")
    try:
        tables, _ = read_release(path)
    except ReleaseError as error:
        assert re.match(r"base_dataset.py, line \d+: [^\n]+$", str(error))
    else:
        assert tomllib.loads(release_prompts.to_toml(tables, ["x"])) == tables
        assert tables.keys() == {"modes", *EXPECTED}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "line 1: no class here has a method get_prompt_for_multimodal"),
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
    assert capsys.readouterr() == ("", "")


def test_missing_files_and_folders_are_one_sentence(write, tmp_path):
    with pytest.raises(SystemExit, match="error: .*none.py: No such file or directory"):
        convert(tmp_path / "none.py")
    path = write(source())
    with pytest.raises(SystemExit, match="error: .*none/x.toml: No such file or directory"):
        release_prompts.main([f"--source={path}", f"--out={tmp_path / 'none' / 'x.toml'}"])
    with pytest.raises(SystemExit, match="is the source; name another file"):
        release_prompts.main([f"--source={path}", f"--out={path}"])
    assert path.read_text() == source()


def test_file_names_cannot_break_out_of_the_comment(tmp_path):
    path = tmp_path / "base\n[roles]\x1b.py"
    path.write_text(source())
    out = tmp_path / "release.toml"
    release_prompts.main([f"--source={path}", f"--out={out}"])
    assert tomllib.loads(out.read_text()).keys() == {"modes", *EXPECTED}


def test_what_the_release_has_no_prompt_for_is_composed(write):
    path = write(source())
    convert(path)
    prompts = load_prompts(str(path.with_name("release.toml")))
    assert prompts.prompt(INPUT_MODES["audio_face"], ONE_EACH, CLIP, "ovlabel") == (
        "##Asker: What one hears: <Ear><AudioHere></Ear>. "
        "What the face does: <Eye><FaceHere></Eye>. Name every emotion. ##Answerer: "
    )


def test_answers_in_the_sentences_of_the_release_are_read(write):
    path = write(source())
    convert(path)
    prompts = load_prompts(str(path.with_name("release.toml")))
    assert prompts.read_labels(prompts.answer("ovlabel", CLIP)) == ["happy", "calm"]
    assert prompts.read_answer("valence", prompts.answer("valence", CLIP)) == "-1.62"


def test_every_input_mode_and_label_type_has_its_place():
    assert {*MODES.values(), "audio_face"} == INPUT_MODES.keys()
    assert LABEL_TYPES.keys() == OUR_LABEL_TYPES.keys()
