"""Encoders beside a direct call of transformers, clip by clip, and what is refused."""

import importlib.util
import json
import os
import re
import shutil

import numpy as np
import pytest
import transformers
from clip_files import HAS_VOICE, face_frames, spoken, tone
from needs_torch import torch
from safetensors.torch import load_file, save_file
from small_encoders import MODELS, save_encoder
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from affectgpt_jax.common.hub import HubError
from data_prep import encoders, media
from data_prep.encoders import ARCHITECTURES, PUBLISHED, Encoder, EncoderError, find_encoder

# float32 sums of a few hundred terms, added up in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
VIDEO = [name for name in MODELS if ARCHITECTURES[name].kind == "video"]
AUDIO = [name for name in MODELS if ARCHITECTURES[name].kind == "audio"]


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    return {name: save_encoder(name, folder) for name in MODELS}


def load(directories, name):
    return Encoder(find_encoder(f"{name}={directories[name]}", ARCHITECTURES[name].kind))


def pixels(clips, size):
    frames = face_frames(8 * clips, seed=3)
    images = np.stack([media.resized(frame, size) for frame in frames])
    return images.reshape(clips, 8, size, size, 3)


def voices(clips):
    """Clips of different length, loudness and offset, which swell towards their end."""
    rng = np.random.default_rng(0)
    waveforms = []
    for i in range(clips):
        sound = tone(0.7 + 2 * i, hertz=150 + 80 * i)[0] * 0.3**i
        sound = sound * np.linspace(0.1, 1, len(sound)) + 0.1 * i
        waveforms.append(sound + 0.01 * rng.normal(size=len(sound)))
    return np.stack([media.windows(waveform.astype(np.float32)) for waveform in waveforms])


def direct_images(name, directory, clips):
    """What transformers makes of the pixels of clips, one after the other: `[B, 8, d]`."""
    model = getattr(transformers, ARCHITECTURES[name].model).from_pretrained(directory).eval()
    size = dict(zip(("height", "width"), clips.shape[2:4]))
    processor = CLIPImageProcessorPil(size=size, crop_size=size)
    features = []
    for clip in clips:
        inputs = processor(images=list(clip), return_tensors="pt")
        with torch.inference_mode():
            outputs = model(**inputs)
        features.append(outputs.image_embeds if name == "clip" else outputs.pooler_output)
    return torch.stack(features).numpy()


def direct_sound(name, directory, clips):
    """What transformers makes of the windows of clips, those of one normalised together."""
    model = getattr(transformers, ARCHITECTURES[name].model).from_pretrained(directory).eval()
    extractor = transformers.Wav2Vec2FeatureExtractor()
    # Each layer as it leaves the model, by hooks: not through what is under test.
    layers = []
    for layer in model.encoder.layers:
        layer.register_forward_hook(
            lambda module, inputs, out: layers.append(out[0] if isinstance(out, tuple) else out)
        )
    features = []
    for clip in clips:
        inputs = extractor(clip.reshape(-1), sampling_rate=16_000, return_tensors="pt")
        layers.clear()
        with torch.inference_mode():
            last = model(inputs.input_values.reshape(8, -1)).last_hidden_state
        features.append(torch.stack([*layers[-4:-1], last]).mean(dim=(0, 2)))
    return torch.stack(features).numpy()


@pytest.mark.parametrize("name", VIDEO)
def test_pixels_become_what_transformers_makes_of_them(name, directories):
    encoder = load(directories, name)
    batch = pixels(3, encoder.image_size)
    expected = direct_images(name, directories[name], batch)
    np.testing.assert_allclose(encoder(batch), expected, **CLOSE)


@pytest.mark.parametrize("name", [name for name in AUDIO if name != "whisper"])
def test_windows_become_what_transformers_makes_of_one_normalised_input(name, directories):
    batch = voices(3)
    expected = direct_sound(name, directories[name], batch)
    np.testing.assert_allclose(load(directories, name)(batch), expected, **CLOSE)


def test_whisper_is_averaged_over_the_window_alone(directories):
    batch = voices(2)
    found = load(directories, "whisper")(batch)
    model = transformers.WhisperModel.from_pretrained(directories["whisper"]).eval()
    extractor = transformers.WhisperFeatureExtractor()
    for clip, features in zip(batch, found, strict=True):
        for window, vector in zip(clip, features, strict=True):
            mel = extractor(window, sampling_rate=16_000, return_tensors="pt").input_features
            with torch.inference_mode():
                states = model.encoder(mel).last_hidden_state[0]
            # 50 positions a second, of which the window fills two.
            np.testing.assert_allclose(vector, states[:100].mean(dim=0).numpy(), **CLOSE)


