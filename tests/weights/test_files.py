"""Files and directories that are there whole or not at all."""

import pytest

from affectgpt_jax.weights.files import new_directory, new_file
from affectgpt_jax.weights.streaming import WeightsError


def test_what_is_written_appears_at_the_end(tmp_path):
    with new_file(tmp_path / "a" / "b.bin") as partial:
        partial.write_bytes(b"x")
        assert not (tmp_path / "a" / "b.bin").exists()
    assert (tmp_path / "a" / "b.bin").read_bytes() == b"x"
    with new_directory(tmp_path / "c") as partial:
        (partial / "d").write_bytes(b"x")
        assert not (tmp_path / "c").exists()
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["d"]


@pytest.mark.parametrize("new", [new_file, new_directory])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_nothing_behind(tmp_path, new, error):
    with pytest.raises(error), new(tmp_path / "x") as partial:
        (partial / "y" if new is new_directory else partial).write_bytes(b"x")
        raise error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("new", [new_file, new_directory])
def test_what_is_there_stays_and_trouble_with_the_disk_is_one_sentence(tmp_path, new):
    (tmp_path / "x").write_bytes(b"mine")
    with pytest.raises(WeightsError, match="x exists already"), new(tmp_path / "x"):
        raise AssertionError("the block must not run")
    with pytest.raises(WeightsError, match="x/y cannot be written"), new(tmp_path / "x" / "y"):
        raise AssertionError("the block must not run")
    with pytest.raises(WeightsError, match="z cannot be written.*full"), new(tmp_path / "z"):
        raise OSError(28, "full")
    assert (tmp_path / "x").read_bytes() == b"mine"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
