"""The tables of RESULTS.md from the files of benchmarks/results: `python -m benchmarks.tables`.

First what was aimed at, with the measurement or, where there is none, why it is open and what is
expected; then every measurement.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from affectgpt_jax.cli import exit_on_error, make_parser
from benchmarks import (
    attention,
    compile_time,
    decode_bytes,
    generation,
    harness,
    input_pipeline,
    loop_overhead,
    low_precision,
    plans,
    prediction,
    profile_table,
    savings,
    train_step,
)
from benchmarks import (
    compiled as gpu_compiled,
)
from benchmarks.generation import Case
from benchmarks.harness import RESULTS, Measurement, Report, spread_in_words

NO_GPU = "no GPU has run it yet"


class Measured(NamedTuple):
    """A measurement in words, and whether it reaches the aim; None where it does not say, with
    the reason in words."""

    words: str
    met: bool | None


class Aim(NamedTuple):
    """A row of the first table.

    Attributes:
        what: is measured.
        aim: in words.
        result: the file that answers, without ending.
        read: what the file says.
        why: it is open, while there is no such file.
        expected: by arithmetic or from other measurements.
        otherwise: the file that answers where the first one is not there.
    """

    what: str
    aim: str
    result: str
    read: Callable[[Report], Measured]
    why: str = NO_GPU
    expected: str = ""
    otherwise: str = ""


def over(tuning: str, aim: float, twin_mfu: float = 0.0) -> Callable[[Report], Measured]:
    """Samples/s of JAX over PyTorch's; the twin must reach an MFU itself, or nothing is met."""

    def read(report: Report) -> Measured:
        if tuning not in report["ratios"]:
            return Measured(f"measured without the {tuning} twin", None)
        ratio, mfu = report["ratios"][tuning], report["sides"][tuning]["mfu"] or 0.0
        words = spread_in_words(ratio, ".2f", " times")
        if twin_mfu:
            words += f", the twin at {mfu:.0%} MFU"
        return Measured(words, ratio["median"] >= aim and mfu >= twin_mfu)

    return read


def tokens(aim: float) -> Callable[[Report], Measured]:
    """Tokens/s of JAX."""

    def read(report: Report) -> Measured:
        side = report["sides"]["jax"]
        mfu = f", {side['mfu']:.1%} MFU" if side["mfu"] else ""
        return Measured(f"{side['tokens_per_s']:,.0f} tokens/s{mfu}", side["tokens_per_s"] >= aim)

    return read


def input_rate(report: Report) -> Measured:
    rates = {name: found["samples_per_s"] for name, found in report["layouts"].items()}
    words = ", ".join(f"{rate:,.0f} {name}" for name, rate in rates.items())
    return Measured(f"{words} samples/s", min(rates.values()) >= input_pipeline.AIM)


def host_time(report: Report) -> Measured:
    found = report["milliseconds"]["host"]
    return Measured(spread_in_words(found, ".1f", " ms"), found["median"] < loop_overhead.AIM_MS)


def data_wait(report: Report) -> Measured:
    share = report["sides"]["jax"]["data_wait"]
    return Measured(f"{share:.2%} of a step", share < 0.01)


MANY = 0  # clips at a time, as many as a run says
WHOLE = ["labels", "description"]


def generation_over(
    pairs: Mapping[str, tuple[Case, Case]], aim: float
) -> Callable[[Report], Measured]:
    """Clips/s of one case over another's, for each kind of whole answers.

    Args:
        pairs: what to call it, and the two cases.
        aim: for all of them.
    """

    def read(report: Report) -> Measured:
        found, missing, batch = {}, {}, report["settings"]["batch"]
        for name, pair in pairs.items():
            for kind in WHOLE:
                cases = report["kinds"].get(kind, {"cases": {}})["cases"]
                names = [case._replace(rows=case.rows or batch).name for case in pair]
                if lacking := [f"{kind} of {name}" for name in names if name not in cases]:
                    missing |= dict.fromkeys(lacking)
                else:
                    ours, other = (cases[name]["clips_per_s"] for name in names)
                    found[f"{kind}{name}"] = ours / other
        if missing:
            return Measured(f"measured without {', '.join(missing)}", None)
        words = ", ".join(f"{ratio:.1f} times ({kind})" for kind, ratio in found.items())
        return Measured(words, min(found.values()) >= aim)

    return read


