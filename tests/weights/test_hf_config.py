"""`config.json`: every spelling that is read, what is written, and what is refused by name."""

import dataclasses
import json

import pytest

from affectgpt_jax.models.decoder import PUBLISHED, DecoderConfig, Llama3RopeScaling
from affectgpt_jax.weights.hf_config import from_hf, to_hf

CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
}
QWEN2 = DecoderConfig(100, 32, 48, 2, 4, 2, head_dim=8, rope_theta=1e4)
LLAMA = dataclasses.replace(QWEN2, qkv_bias=False)
QWEN3 = dataclasses.replace(LLAMA, qk_norm=True, head_dim=128)
ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SCALED = dataclasses.replace(LLAMA, rope_scaling=Llama3RopeScaling(**ROPE))


def config_with(changes):
    """`CONFIG` with these values; None takes a key away."""
    return {key: value for key, value in (CONFIG | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, QWEN2),
        (
            {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            QWEN2,
        ),
        ({"rope_scaling": {"type": "default"}, "head_dim": 8}, QWEN2),
        ({"torch_dtype": "bfloat16"}, QWEN2),
        ({"dtype": "bfloat16"}, QWEN2),
        # As Qwen2.5 is published: a window that no layer uses.
        ({"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 1}, QWEN2),
        ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}, QWEN2),
        ({"use_sliding_window": True, "max_window_layers": 0}, QWEN2),
        ({"layer_types": ["full_attention", "full_attention"]}, QWEN2),
        ({"model_type": "llama"}, LLAMA),
        # As the first Llamas are published.
        ({"model_type": "llama", "rope_theta": None, "pretraining_tp": 1}, LLAMA),
        (
            {"model_type": "llama", "num_key_value_heads": None},
            dataclasses.replace(LLAMA, num_key_value_heads=4),
        ),
        (
            {"model_type": "llama", "attention_bias": True, "mlp_bias": False},
            dataclasses.replace(LLAMA, qkv_bias=True, o_bias=True),
        ),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "llama3", **ROPE}}, SCALED),
        (
            {
                "model_type": "llama",
                "rope_theta": None,
                "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, **ROPE},
            },
            SCALED,
        ),
        (
            {
                "model_type": "llama",
                "max_position_embeddings": 8192,
                "rope_scaling": {"rope_type": "llama3", **ROPE}
                | {"original_max_position_embeddings": None},
            },
            SCALED,
        ),
        ({"model_type": "qwen3"}, QWEN3),
        ({"model_type": "qwen3", "head_dim": 16}, dataclasses.replace(QWEN3, head_dim=16)),
    ],
)
def test_every_spelling_of_a_config_is_read(changes, expected):
    assert from_hf(config_with(changes)) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtral"}, r"'mixtral'; expected one of \('qwen2', 'llama', 'qwen3'\)"),
        ({"model_type": None}, "model_type is None"),
        ({"rope_scaling": {"type": "yarn"}}, "yarn"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "linear"),
        ({"rope_parameters": {"rope_theta": 1e5}}, "rope_theta is 10000.0, but .* 100000.0"),
        (
            {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"type": "yarn"}},
            "expected one JSON object",
        ),
        ({"rope_scaling": "yarn"}, "expected one JSON object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "no value for low_freq_factor, high_freq_factor, original_max_position_embeddings of",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", **ROPE, "factor": 0}},
            "factor is 0; expected a positive number",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", **ROPE, "low_freq_factor": 4.0}},
            "low_freq_factor is 4.0; expected less",
        ),
        ({"use_sliding_window": True, "sliding_window": 64}, "use_sliding_window is true"),
        (
            {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
            "window of 64",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; expected 'silu'"),
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias is true"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "quantization_config is set .*'gptq'",
        ),
        ({"rope_theta": None}, "no value for rope_theta"),
        ({"hidden_size": None}, "no value for hidden_size, head_dim"),
        ({"hidden_size": "32"}, "no value for head_dim|hidden_size is '32'"),
        ({"vocab_size": 0}, "vocab_size is 0; expected a whole number of 1 or more"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'; expected a positive number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; expected true or false"),
        ({"num_key_value_heads": 3}, "num_attention_heads is 4; expected a multiple of .* 3"),
        ({"head_dim": 7}, "head_dim is 7"),
    ],
)
def test_a_config_this_code_cannot_run_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        from_hf(config_with(changes))


@pytest.mark.parametrize(
    "config",
    [
        *PUBLISHED.values(),
        SCALED,
        dataclasses.replace(LLAMA, qkv_bias=True, o_bias=True),
        dataclasses.replace(QWEN3, qkv_bias=True, o_bias=True, tie_word_embeddings=True),
    ],
)
def test_what_is_written_is_read_back(config):
    assert from_hf(json.loads(json.dumps(to_hf(config, "bfloat16")))) == config


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(LLAMA, o_bias=True),
        dataclasses.replace(QWEN3, qkv_bias=True),
    ],
)
def test_biases_that_no_model_type_has_are_not_written(config):
    with pytest.raises(ValueError, match="qkv_bias .* with o_bias"):
        to_hf(config, "float32")


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_reads_what_is_written_as_the_same_model(name):
    transformers = pytest.importorskip("transformers")
    written = to_hf(PUBLISHED[name], "bfloat16")
    config = transformers.AutoConfig.for_model(**written)
    assert from_hf(json.loads(config.to_json_string(use_diff=False))) == PUBLISHED[name]
