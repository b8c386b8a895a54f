"""Which settings of GRPO serve: `python -m benchmarks.settings`.

From the supervised run of a demo world, GRPO as it is by default and with one setting after the
other changed. All are asked about the world's validation clips, so that the test clips, about which
`benchmarks.beyond` asks, have no part in the choice. A difference between a setting and the default
is one between answers about the same clips, with a 95 % paired bootstrap interval.

Every finished run is kept in the workdir: stopped, the same command goes on. `--config.key=value`
goes to all runs.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from affectgpt_jax import outcomes
from affectgpt_jax.common.json import read_json
from affectgpt_jax.data.records import RecordDataset
from affectgpt_jax.evaluation.lexicon import load_lexicon
from affectgpt_jax.evaluation.rewards import Reward, Wheels
from affectgpt_jax.post_training import after_file
from affectgpt_jax.rollouts import scorable, truths
from benchmarks import harness
from benchmarks.beyond import ended_by_kl, start, with_interval
from benchmarks.harness import Report, at_least

DEFAULT = "the default"
QUESTION = "ovlabel"
# What differs from the default settings of `configs.affectgpt_qwen25_7b.reinforcement`.
SETTINGS: dict[str, tuple[str, ...]] = {
    DEFAULT: (),
    "learning rate halved": ("optimizer.learning_rate=2e-4",),
    "learning rate doubled": ("optimizer.learning_rate=8e-4",),
    "half as many prompts": ("rl.prompts=32",),
    "half as many prompts, 8 answers": ("rl.prompts=32", "rl.group=8"),
    "advantages by the group's deviation": ("rl.scale=group",),
    "mean over each answer first": ("rl.loss=answers",),
    "two updates of a rollout": ("rl.updates=2",),
    "held to the start (beta 0.04)": ("rl.beta=0.04",),
    "labels are free": ("rl.length_penalty=0.0",),
    "cut answers are trained on": ("rl.mask_cut=False",),
}
SAMPLES = 16  # of a clip: few clips, so many samples


def validation_clips(args: argparse.Namespace) -> Path:
    """Where the supervised run has written the world's validation clips."""
    return Path(args.workdir) / f"world{args.world}" / "sft" / "data" / f"demo-{args.world}-val"


def go_on(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """The result of one setting; its "test" clips are the world's validation clips.

    Raises:
        RunError: a run failed.
    """
    folder, overrides = Path(args.workdir) / f"world{args.world}", list(args.overrides)
    start("train", folder / "sft", [f"--config.demo_seed={args.world}", *overrides])
    workdir = folder / re.sub(r"\W+", "-", name)
    keys = [f"data.test={validation_clips(args)}", f"rl.test_samples={SAMPLES}"]
    keys += [f"steps={args.steps}", *SETTINGS[name]]
    flags = [f"--from={folder / 'sft'}", *(f"--config.{key}" for key in keys), *overrides]
    found = start("reinforce", workdir, flags)
    content = read_json(workdir / after_file(found["best_step"]), dict[str, Any])["content"]
    return {**found, "answers": content}


def run(args: argparse.Namespace) -> Report:
    """All settings that are asked for, each beside the default.

    Raises:
        RunError: a run failed.
    """
    names = [DEFAULT, *(name for name in args.settings if name != DEFAULT)]
    lexicon = load_lexicon()
    rows: list[dict[str, Any]] = []
    usual = None
    for name in names:
        result = go_on(args, name)
        if usual is None:
            clips = RecordDataset(validation_clips(args))
            reward = Reward("wheel_f", Wheels(lexicon))
            clips = scorable(clips, reward, QUESTION, result["clips"], "config.data.val")
            truth = truths(clips, QUESTION, "config.data.val")
        asked = outcomes.outcome(result["answers"], truth, QUESTION, lexicon, SAMPLES)
        usual = usual or asked
        rows.append(
            {
                "setting": name,
                "changes": list(SETTINGS[name]),
                "over_default": outcomes.gains(usual, asked, args.world),
                **{key: value for key, value in result.items() if key not in ("answers", "start")},
            }
        )
        print(f"{name}: {_gain('sampled_reward')(rows[-1])}", flush=True)
    return {"world": args.world, "steps": args.steps, "clips": rows[0]["clips"], "rows": rows}


def _gain(of: str) -> Callable[[Mapping[str, Any]], str]:
    """A cell of what is gained, with its interval."""
    return lambda row: with_interval(row[f"{of}_gain"], row[f"{of}_gain_interval"])


def _over_default(row: Mapping[str, Any]) -> str:
    return "" if row["setting"] == DEFAULT else _gain("sampled_reward")(row["over_default"])


COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "one setting changed": lambda row: row["setting"],
    "config": lambda row: ", ".join(f"`{change}`" for change in row["changes"]),
    "steps": lambda row: f"{row['steps']}{', ended by KL' if ended_by_kl(row) else ''}",
    "reward of a sample, over the start": _gain("sampled_reward"),
    "over the default": _over_default,
    "greedy F, over the start": _gain("greedy_f"),
    "consensus F": lambda row: f"{row['after']['consensus_f']:.3f}",
    "labels": lambda row: f"{row['after']['sampled_labels_per_clip']:.2f}",
}


def table(report: Report) -> str:
    """A Markdown table of the settings."""
    before = report["rows"][0]["before"]
    told = (
        f"World {report['world']}, {report['clips']} validation clips, {SAMPLES} samples of each. "
        f"The start has {before['sampled_reward']:.3f} a sample, a greedy F of "
        f"{before['greedy_f']:.3f} and a consensus F of {before['consensus_f']:.3f}."
    )
    return f"{harness.columns(COLUMNS, report['rows'])}\n\n{told}"


def flags(add: Callable[..., Any]) -> None:
    add("--world", type=at_least(0), default=0, help="default: 0")
    every = ", ".join(SETTINGS)
    add(
        "--settings",
        nargs="+",
        choices=SETTINGS,
        default=list(SETTINGS),
        metavar="NAME",
        help=f"beside the default; all are {every}",
    )
    add("--steps", type=at_least(1), default=150, help="of each, at the most; default: 150")
    add("--workdir", default="runs/settings", help="default: runs/settings")


COMMAND = harness.Measurement(
    "settings", run, harness.each(table), lambda args: "settings", flags, overrides=True
)

if __name__ == "__main__":
    COMMAND.main()
