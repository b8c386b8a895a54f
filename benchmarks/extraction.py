"""Clips per second of an extraction, stage by stage: `python -m benchmarks.extraction`.

Generated clips (a photograph that moves over noise, H.264, 640 x 360, 25 frames/s, 3 s, with a
tone) go through decoding, the search for faces, and encoders of published shapes with random
weights.
Beside the extraction stands the obvious way: one clip after the other in one process, each decoded,
searched and encoded by itself, in float32. Both do all the work of a clip and keep its features.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import transformers
from matplotlib import cbook
from PIL import Image

from benchmarks import harness
from benchmarks.harness import Report, at_least, seconds_of, spread
from data_prep.blocks import BlockStore
from data_prep.clips import Clip
from data_prep.decoding import Job, decode_clip
from data_prep.encoders import BATCH, PRECISIONS, Encoder, find_encoder
from data_prep.stages import in_blocks
from data_prep.stages import run as extract

SIZE, FPS, SECONDS = (640, 360), 25, 3
FEATURES = ("face", "frame", "audio")
# The published shapes: ViT-L/14 and HuBERT-Large, ViT-B/32 and HuBERT-Base.
SHAPES = {
    "large": (
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "patch_size": 14,
            "projection_dim": 768,
        },
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "do_stable_layer_norm": True,
            "feat_extract_norm": "layer",
            "conv_bias": True,
        },
    ),
    "base": ({"patch_size": 32}, {}),
}


def write_clip(path: Path, seed: int) -> None:
    """One clip; no two are the same."""
    rng = np.random.default_rng(seed)
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        face = np.asarray(Image.open(file).convert("RGB").resize((256, 300)))
    wall = rng.integers(90, 160, (SIZE[1], SIZE[0], 3), np.uint8)
    sound = 0.3 * np.sin(2 * np.pi * (200 + seed) * np.arange(SECONDS * 16_000) / 16_000)
    with av.open(str(path), "w") as container:
        pictures = container.add_stream("libx264", rate=FPS)
        pictures.width, pictures.height = SIZE
        pictures.pix_fmt = "yuv420p"
        voices = container.add_stream("aac", rate=16_000, layout="mono")
        for i in range(SECONDS * FPS):
            image = np.roll(wall, i, axis=1)
            left = (seed * 13 + 3 * i) % (SIZE[0] - 256)
            image[60:, left : left + 256] = face
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(pictures.encode())
        for start in range(0, len(sound), 1024):
            part = sound[None, start : start + 1024].astype(np.float32)
            frame = av.AudioFrame.from_ndarray(part, "fltp", "mono")
            frame.sample_rate, frame.pts, frame.time_base = 16_000, start, Fraction(1, 16_000)
            container.mux(voices.encode(frame))
        container.mux(voices.encode())


def save_encoders(folder: Path, size: str) -> dict[str, Path]:
    """Random weights in the published shapes."""
    vision, hubert = SHAPES[size]
    models = {
        "clip": transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**vision)),
        "hubert": transformers.HubertModel(transformers.HubertConfig(**hubert)),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return {name: folder / name for name in models}


def one_at_a_time(clips: list[Clip], places: dict[str, Path], device: str) -> float:
    """Seconds of the obvious way, without loading the models."""
    vision = transformers.CLIPVisionModelWithProjection.from_pretrained(places["clip"])
    hubert = transformers.HubertModel.from_pretrained(places["hubert"])
    vision, hubert = vision.to(device).eval(), hubert.to(device).eval()
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).reshape(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).reshape(3, 1, 1)

    def encode(clip: Clip) -> None:
        arrays = decode_clip(Job(clip, FEATURES, 224)).arrays
        with torch.inference_mode():
            for feature in ("face", "frame"):
                images = torch.from_numpy(arrays[feature]).permute(0, 3, 1, 2) / 255
                vision(((images - mean) / std).to(device)).image_embeds.cpu()
            samples = torch.from_numpy(arrays["audio"])
            samples = (samples - samples.mean()) / samples.std()
            states = hubert(samples.to(device), output_hidden_states=True).hidden_states
            torch.stack(states[-4:]).mean(dim=(0, 2)).cpu()

    encode(clips[0])
    return seconds_of(lambda: [encode(clip) for clip in clips])


def extraction(
    clips: list[Clip], encoders: dict[str, Encoder], workers: int, batch: int
) -> tuple[float, dict[str, float]]:
    """Seconds of the extraction with its processes, and how long each stage was busy."""
    settings = {"batch": batch, "features": FEATURES, "faces": {"order of arrays": "bgr"}}
    blocks = in_blocks(clips, settings)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        stages = extract(blocks, BlockStore(Path(folder)), encoders, settings, workers)
        return time.perf_counter() - began, dict(stages.busy)


def rates(clips: int, seconds: list[float]) -> dict[str, float]:
    """Clips per second of repeated measurements, the first of which does not count."""
    return spread([clips / s for s in seconds[1:]])


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Clips per second of every case, by name."""
    device, calls = arguments.device, arguments.repeats + 1
    clips = []
    for i in range(arguments.clips):
        clips.append(Clip(f"{i:04}", folder / f"{i:04}.mp4"))
        write_clip(clips[-1].video, i)
    places = save_encoders(folder, arguments.size)

    def load(precision: str) -> dict[str, Encoder]:
        names = {"video": "clip", "audio": "hubert"}
        return {
            kind: Encoder(find_encoder(f"{n}={places[n]}", kind), device, precision)
            for kind, n in names.items()
        }

    batch = arguments.batch or BATCH[device]
    cases = {}
    some = clips[: min(len(clips), 8)]
    for features, name in ((("frame", "audio"), "decoding"), (FEATURES, "decoding and faces")):
        jobs = [Job(clip, features, 224) for clip in some]
        runs = [seconds_of(lambda j=jobs: [decode_clip(job) for job in j]) for _ in range(calls)]
        cases[f"{name}, one process"] = rates(len(some), runs)
    for precision in PRECISIONS[device]:
        encoders = load(precision)
        for kind, encoder in encoders.items():
            for size in dict.fromkeys((1, batch)):
                inputs = encoder.empty(size)
                runs = [seconds_of(lambda e=encoder, x=inputs: e(x)) for _ in range(calls)]
                cases[f"{kind} encoder, {precision}, batches of {size}"] = rates(size, runs)
        runs = [extraction(clips, encoders, arguments.workers, batch) for _ in range(calls)]
        cases[f"extraction, {precision}"] = rates(len(clips), [seconds for seconds, _ in runs])
        cases[f"extraction, {precision}"]["busy_s"] = runs[-1][1]
    runs = [one_at_a_time(clips, places, device) for _ in range(calls)]
    cases["one clip at a time, float32"] = rates(len(clips), runs)
    return cases


