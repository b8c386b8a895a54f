"""Build the emotion lexicon that ships: `python -m data_prep.lexicon`.

Five wheels from published taxonomies (`taxonomies.toml`), joined by families of words
(`emotion_words.toml`), which WordNet 3.0 widens: synonyms from synsets of feeling and satellites of
such adjectives, other forms from derivationally related words, participles and pertainyms. Needs
WordNet's database files (Debian: `apt install wordnet-base`; elsewhere the `dict` directory of
https://wordnet.princeton.edu), and only here: what it writes is shipped.

Writes `lexicon.json`, `wheels.csv`, `synonyms.csv` and `forms.csv` in the neutral format of
`affectgpt_jax.evaluation.lexicon`, and `NOTICE`. The same input gives the same bytes.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import importlib.resources
import io
import itertools
import json
import os
import re
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from affectgpt_jax import cli
from affectgpt_jax.common.errors import UserError
from affectgpt_jax.common.files import write_text
from affectgpt_jax.common.text import print_lines

HERE = Path(__file__).parent
ASSET = Path(str(importlib.resources.files("affectgpt_jax") / "assets" / "lexicon"))
TAXONOMIES, FAMILIES = HERE / "taxonomies.toml", HERE / "emotion_words.toml"
VERSION = "1"

# WordNet's lexicographer files (lexnames(5WN)).
ATTRIBUTE, FEELING, STATE, BODY, COGNITION, COMMUNICATION, EMOTION = 7, 12, 26, 29, 31, 32, 37
NOUN_FORMS = {ATTRIBUTE, FEELING, STATE}
SEED_VERBS = {BODY, COGNITION, COMMUNICATION}
PARTS = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
LONGEST_PHRASE = 3

WORDNET_LICENCE = """\
This software and database is being provided to you, the LICENSEE, by
Princeton University under the following license.  By obtaining, using
and/or copying this software and database, you agree that you have
read, understood, and will comply with these terms and conditions.:

Permission to use, copy, modify and distribute this software and
database and its documentation for any purpose and without fee or
royalty is hereby granted, provided that you agree to comply with
the following copyright notice and statements, including the disclaimer,
and that the same appear on ALL copies of the software, database and
documentation, including modifications that you make for internal
use or for distribution.

WordNet 3.0 Copyright 2006 by Princeton University.  All rights reserved.

THIS SOFTWARE AND DATABASE IS PROVIDED "AS IS" AND PRINCETON
UNIVERSITY MAKES NO REPRESENTATIONS OR WARRANTIES, EXPRESS OR
IMPLIED.  BY WAY OF EXAMPLE, BUT NOT LIMITATION, PRINCETON
UNIVERSITY MAKES NO REPRESENTATIONS OR WARRANTIES OF MERCHANT-
ABILITY OR FITNESS FOR ANY PARTICULAR PURPOSE OR THAT THE USE
OF THE LICENSED SOFTWARE, DATABASE OR DOCUMENTATION WILL NOT
INFRINGE ANY THIRD PARTY PATENTS, COPYRIGHTS, TRADEMARKS OR
OTHER RIGHTS.

The name of Princeton University or Princeton may not be used in
advertising or publicity pertaining to distribution of the software
and/or database.  Title to copyright in this software, database and
any associated documentation shall at all times remain with
Princeton University and LICENSEE agrees to preserve same.
"""

Key = tuple[str, str]
Rows = list[tuple[str, str, str]]


class Pointer(NamedTuple):
    """A relation to another synset; source and target are word numbers, 0 for the whole synset."""

    symbol: str
    key: Key
    source: int
    target: int


class Synset(NamedTuple):
    """A line of a data file, with the words' case kept ("_" between the words of a phrase)."""

    part: str
    lexfile: int
    words: tuple[str, ...]
    pointers: tuple[Pointer, ...]


@dataclasses.dataclass(frozen=True)
class WordNet:
    """WordNet's synsets by (part of speech, offset), by word, and irregular inflections.

    Attributes:
        senses: keys of the synsets of a lower-case word, by part of speech, the most used first.
        adverbs: adverbs of an adjective, in order.
        exceptions: by part of speech: lemma -> irregular inflections.
    """

    synsets: dict[Key, Synset]
    senses: dict[str, dict[str, list[Key]]]
    adverbs: dict[str, list[str]]
    exceptions: dict[str, dict[str, list[str]]]


