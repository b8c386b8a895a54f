"""A run's config comes back from its workdir as it was; what commands that ask runs share."""

import runpy
import sys

import pytest

from affectgpt_jax import cpu, evaluate, predict, runtime
from affectgpt_jax.config import find_config, parse_command_line, save_config, shipped_configs
from affectgpt_jax.restore import RunError, load_config
from affectgpt_jax.training import checkpoints, xla_options


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_config_is_read_back_as_it_was(name, tmp_path):
    config, _ = parse_command_line([f"--config={find_config(name)}"])
    save_config(config, tmp_path)
    assert load_config(tmp_path).to_dict() == config.to_dict()
    assert isinstance(load_config(tmp_path).lora.targets, tuple)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "\xff", "[" * 100_000])
def test_a_damaged_config_is_refused_by_its_path(text, tmp_path):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(RunError, match=r"config.json(: |, line 1: )"):
        load_config(tmp_path)


@pytest.mark.filterwarnings("ignore:'affectgpt_jax.*' found in sys.modules")
@pytest.mark.parametrize("command", [evaluate, predict])
def test_programs_are_kept_and_a_process_of_its_own_keeps_its_memory(
    command, tmp_path, monkeypatch
):
    called = []
    for module, name in (
        (cpu, "keep_freed_memory"),
        (runtime, "use_compilation_cache"),
        (xla_options, "reserve_gpu_memory"),
    ):
        monkeypatch.setattr(module, name, lambda name=name: called.append(name))
    monkeypatch.setattr(checkpoints, "silence_threads", lambda: None)
    monkeypatch.setattr(sys, "argv", [command.__name__, f"--workdir={tmp_path}"])
    with pytest.raises(SystemExit, match="holds no run"):
        command.main()
    assert called == ["use_compilation_cache", "reserve_gpu_memory"]
    called.clear()
    with pytest.raises(SystemExit, match="holds no run"):
        runpy.run_module(command.__name__, run_name="__main__")
    assert called == ["keep_freed_memory", "use_compilation_cache", "reserve_gpu_memory"]
