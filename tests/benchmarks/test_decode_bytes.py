"""What a decode step moves, compiled for a GPU: little more than weights, cache and logits."""

import jax
import pytest

from affectgpt_jax.models.decoder import DecoderConfig
from affectgpt_jax.training import gpu_compile
from benchmarks import decode_bytes, harness

# Two layers of Qwen2.5-7B: XLA treats narrow matmuls in another way. With fewer words, so that the
# lm_head is a small part of the bytes.
SMALL = DecoderConfig(vocab_size=16384, num_hidden_layers=2)
SLOTS = 512

if not gpu_compile.unavailable():
    jax.devices()  # JAX loads the plugin now, before a command under test hides it


@pytest.mark.gpu_compile
@pytest.mark.skipif(
    bool(gpu_compile.unavailable()), reason=gpu_compile.unavailable() or "it can be"
)
@pytest.mark.parametrize("rows", [1, 32])
def test_a_token_reads_weights_and_cache_once_and_copies_neither(rows):
    found = decode_bytes.describe("h200-141g", rows, SLOTS, SMALL)
    # Keys and values of both layers; kernels without the table of embeddings.
    keys = 2 * rows * 4 * SLOTS * 128
    assert 1e9 * found["cache"] == pytest.approx(2 * 2 * keys)
    layer = 3584 * (2 * 28 * 128 + 2 * 4 * 128 + 3 * 18944)
    assert 1e9 * found["weights"] == pytest.approx(2 * (2 * layer + 3584 * 16384), rel=0.001)
    assert found["ideal"] < found["moved"] < 1.3 * found["ideal"]
    q_proj = 2 * 3584 * 28 * 128
    assert 1e6 * found["largest_movement"] < min(keys, q_proj)


def test_kept_results_are_within_the_aim_and_in_the_table():
    kept = sorted(harness.RESULTS.glob("decode_bytes_*.json"))
    assert kept
    for report in map(harness.load, kept):
        assert report["status"] == "compiled, not run"
        assert [step["rows"] for step in report["steps"]] == list(decode_bytes.ROWS)
        for step in report["steps"]:
            assert step["moved"] < 1.3 * step["ideal"]
            assert step["tokens_per_s"] <= step["tokens_per_s_by_bytes"]
            assert f"| {step['tokens_per_s']:,.0f} |" in decode_bytes.table(report)