class Family(NamedTuple):
    """Words of about the same meaning.

    Attributes:
        valence: the table it stands in.
        on: the wheel word it stands for, for each wheel; "" for none.
        words: the seeds.
    """

    name: str
    valence: str
    on: tuple[str, ...]
    words: tuple[str, ...]


class Base(NamedTuple):
    """The family and the base word that a surface form belongs to."""

    family: Family
    word: str


def read_wordnet(directory: Path) -> WordNet:
    """Read WordNet's database; the format is that of wndb(5WN).

    Raises:
        UserError: the files are not there.
    """
    synsets: dict[Key, Synset] = {}
    senses: defaultdict[str, dict[str, list[Key]]] = defaultdict(dict)
    exceptions: dict[str, dict[str, list[str]]] = {}
    try:
        for part, name in PARTS.items():
            for line in _lines(directory / f"data.{name}"):
                offset, synset = _parse(part, line)
                synsets[part, offset] = synset
            for line in _lines(directory / f"index.{name}"):
                lemma, _, count, *more = line.split()
                senses[lemma][part] = [(part, offset) for offset in more[-int(count) :]]
            exceptions[part] = defaultdict(list)
            for line in _lines(directory / f"{name}.exc"):
                form, *lemmas = line.split()
                for lemma in lemmas:
                    exceptions[part][lemma].append(form)
    except FileNotFoundError as error:
        raise UserError(
            f"{error.filename} is missing; expected WordNet 3.0's database there (Debian: "
            "apt install wordnet-base, else --wordnet DIR)"
        ) from None
    adverbs: defaultdict[str, list[str]] = defaultdict(list)
    for synset in synsets.values():
        for pointer in synset.pointers:
            if synset.part == "r" and pointer.symbol == "\\":
                adjective = synsets[pointer.key].words[pointer.target - 1]
                adverbs[adjective].append(synset.words[pointer.source - 1])
    return WordNet(synsets, senses, adverbs, exceptions)


def _lines(path: Path) -> Iterator[str]:
    """Lines of a database file without its licence, which is indented."""
    with path.open(encoding="ascii") as file:
        yield from (line for line in file if not line.startswith("  "))


def _parse(part: str, line: str) -> tuple[str, Synset]:
    fields = iter(line.split(" | ")[0].split())
    offset, lexfile, _, count = (next(fields) for _ in range(4))
    words = []
    for _ in range(int(count, 16)):
        # An adjective may say where it stands: "afraid(p)".
        words.append(next(fields).partition("(")[0])
        next(fields)
    pointers = []
    for _ in range(int(next(fields))):
        symbol, at, of, ends = (next(fields) for _ in range(4))
        of = "a" if of == "s" else of
        pointers.append(Pointer(symbol, (of, at), int(ends[:2], 16), int(ends[2:], 16)))
    return offset, Synset(part, int(lexfile), tuple(words), tuple(pointers))


def is_feeling(wordnet: WordNet, synset: Synset) -> bool:
    """Whether a synset is of feelings: a noun or verb filed so, or an adjective related to one."""
    if synset.part in "nv":
        return synset.lexfile in (FEELING, EMOTION)
    related = [wordnet.synsets[p.key] for p in synset.pointers if p.symbol in "+=<"]
    return any(other.lexfile in (FEELING, EMOTION) for other in related)


def senses(wordnet: WordNet, word: str) -> list[Key]:
    """Keys of all synsets of a word."""
    return [key for keys in wordnet.senses.get(word, {}).values() for key in keys]


def first_sense(wordnet: WordNet, word: str, part: str) -> Synset | None:
    """The most frequent sense of a word as a part of speech; None without one."""
    keys = wordnet.senses.get(word, {}).get(part)
    return wordnet.synsets[keys[0]] if keys else None


