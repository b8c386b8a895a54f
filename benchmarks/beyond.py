"""What comes after supervision, on demo worlds: `python -m benchmarks.beyond`.

From a supervised run of each world go on: GRPO by several rewards, supervision on the best answer
of each group, preferences between the model's own samples, and two controls: hit rate without a
penalty, which rewards long lists, and rewards of other clips. Each is asked about the same held-out
clips as the supervised run, greedily, by samples and by consensus. Beside them stand predictors
that know the exact posterior of the world.

Every finished run is kept in the workdir and written into the result at once: stopped, the same
command goes on, and with `--add` it also keeps runs that only the result has. `--config.key=value`
goes to all runs.
"""

from __future__ import annotations

import argparse
import itertools
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from affectgpt_jax.common.json import read_json, write_json
from affectgpt_jax.data import demo
from affectgpt_jax.evaluation.lexicon import load_lexicon
from affectgpt_jax.evaluation.rewards import Wheels, overlap
from affectgpt_jax.post_training import BEFORE
from benchmarks import harness
from benchmarks.harness import Report
from benchmarks.runner import RunError

# What goes on from a supervised run: the command, and its overrides.
HIT = ("rl.reward=hit", "rl.format_weight=0.0")
VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "GRPO, wheel F": ("reinforce", ()),
    "GRPO, corpus F": ("reinforce", ("rl.reward=wheel_f_corpus",)),
    "GRPO, hit rate, no penalty": (
        "reinforce",
        (*HIT, "rl.length_penalty=0.0", "rl.allow_hacking=True", "rl.stop_kl=0.0"),
    ),
    "GRPO, hit rate, penalty 0.25": (
        "reinforce",
        (*HIT, "rl.length_penalty=0.25", "rl.length_free=0"),
    ),
    "best of 4": ("reinforce", ("rl.method=best",)),
    "DPO, own samples": ("prefer", ("dpo.source=samples",)),
    "DPO, own samples, no likelihood": ("prefer", ("dpo.source=samples", "dpo.nll_weight=0.0")),
    "DPO, no likelihood, a tenth of the rate": (
        "prefer",
        ("dpo.source=samples", "dpo.nll_weight=0.0", "optimizer.learning_rate=4e-5"),
    ),
    "control: rewards of other clips": ("reinforce", ("rl.shuffle_rewards=True",)),
}
LARGEST = 3
# Iterations, after which nothing changes any more.
CORPUS_F_STEPS = 20


# --- what is possible -----------------------------------------------------------------------------


