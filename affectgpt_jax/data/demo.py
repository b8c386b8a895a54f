"""The demo world: generated clips with known emotions and a known best possible score.

Twenty-four emotion words lie on a grid of six valence levels by four arousal levels. An emotion
causes

* a **face** cue, a noisy reading of its valence level,
* a **voice** cue, a noisy reading of its arousal level,
* a **subtitle**, whose topic reveals the valence to a third and the arousal to a half of its
  scale.

No single modality determines the emotion. Cues are words. A model sees the cues of face and voice
as feature vectors, `cue direction + clip nuisance + per-frame noise`, as an encoder would compute
them. In some clips a modality is absent, and in some it comes from another emotion (a conflict).

Three features show the face cue: `face`; `frame`, the whole picture, in which the face is so small
that it reveals the valence to a third of its scale; and `image`, one portrait.

Clips come from one generative model with exact likelihoods. So `posterior` is Bayes' rule and not
an estimate, and the ceiling of an input mode is the hit rate of the best possible predictor.

The *meaning* of cues is fixed. A seed draws their *appearance* (directions in feature space) and
the clips. So the shipped language model knows the meaning, and every seed needs training to connect
features with words.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from affectgpt_jax.data.modalities import INPUT_MODES, MODALITIES, InputMode
from affectgpt_jax.data.records import MANIFEST_FILE, Record, RecordDataset, write_records

# Rows: valence from very negative to very positive. Columns: arousal from calm to intense.
EMOTION_GRID = (
    ("hopeless", "ashamed", "disgusted", "terrified"),
    ("lonely", "disappointed", "frustrated", "furious"),
    ("bored", "doubtful", "worried", "alarmed"),
    ("calm", "curious", "surprised", "amazed"),
    ("relieved", "hopeful", "amused", "excited"),
    ("content", "grateful", "joyful", "thrilled"),
)
EMOTIONS = tuple(word for row in EMOTION_GRID for word in row)
FACE_CUES = (
    ("grimace", "sob"),
    ("frown", "scowl"),
    ("pout", "squint"),
    ("glance", "stare"),
    ("smile", "dimple"),
    ("grin", "laugh"),
)  # two per valence level
VOICE_CUES = (
    ("whisper", "murmur"),
    ("sigh", "drawl"),
    ("chatter", "quaver"),
    ("shout", "gasp"),
)  # two per arousal level
# Two valence levels by two arousal levels share a topic; the last topic fits every emotion.
TOPICS = (
    ("Nobody came for the {}.", "The {} is gone.", "I waited for the {}.", "I miss the {}."),
    ("Who took the {}?", "Stop touching the {}!", "The {} is burning!", "Give back the {}!"),
    ("So this is the {}.", "I wonder about the {}.", "Maybe the {} is here.", "Look at the {}."),
    ("Wait, where is the {}?", "What is that {}?", "Did the {} move?", "Is the {} real?"),
    ("Thank you for the {}.", "The {} is safe.", "I like the {}.", "We have the {} now."),
    ("We won the {}!", "Here comes the {}!", "I love this {}!", "The {} is ours!"),
    ("This is about the {}.", "I told you of the {}.", "He has a {}.", "You said the {}."),
)
OBJECTS = ("letter", "ticket", "house", "train", "dog", "song", "game", "key", "boat", "photo")

CUES = ("face", "audio", "text")
# What can be observed of a clip, and the cue that it shows.
OBSERVATIONS = {m.name: m.demo_cue for m in MODALITIES.values() if m.demo_cue} | {"text": "text"}
# The input modes whose ceilings every run is compared with: one, two and three modalities.
MAIN_CEILINGS = (
    "face",
    "audio",
    "text",
    "audio_face",
    "face_text",
    "audio_text",
    "multi_audio_face_text",
)
# Supervision sees "train" alone; "rl" is for what comes after it, and "captions" for the
# construction of data sets.
SIZES = {"train": 6144, "val": 512, "test": 2048, "rl": 6144}
_SPLIT_KEYS = {"train": 1, "val": 2, "test": 3, "rl": 4, "captions": 5}

FACE_OWN, VOICE_OWN, TOPIC_OWN = 0.78, 0.84, 0.85  # share of cues that read their level right
ABSENT = 0.04  # chance that a modality is absent, each
CONFLICT = 0.06  # chance that one modality of a clip comes from another emotion
COMPANION = 0.3  # chance that a clip lists a second, neighbouring emotion

# Feature space. Cue directions are long compared with the noise: features reveal nearly all of the
# cues, so the meaning of the cues sets the ceilings, and a model has to learn the directions.
# Shapes are those of CLIP ViT-L/14 and HuBERT-Large, and of four patches of a picture.
SHAPES = {"face": (8, 768), "audio": (8, 1024), "frame": (8, 768), "image": (4, 768)}
DEFAULT_FEATURES = ("face", "audio")
FRAME_GROUP = 4  # face cues that look alike in a frame: two levels of two
NOISE = 0.2  # per frame and dimension; a feature is then about 8 long, as CLIP's are
CUE_LENGTH = 20 * NOISE
NUISANCE_DIMS, NUISANCE_STD = 8, 4 * NOISE
OFFSET_STD = 0.25 * NOISE


def _banded(levels: int, own: float) -> np.ndarray:
    """[levels, levels] rows of P(level read | level): `own` on the diagonal, rest on neighbours."""
    table = np.eye(levels) * own
    for i in range(levels):
        neighbours = [j for j in (i - 1, i + 1) if 0 <= j < levels]
        table[i, neighbours] = (1 - own) / len(neighbours)
    return table


def _cue_tables() -> dict[str, np.ndarray]:
    """P(cue | emotion) for each modality, `[24, cues]`; a text cue is a topic."""
    valence, arousal = np.divmod(np.arange(len(EMOTIONS)), len(VOICE_CUES))
    face = np.repeat(_banded(len(FACE_CUES), FACE_OWN)[valence] / 2, 2, axis=1)
    voice = np.repeat(_banded(len(VOICE_CUES), VOICE_OWN)[arousal] / 2, 2, axis=1)
    topic = np.full((len(EMOTIONS), len(TOPICS)), (1 - TOPIC_OWN) / (len(TOPICS) - 1))
    topic[np.arange(len(EMOTIONS)), valence // 2 * 2 + arousal // 2] = TOPIC_OWN
    return {"face": face, "audio": voice, "text": topic}


CUE_TABLES = _cue_tables()
FACE_WORDS = tuple(word for level in FACE_CUES for word in level)
VOICE_WORDS = tuple(word for level in VOICE_CUES for word in level)


def split_key(split: str) -> int:
    """The number of a split in the seeds of its draws; "corpus-K" is the K-th of fresh clips."""
    corpus = re.fullmatch(r"corpus-(\d+)", split)
    return 100 + int(corpus[1]) if corpus else _SPLIT_KEYS[split]


@dataclasses.dataclass(frozen=True)
class Clips:
    """What was drawn for `n` clips, before any feature: arrays of length n.

    Attributes:
        emotion: index into `EMOTIONS`, the truth.
        cues: for each modality the index of its cue.
        present: for each modality whether the clip has it.
        subtitles, labels: the texts; an absent subtitle is "".
        conflict: the modality whose cue comes from another emotion, "" where none does.
    """

    emotion: np.ndarray
    cues: dict[str, np.ndarray]
    present: dict[str, np.ndarray]
    subtitles: list[str]
    labels: list[tuple[str, ...]]
    conflict: list[str]

    def __len__(self) -> int:
        return len(self.emotion)

    def description(self, i: int) -> str:
        """One sentence per modality, then the emotion: names what was seen, not what was meant."""
        return f"{self.caption(i)} They feel {self.labels[i][0]}."

    def caption(self, i: int) -> str:
        """What face and voice show, without the emotion."""
        seen = FACE_WORDS[self.cues["face"][i]] if self.present["face"][i] else "nothing"
        heard = VOICE_WORDS[self.cues["audio"][i]] if self.present["audio"][i] else "nothing"
        return f"The face shows {seen} and the voice gives {heard}."


def draw_clips(rng: np.random.Generator, n: int) -> Clips:
    """Draw emotions, cues, absences, conflicts, subtitles and label lists of `n` clips."""
    emotion = rng.integers(len(EMOTIONS), size=n)
    conflicting = np.where(rng.random(n) < CONFLICT, rng.integers(3, size=n), -1)
    other = rng.integers(len(EMOTIONS), size=n)
    cues, present = {}, {}
    for m, modality in enumerate(CUES):
        cause = np.where(conflicting == m, other, emotion)
        cumulative = np.cumsum(CUE_TABLES[modality], axis=1)[cause]
        draw = rng.random(n)[:, None]
        # A row sums to 1 up to rounding, so the last cue takes what rounding leaves.
        cues[modality] = (draw > cumulative[:, :-1]).sum(axis=1)
        present[modality] = rng.random(n) >= ABSENT
    sentence = rng.integers(4, size=n)
    thing = rng.integers(len(OBJECTS), size=n)
    subtitles = [
        TOPICS[t][s].format(OBJECTS[o]) if here else ""
        for t, s, o, here in zip(cues["text"], sentence, thing, present["text"], strict=True)
    ]
    conflict = [
        CUES[m] if m >= 0 and o != e and present[CUES[m]][i] else ""
        for i, (m, o, e) in enumerate(zip(conflicting, other, emotion, strict=True))
    ]
    return Clips(emotion, cues, present, subtitles, _label_lists(rng, emotion), conflict)


def _label_lists(rng: np.random.Generator, emotion: np.ndarray) -> list[tuple[str, ...]]:
    """The true word, and for some clips the same-arousal word one valence level away."""
    columns, rows = len(VOICE_CUES), len(FACE_CUES)
    has_companion = rng.random(len(emotion)) < COMPANION
    step = np.where(rng.random(len(emotion)) < 0.5, 1, -1)
    row = emotion // columns
    step = np.where((row + step < 0) | (row + step >= rows), -step, step)
    companion = emotion + step * columns
    return [
        (EMOTIONS[e], EMOTIONS[c]) if has else (EMOTIONS[e],)
        for e, c, has in zip(emotion, companion, has_companion, strict=True)
    ]


def posterior(evidence: dict[str, np.ndarray], seen: tuple[str, ...]) -> np.ndarray:
    """P(emotion | evidence), exactly.

    Args:
        evidence: for each of `OBSERVATIONS` p(observation | cue), `[N, cues]`, up to a factor per
            clip; a row of ones says nothing (the modality is absent).
        seen: the observations that the predictor sees. Two observations of one cue differ by their
            noise only, so they are independent given the cue.

    Returns:
        `[N, 24]`. A conflict touches at most one modality, so given the emotion the modalities are
        not independent: the sum runs over which one conflicts, if any.
    """
    own = {}  # p(all observations of a modality | emotion)
    for modality in dict.fromkeys(OBSERVATIONS[name] for name in seen):
        observed = [evidence[name] for name in seen if OBSERVATIONS[name] == modality]
        own[modality] = np.prod(observed, axis=0) @ CUE_TABLES[modality].T
    anybody = {m: p.mean(axis=1, keepdims=True) for m, p in own.items()}  # of a random emotion
    cases = [(None, 1 - CONFLICT)] + [(m, CONFLICT / 3) for m in CUES]
    joint = np.zeros((len(evidence[seen[0]]), len(EMOTIONS)))
    for conflicting, weight in cases:
        likelihood = np.full_like(joint, weight)
        for m in own:
            likelihood *= anybody[m] if m == conflicting else own[m]
        joint += likelihood
    return joint / joint.sum(axis=1, keepdims=True)


def word_evidence(clips: Clips) -> dict[str, np.ndarray]:
    """Evidence for a reader of cue words: the cue itself where present, nothing where absent."""
    return {
        m: np.where(clips.present[m][:, None], np.eye(CUE_TABLES[m].shape[1])[clips.cues[m]], 1.0)
        for m in CUES
    }


def ceiling(evidence: dict[str, np.ndarray], seen: tuple[str, ...]) -> float:
    """Expected hit rate, 0 to 1, of the best one-label predictor that sees these observations."""
    return float(posterior(evidence, seen).max(axis=1).mean())


class World:
    """One seed's appearance of the cues, and the clips drawn from it.

    Args:
        seed: of the appearance and of the clips.
        noise: by feature, how many times noisier it is than `NOISE`: a worse encoder.

    Attributes:
        directions: for every feature, the unit-free vectors `[cues, d]` of the cues it tells of.
        nuisance: for every feature, orthonormal nuisance directions `[8, d]` ("who and where").
        offset: for every feature, a constant part of all its values `[d]`.
    """

    def __init__(self, seed: int, noise: Mapping[str, float] | None = None):
        rng = np.random.default_rng([seed, 0, 0])
        self.seed = seed
        self._noise = {name: NOISE * (noise or {}).get(name, 1.0) for name in SHAPES}
        self.directions, self.nuisance, self.offset = {}, {}, {}
        for feature, (_, width) in SHAPES.items():
            cues = CUE_TABLES[OBSERVATIONS[feature]].shape[1]
            gaussian = rng.standard_normal((width, cues + NUISANCE_DIMS))
            basis = np.linalg.qr(gaussian)[0].T.astype(np.float32)
            # Half of a cue direction is shared with a nuisance direction, so that averaging frames
            # does not separate cue from nuisance: the model has to learn what to look away from.
            self.nuisance[feature] = basis[cues:]
            mixed = basis[:cues] + 0.5 * basis[cues:][np.arange(cues) % NUISANCE_DIMS]
            if feature == "frame":
                mixed = mixed[np.arange(cues) // FRAME_GROUP]
            self.directions[feature] = CUE_LENGTH * mixed
            self.offset[feature] = (OFFSET_STD * rng.standard_normal(width)).astype(np.float32)

    def clips(self, split: str, size: int | None = None) -> Clips:
        """Draw the clips of a split; `size` defaults to `SIZES[split]`."""
        rng = np.random.default_rng([self.seed, split_key(split), 0])
        return draw_clips(rng, SIZES[split] if size is None else size)

    def features(
        self, clips: Clips, split: str, names: Sequence[str] = DEFAULT_FEATURES
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yield, clip by clip, those of the named features that it has: `[T, d]` float16 each.

        Every clip and feature has its own generator, so a feature of clip i looks the same however
        many clips and whichever other features are drawn.
        """
        for i in range(len(clips)):
            out = {}
            for name in names:
                modality, shape = OBSERVATIONS[name], SHAPES[name]
                if not clips.present[modality][i]:
                    continue
                number = list(SHAPES).index(name)
                rng = np.random.default_rng([self.seed, split_key(split), i + 1, number])
                identity = NUISANCE_STD * rng.standard_normal(NUISANCE_DIMS, dtype=np.float32)
                noise = rng.standard_normal(shape, dtype=np.float32)
                clean = self.offset[name] + self.directions[name][clips.cues[modality][i]]
                clean = clean + identity @ self.nuisance[name]
                out[name] = (clean + self._noise[name] * noise).astype(np.float16)
            yield out

    def records(
        self, split: str, size: int | None = None, features: Sequence[str] = DEFAULT_FEATURES
    ) -> Iterator[Record]:
        """Yield the records of a split, annotated for every label type."""
        clips = self.clips(split, size)
        rng = np.random.default_rng([self.seed, split_key(split), 0, 1])
        others = rng.integers(len(clips), size=len(clips))
        places = rng.integers(2, size=len(clips))
        for i, found in enumerate(self.features(clips, split, features)):
            # A preference between the clip's own description and that of another clip.
            pair = [clips.description(i), clips.description(others[i])]
            preferred = "same" if pair[0] == pair[1] else ("a1", "a2")[places[i]]
            yield Record(
                name=f"demo-{split}-{i:05d}",
                features=found,
                subtitle=clips.subtitles[i],
                description=clips.description(i),
                labels=clips.labels[i],
                emotion=EMOTIONS[clips.emotion[i]],
                candidates=EMOTIONS,
                valence=float(clips.emotion[i] // len(VOICE_CUES)) / 2.5 - 1,
                valence_range=(-1.0, 1.0),
                caption=clips.caption(i),
                question="What is said?",
                answer=clips.subtitles[i] or "Nothing.",
                alternatives=tuple(pair[:: -1 if places[i] else 1]),
                preferred=preferred,
                source="demo",
                conflict=clips.conflict[i],
            )

    def feature_evidence(self, name: str, features: np.ndarray) -> np.ndarray:
        """p(features | cue) up to a factor per clip: features `[N, T, d]` -> `[N, cues]`.

        The mean over frames is sufficient. It is Gaussian with covariance `s I + v U'U` (`s` the
        frame noise over T, `v` the nuisance variance, `U` orthonormal), whose inverse is closed.
        """
        mean = features.astype(np.float64).mean(axis=1) - self.offset[name]
        s = self._noise[name] ** 2 / features.shape[1]
        shrink = NUISANCE_STD**2 / (NUISANCE_STD**2 + s)
        basis = self.nuisance[name].astype(np.float64)
        directions = self.directions[name].astype(np.float64)
        residual = mean[:, None, :] - directions[None]  # [N, cues, d]
        along = residual @ basis.T
        distance = (residual**2).sum(-1) - shrink * (along**2).sum(-1)
        log_likelihood = -0.5 * distance / s
        return np.exp(log_likelihood - log_likelihood.max(axis=1, keepdims=True))

    def evidence(
        self,
        split: str,
        size: int | None = None,
        features: Sequence[str] = DEFAULT_FEATURES,
    ) -> dict[str, np.ndarray]:
        """Evidence of a split, by observation `[N, cues]`: of these features and the subtitle.

        A subtitle's topic can be read off its words with certainty.
        """
        clips = self.clips(split, size)
        out = {"text": word_evidence(clips)["text"]}
        for name in features:
            out[name] = np.ones((len(clips), CUE_TABLES[OBSERVATIONS[name]].shape[1]))
        for i, found in enumerate(self.features(clips, split, features)):
            for name, value in found.items():
                out[name][i] = self.feature_evidence(name, value[None])[0]
        return out


def seen_by(mode: InputMode) -> tuple[str, ...]:
    """The observations that an input mode sees; the pre-fusion adds none to what it reads."""
    return (*sorted(mode.features), *(["text"] if mode.text else []))


def ceilings(evidence: dict[str, np.ndarray]) -> dict[str, float]:
    """Ceiling, 0 to 1, of every input mode whose observations are all in `evidence`."""
    return {
        mode.name: ceiling(evidence, seen_by(mode))
        for mode in INPUT_MODES.values()
        if evidence.keys() >= set(seen_by(mode))
    }


class DemoDataset(RecordDataset):
    """A record directory of the demo world, which knows its ceilings.

    Args:
        directory: where `materialize` wrote the records of a split.
        seed: of the world that they were drawn from.
    """

    def __init__(self, directory: Path, seed: int):
        super().__init__(directory)
        self._seed = seed

    def ceilings(self, mode: str) -> dict[str, float]:
        """The ceilings of these clips: `MAIN_CEILINGS`, and that of the input mode `mode`."""
        features = features_for(INPUT_MODES[mode].features)
        evidence = World(self._seed).evidence(self.manifest.split, len(self), features)
        known = ceilings(evidence)
        return {name: known[name] for name in dict.fromkeys([*MAIN_CEILINGS, mode])}


def world_seed(place: str, default: int) -> int | None:
    """The seed that a source "demo" or "demo:SEED" names; None where it is no demo world."""
    match = re.fullmatch(r"demo(?::(\d+))?", place)
    return match and (default if match[1] is None else int(match[1]))


def features_for(needed: Sequence[str]) -> tuple[str, ...]:
    """The features of records for models that read `needed`: the default ones, and what else."""
    return (*DEFAULT_FEATURES, *(n for n in SHAPES if n in needed and n not in DEFAULT_FEATURES))


def encoder_name(seed: int) -> str:
    """What the records of a world name as the encoder of its features."""
    return f"demo world, seed {seed}"


def materialize(
    directory: Path,
    seed: int,
    split: str,
    say: Callable[[str], None] = print,
    features: Sequence[str] = DEFAULT_FEATURES,
) -> DemoDataset:
    """Open a split's record directory, after writing it where it is not there yet."""
    if not (directory / MANIFEST_FILE).exists():
        say(f"writing {SIZES[split]:,} generated clips to {directory}")
        for left in directory.glob(".writing-*"):  # by a run that was killed here
            shutil.rmtree(left)
        write_records(
            directory,
            World(seed).records(split, features=features),
            encoders=dict.fromkeys(features, encoder_name(seed)),
            split=split,
        )
    return DemoDataset(directory, seed)
