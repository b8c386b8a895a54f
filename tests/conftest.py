"""What every test shares, set before JAX is imported: 8 emulated CPU devices, fixed examples."""

import fcntl
import gc
import importlib.metadata
import importlib.util
import os
import signal
import tempfile

# jax 0.10 deadlocks with several emulated devices on a machine of few cores: its thread pool must
# be at least twice as large as the number of devices.
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# XLA's older way of compiling fusions, in one piece, takes half the time for models this small.
# Only jax 0.10 has it, and an option that XLA does not know ends the process.
if importlib.metadata.version("jax").startswith("0.10."):
    os.environ["XLA_FLAGS"] = " ".join(
        (
            os.environ.get("XLA_FLAGS", ""),
            "--xla_cpu_use_fusion_emitters=false",
            "--xla_cpu_parallel_codegen_split_count=1",
        )
    )

# A shell has its background jobs ignore Ctrl-C, and so would the commands that tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

# Not through the environment: commands that a test starts see an ordinary machine of one device.
jax.config.update("jax_num_cpu_devices", 8)
# The models of the tests compute for milliseconds and compile for seconds; without LLVM's
# optimisations a third of those. (What computes for long, a test starts as a command.)
jax.config.update("jax_disable_most_optimizations", True)

# Several tests train the same model: each program is compiled once, by whichever process of
# pytest -n needs it first. The first process makes the folder, and removes it at its end.
if "AFFECTGPT_TEST_CACHE" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="affectgpt-test-cache-")
    os.environ["AFFECTGPT_TEST_CACHE"] = _CACHE.name
jax.config.update("jax_compilation_cache_dir", os.environ["AFFECTGPT_TEST_CACHE"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def pytest_configure(config):
    # pytest-xdist would begin with the files of the most tests, which take the least time, and have
    # one process end with the longest.
    config.option.loadscopereorder = False


@pytest.fixture(scope="module", autouse=True)
def _few_programs_at_a_time():
    """Forget a file's compiled programs behind it.

    Each one is some dozen memory mappings, of which Linux allows a process 65,530: the programs of
    the whole suite are more, and loading one too many ends in a segmentation fault.
    """
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def demo_records(tmp_path_factory):
    """Record directories of the demo world with every feature: 64 clips, and 16 in val and test."""
    from affectgpt_jax.data import demo
    from affectgpt_jax.data.records import write_records

    folder = tmp_path_factory.mktemp("demo-records")
    for split, size in (("train", 64), ("val", 16), ("test", 16)):
        clips = demo.World(0).records(split, size, tuple(demo.SHAPES))
        write_records(folder / split, clips, encoders=dict.fromkeys(demo.SHAPES, "demo"))
    return {split: folder / split for split in ("train", "val", "test")}


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory):
    """The workdir of a run of two steps, which has hardly learned anything, and is left as it is.

    Beside it lie its records: "train", "val", and "test" with 12 clips. All processes of pytest -n
    share it.
    """
    from affectgpt_jax import train
    from affectgpt_jax.data import demo
    from affectgpt_jax.data.records import write_records

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder = folder / "trained"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / "run" / "result.json").exists():
            return folder / "run"
        for split, size in (("train", 24), ("val", 8), ("test", 12)):
            clips = demo.World(0).records(split, size)
            encoders = dict.fromkeys(demo.DEFAULT_FEATURES, "demo")
            write_records(folder / split, clips, encoders=encoders)
        train.main(
            [
                f"--workdir={folder / 'run'}",
                *(f"--config.data.{split}={folder / split}" for split in ("train", "val", "test")),
                "--config.mesh=data:-1",
                "--config.steps=2",
                "--config.checkpoint_every=1",
                "--config.batch_size=8",
                "--config.generate.batch_size=16",
                "--config.generate.max_new_tokens=8",
                "--config.num_buckets=1",
            ]
        )
    return folder / "run"


@pytest.fixture(scope="session")
def records(tmp_path_factory):
    """Flags that name the records of `commands`."""
    from commands import write_small_records

    return write_small_records(tmp_path_factory.mktemp("records"))


@pytest.fixture(scope="session")
def undisturbed(records, tmp_path_factory):
    """The workdir of a training command to which nothing has happened."""
    from commands import finish

    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(workdir, *records)
    return workdir


# Deterministic, and patient with the compilation inside an example.
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("ci")

# Why a test may be skipped where AFFECTGPT_STRICT_SKIPS is set, as in .ci/run.
EXPECTED_SKIPS = [
    # Qwen2.5's tokenizer is 7 MB of somebody else's data; the tests that need it are run by hand.
    "AFFECTGPT_QWEN_TOKENIZER names no directory with Qwen2.5's tokenizer.json",
    # MER-UniBench's emotion wheels are not ours to ship; they lie beside the checkout where the
    # project is developed.
    "the official lexicon is not here",
    # The file from which the published figures were copied lies there too.
    "the published figures are not beside the checkout",
    # A real browser opens the report; Debian's is in the package chromium.
    "no chromium or google-chrome on the PATH",
    # Rebuilding the shipped lexicon takes WordNet's files, which no Python package carries.
    "WordNet is not installed",
    # A linter for two short scripts, which no Python package needs.
    "shellcheck is not installed",
    # Full disks are file systems of a few kilobytes, which only root may mount.
    "a small file system cannot be mounted here",
    # cuDNN's attention; the same file runs it with JAX_PLATFORMS=cuda where there is a GPU.
    "no GPU for this backend",
    # The extra gpu-compile; .ci/run has an environment of its own for it.
    "XLA's CUDA compiler is not installed",
    # A Debian package; a voice of its own is made where it is.
    "espeak-ng is not installed",
    # Gigabytes of published weights; the test that needs them is run by hand.
    "AFFECTGPT_CLIP and AFFECTGPT_HUBERT name no directories with published weights",
    # It comes with torchvision, whose build must fit PyTorch's.
    "timm is not installed",
    # The extra wandb; .ci/run installs it for the whole suite.
    "could not import 'wandb'",
    # Packages that bring footage, speech or a trained model along, where the registry has none.
    "the package of ",
    # Weights that others publish, and what their own code answers, lie beside the checkout too.
    "the published speaker networks are not beside the checkout",
]
# What runs beside PyTorch is tested once; AFFECTGPT_STRICT_SKIPS=without-pytorch says that this is
# not that run.
if os.environ.get("AFFECTGPT_STRICT_SKIPS") == "without-pytorch":
    assert importlib.util.find_spec("torch") is None, "PyTorch is installed here"
    EXPECTED_SKIPS += ["PyTorch is not installed", "PEFT is not installed"]


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    """Fail a strict run that skipped a test for a reason that is not listed."""
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    if terminal is None:  # one of the processes of pytest -n, which report to the first
        return
    unexpected = [
        f"{report.nodeid}: {report.longrepr[-1]}"
        for report in terminal.getreports("skipped")
        if not any(reason in str(report.longrepr) for reason in EXPECTED_SKIPS)
    ]
    if unexpected and os.environ.get("AFFECTGPT_STRICT_SKIPS"):
        terminal.section("skips that tests/conftest.py does not list", red=True)
        terminal.write("\n".join([*unexpected, ""]))
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
