"""What every trainer does before its work: paths, and what its processes have in common."""

import pytest

from affectgpt_jax import prefer, reinforce
from affectgpt_jax.common.identity import code_identity
from affectgpt_jax.config import ConfigError
from affectgpt_jax.training import distributed


@pytest.mark.parametrize("trainer", [reinforce, prefer], ids=["reinforce", "prefer"])
def test_a_workdir_that_the_libraries_misread_is_refused_first(trainer, trained_run, tmp_path):
    workdir = tmp_path / "a[1]"
    with pytest.raises(SystemExit, match=r"cannot be written below a path with .*\["):
        trainer.main([f"--workdir={workdir}", f"--from={trained_run}"])
    assert not workdir.exists()


@pytest.mark.parametrize("trainer", [reinforce, prefer], ids=["reinforce", "prefer"])
def test_processes_must_have_the_code_in_common(trainer, trained_run, tmp_path, monkeypatch):
    told = []

    def join(launch, facts, timeout_s, say):
        told.append(facts)
        raise ConfigError("enough")

    monkeypatch.setattr(distributed, "join", join)
    with pytest.raises(SystemExit, match="enough"):
        trainer.main([f"--workdir={tmp_path / 'run'}", f"--from={trained_run}"])
    assert told[0]["code"] == str(code_identity())
