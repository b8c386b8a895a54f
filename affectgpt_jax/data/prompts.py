"""Prompts and answers as text: what a clip's inputs, question and target look like.

Templates live in a TOML file (format: `assets/prompts/default.toml`); the code knows only slots,
input modes (which inputs a prompt has) and label types (which question is asked, and what answers
it).
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.resources
import re
import string
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from affectgpt_jax.common.errors import UserError
from affectgpt_jax.common.files import read_bytes
from affectgpt_jax.common.identity import Identity, json_sha256
from affectgpt_jax.common.labels import read_labels
from affectgpt_jax.common.toml import MAX_BYTES, parse_toml
from affectgpt_jax.data.modalities import INPUT_MODES, MODALITIES, InputMode, placeholders
from affectgpt_jax.data.records import Annotations

# Prompt sets that ship; any other is a file.
BUILT_IN = ("default", "compact")


class PromptError(UserError, ValueError):
    """A prompt file that cannot be used, or a clip that does not fit its templates."""


# --- label types --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LabelType:
    """A kind of question and its answer.

    Attributes:
        slot: the slot of the answer's template.
        text: what a clip fills it with; raises PromptError where the clip has nothing.
        asks: slots that the question's template must have.
        may_ask: slots that it may have.
    """

    slot: str
    text: Callable[[Annotations], str]
    asks: tuple[str, ...] = ()
    may_ask: tuple[str, ...] = ()


def _field(name: str) -> Callable[[Annotations], str]:
    def text(clip: Annotations) -> str:
        value = getattr(clip, name)
        if value in ("", None):
            raise PromptError(f"it has no {name}; give it one, or choose another config.label")
        return value

    return text


def sentiment(valence: float) -> str:
    """The sentiment word of a valence, by its sign."""
    return "positive" if valence > 0 else "negative" if valence < 0 else "neutral"


_valence = _field("valence")
LABEL_TYPES = {
    "description": LabelType("description", _field("description")),
    # An empty list reads "neutral", as in the published recipe.
    "ovlabel": LabelType("labels", lambda clip: ", ".join(clip.labels) or "neutral"),
    "onehot": LabelType("emotion", _field("emotion")),
    "onehot_candidates": LabelType("emotion", _field("emotion"), asks=("candidates",)),
    "sentiment": LabelType("sentiment", lambda clip: sentiment(_valence(clip))),
    "valence": LabelType("valence", lambda clip: f"{_valence(clip):.2f}", may_ask=("low", "high")),
    "caption": LabelType("caption", _field("caption")),
    "qa": LabelType("answer", _field("answer"), asks=("question",)),
    "preference": LabelType("preferred", _field("preferred"), asks=("first", "second")),
}


def _asked_values(clip: Annotations) -> dict[str, str]:
    """What a clip fills the slots of questions with."""
    return {
        "candidates": ", ".join(clip.candidates),
        "question": clip.question,
        **dict(zip(("low", "high"), (f"{bound:g}" for bound in clip.valence_range))),
        **dict(zip(("first", "second"), clip.alternatives)),
    }


# The answer where both alternatives are equally good: a template without slots.
_SAME = "preference_same"
_HYBRID = ("description", "ovlabel")


def parse_label(label: str) -> tuple[str, ...]:
    """The label types of a `config.label`: one name, several joined by "+", or "hybrid".

    Raises:
        PromptError: an unknown or repeated name.
    """
    types = _HYBRID if label == "hybrid" else tuple(label.split("+"))
    if unknown := [name for name in types if name not in LABEL_TYPES]:
        raise PromptError(
            f"label {label!r}: {unknown[0]!r} is not a label type; expected 'hybrid', or some of "
            f"{', '.join(LABEL_TYPES)} joined by '+'"
        )
    if len(set(types)) < len(types):
        raise PromptError(f"label {label!r} names a type twice; name each once")
    return types


# --- templates ----------------------------------------------------------------------------------


class Template:
    """Text with slots in braces, as `str.format` reads it: `{{` and `}}` are braces.

    Attributes:
        slots: names of the slots, in order.

    Raises:
        ValueError: an unbalanced brace, or a slot that is not a plain name.
    """

    def __init__(self, text: str):
        self._parts: list[tuple[str, str | None]] = []
        for literal, slot, spec, conversion in string.Formatter().parse(text):
            if slot is not None and (spec or conversion or not re.fullmatch(r"[a-z_]+", slot)):
                raise ValueError(f"{{{slot}}} is not a slot; a brace that is text is written twice")
            self._parts.append((literal, slot))
        self.slots = tuple(slot for _, slot in self._parts if slot is not None)

    def render(self, values: Mapping[str, str]) -> str:
        """The text with every slot filled; a value is never searched for slots."""
        return "".join(
            literal + ("" if slot is None else values[slot]) for literal, slot in self._parts
        )

    def around(self, slot: str) -> tuple[str, str]:
        """The text before and after `slot`, for a template without any other."""
        before, after = self.render({slot: "\0"}).split("\0")
        return before, after


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Templates of one prompt file; see `assets/prompts/default.toml` for their meaning.

    Attributes:
        source: the file, for messages.
        human, assistant, end: role marks and the end of an answer.
        inputs: by `Modality.prompt_slot`, and "text" for the subtitle.
        questions: by label type; a clip takes one of several by a hash of its name.
        answers: by label type, and `preference_same`.
        modes: whole prompts by input mode, for modes that are not composed from `inputs`.
        identity: of the templates; comments and the order of keys do not matter.
    """

    source: str
    human: str
    assistant: str
    end: str
    inputs: Mapping[str, Template]
    questions: Mapping[str, tuple[Template, ...]]
    answers: Mapping[str, Template]
    modes: Mapping[str, Template]
    identity: Identity

    def prompt(
        self, mode: InputMode, token_counts: Mapping[str, int], clip: Annotations, question: str
    ) -> str:
        """Render everything before the answer; it ends in a space, which keeps its own token.

        Args:
            mode: the input mode.
            token_counts: soft tokens per slot; a slot becomes that many placeholders.
            clip: whose subtitle is shown; the subtitle line is left out where it is empty.
            question: a label type, or the text of any question.

        Raises:
            PromptError: the subtitle or the question holds a placeholder or chat token, the clip
                lacks what its question needs, or this prompt set has no such question.
        """
        reserved = _reserved()
        _refuse_reserved("subtitle", clip.subtitle, reserved)
        asked = self.question(question, clip) if question in LABEL_TYPES else question
        _refuse_reserved("question", asked, reserved)
        shown = [MODALITIES[slot] for slot in mode.slots]
        soft = {m.prompt_slot: m.placeholder * token_counts[m.name] for m in shown}
        if mode.name in self.modes:
            values = {**soft, "subtitle": clip.subtitle, "question": asked}
            return self.modes[mode.name].render(values)
        parts = [self.inputs[slot].render({slot: tokens}) for slot, tokens in soft.items()]
        if mode.text and clip.subtitle:
            parts.append(self.inputs["text"].render({"subtitle": clip.subtitle}))
        return "".join([self.human, *parts, asked, self.assistant])

    def question(self, label_type: str, clip: Annotations) -> str:
        """Render the question of a label type.

        Raises:
            PromptError: as for `prompt`.
        """
        if label_type not in self.questions:
            raise PromptError(
                f"{self.source} has no [questions].{label_type}, which label type {label_type!r} "
                "needs; add it, or choose another config.label or config.prompts"
            )
        variants = self.questions[label_type]
        digest = hashlib.sha256(clip.name.encode("utf-8")).digest()
        template = variants[int.from_bytes(digest[:8], "little") % len(variants)]
        values = _asked_values(clip)
        if missing := [slot for slot in template.slots if not values.get(slot)]:
            raise PromptError(
                f"it has nothing for the slot {{{missing[0]}}} of {self.source}, "
                f"[questions].{label_type}; give it that, or choose another config.label"
            )
        return template.render(values)

    def answer(self, label_type: str, clip: Annotations) -> str:
        """Render the target of a label type, `end` included.

        Raises:
            PromptError: the clip lacks what the label type teaches, or one of its texts holds a
                placeholder, a chat token or `end`, where generation would stop.
        """
        kind = LABEL_TYPES[label_type]
        text = kind.text(clip)
        _refuse_reserved(kind.slot, text, (*_reserved(), self.end))
        name = _SAME if label_type == "preference" and text == "same" else label_type
        if name not in self.answers:
            raise PromptError(f"{self.source} has no [answers].{name}; add it")
        return self.answers[name].render({kind.slot: text}) + self.end

    def read_answer(self, label_type: str, text: str) -> str:
        """What a generated answer of a label type says: its text without the frame sentence.

        The frame is taken off where it is there; an answer in another form is given back as it is.
        """
        head, tail = self.answers[label_type].around(LABEL_TYPES[label_type].slot)
        body = text.split(self.end)[0].strip()
        if label_type == "preference" and body == self.answers[_SAME].render({}).strip():
            return "same"
        if body.startswith(head.strip()):
            body = body[len(head.strip()) :]
        return body.strip().removesuffix(tail.strip()).strip()

    def read_labels(self, text: str, label_type: str = "ovlabel") -> list[str]:
        """The labels of a generated answer, lower-case, in order, without repeats.

        Whatever was written inside the frame sentence, or instead of it, is read as a list
        (`common.labels`), so that an answer in another form is still scored as what it says.
        """
        return list(dict.fromkeys(self.written_labels(text, label_type)))

    def written_labels(self, text: str, label_type: str = "ovlabel") -> list[str]:
        """The same with repeats."""
        return read_labels(self.read_answer(label_type, text))

    def write_labels(self, labels: Iterable[str], label_type: str = "ovlabel") -> str:
        """An answer with these labels, in the form that was taught, without its end mark."""
        slot = LABEL_TYPES[label_type].slot
        return self.answers[label_type].render({slot: ", ".join(labels)})

    def is_framed(self, text: str, label_type: str) -> bool:
        """Whether an answer has the form that was taught; its end mark is not looked at."""
        head, tail = self.answers[label_type].around(LABEL_TYPES[label_type].slot)
        body = text.split(self.end)[0].strip()
        long_enough = len(body) > len(head.strip()) + len(tail.strip())
        return long_enough and body.startswith(head.strip()) and body.endswith(tail.strip())


