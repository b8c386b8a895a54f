"""Compiler options of the train step: what is set, what the user may say, what XLA refuses."""

import functools
import os

import jax
import pytest

from affectgpt_jax import build, program
from affectgpt_jax.config import ConfigError
from affectgpt_jax.configs import demo
from affectgpt_jax.data.packing import Bucket
from affectgpt_jax.data.pipeline import empty_batch
from affectgpt_jax.models.attention import causal
from affectgpt_jax.training import sharding, xla_options
from affectgpt_jax.training.xla_options import (
    CPU_OPTIONS,
    GPU_OPTIONS,
    XlaOptionError,
    compiler_options,
)

SCHEDULER = "xla_gpu_enable_latency_hiding_scheduler"


def accepts(name, value):
    return ""


def test_the_installed_xla_knows_every_option_of_the_table():
    for option in GPU_OPTIONS:
        assert xla_options.refusal_by_xla(option.name, option.value) == "", option.name


def test_an_option_that_xla_does_not_know_is_refused_and_not_fatal():
    assert "xla_gpu_no_such_thing" in xla_options.refusal_by_xla("xla_gpu_no_such_thing", True)
    assert "not a valid" in xla_options.refusal_by_xla("xla_gpu_autotune_level", "high")


@pytest.mark.parametrize("platform", ["cpu", "rocm"])
def test_nothing_is_set_where_the_table_has_nothing_for_it(platform):
    assert compiler_options(platform, 8, {}, "", accepts) == ({}, [])


def test_one_gpu_gets_what_does_not_concern_others():
    options, _ = compiler_options("cuda", 1, {}, "", accepts)
    assert options == {option.name: option.value for option in GPU_OPTIONS if option.devices == 1}
    assert options and SCHEDULER not in options


def test_a_cpu_gets_its_option_where_something_is_computed_again():
    options, lines = compiler_options("cpu", 1, {}, "", accepts, recomputing=True)
    assert options == {option.name: option.value for option in CPU_OPTIONS} and len(lines) == 1
    assert not xla_options.refusal_by_xla(*options.popitem())


def test_several_gpus_get_the_table_with_a_reason_each():
    options, lines = compiler_options("cuda", 2, {}, "", accepts)
    assert options == {option.name: option.value for option in GPU_OPTIONS}
    assert all(f"{o.name}={o.value}: {o.reason}" in lines for o in GPU_OPTIONS)


def test_the_user_overrides_the_table_by_config_and_by_environment():
    options, lines = compiler_options("cuda", 8, {SCHEDULER: False}, "", accepts)
    assert options[SCHEDULER] is False and lines[0] == f"{SCHEDULER}=False: as asked for"
    assert SCHEDULER not in compiler_options("cuda", 8, {}, f"--{SCHEDULER}=false", accepts)[0]


def test_an_option_of_the_table_that_xla_has_dropped_is_left_out_and_said():
    options, lines = compiler_options("cuda", 8, {}, "", lambda name, value: "no such option")
    assert not options
    assert f"{SCHEDULER} left out: XLA refuses it (no such option)" in lines


def test_options_are_read_from_one_line():
    text = "xla_gpu_autotune_level=2  --xla_gpu_enable_triton_gemm=False xla_dump_to=/tmp/a=b,c"
    assert xla_options.parse(text) == {
        "xla_gpu_autotune_level": "2",
        "xla_gpu_enable_triton_gemm": False,
        "xla_dump_to": "/tmp/a=b,c",
    }
    assert xla_options.parse("") == {}


@pytest.mark.parametrize(
    "text,message",
    [
        ("xla_gpu_autotune_level", "'xla_gpu_autotune_level' is not NAME=VALUE"),
        ("autotune=1", "'autotune=1' is not NAME=VALUE"),
        ("xla_a=1 xla_a=2", "xla_a is named twice"),
    ],
)
def test_another_form_is_refused_with_the_part_that_has_it(text, message):
    with pytest.raises(XlaOptionError, match=message):
        xla_options.parse(text)


def test_one_option_in_two_places_is_refused():
    with pytest.raises(XlaOptionError, match="xla_a is also set in XLA_FLAGS"):
        compiler_options("cpu", 1, {"xla_a": "1"}, "--xla_b=0 --xla_a=2", accepts)


def test_an_unknown_option_of_the_config_is_one_sentence_that_names_the_key():
    config = demo.get_config()
    config.xla_options = "xla_gpu_no_such_thing=1"
    with pytest.raises(ConfigError, match="^config.xla_options: XLA refuses xla_gpu_no_such_thing"):
        program.compiler_options(config, print)


def test_the_train_step_is_compiled_with_the_options():
    config = demo.get_config()
    config.input = "text"
    made = program.make_program(
        config,
        sharding.make_mesh("data:-1"),
        {16: empty_batch(config.batch_size, Bucket(16, 4), {})},
        llm=build.base_config("tiny"),
        attend=causal,
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_thing"):
        made.compile({"xla_no_such_thing": True})


def test_gpu_memory_is_reserved_unless_the_environment_says_how(monkeypatch):
    for name in xla_options._MEMORY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    xla_options.reserve_gpu_memory()
    assert os.environ["XLA_CLIENT_MEM_FRACTION"] == "0.9"
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.5")
    xla_options.reserve_gpu_memory()
    assert os.environ["XLA_CLIENT_MEM_FRACTION"] == "0.5"


def test_memory_reserved_by_the_older_name_is_left_alone(monkeypatch):
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")  # JAX refuses both at once
    xla_options.reserve_gpu_memory()
    assert "XLA_CLIENT_MEM_FRACTION" not in os.environ


def test_a_gpus_memory_is_reserved_in_words_and_nothing_else_is():
    describe = functools.partial(xla_options.describe_gpu_memory, limit=126 * 2**30)
    assert describe("cpu", environ={}) == ""
    assert "JAX reserves 126.0 GiB of each GPU" in describe("gpu", environ={})
    line = describe("gpu", environ={"XLA_PYTHON_CLIENT_PREALLOCATE": "false"})
    assert "taken as it is needed, up to 126.0 GiB a GPU" in line
    # An allocator without statistics reserves nothing.
    assert xla_options.describe_gpu_memory("gpu", None, {}) == ""
