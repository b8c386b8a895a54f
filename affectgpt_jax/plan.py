"""What a training run takes, before a node is booked: `affectgpt plan`.

    affectgpt plan --config=affectgpt_qwen25_7b \\
        --device=a100-80g --devices=8 --config.batch_size=24
    affectgpt plan --config=affectgpt_qwen25_7b \\
        --config.llm=/models/Qwen3-8B --config.mesh=fsdp:8 \\
        --config.batch_size=24 --device=a100-40g --devices=8 --json
    affectgpt plan --config=affectgpt_qwen25_7b \\
        --device=h100-80g --devices=1 --shape=2x4096 --compile
    affectgpt plan --rl --config=affectgpt_qwen25_7b \\
        --device=h100-80g --devices=1 --config.rl.group=8

Compiles the train step of a config for emulated devices, from shapes alone: no weights, no data, no
GPU. --config.llm is the name of a published model or a directory with a config.json, and
--config.key=value overrides any key, as in training. Prints for one device the memory of an update
and what it consists of; FLOPs; what devices send each other; the least time that an update can
take, and what is to be expected; how that changes from 1 to 512 GPUs; and which layout,
micro-batch and rematerialisation to take.

Rows are as long as the longest that training may have: config.pack_length, or config.max_tokens
where a row is one clip. Tokens are places in rows, padding included.

With --rl, a step of `affectgpt reinforce` is planned instead: memory and time of its rollout and of
its update. Prompts have --prompt tokens, and the longest answer of a step has --answer.

With --compile, XLA's CUDA compiler compiles the step for the GPUs as well, which takes the extra
[gpu-compile] and no GPU. It says what a device holds, what it launches, how many bytes that moves
and what is sent; nothing is run or measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from affectgpt_jax import build, cli, post_training, rollouts, runtime
from affectgpt_jax.common.progress import Elapsed
from affectgpt_jax.common.text import print_lines
from affectgpt_jax.common.trees import device_nbytes, parameter_count
from affectgpt_jax.config import ConfigError, parse_command_line
from affectgpt_jax.data.packing import CLIP_ROOM, Bucket, round_up
from affectgpt_jax.gpu_plan import Compilation, Request
from affectgpt_jax.planner import Layout, Planner, abstract_mesh
from affectgpt_jax.program import check_rows
from affectgpt_jax.rollout_planner import RolloutPlanner
from affectgpt_jax.training import collectives, gpu_compile, memory, sharding
from affectgpt_jax.training.devices import DEVICES
from affectgpt_jax.training.roofline import BANDWIDTH_SHARE, EFFICIENCY, MATMUL_SHARE, Shape

# Under `hybrid` labels half of AffectGPT's examples are labels and half descriptions, behind
# prompts of about 120 tokens: 55 % of their tokens are supervised, and rows have room for more.
MEAN_CLIP = 255
PAPER_CLIPS = 31_327  # of MER-Caption+
SUPERVISED = 0.6
PROMPT = 150  # tokens: of the longest such prompts
CURVE = tuple(2**i for i in range(10))
GIB = 2**30


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, ConfigDict]:
    """Read the command line: flags of the plan, and those that training has.

    Raises:
        ConfigError: as `parse_command_line`.
        SystemExit: after the help, or for a wrong flag of the plan.
    """
    parser = cli.make_parser("affectgpt plan", __doc__)
    add = parser.add_argument
    add(
        "--device",
        choices=DEVICES,
        default="a100-80g",
        metavar="NAME",
        help=f"one of {', '.join(DEVICES)}; default: a100-80g",
    )
    add("--devices", type=_positive, default=8, metavar="N", help="how many; default: 8")
    add("--length", type=_positive, metavar="TOKENS", help="of a row; default: the longest")
    add(
        "--targets",
        type=_positive,
        metavar="TOKENS",
        help=f"supervised ones of a row; default: {SUPERVISED:.0%}% of it",
    )
    add(
        "--efficiency",
        type=_share,
        default=EFFICIENCY,
        metavar="SHARE",
        help=f"of the device's peaks, to expect; default: {EFFICIENCY}",
    )
    add(
        "--shape",
        type=cli.argument_type(_rows_and_tokens),
        metavar="ROWSxTOKENS",
        help="rows of a device at a time and their length, all tokens but the last supervised, in "
        "place of --length, --targets and --config.batch_size",
    )
    add("--rl", action="store_true", help="plan a step of `affectgpt reinforce`")
    add(
        "--prompt",
        type=_positive,
        metavar="TOKENS",
        help=f"with --rl: of the longest prompt; default: {PROMPT}, where that fits a row",
    )
    add(
        "--answer",
        type=_positive,
        metavar="TOKENS",
        help="with --rl: of the longest answer of a step; default: config.rl.max_new_tokens",
    )
    add("--compile", action="store_true", help="also with XLA's CUDA compiler, for the GPUs")
    add(
        "--json",
        nargs="?",
        const=cli.STDOUT,
        metavar="FILE",
        help="write the plan to a file as JSON; without a file, print it in place of the report",
    )
    cli.add_download_flag(add)
    argv = cli.normal_flags(argv)
    overrides = [arg for arg in argv if arg.startswith("--config.")] if "--rl" in argv else []
    config, arguments = parse_command_line([a for a in argv if a not in overrides], parser)
    if arguments.rl:
        config = post_training.config_from(config, "rl", overrides)
    if arguments.download:
        build.base_config(config.llm, download=True)
    _check_kinds_of_rows(arguments)
    if arguments.shape:
        named = [
            *(f"--{flag}" for flag in ("length", "targets") if getattr(arguments, flag)),
            *(flag for flag in ("--config.batch_size",) if _names(argv, flag)),
        ]
        if named:
            raise ConfigError(f"--shape stands in place of {', '.join(named)}; name one of them")
        rows, length = arguments.shape
        arguments.length, arguments.targets = length, max(1, length - 1)
        data, fsdp, _ = sharding.parse_mesh(config.mesh, arguments.devices)
        config.batch_size = rows * data * fsdp * config.gradient_accumulation_steps
    return arguments, config


def _check_kinds_of_rows(arguments: argparse.Namespace) -> None:
    """Refuse flags that say how long rows are of the other kind of plan."""
    supervised, reinforced = ("shape", "length", "targets"), ("prompt", "answer")
    wrong = supervised if arguments.rl else reinforced
    for flag in wrong:
        if getattr(arguments, flag):
            instead = " and ".join(f"--{name}" for name in reinforced)
            why = f"rows of --rl follow from {instead}" if arguments.rl else "it belongs to --rl"
            raise ConfigError(f"--{flag} cannot stand here: {why}")


def _names(argv: Sequence[str], flag: str) -> bool:
    return any(argument.split("=")[0] == flag for argument in cli.normal_flags(argv))


def _rows_and_tokens(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise ValueError(f"{text!r} is not ROWSxTOKENS, as in 2x4096")
    return int(found[1]), int(found[2])


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share over 0 and up to 1")
    return share


def rows_of(config: ConfigDict, length: int | None, targets: int | None) -> Bucket:
    """The shape of the longest rows of a config, or of those that are asked for.

    Raises:
        ConfigError: more supervised tokens than tokens.
    """
    length = length or config.pack_length or config.max_tokens
    targets = targets or int(round_up(int(SUPERVISED * length)))
    if targets > length:
        raise ConfigError(f"--targets={targets} are more than the {length} tokens of a row")
    clips = max(1, round(CLIP_ROOM * length / MEAN_CLIP)) if config.pack_length else 1
    return Bucket(length, targets, clips)


def set_up(config: ConfigDict, arguments: argparse.Namespace) -> tuple[Planner, Layout, Request]:
    """The planner of a config, the layout that it asks for, and what there is to compile.

    Args:
        config: as training reads it.
        arguments: of `parse_arguments`.

    Raises:
        ConfigError, WeightsError, MeshError: what training would refuse as well.
    """
    shape = Shape(*sharding.parse_mesh(config.mesh, arguments.devices))
    check_rows(config, abstract_mesh(shape))
    rows = rows_of(config, arguments.length, arguments.targets)
    planner = Planner(config, DEVICES[arguments.device], rows, arguments.efficiency)
    microbatches = config.gradient_accumulation_steps
    on_device = config.batch_size // (microbatches * shape.data * shape.fsdp)
    layout = planner.layout(shape, microbatches, on_device, config.remat)
    plain = json.loads(config.to_json())
    request = Request(plain, arguments.device, arguments.devices, rows, layout.remat)
    return planner, layout, request


def make_plan(config: ConfigDict, arguments: argparse.Namespace) -> dict[str, Any]:
    """The plan of a config, of plain values in bytes, seconds and FLOPs.

    Args:
        config: as training reads it.
        arguments: of `parse_arguments`; there must be as many emulated devices.

    Raises:
        ConfigError, WeightsError, MeshError: what training would refuse as well.
        ProgramError: XLA's program cannot be read.
        CompilerError: XLA's CUDA compiler is asked for and missing, or refuses the step.
    """
    if arguments.compile and (missing := gpu_compile.unavailable()):
        raise gpu_compile.CompilerError(missing)
    device = DEVICES[arguments.device]
    planner, layout, request = set_up(config, arguments)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[: arguments.devices])
    rows, shape, remat = planner.rows, layout.shape, layout.remat
    # Where the GPU's compiler works beside, its line is the one that counts.
    elapsed = Elapsed(
        f"compiling for {mesh.size} emulated device{'s' * (mesh.size > 1)}",
        stream=sys.stderr,
        enabled=not arguments.compile,
    )
    with Compilation(request, arguments.compile) as compilation:
        with elapsed:
            compiled, sent = collectives.compile_and_read(planner.lower(mesh, remat), mesh)
        on_gpu = compilation.result()
    asked = planner.layout(shape, layout.microbatches, layout.rows, remat, sent)
    state, base = planner.abstract(shape)
    flops = planner.flops()
    best = planner.recommend(mesh.size, config.batch_size, shape.tensor)
    attention = planner.attention(shape.tensor)
    tokens = config.batch_size * rows.length
    return {
        "config": _config_facts(config, batch_size=config.batch_size),
        "device": device._asdict(),
        "rows": dataclasses.asdict(rows),
        "attention": {"name": attention.name, "reason": attention.reason},
        "parameters": {
            "base": parameter_count(base),
            "lora": parameter_count(state["trainable"]["lora"]),
            "fusion": parameter_count(state["trainable"]["fusion"]),
        },
        "arguments": {
            "base": device_nbytes(base),
            "trainable": device_nbytes(state["trainable"]),
            "optimizer": device_nbytes(state["opt_state"]),
            "compiled": compiled.memory_analysis().argument_size_in_bytes,
        },
        "run": length_of_run(config),
        "efficiency": arguments.efficiency,
        "usable": int(memory.USABLE * planner.limit),
        "most_rows": {p: planner.most_rows(shape, p) for p in memory.POLICIES},
        "flops": {
            **{f"row_{name}": value for name, value in flops._asdict().items()},
            "step": config.batch_size * flops.total,
            "token": flops.total / rows.length,
        },
        "collectives": [c._asdict() for c in sent],
        "layout": _summary(asked, tokens),
        "estimate": {"peak_gib": asked.memory.total / GIB},
        **({"compiled": on_gpu} if on_gpu else {}),
        "curve": [
            _summary(layout, layout.batch_size * rows.length)
            for layout in planner.curve(asked, CURVE, config.remat)
        ],
        "recommended": best and _summary(best, tokens) | {"reason": reason(planner, best)},
    }


def plan_of_reinforcement(config: ConfigDict, arguments: argparse.Namespace) -> dict[str, Any]:
    """The same of a step of reinforcement; config and errors are those of `reinforce`."""
    if arguments.compile and (missing := gpu_compile.unavailable()):
        raise gpu_compile.CompilerError(missing)
    shape = Shape(*sharding.parse_mesh(config.mesh, arguments.devices))
    shares, rl = shape.data * shape.fsdp, config.rl
    rollouts.check_prompts(config, shares)
    config.batch_size = sum(rollouts.row_counts(config, shares))
    device, room = DEVICES[arguments.device], max(1, config.max_tokens - rl.max_new_tokens)
    prompt = arguments.prompt or min(PROMPT, room)
    answer = arguments.answer or rl.max_new_tokens
    lengths = {
        "prompt": prompt,
        "answer": answer,
        "supervised": (config.max_tokens, int(round_up(int(SUPERVISED * config.max_tokens)))),
    }
    planner = RolloutPlanner(config, device, efficiency=arguments.efficiency, **lengths)
    microbatches = config.gradient_accumulation_steps
    layout = planner.update_layout(shape, microbatches)
    request = Request(
        json.loads(config.to_json()),
        arguments.device,
        arguments.devices,
        planner.update.rows,
        layout.remat,
        lengths,
    )
    rollout, passes = planner.rollout_memory(shape), planner.passes(layout)
    seconds = {
        name: {"times": times, "floor": each.floor, "expected": each.expected}
        for name, (times, each) in passes.items()
    }
    step = {
        kind: sum(found["times"] * found[kind] for found in seconds.values())
        for kind in ("floor", "expected")
    }
    with Compilation(request, arguments.compile) as compilation:
        on_gpu = compilation.result()
    if on_gpu:
        floors = {name: 1e-3 * found["floor_ms"] for name, found in on_gpu["passes"].items()}
        on_gpu["step_s"] = sum(passes[name].times * floor for name, floor in floors.items())
    state, base = planner.update.abstract(shape)
    peak = max(rollout.total, layout.memory.total)
    attention = {
        "prompts": planner.update.backend(shape.tensor),
        "update": planner.update.attention(shape.tensor),
    }
    return {
        "config": _config_facts(config, rl=json.loads(rl.to_json())),
        "device": device._asdict(),
        "devices": arguments.devices,
        "mesh": shape._asdict(),
        "prompt": prompt,
        "answer": answer,
        "slots": planner.slots,
        "rows": dataclasses.asdict(planner.update.rows) | {"count": config.batch_size},
        "attention": {name: a.name for name, a in attention.items()},
        "parameters": {
            "base": parameter_count(base),
            "trainable": parameter_count(state["trainable"]),
        },
        "gradient_accumulation_steps": microbatches,
        "remat": layout.remat,
        "memory": {
            "rollout": rollout._asdict() | {"total": rollout.total},
            "update": layout.memory._asdict() | {"total": layout.memory.total},
        },
        "estimate": {"peak_gib": peak / GIB},
        "usable": planner.usable,
        "fits": peak <= planner.usable,
        "fewest_microbatches": planner.microbatches(shape),
        "efficiency": arguments.efficiency,
        "seconds": seconds | {"step": step},
        "answers_per_s": rl.prompts * rl.group / step["expected"],
        "run_hours": config.steps * step["expected"] / 3600,
        **({"compiled": on_gpu} if on_gpu else {}),
    }


def _config_facts(config: ConfigDict, **own: Any) -> dict[str, Any]:
    """What a plan says of its config; `own` is what it says beyond other kinds of plans."""
    return {
        "llm": config.llm,
        "lora_rank": config.lora.rank,
        "input": config.input,
        "dtype": config.dtype,
        "base_precision": config.base_precision,
        **own,
        "steps": config.steps,
    }


def length_of_run(config: ConfigDict) -> dict[str, Any]:
    """Updates, clips and epochs of a config's training, as far as they can be told without data.

    Returns:
        "updates", "clips" (of packed rows about), "epochs" and "of": which clips; null where the
        training sets are not here.
    """
    rows = config.steps * config.batch_size
    clips = rows * config.pack_length // MEAN_CLIP if config.pack_length else rows
    known = build.training_clips(config)
    if known is None and not (config.data.train or config.data.mixture):
        return {
            "updates": config.steps,
            "clips": clips,
            "epochs": clips / PAPER_CLIPS,
            "of": f"the paper's {PAPER_CLIPS:,} clips",
        }
    epochs = known and clips / known
    of = known and f"{known:,} clips"
    return {"updates": config.steps, "clips": clips, "epochs": epochs, "of": of}


def _summary(layout: Layout, tokens: int) -> dict[str, Any]:
    time = layout.time
    return {
        "mesh": layout.shape._asdict(),
        "devices": layout.shape.data * layout.shape.fsdp * layout.shape.tensor,
        "gradient_accumulation_steps": layout.microbatches,
        "rows": layout.rows,
        "remat": layout.remat,
        "flags": layout.flags,
        "memory": layout.memory._asdict() | {"total": layout.memory.total},
        "fits": layout.fits,
        "seconds": {
            "compute": time.compute,
            "memory": time.memory,
            "network": time.network,
            "floor": time.floor,
            "expected": time.expected,
        },
        "tokens_per_s": tokens / time.expected,
        "tokens_per_s_at_most": tokens / time.floor,
    }


def reason(planner: Planner, best: Layout) -> str:
    """Why a layout is recommended, in a few clauses."""
    usable = memory.USABLE * planner.limit

    def needs(layout: Layout) -> str:
        return f"{layout.memory.total / GIB:.1f} of {usable / GIB:.1f} GiB"

    clauses = []
    shares = best.shape.data * best.shape.fsdp
    if best.shape.fsdp == 1:
        clauses.append("the base fits whole beside the activations")
        if shares > 1:
            clauses[0] += ", so devices send each other gradients alone"
    else:
        whole = planner.layout(Shape(shares, 1, best.shape.tensor), best.microbatches, best.rows)
        clauses.append(
            f"with the base whole on every device it would be {_against(whole, best, needs)}"
        )
    if best.microbatches > 1:
        together = planner.layout(best.shape, 1, best.rows * best.microbatches)
        clauses.append(f"the batch in one piece would be {_against(together, best, needs)}")
    if best.remat != "none":
        lighter = memory.POLICIES[memory.POLICIES.index(best.remat) - 1]
        other = planner.layout(best.shape, best.microbatches, best.rows, lighter)
        slower = lighter not in memory.tried_by_auto(planner.rows.clips > 1)
        clauses.append(
            f"remat {lighter} would take {needs(other)}"
            + (", and with packed rows no less time" if slower else "")
        )
    else:
        clauses.append(f"nothing has to be computed again ({needs(best)})")
    return "; ".join(clauses)


def _against(other: Layout, best: Layout, needs: Callable[[Layout], str]) -> str:
    if not other.fits:
        return f"too large ({needs(other)})"
    return f"slower by {other.time.expected / best.time.expected - 1:.0%} (remat {other.remat})"


def report(plan: dict[str, Any]) -> str:
    """A plan for people, in 80 columns."""
    lines = _lines_of_reinforcement(plan) if "rl" in plan["config"] else _lines(plan)
    return "\n".join(line for text in lines for line in cli.wrap_line(text))


def _lines(plan: dict[str, Any]) -> Iterator[str]:
    config, rows, layout = plan["config"], plan["rows"], plan["layout"]
    count, seconds = layout["devices"], layout["seconds"]
    parameters, flops, needed = plan["parameters"], plan["flops"], layout["memory"]
    base = config["base_precision"] or config["dtype"]
    adapters = f"LoRA rank {config['lora_rank']}" if config["lora_rank"] else "no LoRA"
    yield f"{config['llm']} in {base}, {adapters}, input {config['input']}"
    yield (
        f"{count} x {plan['device']['name']}, mesh {_mesh(layout['mesh'])}, remat "
        f"{layout['remat']}, attention {plan['attention']['name']} ({plan['attention']['reason']})"
    )
    yield (
        f"an update: {config['batch_size']} rows of {rows['length']:,} tokens "
        f"({rows['targets']:,} supervised), {layout['rows']} on a device at a time"
        + (
            f", in {layout['gradient_accumulation_steps']} microbatches"
            if layout["gradient_accumulation_steps"] > 1
            else ""
        )
    )
    yield ""
    yield "memory of one device            GiB"
    exact, gradient = plan["arguments"], plan["arguments"]["trainable"]
    for name, size, note in (
        ("frozen base", exact["base"], f"exact; {parameters['base']:,} parameters in all"),
        (
            "trained parameters",
            exact["trainable"],
            f"exact; LoRA {parameters['lora']:,}, heads {parameters['fusion']:,}",
        ),
        ("optimizer state", exact["optimizer"], "exact"),
        ("gradients", gradient, ""),
        ("saved activations", needed["saved"], "of the traced program"),
        ("work of a moment", needed["work"], "a layer's backward pass, or logits"),
        ("weights brought together", needed["gathered"], "by fsdp, for a layer and the next"),
    ):
        if size:
            yield f"  {name:<26} {size / GIB:6.2f}  {note}".rstrip()
    verdict = "fits" if layout["fits"] else "DOES NOT FIT"
    yield (
        f"  {'peak':<26} {needed['total'] / GIB:6.2f}  {verdict}: "
        f"{plan['usable'] / GIB:.1f} of {plan['device']['memory'] / GIB:.1f} GiB are usable"
    )
    yield (
        f"  the compiled step's arguments take {exact['compiled'] / GIB:.2f} GiB; room for rows: "
        + ", ".join(f"{n} with remat {p}" for p, n in plan["most_rows"].items())
    )
    yield ""
    if "compiled" in plan:
        yield from _compiled(plan)
        yield ""
    yield (
        f"FLOPs: {flops['step'] / 1e12:,.1f} T an update, {flops['token'] / 1e9:.1f} G a token "
        "(model FLOPs, without what is computed again)"
    )
    yield ""
    if plan["collectives"]:
        yield "sent in an update, before the GPU compiler combines them"
        for c in plan["collectives"]:
            if c["bytes"] >= 1e6:
                yield (
                    f"  {c['kind']:<18} over {'+'.join(c['axes']):<12} {c['count']:6,} operations "
                    f"{c['bytes'] / 1e9:9.3f} GB"
                )
        small = [c for c in plan["collectives"] if c["bytes"] < 1e6]
        if small:
            number, size = (sum(c[key] for c in small) for key in ("count", "bytes"))
            yield f"  {number:,} smaller ones, {size / 1e6:.3f} MB together"
    else:
        yield "nothing is sent: one device"
    yield ""
    yield (
        f"an update takes at least {_ms(seconds['floor'])} (matmuls {_ms(seconds['compute'])}, "
        f"memory {_ms(seconds['memory'])}, network {_ms(seconds['network'])}, all at once and at "
        "the makers' peaks)"
    )
    yield (
        f"expected: {_ms(seconds['expected'])}, {layout['tokens_per_s']:,.0f} tokens/s, "
        f"{config['batch_size'] / seconds['expected']:,.1f} rows/s (with the device at "
        f"{plan['efficiency']:.0%} of its peaks and the network after it; at most "
        f"{layout['tokens_per_s_at_most']:,.0f} tokens/s)"
    )
    hours, run = config["steps"] * seconds["expected"] / 3600, plan["run"]
    epochs = f", {run['epochs']:.1f} epochs of {run['of']}" if run["epochs"] else ""
    yield (
        f"the run: {run['updates']:,} updates, about {run['clips']:,} clips{epochs}; with rows of "
        f"that length {hours:,.1f} h, {count * hours:,.0f} GPU hours, validation not counted"
    )
    yield ""
    yield "the same rows on every device, more or fewer of them (latency and stragglers left out)"
    yield (f"  GPUs {'mesh':<20} {'remat':<16} {'GiB':>5} {'expected':>9} {'tokens/s':>10} a GPU")
    first = plan["curve"][0]["tokens_per_s"] / plan["curve"][0]["devices"]
    for point in plan["curve"]:
        at, rate = point["seconds"], point["tokens_per_s"]
        yield (
            f"  {point['devices']:4} {_mesh(point['mesh']):<20} {point['remat']:<16} "
            f"{point['memory']['total'] / GIB:5.1f} {_ms(at['expected']):>9} {rate:10,.0f} "
            f"{rate / point['devices'] / first:5.0%}" + ("" if point["fits"] else " too large")
        )
    yield ""
    best = plan["recommended"]
    if best is None:
        yield (
            "recommended: nothing fits; take more devices, shorter rows, or "
            "--config.base_precision=nf4"
        )
        return
    yield f"recommended: {best['flags']}"
    yield f"  {best['reason']}; rows on a device at a time: {best['rows']}"
    yield f"  expected {_ms(best['seconds']['expected'])}, {best['tokens_per_s']:,.0f} tokens/s"


# What a step of reinforcement consists of, in words.
_PASSES = {
    "prefill": "prompts, first tokens",
    "insert": "their cache to all answers",
    "decode": "a token of every answer",
    "log_probs": "log-probabilities before",
    "update": "the update",
}


def _lines_of_reinforcement(plan: dict[str, Any]) -> Iterator[str]:
    config, rows, memories, rl = plan["config"], plan["rows"], plan["memory"], plan["config"]["rl"]
    base = config["base_precision"] or config["dtype"]
    yield (
        f"{config['llm']} in {base}, LoRA rank {config['lora_rank']}, input {config['input']}, "
        "a step of reinforcement"
    )
    yield (
        f"{plan['devices']} x {plan['device']['name']}, mesh {_mesh(plan['mesh'])}; attention: "
        f"prompts {plan['attention']['prompts']}, update {plan['attention']['update']}; remat "
        f"{plan['remat']}"
    )
    yield (
        f"a rollout: {rl['prompts']} prompts of {plan['prompt']} tokens, {rl['group']} answers "
        f"each, the longest of {plan['answer']} tokens, a cache of {plan['slots']} slots"
    )
    parts = plan["gradient_accumulation_steps"]
    yield (
        f"an update: {rows['count']} rows of {rows['length']:,} tokens ({rows['targets']:,} "
        "supervised)" + (f", in {parts} microbatches" if parts > 1 else "")
    )
    yield ""
    yield f"{'memory of one device, GiB':<32}{'rollout':>8}{'update':>9}"
    for name, words in (
        ("base", "frozen base"),
        ("state", "trained, optimizer, gradient"),
        ("start", "the start's parameters"),
        ("merged", "copy with LoRA added"),
        ("cache", "cache"),
        ("saved", "saved activations"),
        ("work", "work of a moment"),
        ("gathered", "brought together by fsdp"),
        ("total", "peak"),
    ):
        sizes = [memories[phase].get(name, 0) for phase in ("rollout", "update")]
        if any(sizes):
            cells = (f"{size / GIB:.2f}" if size else "" for size in sizes)
            yield f"  {words:<30}" + "{:>8}{:>9}".format(*cells).rstrip()
    yield (
        f"  {'fits' if plan['fits'] else 'DOES NOT FIT'}: {plan['usable'] / GIB:.1f} of "
        f"{plan['device']['memory'] / GIB:.1f} GiB are usable; the cache is freed before the update"
    )
    if not plan["fits"]:
        fewest = plan["fewest_microbatches"]
        yield (
            f"  the update fits with --config.gradient_accumulation_steps={fewest}"
            if fewest
            else "  the update fits with no number of microbatches"
        )
    yield ""
    yield f"{'time of a step':<32}{'times':>6}{'at least':>11}{'expected':>11}  each"
    for name, found in plan["seconds"].items():
        if name != "step" and found["times"]:
            times = [_ms(found[kind]) for kind in ("floor", "expected")]
            yield f"  {_PASSES[name]:<30}{found['times']:6}" + "{:>11}{:>11}".format(*times)
    step = plan["seconds"]["step"]
    yield (
        f"  a step takes at least {step['floor']:.2f} s; expected: {step['expected']:.2f} s, "
        f"{plan['answers_per_s']:,.0f} answers/s, {config['steps']:,} steps in "
        f"{plan['run_hours']:.1f} h (with the device at {plan['efficiency']:.0%} of its peaks; the "
        "host's work and validation not counted)"
    )
    if "compiled" in plan:
        found = plan["compiled"]
        yield ""
        yield (
            f"compiled for one {plan['device']['name']} by XLA's CUDA compiler of jax "
            f"{found['jax']} in {found['compile_s']:.0f} s, not run"
        )
        yield f"  {'of each':<30}{'peak GiB':>9}{'launches':>10}{'GB':>9}{'floor':>11}"
        for name, part in found["passes"].items():
            yield (
                f"  {_PASSES[name]:<30}{part['peak_gib']:9.2f}{part['launches']:10,}"
                f"{part['moved_gb']:9.1f}{_ms(1e-3 * part['floor_ms']):>11}"
            )
        yield (
            f"  peak memory {found['peak_gib']:.2f} GiB by buffer assignment, "
            f"{plan['estimate']['peak_gib']:.2f} by the estimate above; a step takes at least "
            f"{found['step_s']:.2f} s, with every launch at {MATMUL_SHARE:.0%} of the peak or "
            f"{BANDWIDTH_SHARE:.0%} of the bandwidth"
        )


def _compiled(plan: dict[str, Any]) -> Iterator[str]:
    found, device = plan["compiled"], plan["device"]
    bandwidth = BANDWIDTH_SHARE * device["hbm"]
    yield (
        f"compiled for one {device['name']} by XLA's CUDA compiler of jax {found['jax']} in "
        f"{found['compile_s']:.0f} s, not run"
    )
    yield (
        f"  peak memory {found['peak_gib']:.2f} GiB by buffer assignment, "
        f"{plan['estimate']['peak_gib']:.2f} by the estimate above"
    )
    yield "  an update                      launches        GB        ms"
    for kind, words in (
        ("matmul", "large matmuls"),
        ("attention", "attention kernels"),
        ("lora", "LoRA's narrow matmuls"),
        ("movement", "movement without arithmetic"),
        ("other", "elementwise and reductions"),
        ("collective", "collectives"),
    ):
        part = found["kinds"][kind]
        if part["launches"]:
            ms = "" if kind in ("matmul", "attention") else f"{1e12 * part['gb'] / bandwidth:10.1f}"
            if kind == "collective":  # what limits them is not the memory
                ms = f"{found['network_ms']:10.1f}"
            yield f"  {words:<30} {part['launches']:8,} {part['gb']:9.1f}{ms}"
    yield f"  {'all':<30} {found['launches']:8,} {found['moved_gb']:9.1f}"
    yield (
        f"  floor {_ms(1e-3 * found['floor_ms'])}: {found['tflop']:,.1f} TFLOP at "
        f"{MATMUL_SHARE:.0%} of the peak, and all other launches' bytes at {BANDWIDTH_SHARE:.0%} "
        "of the bandwidth"
        + (
            f", of collectives {found['network_alone_ms']:.1f} ms that nothing hides"
            if found["collectives"]
            else ""
        )
    )
    yield (
        f"  there {found['tokens_per_s']:,.0f} tokens/s and {found['mfu']:.0%} MFU a device; "
        f"matmuls as executed are {found['matmul_tflop']:,.1f} TFLOP"
    )
    for c in found["collectives"]:
        where = "in a loop" if c["in_loop"] else "once"
        yield (
            f"  {c['count']:6,} {c['kind']:<18} over {'+'.join(c['axes']):<12} of "
            f"{c['bytes'] / 1e6:10.3f} MB, {where}, beside {c['overlapped_by']} large matmuls: "
            f"{c['ms']:.2f} ms by the links, {c['alone_ms']:.2f} alone"
        )


def _mesh(mesh: dict[str, int]) -> str:
    return ",".join(f"{axis}:{size}" for axis, size in mesh.items() if size > 1) or "data:1"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.{0 if seconds >= 0.1 else 1}f} ms"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; see `cli.exit_on_error`."""
    with cli.exit_on_error():
        arguments, config = parse_arguments(sys.argv[1:] if argv is None else argv)
        runtime.prepare_plugins()
        # The devices are emulated, and their number is fixed once JAX has started.
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", arguments.devices)
        plan = (plan_of_reinforcement if arguments.rl else make_plan)(config, arguments)
        if arguments.json:
            text = json.dumps(plan, indent=2) + "\n"
            if cli.write_output(arguments.json, text, "--json"):
                return
        print_lines(report(plan).split("\n"))


if __name__ == "__main__":
    main()
