"""The benchmark of attention backends: rows as described, a wrong backend is told apart."""

import json

import jax
import numpy as np
import pytest

from affectgpt_jax.models import attention as backends
from benchmarks import attention


@pytest.mark.parametrize("scale", attention.SHAPES)
def test_packed_rows_hold_several_samples_and_padding(scale):
    for kind, (_, length) in attention.SHAPES[scale].items():
        samples = attention.lengths_of(kind, length)
        if kind == "whole":
            assert samples == [length]
        else:
            assert len(set(samples)) > 2 and length // 2 < sum(samples) < length


def sees_what_follows(query, key, value, segment_ids):
    return backends.causal(query, key[:, ::-1], value, segment_ids)


def breaks(*_):
    raise RuntimeError("no kernel for this\nand more")


def test_every_backend_is_compared_with_float32_or_says_why_not(tmp_path, monkeypatch, capsys):
    choose = backends.choose

    def planted(name, *where, **options):
        if name == "xla":
            return choose(name, *where, **options)
        attend = sees_what_follows if name == "cudnn" else breaks
        return backends.Choice(name, "", attend)._replace(name="planted")

    monkeypatch.setattr(backends, "choose", planted)
    out = tmp_path / "attention.json"
    attention.COMMAND.main(["--scale=tiny", "--repeats=2", f"--out={out}"])
    report = json.loads(out.read_text())
    kinds = report["kinds"]
    for kind, of in kinds.items():
        right, wrong, *failed = (of["backends"][n] for n in attention.BACKENDS)
        # Bfloat16 has three digits.
        assert 1e-4 < max(right["apart"].values()) < attention.BOUND, kind
        assert max(wrong["apart"].values()) > 0.3 and len(wrong["seconds"]) == 2
        assert failed == 2 * [{"refused": "no kernel for this"}]
        pairs = sum(n * (n + 1) // 2 for n in of["samples"])
        assert of["flops"] == of["rows"] * 12 * pairs * 2 * 16  # 2 heads of 16
    printed = capsys.readouterr().out
    assert printed.count("**wrong**") == len(kinds)
    assert printed.count("not here: no kernel for this") == 2 * len(kinds)


def test_the_reference_sees_its_own_sample_up_to_itself():
    rng = np.random.default_rng(0)
    ids = np.array([[1, 1, 2, 2, 0]])
    query, key, value = rng.standard_normal((3, 1, 5, 2, 4), np.float32)
    before = np.asarray(attention.reference(query, key, value, ids))
    value[:, 1] += 1
    changed = np.abs(attention.reference(query, key, value, ids) - before).max(axis=(0, 2, 3)) > 0
    assert changed.tolist() == [False, True, False, False, False]
    assert jax.numpy.allclose(before[:, 2], value[:, 2])
