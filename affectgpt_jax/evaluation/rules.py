"""Emotion labels from descriptions by rule: the words of a lexicon, unless they are negated.

    extractor = RuleExtractor(load_lexicon())
    extractor.labels(["He is not happy but worried."])      # [["worried"]]

It needs no model and no download, and reads thousands of texts a second. It matches words and does
not know who feels what, irony, guesses ("may be"), or emotions without an emotion word. The word
lists are in `assets/rules/words.toml`.
"""

from __future__ import annotations

import functools
import re
import tomllib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from affectgpt_jax.evaluation.lexicon import WHEELS, Lexicon, load_lexicon, normalise

# Part of the identity: raise it with every change that can change labels.
RULES = 1
# The number of words that a negation reaches after it, or after the last emotion that it negated.
REACH = 6

STOPS = set(".;:!?()\n\u2014\u2026")
_ASSET = Path(__file__).parent.parent / "assets" / "rules" / "words.toml"
_LISTS = tomllib.loads(_ASSET.read_text(encoding="utf-8"))
_NEGATIONS, _CONTRASTS = set(_LISTS["negations"]), set(_LISTS["contrasts"])
_STATEMENTS, _LINKS = set(_LISTS["statements"]), set(_LISTS["links"])
_FILLERS, _PREDICATES = set(_LISTS["fillers"]), set(_LISTS["predicates"])

_TOKEN = re.compile(r"\w+(?:'\w+)*|[.,;:!?()\n\u2014\u2026]")
Words = tuple[str, ...]


def _words(text: str) -> list[str]:
    """Lower-case words and stops; a hyphen separates words."""
    return _TOKEN.findall(text.lower().replace("\u2019", "'"))


class _Phrases:
    """Finds the longest of many phrases at a position."""

    def __init__(self, phrases: dict[Words, str]):
        self._by_first: dict[str, list[tuple[Words, str]]] = defaultdict(list)
        for words, name in sorted(phrases.items(), key=lambda entry: -len(entry[0])):
            self._by_first[words[0]].append((words, name))

    @classmethod
    def of(cls, texts: Sequence[str]) -> _Phrases:
        return cls({tuple(words): text for text in texts if (words := _words(text))})

    def at(self, words: Sequence[str], place: int) -> tuple[str, int]:
        """Name and length of the longest phrase that starts here; "" and 0 if there is none."""
        for phrase, name in self._by_first.get(words[place], ()):
            if tuple(words[place : place + len(phrase)]) == phrase:
                return name, len(phrase)
        return "", 0


def _absences(be: Sequence[str], gone: Sequence[str], seen: Sequence[str]) -> list[str]:
    return (
        [f"{verb} {how}" for verb in be for how in gone]
        + [f"{verb} {no} {how}" for verb in be for no in ("not", "no longer") for how in seen]
        + [f"{verb}n't {how}" for verb in ("is", "are", "was", "were") for how in seen]
    )


_IDIOMS, _PRIVATIVES = _Phrases.of(_LISTS["idioms"]), _Phrases.of(_LISTS["privatives"])
_ABSENT = _Phrases.of(_absences(**_LISTS["absent"]))


class _Unit(NamedTuple):
    """A word or phrase and its role.

    `kind` is negation, privative, emotion, absent (after an emotion), end, comma, or, and, or word.
    """

    kind: str
    text: str


