"""JAX against PyTorch, part by part: `python -m benchmarks.parity [--llm DIR] [--device cuda]`.

Both models are built from one set of weights and read the same batches. Compared are tokens, soft
tokens, hidden states, logits, loss, gradients, one update, the learning rate, and every loss of a
training run. Dropout is off, and float32 products are not rounded to TF32. The error of a tensor is
`||jax - pytorch|| / ||pytorch||`.

Two float32 programs that add in another order differ by rounding. Two bfloat16 programs differ as
much as each does from the truth, so there both are measured against PyTorch in float32, and JAX
must not be further away from it than PyTorch is. For that, the weights of the base and of LoRA are
numbers that bfloat16 holds, in all precisions.

A plot of both training runs goes beside the result file. Ends with status 1 if a row is red.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers

from affectgpt_jax import build
from affectgpt_jax.common.progress import Elapsed
from affectgpt_jax.config import ConfigError
from affectgpt_jax.data.modalities import MODALITIES, placeholders
from affectgpt_jax.data.pipeline import Bucket
from affectgpt_jax.data.prompts import parse_label
from affectgpt_jax.models.affectgpt import Batch
from affectgpt_jax.models.fusers import Fusion, FusionConfig
from affectgpt_jax.training.optimizer import OptimizerConfig, learning_rate_schedule
from benchmarks import harness, probes
from benchmarks.harness import Report, at_least
from benchmarks.pictures import PARITY_BOUND, draw_parity
from benchmarks.sides import random_parameters, random_trainable
from benchmarks.torch_reference.fusers import Fusers
from benchmarks.torch_reference.model import AffectGPT as Twin
from benchmarks.torch_reference.training import learning_rate
from benchmarks.torch_reference.weights import by_torch_name, load_trainable

LLM_PREFIX = "llama_model.base_model.model.model."
ROWS = 4  # of a batch in a draw for bfloat16

# Float32 holds 7 digits. Sums of some hundred terms, some tens of operations deep, lose 2 of them,
# and a gradient may lose one more where it is a small difference of large terms.
BOUND = 1e-4
BOUND_OF = {"logits": 1e-5, "loss": 1e-5}
SCHEDULE = 1e-6  # a handful of float32 operations
BFLOAT16_RATIO = 1.1  # 64 draws leave the ratio uncertain by some 5 %


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        what: the quantity.
        errors: relative error of every tensor.
        value: what is judged.
        bound: its largest allowed value.
        note: where the value comes from.
    """

    what: str
    errors: dict[str, float]
    value: float
    bound: float
    note: str

    @property
    def passed(self) -> bool:
        return self.value <= self.bound  # NaN does not pass

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"passed": self.passed}