BATCHED = {"": (Case("jax", MANY), Case("jax", 1))}
EQUAL_BATCH = {
    ", many at a time": (Case("jax", MANY), Case("transformers", MANY)),
    ", one at a time": (Case("jax", 1), Case("transformers", 1)),
}


def compiled(report: Report) -> Measured:
    times = {kind: statistics.median(t["together"]) for kind, t in report["seconds"].items()}
    words = ", ".join(f"{seconds:.1f} s {kind}" for kind, seconds in times.items())
    words += f" ({report['environment']['device']})"
    return Measured(words, times["cold"] < 60 and times["from the cache"] < 5)


# Matmuls of a 7B model's size ran at 80 % of the H100's peak where they were measured alone.
AIMS = (
    Aim(
        "anchor: tokens/s of one H100 or H200, bfloat16",
        "17,600 (55 % MFU)",
        "train_step_anchor_full",
        tokens(17_600),
        expected="50 to 60 % MFU: large matmuls reach 80 % of the peak, passes over memory and "
        "attention take the rest",
    ),
    Aim(
        "anchor: over the tuned twin",
        "1.2 times, the twin at 40 % MFU or more",
        "train_step_anchor_beside_tuned_full",
        over("tuned", 1.2, twin_mfu=0.4),
        expected="1.1 to 1.3 times",
    ),
    Aim(
        "affectgpt, 48 clips, GPU: over the release's way",
        "3 times",
        "train_step_affectgpt_48_beside_release_full",
        over("release", 3.0),
        expected="3 to 4 times: padding alone doubles the tokens",
    ),
    Aim(
        "affectgpt, 48 clips, GPU: over the tuned twin",
        "1.5 times",
        "train_step_affectgpt_48_beside_tuned_full",
        over("tuned", 1.5),
        expected="2 to 2.5 times: rows are 100 % full instead of 47 %",
    ),
    Aim(
        "affectgpt, 48 clips, GPU: over the packed twin",
        "1.1 times",
        "train_step_affectgpt_48_beside_packed_full",
        over("packed", 1.1),
        expected="1.0 to 1.2 times",
    ),
    Aim(
        "small, CPU: over the tuned twin, equal rows",
        "1.0 times",
        "train_step_small_small",
        over("tuned", 1.0),
        why="not measured on an idle machine",
    ),
    Aim(
        "affectgpt, 12 clips, CPU: over the tuned twin",
        "2 times",
        "train_step_affectgpt_12_beside_tuned_small",
        over("tuned", 2.0),
        why="not measured on an idle machine",
    ),
    Aim(
        "input, two cores",
        "5,000 samples/s",
        "input_small",
        input_rate,
        why="not measured on an idle machine",
        otherwise="input_full",
    ),
    Aim(
        "waiting for data at the GPU's best rate",
        "under 1 % of a step",
        "train_step_affectgpt_48_full",
        data_wait,
        expected="0.6 % by arithmetic, if nothing were made ahead: a batch takes one thread 4 ms, "
        "and 48 clips of 255 tokens take 0.7 s at 17,600 tokens/s",
    ),
    Aim(
        "decode, GPU: over one clip at a time",
        "20 times",
        "generation_full",
        generation_over(BATCHED, 20.0),
        expected="50 times or more: a token reads the weights once, for 1 clip or for 256",
        otherwise="generation_jax_full",
    ),
    Aim(
        "decode, GPU: over transformers at equal batch",
        "2 times",
        "generation_full",
        generation_over(EQUAL_BATCH, 2.0),
        expected="3 times or more",
    ),
    Aim(
        "decode, CPU: over transformers at equal batch",
        "2 times",
        "generation_small",
        generation_over(EQUAL_BATCH, 2.0),
        why="not measured on an idle machine",
    ),
    Aim(
        "compile the 28 layers of Qwen2.5-7B, one program of 3 x 512 tokens",
        "60 s cold, 5 s from the cache",
        "compile_time_small",
        compiled,
        why="not measured on an idle machine",
        otherwise="compile_time_full",
    ),
    Aim(
        "the training loop's host time, beyond dispatch",
        "under 2 ms a step",
        "loop_overhead_small",
        host_time,
        why="not measured on an idle machine",
        otherwise="loop_overhead_full",
    ),
)


