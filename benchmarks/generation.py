"""Generation, measured beside `transformers` in one run: `python -m benchmarks.generation`.

Answers about the clips of the workload "decode": label lists, descriptions, or both, each as long
as its clip's own answer is. Weights are random, so that no answer ends by itself; it is cut there.
Another kind is the first token of a label list, which says what prompts alone take. Both frameworks
answer the same clips, greedily, from the same weights: many at a time and one at a time. What they
generate is compared.

`transformers` runs its own `generate`, a batch after the other, each until its longest answer is
complete, with adapters merged into the base, and of both questions one after the other. JAX runs
what `affectgpt_jax.inference` runs: rows take the next clip as soon as they have answered, and of
both questions what the prompts about a clip begin with is computed once. It merges where that does;
the report says whether it did.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from affectgpt_jax.data.packing import Bucket, round_up
from benchmarks import harness, workloads
from benchmarks.blocks import workers
from benchmarks.harness import Report, at_least
from benchmarks.turns import Side, TurnError, alternate

FIRST = "first token"
# Kind -> what is asked about each clip.
KINDS = {
    FIRST: ("ovlabel",),
    "labels": ("ovlabel",),
    "description": ("description",),
    "both": ("description", "ovlabel"),
}
# Of a turn. With fewer, the last answers, beside which rows stand empty, would be too large a part;
# with more, turns would take many minutes.
BATCHES = 8
CLIPS = 2_610  # MELD's test set
# Rows whose tokens must all be the same. A random model has two words within rounding now and
# then, and what follows differs; in bfloat16 that is often.
EQUAL = {"float32": 0.9, "bfloat16": 0.0}
FIRST_EQUAL = {"float32": 1.0, "bfloat16": 0.5}  # by chance one of thousands


class _Generator:
    """What both sides have in common: clips, their prompts and how long their answers are.

    Args:
        workload: arguments of `workloads.make`.
        records: folder of record sets.
    """

    def __init__(self, workload: Mapping[str, Any], records: str):
        self.workload = workloads.make(**workload)
        self.dataset = workloads.open_records(self.workload, Path(records))
        self.processor = workloads.prompt_processor(self.workload)
        self._asked: dict[tuple[str, bool], tuple[list[Any], np.ndarray]] = {}

    def asked(self, kind: str) -> list[tuple[list[Any], np.ndarray]]:
        """For each question the prompt of every clip, and the tokens of its answer, `[N]` int32."""
        for question in KINDS[kind]:
            if (question, kind == FIRST) not in self._asked:
                whole = self.processor.training_examples(self.dataset, question)
                limits = np.array([len(x) - x.answer_start for x in whole], np.int32)
                limits = np.ones_like(limits) if kind == FIRST else limits
                prompts = self.processor.prompt_examples(self.dataset, question)
                self._asked[question, kind == FIRST] = prompts, limits
        return [self._asked[question, kind == FIRST] for question in KINDS[kind]]

    def generate(self, kind: str, rows: int, clips: int) -> dict[str, Any]:
        """Answer the first clips, `rows` at a time: seconds, and the tokens of each answer, one
        question after the other."""
        self.asked(kind)
        numbers = [number % len(self.dataset) for number in range(clips)]
        began = time.perf_counter()
        found = self._generate_all(kind, rows, numbers)
        return {"s": time.perf_counter() - began, "tokens": found}

    def _generate_all(self, kind: str, rows: int, numbers: list[int]) -> list[list[int]]:
        raise NotImplementedError


class Jax(_Generator):
    """JAX."""

    def __init__(self, workload: Mapping[str, Any], records: str):
        import jax

        from affectgpt_jax import build
        from affectgpt_jax.inference import should_merge
        from affectgpt_jax.models import lora
        from benchmarks import sides

        super().__init__(workload, records)
        self.mesh = sides.one_device()
        self.model = build.model(self.workload.config, self.workload.llm)
        self.base = sides.draw_base(self.model)
        self.trainable = jax.device_put(sides.random_trainable(self.model, sides.TRAINABLE_SEED))
        if should_merge("auto", self.model, self.base):  # as the command that answers does
            scale = self.model.decoder.lora.scale
            self.base = lora.merge(self.base, self.trainable["lora"], scale)
            self.trainable = {**self.trainable, "lora": {}}

    def _generate_all(self, kind: str, rows: int, numbers: list[int]) -> list[list[int]]:
        from affectgpt_jax.inference import prompt_batches
        from affectgpt_jax.models import generate
        from affectgpt_jax.training.sharding import shard_batch

        asked = self.asked(kind)
        width = len(asked)
        limits = np.stack([limits[numbers] for _, limits in asked], axis=1)
        # A stop that is never written: an answer takes all the tokens that it may.
        never = self.workload.llm.vocab_size
        end = self.processor.tokenizer.end_id
        decoding = generate.Decoding(int(limits.max()), (never,), end)
        size, turn = generate.rows_and_prefill_batch(-(-rows // width), 1)
        batches = prompt_batches(
            self.dataset,
            self.processor,
            [[prompts[number] for number in numbers] for prompts, _ in asked],
            turn,
            self.workload.config.num_buckets,
            feature_from=numbers,
        )

        def prompts() -> Iterator[generate.Prompts]:
            for places, batch in batches:
                of = np.zeros((turn, width), np.int32)
                of[: len(places)] = limits[places]
                batch, of = shard_batch(self.mesh, (batch, of.ravel()))
                places = (places[:, None] * width + np.arange(width)).ravel()
                yield generate.Prompts(places, batch, limits=of, questions=width)

        found = generate.generate_all(
            self.model, self.base, self.trainable, prompts(), decoding, size * width
        )
        answers = {place: answer.tokens[: answer.counts].tolist() for place, answer in found}
        clips = range(len(numbers))
        return [answers[clip * width + question] for question in range(width) for clip in clips]

    def merged(self) -> bool:
        """Whether adapters are in the base."""
        return not self.trainable["lora"]

    def facts(self) -> dict[str, Any]:
        return harness.describe()


class Torch(_Generator):
    """`transformers`, with the twin's soft tokens."""

    def __init__(self, workload: Mapping[str, Any], records: str):
        import torch

        from benchmarks import sides
        from benchmarks.torch_reference.model import TUNINGS

        super().__init__(workload, records)
        self._torch = torch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        tuning = dataclasses.replace(TUNINGS["tuned"], compile=False)
        self.twin = sides.make_twin(self.workload, tuning, self._device)
        self.twin.eval()
        self.twin.llama_model = self.twin.llama_model.merge_and_unload()

    def _generate_all(self, kind: str, rows: int, numbers: list[int]) -> list[list[int]]:
        answers: list[list[int]] = []
        for examples, limits in self.asked(kind):
            for start in range(0, len(numbers), rows):
                chosen = numbers[start : start + rows]
                bucket = Bucket(round_up(max(len(examples[number]) for number in chosen)), 1)
                clips = [(number, examples[number]) for number in chosen]
                batch = self.processor.collate(self.dataset, clips, bucket)
                found = self._generate(batch, limits[chosen]).tolist()
                answers += [tokens[: limits[number]] for tokens, number in zip(found, chosen)]
        return answers

    def _generate(self, batch: Any, limits: np.ndarray) -> np.ndarray:
        """A batch of answers `[B, N]`, of which each row's first `limits` `[B]` count."""
        from benchmarks.torch_reference.model import to_device

        torch = self._torch
        with torch.no_grad():
            tensors = to_device(batch, self.twin.tuning, self._device)
            embeds = self.twin.embed_inputs(tensors)
            # Prompts end where answers begin: padding goes to the left.
            lengths = (tensors["segment_ids"] > 0).sum(dim=1, keepdim=True)
            places = torch.arange(embeds.shape[1], device=self._device)
            padding = embeds.shape[1] - lengths
            at = (places - padding).clamp(min=0)
            embeds = embeds.gather(1, at[..., None].expand_as(embeds))
            found = self.twin.llama_model.generate(
                inputs_embeds=embeds,
                attention_mask=(places >= padding).long(),
                max_new_tokens=int(limits.max()),
                do_sample=False,
                eos_token_id=None,
                pad_token_id=self.processor.tokenizer.end_id,
            )
        return found.cpu().numpy()

    def facts(self) -> dict[str, Any]:
        return harness.describe("torch", "peft")


