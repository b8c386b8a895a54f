"""Training sets of demo worlds for the ablations of Tables 3 and 4 and Figure 4.

The sets of Table 4 are what the **real** stages of `data_prep.caption` make of a world's described
clips: crowd, speaker check, lengths, agreement. `random` is as many clips as pass all of them,
drawn from all, and `oracle` those whose description is right: they tell quality from quantity.
Clips whose description names no emotion are in no set, since the question is for emotions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from affectgpt_jax.common.json import read_json, write_json
from affectgpt_jax.data import demo as worlds
from affectgpt_jax.data import demo_captions
from affectgpt_jax.data.demo_captions import Captions, Rates
from affectgpt_jax.data.records import MANIFEST_FILE, Record, write_records
from affectgpt_jax.evaluation.lexicon import load_lexicon
from data_prep.caption import demo, filtering
from data_prep.caption.settings import read_settings

CLIPS = worlds.SIZES["train"]
SPLITS = ("train", "val", "test")
# Table 4: the filters of the demo by the name of the set.
FILTERED = {
    "raw": "none",
    "raw-low": "low",
    "raw-low-e": "low+emotion",
    "raw-low-s": "low+sentiment",
    "raw-plus": "low+emotion+sentiment",
}
# Table 3: what is wrong in sets that others made, and the share of the clips that they have.
OTHERS = {
    "human-short": (Rates(0, 0, 0, 0, 0), 1 / 3),
    "coarse": (Rates(0.45, 0.5, 0, 0, 0), 1 / 2),
    "fine": (Rates(0.05, 0, 0, 0, 0), 1 / 8),
}
# Figure 4: worse encoders, by feature how many times noisier.
NOISES = {f"{f}-x{n}": {f: float(n)} for f in ("face", "audio") for n in (2, 4, 8, 32)}
_FACTS = "sets.json"


def prepare(
    folder: Path, seed: int, names: Sequence[str], say: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Write the named sets of a world where they are not there yet.

    Args:
        folder: of the world; a set is the record directory `folder/sets/NAME`.
        seed: of the world.
        names: of `FILTERED`, `OTHERS`, "random", "oracle" or `NOISES`.
        say: told what takes long.

    Returns:
        By set: `clips`, `purity` (the share that is right) where it is known, and for those of
        `NOISES` their `ceilings`.
    """
    path = folder / _FACTS
    facts = read_json(path, dict[str, dict[str, Any]]) if path.exists() else {}
    missing = [name for name in names if name not in facts]
    if any(name in FILTERED or name in ("random", "oracle") for name in missing):
        facts |= _filtered_sets(folder, seed, say)
    for name in missing:
        if name in OTHERS:
            rates, share = OTHERS[name]
            world = worlds.World(seed)
            captions = demo_captions.draw_captions(world, CLIPS, rates)
            chosen = range(round(share * CLIPS))
            labels = {i: captions.labels[i] for i in chosen}
            if name == "human-short":  # one label a clip, of a description of one cue
                labels = {i: words[:1] for i, words in labels.items()}
            facts[name] = _write(folder, name, world, captions, labels)
        elif name in NOISES:
            facts[name] = _noisy_world(folder, name, seed, say)
    write_json(path, facts)
    return {name: facts[name] for name in names}


def flags(folder: Path, name: str) -> tuple[str, ...]:
    """The keys of a config that trains on a set; validation and test are clean clips."""
    place = folder / "sets" / name
    if name in NOISES:
        return tuple(f"--config.data.{split}={place / split}" for split in SPLITS)
    return (f"--config.data.train={place}",)


def _filtered_sets(
    folder: Path, seed: int, say: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """All sets of Table 4, and the controls."""
    out = folder / "captions"
    result = demo.build(out, seed, clips=CLIPS, say=say)
    captions, world = result.captions, worlds.World(seed)
    settings = read_settings(out)
    data = filtering.read_data_set(out, out / "clips.csv", settings)
    judged = filtering.judge(data, settings, load_lexicon())
    numbers = {name: i for i, name in enumerate(captions.names)}
    named = {numbers[name]: row.labels for name, row in data.labels.items() if row.labels}
    sets = {
        name: {numbers[clip] for clip in filtering.kept_names(judged, demo.FILTERS[levels])}
        for name, levels in FILTERED.items()
    }
    rng = np.random.default_rng([seed, 5])
    size = len(sets["raw-plus"] & named.keys())
    sets["random"] = set(rng.choice(sorted(named), size=size, replace=False).tolist())
    sets["oracle"] = set(np.flatnonzero(captions.pure).tolist())
    facts = {}
    for name, chosen in sets.items():
        say(f"writing the set {name}")
        labels = {i: named[i] for i in sorted(chosen & named.keys())}
        facts[name] = _write(folder, name, world, captions, labels)
    return facts


def _write(
    folder: Path,
    name: str,
    world: worlds.World,
    captions: Captions,
    labels: Mapping[int, tuple[str, ...]],
) -> dict[str, Any]:
    """Records of clips with the labels that they are trained on; returns what is known of them."""
    place = folder / "sets" / name

    def records() -> Iterator[Record]:
        drawn = world.features(captions.clips, "captions")
        for i, found in enumerate(drawn):
            if i in labels:
                told = f"{captions.video[i]} {captions.audio[i]} They feel {labels[i][0]}."
                yield Record(
                    name=captions.names[i],
                    features=found,
                    subtitle=captions.clips.subtitles[i],
                    # Without the asides, which the demo's prompts have no room for.
                    description=told,
                    labels=labels[i],
                    source="demo",
                )

    if not (place / MANIFEST_FILE).exists():
        encoders = dict.fromkeys(worlds.DEFAULT_FEATURES, f"demo world, seed {world.seed}")
        write_records(place, records(), encoders=encoders, split="train")
    return {"clips": len(labels), "purity": float(captions.pure[list(labels)].mean())}


def _noisy_world(folder: Path, name: str, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """All splits of a world that a worse encoder sees, and the ceilings that are left."""
    world = worlds.World(seed, NOISES[name])
    encoders = dict.fromkeys(worlds.DEFAULT_FEATURES, f"demo world, seed {seed}, {name}")
    for split in SPLITS:
        place = folder / "sets" / name / split
        if not (place / MANIFEST_FILE).exists():
            say(f"writing {place}")
            write_records(place, world.records(split), encoders=encoders)
    evidence = world.evidence("test")
    return {"clips": CLIPS, "purity": 1.0, "ceilings": worlds.ceilings(evidence)}
