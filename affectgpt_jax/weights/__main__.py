"""Inspect weights, and export those of a run to other programs.

    affectgpt weights inspect PATH
    affectgpt weights export-peft WORKDIR OUT
    affectgpt weights export-release WORKDIR OUT.pth
    affectgpt weights export-hub WORKDIR OUT
    affectgpt weights merge WORKDIR OUT

PATH is a base model or a PEFT adapter (directories), a .pth of the PyTorch release, a run's working
directory or one of its checkpoints. A run's best checkpoint on validation is taken, or --step. Runs
on the CPU, and reads only headers where no values are needed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import jax

import affectgpt_jax
from affectgpt_jax import build, cli, runtime
from affectgpt_jax.common import hub
from affectgpt_jax.common.errors import UserError
from affectgpt_jax.common.files import new_path
from affectgpt_jax.common.identity import Identity
from affectgpt_jax.common.json import check_type, read_json, write_json
from affectgpt_jax.common.text import print_lines
from affectgpt_jax.config import SECTIONS, ConfigError
from affectgpt_jax.models.lora import LoraConfig
from affectgpt_jax.training.checkpoints import (
    CheckpointError,
    Manifest,
    SavedRun,
    silence_threads,
)
from affectgpt_jax.weights import card, merge, peft, release, report
from affectgpt_jax.weights.huggingface import (
    WeightsError,
    base_identity,
    check_base,
    read_config,
)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        SystemExit: after printing the help, or one sentence about what is wrong.
    """
    parser = cli.make_parser("affectgpt weights", __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser("inspect", help="what a directory or file holds")
    command.add_argument("path", type=Path)
    command.add_argument("--step", type=int, help="of a run's checkpoint; default: the best")
    command.add_argument("--hash", action="store_true", help="a base's SHA-256: reads all of it")
    command.set_defaults(run=inspect)

    for name, run, what in (
        ("export-peft", export_peft, "a run's LoRA, as PEFT loads it"),
        (
            "export-release",
            export_release,
            "a run's LoRA, heads and pre-fusion, as the release has",
        ),
        (
            "export-hub",
            export_hub,
            "a checkpoint as hubs lay it out, with a model card",
        ),
        ("merge", export_merged, "a run's base with its LoRA folded in, as transformers loads it"),
    ):
        command = commands.add_parser(name, help=what)
        command.add_argument("workdir", type=Path, help="of a run")
        command.add_argument("out", type=Path, help="a place where nothing stands yet")
        command.add_argument("--step", type=int, help="default: the best on validation")
        command.set_defaults(run=run)
        if run in (export_peft, export_merged):
            command.add_argument("--base", help="the base; default: config.llm's")
            cli.add_download_flag(command.add_argument)
    given = list(sys.argv[1:] if argv is None else argv)
    return parser.parse_args([*(word.replace("_", "-") for word in given[:1]), *given[1:]])


class _RunConfig(TypedDict):
    """What is read of a run's config."""

    llm: str


class _LoraOptions(TypedDict):
    rank: int
    alpha: int | float
    dropout: int | float
    targets: tuple[str, ...]


class _LoraRunConfig(_RunConfig):
    lora: _LoraOptions


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One checkpoint of a run.

    Attributes:
        workdir: of the run.
        saved: all of its checkpoints.
        config: of the run, as JSON.
        step: of this checkpoint.
        shapes: its `trainable` tree, without values.
        base: what it was trained on.
        lora: config of its adapters; None without any.
    """

    workdir: Path
    saved: SavedRun
    config: Mapping[str, Any]
    step: int
    shapes: Mapping[str, Any]
    base: Identity
    lora: LoraConfig | None


def open_checkpoint(path: Path, step: int | None) -> Checkpoint:
    """Open a run by its working directory, its `checkpoints`, or one of these.

    Args:
        path: of either.
        step: which checkpoint; None takes the one that `path` names, or the best.

    Raises:
        CheckpointError: no run there, or no such step.
    """
    workdir = path.absolute()
    if _is_checkpoint(workdir):
        step = int(workdir.name) if step is None else step
        workdir = workdir.parent
    if workdir.name == "checkpoints":
        workdir = workdir.parent
    saved = SavedRun(workdir)
    step = saved.best if step is None else step
    shapes = saved.shapes(step)
    path = workdir / "config.json"
    advice = "expected the config of a run, which training writes beside the checkpoints"
    config = read_json(path, _RunConfig, error=CheckpointError, advice=advice)
    lora = None
    if shapes["lora"]:
        found = check_type(config, _LoraRunConfig, str(path), error=CheckpointError, advice=advice)
        options = {key: found["lora"][key] for key in ("rank", "alpha", "dropout", "targets")}
        lora = LoraConfig(**options)
    return Checkpoint(workdir, saved, config, step, shapes, saved.base(step), lora)


def _is_checkpoint(path: Path) -> bool:
    return path.name.isdigit() and path.absolute().parent.name == "checkpoints"


def inspect(arguments: argparse.Namespace) -> str:
    """The report on the weights at a path."""
    path = arguments.path
    if path.suffix == ".safetensors":
        raise WeightsError(f"{path} is a part of a model or an adapter; name its directory")
    if path.is_file():
        return report.describe_release(path).render()
    if not path.is_dir():
        raise WeightsError(f"{path} is neither a file nor a directory")
    if (path / peft.CONFIG).exists():
        return report.describe_adapter(path).render()
    if path.name == "checkpoints" or _is_checkpoint(path) or (path / "checkpoints").is_dir():
        return describe_run(open_checkpoint(path, arguments.step)).render()
    if (path / "config.json").exists():
        return report.describe_base(path, base_refusal(path), arguments.hash).render()
    raise WeightsError(
        f"{path} holds no weights of a known kind; expected a base model (config.json and "
        f"*.safetensors), a PEFT adapter ({peft.CONFIG}), a run (checkpoints/) or a .pth file"
    )


def base_refusal(directory: Path) -> str | None:
    """Why a base cannot be run here, by the checks that training has; None where it can."""
    try:
        config = read_config(directory)
        check_base(directory, config)
        build.tokenizer(directory, config)
    except UserError as error:
        return str(error)
    return None


def describe_run(checkpoint: Checkpoint) -> report.Report:
    """The report on a checkpoint and its run."""
    saved, config, lora = checkpoint.saved, checkpoint.config, checkpoint.lora
    loss = saved.val_loss(checkpoint.step)
    validation = "" if loss is None else f", validation loss {loss:.4f}"
    fusion = checkpoint.shapes["fusion"]
    kinds = report.tree_kinds(fusion)
    if "multi" in kinds and "fusion" in config:
        kinds["multi"] = config["fusion"]  # two kinds have parameters of the same names
    shown = [f"{key}={config[key]}" for key in ("llm", "input", "label") if key in config]
    facts = [
        ("format", f"run of affectgpt_jax, {report.count(len(saved.steps), 'checkpoint')}"),
        ("steps", f"{', '.join(map(str, saved.steps))} (best on validation: {saved.best})"),
        ("shown", f"step {checkpoint.step}{validation}"),
        ("base", f"{checkpoint.base.name}, sha256 {checkpoint.base.sha256}"),
        ("config", ", ".join(shown)),
        ("LoRA", report.describe_lora(lora.rank, lora.alpha, lora.targets) if lora else "none"),
        ("heads", report.describe_heads(kinds)),
    ]
    parts = [report.Part.of("LoRA", jax.tree.leaves(checkpoint.shapes["lora"]))]
    parts += [report.Part.of(report.head_name(h), jax.tree.leaves(fusion[h])) for h in kinds]
    return report.Report(facts, parts)


def export_peft(arguments: argparse.Namespace) -> str:
    """Write a run's LoRA as a PEFT adapter."""
    checkpoint = open_checkpoint(arguments.workdir, arguments.step)
    lora = _require_lora(checkpoint)
    place = f"beside {checkpoint.base.name}"
    try:
        found = find_base(checkpoint, arguments.base, arguments.download)
        base = hub.model_name(found) if hub.is_cached(found) else str(found.absolute())
    except (ConfigError, hub.HubError):
        if arguments.base or arguments.download:
            raise
        base = checkpoint.base.name
        place += ", once base_model_name_or_path names its directory (or --base, here)"
    trainable = checkpoint.saved.trainable(checkpoint.step)
    peft.save_adapter(arguments.out, trainable["lora"], lora, base, trainable["fusion"])
    return (
        f"{arguments.out}: LoRA of step {checkpoint.step} for {checkpoint.base.name}, as "
        f"peft.AutoPeftModelForCausalLM.from_pretrained loads it {place}; heads and pre-fusion are "
        f"not part of an adapter, and lie in {peft.FUSION} for affectgpt predict --checkpoint"
    )


def export_release(arguments: argparse.Namespace) -> str:
    """Write a run's LoRA, projectors and pre-fusion as a checkpoint of the release."""
    checkpoint = open_checkpoint(arguments.workdir, arguments.step)
    if checkpoint.config.get("fusion") == "projected":
        raise WeightsError(
            f"{arguments.workdir}: the release has no pre-fusion of projected tokens "
            "(config.fusion=projected); export LoRA alone by export-peft, or all by export-hub"
        )
    epoch = checkpoint.step // release.STEPS_PER_EPOCH
    trainable = checkpoint.saved.trainable(checkpoint.step)
    release.save_release(
        arguments.out, trainable, checkpoint.lora, epoch=epoch, config=checkpoint.config
    )
    return (
        f"{arguments.out}: LoRA, heads and pre-fusion of step {checkpoint.step}, under the names "
        "of the PyTorch release"
    )


# Keys of a config that name places of one machine; of the first ones, if not models of the hub.
_MODELS = ("llm", "init_from", *(f"{section}.start" for section in SECTIONS))
_PLACES = (
    *(*_MODELS, "data.train", "data.val", "data.test"),
    *(f"{section}.{key}" for section in SECTIONS for key in ("data", "lexicon", "test_lexicon")),
)


def export_hub(arguments: argparse.Namespace) -> str:
    """Write a checkpoint as hubs lay it out: a run that `predict` reads, an adapter, a card."""
    checkpoint = open_checkpoint(arguments.workdir, arguments.step)
    config = json.loads(json.dumps(checkpoint.config))
    for key in _PLACES:
        *groups, last = key.split(".")
        entry = functools.reduce(lambda tree, group: tree.get(group, {}), groups, config)
        if last in entry and not (key in _MODELS and hub.parse_place(entry[last])):
            entry[last] = hub.model_name(Path(entry[last]))
    for entry in config.get("data", {}).get("mixture", {}).values():
        entry["source"] = Path(entry["source"]).name
    prompts = _prompt_file(checkpoint)
    if prompts:
        config["prompts"] = build.PROMPTS_FILE
    step = str(checkpoint.step)
    with new_path(arguments.out, WeightsError) as folder:
        folder.mkdir()
        copied = folder / "checkpoints" / step
        shutil.copytree(checkpoint.workdir / "checkpoints" / step, copied)
        if prompts:
            shutil.copyfile(prompts, folder / build.PROMPTS_FILE)
            manifest = Manifest.read(copied)
            if was := manifest.inputs.get("prompts"):
                mine = {"prompts": Identity(build.PROMPTS_FILE, was.sha256)}
                dataclasses.replace(manifest, inputs=manifest.inputs | mine).write(copied)
        write_json(folder / "config.json", config | {"wandb_project": ""})
        if (how := checkpoint.workdir / build.EXTRACTION_FILE).is_file():
            shutil.copy(how, folder)
        if checkpoint.lora:
            trainable = checkpoint.saved.trainable(checkpoint.step)
            peft.save_adapter(
                folder / "adapter", trainable["lora"], checkpoint.lora, checkpoint.base.name
            )
            for file in (folder / "adapter").iterdir():
                file.rename(folder / file.name)
            (folder / "adapter").rmdir()
        (folder / "README.md").write_text(_card(checkpoint, config), encoding="utf-8")
    return (
        f"{arguments.out}: step {step} as a run, its adapter for PEFT, and README.md, the card; "
        "look for what is to be filled in there, and read it before you publish"
    )


def _prompt_file(checkpoint: Checkpoint) -> Path | None:
    """The file with the prompts of a run; None where they are a built-in set.

    Raises:
        PromptError: it is not there, or cannot be used.
        WeightsError: it has changed since.
    """
    found = build.prompt_file(checkpoint.workdir, checkpoint.config.get("prompts", "default"))
    if found is None:
        return None
    path, identity = found
    was = checkpoint.saved.inputs(checkpoint.step).get("prompts")
    if was and was.sha256 != identity.sha256:
        raise WeightsError(
            f"{path} has other prompts than step {checkpoint.step} of {checkpoint.workdir} was "
            "trained on; put those back"
        )
    return path


def _card(checkpoint: Checkpoint, config: Mapping[str, Any]) -> str:
    result = checkpoint.workdir / "result.json"
    scores = read_json(result, dict[str, Any], error=WeightsError) if result.is_file() else {}
    if scores.get("best_step") != checkpoint.step:
        scores = {}  # those of another checkpoint
    loss = checkpoint.saved.val_loss(checkpoint.step)
    shown = ("input", "label", "fusion", "prompts", "batch_size", "pack_length", "steps", "seed")
    lora, base = checkpoint.lora, checkpoint.base
    facts = [
        ("base", f"{base.name}, sha256 {base.sha256}"),
        ("checkpoint", f"step {checkpoint.step}"),
        ("validation loss", "" if loss is None else f"{loss:.4f}"),
        ("LoRA", report.describe_lora(lora.rank, lora.alpha, lora.targets) if lora else "none"),
        *((f"config.{key}", str(config[key])) for key in shown if key in config),
        ("config.optimizer", ", ".join(f"{k}={v}" for k, v in config.get("optimizer", {}).items())),
        ("training clips", str(config.get("data", {}).get("train", ""))),
    ]
    rows = [(name, value) for name, value in facts if value]
    name = f"{checkpoint.workdir.name}, step {checkpoint.step}"
    results = card.result_rows(scores)
    return card.model_card(name, base.name, rows, results, affectgpt_jax.__version__)


def export_merged(arguments: argparse.Namespace) -> str:
    """Write a run's base with its LoRA folded in."""
    checkpoint = open_checkpoint(arguments.workdir, arguments.step)
    lora = _require_lora(checkpoint)
    directory = find_base(checkpoint, arguments.base, arguments.download)
    # Its tokenizer is copied, and must be the one that the adapter learned with.
    checkpoint.saved.check_inputs(checkpoint.step, build.tokenizer_identities(directory))
    trainable = checkpoint.saved.trainable(checkpoint.step)
    merge.save_merged(directory, arguments.out, trainable["lora"], lora.scale)
    precision = checkpoint.config.get("base_precision")
    trained = f"; it was trained beside the base in {precision}" if precision else ""
    return (
        f"{arguments.out}: {checkpoint.base.name} with the LoRA of step {checkpoint.step} folded "
        f"in{trained}; heads and pre-fusion are not part of it"
    )


def find_base(checkpoint: Checkpoint, base: str | None, download: bool = False) -> Path:
    """The directory of the base that a checkpoint was trained on.

    Args:
        checkpoint: of a run.
        base: where it is; None is where the run's config says.
        download: get it from the hub, where it is one of the hub's that is not here.

    Raises:
        ConfigError, HubError: no such directory.
        WeightsError: one with another base.
    """
    directory = build.base_directory(base or checkpoint.config["llm"], download)
    found = base_identity(directory)
    if found.sha256 != checkpoint.base.sha256:
        raise WeightsError(
            f"{directory} is not the base of {checkpoint.workdir}: its sha256 is {found.sha256}, "
            f"but the run was trained on {checkpoint.base.name} ({checkpoint.base.sha256}); name "
            "that with --base"
        )
    return directory


def _require_lora(checkpoint: Checkpoint) -> LoraConfig:
    if checkpoint.lora is None:
        raise WeightsError(f"{checkpoint.workdir} was trained without LoRA; it has no adapter")
    return checkpoint.lora


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; see `cli.exit_on_error`."""
    with cli.exit_on_error():
        arguments = parse_arguments(argv)
        runtime.prepare_plugins()
        jax.config.update("jax_platforms", "cpu")
        print_lines(arguments.run(arguments).split("\n"))


if __name__ == "__main__":
    silence_threads()
    main()
