"""Packaging. `configs/` and `data_prep/` are shipped as `affectgpt_jax.configs` and
`affectgpt_jax.data_prep`, so that a wheel does all that a checkout does, but for benchmarks."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "affectgpt_jax" / "__init__.py").read_text(), re.MULTILINE
)[1]
# A page, and an API for scripts; in the environment of the tests too.
SERVE = ["starlette>=1.0", "uvicorn>=0.34"]

setup(
    name="affectgpt-jax",
    version=VERSION,
    description="AffectGPT (arXiv 2501.16566) in JAX: emotion descriptions from video and speech",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    project_urls={"Paper": "https://arxiv.org/abs/2501.16566"},
    keywords=["AffectGPT", "emotion recognition", "multimodal", "LoRA", "JAX", "Flax"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA :: 12",
        "Environment :: GPU :: NVIDIA CUDA :: 13",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=[
        "affectgpt_jax",
        "affectgpt_jax.common",
        "affectgpt_jax.configs",
        "affectgpt_jax.data",
        "affectgpt_jax.data_prep",
        "affectgpt_jax.data_prep.caption",
        "affectgpt_jax.data_prep.crowd",
        "affectgpt_jax.data_prep.speakers",
        "affectgpt_jax.evaluation",
        "affectgpt_jax.models",
        "affectgpt_jax.training",
        "affectgpt_jax.weights",
    ],
    package_dir={"affectgpt_jax.configs": "configs", "affectgpt_jax.data_prep": "data_prep"},
    package_data={
        "affectgpt_jax": ["assets/*/*", "py.typed"],
        "affectgpt_jax.configs": ["launch/*.sh"],
        "affectgpt_jax.data_prep": ["*.toml"],
        "affectgpt_jax.data_prep.crowd": ["*.toml"],
        "affectgpt_jax.data_prep.caption": ["*.toml", "*.jinja"],
    },
    entry_points={"console_scripts": ["affectgpt = affectgpt_jax.__main__:main"]},
    install_requires=[
        "jax>=0.10",
        "flax>=0.12",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "grain>=0.2.18",
        "array-record>=0.8",
        "numpy>=2.0",
        "ml-collections>=1.1",
        "absl-py",
        "transformers>=5.0",
        "jinja2>=3.1",  # chat templates of transformers
        "huggingface-hub>=1.0",
        "safetensors>=0.7",
        "tensorflow-datasets>=4.9.10",
        "tensorboardX>=2.6",
        "matplotlib>=3.9",
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",  # two files of tests at a time
            "hypothesis>=6.100",
            "ruff>=0.14",
            "setuptools>=77",  # a test builds the wheel
            # Tests of data_prep make their own clips; PyTorch comes with [parity].
            "av>=15",
            "opencv-python-headless>=4.9,<5",
            "openai>=3.57",  # asks a server that the tests start
            *SERVE,
        ],
        "parity": ["torch>=2.9", "peft>=0.17"],
        # OpenCV 5 ships no cascades, which find faces.
        "features": [
            "torch>=2.9",
            "av>=15",
            "opencv-python-headless>=4.9,<5",
            "pillow>=10",
        ],
        # mkdocs 2 has neither plugins nor this theme.
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.7", "mkdocstrings[python]>=1.0"],
        "openai": ["openai>=3.57"],
        "serve": SERVE,
        "wandb": ["wandb>=0.19"],
        # XLA's CUDA compiler and what assembles its kernels, for plan --compile: none of CUDA's
        # libraries, and not JAX's plugin package, which prints lines at every import without a GPU.
        # The compiler's version is that of jax, of which Python 3.11 has 0.10 at most.
        "gpu-compile": [
            "jax-cuda12-pjrt>=0.10,<0.11; python_version < '3.12'",
            "nvidia-cuda-nvcc-cu12>=12.9; python_version < '3.12'",
            "jax-cuda13-pjrt>=0.10; python_version >= '3.12'",
            "nvidia-cuda-nvcc>=13.0; python_version >= '3.12'",
        ],
        "cuda12": ["jax[cuda12]"],
        "cuda13": ["jax[cuda13]"],
    },
)
