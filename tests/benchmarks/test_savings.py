"""The benchmark of single savings: what each side leaves out, and that it runs."""

import json

import numpy as np
import pytest

from affectgpt_jax.cli import UsageError
from benchmarks import savings, sides, workloads


def test_a_saving_is_measured_with_it_and_without(sides_here, tmp_path, capsys):
    out = tmp_path / "savings.json"
    small = ["--scale=tiny", "--batch=4", "--steps=2", "--block=1", "--warmup=1"]
    savings.COMMAND.main([*small, "--only", "gather", f"--records={tmp_path}", f"--out={out}"])
    on, off = sides_here
    supervised, everything = (side.feed.buckets[0].targets for side in (on, off))
    assert supervised < everything == on.feed.buckets[0].length == off.feed.buckets[0].length
    report = json.loads(out.read_text())
    assert report["environment"]["command"].startswith("python -m benchmarks.savings --scale=tiny")
    found = report["savings"]["gather"]
    assert found["ratio"]["lowest"] <= found["ratio"]["median"] <= found["ratio"]["highest"]
    assert found["sides"]["on"]["steps"] == found["sides"]["off"]["steps"] == 2
    printed = capsys.readouterr().out.strip()
    savings.COMMAND.main(["--show", str(out)])
    assert capsys.readouterr().out.strip() == printed == savings.table(report)
    assert len(printed.splitlines()) == 3


def test_a_side_without_overlap_reads_no_batch_ahead(tmp_path):
    side = sides.Jax({"name": "small", "scale": "tiny"}, str(tmp_path), without="overlap")
    read, batch = [], side.feed.batch
    side.feed.batch = lambda step: read.append(step) or batch(step)

    def no_thread(*_):
        raise AssertionError("batches are read ahead")

    side.feed.batches = no_thread
    side.warm_up(0)
    assert read == []
    found = side.block(3, 2)
    assert read == [3, 4] and len(found["seconds"]) == 2


def test_a_side_without_chunks_makes_all_logits_at_once(tmp_path):
    side = sides.Jax({"name": "small", "scale": "tiny"}, str(tmp_path), without="chunks")
    rows, targets = side.workload.config.batch_size, side.feed.buckets[0].targets
    assert side.model.decoder.compute.loss_chunk == rows * targets


@pytest.mark.parametrize("flags", [["--steps=0"], ["--block=0"], ["--warmup=-1"], ["--batch=-1"]])
def test_counts_of_which_nothing_comes_are_refused(flags):
    with pytest.raises(UsageError, match="given; expected"):
        savings.COMMAND.parse(flags)


@pytest.mark.parametrize("name", savings.SAVINGS)
def test_every_side_without_a_saving_is_one_that_can_be_made(name):
    saving = savings.SAVINGS[name]
    told = workloads.arguments("affectgpt", "tiny", 4, saving.layout, settings=saving.settings)
    config = workloads.make(**told).config
    assert (config.pack_length == 0) == (name == "packing")
    assert saving.without in sides.WITHOUT
    assert saving.without or saving.settings or saving.layout != "packed", "nothing is left out"


def test_a_side_without_something_unknown_is_refused_before_anything_is_written(tmp_path):
    told = {"name": "small", "scale": "tiny"}
    with pytest.raises(ValueError, match="without is 'sleep'; expected one of"):
        sides.Jax(told, str(tmp_path / "records"), without="sleep")
    assert not (tmp_path / "records").exists()


def test_every_position_is_a_target_and_what_it_predicts_is_the_next_token():
    workload = workloads.make("small", "tiny")
    rows = workloads.RandomRows(2, 8, 3, workload.llm.vocab_size)
    batch, plain = workloads.EveryPosition(rows).batch(5), rows.batch(5)
    assert batch["targets"].shape == (2, 8) and (batch["target_weights"] == 1).all()
    np.testing.assert_array_equal(batch["targets"][:, :-1], plain["tokens"][:, 1:])
    np.testing.assert_array_equal(batch["targets"][:, 4:7], plain["targets"])
    for name in ("tokens", "positions", "segment_ids"):
        np.testing.assert_array_equal(batch[name], plain[name])
