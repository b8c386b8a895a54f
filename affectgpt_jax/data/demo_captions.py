"""The demo world speaks: unlabelled clips that models have described, rightly or not.

`data_prep.caption` makes a data set of clips that nobody has labelled. This module draws such clips
of a demo world with all that the command would find or be told, and with the truth that it never
sees: which descriptions are right, and whether the person who is seen is the one who is heard.

A description is one of `KINDS`: right; wrong (of an emotion drawn at random) or mirrored (of the
opposite valence, as an irony that was missed); failed (a short refusal) or rambling (three times as
long as others). Apart from that, in some clips the face belongs to somebody else than the voice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from affectgpt_jax.data.demo import (
    COMPANION,
    CUE_TABLES,
    EMOTION_GRID,
    EMOTIONS,
    FACE_CUES,
    FACE_WORDS,
    VOICE_CUES,
    VOICE_WORDS,
    Clips,
    World,
    split_key,
)
from affectgpt_jax.data.records import Record

KINDS = ("right", "wrong", "mirrored", "failed", "rambling")
# What people answer who may choose one of six words. The words are coarse on purpose: people call
# the alarmed surprised and the bored content, so that a clip's word does not tell its sentiment,
# and a test of both is more than the test of one.
COARSE = {
    "angry": ("disgusted", "frustrated", "furious"),
    "content": ("bored", "calm", "curious", "relieved", "content", "grateful"),
    "happy": ("hopeful", "amused", "excited", "joyful", "thrilled"),
    "sad": ("hopeless", "ashamed", "lonely", "disappointed"),
    "surprised": ("alarmed", "surprised", "amazed"),
    "worried": ("terrified", "doubtful", "worried"),
}
COARSE_WORDS = tuple(COARSE)
# The class of each emotion.
COARSE_OF = np.array(
    [next(c for c, word in enumerate(COARSE) if e in COARSE[word]) for e in EMOTIONS]
)
# What people give as a valence: that of the row of the grid, but surprise is neither.
VALENCE = np.array(
    [
        0.0 if word in ("curious", "surprised", "amazed") else row / 2.5 - 1
        for row, words in enumerate(EMOTION_GRID)
        for word in words
    ]
)
ANNOTATOR_NOISE = 0.1

TRACE_RATE = 25  # values/s of mouth and energy
_SHORTEST_S, _LONGEST_S = 2.0, 5.0
# Sentences without an emotion in them, from which descriptions get their lengths.
_ASIDES = (
    "The picture is lit from one side.",
    "Somebody walks past behind the table.",
    "The camera does not move.",
    "The room has a window and two chairs.",
    "The head turns to the left and back.",
    "A hand is on the table for most of the time.",
    "There is a short pause before the last word.",
    "The pace of the words does not change much.",
    "Nobody else comes close to the camera.",
    "The background stays out of focus.",
)
# Cues that a lexicon holds for emotions, in words that it does not.
_PLAINLY = {"smile": "a curve of the lips", "sob": "red eyes", "laugh": "all the teeth"}
_REFUSALS = (
    "I cannot identify what this person feels.",
    "There is no clip to look at.",
    "This is nothing that I can help with.",
    "There are no clues.",
)


@dataclasses.dataclass(frozen=True)
class Rates:
    """How often what goes wrong, as shares of all clips.

    Attributes:
        wrong: descriptions of another emotion, `mirrored` of them (a share of these) of the
            opposite valence.
        failed, rambling: descriptions that are none, or far too long.
        mismatched: clips whose face belongs to somebody else than the voice.
    """

    wrong: float = 0.35
    mirrored: float = 0.5
    failed: float = 0.05
    rambling: float = 0.03
    mismatched: float = 0.15


RATES = Rates()


@dataclasses.dataclass(frozen=True, eq=False)
class Captions:
    """Clips and what was said about them; arrays and lists have one entry a clip.

    Attributes:
        clips: what is seen, heard and said; the emotion is that of the voice and the words.
        kind: of the description, an index into `KINDS`.
        mismatched: whether the face belongs to somebody else.
        labels: the emotions that the description names, none where it failed.
        audio, video: what the describers of sound and pictures said.
        descriptions: what was made of both and the subtitle.
    """

    clips: Clips
    kind: np.ndarray
    mismatched: np.ndarray
    labels: list[tuple[str, ...]]
    audio: list[str]
    video: list[str]
    descriptions: list[str]

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def names(self) -> list[str]:
        """Of the clips, in order."""
        return [f"demo-captions-{i:05d}" for i in range(len(self))]

    @property
    def pure(self) -> np.ndarray:
        """Whether a description is right for the person who is seen and heard, bool `[N]`."""
        return (self.kind == KINDS.index("right")) & ~self.mismatched


def draw_captions(world: World, size: int, rates: Rates = RATES) -> Captions:
    """Draw `size` clips of the split "captions", their descriptions, and the truth about both.

    A clip and what is said about it do not depend on how many there are before it, only on `size`.
    """
    clips = world.clips("captions", size)
    rng = np.random.default_rng([world.seed, split_key("captions"), 0, 2])
    both = clips.present["face"] & clips.present["audio"]
    mismatched = both & (rng.random(size) < rates.mismatched)
    # Somebody else's face shows what somebody else feels.
    others = _cues(rng, "face", rng.integers(len(EMOTIONS), size=size))
    seen = np.where(mismatched, others, clips.cues["face"])
    clips = dataclasses.replace(clips, cues=clips.cues | {"face": seen})
    shares = np.array(
        [
            1 - rates.wrong - rates.failed - rates.rambling,
            rates.wrong * (1 - rates.mirrored),
            rates.wrong * rates.mirrored,
            rates.failed,
            rates.rambling,
        ]
    )
    kind = rng.choice(len(KINDS), size=size, p=shares)
    columns = len(VOICE_CUES)
    row, column = np.divmod(clips.emotion, columns)
    another = (clips.emotion + rng.integers(1, len(EMOTIONS), size=size)) % len(EMOTIONS)
    mirrored = (len(FACE_CUES) - 1 - row) * columns + column
    told = np.choose(kind, [clips.emotion, another, mirrored, clips.emotion, clips.emotion])
    right = told == clips.emotion
    face = np.where(right, clips.cues["face"], _cues(rng, "face", told))
    voice = np.where(right, clips.cues["audio"], _cues(rng, "audio", told))
    companions = _companions(rng, told)
    labels, audio, video, descriptions = [], [], [], []
    for i in range(size):
        heard = VOICE_WORDS[voice[i]] if clips.present["audio"][i] else "nothing"
        shown = FACE_WORDS[face[i]] if clips.present["face"][i] else "nothing"
        audio.append(f"The voice gives {heard}.")
        video.append(f"The face shows {_PLAINLY.get(shown, shown)}.")
        words = clips.labels[i] if right[i] else companions[i]
        if KINDS[kind[i]] == "failed":
            labels.append(())
            descriptions.append(_REFUSALS[rng.integers(len(_REFUSALS))])
            continue
        # Seven asides on average, hence about 60 words in all, nearly normally distributed.
        asides = rng.binomial(14, 0.5) + (21 if KINDS[kind[i]] == "rambling" else 0)
        chosen = [_ASIDES[k] for k in rng.integers(len(_ASIDES), size=asides)]
        labels.append(words)
        feels = f"They feel {' and '.join(words)}."
        descriptions.append(" ".join([video[-1], audio[-1], *chosen, feels]))
    return Captions(clips, kind, mismatched, labels, audio, video, descriptions)


def _cues(rng: np.random.Generator, modality: str, emotion: np.ndarray) -> np.ndarray:
    """A cue of each emotion."""
    cumulative = np.cumsum(CUE_TABLES[modality], axis=1)[emotion]
    return (rng.random(len(emotion))[:, None] > cumulative[:, :-1]).sum(axis=1)


def _companions(rng: np.random.Generator, emotion: np.ndarray) -> list[tuple[str, ...]]:
    """Label lists of these emotions: in some, a neighbour in valence is the second."""
    columns = len(VOICE_CUES)
    beside = np.where(emotion < columns, emotion + columns, emotion - columns)
    has = rng.random(len(emotion)) < COMPANION
    return [
        (EMOTIONS[e], EMOTIONS[b]) if h else (EMOTIONS[e],)
        for e, b, h in zip(emotion, beside, has, strict=True)
    ]


def caption_records(
    world: World, captions: Captions, features: tuple[str, ...] = ("face", "audio")
) -> Iterator[Record]:
    """The clips with features and subtitle, as an extraction leaves them: nothing else is known."""
    drawn = world.features(captions.clips, "captions", features)
    for i, (name, found) in enumerate(zip(captions.names, drawn, strict=True)):
        yield Record(name=name, features=found, subtitle=captions.clips.subtitles[i], source="demo")


def corpus(world: World, number: int, kind: str, size: int) -> Iterator[Record]:
    """Fresh clips of the world that people have labelled, coarsely and with mistakes.

    Args:
        world: where the clips come from.
        number: of the corpus; another number gives other clips.
        kind: "emotion" for one of `COARSE_WORDS`, or "valence" for a number of -1 to 1.
        size: clips.
    """
    split = f"corpus-{number}"
    clips = world.clips(split, size)
    rng = np.random.default_rng([world.seed, split_key(split), 0, 2])
    mistaken = rng.random(size) < ANNOTATOR_NOISE
    felt = np.where(mistaken, rng.integers(len(EMOTIONS), size=size), clips.emotion)
    for i, found in enumerate(world.features(clips, split)):
        truth = (
            {"emotion": COARSE_WORDS[COARSE_OF[felt[i]]], "candidates": COARSE_WORDS}
            if kind == "emotion"
            else {"valence": float(VALENCE[felt[i]]), "valence_range": (-1.0, 1.0)}
        )
        name = f"demo-corpus-{number}-{i:05d}"
        yield Record(name=name, features=found, subtitle=clips.subtitles[i], source="demo", **truth)


@dataclasses.dataclass(frozen=True, eq=False)
class Traces:
    """What a camera and a microphone note of a clip, 25 times a second, float32 `[T]` each.

    Attributes:
        mouth: brightness of the mouth, which an open mouth darkens.
        upper: brightness of the upper face, which only light and head move.
        energy: of the sound, in dB.
    """

    mouth: np.ndarray
    upper: np.ndarray
    energy: np.ndarray


def draw_traces(world: World, captions: Captions) -> Iterator[Traces]:
    """The traces of each clip, in order.

    A mouth follows its own voice by 0 to 2 values. In mismatched clips it follows somebody else's
    in half of them, and is still in the others. An absent face or voice leaves noise.
    """
    for i in range(len(captions)):
        rng = np.random.default_rng([world.seed, split_key("captions"), i + 1, 99])
        count = int(TRACE_RATE * rng.uniform(_SHORTEST_S, _LONGEST_S))
        heard = _loudness(rng, count)
        spoken = heard if not captions.mismatched[i] else _loudness(rng, count)
        if captions.mismatched[i] and rng.random() < 0.5:
            spoken = np.zeros(count)
        opened = np.roll(spoken, rng.integers(0, 3))
        light = np.cumsum(rng.normal(0, 0.4, count))
        mouth = 100 + light - 30 * opened + rng.normal(0, 2.0, count)
        upper = 140 + light + rng.normal(0, 1.0, count)
        noise = 10 ** (-rng.uniform(15, 30) / 20)
        if not captions.clips.present["face"][i]:
            mouth = upper = rng.normal(100, 2.0, count)
        if not captions.clips.present["audio"][i]:
            heard = np.zeros(count)
        power = heard**2 + noise**2 * rng.uniform(0.5, 1.5, count)
        yield Traces(*(a.astype(np.float32) for a in (mouth, upper, 10 * np.log10(power))))


def _loudness(rng: np.random.Generator, count: int) -> np.ndarray:
    """0 to 1: syllables, four to six a second, with a pause now and then."""
    time, level = 0.0, np.zeros(count)
    at = np.arange(count) / TRACE_RATE
    while time < count / TRACE_RATE:
        length = rng.uniform(0.14, 0.26)
        if rng.random() < 0.15:
            time += rng.uniform(0.2, 0.5)
        bump = np.clip(1 - np.abs(at - time - length / 2) / (length / 2), 0, None)
        level = np.maximum(level, rng.uniform(0.4, 1.0) * bump)
        time += length
    return level