def label_lists() -> tuple[list[tuple[str, ...]], np.ndarray]:
    """Every list of labels that a clip may have, L of them, and P(list | emotion), `[24, L]`."""
    columns, rows = len(demo.VOICE_CUES), len(demo.FACE_CUES)
    lists: dict[tuple[str, ...], int] = {}
    entries = []
    for emotion, word in enumerate(demo.EMOTIONS):
        neighbours = [r for r in (emotion // columns - 1, emotion // columns + 1) if 0 <= r < rows]
        entries.append((emotion, (word,), 1 - demo.COMPANION))
        for row in neighbours:
            pair = (word, demo.EMOTIONS[row * columns + emotion % columns])
            entries.append((emotion, pair, demo.COMPANION / len(neighbours)))
    table = np.zeros((len(demo.EMOTIONS), len(entries)))
    for emotion, labels, share in entries:
        table[emotion, lists.setdefault(labels, len(lists))] += share
    return list(lists), table[:, : len(lists)]


def predictor(
    chosen: np.ndarray, sizes: np.ndarray, pairs: Mapping[str, np.ndarray], belief: np.ndarray
) -> dict[str, float]:
    """Expected scores of a predictor that answers clip i by `chosen[i]`, or by a mixture.

    Args:
        chosen: `[N]` candidates, or their probabilities `[N, C]`.
        sizes: labels of each candidate, `[C]`.
        pairs: of candidates against lists, scored, precision, recall `[C, L, W]`; reward and hit
            `[C, L]`.
        belief: `[N, L]`, of each clip's list.
    """
    if chosen.ndim == 1:
        chosen = np.eye(len(sizes))[chosen]

    share = chosen.T @ belief / len(belief)  # [C, L]

    def expected(name: str) -> np.ndarray:
        return np.tensordot(share, pairs[name], axes=2)

    # Means over the clips whose truth a wheel scores.
    precision, recall = (expected(name) / expected("scored") for name in ("precision", "recall"))
    return {
        "sampled_reward": float(expected("reward")),
        "f": float((2 * precision * recall / (precision + recall)).mean()),
        "p": float(precision.mean()),
        "r": float(recall.mean()),
        "hit": float(expected("hit")),
        "labels": float((chosen @ sizes).mean()),
    }


def ceilings(world: int, clips: int) -> dict[str, dict[str, float]]:
    """Expected scores on a world's first test clips of predictors that know its posterior.

    A candidate is a set of up to `LARGEST` labels.
    """
    wheels = Wheels(load_lexicon())
    lists, given_emotion = label_lists()
    candidates = [
        labels
        for size in range(1, LARGEST + 1)
        for labels in itertools.combinations(demo.EMOTIONS, size)
    ]
    sizes = np.array([len(labels) for labels in candidates])
    grid = list(itertools.product(candidates, lists))
    met = overlap([c for c, _ in grid], [t for _, t in grid], wheels)
    shape = len(candidates), len(lists)
    pairs = {
        "scored": met.scored.reshape(*shape, -1),
        "precision": met.precision.reshape(*shape, -1),
        "recall": met.recall.reshape(*shape, -1),
        "reward": met.mean(met.f).reshape(shape),
        "hit": met.mean(met.hit).reshape(shape),
    }
    seen = demo.seen_by(demo.INPUT_MODES["multi_audio_face_text"])
    evidence = demo.World(world).evidence("test", clips)
    belief = demo.posterior(evidence, seen) @ given_emotion
    value = belief @ pairs["reward"].T
    single = np.flatnonzero(sizes == 1)
    place = {frozenset(labels): number for number, labels in enumerate(candidates)}
    as_written = np.array([place[frozenset(labels)] for labels in lists])
    mixture = np.zeros((len(belief), len(candidates)))
    np.add.at(mixture.T, as_written, belief.T)
    # F of the benchmark is made of mean precision and recall: its gradient says which set to take,
    # and what is taken where it stands.
    chosen = value.argmax(axis=1)
    for _ in range(CORPUS_F_STEPS):
        share = np.zeros((len(candidates), len(lists)))
        np.add.at(share, chosen, belief / len(belief))
        p, r = (
            np.tensordot(share, pairs[name], axes=2) / np.tensordot(share, pairs["scored"], axes=2)
            for name in ("precision", "recall")
        )
        by_p, by_r = 2 * r**2 / (p + r) ** 2, 2 * p**2 / (p + r) ** 2
        part = (pairs["precision"] * by_p + pairs["recall"] * by_r).mean(axis=2)
        chosen = (belief @ part.T).argmax(axis=1)
    found = {
        "samples of the true distribution": mixture,
        "the most probable list": as_written[belief.argmax(axis=1)],
        "the best word": single[value[:, single].argmax(axis=1)],
        "the best set": value.argmax(axis=1),
        "the best sets for F of all clips": chosen,
    }
    return {name: predictor(chosen, sizes, pairs, belief) for name, chosen in found.items()}


# --- runs -----------------------------------------------------------------------------------------


def start(command: str, workdir: Path, flags: Sequence[str]) -> dict[str, Any]:
    """What a finished run holds, after it was run if need be.

    Raises:
        RunError: it failed, or what is there was asked for with other flags.
    """
    file, asked = workdir / "result.json", workdir / "flags.json"
    if asked.is_file() and (other := {*read_json(asked, list[str])} ^ {*flags}):
        raise RunError(
            f"{workdir} holds a run of other flags ({', '.join(sorted(other))}); ask for the same, "
            "or name another --workdir"
        )
    if not file.is_file():
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(asked, list(flags))
        log = workdir / "log.txt"
        with log.open("ab") as out:
            words = [sys.executable, "-m", f"affectgpt_jax.{command}", f"--workdir={workdir}"]
            status = subprocess.run([*words, *flags], stdout=out, stderr=out, check=False)
        if status.returncode or not file.is_file():
            raise RunError(f"{workdir}: {command} ended with status {status.returncode}; see {log}")
    return read_json(file, dict[str, Any])


def cells(args: argparse.Namespace) -> list[tuple[int, str]]:
    """What to run, as world and variant: first what runs on several worlds."""
    first, *others = args.worlds
    elsewhere = [name for name in args.elsewhere if others]
    shared = [(world, name) for name in elsewhere for world in args.worlds]
    return shared + [(first, name) for name in args.variants if name not in elsewhere]


def ended_by_kl(result: Mapping[str, Any]) -> bool:
    """Whether a run has stopped before its last step, since it was too far from its start."""
    return result.get("ended_by") == "stop_kl"


def go_on(args: argparse.Namespace, world: int, name: str) -> dict[str, Any]:
    """The result of a variant on a world, from that world's supervised run.

    Raises:
        RunError: one of both failed, or what the workdir holds is of other sizes.
    """
    folder, overrides = Path(args.workdir) / f"world{world}", list(args.overrides)
    start("train", folder / "sft", [f"--config.demo_seed={world}", *overrides])
    command, changes = VARIANTS[name]
    section = "rl" if command == "reinforce" else "dpo"
    workdir = folder / re.sub(r"\W+", "-", name)
    # All start from one model, whose answers are asked once.
    answers = workdir / BEFORE
    asked = next(iter(sorted(folder.glob(f"*/{BEFORE}"))), None)
    if asked and not workdir.exists():
        workdir.mkdir()
        shutil.copyfile(asked, answers)
    keys = [f"{section}.test_clips={args.clips}", f"steps={args.steps}"]
    keys += [f"checkpoint_every={args.steps}", *changes]
    flags = [f"--from={folder / 'sft'}", *(f"--config.{key}" for key in keys), *overrides]
    result = start(command, workdir, flags)
    found = {key: result[key] for key in ("steps", "clips")}
    as_asked = found["steps"] == args.steps or ended_by_kl(result)
    if not as_asked or found["clips"] != args.clips:
        raise RunError(
            f"{workdir} holds a run of {found['steps']} steps, asked about {found['clips']} clips, "
            f"not of --steps={args.steps} and --clips={args.clips}; ask for the same, or name "
            "another --workdir"
        )
    return {key: value for key, value in result.items() if key not in ("start", "time_s")}


def run(args: argparse.Namespace) -> Report:
    """All that is asked for; the report is written after every run.

    Raises:
        RunError: a run failed, or the file has runs of other sizes.
    """
    path = args.out or harness.RESULTS / "beyond.json"
    sizes = {"steps": args.steps, "clips": args.clips}
    kept = harness.load(path) if args.add and path.is_file() else {**sizes, "worlds": []}
    if other := [f"{key}={kept[key]}" for key in sizes if kept[key] != sizes[key]]:
        raise RunError(f"{path} has runs of {', '.join(other)}; ask for the same, or leave --add")
    worlds = {found["world"]: found for found in kept["worlds"]}
    for world, name in cells(args):
        if name in worlds.get(world, {}).get("runs", {}):
            continue
        result = go_on(args, world, name)
        if world not in worlds:
            worlds[world] = {"world": world, "runs": {}, "ceilings": ceilings(world, args.clips)}
        worlds[world]["runs"][name] = result
        about = {"command": harness.command("beyond", args.words), **harness.describe()}
        report = {**sizes, "worlds": [worlds[world] for world in sorted(worlds)]}
        harness.save({"environment": about, **report}, path)
    return {**sizes, "worlds": [worlds[world] for world in sorted(worlds)]}


def with_interval(value: float, interval: Sequence[float]) -> str:
    return f"{value:+.3f} ({interval[0]:+.3f} to {interval[1]:+.3f})"


def row(name: str, found: Mapping[str, float], gains: Mapping[str, Any] | None = None) -> list[str]:
    """A line of the table; a gain is against the supervised run, on the same clips."""

    def cell(key: str) -> str:
        return f"{found[key]:.3f}" if key in found else ""

    changed = [
        with_interval(gains[f"{key}_gain"], gains[f"{key}_gain_interval"]) if gains else ""
        for key in ("sampled_reward", "greedy_f", "consensus_f")
    ]
    labels = found.get("labels_per_clip", found.get("labels", 0.0))
    steps = ""
    if gains:
        steps = f"{gains['steps']}, ended by KL" if ended_by_kl(gains) else str(gains["steps"])
    scores = [cell("sampled_reward"), changed[0], cell("greedy_f") or cell("f"), changed[1]]
    rates = [cell(f"greedy_{rate}") or cell(rate) for rate in ("p", "r", "hit")]
    cut = f"{found['cut']:.1%}" if "cut" in found else ""
    return [name, steps, *scores, *rates, cell("consensus_f"), changed[2], f"{labels:.2f}", cut]


HEADER = ("", "steps", "reward of a sample", "gain", "greedy F", "gain", "P", "R", "hit")
HEADER += ("consensus F", "gain", "labels", "samples cut")
OVER_GREEDY = "consensus_over_greedy_f"


def table(report: Report) -> str:
    """A Markdown table for each world, and what consensus alone gains there."""
    parts = []
    for world in report["worlds"]:
        runs = world["runs"]
        before = next(iter(runs.values()))["before"]
        rows = [row("supervised", before)]
        rows += [row(name, runs[name]["after"], runs[name]) for name in VARIANTS if name in runs]
        rows += [row(f"*{name}*", found) for name, found in world["ceilings"].items()]
        title = f"World {world['world']}, {report['clips']:,} held-out clips"
        parts.append(f"{title}:\n\n{harness.markdown(HEADER, rows)}")
        if OVER_GREEDY in before:
            gain = with_interval(before[OVER_GREEDY], before[f"{OVER_GREEDY}_interval"])
            parts.append(f"Supervised, consensus F over greedy F: {gain}.")
    return "\n\n".join(parts)


def flags(add: Callable[..., Any]) -> None:
    add("--worlds", type=int, nargs="+", default=[0, 1, 2])
    every = ", ".join(VARIANTS)
    add(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=list(VARIANTS),
        metavar="NAME",
        help=f"on the first world; default: all, which are {every}",
    )
    add(
        "--elsewhere",
        nargs="+",
        choices=VARIANTS,
        default=["GRPO, wheel F"],
        metavar="NAME",
        help="on all worlds; default: GRPO, wheel F",
    )
    add("--steps", type=int, default=200, help="of each, at the most; default: 200")
    add("--clips", type=int, default=2048, help="held-out clips that are asked; default: 2048")
    add("--workdir", default="runs/beyond", help="default: runs/beyond")
    add("--add", action="store_true", help="keep the runs that the file has")


COMMAND = harness.Measurement(
    "beyond", run, harness.each(table), lambda args: "beyond", flags, overrides=True
)

if __name__ == "__main__":
    COMMAND.main()