# --- prompt files -------------------------------------------------------------------------------


def load_prompts(name: str) -> PromptSet:
    """Load a prompt set by built-in name ("default", "compact") or file path.

    Raises:
        PromptError: no such file, not TOML, a missing or unknown section or key, a template that
            lacks its slot or names an unknown one; the message names file and key.
    """
    if name in BUILT_IN:
        resource = (
            importlib.resources.files("affectgpt_jax") / "assets" / "prompts" / f"{name}.toml"
        )
        text, source = resource.read_bytes(), f"{name}.toml"
    else:
        path = Path(name).expanduser()
        if not path.is_file():
            raise PromptError(
                f"prompts: {name!r} is neither a file nor one of the built-in sets {BUILT_IN}"
            )
        text, source = read_bytes(path, MAX_BYTES, PromptError), str(path)
    return parse_prompts(parse_toml(text, source, error=PromptError), source)


def parse_prompts(tables: dict[str, object], source: str) -> PromptSet:
    """Check the tables of a prompt file, and make a prompt set of them.

    Args:
        tables: as TOML gives them.
        source: the file, for messages.

    Raises:
        PromptError: a missing or unknown section or key, or a template that lacks its slot or
            names an unknown one.
    """
    return _Reader(source).prompt_set(tables)


class _Reader:
    """Reads the tables of one file; every complaint names it."""

    def __init__(self, source: str):
        self._source = source

    def prompt_set(self, data: dict[str, object]) -> PromptSet:
        sections = {"roles": True, "inputs": True, "questions": True, "answers": True}
        self._keys("the file", data, sections | {"modes": False})
        roles = {
            key: self._template(f"[roles].{key}", value).render({})
            for key, value in self._table(data, "roles", ("human", "assistant", "end")).items()
        }
        if not roles["end"]:
            raise self._error("[roles].end is empty; generation needs a mark to stop at")
        slots = {m.prompt_slot: m.prompt_slot for m in MODALITIES.values()} | {"text": "subtitle"}
        inputs = {
            key: self._template(f"[inputs].{key}", value, once=(slots[key],))
            for key, value in self._table(data, "inputs", slots).items()
        }
        # A file need not have every label type; asking for one that it lacks is an error then.
        questions = {
            key: self._variants(key, value)
            for key, value in self._table(data, "questions", optional=LABEL_TYPES).items()
        }
        fills = {key: (kind.slot,) for key, kind in LABEL_TYPES.items()} | {_SAME: ()}
        answers = {
            key: self._template(f"[answers].{key}", value, once=fills[key])
            for key, value in self._table(data, "answers", optional=fills).items()
        }
        for key in LABEL_TYPES:
            if (key in questions) != (key in answers):
                raise self._error(f"{key!r} must stand in [questions] and in [answers], or in none")
        modes = {
            key: self._mode(INPUT_MODES[key], value)
            for key, value in self._table(data, "modes", optional=INPUT_MODES).items()
        }
        return PromptSet(
            self._source,
            **roles,
            inputs=inputs,
            questions=questions,
            answers=answers,
            modes=modes,
            identity=Identity(self._source, json_sha256(data)),
        )

    def _mode(self, mode: InputMode, value: object) -> Template:
        slots = [MODALITIES[slot].prompt_slot for slot in mode.slots]
        once = (*slots, *(["subtitle"] if mode.text else []), "question")
        return self._template(f"[modes].{mode.name}", value, once=once)

    def _variants(self, label_type: str, value: object) -> tuple[Template, ...]:
        kind, where = LABEL_TYPES[label_type], f"[questions].{label_type}"
        variants = value if isinstance(value, list) else [value]
        if not variants:
            raise self._error(f"{where} is an empty list; give at least one question")
        return tuple(
            self._template(where, one, some=kind.asks, optional=kind.may_ask) for one in variants
        )

    def _template(
        self,
        where: str,
        value: object,
        *,
        once: tuple[str, ...] = (),
        some: tuple[str, ...] = (),
        optional: tuple[str, ...] = (),
    ) -> Template:
        """A template that holds each slot of `once` once, those of `some` once or more."""
        if not isinstance(value, str):
            raise self._error(f"{where} must be a string, found {value!r}")
        try:
            template = Template(value)
        except ValueError as error:
            raise self._error(f"{where}: {error}") from None
        known = (*once, *some, *optional)
        for slot in template.slots:
            if slot not in known:
                raise self._error(
                    f"{where} names the unknown slot {{{slot}}}; it may name {list(known)}"
                )
        for slot in once:
            if template.slots.count(slot) != 1:
                raise self._error(f"{where} must hold the slot {{{slot}}} exactly once")
        for slot in some:
            if slot not in template.slots:
                raise self._error(f"{where} must hold the slot {{{slot}}}")
        return template

    def _table(
        self, data: dict, section: str, needed: Iterable[str] = (), optional: Iterable[str] = ()
    ) -> dict[str, object]:
        known = {**dict.fromkeys(optional, False), **dict.fromkeys(needed, True)}
        table = data.get(section, {})
        self._keys(f"[{section}]", table, known)
        return table

    def _keys(self, where: str, found: object, known: Mapping[str, bool]) -> None:
        """Checks a table's keys; `known` says of each whether it must be there."""
        if not isinstance(found, dict):
            raise self._error(f"{where} must be a table with the keys {sorted(known)}")
        for key, needed in known.items():
            if needed and key not in found:
                raise self._error(f"{where} lacks {key!r}; expected {sorted(known)}")
        for key in found:
            if key not in known:
                raise self._error(f"{where} has the unknown key {key!r}; expected {sorted(known)}")

    def _error(self, message: str) -> PromptError:
        return PromptError(f"{self._source}: {message}")


def _reserved() -> tuple[str, ...]:
    """Texts that a clip may not contain, because they would be read as soft or chat tokens."""
    return (*placeholders(), "<|im_start|>", "<|im_end|>", "<|endoftext|>")


def _refuse_reserved(what: str, text: str, reserved: tuple[str, ...]) -> None:
    for part in reserved:
        if part in text:
            raise PromptError(f"the {what} holds the reserved text {part}; remove it")