def synonyms(wordnet: WordNet, word: str) -> Iterator[str]:
    """Words that share a synset of feeling with `word`, or are satellites of its adjective.

    Only such whose most frequent meaning this is: "blue" and "kick" mean too much else.
    """
    for key in senses(wordnet, word):
        synset = wordnet.synsets[key]
        if not is_feeling(wordnet, synset):
            continue
        near = [wordnet.synsets[p.key] for p in synset.pointers if p.symbol == "&"]
        # Satellites that have no relation to a feeling ("halcyon", of "happy") are of things.
        for other in [synset, *(satellite for satellite in near if is_feeling(wordnet, satellite))]:
            yield from (w for w in other.words if first_sense(wordnet, w, other.part) is other)


def other_forms(wordnet: WordNet, word: str) -> Iterator[str]:
    """Nouns, verbs, adjectives and adverbs of the same stem."""
    for key in senses(wordnet, word):
        synset = wordnet.synsets[key]
        # An adjective's noun in -ness and its adverb mean what it means, whatever that is.
        if synset.part != "a" and not is_feeling(wordnet, synset):
            continue
        for pointer in synset.pointers:
            if pointer.symbol not in ("+", "<") or not pointer.source:
                continue
            if synset.words[pointer.source - 1].lower() != word:
                continue
            other = wordnet.synsets[pointer.key]
            found = other.words[pointer.target - 1]
            kind = other.part == "a" or other.lexfile in (NOUN_FORMS | {EMOTION})
            if kind and _same_stem(word, found):
                yield found
    yield from (found for found in wordnet.adverbs.get(word, ()) if _same_stem(word, found))


def _same_stem(a: str, b: str) -> bool:
    # WordNet's relations cross stems ("cheerfully" of "upbeat"), which synonyms are for. Four
    # letters are shared, or all but the last of a shorter word ("envy" and "envious").
    return len(os.path.commonprefix([a, b.lower()])) >= min(4, len(a) - 1, len(b) - 1)


def inflections(word: str, part: str, exceptions: Mapping[str, Sequence[str]]) -> list[str]:
    """Regular inflections by rule, irregular ones (and doubled consonants) from WordNet.

    Nouns: the plural. Verbs: -s, -ed, -ing. Adjectives of one syllable, or of two and in -y, and
    those with exceptions: comparative and superlative. Phrases have none.
    """
    irregular = list(exceptions.get(word, ()))
    if "_" in word or "-" in word or part == "r":
        return irregular
    stem = re.sub(r"(?<=[^aeiou])y$", "i", word)
    plural = f"{stem}es" if stem != word or re.search(r"(s|x|z|ch|sh)$", word) else f"{word}s"
    silent = re.sub(r"(?<=[^aeo])e$", "", word)
    syllables = len(re.findall(r"[aeiouy]+", silent))
    doubled = word
    if syllables == 1 and re.search(r"[^aeiou][aeiou][bdglmnprt]$", word):
        doubled = silent = stem = word + word[-1]
    if part == "n":
        return irregular or ([] if word.endswith("ness") else [plural])
    if part == "v":
        past = [f for f in irregular if not f.endswith("ing")]
        ing = [f for f in irregular if f.endswith("ing")]
        ed = f"{silent}ed" if stem == word else f"{stem}ed"
        return [plural, *(past or [ed]), *(ing or [f"{silent}ing"])]
    short = syllables == 1 or (syllables == 2 and stem != word and doubled == word)
    if irregular or not short or re.search(r"(ed|ing)$", word):
        return irregular
    stem = silent if stem == word else stem
    return [f"{stem}er", f"{stem}est"]


def read_wheels(path: Path = TAXONOMIES) -> list[dict]:
    """The wheels: name, citation, note and `rows`, sorted tuples of three levels."""
    wheels = tomllib.loads(path.read_text(encoding="utf-8"))["wheel"]
    for wheel in wheels:
        wheel["rows"] = sorted(
            (one, two, three)
            for one, children in wheel["rows"].items()
            for two, leaves in children.items()
            for three in leaves or [""]
        )
    return wheels


