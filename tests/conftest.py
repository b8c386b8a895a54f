"""What every test shares, set before JAX is imported: 8 emulated CPU devices, fixed examples."""

import os

# jax 0.10 deadlocks with several emulated devices on a machine of few cores: its thread pool must
# be at least twice as large as the number of devices.
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis  # noqa: E402
import jax  # noqa: E402

# Not through the environment: commands that a test starts see an ordinary machine of one device.
jax.config.update("jax_num_cpu_devices", 8)
# The models of the tests compute for milliseconds and compile for seconds; without LLVM's
# optimisations a third of those. (What computes for long, a test starts as a command.)
jax.config.update("jax_disable_most_optimizations", True)

# Deterministic, and patient with the compilation inside an example.
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("ci")
