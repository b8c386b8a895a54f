"""Identities: the same content, the same hash; any other, another one."""

import hashlib

import pytest

from affectgpt_jax.common.identity import (
    Identity,
    code_identity,
    files_sha256,
    json_sha256,
    named_files_sha256,
)


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def test_an_identity_shows_its_name_and_the_start_of_its_hash():
    assert str(Identity("tiny", "0123456789abcdef" * 4)) == "tiny (sha256 0123456789ab)"


def test_the_hash_of_a_value_is_that_of_its_json_with_sorted_keys():
    assert json_sha256({"b": 1, "a": [2]}) == digest('{"a": [2], "b": 1}').hex()
    assert json_sha256({"a": [2], "b": 1}) == json_sha256({"b": 1, "a": [2]})
    assert json_sha256([1, 2]) != json_sha256([2, 1])
    assert json_sha256("ä\ud800")
    with pytest.raises(TypeError):
        json_sha256(object())


def test_the_hash_of_files_is_that_of_their_hashes_in_order(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_text(path.name)
    expected = hashlib.sha256(digest("a") + digest("b")).hexdigest()
    assert files_sha256(paths) == expected
    assert files_sha256(paths[::-1]) != expected
    about = hashlib.sha256(b'{"x": 1}' + digest("a") + digest("b")).hexdigest()
    assert files_sha256(paths, {"x": 1}) == about
    paths[0].rename(tmp_path / "c")
    assert files_sha256([tmp_path / "c", paths[1]]) == expected
    with pytest.raises(OSError):
        files_sha256(paths)


def test_the_hash_of_named_files_counts_their_names_and_not_their_folders(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a").write_text("1")
    found = named_files_sha256([tmp_path / "x" / "a"])
    assert found == digest(f"a {digest('1').hex()}").hex()
    assert found == named_files_sha256([tmp_path / "y" / "a"])
    (tmp_path / "y" / "a").rename(tmp_path / "y" / "b")
    assert found != named_files_sha256([tmp_path / "y" / "b"])


def test_the_identity_of_code_is_that_of_its_sources_wherever_they_lie(tmp_path):
    def package(folder, **files):
        for name, text in files.items():
            path = tmp_path / folder / "package" / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".py").write_text(text)
        return tmp_path / folder / "package"

    mine = code_identity(package("a", x="1", data__y="2"))
    assert mine.name == "package" and len(mine.sha256) == 64
    (package("b", x="1", data__y="2") / "notes.txt").write_text("no source")
    assert code_identity(package("b", configs__demo="3", data_prep__x="4")) == mine
    for other in (
        package("c", x="1", data__y="3"),
        package("d", x="1", models__y="2"),
        package("e", x="1", data__y="2", z=""),
    ):
        assert code_identity(other).sha256 != mine.sha256
    assert code_identity().name == "affectgpt_jax"