@pytest.mark.parametrize("name", [*VIDEO, *AUDIO])
def test_a_clip_does_not_depend_on_its_batch_mates(name, directories):
    encoder = load(directories, name)
    batch = pixels(3, encoder.image_size) if name in VIDEO else voices(3)
    alone = encoder.empty(3)
    alone[1] = batch[1]
    np.testing.assert_array_equal(encoder(alone)[1], encoder(batch)[1])


@pytest.mark.parametrize("name", ["clip", "hubert"])
def test_bfloat16_products_are_near_float32_ones(name, directories):
    kind = ARCHITECTURES[name].kind
    place = find_encoder(f"{name}={directories[name]}", kind)
    exact, mixed = Encoder(place), Encoder(place, precision="bfloat16")
    batch = pixels(2, exact.image_size) if kind == "video" else voices(2)
    expected, found = exact(batch), mixed(batch)
    assert found.dtype == np.float32
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 0 < error < 0.05  # 8 bits of mantissa, over a few layers


def test_normalisation_is_over_all_windows_of_a_clip():
    samples = torch.from_numpy(voices(3))
    found = encoders.normalised(samples).numpy().astype(np.float64)
    np.testing.assert_allclose(found.mean(axis=(1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(found.var(axis=(1, 2)), 1, rtol=1e-3)
    assert np.ptp(found.std(axis=2), axis=1).max() > 0.1  # not window by window


def test_a_directory_says_how_its_pixels_are_normalised(directories, tmp_path):
    shutil.copytree(directories["clip"], tmp_path / "clip")
    facts = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "crop_size": {"height": 224}}
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps(facts))
    encoder = Encoder(find_encoder(f"clip={tmp_path / 'clip'}", "video"))
    batch = pixels(1, 224)
    model = transformers.CLIPVisionModelWithProjection.from_pretrained(directories["clip"])
    images = torch.from_numpy((batch[0].transpose(0, 3, 1, 2) / 255 - 0.5) / 0.25).float()
    with torch.inference_mode():
        expected = model.eval()(images).image_embeds
    np.testing.assert_allclose(encoder(batch)[0], expected.numpy(), **CLOSE)


def test_sound_is_not_normalised_where_the_directory_says_so(directories, tmp_path):
    shutil.copytree(directories["wavlm"], tmp_path / "wavlm")
    (tmp_path / "wavlm" / "preprocessor_config.json").write_text('{"do_normalize": false}')
    plain = Encoder(find_encoder(f"wavlm={tmp_path / 'wavlm'}", "audio"))
    batch = voices(2)
    usual = load(directories, "wavlm")
    np.testing.assert_allclose(
        plain(encoders.normalised(torch.from_numpy(batch)).numpy()), usual(batch), **CLOSE
    )
    assert np.abs(plain(batch) - usual(batch)).max() > 1e-3


def test_every_row_of_the_table_is_a_class_of_transformers():
    for published in PUBLISHED.values():
        assert published.architecture in ARCHITECTURES
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", published.repository)
    for architecture in ARCHITECTURES.values():
        assert hasattr(transformers, architecture.model)
        assert architecture.pooling in encoders.POOLING
    # Published widths that the architectures' defaults are known by (the paper: 768 and 1024).
    assert PUBLISHED["clip-vit-l"].width == 768
    assert PUBLISHED["hubert-l"].width == 1024


def test_identity_follows_from_the_weights(directories, tmp_path):
    place = find_encoder(f"clip={directories['clip']}", "video")
    shutil.copytree(directories["clip"], tmp_path / "clip")
    copy = find_encoder(f"clip={tmp_path / 'clip'}", "video")
    assert copy.sha256() == place.sha256()
    weights = tmp_path / "clip" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert copy.sha256() != place.sha256()


def test_what_a_user_gets_wrong_is_one_sentence(directories, tmp_path):
    (tmp_path / "empty").mkdir()
    shutil.copytree(directories["clip"], tmp_path / "torn")
    weights = tmp_path / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    shutil.copytree(directories["clip"], tmp_path / "less")
    weights = tmp_path / "less" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["visual_projection.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    clip, hubert = directories["clip"], directories["hubert"]
    for text, kind, message in [
        ("vgg", "video", "'vgg' is no encoder for video; known are clip-vit-l, "),
        ("hubert-l", "video", "'hubert-l' is no encoder for video"),
        ("clip", "video", "--video clip needs a directory, as in --video clip=DIR"),
        (f"clip={tmp_path / 'empty'}", "video", "empty holds no encoder; expected config.json"),
        (
            f"clip-vit-l={clip}",
            "video",
            f"width 24, clip-vit-l has 768; call it --video clip={clip}",
        ),
        (f"clip={tmp_path / 'torn'}", "video", "torn cannot be loaded as CLIPVision"),
        (f"wavlm={hubert}", "audio", "hubert holds a hubert by its config.json, expected wavlm"),
        (f"clip={tmp_path / 'less'}", "video", r"lacks 1 tensors of CLIP.*'visual_projection.wei"),
    ]:
        with pytest.raises(EncoderError, match=message) as refused:
            Encoder(find_encoder(text, kind))
        assert "\n" not in str(refused.value)


def test_weights_that_are_not_in_the_cache_are_not_downloaded(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for text in ("clip-vit-l", "clip=openai/clip-vit-large-patch14"):
        with pytest.raises(
            HubError, match="^--video clip.*: openai/clip-vit-large-patch14 is"
        ) as no:
            find_encoder(text, "video")
        assert f"it is not whole in the hub's cache ({tmp_path}); pass --download" in str(no.value)
        assert str(no.value).endswith(f"as in --video {text.partition('=')[0]}=DIR")


def test_a_weights_file_with_objects_in_it_is_refused(directories, tmp_path):
    folder = tmp_path / "clip"
    folder.mkdir()
    shutil.copy(directories["clip"] / "config.json", folder)
    torch.save({"a": EncoderError()}, folder / "pytorch_model.bin")
    with pytest.raises(EncoderError, match="cannot be loaded as CLIPVisionModelWithProjection"):
        Encoder(find_encoder(f"clip={folder}", "video"))


@pytest.mark.skipif(not HAS_VOICE, reason="espeak-ng is not installed")
def test_a_voice_and_a_tone_differ(directories, tmp_path):
    speech = media.windows(media.read_waveform(spoken("I am so happy to see you", tmp_path)))
    found = load(directories, "hubert")(np.stack([speech, media.windows(tone(2.0)[0])]))
    assert np.isfinite(found).all()
    assert np.abs(found[0] - found[1]).mean() > 0.01


@pytest.mark.skipif(
    not {"AFFECTGPT_CLIP", "AFFECTGPT_HUBERT"} & set(os.environ),
    reason="AFFECTGPT_CLIP and AFFECTGPT_HUBERT name no directories with published weights",
)
@pytest.mark.parametrize(
    ("variable", "name"), [("AFFECTGPT_CLIP", "clip-vit-l"), ("AFFECTGPT_HUBERT", "hubert-l")]
)
def test_published_weights_give_what_transformers_makes_of_them(variable, name):
    directory = os.environ.get(variable)
    if directory is None:
        pytest.skip(
            "AFFECTGPT_CLIP and AFFECTGPT_HUBERT name no directories with published weights"
        )
    architecture = PUBLISHED[name].architecture
    kind = ARCHITECTURES[architecture].kind
    encoder = Encoder(find_encoder(f"{name}={directory}", kind))
    batch = pixels(1, encoder.image_size) if kind == "video" else voices(1)
    features = encoder(batch)
    assert features.shape == (1, 8, PUBLISHED[name].width)
    direct = direct_images if kind == "video" else direct_sound
    expected = direct(architecture, directory, batch)
    # By norm: single values of 24 layers may cancel.
    assert np.linalg.norm(features - expected) < 1e-5 * np.linalg.norm(expected)


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_eva_clip_is_a_tower_of_timm(tmp_path):
    config = transformers.TimmWrapperConfig(
        architecture="eva02_tiny_patch14_224", model_args={"depth": 2}, num_classes=0
    )
    model = transformers.TimmWrapperModel(config).eval()
    model.save_pretrained(tmp_path / "eva")
    encoder = Encoder(find_encoder(f"timm={tmp_path / 'eva'}", "video"))
    batch = pixels(1, encoder.image_size)
    assert encoder(batch).shape == (1, 8, encoder.width)
