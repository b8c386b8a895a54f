"""Plans beside measurements: the estimate is made anew, and what is missing is one sentence."""

import json

import pytest

from affectgpt_jax.models.decoder import PUBLISHED
from affectgpt_jax.training import devices
from benchmarks import prediction, train_step, workloads

GIB = 2**30
ANCHOR = ["--workload=anchor", "--scale=tiny", "--steps=1", "--block=1", "--warmup=1"]


@pytest.fixture
def measured(sides_here, tmp_path):
    """A measurement of the tiny anchor on this CPU."""
    out = tmp_path / "train_step_anchor_tiny.json"
    train_step.COMMAND.main([*ANCHOR, f"--records={tmp_path}", f"--out={out}"])
    return out


def test_a_cpus_estimate_stands_beside_the_program_that_ran(measured, tmp_path, capsys):
    compiled, out = tmp_path / "plan.json", tmp_path / "prediction.json"
    compiled.write_text(json.dumps({"compiled": {"peak_gib": 1.5, "floor_ms": 250.0}}))
    words = [f"--measured={measured}", f"--compiled={compiled}", f"--records={tmp_path}"]
    prediction.COMMAND.main(["--scale=tiny", *words, f"--out={out}"])
    found = json.loads(out.read_text())
    side = json.loads(measured.read_text())["sides"]["jax"]
    memory = found["memory"]
    assert memory["program"] == side["program_bytes"] and memory["device"] is None
    assert memory["compiled"] == 1.5 * GIB
    # Layers of 32 places are so small that what XLA keeps beside them counts.
    assert 0.3 < memory["estimate"]["total"] / memory["program"] < 3
    assert memory["estimate"]["base"] == side["base_bytes"]
    assert found["seconds"] == {
        "floor": None,
        "expected": None,
        "compiled_floor": 0.25,
        "measured": side["median_s"],
    }
    assert str(tmp_path) not in found["environment"]["command"]
    what = f"anchor, tiny, float32, remat none, {found['environment']['device']}"
    assert f"| {what} | peak memory |" in capsys.readouterr().out


def test_a_gpus_estimate_is_the_planners(monkeypatch):
    monkeypatch.setitem(PUBLISHED, "Qwen2.5-7B-Instruct", workloads.TINY)
    monkeypatch.setattr("affectgpt_jax.build.base_config", lambda name: PUBLISHED[name])
    workload = workloads.make("anchor", "tiny", dtype="bfloat16")
    wide, narrow = (
        prediction.estimate(workload, None, kind, "none")
        for kind in ("NVIDIA H200", "NVIDIA H100 80GB HBM3")
    )
    assert wide["memory"] == narrow["memory"] and sum(wide["memory"].values()) > 0
    # What so small a model takes is the time to move its weights.
    speeds = [devices.DEVICES[name].hbm for name in ("h200-141g", "h100-80g")]
    assert narrow["floor_s"] / wide["floor_s"] == pytest.approx(speeds[0] / speeds[1])
    assert wide["expected_s"] > wide["floor_s"] > 0


def test_files_that_say_nothing_are_refused(tmp_path):
    empty = tmp_path / "empty.json"
    empty.write_text("{}")
    with pytest.raises(SystemExit, match=r"error: .*empty.json does not say how much memory"):
        prediction.COMMAND.main([f"--measured={empty}"])
    with pytest.raises(prediction.PredictionError, match="holds no compiled program; write it"):
        prediction.compiled_report(empty)
    with pytest.raises(SystemExit, match="error: .*nowhere.json"):
        prediction.COMMAND.main([f"--measured={tmp_path / 'nowhere.json'}"])
