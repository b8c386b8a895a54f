"""A trained run read back: from its workdir to a model that answers.

Shared by the commands that use a run, so that each sees the model as it was trained.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from affectgpt_jax import build, runtime
from affectgpt_jax.common.errors import UserError
from affectgpt_jax.common.identity import Identity
from affectgpt_jax.common.json import read_json
from affectgpt_jax.common.progress import QUIET_S, Elapsed
from affectgpt_jax.common.text import say
from affectgpt_jax.config import CHOICES, ConfigError, saved_steps, schema_of, validate
from affectgpt_jax.data.pipeline import PromptProcessor
from affectgpt_jax.data.prompts import parse_label
from affectgpt_jax.data.records import Records
from affectgpt_jax.models import attention
from affectgpt_jax.models.affectgpt import AffectGPT, init_random_base, init_trainable
from affectgpt_jax.models.decoder import DecoderConfig
from affectgpt_jax.program import Program
from affectgpt_jax.training import sharding, xla_options
from affectgpt_jax.training.checkpoints import SavedRun
from affectgpt_jax.training.step import State
from affectgpt_jax.weights.huggingface import (
    base_identity,
    load_base,
)
from affectgpt_jax.weights.peft import load_adapter
from affectgpt_jax.weights.release import load_release


class RunError(UserError, ValueError):
    """A workdir without a run that can be used."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A model as a checkpoint left it, and all that it takes to ask it.

    Attributes:
        workdir: the run's directory.
        config: what it was trained with; but prompts stand one a row, and are attended by what
            this device has.
        model: the modules.
        base, trainable, identity: frozen weights, adapters and fusion, and which base it is; None
            until `with_weights`.
        inputs: identities of what else answers depend on, but for the clips (`build.inputs`).
        processor: how clips become inputs, in the mode `config.input`.
        mesh: where the arrays are.
        step: of the checkpoint.
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
    step: int
    steps: tuple[int, ...]
    best_step: int

    @property
    def label_types(self) -> tuple[str, ...]:
        """The label types that the run has been trained on."""
        entries = self.config.data.mixture.values()
        labels = [entry.label or self.config.label for entry in entries] or [self.config.label]
        return tuple(dict.fromkeys(kind for label in labels for kind in parse_label(label)))

    def fingerprint(self, step: int) -> str:
        """What tells its checkpoint of a step from that of any other training, in hex.

        Raises:
            CheckpointError: there is none of that step, or it is damaged.
        """
        return SavedRun(self.workdir).fingerprint(step)

    def with_weights(self) -> Run:
        """The same run with its weights, which are read now.

        Raises:
            CheckpointError, WeightsError: as for `load_run`.
        """
        directory = build.base_directory(self.config.llm)
        with Elapsed("reading the base", stream=sys.stderr, quiet_s=QUIET_S):
            identity = base_identity(directory)
            shapes = sharding.abstract(self.mesh, lambda key: init_trainable(self.model, key))
            trainable = SavedRun(self.workdir).restore(self.step, identity, shapes)
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
            allow_other, say: as for `load_run`.

        Raises:
            CheckpointError: there is none of that step, or as for `load_run`.
        """
        shapes = sharding.abstract(self.mesh, lambda key: init_trainable(self.model, key))
        saved = SavedRun(self.workdir)
        saved.check_inputs(step, self.inputs, allow_other, say)
        trainable = saved.restore(step, self.identity, shapes)
        return dataclasses.replace(self, trainable=trainable, step=step)

    def report_records(self, place: str, records: Records, say: Callable[[str], None]) -> None:
        """Say where the run's own test records are no longer those that it was trained beside."""
        if place == self.config.data.test:
            mine = {build.TEST_RECORDS: build.records_identity(records)}
            SavedRun(self.workdir).check_inputs(self.step, mine, mine.keys(), say)


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
    runtime.leave_out_gpu_compiler()
    runtime.use_compilation_cache()
    xla_options.reserve_gpu_memory()


def add_merge_lora(parser: argparse.ArgumentParser) -> None:
    """The flag `load_run` is given as `merge_lora`, of every command that writes answers."""
    parser.add_argument(
        "--config.generate.merge_lora",
        dest="merge_lora",
        default="",
        choices=CHOICES["generate.merge_lora"],
        metavar="WHEN",
        help="whether to add LoRA to a copy of the weights first: "
        f"{', '.join(CHOICES['generate.merge_lora'])}; default: as the run does",
    )