def load(folder: Path, name: str) -> Report | None:
    """A result by its name; None if it is not there."""
    path = folder / f"{name}.json"
    return harness.load(path) if path.is_file() else None


def targets(folder: Path) -> str:
    """The table of what was aimed at."""
    rows = []
    for aim in AIMS:
        report = load(folder, aim.result) or load(folder, aim.otherwise)
        words, met = aim.read(report) if report else Measured(aim.why, None)
        if met is None and aim.expected:
            words += f"; expected: {aim.expected}"
        state = {True: "met", False: "**missed**", None: "open"}[met]
        rows.append((aim.what, aim.aim, words, state))
    return harness.markdown(("what", "aim", "measured", ""), rows)


def summary(folder: Path) -> str:
    """The README's five rows: what was measured, compiled or planned, and what is open."""

    def by_aim(name: str, what: str, kind: str) -> tuple[str, str, str]:
        (aim,) = (aim for aim in AIMS if aim.result == name)
        report = load(folder, name)
        return (what, aim.read(report).words, kind) if report else (what, "open", aim.why)

    losses = harness.load(folder / "parity.json")["rows"][-1]
    plan = harness.load(folder / "plans.json")["plans"][1]
    cell = {name: read(plan) for name, read in plans.COLUMNS.items()}
    *_, compiler = sorted(folder.glob("compiled_*.json"))
    (anchor,) = (
        case
        for case in harness.load(compiler)["cases"]
        if case["workload"] == "anchor" and case["device"].startswith("H100")
    )
    rows = [
        (f"{losses['what']}, beside PyTorch", f"{losses['value']:.1e} apart", "measured on a CPU"),
        by_aim(
            "train_step_affectgpt_12_beside_tuned_small",
            "12 clips of the paper's lengths an update, packed, over a tuned PyTorch",
            "measured on a CPU",
        ),
        (
            f"the paper's recipe on Qwen2.5-7B, {cell['GPUs']}, 24 clips an update",
            f"{cell['peak of usable GiB'].partition(' ')[0]} GiB, {cell['tokens/s']} tokens/s",
            "planned from shapes",
        ),
        (
            f"LoRA on Qwen2.5-7B, 2 x 4,096 tokens, {anchor['device']}",
            f"{anchor['peak_gib']:.1f} GiB, at most {anchor['tokens_per_s']:,.0f} tokens/s "
            f"({anchor['mfu']:.0%} MFU)",
            "compiled for the GPU, not run",
        ),
        by_aim("train_step_anchor_full", "the same, measured", "measured on a GPU"),
    ]
    return harness.markdown(("what", "result", "how it is known"), rows)


TERMS = f"""\
- "anchor" is LoRA on two rows of 4,096 random tokens, all supervised; one row at the scale small.
- "small" is a workload, 4 rows of 256 tokens a step, and a scale, a Qwen2 of 40 million parameters.
- "affectgpt N": an update takes N clips of the paper's mix of lengths, or about N where clips share
  rows ("packed"). "Rows full" is the share of the places in them that hold a token.
- The twin is the same model in PyTorch, in three tunings: "release" as published, "tuned" (SDPA, no
  needless logits, chunked cross-entropy, `torch.compile` on a GPU), and "packed" (tuned, with
  variable-length attention over packed rows).
- {generation.CLIPS:,} clips are MELD's test set; the time for them follows from clips/s."""


