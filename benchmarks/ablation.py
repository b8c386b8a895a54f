"""The paper's ablations on the demo world: `python -m benchmarks.ablation --table 5 6 8`.

Trains every variant of Table 5 (pre-fusion), 6 (inputs) and 8 (LoRA rank, alpha 32 at every rank)
on several worlds, each with its own training seed, as processes of the training command, and sets
the hit rate beside the best that the variant's inputs allow (its ceiling) and beside the paper's
figure. A variant that stands in several tables is trained once. Started again, it goes on where it
stopped: runs live in `--workdir`, and `--config.key=value` goes to all of them.

Writes `ablation_tableN.json`, `.md` and `.png` into `benchmarks/results/`; `--show` prints the
table of such a JSON file.
"""

from __future__ import annotations

import math
import re
import signal
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from affectgpt_jax.cli import exit_on_error, make_parser
from affectgpt_jax.data.modalities import INPUT_MODES
from benchmarks import harness
from benchmarks.harness import Report, at_least
from benchmarks.runner import Outcome, Run, RunError, train_all


class Variant(NamedTuple):
    """What the tables vary; the defaults are the paper's recipe."""

    fusion: str = "attention"
    input: str = "multi_audio_face_text"
    rank: int = 16  # 0 is no LoRA

    @property
    def name(self) -> str:
        return f"{self.fusion}-{self.input}-rank{self.rank}"

    @property
    def flags(self) -> tuple[str, ...]:
        return (
            f"--config.fusion={self.fusion}",
            f"--config.input={self.input}",
            f"--config.lora.rank={self.rank}",
        )

    @property
    def mode(self) -> str:
        """The input mode whose ceiling is the variant's."""
        mode = INPUT_MODES[self.input]
        return (mode.without_pre_fusion() if self.fusion == "none" else mode).name


class Row(NamedTuple):
    """A variant as a table shows it, with the paper's score, MER-UniBench's mean in percent."""

    label: str
    variant: Variant
    published: float


class Table(NamedTuple):
    """One of the paper's tables: what it varies, and its rows."""

    varies: str
    rows: tuple[Row, ...]


# The scores are those of Tables 5, 6 and 8 of arXiv 2501.16566.
TABLES = {
    5: Table(
        "pre-fusion",
        (
            Row("none", Variant(fusion="none"), 72.95),
            Row("Q-Former", Variant(fusion="qformer"), 74.16),
            Row("attention", Variant(), 74.77),
        ),
    ),
    6: Table(
        "input",
        (
            Row("audio", Variant(input="audio"), 60.08),
            Row("face", Variant(input="face"), 60.47),
            Row("frame", Variant(input="frame"), 59.47),
            Row("text", Variant(input="text"), 67.44),
            Row("audio + face + text", Variant(), 74.77),
            Row("audio + frame + text", Variant(input="multi_audio_frame_text"), 73.39),
            Row("audio + face + frame + text", Variant(input="multi_audio_face_frame_text"), 74.60),
        ),
    ),
    8: Table(
        "LoRA rank",
        (
            Row("none", Variant(rank=0), 73.30),
            Row("8", Variant(rank=8), 74.65),
            Row("16", Variant(), 74.77),
            Row("32", Variant(rank=32), 74.92),
        ),
    ),
}
DEFAULT = Variant()
# What all runs have in common, so that results stay comparable when the demo's own length changes.
LENGTH = ("--config.steps=300", "--config.batch_size=64", "--config.checkpoint_every=60")
VARIED = ("fusion", "input", "lora.rank", "lora.alpha", "seed", "demo_seed")

Key = tuple[Variant, int]  # a variant and a seed


def plan(
    tables: Sequence[int], seeds: Sequence[int], workdir: Path, overrides: Sequence[str] = ()
) -> dict[Key, Run]:
    """The runs that some tables need, each once; seed by seed, so that variants grow alike.

    Raises:
        RunError: an override of what the tables vary.
    """
    for flag in overrides:
        key = re.sub(r"^--?config\.|=.*", "", flag)
        if key in VARIED:
            raise RunError(f"{flag}: the tables vary or fix config.{key}; leave it out")
    variants = dict.fromkeys(row.variant for table in tables for row in TABLES[table].rows)
    return {
        (variant, seed): Run(
            f"{variant.name}, seed {seed}",
            workdir / f"{variant.name}-seed{seed}",
            (
                *variant.flags,
                *LENGTH,
                f"--config.seed={seed}",
                f"--config.demo_seed={seed}",
                *overrides,
            ),
        )
        for seed in dict.fromkeys(seeds)
        for variant in variants
    }