def add_allow_other(parser: argparse.ArgumentParser, names: Collection[str]) -> None:
    """The flag `load_run` is given as `allow_other`, of every command that loads a run."""
    parser.add_argument(
        "--allow-other",
        default=[],
        action="append",
        choices=names,
        help="use the run though this is another one than it was trained with; repeatable",
    )


def load_run(
    workdir: Path,
    step: int | None = None,
    *,
    llm: str = "",
    mesh: str = "",
    merge_lora: str = "",
    allow_other: Collection[str] = (),
    say: Callable[[str], None] = say,
) -> Run:
    """Load the model of a run, see `open_run`, with its weights.

    Raises:
        CheckpointError: the checkpoint belongs to another base, does not fit the config, or is
            damaged.
        RunError, ConfigError, MeshError, PromptError, TokenizerError, WeightsError: as `open_run`.
    """
    how = {"llm": llm, "mesh": mesh, "merge_lora": merge_lora}
    return open_run(workdir, step, **how, allow_other=allow_other, say=say).with_weights()


def open_run(
    workdir: Path,
    step: int | None = None,
    *,
    llm: str = "",
    mesh: str = "",
    merge_lora: str = "",
    allow_other: Collection[str] = (),
    say: Callable[[str], None] = say,
) -> Run:
    """Open a run, which may still be training, without its weights; nothing is written.

    Clips, questions and flags can be compared with it before gigabytes are read.

    Args:
        workdir: the run's directory.
        step: of the checkpoint; the best on validation if None.
        llm: directory of the base, if not where `config.llm` says: checkpoints know it by its hash.
        mesh: devices, if not those that `config.mesh` names.
        merge_lora: instead of `config.generate.merge_lora`.
        allow_other: inputs that may be others than in training (`checkpoints.check_inputs`).
        say: told which are.

    Raises:
        RunError: a workdir without a run.
        CheckpointError: there is no such checkpoint, or it was trained with another tokenizer, chat
            template or other prompts.
        ConfigError, MeshError, PromptError, TokenizerError, WeightsError: what the config names
            cannot be used.
    """
    config = load_config(workdir)
    config.llm, config.mesh = llm or config.llm, mesh or config.mesh
    config.generate.merge_lora = merge_lora or config.generate.merge_lora
    # Prompts stand in rows of one sample each, and this device may be another than was trained on.
    config.pack_length = 0
    if config.attention != "xla":
        config.attention = "auto"
    validate(config)
    saved = SavedRun(workdir)
    step = saved.best if step is None else step
    saved.shapes(step)  # a step that is not there shows before the base is read
    device_mesh = sharding.make_mesh(config.mesh)
    directory, llm_shape = build.base_directory(config.llm), build.base_config(config.llm)
    model = build.model(config, llm_shape, sharding.ActivationConstraint(device_mesh))
    inputs = build.inputs(config, directory)
    saved.check_inputs(step, inputs, allow_other, say)
    processor = build.prompt_processor(config, build.tokenizer(directory, llm_shape))
    return Run(
        workdir=workdir,
        config=config,
        model=model,
        base=None,
        trainable=None,
        identity=None,
        inputs=inputs,
        processor=processor,
        mesh=device_mesh,
        step=step,
        steps=saved.steps,
        best_step=saved.best,
    )


def initial_weights(
    config: ConfigDict, llm: DecoderConfig, mesh: Mesh, say: Callable[[str], None]
) -> dict[str, Any]:
    """What a new run starts from beside what is drawn: `config.init_from`, the workdir of a run
    (its best checkpoint), a PEFT adapter's directory (LoRA alone) or a `.pth` of the release.

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
    path = Path(config.init_from).expanduser()
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
    if path.is_dir():
        lora = load_adapter(path, abstract["lora"], model.decoder.lora)
        say(f"starting from the adapter {path}; projectors and fusion start fresh")
        return {"lora": lora}
    loaded, unused = load_release(path, abstract, model.decoder.lora)
    said = f"; left out, since this config has no place for them: {', '.join(unused)}"
    say(f"starting from {path}{said if unused else ''}")
    return loaded


def fresh_state(program: Program, loaded: Mapping[str, Any]) -> State:
    """The state that a new run starts from: drawn from the seed, but for `initial_weights`."""
    state = program.init_state(program.config.seed)
    state["trainable"] |= loaded
    return state
