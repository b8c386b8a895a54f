"""Settings of reinforcement, one at a time: what is compared with what."""

import json

import pytest

from affectgpt_jax.config import SECTIONS, apply_overrides
from affectgpt_jax.configs import demo as demo_config
from affectgpt_jax.data import demo
from affectgpt_jax.data.records import write_records
from benchmarks import settings
from benchmarks.runner import RunError


@pytest.mark.parametrize("name", settings.SETTINGS)
def test_every_setting_differs_from_the_default_in_keys_that_are_there(name):
    config = demo_config.get_config()
    config.rl = SECTIONS["rl"]()
    config.optimizer.learning_rate = 4e-4  # of a demo run that goes on, see post_training
    before = config.to_json()
    assert apply_overrides(config, [f"--config.{key}" for key in settings.SETTINGS[name]]) == []
    assert (config.to_json() == before) == (name == settings.DEFAULT)


def test_answers_about_validation_clips_are_compared_with_those_of_the_default(
    tmp_path, monkeypatch, capsys
):
    home = tmp_path / "world0"
    clips = list(demo.World(0).records("val", 8))
    encoders = dict.fromkeys(demo.DEFAULT_FEATURES, "x")
    write_records(home / "sft" / "data" / "demo-0-val", clips, encoders=encoders)
    (home / "sft" / "result.json").write_text("{}")
    right = [list(clip.labels) for clip in clips]
    gains = {"sampled_reward_gain": 0.05, "sampled_reward_gain_interval": [0.01, 0.09]}
    gains |= {"greedy_f_gain": 0.0, "greedy_f_gain_interval": [-0.01, 0.01]}
    side = {"sampled_reward": 0.7, "greedy_f": 0.8, "consensus_f": 0.8}
    side |= {"sampled_labels_per_clip": 1.25}
    facts = {"before": side, "after": side, "steps": 5, "best_step": 5, "clips": 8} | gains
    # The default knows the first half of the clips, the other setting all.
    half = [labels if i < 4 else ["xyz"] for i, labels in enumerate(right)]
    for folder, answers in (("the-default", half), ("labels-are-free", right)):
        place = home / folder
        place.mkdir()
        (place / "result.json").write_text(json.dumps(facts))
        asked = {"greedy": answers, "samples": [[labels] * 16 for labels in answers]}
        content = {"made_of": "x", "content": asked}
        (place / "answers_step_5.json").write_text(json.dumps(content))
    monkeypatch.setattr("sys.executable", "/bin/false")  # nothing is run
    flags = ["--steps=5", f"--workdir={tmp_path}", f"--out={tmp_path / 'settings.json'}"]
    args = settings.COMMAND.parse([*flags, "--settings", "labels are free"])
    report = settings.run(args)
    default, free = report["rows"]
    assert default["over_default"]["sampled_reward_gain"] == 0
    gain = free["over_default"]
    assert gain["sampled_reward_gain"] == pytest.approx(0.5)
    low, high = gain["sampled_reward_gain_interval"]
    assert 0 < low < 0.5 < high
    lines = settings.table(report).splitlines()
    assert lines[2].startswith("| the default |  | 5 | +0.050 (+0.010 to +0.090) |  | +0.000 (")
    assert "`rl.length_penalty=0.0`" in lines[3] and "+0.500 (" in lines[3]
    assert "8 validation clips, 16 samples of each" in lines[-1]
    with pytest.raises(RunError, match="ended with status 1"):
        settings.run(settings.COMMAND.parse([*flags, "--settings", "two updates of a rollout"]))