def read_families(path: Path = FAMILIES) -> tuple[list[Family], frozenset[str]]:
    """The families, in the order of the file, and the words to leave out."""
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    left_out = frozenset(tables.pop("left_out").split())
    families = [
        Family(name, valence, tuple(entry["on"]), tuple(entry["words"].split()))
        for valence, table in tables.items()
        for name, entry in table.items()
    ]
    return families, left_out


def check(families: Sequence[Family], left_out: Iterable[str], wheels: Sequence[Rows]) -> None:
    """Raise where the two hand-written files contradict each other.

    Raises:
        ValueError: a seed in two families or left out, a wheel word in no family, a family on a
            word that its wheel does not have.
    """
    seeds = Counter(word for family in families for word in family.words)
    if twice := sorted(word for word, times in seeds.items() if times > 1):
        raise ValueError(f"{FAMILIES.name}: seeds of two families: {', '.join(twice)}")
    if both := sorted(seeds.keys() & set(left_out)):
        raise ValueError(f"{FAMILIES.name}: seeds that are left out: {', '.join(both)}")
    words = [{word for row in rows for word in row if word} for rows in wheels]
    if missing := sorted({word.replace(" ", "_") for word in set().union(*words)} - seeds.keys()):
        raise ValueError(f"{FAMILIES.name}: wheel words of no family: {', '.join(missing)}")
    for family in families:
        if len(family.on) != len(wheels):
            raise ValueError(f"{FAMILIES.name}: {family.name}: expected {len(wheels)} wheel words")
        for number, (word, known) in enumerate(zip(family.on, words, strict=True), start=1):
            if word and word not in known:
                raise ValueError(f"{FAMILIES.name}: {family.name}: no {word!r} on wheel {number}")


def widen(
    wordnet: WordNet, families: Sequence[Family], left_out: frozenset[str]
) -> dict[str, Base]:
    """The base word of every surface form, phrases with "_".

    Who comes first has the word: seeds; their other forms; their inflections; their synonyms and
    what follows from those.
    """
    # Whatever is left out is taken from the start, by nobody.
    nobody = Base(Family("", "", (), ()), "")
    owner = dict.fromkeys(left_out, nobody)
    owner |= {word: Base(family, word) for family in families for word in family.words}
    _claim_forms(wordnet, owner, [word for word in owner if owner[word] is not nobody])
    new = _synonyms_by_vote(wordnet, owner, families)
    owner |= {word: Base(family, word) for word, family in new.items()}
    _claim_forms(wordnet, owner, list(new))
    return {word: base for word, base in owner.items() if base is not nobody}


def _claim_forms(wordnet: WordNet, owner: dict[str, Base], words: Iterable[str]) -> None:
    """Give words' other forms, forms of those (an adverb of an adjective of a noun), inflections.

    Breadth first, so that a form goes to the word that is nearest.
    """
    waiting = reached = list(words)
    for _ in range(2):
        waiting = [
            form
            for word in waiting
            for form in other_forms(wordnet, word)
            if _take(owner, form, owner[word])
        ]
        reached = reached + waiting
    for word in reached:
        for part in _parts(wordnet, word, seed=word == owner[word].word):
            for form in inflections(word, part, wordnet.exceptions[part]):
                _take(owner, form, owner[word])


def _parts(wordnet: WordNet, word: str, seed: bool) -> list[str]:
    """Parts of speech in which a word is inflected: those in which it mostly is of feelings.

    Seeds were chosen by hand, so that any adjective counts, and verbs like "laugh" and "confuse".
    """
    parts = []
    for part in PARTS:
        sense = first_sense(wordnet, word, part)
        if sense and (
            is_feeling(wordnet, sense)
            or (part == "n" and sense.lexfile in NOUN_FORMS)
            or (part == "a" and seed)
            or (part == "v" and seed and sense.lexfile in SEED_VERBS)
        ):
            parts.append(part)
    return parts


def _take(owner: dict[str, Base], form: str, base: Base) -> bool:
    if not usable(form) or form in owner:
        return False
    owner[form] = base
    return True


def usable(word: str) -> bool:
    """Whether a word is a lower-case word or short phrase, not a name or abbreviation."""
    return bool(re.fullmatch(r"[a-z][a-z'-]+(_[a-z'-]+)*", word)) and (
        word.count("_") < LONGEST_PHRASE
    )


