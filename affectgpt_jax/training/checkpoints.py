"""Checkpoints of what is trained: adapters, fusion, optimizer state and step, through Orbax.

The frozen base is not saved; its identity is, and a run resumed on another base is refused.
Orbax writes under a temporary name and renames, so a checkpoint is whole or not there.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from affectgpt_jax.training.sharding import path_name
from affectgpt_jax.training.step import State
from affectgpt_jax.weights.huggingface import BaseIdentity

METRIC = "val_loss"


class CheckpointError(ValueError):
    """A checkpoint that does not belong to this run, or that cannot be read."""


class CheckpointWriteError(RuntimeError):
    """A checkpoint that cannot be written."""


class Checkpoints:
    """The checkpoints of one run, in `workdir/checkpoints/<step>`.

    Args:
        workdir: the run's directory.
        base: identity of the frozen base that this run trains on.
        keep: how many of the newest to keep, beside the best on validation.
        read_only: create and remove nothing; for a run that somebody else may be training.
    """

    def __init__(
        self, workdir: Path, base: BaseIdentity, keep: int = 3, *, read_only: bool = False
    ):
        self._base, self._broken = dataclasses.asdict(base), False
        self._directory = (Path(workdir) / "checkpoints").absolute()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(
                [
                    LatestN(keep),
                    # Sorted in reverse, the lowest validation loss counts as the best.
                    BestN(
                        get_metric_fn=lambda metrics: metrics[METRIC],
                        reverse=True,
                        n=1,
                        keep_checkpoints_without_metrics=False,
                    ),
                ]
            ),
            best_fn=lambda metrics: metrics[METRIC],
            best_mode="min",
            read_only=read_only,
            create=not read_only,
        )
        self._manager = ocp.CheckpointManager(
            self._directory,
            # Named here so that a fresh process can read a checkpoint's shapes before its values.
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "base": ocp.JsonCheckpointHandler(),
            },
            options=options,
        )

    def steps(self) -> list[int]:
        """All steps that were saved and kept, ascending."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """The newest step, or None where nothing has been saved."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step with the lowest validation loss; the newest where none was validated."""
        return self._manager.best_step() or self._manager.latest_step()

    def save(self, step: int, state: State, val_loss: float | None) -> None:
        """Write a checkpoint in the background; returns when the state may be donated again.

        Raises:
            CheckpointWriteError: this one or the one before could not be written.
        """
        with self._write_errors():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), base=ocp.args.JsonSave(self._base)
                ),
                metrics=None if val_loss is None else {METRIC: val_loss},
            )

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        """Orbax's errors, of many types and of its background threads too, as one of ours."""
        try:
            yield
        except Exception as error:
            self._broken = True
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointWriteError(
                f"a checkpoint cannot be written to {self._directory}; is the disk full? Those "
                f"before it are whole, and the same command resumes from them ({reason})"
            ) from error

    def restore(self, step: int, abstract: State) -> State:
        """Read a checkpoint into the shapes, dtypes and shardings of `abstract`.

        Raises:
            CheckpointError: it was trained on another base, or its tree is not that of this
                config; the message names what differs.
        """
        self._check(step, abstract, lambda name: True)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return self._manager.restore(step, args=args)["state"]

    def restore_trainable(self, step: int, abstract: Any) -> Any:
        """Read `state["trainable"]` alone, a third of a checkpoint; otherwise as `restore`."""
        item = {"trainable": abstract}
        self._check(step, item, lambda name: name.startswith("trainable/"))
        args = ocp.args.PyTreeRestore(
            item,
            restore_args=ocp.checkpoint_utils.construct_restore_args(item),
            partial_restore=True,
        )
        with ocp.PyTreeCheckpointer() as reader:
            return reader.restore(self._directory / str(step) / "state", args=args)["trainable"]

    def _check(self, step: int, abstract: Any, wanted: Callable[[str], bool]) -> None:
        """Compare base and tree of a checkpoint, as far as its leaves are `wanted`."""
        where = f"{self._directory / str(step)}"
        saved = self._manager.restore(step, args=ocp.args.Composite(base=ocp.args.JsonRestore()))
        if saved["base"]["sha256"] != self._base["sha256"]:
            raise CheckpointError(
                f"{where} was trained on the base {saved['base']}, but this run has "
                f"{self._base}; name that base with --config.llm, or use another --workdir"
            )
        # Orbax can fill a tree of other shapes without an error, so they are compared first.
        found = _describe(self._manager.item_metadata(step)["state"])
        expected = _describe(abstract)
        for name in sorted(expected.keys() | set(filter(wanted, found))):
            if expected.get(name) != found.get(name):
                raise CheckpointError(
                    f"{where} does not fit this config: {name} is {found.get(name, 'missing')} "
                    f"there and {expected.get(name, 'missing')} here; use the config it was "
                    "trained with, or another --workdir"
                )

    def wait(self) -> None:
        """Wait until everything is on disk.

        Raises:
            CheckpointWriteError: something could not be written.
        """
        with self._write_errors():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait and release everything; does nothing after a failed write."""
        if not self._broken:
            self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SavedRun:
    """The checkpoints of a run, to be read without its model or its base; nothing is written.

    Args:
        workdir: the run's directory.

    Attributes:
        steps: those that were kept, ascending.
        best: the one with the lowest validation loss; the newest where none was validated.

    Raises:
        CheckpointError: there is no checkpoint.
    """

    def __init__(self, workdir: Path):
        self._directory = (Path(workdir) / "checkpoints").absolute()
        # A manager would create what is missing, and log that it does.
        if not any(path.name.isdigit() for path in self._directory.glob("*")):
            raise CheckpointError(f"{workdir} holds no checkpoint; expected checkpoints/STEP in it")
        self._manager = ocp.CheckpointManager(
            self._directory,
            # What a standard handler has written, this one can also read in part.
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(),
                "base": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                read_only=True, best_fn=lambda metrics: metrics[METRIC], best_mode="min"
            ),
        )
        self.steps = tuple(sorted(self._manager.all_steps()))
        self.best = self._manager.best_step() or self.steps[-1]

    def base(self, step: int) -> BaseIdentity:
        """The base that the checkpoint was trained on."""
        args = ocp.args.Composite(base=ocp.args.JsonRestore())
        return BaseIdentity(
            **self._read(step, lambda: self._manager.restore(step, args=args)["base"])
        )

    def val_loss(self, step: int) -> float | None:
        """Its validation loss; None where it was not validated."""
        metrics = self._read(step, lambda: self._manager.metrics(step))
        return (metrics or {}).get(METRIC)

    def shapes(self, step: int) -> Any:
        """The `trainable` tree as `jax.ShapeDtypeStruct`s; no value is read."""
        metadata = self._read(step, lambda: self._manager.item_metadata(step)["state"].tree)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), metadata["trainable"]
        )

    def trainable(self, step: int) -> Any:
        """The `trainable` tree as NumPy arrays; the optimizer's state is not read."""
        shapes = {"trainable": self.shapes(step)}
        args = ocp.args.PyTreeRestore(
            item=shapes,
            restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes),
            partial_restore=True,
        )
        args = ocp.args.Composite(state=args)
        read = self._read(step, lambda: self._manager.restore(step, args=args)["state"])
        return read["trainable"]

    def _read(self, step: int, read: Callable[[], Any]) -> Any:
        if step not in self.steps:
            raise CheckpointError(
                f"{self._directory} has no checkpoint of step {step}; it has {list(self.steps)}"
            )
        try:
            return read()
        # Damage fails in any of Orbax's layers.
        except Exception as error:
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            where = self._directory / str(step)
            raise CheckpointError(f"{where} is damaged: {reason[:200]}") from None


def _describe(tree: Any) -> dict[str, str]:
    """Shape and dtype of every leaf, by path."""
    tree = getattr(tree, "tree", tree)
    return {
        path_name(path): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            tree, is_leaf=lambda x: hasattr(x, "shape") and hasattr(x, "dtype")
        )
    }
