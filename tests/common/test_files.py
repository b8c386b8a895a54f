"""Files: read with a limit, written whole or not at all, locked, and hashed."""

import errno
import hashlib
import json
import os
import re
import resource
import signal
import socket
import stat
import subprocess
import sys

import pytest

from affectgpt_jax.common import files
from affectgpt_jax.common.errors import ReadError, UserError
from affectgpt_jax.common.files import FileInUse, atomic_write, lock_file, new_path, read_bytes
from affectgpt_jax.common.json import ResumableJsonl


class OtherError(UserError):
    pass


# --- reading ------------------------------------------------------------------------------------


def test_a_file_is_read_up_to_a_limit(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"x" * 100)
    assert read_bytes(path, limit=100) == b"x" * 100
    with pytest.raises(ReadError, match="a is larger than 99 bytes"):
        read_bytes(path, limit=99)
    # A device never ends, and says nothing of its size.
    with pytest.raises(ReadError, match="/dev/zero is larger than"):
        read_bytes("/dev/zero", limit=3 * 2**20)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for path, why in ((tmp_path / "a", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ReadError, match=f"{path} cannot be read: {why}"):
            read_bytes(path)
    with pytest.raises(ReadError, match="cannot be read: embedded null byte"):
        read_bytes("a\0b")
    with pytest.raises(OtherError, match="cannot be read"):
        read_bytes(tmp_path / "a", error=OtherError)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../a", "/a", "a/../b", "a\0b", "a" * 256, "a/" + "ä" * 128, "\ud800" * 99],
)
def test_a_name_that_leads_out_of_its_folder_is_refused(name, tmp_path):
    with pytest.raises(OtherError, match="leads out of .*; expected that of a file below it"):
        files.path_below(tmp_path, name, OtherError)


@pytest.mark.parametrize(
    "name", ["a", "a/b.npy", "..a", "a..b/c", "a" * 255, "ä\u3000 x", "~", "-"]
)
def test_a_name_below_its_folder_is_joined(name, tmp_path):
    assert files.path_below(tmp_path, name) == tmp_path / name


def test_text_has_one_encoding_and_maybe_a_mark():
    assert files.decode("\ufeffä".encode(), "f") == files.decode("ä".encode(), "f") == "ä"
    assert files.decode("走".encode("gb18030"), "f", "gb18030") == "走"
    assert files.decode("ä".encode("utf-16"), "f", "utf-16") == "ä"


@pytest.mark.parametrize(
    ("data", "encoding", "message"),
    [
        (b"a\nb\n\xff", "utf-8", "f, line 3: byte 0xff is not UTF-8; save it as UTF-8"),
        (b"a", "utf-9", "'utf-9' is not an encoding"),
        (b"a", "hex", "'hex' is not a text encoding|is not an encoding"),
        (b"\x81", "idna", "is not IDNA"),
    ],
)
def test_another_encoding_is_refused_by_line(data, encoding, message):
    with pytest.raises(OtherError, match=message):
        files.decode(data, "f", encoding, error=OtherError)


# --- writing ------------------------------------------------------------------------------------


