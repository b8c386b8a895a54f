"""What a process is set up with: JAX's plugins, and where it keeps compiled programs."""

import importlib.util
import io
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

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


PLUGIN = "jax_plugins.xla_cuda12"


def pretend_plugins(monkeypatch, *names):
    entries = [SimpleNamespace(value=name) for name in names]
    monkeypatch.setattr(runtime.importlib.metadata, "entry_points", lambda group: entries)
    monkeypatch.setattr(runtime, "_NVIDIA_FILES", ("/no/such/device",))


def test_a_gpu_compiler_is_alone_without_a_gpu_and_other_plugins(monkeypatch, tmp_path):
    pretend_plugins(monkeypatch, PLUGIN)
    assert runtime.has_gpu_compiler_alone()
    monkeypatch.setattr(runtime, "_NVIDIA_FILES", (str(tmp_path),))
    assert not runtime.has_gpu_compiler_alone()
    for names in ((), (PLUGIN, "jax_plugins.xla_rocm7")):
        pretend_plugins(monkeypatch, *names)
        assert not runtime.has_gpu_compiler_alone()


def test_a_plugin_that_is_left_out_is_never_run(monkeypatch, tmp_path):
    (tmp_path / "jax_plugin_of_a_test.py").write_text("raise AssertionError('it was loaded')")
    monkeypatch.syspath_prepend(tmp_path)
    name = "jax_plugin_of_a_test"
    pretend_plugins(monkeypatch, name)
    monkeypatch.setattr(runtime, "_CUDA_PLUGINS", {name})
    runtime.prepare_plugins()
    try:
        importlib.import_module(name).initialize()
        assert importlib.util.find_spec(name) is not None  # it is installed all the same
    finally:
        del sys.modules[name]


def compiled(what):
    """What is said while a program is compiled anew."""
    stream = io.StringIO()
    with runtime.compiling(what, stream=stream):
        jax.clear_caches()
        jax.jit(lambda x: 5 * x + 2).lower(jax.ShapeDtypeStruct((3,), "f4")).compile()
    return stream.getvalue().splitlines()


def test_a_compilation_says_what_the_cache_had(no_directory, tmp_path, monkeypatch):
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    try:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        compilation_cache.reset_cache()
        for hits in (0, 1):
            start, end = compiled("1 program")
            assert start == "compiling 1 program ..."
            assert end.startswith("compiling 1 program: ")
            assert end.endswith(f" s, {hits} from the cache in {tmp_path}")
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()
        assert compiled("it")[1].endswith("nothing is kept, since JAX's compilation cache is off")
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
        compilation_cache.reset_cache()


@pytest.mark.parametrize(
    ("version", "plugins", "flags", "expected"),
    [
        ((0, 12, 0), {"jax_plugins.xla_cuda13"}, "", "--{}="),
        ((0, 12, 1), {"jax_plugins.xla_cuda12"}, "--xla_a=1", "--xla_a=1 --{}="),
        ((0, 12, 0), {"jax_plugins.xla_cuda13"}, "--{}=ALL_GATHER", "--{}=ALL_GATHER"),
        ((0, 12, 0), {"jax_plugins.xla_rocm7"}, "", ""),
        ((0, 10, 2), {"jax_plugins.xla_cuda12"}, "", ""),  # does not know it
    ],
)
def test_collectives_are_nccls_where_xla_has_kernels_that_it_cannot_compile(
    version, plugins, flags, expected, monkeypatch
):
    name = runtime._OWN_COLLECTIVES
    monkeypatch.setattr(jax, "__version_info__", version)
    monkeypatch.setattr(runtime, "_plugins", lambda: plugins)
    monkeypatch.setattr(runtime, "has_gpu_compiler_alone", lambda: False)
    monkeypatch.setenv("XLA_FLAGS", flags.format(name))
    runtime.prepare_plugins()
    assert os.environ["XLA_FLAGS"] == expected.format(name)
