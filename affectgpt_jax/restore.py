"""A trained model read back: from a run's workdir, or a published checkpoint, to one that answers.

Shared by the commands that use one, so that each sees the model as it was trained.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from affectgpt_jax import build, cli, runtime
from affectgpt_jax.common import hub
from affectgpt_jax.common.errors import UserError
from affectgpt_jax.common.identity import Identity
from affectgpt_jax.common.json import read_json
from affectgpt_jax.common.progress import QUIET_S, Elapsed
from affectgpt_jax.common.text import say
from affectgpt_jax.config import (
    CHOICES,
    ConfigError,
    config_of_flags,
    saved_steps,
    schema_of,
    validate,
)
from affectgpt_jax.data import demo
from affectgpt_jax.data.pipeline import PromptProcessor
from affectgpt_jax.data.prompts import parse_label
from affectgpt_jax.data.records import Records
from affectgpt_jax.models import attention
from affectgpt_jax.models.affectgpt import AffectGPT, init_random_base, init_trainable
from affectgpt_jax.models.decoder import DecoderConfig
from affectgpt_jax.program import Program
from affectgpt_jax.training import sharding, xla_options
from affectgpt_jax.training.checkpoints import SavedRun, missing_file
from affectgpt_jax.training.step import State
from affectgpt_jax.weights import peft
from affectgpt_jax.weights.checkpoint_file import CheckpointFile
from affectgpt_jax.weights.huggingface import base_identity, load_base


class RunError(UserError, ValueError):
    """A workdir without a run, or a checkpoint, that can be used."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A model as a checkpoint left it, and all that it takes to ask it.

    Attributes:
        workdir: the run's directory; of weights outside a run, their file or directory.
        config: what it was trained with; but prompts stand one a row, and are attended by what
            this device has.
        model: the modules.
        base, trainable, identity: frozen weights, adapters and fusion, and which base it is; None
            until `with_weights`.
        inputs: identities of what else answers depend on, but for the clips (`build.inputs`).
        processor: how clips become inputs, in the mode `config.input`.
        mesh: where the arrays are.
        saved: the checkpoints of a run, or weights outside one.
        step: of the checkpoint; 0 outside a run.
        steps: of all checkpoints, ascending.
        best_step: of the one that validation prefers.
    """

    workdir: Path
    config: ConfigDict = dataclasses.field(repr=False)
    model: AffectGPT = dataclasses.field(repr=False)
    base: Any = dataclasses.field(repr=False)
    trainable: Any = dataclasses.field(repr=False)
    identity: Identity | None
    inputs: Mapping[str, Identity] = dataclasses.field(repr=False)
    processor: PromptProcessor = dataclasses.field(repr=False)
    mesh: Mesh
    saved: SavedRun | CheckpointFile = dataclasses.field(repr=False)
    step: int
    steps: tuple[int, ...]
    best_step: int

    @property
    def is_trained_here(self) -> bool:
        """Whether it is a run, whose checkpoints say what they were trained with."""
        return isinstance(self.saved, SavedRun)

    @property
    def has_workdir(self) -> bool:
        """Whether what is made of it may be written beside it."""
        return self.is_trained_here and not hub.is_cached(self.workdir)

    @property
    def label_types(self) -> tuple[str, ...]:
        """The label types that the run has been trained on."""
        return label_types(self.config)

    @property
    def name(self) -> str:
        """What people call it: a file without its suffix, a directory, a model of the hub."""
        return self.workdir.stem if self.workdir.is_file() else hub.model_name(self.workdir)

    def step_name(self, step: int) -> str:
        """What people call the checkpoint of a step."""
        return f"step {step}" if self.is_trained_here else self.name

    @property
    def title(self) -> str:
        """Which checkpoint it is, and where."""
        return f"step {self.step} of {self.workdir}" if self.is_trained_here else str(self.workdir)

    def fingerprint(self, step: int) -> str:
        """What tells its checkpoint of a step from that of any other training, in hex.

        Raises:
            CheckpointError: there is none of that step, or it is damaged.
        """
        if isinstance(self.saved, CheckpointFile):
            return self.saved.fingerprint()
        return self.saved.fingerprint(step)

    def base_identity(self) -> Identity:
        """Which base it belongs to; weights outside a run have every byte of it read."""
        if isinstance(self.saved, CheckpointFile):
            return base_identity(build.base_directory(self.config.llm))
        return self.saved.base(self.step)

    def check_inputs(
        self,
        mine: Mapping[str, Identity],
        allow_other: Collection[str] = (),
        say: Callable[[str], None] = say,
    ) -> None:
        """Compare inputs with those of the training, as far as the checkpoint says any.

        Raises:
            CheckpointError: one is another, and may not be.
        """
        if isinstance(self.saved, SavedRun):
            self.saved.check_inputs(self.step, mine, allow_other, say)

    def with_weights(self) -> Run:
        """The same run with its weights, which are read now.

        Raises:
            CheckpointError: the checkpoint belongs to another base, does not fit the config, or is
                damaged.
            WeightsError: a base or a file of weights that cannot be used.
        """
        directory = build.base_directory(self.config.llm)
        with Elapsed("reading the base", stream=sys.stderr, quiet_s=QUIET_S):
            identity = base_identity(directory)
            shapes = sharding.abstract(self.mesh, lambda key: init_trainable(self.model, key))
            if isinstance(self.saved, CheckpointFile):
                trainable = {"fusion": {}} | self.saved.load(shapes)
            else:
                trainable = self.saved.restore(self.step, identity, shapes)
            shapes = sharding.abstract(self.mesh, lambda key: init_random_base(self.model, key))
            base = load_base(directory, shapes, sharding.tree_shardings(self.mesh, shapes))
        return dataclasses.replace(self, base=base, trainable=trainable, identity=identity)

    def at_step(
        self,
        step: int,
        allow_other: Collection[str] = (),
        say: Callable[[str], None] = say,
    ) -> Run:
        """The same run at another checkpoint, on the base that is loaded.

        Args:
            step: of the checkpoint.
            allow_other, say: as for `open_run`.

        Raises:
            CheckpointError: there is none of that step, or as for `with_weights`.
        """
        shapes = sharding.abstract(self.mesh, lambda key: init_trainable(self.model, key))
        self.saved.check_inputs(step, self.inputs, allow_other, say)
        trainable = self.saved.restore(step, self.identity, shapes)
        return dataclasses.replace(self, trainable=trainable, step=step)

    def open_records(
        self, place: str, say: Callable[[str], None], *, verify: bool = True
    ) -> Records:
        """Clips to ask about, compared with what the input mode reads.

        Args:
            place: as `config.data.test`.
            say: told what takes long, of encoders that may be others than in training, and where
                the run's own test records are no longer those that it was trained beside.
            verify: hash every shard, unless the config says not to. (A record that is read checks
                itself.)

        Raises:
            RunError: clips that would be generated, into a run's directory, where there is none.
            ConfigError: they lack the features that the input mode reads, or these are of another
                width or encoder.
            RecordError: a directory without intact records.
        """
        if demo.world_seed(place, 0) is not None and not self.has_workdir:
            raise RunError(
                f"the clips of {place!r} are generated into the directory of a run, and "
                f"{self.workdir} is none of yours; name records, as those below a run's data/"
            )
        config = self.config.copy_and_resolve_references()
        config.data.verify = config.data.verify and verify
        records = build.open_records(config, place, "test", self.workdir, say)
        build.check_features(config, records, self.processor.mode)
        self.check_encoders(records, "test", say)
        if place == self.config.data.test:
            mine = {build.TEST_RECORDS: build.records_identity(records)}
            self.check_inputs(mine, mine.keys(), say)
        return records

    def check_encoders(self, records: Records, split: str, say: Callable[[str], None]) -> None:
        """Compare the encoders of records with those of the training, as far as the run knows them.

        Raises:
            ConfigError: another encoder, see `build.check_encoders`.
        """
        if self.is_trained_here:  # a config that is named for other weights says nothing of them
            known = build.training_encoders(self.config, self.workdir)
            build.check_encoders(known, records.manifest, self.processor.mode, split, say)


def label_types(config: ConfigDict) -> tuple[str, ...]:
    """The label types that a config trains on."""
    labels = [entry.label or config.label for entry in config.data.mixture.values()]
    labels = labels or [config.label]
    return tuple(dict.fromkeys(kind for label in labels for kind in parse_label(label)))


def check_trained_on(config: ConfigDict, place: Path, question: str | None, wanted: str) -> None:
    """Refuse a question that the training of a config did not ask.

    Args:
        config: of a run, or of weights outside one.
        place: of either.
        question: a label type.
        wanted: what names it, for the message.

    Raises:
        ConfigError: it was not trained on it.
    """
    trained = label_types(config)
    if question not in trained:
        raise ConfigError(
            f"{place} was trained on {', '.join(sorted(trained))}, but not on {wanted}; what it "
            "would answer means nothing"
        )


def load_config(workdir: Path) -> ConfigDict:
    """The config that a run was trained with, from its `config.json`.

    Raises:
        RunError: no such file, or not JSON.
        ConfigError: a config that this version does not know.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise RunError(
            f"{workdir} holds no run: {path.name} is missing; name the --workdir of a training run"
        )
    saved = read_json(path, dict[str, Any], error=RunError, advice="expected the config of a run")
    config = ConfigDict(_like(schema_of(saved).to_dict(), saved))
    try:
        validate(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    config.prompts = build.prompts_of(workdir, config.prompts)
    return config


def _like(schema: Any, value: Any) -> Any:
    """A value from JSON, which knows no tuples, with tuples where the schema has them."""
    if isinstance(schema, dict) and isinstance(value, dict):
        return {key: _like(schema.get(key), entry) for key, entry in value.items()}
    return tuple(value) if isinstance(schema, tuple) and isinstance(value, list) else value


OUT_OF_MEMORY = (
    "pass a smaller --batch-size, or --config.generate.merge_lora=false, which saves a second copy "
    "of the weights"
)


def set_up_process() -> None:
    """Prepare a process that loads a run: compiled programs are kept, as in training."""
    runtime.prepare_plugins()
    runtime.use_compilation_cache()
    xla_options.reserve_gpu_memory()


def add_allow_other(parser: argparse.ArgumentParser, names: Collection[str]) -> None:
    """The flag `open_run` is given as `allow_other`, of every command that loads a run."""
    parser.add_argument(
        "--allow-other",
        default=[],
        action="append",
        choices=names,
        help="use the run though this is another one than it was trained with; repeatable",
    )


def add_checkpoint_flags(parser: Any, which: Any) -> None:
    """The flags that name weights outside a run, see `open_checkpoint`.

    Args:
        parser: of the command, or a group of it.
        which: its group of flags of which one is given.
    """
    which.add_argument(
        "--checkpoint",
        metavar="PATH",
        help="instead of a run: a .pth of the PyTorch release or a PEFT adapter's directory, with "
        "--config; a run that was exported; or one of the hub, as OWNER/NAME or hf:OWNER/NAME/FILE",
    )
    parser.add_argument(
        "--config", metavar="FILE", help="that a .pth or an adapter belongs to, as train takes it"
    )


def add_run_flags(
    parser: argparse.ArgumentParser, allow_other: Collection[str] = ("prompts",)
) -> None:
    """The flags that name a run or a checkpoint, of every command that asks one.

    `parse_run_flags` reads them, and `open_from_flags` opens what they name.

    Args:
        parser: of the command, which adds a `--step` itself where it takes one.
        allow_other: inputs that may be others than in training.
    """
    group = parser.add_argument_group("the model")
    which = group.add_mutually_exclusive_group(required=True)
    which.add_argument("--workdir", metavar="RUN", help="directory of a training run")
    add = group.add_argument
    add_checkpoint_flags(group, which)
    add("--config.KEY", metavar="VALUE", help="instead of that config's")
    add("--config.llm", dest="llm", default="", metavar="BASE", help="where the base is now")
    add("--config.mesh", dest="mesh", default="", metavar="MESH", help="devices, if not the run's")
    add(
        "--config.generate.merge_lora",
        dest="merge_lora",
        default="",
        choices=CHOICES["generate.merge_lora"],
        metavar="WHEN",
        help="whether to add LoRA to a copy of the weights first: "
        f"{', '.join(CHOICES['generate.merge_lora'])}; default: as the run does",
    )
    cli.add_download_flag(add)
    add_allow_other(group, allow_other)


def parse_run_flags(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> argparse.Namespace:
    """Read the command line of a parser with `add_run_flags`.

    Returns:
        The flags; `overrides` are those of the config.

    Raises:
        UsageError: a flag that is unknown, or does not go with the others.
        SystemExit: after printing the help.
    """
    arguments, arguments.overrides = cli.parse_with_overrides(parser, argv)
    if arguments.workdir is not None:
        arguments.workdir = Path(arguments.workdir).expanduser()
        if arguments.config or arguments.overrides:
            given = "--config" if arguments.config else arguments.overrides[0].partition("=")[0]
            parser.error(
                f"{given} goes with --checkpoint; a run has its config, of which config.llm, "
                "config.mesh and config.generate.merge_lora may be others"
            )
    return arguments


def open_from_flags(arguments: argparse.Namespace, say: Callable[[str], None] = say) -> Run:
    """Open the run or the checkpoint that a command line names, without its weights.

    Args:
        arguments: of `parse_run_flags`; of a run, `step` as well where the command has it.
        say: told what is other than in training, and what of a file is left out.

    Raises:
        UserError: as for `open_run` and `open_checkpoint`.
    """
    how = {
        "llm": arguments.llm,
        "mesh": arguments.mesh,
        "merge_lora": arguments.merge_lora,
        "allow_other": arguments.allow_other,
        "download": arguments.download,
        "say": say,
    }
    step = getattr(arguments, "step", None)
    if arguments.workdir is not None:
        return open_run(arguments.workdir, step, **how)
    config = None
    if arguments.config:
        config = config_of_flags(arguments.config, arguments.overrides)
    elif arguments.overrides:
        raise cli.UsageError(
            f"{arguments.overrides[0]} changes a config, and none is named; pass --config=FILE, "
            "such as --config=affectgpt_qwen25_7b (an exported run has its own, which stays)"
        )
    return open_checkpoint(arguments.checkpoint, config, step, **how)


def open_run(
    workdir: Path,
    step: int | None = None,
    *,
    llm: str = "",
    mesh: str = "",
    merge_lora: str = "",
    allow_other: Collection[str] = (),
    download: bool = False,
    say: Callable[[str], None] = say,
) -> Run:
    """Open a run, which may still be training, without its weights; nothing is written.

    Clips, questions and flags can be compared with it before gigabytes are read.

    Args:
        workdir: the run's directory.
        step: of the checkpoint; the best on validation if None.
        llm: the base, if not where `config.llm` says: checkpoints know it by its hash.
        mesh: devices, if not those that `config.mesh` names.
        merge_lora: instead of `config.generate.merge_lora`.
        allow_other: inputs that may be others than in training (`checkpoints.check_inputs`).
        download: get the base from the hub, where it is one of the hub's that is not here.
        say: told which are others.

    Raises:
        RunError: a workdir without a run.
        CheckpointError: there is no such checkpoint, or it was trained with another tokenizer, chat
            template or other prompts.
        ConfigError, HubError, MeshError, PromptError, TokenizerError, WeightsError: what the config
            names cannot be used.
    """
    config = _to_ask(load_config(workdir), llm, mesh, merge_lora)
    saved = SavedRun(workdir)
    step = saved.best if step is None else step
    saved.shapes(step)  # a step that is not there shows before the base is read
    run = _opened(workdir, config, download, lambda model, mesh: saved)
    saved.check_inputs(step, run.inputs, allow_other, say)
    return dataclasses.replace(run, step=step, steps=saved.steps, best_step=saved.best)


# Of a checkpoint on the hub: an adapter and its heads, or a run that was exported.
_CHECKPOINT_FILES = (
    *(peft.CONFIG, peft.TENSORS, peft.FUSION),
    *("config.json", build.PROMPTS_FILE, build.EXTRACTION_FILE, "checkpoints/*"),
)


def checkpoint_path(text: str, what: str = "--checkpoint", download: bool = False) -> Path:
    """Path of a checkpoint: the text's own, or in the hub's cache (`common/hub.py`).

    Raises:
        HubError: one of the hub that is not here, or cannot be had.
    """
    if (place := hub.parse_place(text)) is None:
        return Path(text).expanduser()

    return hub.find(place, what, _CHECKPOINT_FILES, _lacks_of_checkpoint, download)


def _lacks_of_checkpoint(directory: Path) -> str | None:
    if _is_run(directory):
        if not (directory / "config.json").is_file():
            return "config.json is missing"
        return missing_file(directory)
    absent = [name for name in (peft.CONFIG, peft.TENSORS) if not (directory / name).is_file()]
    if len(absent) == 1:
        return f"{absent[0]} is missing"
    if absent:
        return "neither an adapter nor a run; a .pth in it is named hf:OWNER/NAME/FILE.pth"
    return None


def _is_run(path: Path) -> bool:
    return (path / "checkpoints").is_dir()


def config_of_checkpoint(path: Path, named: ConfigDict | None) -> ConfigDict:
    """The config that a checkpoint belongs to: the one that is named, or that of an exported run.

    Raises:
        RunError: no such checkpoint, no config, or one too many.
        ConfigError: a config that this version does not know.
    """
    if not path.exists():
        raise RunError(f"{path}: there is no such checkpoint")
    if _is_run(path):
        if named is not None:
            raise RunError(f"{path} is a run, which has its config; leave out --config")
        return load_config(path)
    if named is None:
        raise RunError(
            f"{path} does not say what model it belongs to; pass its config and its base, as in "
            "--config=affectgpt_qwen25_7b --config.llm=DIR, and the prompts that it was trained "
            "on, as in --config.prompts=FILE.toml"
        )
    return named


def open_checkpoint(
    checkpoint: str,
    config: ConfigDict | None = None,
    step: int | None = None,
    *,
    llm: str = "",
    mesh: str = "",
    merge_lora: str = "",
    allow_other: Collection[str] = (),
    download: bool = False,
    say: Callable[[str], None] = say,
) -> Run:
    """Open trained weights without a training, and without reading them; nothing is written.

    Args:
        checkpoint: a `.pth` of the PyTorch release, a PEFT adapter's directory, a run that was
            exported, or one of these on the hub (`checkpoint_path`).
        config: that a file or an adapter belongs to; an exported run has its own.
        step, allow_other: of an exported run, as for `open_run`.
        llm, mesh, merge_lora, download: as for `open_run`.
        say: told what the checkpoint does not say itself, and what of it is left out.

    Raises:
        RunError: no config, or one too many.
        WeightsError: no checkpoint, or one that does not fit the config; the message names what
            differs.
        ConfigError, HubError, MeshError, PromptError, TokenizerError: what the config names cannot
            be used.
    """
    path = checkpoint_path(checkpoint, download=download)
    how = {"llm": llm, "mesh": mesh, "merge_lora": merge_lora}
    config = config_of_checkpoint(path, config)
    if _is_run(path):
        return open_run(path, step, **how, allow_other=allow_other, download=download, say=say)
    if step is not None:
        raise RunError(f"{path} is one checkpoint; leave out --step={step}")
    config = _to_ask(ConfigDict(config.to_dict()), **how)

    def compared(model: AffectGPT, device_mesh: Mesh) -> CheckpointFile:
        abstract = sharding.abstract(device_mesh, lambda key: init_trainable(model, key))
        file = CheckpointFile(path, abstract, model.decoder.lora)
        if abstract["fusion"] and "fusion" not in file.parts:
            raise RunError(
                f"{path} is an adapter alone, without the projectors and the pre-fusion that "
                f"config.input={config.input!r} needs ({peft.FUSION}); name a .pth, an exported "
                "run, or an adapter that affectgpt weights export-peft wrote"
            )
        return file

    run = _opened(path, config, download, compared)
    if run.saved.unused:
        names = ", ".join(run.saved.unused)
        say(f"{path}: left out, since this config has no place for them: {names}")
    say(
        f"note: {path} does not say what it was trained with; asked on {config.llm} with "
        f"config.prompts={config.prompts}"
    )
    return run


def _to_ask(config: ConfigDict, llm: str, mesh: str, merge_lora: str) -> ConfigDict:
    """The config of a model that is asked: prompts stand in rows of one sample each, and this
    device may be another than was trained on."""
    config.llm, config.mesh = llm or config.llm, mesh or config.mesh
    config.generate.merge_lora = merge_lora or config.generate.merge_lora
    config.pack_length = 0
    if config.attention != "xla":
        config.attention = "auto"
    validate(config)
    return config


def _opened(
    place: Path,
    config: ConfigDict,
    download: bool,
    weights: Callable[[AffectGPT, Mesh], SavedRun | CheckpointFile],
) -> Run:
    """A run without weights, and without the steps of its checkpoints.

    Args:
        place: of the run or the weights.
        config: see `_to_ask`.
        download: get the base from the hub, where it is one of the hub's that is not here.
        weights: says where they are, by model and mesh.
    """
    device_mesh = sharding.make_mesh(config.mesh)
    directory = build.base_directory(config.llm, download)
    llm_shape = build.base_config(config.llm)
    model = build.model(config, llm_shape, sharding.ActivationConstraint(device_mesh))
    return Run(
        workdir=place,
        config=config,
        model=model,
        base=None,
        trainable=None,
        identity=None,
        inputs=build.inputs(config, directory),
        processor=build.prompt_processor(config, build.tokenizer(directory, llm_shape)),
        mesh=device_mesh,
        saved=weights(model, device_mesh),
        step=0,
        steps=(0,),
        best_step=0,
    )


def download_models(config: ConfigDict) -> None:
    """Get what a config names of the hub and the hub's cache lacks.

    Raises:
        HubError: it cannot be had.
    """
    build.base_directory(config.llm, download=True)
    if config.init_from:
        checkpoint_path(config.init_from, "config.init_from", download=True)


def initial_weights(
    config: ConfigDict, llm: DecoderConfig, mesh: Mesh, say: Callable[[str], None]
) -> dict[str, Any]:
    """What a new run starts from beside what is drawn: `config.init_from`, the workdir of a run
    (its best checkpoint), a PEFT adapter's directory or a `.pth` of the PyTorch release, or one of
    these on the hub.

    Args:
        config: of the run.
        llm: shape of its base.
        mesh: the devices.
        say: told what was loaded, and what of the file was not.

    Returns:
        Parts of the trainable tree; none where nothing is named.

    Raises:
        WeightsError: none of them, or one that does not fit; the message names what differs.
        CheckpointError: a run of another base, of other heads or inputs, or a damaged one.
    """
    if not config.init_from:
        return {}
    path = checkpoint_path(config.init_from, "config.init_from")
    # Its attention is not asked for anything.
    model = build.model(config, llm, sharding.ActivationConstraint(mesh), attention.causal)
    abstract = sharding.abstract(mesh, lambda key: init_trainable(model, key))
    if saved_steps(path):
        saved = SavedRun(path)
        with Elapsed("hashing the base", stream=sys.stderr, quiet_s=QUIET_S):
            identity = base_identity(build.base_directory(config.llm))
        loaded = saved.restore(saved.best, identity, abstract)
        say(f"starting from step {saved.best} of {path}: adapters, projectors and fusion")
        return loaded
    file = CheckpointFile(path, abstract, model.decoder.lora)
    said = "the adapter " if path.is_dir() else ""
    fresh = "" if "fusion" in file.parts else "; projectors and fusion start fresh"
    if file.unused:
        unused = ", ".join(file.unused)
        fresh = f"; left out, since this config has no place for them: {unused}"
    say(f"starting from {said}{path}{fresh}")
    return file.load(abstract)


def fresh_state(program: Program, loaded: Mapping[str, Any]) -> State:
    """The state that a new run starts from: drawn from the seed, but for `initial_weights`."""
    state = program.init_state(program.config.seed)
    state["trainable"] |= loaded
    return state
