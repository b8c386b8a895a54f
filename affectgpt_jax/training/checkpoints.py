"""Checkpoints of what is trained: adapters, fusion, optimizer state and step, through Orbax.

The frozen base is not saved; its identity is, and a run resumed on another base is refused.
Orbax writes under a temporary name and renames, so a checkpoint is whole or not there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
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
    """

    def __init__(self, workdir: Path, base: BaseIdentity, keep: int = 3):
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
        where = self._directory / str(step)
        saved = self._manager.restore(step, args=ocp.args.Composite(base=ocp.args.JsonRestore()))
        _check_base(where, saved["base"], self._base)
        _check_tree(where, self._manager.item_metadata(step)["state"], abstract)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return self._manager.restore(step, args=args)["state"]

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
        shapes = self.shapes(step)
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        return self._read_trainable(step, shapes, how)

    def restore(self, step: int, base: BaseIdentity, abstract: Any) -> Any:
        """Read the `trainable` tree into the shapes, dtypes and shardings of `abstract`.

        Args:
            step: of the checkpoint.
            base: identity of the base that it is to be used with.
            abstract: a tree of `jax.ShapeDtypeStruct`s.

        Raises:
            CheckpointError: as for `Checkpoints.restore`, or there is no such step.
        """
        where = self._directory / str(step)
        _check_base(where, dataclasses.asdict(self.base(step)), dataclasses.asdict(base))
        _check_tree(where, {"trainable": self.shapes(step)}, {"trainable": abstract})
        how = ocp.checkpoint_utils.construct_restore_args(abstract)
        return self._read_trainable(step, abstract, how)

    def _read_trainable(self, step: int, shapes: Any, how: Any) -> Any:
        args = ocp.args.PyTreeRestore(
            item={"trainable": shapes}, restore_args={"trainable": how}, partial_restore=True
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


def silence_threads() -> None:
    """Keep what fails in Orbax's threads to the exception that it raises for it in ours.

    It also logs that, with the thread's traceback, remarks that what is only to be read cannot be
    written, and leaves coroutines whose loop is closed. Changes the whole process, so it is for
    commands to call.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    otherwise = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            otherwise(unraisable)

    sys.unraisablehook = hook


def _check_base(where: Path, saved: dict[str, str], mine: dict[str, str]) -> None:
    if saved["sha256"] != mine["sha256"]:
        raise CheckpointError(
            f"{where} was trained on the base {saved}, but this run has {mine}; name that base "
            "with --config.llm, or use another --workdir"
        )


def _check_tree(where: Path, saved: Any, wanted: Any) -> None:
    """Compare leaves: Orbax can fill a tree of other shapes without an error."""
    found, expected = _describe(saved), _describe(wanted)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise CheckpointError(
                f"{where} does not fit this config: {name} is {found.get(name, 'missing')} there "
                f"and {expected.get(name, 'missing')} here; use the config it was trained with, or "
                "another --workdir"
            )


def _describe(tree: Any) -> dict[str, str]:
    """Shape and dtype of every leaf, by path."""
    tree = getattr(tree, "tree", tree)
    return {
        path_name(path): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            tree, is_leaf=lambda x: hasattr(x, "shape") and hasattr(x, "dtype")
        )
    }
