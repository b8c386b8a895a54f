"""Checkpoints of what is trained: adapters, fusion, optimizer state and step, through Orbax.

A checkpoint is a directory `checkpoints/STEP`:

    manifest.json   the base that it belongs to, what else it depends on, its validation loss, size
                    and sha256 of every file
    state/          what Orbax writes: each process its own part of every array

A checkpoint is written under another name, read back, and renamed when all its files, the manifest
last, are on disk. So a checkpoint that is there was complete and could be read, and the hashes show
later damage.

The frozen base is not saved; its identity is, as are those of all else that an answer depends on:
tokenizer, chat template, prompts, records, lexicon, code. `check_inputs` says which may be another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp

from affectgpt_jax.common.errors import ReadError, UserError
from affectgpt_jax.common.files import sha256_of, sync
from affectgpt_jax.common.identity import Identity, json_sha256
from affectgpt_jax.common.json import check_type, read_json, write_json
from affectgpt_jax.common.trees import nbytes, path_name
from affectgpt_jax.training.step import State

MANIFEST = "manifest.json"
STATE = "state"
# Left by a run that was killed, and removed by the next one; and damaged ones that are set aside.
_SAVING, _DELETING, _DAMAGED = ".saving-", ".deleting-", ".damaged"


# Orbax looks for its own files by patterns that begin with the path, and TensorStore takes a
# backslash for a slash: what is written there is lost, or mixed with a neighbour's.
_PATTERNS, _UNREADABLE = "*?[", "\\"

# What may be another than in training where the user says so, and what may always be another, but
# is reported. Nothing else may.
ALLOWED_OTHERS = ("prompts", "lexicon")
_REPORTED = ("code",)
# How systems say that there is no room.
_FULL = ("No space left", "quota exceeded", "File too large")


class CheckpointError(UserError, ValueError):
    """A checkpoint that does not belong to this run, or that cannot be read."""


class CheckpointWriteError(UserError, RuntimeError):
    """A checkpoint that cannot be written."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
        step: the number of updates.
        base: identity of the base that it was trained on.
        inputs: identities of what else its answers depend on, by what it is.
        val_loss: None where it was not validated.
        files: `[bytes, sha256]` of every file, by its path in the checkpoint.
    """

    step: int
    base: Identity
    inputs: dict[str, Identity]
    val_loss: float | None
    files: dict[str, tuple[int, str]]

    def write(self, directory: Path) -> None:
        """Write or replace the manifest of a directory, at once and durably."""
        fields = dataclasses.asdict(self)
        write_json(directory / MANIFEST, fields | {"sha256": json_sha256(fields)}, indent=1)

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """The manifest of a checkpoint.

        Raises:
            CheckpointError: it is missing, or not as it was written.
        """
        path = directory / MANIFEST
        if not path.is_file():
            raise _damaged(directory, f"{MANIFEST} is missing")
        try:
            fields = read_json(path, dict[str, Any])
            digest = fields.pop("sha256", None)
            manifest = check_type(fields, cls, str(path))
        except ReadError as error:
            raise _damaged(directory, str(error).removeprefix(f"{directory}/")) from None
        if digest != json_sha256(fields):
            raise _damaged(directory, f"{MANIFEST}: its own sha256 does not match")
        return manifest


def check_path(workdir: Path, *, write: bool = True) -> None:
    """Refuse a directory whose path the libraries that store checkpoints misread.

    Args:
        workdir: the run's directory; that of its parents counts as well.
        write: whether checkpoints are to be written there. Some can be read all the same.

    Raises:
        CheckpointError: naming the characters.
    """
    text = str(Path(workdir).absolute())
    forbidden = _UNREADABLE + (_PATTERNS if write else "")
    found = sorted({char for char in text if char in forbidden or "\ud800" <= char <= "\udfff"})
    if found:
        raise CheckpointError(
            f"{text}: checkpoints cannot be {'written' if write else 'read'} below a path with "
            f"{' or '.join(map(ascii, found))} in it; name another --workdir"
            + ("" if write else ", or move the run")
        )


def check_inputs(
    where: Path,
    saved: Mapping[str, Identity],
    mine: Mapping[str, Identity],
    allow_other: Collection[str] = (),
    say: Callable[[str], None] = print,
) -> None:
    """Compare what a checkpoint was trained with and what it is about to be used with.

    Args:
        where: the checkpoint.
        saved: its `Manifest.inputs`.
        mine: those of the command, or some of them.
        allow_other: which of `ALLOWED_OTHERS` may be others.
        say: told of those that are, and of other code.

    Raises:
        CheckpointError: one is another, and may not be; the message names both.
    """
    for name, identity in mine.items():
        was = saved.get(name)
        if was is not None and was.sha256 == identity.sha256:
            continue
        differ = f"{where}: {name}: it was trained with {was or 'none'}, and now it is {identity}"
        if name in _REPORTED or name in allow_other:
            say(f"note: {differ}")
        elif name in ALLOWED_OTHERS:
            raise CheckpointError(
                f"{differ}; put back what it was trained with, or pass --allow-other={name} if "
                "this is meant"
            )
        else:
            raise CheckpointError(
                f"{differ}; put back what it was trained with, or train in another --workdir"
            )


def check_disk(workdir: Path, abstract_state: State) -> None:
    """Refuse to start a run whose first checkpoint does not fit on the disk.

    Raises:
        CheckpointError: naming how much is free and how much a checkpoint needs.
    """
    need = nbytes(abstract_state)
    free = shutil.disk_usage(workdir).free
    if free < need:
        raise CheckpointError(
            f"{workdir}: {free / 2**20:.0f} MiB are free, but one checkpoint takes "
            f"{need / 2**20:.0f} MiB; free some space, or name another --workdir"
        )


class _Folder:
    """The checkpoints in a directory: which there are, and whether they are whole.

    Args:
        workdir: the run's directory.
    """

    def __init__(self, workdir: Path):
        self.path = (Path(workdir) / "checkpoints").absolute()
        self._intact: set[int] = set()

    def at(self, step: int) -> Path:
        return self.path / str(step)

    def steps(self) -> list[int]:
        """Ascending."""
        return sorted(int(entry.name) for entry in self.path.glob("*") if entry.name.isdigit())

    def best(self) -> int | None:
        """As `Checkpoints.best_step`."""
        losses = {step: Manifest.read(self.at(step)).val_loss for step in self.steps()}
        known = {step: loss for step, loss in losses.items() if loss is not None}
        return (
            min(known, key=lambda step: (known[step], -step))
            if known
            else max(losses, default=None)
        )

    def verify(self, step: int) -> Manifest:
        """Compare a checkpoint's files with its manifest; each is hashed once in a process's life.

        Raises:
            CheckpointError: one is missing, truncated or changed; the message names it.
        """
        where = self.at(step)
        manifest = Manifest.read(where)
        if step in self._intact:
            return manifest
        for name, (size, digest) in manifest.files.items():
            file = where / name
            found = file.stat().st_size if file.is_file() else "no such file"
            if found != size:
                raise _damaged(where, f"{name}: size in bytes: found {found}, expected {size}")
            found = sha256_of(file)
            if found != digest:
                raise _damaged(where, f"{name}: sha256: found {found}, expected {digest}")
        self._intact.add(step)
        return manifest


class Checkpoints:
    """The checkpoints of one run, in `workdir/checkpoints/<step>`.

    All processes of a run take part in `save` and `restore`; only the main process
    reads and changes the other files on disk.

    Args:
        workdir: the run's directory.
        base: identity of the frozen base that this run trains on.
        keep: how many of the newest to keep, beside the best on validation.
        is_main_process: whether this is process 0.
        inputs: identities of what else the answers of this run depend on, by what it is.
    """

    def __init__(
        self,
        workdir: Path,
        base: Identity,
        keep: int = 3,
        is_main_process: bool = True,
        inputs: Mapping[str, Identity] | None = None,
    ):
        self._base, self._inputs, self._keep = base, dict(inputs or {}), keep
        self._is_main_process = is_main_process
        check_path(workdir)
        self._folder = _Folder(workdir)
        self._broken = False
        self._orbax = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        # Finishes a checkpoint while training goes on; one at a time.
        self._finisher = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None
        if is_main_process:
            self._folder.path.mkdir(parents=True, exist_ok=True)
            for rest in (_SAVING, _DELETING):
                for path in self._folder.path.glob(f"{rest}*"):
                    shutil.rmtree(path)

    def latest_step(self) -> int | None:
        """The newest step, once it is written; None where nothing has been saved."""
        self.wait()
        return max(self._folder.steps(), default=None)

    def best_step(self) -> int | None:
        """The step with the lowest validation loss, of equals the newest; where none was validated,
        the newest; None where nothing has been saved.

        Raises:
            CheckpointError: a manifest is damaged.
        """
        return self._folder.best()

    def val_loss(self, step: int) -> float | None:
        """A step's validation loss; None where it was not validated."""
        return Manifest.read(self._folder.at(step)).val_loss

    def set_val_loss(self, step: int, val_loss: float) -> None:
        """Add the validation loss of a checkpoint that was saved without one."""
        where = self._folder.at(step)
        dataclasses.replace(Manifest.read(where), val_loss=val_loss).write(where)

    def step_to_resume(
        self,
        fallback: bool = False,
        say: Callable[[str], None] = print,
        allow_other: Collection[str] = (),
    ) -> int | None:
        """The newest step, after a look at its files; None where nothing has been saved.

        Args:
            fallback: where the newest is damaged, set it aside, under the name `STEP.damaged`, and
                take the newest that is whole.
            say: told of it.
            allow_other: as for `check_inputs`.

        Raises:
            CheckpointError: the newest is damaged; the message names what is, and the newest that
                is whole. Or it was trained on another base, or with other inputs.
        """
        damaged, damage, whole = [], None, None
        for step in reversed(self._folder.steps()):
            try:
                manifest = self._folder.verify(step)
                whole = step
                break
            except CheckpointError as error:
                damaged.append(step)
                damage = damage or error
        if whole is None:
            if damage is None:
                return None
            raise CheckpointError(
                f"{damage}; no older checkpoint is intact: use another --workdir, or delete "
                f"{self._folder.path} to start anew"
            ) from None
        if damaged and not fallback:
            raise CheckpointError(
                f"{damage}; the newest intact checkpoint is that of step {whole}: pass --fallback "
                "to go on from there"
            ) from None
        where = self._folder.at(whole)
        _check_base(where, manifest.base, self._base)
        check_inputs(where, manifest.inputs, self._inputs, allow_other, say)
        for step in damaged:
            aside = self._folder.at(step).with_name(f"{step}{_DAMAGED}")
            if aside.exists():
                shutil.rmtree(aside)
            self._folder.at(step).rename(aside)
        if damaged:
            say(f"warning: {damage}; set aside, going on from step {whole}")
        return whole

    def save(self, step: int, state: State, val_loss: float | None) -> None:
        """Write a checkpoint in the background; returns when the state may be donated again.

        Raises:
            CheckpointWriteError: this one or the one before could not be written.
        """
        self.wait()
        with self._write_errors():
            staging = self._folder.path / f"{_SAVING}{step}"
            self._orbax.save(staging / STATE, args=ocp.args.StandardSave(state))
            # Its arrays may be donated when this returns.
            written = _describe(state), np.asarray(state["step"])
            self._pending = self._finisher.submit(self._finish, staging, step, val_loss, written)

    def _finish(
        self, staging: Path, step: int, val_loss: float | None, written: tuple[Any, np.ndarray]
    ) -> None:
        """Wait for what all processes write, then let it count as a checkpoint."""
        self._orbax.wait_until_finished()
        if not self._is_main_process:
            return
        _read_back(staging / STATE, *written)
        files = {}
        for path in sorted(staging.rglob("*")):
            sync(path)
            if path.is_file():
                name = str(path.relative_to(staging))
                files[name] = path.stat().st_size, sha256_of(path)
        Manifest(step, self._base, self._inputs, val_loss, files).write(staging)
        staging.rename(self._folder.at(step))
        sync(self._folder.path)
        steps = self._folder.steps()
        for old in set(steps) - {*steps[-self._keep :], self._folder.best()}:
            # Renamed first: what is half deleted must not look like a checkpoint.
            gone = self._folder.path / f"{_DELETING}{old}"
            self._folder.at(old).rename(gone)
            shutil.rmtree(gone)

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        """Errors of many types, of Orbax's threads and ours, as one of ours."""
        try:
            yield
        except Exception as error:
            self._broken = True
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            full = any(words in str(error) for words in _FULL)
            raise CheckpointWriteError(
                f"a checkpoint cannot be written to {self._folder.path}"
                f"{'; is the disk full?' if full else '.'} Those before it are whole, and the same "
                f"command resumes from them ({reason})"
            ) from error

    def restore(self, step: int, abstract: State) -> State:
        """Read a checkpoint into the shapes, dtypes and shardings of `abstract`.

        Raises:
            CheckpointError: it is damaged, was trained on another base, or its tree is not that of
                this config; the message names what differs.
        """
        where = self._folder.at(step)
        if self._is_main_process:
            _check_base(where, self._folder.verify(step).base, self._base)
        _check_tree(where, self._orbax.metadata(where / STATE).item_metadata, abstract)
        return self._orbax.restore(where / STATE, args=ocp.args.StandardRestore(abstract))

    def wait(self) -> None:
        """Wait until everything is on disk.

        Raises:
            CheckpointWriteError: something could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            with self._write_errors():
                pending.result()

    def close(self) -> None:
        """Wait and release everything; does nothing after a failed write."""
        if not self._broken:
            self.wait()
            self._finisher.shutdown()
            self._orbax.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def missing_file(workdir: Path) -> str | None:
    """The first file that a run's checkpoints lack, in words; None where there is one or more and
    all files are there. Nothing is hashed."""
    folder = _Folder(workdir)
    for step in folder.steps():
        try:
            manifest = Manifest.read(folder.at(step))
        except CheckpointError as error:
            return str(error)
        for name in manifest.files:
            if not (folder.at(step) / name).is_file():
                return f"checkpoints/{step}/{name} is missing"
    return None if folder.steps() else "checkpoints/STEP is missing"


class SavedRun:
    """The checkpoints of a run, to be read without its model or its base; nothing is written.

    Args:
        workdir: the run's directory.

    Attributes:
        steps: those that were kept, ascending.
        best: the one with the lowest validation loss, of equals the newest; where none was
            validated, the newest.

    Raises:
        CheckpointError: there is no checkpoint, or a manifest is damaged.
    """

    def __init__(self, workdir: Path):
        check_path(workdir, write=False)
        self._folder = _Folder(workdir)
        self.steps = tuple(self._folder.steps())
        if not self.steps:
            raise CheckpointError(f"{workdir} holds no checkpoint; expected checkpoints/STEP in it")
        self.best = self._folder.best()
        # What a standard handler has written, this one can also read in part.
        self._orbax = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())

    def base(self, step: int) -> Identity:
        """The base that the checkpoint was trained on."""
        return self._manifest(step).base

    def inputs(self, step: int) -> dict[str, Identity]:
        """What else its answers depend on, see `Manifest`."""
        return self._manifest(step).inputs

    def check_inputs(
        self,
        step: int,
        mine: Mapping[str, Identity],
        allow_other: Collection[str] = (),
        say: Callable[[str], None] = print,
    ) -> None:
        """Compare these with what the checkpoint was trained with, see `check_inputs`.

        Raises:
            CheckpointError: one is another, and may not be; or there is no such step.
        """
        check_inputs(self._folder.at(step), self.inputs(step), mine, allow_other, say)

    def val_loss(self, step: int) -> float | None:
        """Its validation loss; None where it was not validated."""
        return self._manifest(step).val_loss

    def fingerprint(self, step: int) -> str:
        """Sha256, in hex, over the hashes of its files: of another training, it is another one."""
        return json_sha256(self._manifest(step).files)

    def _manifest(self, step: int) -> Manifest:
        """That of a checkpoint whose files are whole."""
        if step not in self.steps:
            raise CheckpointError(
                f"{self._folder.path} has no checkpoint of step {step}; it has {list(self.steps)}"
            )
        return self._folder.verify(step)

    def shapes(self, step: int) -> Any:
        """The `trainable` tree as `jax.ShapeDtypeStruct`s; no value is read."""
        metadata = self._read(step, lambda state: self._orbax.metadata(state).item_metadata.tree)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), metadata["trainable"]
        )

    def trainable(self, step: int) -> Any:
        """The `trainable` tree as NumPy arrays; the optimizer's state is not read."""
        shapes = self.shapes(step)
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        return self._read_trainable(step, shapes, how)

    def restore(self, step: int, base: Identity, abstract: Any) -> Any:
        """Read the `trainable` tree into the shapes, dtypes and shardings of `abstract`.

        Args:
            step: of the checkpoint.
            base: identity of the base that it is to be used with.
            abstract: a tree of `jax.ShapeDtypeStruct`s.

        Raises:
            CheckpointError: as for `Checkpoints.restore`, or there is no such step.
        """
        where = self._folder.at(step)
        _check_base(where, self.base(step), base)
        _check_tree(where, {"trainable": self.shapes(step)}, {"trainable": abstract})
        how = ocp.checkpoint_utils.construct_restore_args(abstract)
        return self._read_trainable(step, abstract, how)

    def _read_trainable(self, step: int, shapes: Any, how: Any) -> Any:
        args = ocp.args.PyTreeRestore(
            item={"trainable": shapes}, restore_args={"trainable": how}, partial_restore=True
        )
        read = self._read(step, lambda state: self._orbax.restore(state, args=args))
        return read["trainable"]

    def _read(self, step: int, read: Callable[[Path], Any]) -> Any:
        self._manifest(step)
        where = self._folder.at(step)
        try:
            return read(where / STATE)
        # Whatever Orbax makes of files that are as they were written, but not by this version.
        except Exception as error:
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise CheckpointError(f"{where} cannot be read: {reason[:200]}") from None


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


