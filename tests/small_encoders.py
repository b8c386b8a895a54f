"""Encoders of the real architectures at small width, with random weights, as directories."""

from pathlib import Path

import transformers

CONVOLUTIONS = {
    "conv_dim": (16,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
# HuBERT-Large's variant of layer norms, where the last one is outside the layers.
LARGE = {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}


def _whisper():
    config = transformers.WhisperConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        vocab_size=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return transformers.WhisperModel(config)


def _dinov2():
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=70, patch_size=14
    )
    return transformers.Dinov2Model(config)


MODELS = {
    "clip": lambda: transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(**SMALL, projection_dim=24, image_size=224, patch_size=32)
    ),
    "siglip": lambda: transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(**SMALL, image_size=64, patch_size=16)
    ),
    "dinov2": _dinov2,
    "hubert": lambda: transformers.HubertModel(
        transformers.HubertConfig(**SMALL, **CONVOLUTIONS, **LARGE)
    ),
    "wavlm": lambda: transformers.WavLMModel(
        transformers.WavLMConfig(**SMALL, **CONVOLUTIONS, **LARGE)
    ),
    "data2vec": lambda: transformers.Data2VecAudioModel(
        transformers.Data2VecAudioConfig(**SMALL, **CONVOLUTIONS | {"num_conv_pos_embeddings": 2})
    ),
    "whisper": _whisper,
}


def save_encoder(architecture: str, folder: Path, seed: int = 0) -> Path:
    """The directory of an encoder; its weights are large enough to tell layers apart."""
    from needs_torch import torch  # here, so that only what makes an encoder is skipped without it

    torch.manual_seed(sum(map(ord, architecture)) + seed)
    model = MODELS[architecture]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Fresh layer norms are the identity, which hides whether one was applied.
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    directory = folder / architecture
    model.save_pretrained(directory)
    return directory
