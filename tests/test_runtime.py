"""Where a process keeps compiled programs: JAX's own settings come first."""

from pathlib import Path

import jax
import pytest

from affectgpt_jax import runtime, train


@pytest.fixture
def no_directory():
    """JAX as a user starts it; the tests' own cache is put back afterwards."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_training_keeps_programs_in_the_users_cache_directory(no_directory, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(train, "train", lambda *_: None)
    train.main([f"--workdir={tmp_path / 'run'}"])
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "affectgpt_jax" / "xla")


@pytest.mark.parametrize("value", ["", "relative/path"])
def test_without_an_absolute_xdg_directory_it_is_in_the_home(value, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setenv("HOME", "/home/someone")
    assert runtime.cache_directory() == Path("/home/someone/.cache/affectgpt_jax/xla")


def test_a_directory_that_jax_was_given_stays():
    before = jax.config.jax_compilation_cache_dir
    assert before is not None
    runtime.use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == before
