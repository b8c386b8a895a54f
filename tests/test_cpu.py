"""What runs on a CPU alone: memory that stays with the process, and the parts of a decode step."""

import os
import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import make_batch, make_model, random_base, random_trainable

from affectgpt_jax import cpu, train
from affectgpt_jax.models.affectgpt import with_compute
from affectgpt_jax.models.decoder import float32_logits
from affectgpt_jax.models.generate import Decoding, stream
from affectgpt_jax.training import checkpoints

# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:'affectgpt_jax.train' found in sys.modules")
def test_only_a_process_of_its_own_sets_up_malloc(monkeypatch):
    kept = []
    monkeypatch.setattr(cpu, "keep_freed_memory", lambda: kept.append(True))
    monkeypatch.setattr(checkpoints, "silence_threads", lambda: None)
    monkeypatch.setattr(sys, "argv", ["train", "--config.no_such_key=1"])
    for start in (train.main, lambda: runpy.run_module(train.__name__, run_name="__main__")):
        assert not kept
        with pytest.raises(SystemExit, match="no_such_key"):
            start()
    assert kept == [True]


# Its temporaries, 64 MiB, are too large for malloc to keep of its own accord.
_FAULTS = """
import resource, jax, jax.numpy as jnp
from affectgpt_jax import cpu
if {keep}:
    assert cpu.keep_freed_memory()
run = jax.jit(lambda x: jnp.cumsum(jnp.outer(x, x), axis=0)[::-1].sum())
x = jnp.arange(4096.0)
for _ in range(3):
    run(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
run(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the settings are glibc's")
def test_temporaries_are_not_cleared_anew_at_every_call():
    def page_faults(keep):
        # One thread, so that none allocates between two calls.
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "NPROC": "1"}
        code = _FAULTS.format(keep=keep)
        return int(subprocess.check_output([sys.executable, "-c", code], env=env, text=True))

    assert page_faults(keep=False) > 64 * 2**20 // 2**16  # at least one a page of 64 KiB
    assert page_faults(keep=True) < 64


_MORE_THAN_2_GIB = """
import resource
import numpy as np
from affectgpt_jax import cpu
assert cpu.keep_freed_memory()
np.ones(5 * 2**26)  # 2.5 GiB, freed at once
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(5 * 2**26)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the settings are glibc's")
def test_what_is_larger_than_glibcs_largest_threshold_is_kept_too():
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    code = [sys.executable, "-c", _MORE_THAN_2_GIB]
    # Given back, there would be a fault for each page of at most 2 MiB: 1,280.
    assert int(subprocess.check_output(code, env=env, text=True)) < 64


@pytest.mark.parametrize("platforms", ["cuda", "cuda,cpu", "tpu"])
def test_where_there_may_be_an_accelerator_malloc_stays_as_it_is(platforms, monkeypatch):
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", platforms)
    try:
        assert not cpu.keep_freed_memory()
    finally:
        jax.config.update("jax_platforms", before)


# --- decoding -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("platform", "devices", "own"), [("cpu", 1, True), ("cpu", 8, False), ("gpu", 1, False)]
)
def test_one_cpu_device_decodes_in_its_own_way(platform, devices, own, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    assert set(cpu.decoding()) == ({"attend_cached", "logits"} if own else set())


def test_logits_are_those_of_other_devices():
    states, kernel = jax.random.normal(jax.random.key(0), (3, 16)), jnp.eye(16, 40) + 0.5
    for dtype in (jnp.float32, jnp.bfloat16):
        given = states.astype(dtype), kernel.astype(dtype)
        found, expected = jax.jit(cpu.logits_by_word)(*given), float32_logits(*given)
        assert found.shape == (3, 40) and found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_answers_are_those_of_other_devices(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    model = make_model()
    base, trainable = random_base(model), random_trainable(model)
    batch, decoding = make_batch([5, 12, 8], width=12), Decoding(8, (-1,), 63, log_probs=True)

    def answers(model):
        *_, generated = stream(model, base, trainable, batch, decoding, every=8)
        return generated

    found, expected = answers(with_compute(model, **cpu.decoding())), answers(model)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.log_probs, expected.log_probs, rtol=1e-5, atol=1e-5)
