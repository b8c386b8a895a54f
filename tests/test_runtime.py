"""What a process is set up with: whose word on the cache counts, and that memory stays."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from affectgpt_jax import runtime, train
from affectgpt_jax.training import checkpoints


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


@pytest.mark.filterwarnings("ignore:'affectgpt_jax.train' found in sys.modules")
def test_only_a_process_of_its_own_sets_up_malloc(monkeypatch):
    kept = []
    monkeypatch.setattr(runtime, "keep_freed_memory", lambda: kept.append(True))
    monkeypatch.setattr(checkpoints, "silence_threads", lambda: None)
    monkeypatch.setattr(sys, "argv", ["train", "--config.no_such_key=1"])
    for start in (train.main, lambda: runpy.run_module(train.__name__, run_name="__main__")):
        assert not kept
        with pytest.raises(SystemExit, match="no_such_key"):
            start()
    assert kept == [True]


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


# Its temporaries, 64 MiB, are too large for malloc to keep of its own accord.
_FAULTS = """
import resource, jax, jax.numpy as jnp
from affectgpt_jax import runtime
if {keep}:
    assert runtime.keep_freed_memory()
run = jax.jit(lambda x: jnp.cumsum(jnp.outer(x, x), axis=0)[::-1].sum())
x = jnp.arange(4096.0)
for _ in range(3):
    run(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
run(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the settings are glibc's")
def test_temporaries_are_not_cleared_anew_at_every_call():
    def page_faults(keep):
        # One thread, so that none allocates between two calls.
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "NPROC": "1"}
        code = _FAULTS.format(keep=keep)
        return int(subprocess.check_output([sys.executable, "-c", code], env=env, text=True))

    assert page_faults(keep=False) > 64 * 2**20 // 2**16  # at least one a page of 64 KiB
    assert page_faults(keep=True) < 64


_MORE_THAN_2_GIB = """
import resource
import numpy as np
from affectgpt_jax import runtime
assert runtime.keep_freed_memory()
np.ones(5 * 2**26)  # 2.5 GiB, freed at once
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(5 * 2**26)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the settings are glibc's")
def test_what_is_larger_than_glibcs_largest_threshold_is_kept_too():
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    code = [sys.executable, "-c", _MORE_THAN_2_GIB]
    # Given back, there would be a fault for each page of at most 2 MiB: 1,280.
    assert int(subprocess.check_output(code, env=env, text=True)) < 64


@pytest.mark.parametrize("platforms", ["cuda", "cuda,cpu", "tpu"])
def test_where_there_may_be_an_accelerator_malloc_stays_as_it_is(platforms, monkeypatch):
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", platforms)
    try:
        assert not runtime.keep_freed_memory()
    finally:
        jax.config.update("jax_platforms", before)
