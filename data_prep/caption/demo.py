"""The whole pipeline on a demo world whose truth is known: clips, replies, crowd, filter, card.

What a film and models would give is drawn from `affectgpt_jax.data.demo_captions`; the stages that
judge it are the real ones.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from affectgpt_jax.common.files import lock_file
from affectgpt_jax.common.json import read_json, write_json
from affectgpt_jax.common.tables import write_csv
from affectgpt_jax.data import demo, demo_captions
from affectgpt_jax.data.demo_captions import KINDS, Captions, Rates
from affectgpt_jax.data.records import MANIFEST_FILE, Record, write_records
from affectgpt_jax.evaluation.lexicon import load_lexicon
from affectgpt_jax.evaluation.rules import RuleExtractor

from ..crowd import run as crowd
from ..crowd.votes import Vote, read_votes
from ..speakers.synchrony import judge_traces
from ..speakers.verdicts import read_speakers, write_speakers
from . import filtering
from .card import write_card
from .describe import Described, write_described
from .labels import ABOUT, label_descriptions
from .settings import DESCRIPTIONS, LABELS, SPEAKERS, VOTES, CaptionError, read_settings

CLIPS = 2048
# Emotion or valence, and clips of each corpus that people have labelled.
CORPORA = {"emotion-1": 1536, "emotion-2": 1536, "emotion-3": 1536, "valence-1": 1536}
# What is shown: the filters from none to all.
FILTERS = {
    "none": (),
    "low": ("low",),
    "low+emotion": ("low", "emotion"),
    "low+sentiment": ("low", "sentiment"),
    "low+emotion+sentiment": ("low", "emotion", "sentiment"),
}
FILTERS_FILE = "filters.json"
_STATE = "demo.json"
RENDERED = 40  # clips as pixels and sound
RATES = Rates()


@dataclasses.dataclass(frozen=True, eq=False)
class Demo:
    """A demo world whose clips have been described and judged.

    Attributes:
        captions: the clips and the truth.
        votes: of the crowd.
        filters: by the names of `FILTERS`: clips kept, precision, recall and purity.
        facts: of the stages: crowd and speaker check against the truth.
    """

    captions: Captions
    votes: dict[str, Vote]
    filters: dict[str, dict[str, float]]
    facts: dict[str, float]


def build(
    out: Path,
    seed: int,
    *,
    clips: int = CLIPS,
    rates: Rates = RATES,
    corpora: Mapping[str, int] = CORPORA,
    crowd_options: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> Demo:
    """Make the data set of a demo world in a folder; what is there already is not made again.

    Args:
        out: the folder.
        seed: of the world and of the crowd.
        clips: that nobody has labelled.
        rates: how often what goes wrong.
        corpora: clips of each corpus of human labels, by "emotion-K" or "valence-K".
        crowd_options: of `crowd.run.train`.
        say: told what is being done.

    Raises:
        CaptionError: the folder has the demo of other settings.
    """
    options = dict(crowd_options or {})
    about = {
        "seed": seed,
        "clips": clips,
        "rates": dataclasses.asdict(rates),
        "corpora": dict(corpora),
        "crowd": {key: list(v) if isinstance(v, tuple) else v for key, v in options.items()},
    }
    out.mkdir(parents=True, exist_ok=True)
    state = out / _STATE
    if state.exists() and read_json(state) != about:
        raise CaptionError(
            f"{out} holds the demo of another seed, size or rates; name another folder, or "
            "remove it"
        )
    write_json(state, about)
    with lock_file(out / ".lock", str(out), "wait for it, or name another folder", say):
        world = demo.World(seed)
        say(f"drawing {clips:,} clips and what was said about them")
        captions = demo_captions.draw_captions(world, clips, rates)
        records, sets = write_clips(out, world, captions, corpora, say)
        settings = read_settings(out)
        write_replies(out, captions)
        if not all((out / file).exists() for file in (LABELS, ABOUT)):
            say("labels of the descriptions, by rules")
            label_descriptions(out, RuleExtractor(load_lexicon()))
        say("who speaks, by the traces of mouths and sound")
        speaking = write_verdicts(out, world, captions)
        if not (out / VOTES).exists():
            say("the crowd learns from its corpora, and votes")
            heads = {name: (name.partition("-")[0],) for name in sets}
            crowd.train(sets, out / "crowd", heads=heads, seed=seed, say=say, **options)
            crowd.vote(out / "crowd", records, out / VOTES)
        table = out / "clips.csv"
        lexicon = load_lexicon()
        data = filtering.read_data_set(out, table, settings)
        judged = filtering.judge(data, settings, lexicon)
        filters = {name: score(captions, judged, levels) for name, levels in FILTERS.items()}
        write_json(out / FILTERS_FILE, filters)
        say("funnel and card")
        levels = tuple(filtering.LEVELS)
        about_it = {"settings_sha256": settings.sha256, "lexicon": str(lexicon.identity)}
        filtering.write_results(data, judged, levels, out, about_it)
        write_card(
            data,
            judged,
            levels,
            lexicon,
            settings,
            out,
            title=f"Captions of the demo world {seed}",
            license_name="apache-2.0",
            languages=["en"],
            crowd=out / "crowd",
            seed=seed,
        )
        votes = read_votes(out / VOTES)
        members = crowd.member_words(out / "crowd", records)
        facts = speaking | length_facts(captions, judged)
        facts |= crowd_facts(world, captions, votes, (words for _, words in members))
        return Demo(captions, votes, filters, facts)


def write_clips(
    out: Path,
    world: demo.World,
    captions: Captions,
    corpora: Mapping[str, int],
    say: Callable[[str], None],
) -> tuple[Path, dict[str, Path]]:
    """Records of the clips and of each corpus, and the clips' CSV file."""
    encoders = dict.fromkeys(demo.DEFAULT_FEATURES, f"demo world, seed {world.seed}")

    def written(name: str, make: Callable[[], Iterator[Record]]) -> Path:
        folder = out / "records" / name
        if not (folder / MANIFEST_FILE).exists():
            say(f"writing {folder}")
            write_records(folder, make(), encoders=encoders)
        return folder

    records = written("captions", lambda: demo_captions.caption_records(world, captions))
    sets = {}
    for number, (name, size) in enumerate(corpora.items(), start=1):
        kind = name.partition("-")[0]
        make = functools.partial(demo_captions.corpus, world, number, kind, size)
        sets[name] = written(name, make)
    subtitles = zip(captions.names, captions.clips.subtitles, strict=True)
    rows = ({"name": name, "subtitle": subtitle} for name, subtitle in subtitles)
    write_csv(out / "clips.csv", ("name", "subtitle"), rows)
    return records, sets