class RuleExtractor:
    """Finds the surface forms of a lexicon that a text holds and does not negate.

    Of overlapping forms, the longest counts. A negation reaches at most `REACH` words, and ends at
    the next stop, contrast ("but", "however"), new statement ("and looks") or comma; commas and
    "or" between emotions ("no fear, anger or shame") do not end it. Words that mostly mean
    something else count only as predicates ("feels down").

    Args:
        lexicon: the forms to find.
    """

    def __init__(self, lexicon: Lexicon):
        self.identity = f"rules {RULES} on the {lexicon.identity}"
        self.unparsed: dict[str, str] = {}
        ignored = set(_LISTS["not_feelings"])
        self._forms = _Phrases.of([form for form in lexicon.forms if form not in ignored])

    def labels(self, texts: Sequence[str]) -> list[list[str]]:
        """As `extract.Extractor` says."""
        return [self.in_text(text) for text in texts]

    def in_text(self, text: str) -> list[str]:
        """The emotions that one text names; those that somebody is or feels come first."""
        units = self._units(_words(text))
        found: dict[str, bool] = {}
        negated, left = False, 0
        for place, (kind, text) in enumerate(units):
            left -= 1
            if kind == "negation":
                negated, left = True, REACH + 1
            elif kind == "privative":
                negated, left = not (negated and left > 0), REACH + 1
            elif kind == "end" or (kind in ("comma", "and") and _ends(units, place)):
                negated = False
            elif kind == "emotion":
                if negated and left > 0:
                    left = REACH + 1
                elif units[place + 1 : place + 2] == [] or units[place + 1].kind != "absent":
                    found[text] = found.get(text, False) or _is_said(units[:place])
        return sorted(found, key=lambda label: not found[label])

    def _units(self, words: list[str]) -> list[_Unit]:
        units: list[_Unit] = []
        place = 0
        while place < len(words):
            unit, length = self._unit(words, place, units)
            units.append(unit)
            place += length
        return units

    def _unit(self, words: list[str], place: int, before: list[_Unit]) -> tuple[_Unit, int]:
        """The unit at a position, and its number of words."""
        word = words[place]
        form, form_length = self._forms.at(words, place)
        if length := _IDIOMS.at(words, place)[1]:
            return _Unit("word", word), length
        if form_length > 1 and form not in _PREDICATES:
            return _Unit("emotion", form), form_length
        if length := _PRIVATIVES.at(words, place)[1]:
            return _Unit("privative", word), length
        if word in _NEGATIONS or word.endswith("n't"):
            return _Unit("negation", word), 1
        if word in STOPS or word in _CONTRASTS:
            return _Unit("end", word), 1
        if word in _JOINTS:
            return _Unit(_JOINTS[word], word), 1
        meant = form not in _PREDICATES or _is_said(before) or _is_beside_an_emotion(before)
        if form and meant:
            return _Unit("emotion", form), form_length
        if before and before[-1].kind == "emotion" and (length := _ABSENT.at(words, place)[1]):
            return _Unit("absent", word), length
        return _Unit("word", word), 1

    def sentiments(self, label_lists: Sequence[Sequence[str]]) -> list[str]:
        """Positive, negative or neutral by the majority of labels; in a tie the first decides.

        Labels are looked up in the lexicon that ships, whichever lexicon found them, because the
        official wheels place "fear" under joy. Without a pleasant or unpleasant label, the
        sentiment is neutral.
        """
        polarity = _polarities()
        found = []
        for labels in label_lists:
            signs = [sign for label in labels if (sign := polarity.get(normalise(label), 0))]
            total = sum(signs) or (signs[0] if signs else 0)
            found.append("positive" if total > 0 else "negative" if total < 0 else "neutral")
        return found


_JOINTS = {",": "comma", "or": "or", "and": "and"}


def _ends(units: Sequence[_Unit], place: int) -> bool:
    """Whether a comma or an "and" ends the reach of a negation before it."""
    after = units[place + 1 :]
    if units[place].kind == "and":
        return bool(after) and after[0].text in _STATEMENTS
    if place == 0 or units[place - 1].kind != "emotion":
        return True
    for unit, following in zip(after, after[1:]):
        if unit.kind == "or" and following.kind == "emotion":
            return False
        if unit.kind not in ("comma", "emotion"):
            break
    return True


def _is_said(before: Sequence[_Unit]) -> bool:
    """Whether the next word is a predicate: it follows a link, alone or with other emotions."""
    for unit in reversed(before):
        if unit.text in _LINKS:
            return True
        if unit.text not in _FILLERS and unit.kind not in ("comma", "and", "or", "emotion"):
            return False
    return False


def _is_beside_an_emotion(before: Sequence[_Unit]) -> bool:
    joint = bool(before) and before[-1].kind in ("comma", "and", "or")
    return joint and len(before) > 1 and before[-2].kind == "emotion"


@functools.cache
def _polarities() -> dict[str, int]:
    """1 for the pleasant and -1 for the unpleasant forms of the shipped lexicon.

    Two wheels must agree, because one of them places surprise under power.
    """
    lexicon = load_lexicon()
    sign_of = dict.fromkeys(_LISTS["sentiment"]["pleasant"], 1)
    sign_of |= dict.fromkeys(_LISTS["sentiment"]["unpleasant"], -1)
    signs = np.zeros(len(lexicon.forms), int)
    for wheel in range(WHEELS):
        of_label = [sign_of.get(label, 0) for label in lexicon.labels[0][wheel]]
        # The last one is of forms that the wheel does not have, whose label is -1.
        signs += np.asarray([*of_label, 0])[lexicon.table[0, wheel, :-1]]
    signs = np.sign(signs) * (np.abs(signs) > 1)
    return {form: int(sign) for form, sign in zip(lexicon.forms, signs, strict=True) if sign}
