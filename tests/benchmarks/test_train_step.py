"""Batches of the train-step benchmark, its arithmetic, and both sides of it end to end."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from affectgpt_jax.data.packing import Bucket
from affectgpt_jax.models.qwen2 import Qwen2Config
from benchmarks import train_step
from benchmarks.train_step import Clip, draw_clips, make_batch, padded, summarise, table

TINY = Qwen2Config(300, 32, 48, 2, 2, 1, 16, tie_word_embeddings=True)


def test_clips_have_the_lengths_of_the_published_recipe():
    clips = draw_clips(np.random.default_rng(0), 20_000)
    labels = np.array([c.targets - 2 for c in clips if c.targets < 40])
    described = np.array([c.targets - 2 for c in clips if c.targets >= 60])
    assert len(labels) + len(described) == len(clips)
    assert abs(len(labels) / len(clips) - 0.5) < 0.02
    # Label answers: mean 13, at most 28; descriptions: mean 259, 10 and 90 % at 172 and 340.
    assert abs(labels.mean() - 13) < 0.2 and labels.max() <= 28
    assert abs(described.mean() - 259) < 3 and described.max() <= 595
    assert np.abs(np.percentile(described, [10, 90]) - [172, 340]).max() < 8
    prompts = {c.length - c.targets for c in clips}
    assert min(prompts) == 95 + 5 and max(prompts) == 98 + 40


def test_a_batch_holds_every_clip_once_and_supervises_its_answer():
    rows, features = [[Clip(20, 4), Clip(15, 3)], [Clip(30, 6)]], {"face": (8, 12)}
    rng = np.random.default_rng(0)
    batch = make_batch(rng, rows, Bucket(40, 8, 2), 300, features, soft_tokens=3)
    assert [np.bincount(row).tolist() for row in batch["segment_ids"]] == [[5, 20, 15], [10, 30]]
    assert batch["positions"][0, 20:35].tolist() == list(range(15))
    supervised = [row[w > 0] for row, w in zip(batch["target_positions"], batch["target_weights"])]
    assert [row.tolist() for row in supervised] == [
        [15, 16, 17, 18, 31, 32, 33],
        [23, 24, 25, 26, 27, 28],
    ]
    assert batch["soft_index"][0][batch["soft_index"][0] > 0].tolist() == [1, 2, 3, 4, 5, 6]
    assert batch["features"]["face"].shape == (2, 2, 8, 12)
    assert batch["present"]["face"].tolist() == [[True, True], [True, False]]


def test_padded_batches_of_one_length_have_one_shape():
    groups = [draw_clips(np.random.default_rng(i), 4) for i in range(8)]
    work = padded(groups, lambda rows, bucket: bucket, num_buckets=3)
    assert len({bucket.length for bucket in work.batches}) == len(set(work.batches)) <= 3
    for bucket, clips in zip(work.batches, work.clips, strict=True):
        assert max(clip.length for clip in clips) <= bucket.length
        assert max(clip.targets for clip in clips) <= bucket.targets


def test_rates_are_of_all_steps_and_the_time_is_a_median():
    steps = [{"s": s, "samples": 4, "tokens": 100, "places": 200, "loss": 1.0} for s in (1, 1, 4)]
    found = summarise(steps, flops_per_token=3e9, peak=1e12)
    assert found["median_s"] == 1 and found["samples_per_s"] == 2 and found["tokens_per_s"] == 50
    assert found["fill"] == 0.5 and found["mfu"] == pytest.approx(150e9 / 1e12)


@pytest.mark.parametrize(
    ("flags", "peer_mask"),
    [
        (["--workload=small", "--peer=tuned"], "tuned"),
        (["--workload=lengths", "--batch=4", "--peer=release"], "release"),
        (["--workload=lengths", "--batch=8", "--pack", "--peer=packed"], "packed"),
    ],
)
def test_both_sides_start_from_equal_losses_and_their_steps_are_kept(
    tmp_path, monkeypatch, capsys, flags, peer_mask
):
    pytest.importorskip("torch", reason="the peer runs in PyTorch")
    monkeypatch.setitem(train_step.SHAPES, "small", TINY)
    monkeypatch.setattr(train_step, "BATCHES", 2)
    out = tmp_path / "out.json"
    train_step.main([*flags, "--steps=2", "--warmup=1", "--pack-length=1024", f"--out={out}"])
    report = json.loads(out.read_text())
    assert report["loss_of_the_same_batch"]["relative"] < 1e-5
    assert {side: len(steps) for side, steps in report["steps"].items()} == {"jax": 2, peer_mask: 2}
    assert table([report]) in capsys.readouterr().out


def test_losses_that_differ_stop_the_comparison(monkeypatch, tmp_path):
    monkeypatch.setitem(train_step.SHAPES, "small", TINY)
    monkeypatch.setattr(train_step, "_loss_of", lambda ours, batch: 1.0)
    monkeypatch.setattr(train_step, "Theirs", lambda *_: SimpleNamespace(loss=lambda batch: 1.1))
    with pytest.raises(SystemExit, match="losses of the same batch differ"):
        train_step.main(["--peer=tuned", f"--out={tmp_path / 'out.json'}"])
