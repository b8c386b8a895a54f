"""A run's config comes back from its workdir as it was."""

import pytest

from affectgpt_jax.config import check_same_run, find_config, parse_command_line, shipped_configs
from affectgpt_jax.run import RunError, load_config


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_config_is_read_back_as_it_was(name, tmp_path):
    config, _ = parse_command_line([f"--config={find_config(name)}"], "")
    check_same_run(config, tmp_path)
    assert load_config(tmp_path).to_dict() == config.to_dict()
    assert isinstance(load_config(tmp_path).lora.targets, tuple)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "\xff"])
def test_a_damaged_config_is_refused_by_its_path(text, tmp_path):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(RunError, match="config.json cannot be read"):
        load_config(tmp_path)