def errors_of(
    found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Relative error by tensor; infinite for one that one side lacks."""
    errors = dict.fromkeys([*found, *expected], math.inf)
    for name in found.keys() & expected.keys():
        # A softmax does not see a constant added to all its keys: the gradient of a key's bias is
        # zero but for rounding, and that of its weight says how much rounding is little.
        scale = expected[name.replace(".key.bias", ".key.weight")]
        errors[name] = probes.relative_error(found[name], expected[name], scale)
    return errors


def worst_of(errors: Mapping[str, float]) -> str:
    """The name of the largest error, or of a NaN."""
    return max(errors, key=lambda name: (math.isnan(errors[name]), errors[name]))


def compare(
    what: str,
    found: Mapping[str, np.ndarray],
    expected: Mapping[str, np.ndarray],
    bound: float = BOUND,
) -> Row:
    """A row that judges the largest error, or the first NaN."""
    errors = errors_of(found, expected)
    worst = worst_of(errors)
    return Row(what, errors, errors[worst], bound, worst.removeprefix(LLM_PREFIX))


def compare_rounding(
    what: str, ours: Sequence[Mapping[str, float]], theirs: Sequence[Mapping[str, float]]
) -> Row:
    """A row that judges the median over tensors of JAX's error over PyTorch's.

    Args:
        what: the quantity.
        ours, theirs: for every draw, each tensor's error against the truth. They are averaged
            geometrically: in one draw, all tensors share the luck of its largest activations.
    """

    def typical(draws: Sequence[Mapping[str, float]]) -> dict[str, float]:
        with np.errstate(divide="ignore"):  # what is exact in one draw has the error 0
            return {k: float(np.exp(np.mean(np.log([d[k] for d in draws])))) for k in draws[0]}

    jax_errors, torch_errors = typical(ours), typical(theirs)
    ratios = [
        1.0 if error == torch_errors[k] else error / (torch_errors[k] or math.nan)
        for k, error in jax_errors.items()
    ]
    medians = (statistics.median(side.values()) for side in (jax_errors, torch_errors))
    note = "median errors: {:.2g} in JAX, {:.2g} in PyTorch".format(*medians)
    return Row(what, jax_errors, statistics.median(ratios), BFLOAT16_RATIO, note)


def compare_tokens(case: probes.Case) -> Row:
    """Ids, supervised tokens and places of soft tokens of every training example.

    On the other side stands the tokenizer that transformers chooses for the directory, used as the
    release uses its own.
    """
    processor, dataset, types = case.processor, case.dataset, parse_label(case.config.label)
    theirs = transformers.AutoTokenizer.from_pretrained(case.directory)
    theirs.add_tokens(list(placeholders()), special_tokens=True)
    start, end = theirs.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    wrong = dict.fromkeys(("tokens", "supervised tokens", "soft tokens"), 0)
    for kind in types:
        examples = processor.training_examples(dataset, kind)
        for clip, example in zip(dataset.index, examples, strict=True):
            bucket = Bucket(len(example), len(example) - example.answer_start)
            batch = processor.collate(dataset, [(0, example)], bucket)
            texts = (
                processor.prompts.prompt(processor.mode, processor.token_counts, clip, kind),
                processor.prompts.answer(kind, clip),
            )
            prompt, answer = (theirs(text, add_special_tokens=False).input_ids for text in texts)
            tokens = [start, *prompt, *answer, end]
            soft, first = [0] * len(tokens), 1
            for slot, count in processor.token_counts.items():
                placeholder = theirs.convert_tokens_to_ids(MODALITIES[slot].placeholder)
                at = [i for i, token in enumerate(tokens) if token == placeholder]
                for i, place in enumerate(at):
                    soft[place] = first + i
                first += count
            wrong["tokens"] += batch["tokens"][0].tolist() != tokens
            wrong["supervised tokens"] += batch["targets"][0].tolist() != [*answer, end]
            wrong["soft tokens"] += batch["soft_token_index"][0].tolist() != soft
    what = f"tokens of {len(types) * len(dataset):,} examples"
    return Row(what, wrong, sum(wrong.values()), 0, "examples that differ")


def compare_fusers(config: FusionConfig, llm_width: int, seed: int) -> list[Row]:
    """Every slot by every kind of head and pre-fusion, on samples that lack this or that."""
    rows, samples = [], 8
    rng = np.random.default_rng(seed)
    for kind, (pre_fusion, image_head) in probes.HEADS.items():
        fusion = dataclasses.replace(
            config,
            slots=tuple(MODALITIES),
            kinds={
                "video": kind,
                "audio": kind,
                "image": image_head,
                "multi": "attention" if pre_fusion == "none" else pre_fusion,
            },
        )
        features = {
            name: rng.standard_normal((samples, frames, fusion.feature_width(name)), np.float32)
            for name, frames in {"audio": 8, "face": 8, "frame": 5, "image": 3}.items()
        }
        present = {name: rng.random(samples) < 0.7 for name in fusion.inputs}
        module = Fusion(fusion, llm_width)
        abstract = jax.eval_shape(module.init, jax.random.key(0), features, present)["params"]
        params = random_parameters(abstract, seed)
        ours = jax.jit(module.apply)({"params": params}, features, present)

        fusers = Fusers(fusion, llm_width).eval()
        load_trainable(fusers, {"fusion": params})
        with torch.no_grad():
            theirs = fusers.soft_tokens(
                *({k: torch.from_numpy(x) for k, x in part.items()} for part in (features, present))
            )
        ends = np.cumsum(list(fusion.token_counts().values()))[:-1]
        by_slot = (
            dict(zip(fusion.slots, np.split(np.asarray(x), ends, axis=1), strict=True))
            for x in (ours, theirs)
        )
        rows.append(compare(f"soft tokens, {kind} heads", *by_slot))
    return rows


def compare_schedules(run: OptimizerConfig, steps: int) -> Row:
    """Every learning rate of this run, and some thousand of the published recipe's."""
    ours, theirs = {}, {}
    for name, config, length in (
        ("of this run", run, steps),
        ("of the recipe", OptimizerConfig(), 300_000),
    ):
        at = np.unique(np.linspace(0, length, min(length, 4000) + 1).astype(int))
        ours[name] = np.asarray(jax.vmap(learning_rate_schedule(config, length))(at))
        theirs[name] = np.array([learning_rate(config, step, length) for step in at.tolist()])
    return compare("learning rate", ours, theirs, SCHEDULE)


def compare_update(trainable: Any, config: OptimizerConfig, seed: int) -> Row:
    """What AdamW adds to every parameter, from the same random gradients."""
    gradient = random_parameters(trainable, seed + 1)
    parameters, gradients = by_torch_name(trainable), by_torch_name(gradient)
    return compare(
        "change by an update from equal gradients",
        probes.update_jax(trainable, gradient, config),
        probes.update_torch(parameters, gradients, config),
    )


def compare_models(case: probes.Case, heads: str, seed: int, update: bool = False) -> list[Row]:
    """Everything between a batch and its gradients, in float32; then one update, if asked for.

    One framework after the other, so that a large base is in memory once.
    """
    batch = case.pipeline.batch(0)
    one_update = {"steps": 1, "optimizer.warmup_steps": 0}
    program, base = probes.load_jax(case, "float32", **one_update)
    trainable = random_trainable(program.model, seed)
    ours = probes.make_probe_jax(program.model)(base, trainable, batch)
    if update:
        train = probes.make_train_jax(program.train_step, program.optimizer)
        updated, _ = train(base, trainable, [batch])
    del base

    twin = probes.load_torch(case, "float32")
    load_trainable(twin, trainable)
    theirs = probes.probe_torch(twin, batch)
    rows = [
        compare(f"{name}, {heads} heads", ours[name], theirs[name], BOUND_OF.get(name, BOUND))
        for name in ours
    ]
    if update:
        optimizer = build.optimizer_config(program.config)
        rows.append(compare_update(trainable, optimizer, seed))
        probes.train_torch(twin, [batch], optimizer, steps=1)
        expected = {k: p.numpy(force=True) for k, p in twin.named_parameters() if p.requires_grad}
        rows.append(compare("parameters after an update", by_torch_name(updated), expected))
    return rows


def compare_bfloat16(case: probes.Case, seed: int, draws: int) -> list[Row]:
    """Rounding errors of both in bfloat16, against the twin in float32.

    Every draw has parameters and a batch of its own: a few rows, for many draws tell more than
    many rows.
    """
    program, base = probes.load_jax(case, "bfloat16")
    probe_jax = probes.make_probe_jax(program.model)

    def inputs(i: int) -> tuple[Any, Batch]:
        batch = jax.tree.map(lambda x: x[:ROWS], case.pipeline.batch(i))
        return random_trainable(program.model, seed + i), batch

    def run(twin: Twin, trainable: Any, batch: Batch) -> probes.Quantities:
        load_trainable(twin, trainable)
        return probes.probe_torch(twin, batch)

    def errors(probe: Callable[[Any, Batch], probes.Quantities]) -> list[dict[str, Any]]:
        found = []
        for i, true in enumerate(truth):
            values = probe(*inputs(i))
            found.append({name: errors_of(values[name], true[name]) for name in true})
        return found

    twin = probes.load_torch(case, "float32")
    truth = [run(twin, *inputs(i)) for i in range(draws)]
    del twin
    ours = errors(functools.partial(probe_jax, base))
    del base
    theirs = errors(functools.partial(run, probes.load_torch(case, "bfloat16")))
    return [
        compare_rounding(
            f"bfloat16: {name}, {draws} draws",
            *([draw[name] for draw in side] for side in (ours, theirs)),
        )
        for name in truth[0]
        if name != "loss"  # how far a single number is off is luck
    ]


def compare_training(case: probes.Case) -> tuple[Row, dict[str, list[float]]]:
    """The losses of one run each, from the same start on the same batches, in float32.

    A third run tells what rounding alone does in the course of a run: JAX again, from a start that
    differs in the last bit.
    """
    config, optimizer = case.config, build.optimizer_config(case.config)

    def batches():
        return case.pipeline.batches(0, config.steps)

    program, base = probes.load_jax(case, "float32")
    start = jax.device_get(program.init_state(config.seed)["trainable"])
    nudged = jax.tree.map(lambda x: np.nextafter(x, np.float32(np.inf)), start)
    train = probes.make_train_jax(program.train_step, program.optimizer)
    ours, control = (train(base, trainable, batches())[1] for trainable in (start, nudged))
    del base
    twin = probes.load_torch(case, "float32")
    load_trainable(twin, start)
    theirs = probes.train_torch(twin, batches(), optimizer, config.steps)

    apart = {f"step {i}": abs(a - b) / b for i, (a, b) in enumerate(zip(ours, theirs, strict=True))}
    worst = worst_of(apart)
    note = f"{worst}; loss {theirs[0]:.3f} -> {theirs[-1]:.3f}"
    curves = {"jax": ours, "torch": theirs, "jax_nudged": control}
    return Row(f"losses of {config.steps} updates", apart, apart[worst], PARITY_BOUND, note), curves


COLUMNS = {
    "what": lambda row: row["what"],
    "values": lambda row: f"{len(row['errors'])}",
    "bound": lambda row: f"{row['bound']:.2g}",
    "judged": lambda row: f"{row['value']:.2g}",
    "median": lambda row: f"{statistics.median(row['errors'].values()):.2g}",
    "where": lambda row: row["note"],
    "": lambda row: "ok" if row["passed"] else "**red**",
}


def table(report: Report) -> str:
    """A Markdown table of a report."""
    s = report["settings"]
    return (
        f"{s['llm']} on {s['device']}, {s['batch_size']} rows of {s['length']} tokens, "
        f"seed {s['seed']}, {s['wall_s']:.0f} s\n\n" + harness.columns(COLUMNS, report["rows"])
    )


def finish(_: argparse.Namespace, report: Report, path: Path) -> None:
    """Draw the training runs beside the result file; end with status 1 if a row is red."""
    draw_parity(report, path.with_suffix(".png"))
    raise SystemExit(int(not all(row["passed"] for row in report["rows"])))


def use_device(name: str | None) -> str:
    """Points both frameworks at one kind of device; returns "cpu" or "cuda".

    Args:
        name: "cpu", "cuda", or None for what both have.

    Raises:
        ConfigError: one of them has no such device.
    """
    if name == "cpu" or (name is None and not torch.cuda.is_available()):
        jax.config.update("jax_platforms", "cpu")
        return "cpu"
    # The two take turns with the GPU's memory, of which JAX's own allocator gives none back.
    os.environ.setdefault("XLA_PYTHON_CLIENT_ALLOCATOR", "platform")
    found = {"JAX": jax.default_backend() == "gpu", "PyTorch": torch.cuda.is_available()}
    if all(found.values()):
        return "cuda"
    if name == "cuda":
        lacking = " and ".join(framework for framework, has in found.items() if not has)
        raise ConfigError(f"--device=cuda, but {lacking} found no GPU; use its CUDA build")
    return "cpu"


def _under_way(what: str) -> Elapsed:
    return Elapsed(f"comparing {what}", stream=sys.stderr)


def check(args: argparse.Namespace, device: str) -> dict[str, Any]:
    """Every comparison on a device, as `use_device` names it; returns the report."""
    began, rows = time.perf_counter(), []
    torch.manual_seed(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        cases = {
            heads: probes.make_case(
                probes.make_config(args.llm, args.steps, args.batch_size, args.seed, heads),
                Path(temporary) / "records",
                device,
            )
            for heads in probes.HEADS
        }
        case = cases["attention"]
        optimizer = build.optimizer_config(case.config)
        with _under_way("tokens, heads and schedules"):
            rows.append(compare_tokens(case))
            fusion = build.fusion_config(case.config)
            rows += compare_fusers(fusion, case.llm.hidden_size, args.seed)
            rows.append(compare_schedules(optimizer, args.steps))
        for heads, other in cases.items():
            with _under_way(f"models with {heads} heads"):
                rows += compare_models(other, heads, args.seed, update=other is case)
        with _under_way("rounding to bfloat16"):
            rows += compare_bfloat16(case, args.seed, args.draws)
        with _under_way(f"{args.steps} updates on both sides"):
            row, curves = compare_training(case)
        rows.append(row)
        settings = {
            "llm": args.llm if args.llm == "tiny" else Path(args.llm).name,
            "device": device,
            "batch_size": args.batch_size,
            "length": case.pipeline.buckets[-1].length,
            "seed": args.seed,
            "wall_s": time.perf_counter() - began,
        }
    return {
        "settings": settings,
        "rows": [row.as_json() for row in rows],
        "curves": curves,
    }


def run(args: argparse.Namespace) -> Report:
    """Every comparison in full precision; returns the report.

    Raises:
        UserError: a base or a device that cannot be used.
    """
    transformers.utils.logging.disable_progress_bar()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = use_device(args.device)
    with jax.default_matmul_precision("highest"):
        return check(args, device)


def flags(add: Callable[..., Any]) -> None:
    add("--llm", default="tiny", help="a base's directory; default: what ships")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if both have it")
    add("--batch-size", type=at_least(1), default=16)
    add("--steps", type=at_least(1), default=200, help="updates of the training run")
    add("--draws", type=at_least(1), default=64, help="of weights, for bfloat16's errors")
    add("--seed", type=int, default=0)


COMMAND = harness.Measurement(
    "parity",
    run,
    harness.each(table),
    lambda args: "parity",
    flags,
    finish=finish,
    packages=("torch", "peft"),
)

if __name__ == "__main__":
    COMMAND.main()
