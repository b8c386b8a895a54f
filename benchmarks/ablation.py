"""The paper's ablations on demo worlds: `python -m benchmarks.ablation --table 3 4 5 6 8 fig4`.

Trains every variant of Table 5 (pre-fusion), 6 (inputs) and 8 (LoRA rank, alpha 32 at every rank)
on several worlds, each with its own training seed, as processes of the training command, and sets
the hit rate beside the best that the variant's inputs allow (its ceiling) and beside the paper's
figure. A variant that stands in several tables is trained once. Started again, it goes on where it
stopped: runs live in `--workdir`, and `--config.key=value` goes to all of them.

Tables 3 and 4 vary the training set, and Figure 4 the encoders (`training_sets`). Their runs are
asked twice: greedily as the others, and sampled as the paper does, at temperature 1 and top-p 0.9.
A model whose labels are wrong in part gives wrong answers about as often when it is sampled, which
its greedy answers hide. The row "untrained" is what the base answers with fresh adapters and heads.

Writes `ablation_tableN.json`, `.md` and `.png` into `benchmarks/results/`; `--show` prints the
table of such a JSON file.
"""

from __future__ import annotations

import math
import re
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from affectgpt_jax.cli import exit_on_error, make_parser
from affectgpt_jax.common import drawing
from affectgpt_jax.common.errors import ReadError
from affectgpt_jax.common.json import read_json
from affectgpt_jax.data.modalities import INPUT_MODES
from benchmarks import harness, training_sets
from benchmarks.harness import Report, at_least
from benchmarks.runner import Outcome, Run, RunError, train_all

# In place of a training set: adapters and heads stay as they are drawn.
UNTRAINED = "untrained"


class Variant(NamedTuple):
    """What the tables vary; the defaults are the paper's recipe."""

    fusion: str = "attention"
    input: str = "multi_audio_face_text"
    rank: int = 16  # 0 is no LoRA
    data: str = "demo"  # else a set of `training_sets`, or UNTRAINED

    @property
    def name(self) -> str:
        data = "" if self.data == "demo" else f"-{self.data}"
        return f"{self.fusion}-{self.input}-rank{self.rank}{data}"

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
    published: float | None


class Table(NamedTuple):
    """One of the paper's tables: what it varies, its rows, and the one that others are compared to.

    `sampled` says whether answers are sampled, too.
    """

    varies: str
    rows: tuple[Row, ...]
    reference: Variant = Variant()
    sampled: bool = False


RAW = Variant(data="raw")
FRESH = Row("untrained", Variant(data=UNTRAINED), None)
# The scores are those of the tables of arXiv 2501.16566. Rows without one are controls that the
# paper does not have. Its general sets (Table 3) never train the question that is scored.
TABLES: dict[int | str, Table] = {
    3: Table(
        "training set",
        (
            Row("short descriptions by people (as MAFW)", Variant(data="human-short"), 58.16),
            Row("half wrong (as MERR-Coarse)", Variant(data="coarse"), 49.85),
            Row("few and right (as MERR-Fine)", Variant(data="fine"), 64.55),
            Row("described, no filter (MER-Caption)", RAW, 68.91),
            Row("described and filtered (MER-Caption+)", Variant(data="raw-plus"), 74.77),
            FRESH,
        ),
        RAW,
        sampled=True,
    ),
    4: Table(
        "filter",
        (
            Row("none", RAW, 68.91),
            Row("low", Variant(data="raw-low"), 69.54),
            Row("low + emotion", Variant(data="raw-low-e"), 73.78),
            Row("low + sentiment", Variant(data="raw-low-s"), 74.05),
            Row("low + emotion + sentiment", Variant(data="raw-plus"), 74.77),
            Row("as many, at random", Variant(data="random"), None),
            Row("all that are right (oracle)", Variant(data="oracle"), None),
            FRESH,
        ),
        RAW,
        sampled=True,
    ),
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
    "fig4": Table(
        "encoder",
        (
            Row("as they are", Variant(), 74.77),
            *(Row(f"noisier: {name}", Variant(data=name), None) for name in training_sets.NOISES),
        ),
        sampled=True,
    ),
}
DEFAULT = Variant()
# Those that take minutes; the others make worlds and crowds first.
QUICK = (5, 6, 8)
# As the paper decodes.
SAMPLING = ("--temperature=1", "--top-p=0.9")
# What all runs have in common, so that results stay comparable when the demo's own length changes.
LENGTH = ("--config.steps=300", "--config.batch_size=64", "--config.checkpoint_every=60")
# One update that changes nothing; after all other flags.
NO_TRAINING = tuple(
    f"--config.{key}"
    for key in ("steps=1", "optimizer.learning_rate=0.0", "optimizer.final_learning_rate=0.0")
)
VARIED = ("fusion", "input", "lora.rank", "lora.alpha", "seed", "demo_seed", "data.train")