def t_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean of a normal sample, and half the width of its 95 % interval by Student's t.

    The half is None for a single value, which tells nothing of the spread.
    """
    from scipy.stats import t  # takes a second to import

    mean, n = statistics.fmean(values), len(values)
    if n == 1:
        return mean, None
    return mean, float(t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)


def summarise(number: int, outcomes: Mapping[Key, Outcome]) -> dict[str, Any]:
    """What a table's report says of its runs.

    The statistics of a row are over the seeds whose run was scored: `hit`, `share` (of the ceiling)
    and `difference` (to the default variant, seed by seed) are pairs of a mean and half of its
    interval; where there is nothing to average they are None. `failed` names the other runs.
    """
    table = TABLES[number]
    ours = {key: o for key, o in outcomes.items() if key[0] in {r.variant for r in table.rows}}
    scores: dict[Key, tuple[float, float]] = {}
    failed: dict[str, str] = {}
    for (variant, seed), (result, error) in ours.items():
        ceiling = (result or {}).get("ceilings", {}).get(variant.mode)
        if ceiling is None:
            failed[f"{variant.name}, seed {seed}"] = error or "it was not scored on a demo world"
        else:
            scores[variant, seed] = (result["hit"], ceiling)
    rows = []
    for row in table.rows:
        found = {seed: score for (variant, seed), score in scores.items() if variant == row.variant}
        differences = [
            hit - scores[DEFAULT, seed][0]
            for seed, (hit, _) in found.items()
            if row.variant != DEFAULT and (DEFAULT, seed) in scores
        ]
        rows.append(
            {
                "label": row.label,
                **row.variant._asdict(),
                "published": row.published,
                "hits": {str(seed): hit for seed, (hit, _) in found.items()},
                "hit": t_interval([hit for hit, _ in found.values()]) if found else None,
                "ceiling": statistics.fmean(c for _, c in found.values()) if found else None,
                "share": t_interval([hit / c for hit, c in found.values()]) if found else None,
                "difference": t_interval(differences) if differences else None,
            }
        )
    runs = [
        {**variant._asdict(), "seed": seed, **outcome.result}
        for (variant, seed), outcome in ours.items()
        if outcome.result is not None
    ]
    times = [run["process_wall_s"] for run in runs if run["process_wall_s"] is not None]
    return {
        "table": number,
        "varies": table.varies,
        "rows": rows,
        "failed": failed,
        "process_wall_s": times and [statistics.median(times), min(times), max(times)],
        "runs": runs,
    }


COLUMNS = {
    "hit rate": lambda row: _plus_minus(row["hit"], "{:.3f}"),
    "ceiling": lambda row: "-" if row["ceiling"] is None else f"{row['ceiling']:.3f}",
    "share of the ceiling": lambda row: _plus_minus(row["share"], "{:.1%}"),
    "against the default": lambda row: (
        "the default"
        if Variant(row["fusion"], row["input"], row["rank"]) == DEFAULT
        else _plus_minus(row["difference"], "{:+.3f}")
    ),
    "worlds": lambda row: str(len(row["hits"])),
    "paper": lambda row: f"{row['published']:.2f}",
}


def markdown(report: Report) -> str:
    """A report's table, and what its numbers mean."""
    table = harness.columns({report["varies"]: lambda row: row["label"], **COLUMNS}, report["rows"])
    meaning = (
        "Means over worlds, each with its own training seed; +- is half of a mean's 95 % interval "
        "by Student's t (of three worlds: 4.30 standard errors). The difference to the default is "
        "taken world by world. The ceiling is the hit rate of the best predictor that sees the "
        f"same inputs. The paper's figure, from its Table {report['table']}, is the mean score on "
        "the nine sets of MER-UniBench, in percent: the order of the rows can be compared, their "
        "distances not."
    )
    failed = [f"Failed: {name}: {error}" for name, error in report["failed"].items()]
    return "\n\n".join([table, meaning, *failed])


def in_words(process_wall_s: Sequence[float], jobs: int) -> str:
    """How long runs took: the median, the shortest and the longest, as a report has them."""
    if not process_wall_s:
        return "No run was timed from start to end."
    median, shortest, longest = process_wall_s
    return f"A run took {median:.0f} s ({shortest:.0f} to {longest:.0f}), {jobs} at a time."


def _plus_minus(pair: Sequence[float | None] | None, form: str) -> str:
    if pair is None:
        return "-"
    mean, half = pair
    if half is None:
        return form.format(mean)
    return f"{form.format(mean)} +- {form.replace('+', '').format(half)}"


