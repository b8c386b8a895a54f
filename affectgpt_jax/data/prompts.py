"""Prompts and answers as text: what a clip's inputs, question and target look like.

Templates live in a TOML file (format: `assets/prompts/default.toml`); the code knows only slots.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

# Soft-token slots and the placeholder that stands for one soft token of each in the text.
PLACEHOLDERS = {
    "multi": "<MultiHere>",
    "audio": "<AudioHere>",
    "face": "<FaceHere>",
    "frame": "<FrameHere>",
    "image": "<ImageHere>",
}
# The order in which the release adds them to the tokenizer, which fixes their ids.
PLACEHOLDER_ORDER = ("<ImageHere>", "<AudioHere>", "<FrameHere>", "<FaceHere>", "<MultiHere>")

# In a clip's own texts these would be taken for soft tokens, or for the start or end of a turn.
_RESERVED = (*PLACEHOLDER_ORDER, "<|im_start|>", "<|im_end|>", "<|endoftext|>")
_SETS = ("default", "compact")
_INPUTS = (*PLACEHOLDERS, "text")


class PromptError(ValueError):
    """A prompt file that cannot be used, or a clip that does not fit its templates."""


@dataclasses.dataclass(frozen=True)
class InputMode:
    """What a model sees of a clip.

    Attributes:
        slots: soft-token slots, in prompt order.
        text: whether the subtitle is part of the prompt.
        multi_video: the visual feature that the pre-fusion reads, "face" or "frame".
    """

    slots: tuple[str, ...]
    text: bool
    multi_video: str = "face"

    def without(self, slot: str) -> InputMode:
        return dataclasses.replace(self, slots=tuple(s for s in self.slots if s != slot))


INPUT_MODES = {
    "multi_audio_face_text": InputMode(("multi", "audio", "face"), True),
    "audio_face": InputMode(("audio", "face"), False),
    "audio_text": InputMode(("audio",), True),
    "face_text": InputMode(("face",), True),
    "frame_text": InputMode(("frame",), True),
    "audio": InputMode(("audio",), False),
    "face": InputMode(("face",), False),
    "frame": InputMode(("frame",), False),
    "text": InputMode((), True),
}
LABEL_TYPES = ("description", "ovlabel")
_ANSWER_SLOTS = {"description": "description", "ovlabel": "labels"}


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Templates of one prompt file; see `assets/prompts/default.toml` for their meaning."""

    source: str
    human: str
    assistant: str
    end: str
    inputs: Mapping[str, str]
    questions: Mapping[str, str]
    answers: Mapping[str, str]

    def prompt(
        self, mode: InputMode, token_counts: Mapping[str, int], subtitle: str, question: str
    ) -> str:
        """Render everything before the answer; it ends in a space, which keeps its own token.

        Args:
            mode: the input mode.
            token_counts: soft tokens per slot; a slot becomes that many placeholders.
            subtitle: may be empty, then the subtitle line is left out.
            question: a label type of `questions`, or the text of any question.

        Raises:
            PromptError: the subtitle holds a placeholder or chat token.
        """
        _refuse_reserved("subtitle", subtitle, _RESERVED)
        parts = [self.human]
        for slot in mode.slots:
            soft = PLACEHOLDERS[slot] * token_counts[slot]
            parts.append(self.inputs[slot].replace("{" + slot + "}", soft))
        if mode.text and subtitle:
            parts.append(self.inputs["text"].replace("{subtitle}", subtitle))
        parts.append(self.questions.get(question, question))
        parts.append(self.assistant)
        return "".join(parts)

    def answer(self, label_type: str, *, description: str = "", labels: tuple[str, ...] = ()):
        """Render the target of a label type, `end` included.

        An empty label list reads "neutral", as in the published recipe.

        Raises:
            PromptError: an empty description, for which there is nothing to learn, or a text that
                holds a placeholder, a chat token or `end`, where generation would stop.
        """
        if label_type == "description" and not description:
            raise PromptError("the clip has no description; train it with --config.label=ovlabel")
        slot = _ANSWER_SLOTS[label_type]
        text = description if slot == "description" else ", ".join(labels) or "neutral"
        _refuse_reserved(slot, text, (*_RESERVED, self.end))
        return self.answers[label_type].replace("{" + slot + "}", text) + self.end

    def read_labels(self, text: str) -> list[str]:
        """The labels of a generated label answer, lower-case, in order, without repeats.

        The frame sentence is taken off where it is there; whatever else was written is split at
        commas, so that an answer in another form is still scored as what it says.
        """
        head, tail = self.answers["ovlabel"].split("{labels}")
        body = text.split(self.end)[0].strip()
        if body.startswith(head.strip()):
            body = body[len(head.strip()) :]
        body = body.strip().removesuffix(tail.strip())
        labels = (part.strip(" \t\n.[]'\"").lower() for part in re.split(r"[,\n;]", body))
        return list(dict.fromkeys(label for label in labels if label))