def write_replies(out: Path, captions: Captions) -> None:
    """What the demo's describers and its merging model said."""
    said = {
        "audio": captions.audio,
        "video": captions.video,
        DESCRIPTIONS: captions.descriptions,
    }
    for kind, texts in said.items():
        lines = (
            Described(
                name=name,
                reply=text,
                finish="stop",
                why="",
                tokens=0,
                model="demo world",
                prompt_sha256="",
                media_sha256="",
            )
            for name, text in zip(captions.names, texts, strict=True)
        )
        write_described(out / f"{kind}.jsonl", lines)


def write_verdicts(out: Path, world: demo.World, captions: Captions) -> dict[str, float]:
    """Judge the traces of every clip; returns how often that is decided, and right."""
    rows, decided, right = [], [], []
    present = captions.clips.present
    traces = demo_captions.draw_traces(world, captions)
    for i, (name, trace) in enumerate(zip(captions.names, traces, strict=True)):
        row = {"name": name, "network": "synchrony", "frames": len(trace.mouth)}
        if not present["face"][i]:
            row |= {"verdict": "no_face", "faces": 0, "tracks": 0}
        elif not present["audio"][i]:
            row |= {"verdict": "silent", "faces": len(trace.mouth), "tracks": 1}
        else:
            found = judge_traces(
                trace.mouth, trace.energy, upper=trace.upper, rate=demo_captions.TRACE_RATE
            )
            row |= {
                "verdict": found.verdict,
                "score": round(found.score, 4),
                "active_share": round(found.active_share, 4),
                "voiced_share": round(found.voiced_share, 4),
                "faces": len(trace.mouth),
                "tracks": 1,
            }
            decided.append(found.verdict != "unsure")
            right.append((found.verdict == "speaking") == (not captions.mismatched[i]))
        rows.append(row)
    write_speakers(out / SPEAKERS, rows)
    certain = np.array(decided)
    return {
        "speaker check: unsure": float(1 - certain.mean()),
        "speaker check: right where decided": float(np.array(right)[certain].mean()),
    }


def score(
    captions: Captions,
    judged: Mapping[str, Mapping[str, filtering.Judgement]],
    levels: Sequence[str],
) -> dict[str, float]:
    """How well a filter tells right descriptions from others, against the hidden truth.

    A filter drops, so its `precision` and `recall` are those of dropping: a clip that is not right
    is what it is to find. The two of keeping are `purity` and `right_kept`.

    Returns:
        `kept`, clips; `precision`, the share of dropped clips that are not right, 1 where none is
        dropped; `recall`, the share of clips that are not right that is dropped; `right_kept`, the
        share of right clips that is kept; `purity`, the share of kept clips that are right.
    """
    kept = set(filtering.kept_names(judged, levels))
    stays = np.array([name in kept for name in captions.names])
    pure = captions.pure
    dropped, dropped_rightly = int((~stays).sum()), int((~stays & ~pure).sum())
    return {
        "kept": int(stays.sum()),
        "precision": dropped_rightly / dropped if dropped else 1.0,
        "recall": dropped_rightly / max(int((~pure).sum()), 1),
        "right_kept": float(stays[pure].mean()),
        "purity": float(pure[stays].mean()) if stays.any() else 0.0,
    }


