"""The config of a run that goes on from another one."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from affectgpt_jax.config import SECTIONS, ConfigError
from affectgpt_jax.configs import affectgpt_qwen25_7b as paper
from affectgpt_jax.post_training import check_questions, config_from, finish

# Flags without effect, by section, and a value of each.
UNREAD = {
    "batch_size": 8,
    "pack_length": 4096,
    "too_long": "drop",
    "init_from": "elsewhere",
    "SECTION.start": "elsewhere",
    "SECTION.start_step": 3,
    "SECTION.start_sha256": "f" * 64,
    "SECTION.lexicon_sha256": "f" * 64,
}
OF_PAIRS = {"data.val": "elsewhere", "data.val_share": 0.5}
# What no update reads, but commands that ask the run afterwards do.
KEPT = {
    "label": "ovlabel",
    "num_buckets": 2,
    "attention": "xla",
    "generate.batch_size": 4,
    "generate.max_new_tokens": 9,
    "generate.merge_lora": "true",
}


@pytest.mark.parametrize("section", SECTIONS)
def test_flags_without_effect_are_refused_by_name_and_others_are_taken(section):
    unread = UNREAD | (OF_PAIRS if section == "dpo" else {})
    for key, value in unread.items():
        key = key.replace("SECTION", section)
        with pytest.raises(ConfigError, match=f"^config.{key} cannot be set here: "):
            config_from(paper.get_config(), section, [f"--config.{key}={value}"])
    taken = KEPT | ({} if section == "dpo" else OF_PAIRS) | {"seed": 3, "max_tokens": 2000}
    config = config_from(
        paper.get_config(), section, [f"--config.{key}={value}" for key, value in taken.items()]
    )
    for key, value in taken.items():
        *parents, last = key.split(".")
        place = config
        for parent in parents:
            place = place[parent]
        assert place[last] == value, key


def test_the_score_after_stands_at_the_step_that_has_it():
    written = []
    session = SimpleNamespace(
        writer=SimpleNamespace(write=lambda *line: written.append(line)),
        clock=SimpleNamespace(report=dict),
        group=SimpleNamespace(is_main_process=False),
        workdir=Path(),
        draw=lambda *_: None,
        progress=SimpleNamespace(close=lambda: None),
    )
    scores = {"sampled_reward": 0.5, "greedy_f": 0.5}
    result = {"before": scores, "after": scores, "steps": 9, "best_step": 3}
    finish(session, result, {})
    assert written == [(3, {"test/sampled_reward": 0.5})]


def test_questions_that_the_start_was_not_trained_on_are_refused_by_their_key():
    start = paper.get_config()
    start.label = "ovlabel"
    config = config_from(start, "dpo", ["--config.dpo.source=samples"])
    check_questions(config, "dpo", start, Path("run"))
    config.dpo.source = "records"  # of which two descriptions are compared
    with pytest.raises(ConfigError, match="^run was trained on ovlabel, but not on descriptions"):
        check_questions(config, "dpo", start, Path("run"))
    start.label = "description"
    check_questions(config, "dpo", start, Path("run"))
    start.data.mixture.faces = paper.data_set("elsewhere", label="onehot")
    for section, keys in (("rl", []), ("dpo", ["--config.dpo.source=samples"])):
        config = config_from(start, section, keys)
        with pytest.raises(
            ConfigError, match=f"was trained on onehot, but not on config.{section}"
        ):
            check_questions(config, section, start, Path("run"))