def same(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> dict[str, float]:
    """Shares of answers with equal first tokens, and with all tokens equal."""
    pairs = list(zip(ours, theirs, strict=True))
    return {
        "first": statistics.fmean(a[0] == b[0] for a, b in pairs),
        "all": statistics.fmean(list(a) == list(b) for a, b in pairs),
    }


class Case(NamedTuple):
    """Who writes how many answers at a time."""

    side: str
    rows: int

    @property
    def name(self) -> str:
        who = "JAX" if self.side == "jax" else "transformers"
        return f"{who}, {'one' if self.rows == 1 else self.rows} at a time"


def measure(
    sides: Mapping[str, Side],
    kind: str,
    *,
    rows: int,
    turns: int,
    clips: int,
    singles: int,
    dtype: str,
) -> dict[str, Any]:
    """Clips/s of every side on one kind of answer, in turns; the first turn only warms up.

    Args:
        sides: by name, "jax" and perhaps "transformers".
        kind: of `KINDS`.
        rows: of a batch.
        turns: that count.
        clips: of a turn.
        singles: clips of a turn where they come one at a time.
        dtype: decides how equal answers must be.

    Raises:
        TurnError: a side failed, or the answers differ.
    """
    cases = {Case(name, rows): clips for name in sides}
    cases |= {Case(name, 1): singles for name in sides}
    rates: dict[Case, list[float]] = {case: [] for case in cases}
    first = {}
    for turn, case in alternate(cases, turns + 1):
        found = sides[case.side].call("generate", kind=kind, rows=case.rows, clips=cases[case])
        if turn:
            rates[case].append(cases[case] / found["s"])
        else:
            first[case] = found["tokens"]
    equal = same(*(first[Case(name, rows)] for name in sides)) if len(sides) > 1 else None
    if equal and (equal["first"] < FIRST_EQUAL[dtype] or equal["all"] < EQUAL[dtype]):
        raise TurnError(
            f"{kind}: of the answers to the same prompts {equal['first']:.0%} start with the same "
            f"token and {equal['all']:.0%} are equal; expected {FIRST_EQUAL[dtype]:.0%} and "
            f"{EQUAL[dtype]:.0%} in {dtype}"
        )
    return {
        "equal": equal,
        "cases": {
            case.name: {
                "clips": cases[case],
                "tokens": statistics.fmean(map(len, first[case])),
                "longest": max(map(len, first[case])),
                "clips_per_s": statistics.median(found),
                "range": [min(found), max(found)],
            }
            for case, found in rates.items()
        },
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """One measurement; returns the report.

    Raises:
        TurnError: a side failed, or the answers differ.
    """
    told = {"name": "decode", "scale": args.scale, "dtype": args.dtype, "tokenizer": args.tokenizer}
    workload = workloads.make(**told)
    rows, dtype = args.batch or workload.config.generate.batch_size, workload.config.dtype
    workloads.open_records(workload, args.records)  # by one process, before several read them
    given = {"workload": told, "records": str(args.records)}
    targets = {"jax": ("benchmarks.generation:Jax", given)}
    if args.peer:
        targets["transformers"] = ("benchmarks.generation:Torch", given)
    with workers(targets, gpu=args.scale == "full") as sides:
        kinds = {
            kind: measure(
                sides,
                kind,
                rows=rows,
                turns=args.turns,
                clips=rows * args.batches,
                singles=args.singles,
                dtype=dtype,
            )
            for kind in args.kind
        }
        about = sides["transformers" if args.peer else "jax"].call("facts")
        merged = sides["jax"].call("merged")
    settings = {
        "scale": args.scale,
        "dtype": dtype,
        "batch": rows,
        "turns": args.turns,
        "singles": args.singles,
        "merged": merged,
    }
    return {"environment": about, "settings": settings, "kinds": kinds}


COLUMNS = {
    "answers": lambda r: (
        f"{r['clips']} x {r['kind']}, {r['tokens']:.0f} tokens (longest {r['longest']}), "
        f"{r['scale']}, {r['dtype']}"
    ),
    "who": lambda r: r["who"],
    "clips/s (range)": lambda r: "{:.3g} ({:.3g} to {:.3g})".format(r["clips_per_s"], *r["range"]),
    "new tokens/s": lambda r: f"{len(KINDS[r['kind']]) * r['tokens'] * r['clips_per_s']:,.0f}",
    f"{CLIPS:,} clips, by arithmetic": lambda r: f"{CLIPS / r['clips_per_s'] / 60:.1f} min",
    "JAX's many at a time over it": lambda r: f"{r['ratio']:.1f}" if r["ratio"] else "",
    "same answers": lambda r: f"{r['equal']:.0%}" if r["equal"] else "",
}


def table(reports: Sequence[Report]) -> str:
    """A Markdown table of reports: a row for every case of every kind."""
    rows = []
    for report in reports:
        settings = report["settings"]
        best, peer = (Case(side, settings["batch"]).name for side in ("jax", "transformers"))
        for kind, found in report["kinds"].items():
            highest = found["cases"][best]["clips_per_s"]
            for who, case in found["cases"].items():
                ratio = None if who == best else highest / case["clips_per_s"]
                equal = found["equal"]["all"] if who == peer else None
                rows.append(
                    settings | case | {"kind": kind, "who": who, "ratio": ratio, "equal": equal}
                )
    return harness.columns(COLUMNS, rows)


def name_of(args: argparse.Namespace) -> str:
    """A result file's name, without its ending; the plain one is of what runs by default."""
    parts = [] if args.peer else ["jax"]
    parts += [kind for kind in KINDS if kind in args.kind] if {*args.kind} != {*KINDS} else []
    parts += [f"{args.batch}_rows"] if args.batch else []
    parts += [args.dtype] if args.dtype else []
    return "_".join(["generation", *parts, args.scale]).replace(" ", "_")


def flags(add: Callable[..., Any]) -> None:
    add("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    add("--no-peer", dest="peer", action="store_false", help="JAX alone")
    add("--batch", type=at_least(0), default=0, help="clips at a time; default: the scale's")
    add("--turns", type=at_least(1), default=3, help="that count, after one that does not")
    add("--batches", type=at_least(1), default=BATCHES, help="of a turn")
    add("--singles", type=at_least(1), default=3, help="clips of a turn that come one at a time")
    add("--dtype", choices=("", *EQUAL), default="", help="default: the scale's")


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.batch == 1:
        parser.error("--batch is 1; expected 2 or more, since one at a time is measured beside it")


COMMAND = harness.Measurement(
    "generation",
    run,
    table,
    name_of,
    flags,
    shared=("scale", "tokenizer", "records"),
    check=check,
)

if __name__ == "__main__":
    COMMAND.main()