def length_facts(
    captions: Captions, judged: Mapping[str, Mapping[str, filtering.Judgement]]
) -> dict[str, float]:
    """Shares of failed and rambling replies, and of the others, that their length drops."""
    dropped = np.array(
        [judged[name]["length"].outcome == filtering.DROPPED for name in captions.names]
    )
    bad = np.isin(captions.kind, [KINDS.index(kind) for kind in ("failed", "rambling")])
    return {
        "length: failed and rambling dropped": float(dropped[bad].mean()) if bad.any() else 1.0,
        "length: others dropped": float(dropped[~bad].mean()),
    }


def rendered_facts(
    out: Path, seed: int, count: int = RENDERED, say: Callable[[str], None] = print
) -> dict[str, float]:
    """How the speaker check fares on clips that are pixels and sound, not traces.

    Args:
        out: of the demo; the clips go into its folder `rendered`.
        seed: of the clips.
        count: clips; half of them speak.
        say: told what is being done.

    Raises:
        ModuleNotFoundError: a package that reads media is missing.
    """
    # These packages are an extra.
    from ..clips import Clip
    from ..speakers import check
    from ..speakers.calibrate import calibrate, read_truth
    from ..speakers.rendered import rendered

    folder = out / "rendered"
    known = folder / "truth.csv"
    if not known.exists():
        say(f"rendering {count} clips with sound")
        rows = rendered(folder, seed, count).items()
        write_csv(known, ("name", "speaking"), ({"name": n, "speaking": int(s)} for n, s in rows))
    say("judging who speaks in them")
    truth = read_truth(known)
    clips = [Clip(name, folder / f"{name}.mp4") for name in truth]
    check.check_clips(clips, folder / SPEAKERS)
    found = calibrate(read_speakers(folder / SPEAKERS), truth)
    return {
        "rendered clips: unsure": 1 - found.decided / found.clips,
        "rendered clips: right where decided": found.right / max(found.decided, 1),
    }


def crowd_facts(
    world: demo.World,
    captions: Captions,
    votes: Mapping[str, Vote],
    members: Iterable[np.ndarray] = (),
) -> dict[str, float]:
    """How often the crowd is right, beside the best that can be: the exact posterior.

    Of clips whose face and voice are of one person, since the posterior knows no others.

    Args:
        world, captions: the truth.
        votes: of the crowd, by clip.
        members: a word for each clip of every single member. The best of them is known by the
            truth alone, so that nobody could have chosen it.
    """
    fair = np.flatnonzero(~captions.mismatched)
    truth = demo_captions.COARSE_OF[captions.clips.emotion]
    words = demo_captions.COARSE_WORDS
    right = [votes[captions.names[i]].emotion == words[truth[i]] for i in fair]
    clips = captions.clips
    evidence = {"text": demo.word_evidence(clips)["text"]}
    for name in demo.DEFAULT_FEATURES:
        cues = demo.CUE_TABLES[demo.OBSERVATIONS[name]].shape[1]
        evidence[name] = np.ones((len(clips), cues))
    for i, found in enumerate(world.features(clips, "captions")):
        for name, value in found.items():
            evidence[name][i] = world.feature_evidence(name, value[None])[0]
    of_emotion = demo.posterior(evidence, ("face", "audio", "text"))
    of_class = np.stack(
        [of_emotion[:, demo_captions.COARSE_OF == c].sum(axis=1) for c in range(len(words))], axis=1
    )
    best = of_class.argmax(axis=1) == truth
    true_words = np.array(words)[truth[fair]]
    single = [float(np.mean(said[fair] == true_words)) for said in members]
    share = float(np.mean(right))
    facts = {"crowd: right": share, "crowd: its standard error": error_of(share, len(fair))}
    if single:
        facts |= {
            "crowd: best single member": max(single),
            "crowd: mean single member": float(np.mean(single)),
        }
    return facts | {"crowd: exact posterior": float(best[fair].mean())}


def error_of(share: float, count: int) -> float:
    """Standard error of a share of so many clips."""
    return (share * (1 - share) / count) ** 0.5


def table(result: Demo, seconds: float) -> Iterator[str]:
    """The closing lines."""
    heads = ("kept", "precision", "recall", "purity", "right kept")
    yield f"{'filter':<24}" + "".join(f"{head:>12}" for head in heads)
    for name, row in result.filters.items():
        shares = (row[key] for key in ("precision", "recall", "purity", "right_kept"))
        yield f"{name:<24}{row['kept']:>12,}" + "".join(f"{share:>12.3f}" for share in shares)
    yield "precision and recall are those of dropping what is not right; those of keeping what is"
    yield "right are purity, the share of kept clips that are right, and right kept"
    for name, value in result.facts.items():
        yield f"{name}: {value:.3f}"
    yield f"{seconds:.0f} s"
