"""What the paper's recipe trains on Qwen2.5-7B, parameter by parameter, from shapes alone."""

import jax
import pytest

from affectgpt_jax import build
from affectgpt_jax.common.trees import parameter_count
from affectgpt_jax.configs import affectgpt_qwen25_7b
from affectgpt_jax.data.modalities import INPUT_MODES
from affectgpt_jax.models.affectgpt import init_random_base, init_trainable
from affectgpt_jax.models.decoder import PUBLISHED

LLM = PUBLISHED["Qwen2.5-7B-Instruct"]
VIDEO, AUDIO, IMAGE, COMMON, OUT = 768, 1024, 768, 1024, 3584


def linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def attention_head(width: int) -> int:
    return linear(width, 1) + linear(width, OUT)


def qformer_head(width: int, queries: int, positions: int) -> int:
    """A 2-layer BERT-base Q-Former over features of `width`, between positions and projection."""
    norm = 2 * 768
    self_attention = 4 * linear(768, 768)
    cross_attention = 2 * linear(768, 768) + 2 * linear(width, 768)
    feed_forward = linear(768, 3072) + linear(3072, 768)
    layer = self_attention + cross_attention + feed_forward + 3 * norm
    return positions * width + queries * 768 + norm + 2 * layer + linear(768, OUT)


COMMON_WIDTH = linear(VIDEO, COMMON) + linear(AUDIO, COMMON)
# Two weights from both vectors side by side; one vector, their weighted sum, is projected.
WEIGHTED_SUM = linear(2 * COMMON, COMMON) + linear(COMMON, 2) + linear(COMMON, OUT)
HEADS = {
    "attention": {
        "video": attention_head(VIDEO),
        "audio": attention_head(AUDIO),
        "image": linear(IMAGE, OUT),
        "multi": COMMON_WIDTH + WEIGHTED_SUM,
    },
    "qformer": {
        "video": qformer_head(VIDEO, queries=32, positions=32),
        "audio": qformer_head(AUDIO, queries=8, positions=8),
        "image": qformer_head(IMAGE, queries=32, positions=257),
        "multi": COMMON_WIDTH + qformer_head(COMMON, queries=16, positions=264),
    },
}
MODULES = {"multi_frame": "multi", "face": "video", "frame": "video"}


def trained(**changes) -> dict:
    """Parameters of every trained module of the recipe with these keys changed."""
    config = affectgpt_qwen25_7b.get_config()
    config.update_from_flattened_dict(changes)
    model = build.model(config, LLM)
    shapes = jax.eval_shape(lambda key: init_trainable(model, key), jax.random.key(0))
    base = jax.eval_shape(lambda key: init_random_base(model, key), jax.random.key(0))
    assert parameter_count(base) == 7_615_616_512
    return {
        **{name: parameter_count(module) for name, module in shapes["fusion"].items()},
        "lora": parameter_count(shapes["lora"]),
    }


@pytest.mark.parametrize("mode", INPUT_MODES)
def test_an_input_mode_trains_its_own_heads_and_no_other(mode):
    used = {MODULES.get(slot, slot) for slot in INPUT_MODES[mode].slots}
    expected = {name: HEADS["attention"][name] for name in used} | {"lora": 40_370_176}
    assert trained(input=mode) == expected


def test_the_default_recipe_trains_54_million_parameters():
    assert sum(trained().values()) == 40_370_176 + 14_042_372


@pytest.mark.parametrize("mode", ["multi_audio_face_text", "image"])
def test_qformers_have_the_parameters_of_bert_base_with_two_layers(mode):
    found = trained(
        **{
            "projectors.video": "qformer",
            "projectors.audio": "qformer",
            "projectors.image": "qformer",
        },
        fusion="qformer",
        input=mode,
    )
    used = {MODULES.get(slot, slot) for slot in INPUT_MODES[mode].slots}
    assert found == {name: HEADS["qformer"][name] for name in used} | {"lora": 40_370_176}


def test_without_pre_fusion_its_module_is_not_trained():
    assert set(trained(fusion="none")) == {"video", "audio", "lora"}