Key = tuple[Variant, int]  # a variant and a seed


def plan(
    tables: Sequence[int | str],
    seeds: Sequence[int],
    workdir: Path,
    overrides: Sequence[str] = (),
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
                *data_flags(variant, seed, workdir),
                *LENGTH,
                f"--config.seed={seed}",
                f"--config.demo_seed={seed}",
                *overrides,
                *(NO_TRAINING if variant.data == UNTRAINED else ()),
            ),
        )
        for seed in dict.fromkeys(seeds)
        for variant in variants
    }


def world_folder(workdir: Path, seed: int) -> Path:
    """Where the training sets of a world are."""
    return workdir / "worlds" / str(seed)


def data_flags(variant: Variant, seed: int, workdir: Path) -> tuple[str, ...]:
    """What a variant trains on, where that is not the demo world's own clips."""
    if variant.data in ("demo", UNTRAINED):
        return ()
    return training_sets.flags(world_folder(workdir, seed), variant.data)


def sampled_hit(run: Run, variant: Variant, seed: int, workdir: Path) -> float | None:
    """Hit rate, 0 to 1, of one answer a test clip that is sampled; None where that fails.

    It is asked for once, by the command that evaluates runs.
    """
    out = run.workdir / "sampled"
    if not (out / "report.json").exists():
        place = f"demo:{seed}"
        if variant.data in training_sets.NOISES:
            folder = world_folder(workdir, seed)
            place = str(folder / "sets" / variant.data / "test")
        command = [sys.executable, "-m", "affectgpt_jax.evaluate", f"--workdir={run.workdir}"]
        command += [f"--set=test:words={place}", *SAMPLING, f"--seed={seed}", "--bootstrap=0"]
        with open(run.workdir / "sampled.log", "wb") as log:
            subprocess.run([*command, f"--out={out}"], stdout=log, stderr=log)
        shutil.rmtree(run.workdir / "data", ignore_errors=True)
    try:
        report = read_json(out / "report.json", dict[str, Any])
        return report["sets"][0]["results"][0]["values"]["hit"]
    except (ReadError, LookupError, TypeError):
        return None