def _synonyms_by_vote(
    wordnet: WordNet, owner: Mapping[str, Base], families: Sequence[Family]
) -> dict[str, Family]:
    """New words and the family most of whose seeds have them as a synonym.

    A word that families of two valences claim is left out: one of them would be wrong. Ties go to
    the family that stands first in the file.
    """
    votes: defaultdict[str, Counter[int]] = defaultdict(Counter)
    for number, family in enumerate(families):
        for seed in family.words:
            for word in set(synonyms(wordnet, seed)):
                if usable(word) and word not in owner:
                    votes[word][number] += 1
    new = {}
    for word, count in sorted(votes.items()):
        if len({families[number].valence for number in count}) == 1:
            new[word] = families[min(count, key=lambda number: (-count[number], number))]
    return new


def spell(word: str) -> str:
    """A word with spaces for WordNet's underscores."""
    return word.replace("_", " ")


def parents(rows: Rows) -> dict[str, tuple[str, str]]:
    """Level 1 and 2 of each word of a wheel, as the scoring rule finds them: the last row's.

    At level 2 a level-1 word is its first child, unless it is a word of level 2 or 3 too.
    """
    one = {word: row[0] for row in rows for word in row if word}
    two: dict[str, str] = {}
    for row in rows:
        two[row[0]] = min(row[1], two.get(row[0], row[1]))
    two |= {word: row[1] for row in rows for word in row[1:] if word}
    return {word: (one[word], two[word]) for word in one}


def stand_for(base: str, on: Sequence[str], wheels: Sequence[dict]) -> list[str]:
    """The wheel words written beside a base word, so that the scoring rule finds its place.

    Of all wheel words of a base word the rule takes, on each wheel, the alphabetically first one
    that stands there; so a word that is meant for one wheel may shadow another's. Where it would, a
    word of the same labels stands in for it, or, failing that, on as few wheels as can be and never
    where the base word itself stands, one of the same level-1 label.

    Args:
        base: the base word; where it is itself on a wheel, that is its place there.
        on: the wheel word meant, for each wheel; "" for none.
        wheels: what `parents` gives for each wheel.

    Raises:
        ValueError: there are no such words.
    """
    wanted = [base if base in wheel else word for word, wheel in zip(on, wheels, strict=True)]
    labels = [wheel[word] if word else None for word, wheel in zip(wanted, wheels, strict=True)]
    own = [base] if any(base in wheel for wheel in wheels) else []
    ranked = [
        sorted(
            (w for w in wheel if word and wheel[w][0] == wheel[word][0]),
            key=lambda w: (w != word, wheel[w] != wheel[word], w),
        )
        for wheel, word in zip(wheels, wanted, strict=True)
    ]

    def right(words: list[str], decided: int, level1_only: tuple[int, ...]) -> bool:
        for number, (wheel, label) in enumerate(zip(wheels, labels, strict=True)):
            first = min((word for word in words if word in wheel), default=None)
            # Not yet decided: a word that comes before the first may still put it right.
            if number < decided or label is None:
                found = wheel[first] if first else None
                same = found[:1] == label[:1] if found and label else found == label
                if not same or (number not in level1_only and found != label):
                    return False
        return True

    def search(number: int, words: list[str], level1_only: tuple[int, ...]) -> list[str] | None:
        if not right(words, number, level1_only):
            return None
        if number == len(wheels):
            return words
        # A word chosen for another wheel may do here as well.
        choices = [*([*words, word] for word in ranked[number] if word not in words), words]
        if not wanted[number] or wanted[number] in words:
            choices = [choices[-1], *choices[:-1]]
        found = (search(number + 1, choice, level1_only) for choice in choices)
        return next((words for words in found if words is not None), None)

    others = [number for number, wheel in enumerate(wheels) if base not in wheel]
    for count in range(len(others) + 1):
        for level1_only in itertools.combinations(others, count):
            if (found := search(0, own, level1_only)) is not None:
                return sorted(set(found) - {base})
    raise ValueError(f"{base!r}: no choice of wheel words gives {wanted}")