def _damaged(where: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{where} is damaged: {what}")


def _check_base(where: Path, saved: Identity, mine: Identity) -> None:
    if saved.sha256 != mine.sha256:
        raise CheckpointError(
            f"{where} was trained on the base {saved.name} (sha256 {saved.sha256}), but this run "
            f"has {mine.name} (sha256 {mine.sha256}); name that base with --config.llm, or use "
            "another --workdir"
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


def _read_back(where: Path, expected: dict[str, str], step: np.ndarray) -> None:
    """Compare what was written with what it should be: the tree, all shapes, and one value.

    Hashes prove that bytes are as they were written, not that they can be read. The value is the
    number of the step, which is never 0: where TensorStore finds no bytes, it reads zeros.

    Raises:
        ReadError: it is something else, or cannot be read.
    """
    # A handler alone: a checkpointer would wait for the other processes.
    handler = ocp.PyTreeCheckpointHandler()
    as_array = ocp.RestoreArgs(restore_type=np.ndarray)
    args = ocp.args.PyTreeRestore(
        item={"step": jax.ShapeDtypeStruct(step.shape, step.dtype)},
        restore_args={"step": as_array},
        partial_restore=True,
    )
    try:
        # One array first: where many fail together, the others come back to a loop that is closed.
        number = handler.restore(where, args=args)["step"]
        found = _describe(handler.metadata(where)), number
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ReadError(f"it cannot be read back: {reason[:200]}") from None
    if found != (expected, step):
        differs = sorted(found[0].items() ^ expected.items()) or [("step", found[1])]
        raise ReadError(f"it reads back as something else: {' '.join(map(str, differs[0]))}")


def _describe(tree: Any) -> dict[str, str]:
    """Shape and dtype of every leaf, by path."""
    tree = getattr(tree, "tree", tree)
    return {
        path_name(path): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            tree, is_leaf=lambda x: hasattr(x, "shape") and hasattr(x, "dtype")
        )
    }