class Section(NamedTuple):
    """The tables of a measurement.

    Attributes:
        heading: above them.
        files: which reports.
        of: whose they are.
        note: what a reader must know.
    """

    heading: str
    files: str
    of: Measurement
    note: str = ""


SECTIONS = (
    Section(
        "Training beside PyTorch",
        "train_step_*.json",
        train_step.COMMAND,
        "Ratios are of a run's own sides: its blocks alternated, other rows were measured apart.",
    ),
    Section("Attention backends", "attention_*.json", attention.COMMAND),
    Section(
        "What XLA's CUDA compiler makes of an update",
        "compiled_*.json",
        gpu_compiled.COMMAND,
        "Compiled, not run: memory, bytes and launches of one device are the compiler's. Matmuls "
        "and attention at 70 % of the peak, all other bytes at 90 % of the bandwidth and what "
        "large matmuls do not hide of the collectives, as rings at 90 % of NVLink's bandwidth in a "
        "node and the adapters' between nodes, give the floor; tokens/s and MFU follow from it. "
        "Places in rows count as tokens, padding too.",
    ),
    Section(
        "What was planned, beside what was measured",
        "prediction_*.json",
        prediction.COMMAND,
        "The program's bytes are what XLA's buffer assignment gives it; the device's are the most "
        "that was in use.",
    ),
    Section(
        "Single savings",
        "savings_*.json",
        savings.COMMAND,
        "All savings but the named one stay on, and clips share rows but where it says otherwise.",
    ),
    Section(
        "Generation",
        "generation_*.json",
        generation.COMMAND,
        "Answers have the lengths of the record set's own, for the weights are random.",
    ),
    Section(
        "What XLA's CUDA compiler makes of a decode step",
        "decode_bytes_*.json",
        decode_bytes.COMMAND,
        "GB for a token of every row, from XLA's program for the GPU; nothing was run.",
    ),
    Section("Input", "input_*.json", input_pipeline.COMMAND),
    Section("The loop", "loop_overhead_*.json", loop_overhead.COMMAND),
    Section(
        "Compilation",
        "compile_time_*.json",
        compile_time.COMMAND,
        "The update of 3 rows of 512 tokens, from the shapes of Qwen2.5-7B alone.",
    ),
    Section(
        "Low precision of the frozen base",
        "low_precision*.json",
        low_precision.COMMAND,
        "No GPU has run it; expected of int8 there: an anchor step 1.27 times as fast, if its "
        "matmuls run at 1.6 times the rate of bfloat16's.",
    ),
    Section(
        "Where a step's time goes",
        "profile_*.json",
        profile_table.COMMAND,
        "A part that computes none of the model's FLOPs has no floor: its last cells are blank.",
    ),
)


def all_tables(folder: Path) -> str:
    """Every table that the files of a folder give, with the commands that made them."""
    parts = ["# Results", "Printed by `python -m benchmarks.tables`.", TERMS, targets(folder)]
    for section in SECTIONS:
        files = sorted(folder.glob(section.files))
        reports = [harness.load(path) for path in files]
        if reports:
            parts += [f"## {section.heading}", *([section.note] if section.note else [])]
            parts += [made_by(files, reports), section.of.tables(reports)]
    return "\n\n".join(parts)


def made_by(files: Sequence[Path], reports: Sequence[Report]) -> str:
    """Command, device and versions of every report."""
    lines = []
    for path, report in zip(files, reports, strict=True):
        about = report["environment"]
        versions = ", ".join(
            f"{name} {about['versions'][name]}"
            for name in ("jax", "torch", "transformers")
            if name in about["versions"]
        )
        where = f"{about['device']}, {about['cpu_cores']} cores of {about['cpu']}"
        file = f"[{path.name}](results/{path.name})"
        lines.append(f"- `{about['command']}` ({where}; {versions}; {file})")
    return "\n".join(lines)


@exit_on_error()
def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("python -m benchmarks.tables", __doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    print(all_tables(parser.parse_args(argv).results))


if __name__ == "__main__":
    main()
