"""`config.json` of a Hugging Face model directory <-> `DecoderConfig`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from affectgpt_jax.models.decoder import DecoderConfig, Llama3RopeScaling

MODEL_TYPES = ("qwen2", "llama", "qwen3")


def from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the contents of a `config.json` of type qwen2, llama or qwen3.

    Both spellings of the rotary base are read: `rope_theta`, and `rope_parameters` as
    transformers 5 writes it.

    Raises:
        ValueError: another architecture, a variation that this code does not compute, or a
            missing or impossible value; the message names the key.
    """
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise ValueError(f"model_type is {kind!r}; expected one of {MODEL_TYPES}")
    rope_theta, rope_scaling = _read_rope(config)
    heads, hidden_size = config.get("num_attention_heads"), config.get("hidden_size")
    head_dim = config.get("head_dim")
    if not head_dim:
        if kind == "qwen3":
            head_dim = 128  # what Qwen3 means by leaving it out
        elif isinstance(heads, int) and isinstance(hidden_size, int) and heads > 0:
            head_dim = hidden_size // heads
    attention_bias = bool(config.get("attention_bias"))
    values = {
        "tie_word_embeddings": False,
        **config,
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "rope_theta": rope_theta,
        # Qwen2 has biases without a key that says so; elsewhere the key speaks of all four.
        "qkv_bias": attention_bias or kind == "qwen2",
        "o_bias": attention_bias and kind != "qwen2",
        "qk_norm": kind == "qwen3",
    }
    names = [f.name for f in dataclasses.fields(DecoderConfig) if f.name != "rope_scaling"]
    _require(values, names)
    for name in names:
        _check(name, values[name], type(getattr(DecoderConfig, name)))
    _refuse_variations(config)
    return DecoderConfig(**{name: values[name] for name in names}, rope_scaling=rope_scaling)


def _require(values: Mapping[str, Any], names: list[str], where: str = "") -> None:
    missing = [name for name in names if values.get(name) is None]
    if missing:
        raise ValueError(f"no value for {', '.join(missing)}{where}")


def _check(name: str, value: Any, kind: type) -> None:
    expected = {
        bool: "true or false",
        int: "a whole number of 1 or more",
        float: "a positive number",
    }[kind]
    if kind is bool:
        fits = isinstance(value, bool)
    else:
        fits = type(value) in (int, kind) and 0 < value < float("inf")
    if not fits:
        raise ValueError(f"{name} is {value!r}; expected {expected}")


def _refuse_variations(config: Mapping[str, Any]) -> None:
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        raise ValueError(
            f"quantization_config is set (quant_method {method!r}); quantized weights are not "
            "supported, name the unquantized release of the model"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act is {config['hidden_act']!r}; expected 'silu'")
    if config.get("mlp_bias"):
        raise ValueError("mlp_bias is true; feed-forward layers with a bias are not supported")
    windows = set(config.get("layer_types") or ()) - {"full_attention"}
    if windows:
        raise ValueError(f"layer_types names {sorted(windows)}; only full_attention is supported")
    # Without the list of types, a window holds from layer max_window_layers on.
    if (
        config.get("use_sliding_window")
        and config.get("sliding_window") is not None
        and not config.get("layer_types")
        and (config.get("max_window_layers") or 0) < config["num_hidden_layers"]
    ):
        raise ValueError(
            "use_sliding_window is true, and max_window_layers leaves layers with a window of "
            f"{config['sliding_window']}; only full attention is supported"
        )


def _read_rope(config: Mapping[str, Any]) -> tuple[float | None, Llama3RopeScaling | None]:
    """Base (None where the file has none) and scaling of the rotary positions."""
    given = [config[key] for key in ("rope_parameters", "rope_scaling") if config.get(key)]
    rope = given[0] if given else {}
    if given.count(rope) < len(given) or not isinstance(rope, Mapping):
        raise ValueError(f"the rotary positions are {given}; expected one JSON object")
    thetas = {x for x in (config.get("rope_theta"), rope.get("rope_theta")) if x is not None}
    if len(thetas) > 1:
        raise ValueError(
            f"rope_theta is {config['rope_theta']}, but rope_parameters has {rope['rope_theta']}"
        )
    # Llama's first files were written before the base was a key.
    theta = thetas.pop() if thetas else 1e4 if config["model_type"] == "llama" else None
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor")
    if partial not in (None, 1):
        raise ValueError(f"partial_rotary_factor is {partial}; only whole heads are rotated")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"the rotary positions are of type {kind!r}; expected default or llama3")
    values, length = dict(rope), "original_max_position_embeddings"
    if values.get(length) is None:
        values[length] = config.get("max_position_embeddings")
    names = [field.name for field in dataclasses.fields(Llama3RopeScaling)]
    _require(values, names, " of the llama3 rotary positions")
    for name in names:
        _check(name, values[name], float)
    if values["low_freq_factor"] >= values["high_freq_factor"]:
        raise ValueError(
            f"low_freq_factor is {values['low_freq_factor']}; expected less than "
            f"high_freq_factor, {values['high_freq_factor']}"
        )
    return theta, Llama3RopeScaling(**{name: values[name] for name in names})


def to_hf(config: DecoderConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` of a model whose weights are stored as `dtype`.

    `rope_theta`, `rope_scaling` and `torch_dtype` are the spelling that every version of
    transformers reads.

    Raises:
        ValueError: biases that no model type has.
    """
    values = dataclasses.asdict(config)
    biases = values.pop("qkv_bias"), values.pop("o_bias")
    if values.pop("qk_norm"):
        kind, name = "qwen3", "Qwen3ForCausalLM"
    elif biases == (True, False):
        kind, name = "qwen2", "Qwen2ForCausalLM"
    else:
        kind, name = "llama", "LlamaForCausalLM"
    if kind == "qwen2":
        rest: dict[str, Any] = {"use_sliding_window": False}
    elif biases[0] == biases[1]:
        rest = {"attention_bias": biases[0]}
    else:
        raise ValueError(
            f"qkv_bias {biases[0]} with o_bias {biases[1]} is a choice that {kind} does not have"
        )
    if values["rope_scaling"] is None:
        del values["rope_scaling"]
    else:
        values["rope_scaling"]["rope_type"] = "llama3"
    return {
        "architectures": [name],
        "model_type": kind,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        **rest,
        "torch_dtype": dtype,
        **values,
    }
