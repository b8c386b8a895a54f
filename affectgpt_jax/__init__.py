"""AffectGPT in JAX: multimodal emotion understanding (arXiv 2501.16566).

The functions of this package are those of `affectgpt_jax.api`, which is imported when one of them
is used. Importing the package alone imports nothing, so that tools which need no accelerator stay
light.
"""

__version__ = "0.1.0"
__all__ = [
    "UserError",
    "ask_clips",
    "evaluate_run",
    "get_config",
    "load_checkpoint",
    "load_run",
    "run_training",
    "score_files",
]

TYPE_CHECKING = False  # that of `typing`, which is not imported either
if TYPE_CHECKING:
    from affectgpt_jax.api import (
        UserError,
        ask_clips,
        evaluate_run,
        get_config,
        load_checkpoint,
        load_run,
        run_training,
        score_files,
    )


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module("affectgpt_jax.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
