"""Ceilings of predictors that know the posterior, against brute force; the table."""

import json
import shutil

import numpy as np
import pytest

from affectgpt_jax.config import SECTIONS, apply_overrides
from affectgpt_jax.configs import demo as demo_config
from affectgpt_jax.data import demo
from affectgpt_jax.evaluation.lexicon import load_lexicon
from affectgpt_jax.evaluation.metrics import score_fine
from benchmarks import beyond


@pytest.fixture(scope="module")
def found():
    return beyond.ceilings(0, 256)


def test_the_lists_that_a_clip_may_have_are_drawn_as_the_world_does():
    lists, given = beyond.label_lists()
    np.testing.assert_allclose(given.sum(axis=1), 1)
    emotion = np.repeat(np.arange(24), 2000)
    drawn = demo._label_lists(np.random.default_rng(0), emotion)
    shares = np.zeros_like(given)
    for number, labels in zip(emotion, drawn, strict=True):
        shares[number, lists.index(labels)] += 1 / 2000
    assert np.abs(shares - given).max() < 0.05


def test_a_better_predictor_of_the_posterior_scores_more(found):
    reward = {name: scores["sampled_reward"] for name, scores in found.items()}
    ordered = ["samples of the true distribution", "the most probable list", "the best word"]
    assert [reward[name] for name in ordered] == sorted(reward[name] for name in ordered)
    assert reward["the best set"] > reward["the best word"] + 0.005
    for_all = found["the best sets for F of all clips"]
    assert for_all["f"] > found["the best set"]["f"] > for_all["sampled_reward"]
    assert found["the best word"]["labels"] == 1 < found["the best set"]["labels"] < 2
    assert found["samples of the true distribution"]["labels"] == pytest.approx(1.3, abs=0.01)


def test_an_expectation_is_what_the_benchmark_finds_on_average(found):
    """The most probable word against lists drawn from the posterior, by `score_fine`."""
    rng = np.random.default_rng(0)
    lists, given = beyond.label_lists()
    evidence = demo.World(0).evidence("test", 256)
    seen = demo.seen_by(demo.INPUT_MODES["multi_audio_face_text"])
    belief = demo.posterior(evidence, seen) @ given
    answers = [lists[i] for i in belief.argmax(axis=1)]
    truth = []
    for _ in range(40):
        truth += [lists[rng.choice(len(lists), p=p)] for p in belief]
    score = score_fine(answers * 40, truth, load_lexicon())
    expected = found["the most probable list"]
    for ours, theirs in (("f", "f"), ("p", "p"), ("r", "r")):
        assert expected[ours] == pytest.approx(score.values[theirs], abs=0.01)


@pytest.mark.parametrize("name", beyond.VARIANTS)
def test_the_keys_of_every_variant_are_there(name):
    command, changes = beyond.VARIANTS[name]
    section = "rl" if command == "reinforce" else "dpo"
    config = demo_config.get_config()
    config[section] = SECTIONS[section]()
    assert apply_overrides(config, [f"--config.{change}" for change in changes]) == []


def test_runs_that_are_there_are_not_run_again_and_stand_in_the_table(tmp_path, monkeypatch):
    side = {"sampled_reward": 0.7, "greedy_f": 0.79, "greedy_p": 0.8, "greedy_r": 0.78}
    side |= {"consensus_f": 0.81, "labels_per_clip": 1.0}
    side |= {"consensus_over_greedy_f": 0.02, "consensus_over_greedy_f_interval": [0.01, 0.03]}
    gains = {f"{k}_gain": 0.01 for k in ("sampled_reward", "greedy_f", "consensus_f")}
    gains |= {f"{key}_interval": [-0.02, 0.04] for key in list(gains)}
    for name in ("world0/sft", "world0/best-of-4", "world0/GRPO-wheel-F"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        facts = {"before": side, "after": side, "steps": 5, "clips": 8, "ended_by": "steps"} | gains
        if name.endswith("best-of-4"):
            facts |= {"steps": 3, "ended_by": "stop_kl"}
        (folder / "result.json").write_text(json.dumps(facts))
    monkeypatch.setattr(beyond, "ceilings", lambda world, clips: {"the best set": {"f": 0.83}})
    monkeypatch.setattr("sys.executable", "/bin/false")
    out = tmp_path / "beyond.json"
    flags = ["--steps=5", "--clips=8", f"--workdir={tmp_path}", f"--out={out}"]
    known = ["--worlds", "0", "--variants", "best of 4", "GRPO, wheel F"]
    lines = beyond.table(beyond.run(beyond.COMMAND.parse([*flags, *known]))).splitlines()
    assert lines[0] == "World 0, 8 held-out clips:"
    assert any(line.startswith("| supervised |  | 0.700 |  | 0.790") for line in lines)
    assert any(line.startswith("| GRPO, wheel F | 5 | 0.700 |") for line in lines)
    [ended] = [line for line in lines if line.startswith("| best of 4 | 3, ended by KL |")]
    assert "+0.010 (-0.020 to +0.040)" in ended
    assert lines[-1] == "Supervised, consensus F over greedy F: +0.020 (+0.010 to +0.030)."
    assert any("*the best set*" in line and "0.830" in line for line in lines)
    # What the file has stays, whatever fails behind it.
    shutil.rmtree(tmp_path / "world0" / "best-of-4")
    args = beyond.COMMAND.parse([*flags, "--add", "--worlds", "0", "1"])
    assert beyond.cells(args)[:3] == [
        (0, "GRPO, wheel F"),
        (1, "GRPO, wheel F"),
        (0, "GRPO, corpus F"),
    ]
    with pytest.raises(beyond.RunError, match="world1/sft: train ended with status 1"):
        beyond.run(args)
    assert sorted(json.loads(out.read_text())["worlds"][0]["runs"]) == [
        "GRPO, wheel F",
        "best of 4",
    ]
    with pytest.raises(beyond.RunError, match="has runs of clips=8; ask for the same"):
        beyond.run(beyond.COMMAND.parse([*flags, "--add", "--clips=9"]))


@pytest.mark.parametrize("changed", [{"steps": 4}, {"clips": 7}])
def test_a_run_of_other_sizes_is_refused(tmp_path, changed):
    for name, facts in (("sft", {}), ("best-of-4", {"steps": 5, "clips": 8} | changed)):
        folder = tmp_path / "world0" / name
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(facts))
    flags = ["--steps=5", "--clips=8", f"--workdir={tmp_path}", f"--out={tmp_path / 'out.json'}"]
    args = beyond.COMMAND.parse([*flags, "--worlds", "0", "--variants", "best of 4"])
    with pytest.raises(beyond.RunError, match="not of --steps=5 and --clips=8; ask for the same"):
        beyond.go_on(args, 0, "best of 4")


def test_a_run_of_other_flags_is_not_taken_for_what_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/true")  # leaves no result
    with pytest.raises(beyond.RunError, match="ended with status 0"):
        beyond.start("reinforce", tmp_path / "run", ["--config.rl.beta=0.1"])
    (tmp_path / "run" / "result.json").write_text("{}")
    assert beyond.start("reinforce", tmp_path / "run", ["--config.rl.beta=0.1"]) == {}
    with pytest.raises(beyond.RunError, match=r"other flags \(--config.rl.beta=0.1, --config.rl"):
        beyond.start("reinforce", tmp_path / "run", ["--config.rl.beta=0.2"])
