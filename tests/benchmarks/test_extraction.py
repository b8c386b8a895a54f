"""The benchmark of the extraction, on shapes that take no time."""

import json

import needs_torch

needs_torch.pytorch("the encoders run in PyTorch")

from benchmarks import extraction  # noqa: E402

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
}


def test_every_stage_and_both_ways_are_measured(tmp_path, monkeypatch, capsys):
    narrow = {"conv_dim": (8,) * 7, "num_conv_pos_embeddings": 16}
    groups = {"num_conv_pos_embedding_groups": 2}
    shapes = (SMALL | {"patch_size": 56}, SMALL | narrow | groups)
    monkeypatch.setitem(extraction.SHAPES, "base", shapes)
    monkeypatch.setattr(extraction, "SECONDS", 1)
    out = tmp_path / "report.json"
    flags = ["--device=cpu", "--clips=3", "--workers=0", "--batch=2", "--repeats=1"]
    extraction.COMMAND.main([*flags, f"--out={out}"])
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["environment"]["versions"]["torch"]
    for name in (
        "decoding, one process",
        "decoding and faces, one process",
        "video encoder, float32, batches of 1",
        "audio encoder, bfloat16, batches of 2",
        "extraction, float32",
        "one clip at a time, float32",
    ):
        assert report["cases"][name]["median"] > 0
    busy = report["cases"]["extraction, float32"]["busy_s"]
    assert {"decoding", "faces", "video encoder", "audio encoder", "waiting"} <= set(busy)
    assert "extraction against one clip at a time" in capsys.readouterr().out