def load_prompts(name: str) -> PromptSet:
    """Load a prompt set by built-in name ("default", "compact") or file path.

    Raises:
        PromptError: no such file, not TOML, a missing or unknown section or key, a template that
            lacks its slot or names an unknown one; the message names file and key.
    """
    if name in _SETS:
        resource = (
            importlib.resources.files("affectgpt_jax") / "assets" / "prompts" / f"{name}.toml"
        )
        text, source = resource.read_bytes(), f"{name}.toml"
    else:
        path = Path(name).expanduser()
        if not path.is_file():
            raise PromptError(
                f"prompts: {name!r} is neither a file nor one of the built-in sets {_SETS}"
            )
        text, source = path.read_bytes(), str(path)
    try:
        data = tomllib.loads(text.decode("utf-8"))
    except ValueError as error:  # of either; it says which
        raise PromptError(f"{source}: not valid TOML: {error}") from None
    expected = {
        "roles": {"human": (), "assistant": (), "end": ()},
        "inputs": {key: ("subtitle" if key == "text" else key,) for key in _INPUTS},
        "questions": dict.fromkeys(LABEL_TYPES, ()),
        "answers": {key: (slot,) for key, slot in _ANSWER_SLOTS.items()},
    }
    _check_keys(source, "the file", data, expected)
    for section, keys in expected.items():
        _check_keys(source, f"[{section}]", data[section], keys)
        for key, slots in keys.items():
            _check_template(source, f"[{section}].{key}", data[section][key], slots)
    if not data["roles"]["end"]:
        raise PromptError(f"{source}: [roles].end is empty; generation needs a mark to stop at")
    return PromptSet(
        source,
        **data["roles"],
        inputs=data["inputs"],
        questions=data["questions"],
        answers=data["answers"],
    )


def _check_keys(source: str, where: str, found: object, expected: Mapping[str, object]) -> None:
    if not isinstance(found, dict):
        raise PromptError(f"{source}: {where} must be a table with the keys {sorted(expected)}")
    for key in expected:
        if key not in found:
            raise PromptError(f"{source}: {where} lacks {key!r}; expected {sorted(expected)}")
    for key in found:
        if key not in expected:
            raise PromptError(f"{source}: {where} has the unknown key {key!r}")


def _check_template(source: str, where: str, template: object, slots: tuple[str, ...]) -> None:
    if not isinstance(template, str):
        raise PromptError(f"{source}: {where} must be a string, found {template!r}")
    named = re.findall(r"{([^{}]*)}", template)
    for name in named:
        if name not in slots:
            raise PromptError(
                f"{source}: {where} names the unknown slot {{{name}}}; it may name {list(slots)}"
            )
    if tuple(named) != slots:
        raise PromptError(f"{source}: {where} must hold the slot {{{slots[0]}}} exactly once")


def _refuse_reserved(what: str, text: str, reserved: tuple[str, ...]) -> None:
    for part in reserved:
        if part in text:
            raise PromptError(f"the {what} holds the reserved text {part}; remove it")