def plot(report: Mapping[str, Any], png: Path) -> None:
    """Draw a report: hit rates with intervals and ceilings, and the paper's figures beside them."""
    # Without pyplot no display and no global figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = list(enumerate(report["rows"]))
    figure = Figure(figsize=(10, 1.7 + 0.5 * len(rows)), layout="constrained")
    ours, paper = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    scored = [(place, row) for place, row in rows if row["hit"] is not None]
    if scored:
        places = [place for place, _ in scored]
        means, halves = zip(*(row["hit"] for _, row in scored), strict=True)
        halves = [math.nan if half is None else half for half in halves]
        worlds = [(hit, place + 0.2) for place, row in scored for hit in row["hits"].values()]
        bars = {"fmt": "D", "color": "tab:blue", "markersize": 6, "capsize": 4}
        ours.errorbar(means, places, xerr=halves, label="mean and its 95 % interval", **bars)
        ours.plot(*zip(*worlds), "o", color="tab:blue", alpha=0.4, markersize=4, label="one world")
        ceilings = [row["ceiling"] for _, row in scored]
        tick = {"markersize": 12, "markeredgewidth": 2, "linestyle": "none", "color": "black"}
        ours.plot(ceilings, places, "|", label="ceiling", **tick)
        _annotate(ours, means, places, "{:.3f}")
        figure.legend(loc="outside lower left", ncols=3, frameon=False, fontsize=9)
    published = [row["published"] for _, row in rows]
    paper.plot(published, range(len(rows)), "s", color="tab:orange", markersize=6)
    _annotate(paper, published, range(len(rows)), "{:.2f}")
    ours.set_yticks(range(len(rows)), [row["label"] for _, row in rows])
    ours.set_ylim(len(rows) - 0.5, -0.7)
    ours.set_title(f"demo world: hit rate, by {report['varies']}", fontsize=11)
    paper.set_title(f"paper, Table {report['table']}: MER-UniBench, %", fontsize=11)
    for axes in (ours, paper):
        axes.margins(x=0.15)
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    FigureCanvasAgg(figure).print_png(png)


def _annotate(axes: Any, values: Iterable[float], places: Iterable[int], form: str) -> None:
    above = {"textcoords": "offset points", "ha": "center", "fontsize": 8}
    for value, place in zip(values, places, strict=True):
        axes.annotate(form.format(value), (value, place), (0, 7), **above)


def write(report: Report, folder: Path) -> None:
    """Write a report as JSON, Markdown and a picture."""
    stem = folder / f"ablation_table{report['table']}"
    harness.save(report, stem.with_suffix(".json"))
    about, times = report["environment"], report["process_wall_s"]
    text = (
        f"# Table {report['table']}: {report['varies']}\n\n{markdown(report)}\n\n"
        f"`{about['command']}`, {about['cpu_cores']} cores of {about['cpu']}, "
        f"jax {about['versions']['jax']}. {in_words(times, report['jobs'])}\n"
    )
    stem.with_suffix(".md").write_text(text, encoding="utf-8")
    plot(report, stem.with_suffix(".png"))


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; ends with status 1 where a run gave no score."""
    with exit_on_error(interrupted="stopped; the same command goes on"):
        _main(argv)


def _main(argv: Sequence[str] | None) -> None:
    parser = make_parser("python -m benchmarks.ablation", __doc__)
    add = parser.add_argument
    add("--table", type=int, nargs="+", choices=TABLES, default=list(TABLES))
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--jobs", type=at_least(1), default=harness.cores(), help="runs at a time")
    add("--workdir", type=Path, default=Path("runs/ablation"))
    add("--out", type=Path, default=harness.RESULTS, help="folder of the reports")
    add("--show", type=Path, help="print the table of a JSON report and stop")
    args, overrides = parser.parse_known_args(argv)
    if args.show:
        print(markdown(harness.load(args.show)))
        return
    runs = plan(args.table, args.seeds, args.workdir, overrides)
    outcomes = dict(zip(runs, train_all(list(runs.values()), args.jobs, _say)))
    failed: dict[str, str] = {}
    for number in args.table:
        words = ["--table", number, "--seeds", *args.seeds, *overrides]
        command = harness.command("ablation", [str(word) for word in words])
        about = {"command": command, **harness.describe()}
        report = {"environment": about, "jobs": args.jobs, **summarise(number, outcomes)}
        write(report, args.out)
        print(f"\nTable {number}: {report['varies']}\n\n{markdown(report)}")
        print(f"\n{in_words(report['process_wall_s'], args.jobs)}")
        failed |= report["failed"]
    if failed:
        sys.exit(f"error: {len(failed)} of {len(runs)} runs gave no score; run this again to retry")


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    # As by Ctrl-C, so that no run is left behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main()