def build(wordnet: WordNet) -> dict[str, str]:
    """The files of the lexicon: name -> content."""
    wheels = read_wheels()
    families, left_out = read_families()
    check(families, left_out, [wheel["rows"] for wheel in wheels])
    owner = widen(wordnet, families, left_out)
    places = [parents(wheel["rows"]) for wheel in wheels]
    bases = {spell(base.word): base.family for base in owner.values()}
    on_wheels = set().union(*places)
    # The base words of a family that are on no wheel have the same place, so look once.
    find = functools.cache(lambda base, on: stand_for(base, on, places))
    synonym_rows = {
        (word, base)
        for base, family in bases.items()
        for word in find(base if base in on_wheels else "", family.on)
    }
    # A base word is a form of itself, so that one that stands for nothing ("neutral") is known.
    form_rows = {(spell(base.word), spell(form)) for form, base in owner.items()}
    wheel_rows = [(str(n), *row) for n, wheel in enumerate(wheels, 1) for row in wheel["rows"]]
    return {
        "lexicon.json": _about(wheels),
        "wheels.csv": _csv(("wheel", "level1", "level2", "level3"), wheel_rows),
        "synonyms.csv": _csv(("word", "synonym"), sorted(synonym_rows)),
        "forms.csv": _csv(("name", "form"), sorted(form_rows)),
        "NOTICE": _notice(),
    }


def _csv(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


def _about(wheels: Sequence[dict]) -> str:
    about = {
        "name": "AffectGPT-JAX default lexicon",
        "version": VERSION,
        "description": "Not the lexicon of MER-UniBench: scores do not compare with published "
        "ones. At level 1 every word has the place meant; at level 2 under 1 % of the places are "
        "another child of the same level-1 label.",
        "wheels": [
            {"wheel": number, **{key: wheel[key] for key in ("name", "citation", "note")}}
            for number, wheel in enumerate(wheels, start=1)
        ],
        "sources": [
            {
                "what": "wheels.csv",
                "from": "the taxonomies above; which word stands where is theirs",
                "licence": "facts from the cited publications, written down for this project "
                "(Apache-2.0)",
            },
            {
                "what": "seeds of synonyms.csv and forms.csv, and their places on the wheels",
                "from": "written for this project, data_prep/emotion_words.toml",
                "licence": "Apache-2.0",
            },
            {
                "what": "further words of synonyms.csv and forms.csv",
                "from": "WordNet 3.0. Princeton University (2006); Fellbaum, C. (ed., 1998). "
                "WordNet: An Electronic Lexical Database. MIT Press.",
                "licence": "WordNet 3.0 license, see NOTICE",
            },
        ],
    }
    return json.dumps(about, indent=2) + "\n"


def _notice() -> str:
    return (
        "synonyms.csv and forms.csv in this directory are derived from WordNet 3.0: words that\n"
        "share a synset of feelings with a hand-written seed, or are satellites of such an\n"
        "adjective; derivationally related words, participles and adverbs; irregular inflections.\n"
        "No glosses, examples or frequencies are contained. data_prep/lexicon.py made them.\n"
        "WordNet's licence:\n\n" + WORDNET_LICENCE
    )


def wordnet_directory() -> Path:
    """The directory of WordNet's own tools, else that of Debian's package."""
    return Path(os.environ.get("WNSEARCHDIR") or "/usr/share/wordnet")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; see `cli.exit_on_error`."""
    with cli.exit_on_error():
        parser = cli.make_parser("python -m data_prep.lexicon", __doc__.split("\n")[0])
        parser.add_argument("--out", type=Path, default=ASSET, help="directory to write")
        parser.add_argument(
            "--wordnet",
            type=Path,
            default=wordnet_directory(),
            help="WordNet's database files; default: $WNSEARCHDIR, else /usr/share/wordnet",
        )
        arguments = parser.parse_args(argv)
        files = build(read_wordnet(arguments.wordnet))
        for name, text in files.items():
            path = arguments.out / name
            write_text(path, text)
            lines = text.count("\n")
            print_lines([f"{path}: {len(text.encode()):,} bytes, {lines:,} lines"])


if __name__ == "__main__":
    main()