def t_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean of a normal sample, and half the width of its 95 % interval by Student's t.

    The half is None for a single value, which tells nothing of the spread.
    """
    mean, n = statistics.fmean(values), len(values)
    if n == 1:
        return mean, None
    return mean, standard_errors(n) * statistics.stdev(values) / math.sqrt(n)


def standard_errors(n: int) -> float:
    """Half the width of the 95 % interval of a mean of n values, 2 or more, in standard errors."""
    from scipy.stats import t  # takes a second to import

    return float(t.ppf(0.975, n - 1))


def summarise(
    number: int | str,
    outcomes: Mapping[Key, Outcome],
    sets: Mapping[Key, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """What a table's report says of its runs.

    `sets` has what is known of training sets: clips and purity, and `sampled`, the hit rate of
    sampled answers.

    The statistics of a row are over the seeds whose run was scored: `hit`, `share` (of the ceiling)
    and `difference` (to the default variant, seed by seed) are pairs of a mean and half of its
    interval; where there is nothing to average they are None. `failed` names the other runs.
    """
    table = TABLES[number]
    ours = {key: o for key, o in outcomes.items() if key[0] in {r.variant for r in table.rows}}
    scores: dict[Key, tuple[float, float]] = {}
    failed: dict[str, str] = {}
    for (variant, seed), (result, error) in ours.items():
        known = (sets or {}).get((variant, seed), {})
        ceilings = (result or {}).get("ceilings") or known.get("ceilings", {})
        ceiling = ceilings.get(variant.mode) if result else None
        if ceiling is None:
            failed[f"{variant.name}, seed {seed}"] = error or "it was not scored on a demo world"
        else:
            scores[variant, seed] = (result["hit"], ceiling)
    rows = []
    for row in table.rows:
        found = {seed: score for (variant, seed), score in scores.items() if variant == row.variant}
        differences = [
            hit - scores[table.reference, seed][0]
            for seed, (hit, _) in found.items()
            if row.variant != table.reference and (table.reference, seed) in scores
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
        if table.sampled:
            rows[-1] |= _of_set(row.variant, table.reference, sets or {})
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


def _of_set(
    variant: Variant, reference: Variant, sets: Mapping[Key, Mapping[str, Any]]
) -> dict[str, Any]:
    """Means over worlds of sampled hit rate, difference to the reference, purity and clips."""
    own = {seed: facts for (v, seed), facts in sets.items() if v == variant}
    sampled = {s: f["sampled"] for s, f in own.items() if f.get("sampled") is not None}
    base = {seed: f.get("sampled") for (v, seed), f in sets.items() if v == reference}
    trained = own and variant.data != UNTRAINED
    differences = [
        value - base[seed]
        for seed, value in sampled.items()
        if variant != reference and base.get(seed) is not None
    ]
    return {
        "sampled": t_interval(list(sampled.values())) if sampled else None,
        "sampled_difference": t_interval(differences) if differences else None,
        "purity": t_interval([f["purity"] for f in own.values()]) if trained else None,
        "clips": statistics.fmean(f["clips"] for f in own.values()) if trained else None,
    }


SAMPLED_COLUMNS = {
    "sampled": lambda row: _plus_minus(row["sampled"], "{:.3f}"),
    "sampled, against the reference": lambda row: _plus_minus(row["sampled_difference"], "{:+.3f}"),
    "purity": lambda row: _plus_minus(row["purity"], "{:.3f}"),
    "clips": lambda row: "-" if row["clips"] is None else f"{row['clips']:,.0f}",
}
COLUMNS = {
    "hit rate": lambda row: _plus_minus(row["hit"], "{:.3f}"),
    "ceiling": lambda row: "-" if row["ceiling"] is None else f"{row['ceiling']:.3f}",
    "share of the ceiling": lambda row: _plus_minus(row["share"], "{:.1%}"),
    "against the default": lambda row: (
        "the default" if _variant(row) == DEFAULT else _plus_minus(row["difference"], "{:+.3f}")
    ),
    "worlds": lambda row: str(len(row["hits"])),
    "paper": lambda row: "-" if row["published"] is None else f"{row['published']:.2f}",
}


def _variant(row: Mapping[str, Any]) -> Variant:
    """The variant of a report's row; reports of before have no training sets."""
    return Variant(row["fusion"], row["input"], row["rank"], row.get("data", "demo"))


def in_the_paper(number: int | str) -> str:
    """What the paper calls a table."""
    return "Figure 4" if number == "fig4" else f"Table {number}"


def markdown(report: Report) -> str:
    """A report's table, and what its numbers mean."""
    columns = {report["varies"]: lambda row: row["label"], **COLUMNS}
    against = "the default"
    if TABLES[report["table"]].sampled:
        reference = TABLES[report["table"]].reference
        label = next(r.label for r in TABLES[report["table"]].rows if r.variant == reference)
        against = f'"{label}"'
        paper = columns.pop("paper")
        greedy = columns.pop("against the default")
        columns |= {f"against {against}": greedy, **SAMPLED_COLUMNS, "paper": paper}
    table = harness.columns(columns, report["rows"])
    counts = sorted({len(row["hits"]) for row in report["rows"]} - {0, 1})
    widths = ", ".join(f"of {n} worlds: {standard_errors(n):.2f} standard errors" for n in counts)
    meaning = (
        "Means over worlds, each with its own training seed; +- is half of a mean's 95 % interval "
        f"by Student's t{f' ({widths})' if widths else ''}. The difference to the default is "
        "taken world by world. The ceiling is the hit rate of the best predictor that sees the "
        f"same inputs. The paper's figure, from its {in_the_paper(report['table'])}, is the mean "
        "score on the nine sets of MER-UniBench, in percent: the order of the rows can be "
        "compared, their distances not."
    )
    failed = [f"Failed: {name}: {error}" for name, error in report["failed"].items()]
    return "\n\n".join([table, meaning, *failed])