def test_a_disk_that_is_full_is_told_with_the_file(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    lines = ResumableJsonl(tmp_path / "lines.jsonl", dict, ("name",))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
        for name, write in (
            ("new.json", lambda: files.write_text(tmp_path / "new.json", "x" * 200)),
            ("lines.jsonl", lambda: lines.append({"name": "x" * 200})),
        ):
            with pytest.raises(OSError, match="File too large") as told:
                write()
            assert told.value.filename == str(tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert not (tmp_path / "new.json").exists()


def test_a_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "new" / "a"
    with atomic_write(path) as file:
        file.write(b"x")
        assert not path.exists()
    assert path.read_bytes() == b"x"
    with atomic_write(path, "w") as file:
        file.write("ä\r\n\n")
        assert path.read_bytes() == b"x"
    assert path.read_bytes() == "ä\r\n\n".encode()
    assert list(path.parent.iterdir()) == [path]


def test_a_file_is_as_open_as_the_umask_allows(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_the_file_of_before_is_there_and_nothing_else(tmp_path, error):
    files.write_text(tmp_path / "a", "before")
    with pytest.raises(error), atomic_write(tmp_path / "a") as file:
        file.write(b"half")
        raise error
    assert (tmp_path / "a").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_content_is_on_disk_before_it_has_the_name(tmp_path, monkeypatch):
    done = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda n: (done.append(os.fstat(n).st_size), sync(n)))
    monkeypatch.setattr(os, "replace", lambda *p: (done.append("renamed"), replace(*p)))
    files.write_text(tmp_path / "a", "x" * 5000)
    assert done[:2] == [5000, "renamed"]
    assert len(done) == 3  # and the folder, which holds the name


def test_no_link_is_followed_or_replaced(tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    (tmp_path / "link").symlink_to(mine)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("link", "dangling"):
        with pytest.raises(OSError, match="a link stands there, which is not followed"):
            files.write_text(tmp_path / name, "x")
        assert (tmp_path / name).is_symlink()
    with pytest.raises(OSError, match="something else than a file"):
        files.write_text("/dev/null", "x")
    assert mine.read_text() == "mine" and not (tmp_path / "nowhere").exists()
    (tmp_path / "folder").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "folder")
    files.write_text(tmp_path / "linked" / "a", "x")  # a link to the folder is the user's choice
    assert (tmp_path / "folder" / "a").read_text() == "x"


def test_lines_are_added_through_no_link(tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("mine\n")
    for name, target in (("link", mine), ("dangling", tmp_path / "nowhere")):
        (tmp_path / name).symlink_to(target)
        with pytest.raises(OSError) as told:
            files.open_to_append(tmp_path / name)
        assert told.value.errno == errno.ELOOP
    assert mine.read_text() == "mine\n" and not (tmp_path / "nowhere").exists()
    with files.open_to_append(mine) as file:
        file.write("more\n")
    assert mine.read_text() == "mine\nmore\n"


def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path):
    path = tmp_path / ("x" * 255)
    files.write_text(path, "x")
    assert path.read_text() == "x"


def test_what_is_new_appears_at_the_end(tmp_path):
    with new_path(tmp_path / "a" / "b.bin", OtherError) as partial:
        partial.write_bytes(b"x")
        assert not (tmp_path / "a" / "b.bin").exists()
    assert (tmp_path / "a" / "b.bin").read_bytes() == b"x"
    with new_path(tmp_path / "c", OtherError) as partial:
        partial.mkdir()
        (partial / "d").write_bytes(b"x")
        assert not (tmp_path / "c").exists()
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["d"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_nothing_new_behind(tmp_path, error):
    with pytest.raises(error), new_path(tmp_path / "x", OtherError) as partial:
        partial.mkdir()
        (partial / "y").write_bytes(b"x")
        raise error
    assert not list(tmp_path.iterdir())


def test_what_is_there_stays_and_trouble_with_the_disk_is_one_sentence(tmp_path):
    (tmp_path / "x").write_bytes(b"mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name, message in (
        ("x", "x exists already; name another place, or remove it"),
        ("dangling", "dangling exists already"),
        ("x/y", "x/y cannot be written: .*File exists"),
    ):
        with pytest.raises(OtherError, match=message), new_path(tmp_path / name, OtherError):
            raise AssertionError("the block must not run")
    with pytest.raises(OtherError, match="z cannot be written: .*full"):
        with new_path(tmp_path / "z", OtherError):
            raise OSError(28, "full")
    assert (tmp_path / "x").read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "x"]


# --- hashes -------------------------------------------------------------------------------------


def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path):
    data = os.urandom(3 * 2**18 + 1)
    (tmp_path / "a").write_bytes(data)
    assert files.sha256_of(tmp_path / "a") == hashlib.sha256(data).hexdigest()


# --- locks --------------------------------------------------------------------------------------

HOLD = """
import sys, time
from affectgpt_jax.common.files import lock_file
with lock_file(sys.argv[1], "the run", "wait"):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_lock_is_refused_by_host_and_process_until_its_holder_is_gone(tmp_path):
    path = tmp_path / "lock"
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        try:
            assert first.stdout.readline() == "locked\n"
            with pytest.raises(FileInUse) as error, lock_file(path, "the run", "wait for it"):
                raise AssertionError("two at once")
        finally:
            first.kill()
        assert re.fullmatch(
            rf"the run is in use by process {first.pid} on {re.escape(socket.gethostname())}, "
            r"since [-\d]+ [:\d]+; wait for it",
            str(error.value),
        )
        first.wait()
        with lock_file(path, "the run", "wait"):
            assert json.loads(path.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}', "[" * 1000])
def test_a_lock_that_does_not_name_its_holder_still_holds(tmp_path, content):
    path = tmp_path / "lock"
    with lock_file(path, "the run", "wait"):
        path.write_text(content)
        with pytest.raises(FileInUse, match="in use by another process; wait"):
            with lock_file(path, "the run", "wait"):
                raise AssertionError("two at once")
    with lock_file(path, "the run", "wait"):
        pass


def test_a_lock_follows_no_link(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "lock").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError), lock_file(tmp_path / "lock", "the run", "wait"):
        raise AssertionError("locked a link")
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    said = []
    with lock_file(tmp_path / "lock", "the run", "wait", said.append):
        pass
    assert said[0].startswith("warning: the run is on a file system without locks")
