"""How far a crowd stays below what can be known, and what an epoch of one is on a GPU."""

import pytest

from affectgpt_jax.common.errors import UserError
from affectgpt_jax.training import gpu_compile
from benchmarks import crowd


def test_the_table_has_means_over_worlds():
    names = ("right", "best single member", "mean single member", "exact posterior")
    rows = [
        {"size": size, "world": world, "crowd: its standard error": 0.01}
        | {f"crowd: {name}": 0.7 + 0.02 * world + 0.01 * i for i, name in enumerate(names)}
        for size in (64, 1024)
        for world in (0, 1)
    ]
    lines = crowd.table({"clips": 96, "corpora": 4, "rows": rows}).splitlines()
    assert lines[2] == "| 64 | 2 | 0.710 | 0.720 | 0.730 | 0.740 | 0.030 |"
    assert lines[3].startswith("| 1,024 | 2 | 0.710")
    assert lines[-1].startswith("4 corpora, 96 clips") and "0.010" in lines[-1]


@pytest.mark.slow  # a crowd: a minute
def test_a_crowd_is_measured_against_its_members_and_the_posterior():
    report = crowd.run(crowd.COMMAND.parse(["--seeds", "0", "--sizes", "128", "--clips", "96"]))
    [row] = report["rows"]
    assert (row["size"], row["world"], report["clips"]) == (128, 0, 96)
    # Of 24 words. Nothing but chance is above the posterior, by some errors of 96 clips.
    error = row["crowd: its standard error"]
    assert 0.2 < row["crowd: right"] < row["crowd: exact posterior"] + 3 * error


@pytest.mark.gpu_compile
@pytest.mark.skipif(bool(gpu_compile.unavailable()), reason=gpu_compile.unavailable() or "it can")
def test_an_epoch_on_a_gpu_is_bound_by_its_launches_and_a_hundred_take_a_minute():
    found = crowd.run(crowd.COMMAND.parse(["--compile", "h100-80g"]))
    steps = 32_000 // 32
    assert found["launches"] > 50 * steps
    # Every step reads and writes parameters and both moments of ten members.
    width = 768 + 1024 + 192
    parameters = 10 * 128 * (width + 6 * 128 + 3 * 128 + 2 * 128)
    assert found["moved_gb"] * 1e9 > 6 * 4 * parameters * steps
    assert found["memory_s"] < found["launch_s"]
    assert found["limit_s"] == 100 * found["launch_s"] < 60
    assert "| H100-SXM5-80GB | 40,000, 10 |" in crowd.table(found)


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(gpu_compile, "unavailable", lambda: "pip install it")
    with pytest.raises(UserError, match="pip install it"):
        crowd.run(crowd.COMMAND.parse(["--compile", "h100-80g"]))
