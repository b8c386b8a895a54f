"""Files: read with a limit, written whole or not at all, locked, and hashed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from affectgpt_jax.common.errors import ReadError, UserError
from affectgpt_jax.common.text import shorten

# Of a file that is read as a whole: far more than any that is meant to be.
MAX_BYTES = 2**30
_MAX_NAME = 255  # bytes of a part of a path, on all usual file systems


class FileInUse(UserError, RuntimeError):
    """Another process holds the lock on a file or a directory."""


# --- reading ------------------------------------------------------------------------------------


def read_bytes(
    path: str | os.PathLike[str], limit: int = MAX_BYTES, error: type[UserError] = ReadError
) -> bytes:
    """Everything in a file.

    Args:
        path: the file.
        limit: in bytes.
        error: the class to raise.

    Raises:
        ReadError: it does not exist, cannot be read, or is larger than `limit`.
    """
    data = bytearray()
    try:
        with open(path, "rb") as file:
            # The size of a device or a pipe is not known before it is read.
            while len(data) <= limit and (chunk := file.read(2**20)):
                data += chunk
    except (OSError, ValueError) as trouble:  # ValueError: a zero byte in the path
        reason = getattr(trouble, "strerror", None) or trouble
        raise error(f"{path} cannot be read: {reason}") from None
    if len(data) > limit:
        raise error(f"{path} is larger than {limit:,} bytes, the most that is read of it")
    return bytes(data)


def decode(
    data: bytes,
    where: str,
    encoding: str = "utf-8",
    *,
    advice: str = "save it as UTF-8",
    error: type[UserError] = ReadError,
) -> str:
    """The text of a file, with or without a byte order mark.

    Args:
        data: the file's bytes.
        where: what messages call it.
        encoding: of the text. Others are not guessed: most bytes are text in several of them.
        advice: what to do about another encoding, for messages.
        error: the class to raise.

    Raises:
        ReadError: another encoding; the message has the line. Or an encoding that is unknown.
    """
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except LookupError:
        raise error(f"{encoding!r} is not an encoding; try utf-8 or gb18030") from None
    except UnicodeDecodeError as trouble:
        line = data.count(b"\n", 0, trouble.start) + 1
        raise error(
            f"{where}, line {line}: byte {data[trouble.start]:#04x} is not {encoding.upper()}; "
            f"{advice}"
        ) from None
    except UnicodeError as trouble:
        raise error(f"{where} is not {encoding.upper()}: {trouble}; {advice}") from None


def path_below(
    folder: str | os.PathLike[str], name: str, error: type[UserError] = ReadError
) -> Path:
    """The path in a folder of a name that comes from a file, such as that of a clip.

    Args:
        folder: where it must lie.
        name: may lead into folders below.
        error: the class to raise.

    Raises:
        ReadError: the name leads out of the folder, or is none.
    """
    parts = Path(name).parts
    longest = max((len(part.encode("utf-8", "surrogatepass")) for part in parts), default=0)
    if not 0 < longest <= _MAX_NAME or os.path.isabs(name) or ".." in parts or "\0" in name:
        raise error(
            f"the name {shorten(name)} leads out of {folder}; expected that of a file below it"
        )
    return Path(folder, name)


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The hash of a file, in hexadecimal.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- writing ------------------------------------------------------------------------------------


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Around what writes to an open file: an `OSError`, as of a full disk, then names the file."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """A file to write to, which becomes `path` when the block ends without an error.

    The content is on disk before it has that name, so a loss of power leaves the file of before or
    this one. The folder is made if it is not there.

    Args:
        path: what to write or replace. A link or a device at that place is neither followed nor
            replaced.
        mode: "wb" for bytes; "w" for UTF-8 text, whose line ends stay as they are.

    Raises:
        OSError: it cannot be written, or something else than a file stands there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _check_replaceable(path)
    beside = path.with_name(f".{secrets.token_hex(8)}.tmp")
    # An exclusive file of the kernel's permissions: no link can stand there, and the umask holds.
    number = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        with naming(path), os.fdopen(number, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise
    sync(path.parent)


def _check_replaceable(path: Path) -> None:
    try:
        kind = path.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISLNK(kind):
        raise OSError(errno.ELOOP, "a link stands there, which is not followed", str(path))
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(kind):
        raise OSError(errno.EEXIST, "something else than a file stands there", str(path))


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write or replace a UTF-8 file, as `atomic_write` does.

    Raises:
        OSError: as `atomic_write`.
    """
    with atomic_write(path, "w") as file:
        file.write(text)


def open_to_append(path: str | os.PathLike[str], *, alone: bool = False) -> IO[str]:
    """A UTF-8 file to add lines to, made if it is not there; its line ends stay as they are.

    Args:
        path: the file.
        alone: keep others out who ask for it alone, until it is closed, where the file system has
            locks.

    Raises:
        FileInUse: another process has it alone.
        OSError: it cannot be written, or is a link, which is not followed.
    """
    number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
    file = os.fdopen(number, "a", encoding="utf-8", newline="")
    try:
        if alone:
            _locked(file)
    except BaseException as error:
        file.close()
        if isinstance(error, BlockingIOError):
            raise FileInUse(
                f"{path} is being written by another process; wait for it, or stop it, and run "
                "this again"
            ) from None
        raise
    return file


def sync(path: str | os.PathLike[str]) -> None:
    """Make a file, or the names in a directory, survive a loss of power.

    Raises:
        OSError: there is no such file, or the disk refuses.
    """
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        # Some file systems cannot do so for a directory.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(number)


@contextlib.contextmanager
def new_path(path: str | os.PathLike[str], error: type[UserError]) -> Iterator[Path]:
    """A path at which to make a file or a directory; it becomes `path` when the block ends.

    After an error, nothing is left of it.

    Args:
        path: where nothing must stand, not even a link.
        error: the class to raise.

    Raises:
        UserError: of class `error`: something stands there already, or the disk refuses.
    """
    path = Path(path)
    if os.path.lexists(path):
        raise error(f"{path} exists already; name another place, or remove it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=path.parent) as staging:
            partial = Path(staging) / path.name
            yield partial
            partial.rename(path)
    except OSError as trouble:
        raise error(f"{path} cannot be written: {trouble}") from None


# --- locks --------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock_file(
    path: str | os.PathLike[str],
    what: str,
    advice: str,
    say: Callable[[str], None] = print,
) -> Iterator[None]:
    """Hold a lock that one process on any host can hold at a time.

    The lock is the kernel's, so it ends with the process, however that ends. The file names the
    holder, and stays.

    Args:
        path: the lock's own file; it is made if it is not there, and no link is followed.
        what: what the lock protects, for messages.
        advice: what to do where another process holds it, for messages.
        say: where to warn of a file system without locks.

    Raises:
        FileInUse: another process holds it; the message names its host and process.
        OSError: the file cannot be written.
    """
    number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    with os.fdopen(number, "r+", encoding="utf-8") as file:
        try:
            if not _locked(file):
                say(f"warning: {what} is on a file system without locks; see that one run uses it")
        except BlockingIOError:
            raise FileInUse(f"{what} is in use by {_holder(file)}; {advice}") from None
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
        file.truncate(0)
        file.write(json.dumps(holder) + "\n")
        file.flush()
        yield


def _locked(file: IO[Any]) -> bool:
    """Lock an open file until it is closed; False on a file system that has no locks.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        return False
    return True


def _holder(file: IO[str]) -> str:
    try:
        holder = json.loads(file.read(1024))
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (ValueError, KeyError, TypeError, RecursionError):  # it is just writing that
        return "another process"