def run(args: argparse.Namespace) -> Report:
    """One measurement; returns the report."""
    with tempfile.TemporaryDirectory() as folder:
        cases = measure(args, Path(folder))
    return {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "CPU",
        "cores": harness.cores(),
        "workers": args.workers,
        "clips": args.clips,
        "size": args.size,
        "batch": args.batch or BATCH[args.device],
        "cases": cases,
    }


def table(report: Report) -> str:
    """A Markdown table of a report."""
    cases = report["cases"]
    obvious = cases["one clip at a time, float32"]["median"]
    ratios = ", ".join(
        f"{case['median'] / obvious:.2f} times in {name.split(', ')[1]}"
        for name, case in cases.items()
        if name.startswith("extraction")
    )
    rows = [
        (name, *(f"{case[key]:.2f}" for key in ("median", "lowest", "highest")))
        for name, case in cases.items()
    ]
    return "\n\n".join(
        [
            f"{report['clips']} clips, encoders of {report['size']} shape, {report['device']}, "
            f"{report['workers']} workers on {report['cores']} cores, batches of {report['batch']}",
            harness.markdown(("what", "clips/s", "slowest", "fastest"), rows),
            f"extraction against one clip at a time: {ratios}",
        ]
    )


def flags(add: Callable[..., Any]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cpu", "cuda"), default=device)
    add("--size", choices=SHAPES, help="default: large on a GPU, base on a CPU")
    add("--clips", type=at_least(1), default=32)
    add("--workers", type=at_least(0), default=harness.cores())
    add("--batch", type=at_least(1))
    add("--repeats", type=at_least(1), default=3)


def check(_: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    args.size = args.size or ("large" if args.device == "cuda" else "base")


COMMAND = harness.Measurement(
    "extraction",
    run,
    harness.each(table),
    lambda args: f"extraction_{args.device}",
    flags,
    check=check,
    packages=("torch", "av", "opencv-python-headless"),
)

if __name__ == "__main__":
    COMMAND.main()