def in_words(process_wall_s: Sequence[float], jobs: int) -> str:
    """How long runs took: the median, the shortest and the longest, as a report has them."""
    if not process_wall_s:
        return "No run was timed from start to end."
    median, shortest, longest = process_wall_s
    return f"A run took {median:.0f} s ({shortest:.0f} to {longest:.0f}), {jobs} at a time."


def length_in_words(runs: Sequence[Mapping[str, Any]]) -> str:
    """How many updates the runs had that were trained."""
    steps = sorted({r["steps"] for r in runs if "steps" in r and r.get("data") != UNTRAINED})
    return f"Updates of a run: {', '.join(map(str, steps))}." if steps else ""


def _plus_minus(pair: Sequence[float | None] | None, form: str) -> str:
    if pair is None:
        return "-"
    mean, half = pair
    if half is None:
        return form.format(mean)
    return f"{form.format(mean)} +- {form.replace('+', '').format(half)}"


def plot(report: Mapping[str, Any], png: Path) -> None:
    """Draw a report: hit rates with intervals and ceilings, and the paper's figures beside them."""
    rows = list(enumerate(report["rows"]))
    figure = drawing.new_figure(10, 1.7 + 0.5 * len(rows))
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
    known = [(place, row["published"]) for place, row in rows if row["published"] is not None]
    if known:
        places, published = zip(*known, strict=True)
        paper.plot(published, places, "s", color="tab:orange", markersize=6)
        _annotate(paper, published, places, "{:.2f}")
    ours.set_yticks(range(len(rows)), [row["label"] for _, row in rows])
    ours.set_ylim(len(rows) - 0.5, -0.7)
    ours.set_title(f"demo world: hit rate, by {report['varies']}", fontsize=11)
    paper.set_title(f"paper, {in_the_paper(report['table'])}: MER-UniBench, %", fontsize=11)
    for axes in (ours, paper):
        axes.margins(x=0.15)
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    drawing.save_png(figure, png)


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
        f"# {in_the_paper(report['table'])}: {report['varies']}\n\n{markdown(report)}\n\n"
        f"`{about['command']}`, {about['cpu_cores']} cores of {about['cpu']}, "
        f"jax {about['versions']['jax']}. {in_words(times, report['jobs'])} "
        f"{length_in_words(report['runs'])}\n"
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
    add("--table", type=_number, nargs="+", choices=TABLES, default=list(QUICK))
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
    sets: dict[Key, dict[str, Any]] = {}
    for seed in dict.fromkeys(args.seeds):
        wanted = [v for v, s in runs if s == seed and v.data not in ("demo", UNTRAINED)]
        if wanted:
            folder = world_folder(args.workdir, seed)
            facts = training_sets.prepare(folder, seed, [v.data for v in wanted], _say)
            sets |= {(v, seed): facts[v.data] for v in wanted}
    outcomes = dict(zip(runs, train_all(list(runs.values()), args.jobs, _say)))
    asked = [k for k in sampled_keys(args.table, runs) if outcomes[k].result is not None]
    with ThreadPoolExecutor(args.jobs) as pool:
        hits = pool.map(lambda key: sampled_hit(runs[key], *key, args.workdir), asked)
        for key, found in zip(asked, hits, strict=True):
            _say(f"sampled: {runs[key].name}: {found}")
            clean = {"clips": training_sets.CLIPS, "purity": 1.0}
            sets[key] = sets.get(key, clean) | {"sampled": found}
    failed: dict[str, str] = {}
    for number in args.table:
        words = ["--table", number, "--seeds", *args.seeds, *overrides]
        command = harness.command("ablation", [str(word) for word in words])
        about = {"command": command, **harness.describe()}
        report = {"environment": about, "jobs": args.jobs, **summarise(number, outcomes, sets)}
        write(report, args.out)
        print(f"\n{in_the_paper(number)}: {report['varies']}\n\n{markdown(report)}")
        print(f"\n{in_words(report['process_wall_s'], args.jobs)}")
        failed |= report["failed"]
    if failed:
        sys.exit(f"error: {len(failed)} of {len(runs)} runs gave no score; run this again to retry")


def sampled_keys(tables: Sequence[int | str], runs: Iterable[Key]) -> list[Key]:
    """The runs of tables that show sampled answers."""
    wanted = {row.variant for t in tables if TABLES[t].sampled for row in TABLES[t].rows}
    return [key for key in runs if key[0] in wanted]


def _number(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    # As by Ctrl-C, so that no run is left behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main()
