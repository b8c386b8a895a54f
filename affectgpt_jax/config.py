"""The command line: one config file, overrides of its keys, a working directory.

    --config=configs/demo.py --config.steps=100 --config.optimizer.learning_rate=1e-3 --workdir=...

The keys of `configs/affectgpt_qwen25_7b.py` are the schema: a config with another key, or a value
of another type, is refused before anything starts.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib.resources
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from affectgpt_jax.cli import Parser, make_parser
from affectgpt_jax.common.errors import UserError
from affectgpt_jax.common.json import read_json, write_json
from affectgpt_jax.common.text import shorten
from affectgpt_jax.config_keys import config_keys
from affectgpt_jax.configs import affectgpt_qwen25_7b
from affectgpt_jax.data.modalities import HEADS, INPUT_MODES
from affectgpt_jax.data.prompts import PromptError, parse_label

DEFAULT = "demo"
MIX = "config.data.mixture"
CHOICES = {
    "too_long": ("error", "drop"),
    "dtype": ("float32", "bfloat16"),
    "base_precision": ("", "int8", "fp8", "nf4"),
    "remat": ("auto", "none", "save_attention", "save_projections", "full"),
    "attention": ("auto", "xla", "cudnn", "cudnn_masked", "cudnn_packed"),
    "fusion": (*HEADS["multi"].kinds, "none"),
    "generate.merge_lora": ("auto", "true", "false"),
}
# Of the keys of sections that have them.
SECTION_CHOICES = {
    "question": ("ovlabel", "onehot", "onehot_candidates", "sentiment"),
    "merge_lora": CHOICES["generate.merge_lora"],
    "reward": ("wheel_f", "wheel_f_corpus", "hit", "sentiment"),
    "method": ("grpo", "best"),
    "loss": ("tokens", "answers", "constant"),
    "scale": ("none", "group", "batch"),
    "kl": ("k2", "k3"),
    "source": ("records", "samples"),
}
SECTION_LEAST = {
    **dict.fromkeys(("prompts", "pairs", "max_new_tokens", "updates"), 1),
    **dict.fromkeys(("val_clips", "test_clips", "test_samples"), 1),
    **dict.fromkeys(("group", "consensus"), 2),
    **dict.fromkeys(("format_weight", "length_penalty", "length_free", "stop_kl", "beta"), 0),
    **dict.fromkeys(("sft_share", "gap", "label_smoothing", "nll_weight"), 0),
    "weight_cap": 1,
}
# Of one section, what a value lies between, neither of both included.
SECTION_BETWEEN = {
    "rl": {"temperature": (0, math.inf), "epsilon": (0, 1), "epsilon_high": (0, math.inf)},
    "dpo": {"beta": (0, math.inf), "label_smoothing": (-math.inf, 0.5), "val_share": (0, 1)},
}
POSITIVE = (
    "steps",
    "batch_size",
    "gradient_accumulation_steps",
    "num_buckets",
    "max_tokens",
    "projectors.fusion_width",
    "generate.batch_size",
    "generate.max_new_tokens",
    "log_every",
    "checkpoint_every",
    "max_to_keep",
)
# What may differ when a run is resumed: where it runs and what it reports. The base may have moved;
# checkpoints know it by its hash.
FREE_ON_RESUME = (
    "llm",
    "mesh",
    "remat",
    "attention",
    "xla_options",
    "log_every",
    "max_to_keep",
    "step_timeout",
    "profile_steps",
    "generate",
    "wandb_project",
    "strict_leaks",
    "data.verify",
    "rl.start",
    "rl.test_lexicon",
    "dpo.start",
    "dpo.test_lexicon",
)


# Sections of runs that go beyond supervision, by what makes them.
SECTIONS = {
    "rl": affectgpt_qwen25_7b.reinforcement,
    "dpo": affectgpt_qwen25_7b.preference,
}


# Of anything that is counted: arrays of more cannot be asked for.
MAX_COUNT = 10**12


class ConfigError(UserError, ValueError):
    """A command line or config that cannot be run."""


def schema_of(config: Mapping[str, Any]) -> ConfigDict:
    """Keys and types that a config must have, with the sections that it has."""
    schema = affectgpt_qwen25_7b.get_config()
    for name, make in SECTIONS.items():
        if name in config:
            schema[name] = make()
    return schema


def apply_overrides(config: ConfigDict, arguments: Iterable[str]) -> list[str]:
    """Set the keys that `--config.KEY=VALUE` among the arguments name; returns the others.

    Raises:
        ConfigError: an unknown key, or a value of another type.
    """
    others = []
    for argument in arguments:
        match = re.fullmatch(r"--?config\.([^=]+)=(.*)", argument, re.DOTALL)
        if match is None:
            others.append(argument)
            continue
        *parents, last = match[1].split(".")
        where, section = "config", config
        for key in (*parents, last):
            if not isinstance(section, ConfigDict):
                raise ConfigError(f"{where} is a single value; {where}.{key} does not exist")
            if key not in section:
                raise _unknown_key(where, key, section)
            parent, section, where = section, section[key], f"{where}.{key}"
        parent[last] = _parse_like(section, match[2], where)
    return others


def _parse_like(default: Any, text: str, where: str) -> Any:
    """A value of the default's type from the text of a flag."""
    if isinstance(default, str):
        return text
    try:
        value = ast.literal_eval(text.capitalize() if isinstance(default, bool) else text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        raise ConfigError(
            f"{where} is {text!r}; expected {type(default).__name__}, as in {_plain(default)}"
        )
    return value


def parse_command_line(
    argv: Sequence[str], parser: Parser | None = None
) -> tuple[ConfigDict, argparse.Namespace]:
    """Read `argv` (without the program's name) into a validated config and the other flags.

    Args:
        argv: the arguments.
        parser: of the command, with its own flags; those of a config are added to it.

    Returns:
        The config, and the other flags: those of the parser, and `workdir`, a path.

    Raises:
        ConfigError: an unknown file, key, type or value of the config, in one sentence.
        UsageError: another flag is wrong.
        SystemExit: after printing the help.
    """
    parser = parser or make_parser("affectgpt train", "")
    add = parser.add_argument_group("the config").add_argument
    add(
        "--config",
        metavar="FILE",
        default=DEFAULT,
        help=f"a config file, or one of {', '.join(shipped_configs())}; default: {DEFAULT}",
    )
    add("--config.KEY", metavar="VALUE", help="instead of the config's; the keys are below")
    add("--workdir", metavar="DIR", help="directory of the run; default: runs/NAME of the config")
    asked = [arg for arg in argv if arg not in ("-h", "--help")]
    arguments, overrides = parser.parse_known_args(asked)
    for arg in overrides[:1]:
        if not arg.startswith(("--config.", "--noconfig.")):
            parser.error(f"unknown argument {arg}{_meant(arg, parser)}")
    file = find_config(arguments.config)
    config = _read_config(file, overrides)
    if len(asked) < len(argv):
        print(parser.format_help() + "\n" + _help_on_keys(config, arguments.config), end="")
        raise SystemExit(0)
    validate(config)
    stem = Path(file.partition(":")[0]).stem
    arguments.workdir = Path(arguments.workdir or f"runs/{stem}").expanduser()
    return config, arguments


def _meant(arg: str, parser: argparse.ArgumentParser) -> str:
    """A guess at a flag that is close to an argument: a clause of a sentence, or nothing."""
    known = {option: option for action in parser._actions for option in action.option_strings}
    for key, _ in _leaves(affectgpt_qwen25_7b.get_config().to_dict()):
        known[f"--{key.replace('_', '-')}"] = f"--config.{key}"
    close = difflib.get_close_matches(arg.split("=")[0], known, 1, cutoff=0.7)
    return f"; did you mean {known[close[0]]}?" if close else ""


def config_of_flags(name: str, overrides: Sequence[str]) -> ConfigDict:
    """A validated config by its file or the name of a shipped one, and flags that change it.

    Args:
        name: as `find_config` takes it.
        overrides: `--config.KEY=VALUE`.

    Raises:
        ConfigError: an unknown file, key, type or value, in one sentence.
    """
    config = _read_config(find_config(name), overrides)
    validate(config)
    return config


def load_config_file(name: str, overrides: Mapping[str, Any]) -> ConfigDict:
    """A validated config by its file or the name of a shipped one.

    Args:
        name: as `find_config` takes it.
        overrides: values by key, with dots.

    Raises:
        ConfigError: an unknown file, key, type or value, in one sentence.
    """
    config = _read_config(find_config(name), [])
    for key, value in overrides.items():
        _check_override(f"--config.{key}")
        try:
            config.update_from_flattened_dict({key: value})
        except (TypeError, ValueError) as error:
            raise ConfigError(f"config.{key}={value!r}: {_one_sentence(error)}") from None
    validate(config)
    return config


def _read_config(file: str, overrides: Sequence[str]) -> ConfigDict:
    """The config of a file, `PATH` or `PATH:ARGUMENT`, with some of its keys overridden.

    Raises:
        ConfigError: whatever is wrong with it.
    """
    for arg in overrides:
        _check_override(arg)
    argv = ["affectgpt", f"--config={file}", *overrides]
    values = flags.FlagValues()
    try:
        # This reads the overrides already, and refuses some.
        config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
        rest = values(argv)[1:]
        config = values.config
    # A config file is the user's code: whatever it raises is about the config.
    except Exception as error:
        raise ConfigError(f"{_one_sentence(error)} ({type(error).__name__})") from None
    if rest:
        raise ConfigError(f"unexpected argument {rest[0]!r}; flags are --config.key=value")
    return config


def _help_on_keys(config: ConfigDict, name: str) -> str:
    """The keys of a config as a part of a command's help."""
    parser = Parser(usage=argparse.SUPPRESS, add_help=False)
    group = parser.add_argument_group(f"keys of the config, with their values in {name}")
    for key in config_keys():
        value = _get(config, key.name)
        value = value if isinstance(value, str) else _plain(value)
        option = f"--config.{key.name}={value if len(value) < 40 else value[:37] + '...'}"
        if isinstance(key.default, ConfigDict) and f"config.{key.name}" != MIX:
            option = f"--config.{key.name}."
        meaning = key.meaning.replace("%", "%%")
        group.add_argument(option, action="store_true", help=meaning or None)
    return parser.format_help()


def shipped_configs() -> list[str]:
    """Names of the configs that come with the package."""
    folder = importlib.resources.files("affectgpt_jax.configs")
    names = (entry.name for entry in folder.iterdir())
    return sorted(n.removesuffix(".py") for n in names if n.endswith(".py") and n != "__init__.py")


def find_config(name: str) -> str:
    """The file of a config given by path or by the name of a shipped one, either with `:ARGUMENT`
    behind it, which `get_config` is then called with.

    Raises:
        ConfigError: neither.
    """
    name, colon, argument = name.partition(":")
    path = Path(name).expanduser()
    if path.is_file():
        return f"{path}{colon}{argument}"
    # "configs/demo.py" means the shipped file too, so that the README's commands work anywhere.
    stem = path.name.removesuffix(".py")
    if path.parent in (Path("."), Path("configs")) and stem in shipped_configs():
        file = importlib.resources.files("affectgpt_jax.configs") / f"{stem}.py"
        return f"{file}{colon}{argument}"
    raise ConfigError(
        f"--config={name}: no such file, nor one of the shipped configs {shipped_configs()}"
    )


def _check_override(arg: str) -> None:
    """Refuse `--config.KEY` with an unknown KEY: ml_collections does so without naming it."""
    if match := re.match(r"--?config\.([^=]*)", arg):
        schema, where = affectgpt_qwen25_7b.get_config(), "config"
        for key in match[1].split("."):
            if where == MIX:  # any name may stand here
                schema = ConfigDict({key: affectgpt_qwen25_7b.data_set("")})
            if not isinstance(schema, ConfigDict):
                raise ConfigError(f"{where} is a single value; {where}.{key} does not exist")
            if key not in schema:
                raise _unknown_key(where, key, schema)
            schema, where = schema[key], f"{where}.{key}"


def _unknown_key(where: str, key: str, schema: ConfigDict) -> ConfigError:
    close = difflib.get_close_matches(key, schema, 1)
    known = f"did you mean {where}.{close[0]}?" if close else f"expected one of {sorted(schema)}"
    return ConfigError(f"{where}.{key} is not a key; {known}")


def _one_sentence(error: Exception) -> str:
    """The last line of a message: absl and ml_collections put tracebacks and echoes before it."""
    text = str(error.args[0] if error.args else error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def validate(config: ConfigDict) -> None:
    """Compare a config with the schema.

    Raises:
        ConfigError: an unknown or missing key, a value of another type, a value out of its range,
            or a combination that cannot run; one sentence that names the key.
    """
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"get_config() of the config file returned {config!r}, not a ConfigDict")
    _check_keys(config, schema_of(config), "config")
    _check_mix(config)
    _check_label("config.label", config.label)
    _check_input("config.input", config.input)
    heads = [head for head in HEADS.values() if not head.is_pre_fusion]
    for key, choices in (CHOICES | {head.kind_key: head.kinds for head in heads}).items():
        if _get(config, key) not in choices:
            raise ConfigError(f"config.{key} is {_get(config, key)!r}; expected one of {choices}")
    for key in (*POSITIVE, *(head.width_key for head in heads)):
        if _get(config, key) < 1:
            raise ConfigError(f"config.{key} is {_get(config, key)}; expected 1 or more")
    for key in ("seed", "demo_seed"):
        if not 0 <= config[key] < 2**32:  # larger ones would share their random numbers
            raise ConfigError(f"config.{key} is {config[key]}; expected 0 to 4294967295")
    if config.batch_size % config.gradient_accumulation_steps:
        raise ConfigError(
            f"config.batch_size={config.batch_size} is not a multiple of "
            f"config.gradient_accumulation_steps={config.gradient_accumulation_steps}"
        )
    if config.pack_length != 0 and config.pack_length < config.max_tokens:
        raise ConfigError(
            f"config.pack_length is {config.pack_length}; expected 0, or at least the "
            f"{config.max_tokens} of config.max_tokens, so that a row holds any example whole"
        )
    for name in ("generate", *SECTIONS):
        merges = config.get(name, {}).get("merge_lora") == "true"
        if config.base_precision and merges:
            raise ConfigError(
                f"config.{name}.merge_lora='true' cannot add LoRA to quantized weights, and "
                f"config.base_precision is {config.base_precision!r}; use auto"
            )
    if not 0 <= config.step_timeout < float("inf"):
        raise ConfigError(
            f"config.step_timeout is {config.step_timeout}; expected seconds, or 0 for no limit"
        )
    for section in SECTIONS.keys() & config.keys():
        _check_section(config, section)
    if not 0 <= config.data.val_share < 1:
        raise ConfigError(
            f"config.data.val_share is {config.data.val_share}; expected a share in [0, 1)"
        )


def _check_section(config: ConfigDict, name: str) -> None:
    section = config[name]
    for key, choices in SECTION_CHOICES.items():
        if key in section and section[key] not in choices:
            found = f"config.{name}.{key} is {section[key]!r}"
            raise ConfigError(f"{found}; expected one of {choices}")
    for key, (low, high) in SECTION_BETWEEN[name].items():
        if not low < section[key] < high:
            bounds = [f"over {low}"] * (low > -math.inf) + [f"under {high}"] * (high < math.inf)
            found = f"config.{name}.{key} is {section[key]}"
            raise ConfigError(f"{found}; expected {' and '.join(bounds)}")
    for key, least in SECTION_LEAST.items():
        if key in section and not least <= section[key] < float("inf"):
            why = ": an answer is compared with others of its group" if key == "group" else ""
            found = f"config.{name}.{key} is {section[key]}"
            raise ConfigError(f"{found}; expected {least} or more{why}")
    if name == "dpo":
        return
    if not 0 < section.top_p <= 1:
        raise ConfigError(f"config.rl.top_p is {section.top_p}; expected a share in (0, 1]")
    for key in ("temperature", "top_p"):
        if section.method == "grpo" and section[key] != 1:
            raise ConfigError(
                f"config.rl.{key} is {section[key]}; config.rl.method='grpo' takes 1 alone, since "
                "its update takes answers to be samples of the policy itself"
            )
    rates = config.optimizer
    if section.updates > 1 and (
        rates.warmup_steps or rates.final_learning_rate != rates.learning_rate
    ):
        raise ConfigError(
            f"config.rl.updates={section.updates} takes a constant learning rate, since a schedule "
            "counts updates and a run counts steps; set config.optimizer.warmup_steps to 0 and "
            "config.optimizer.final_learning_rate to config.optimizer.learning_rate"
        )
    if (section.reward == "sentiment") != (section.question == "sentiment"):
        raise ConfigError(
            f"config.rl.reward={section.reward!r} does not fit config.rl.question="
            f"{section.question!r}: sentiment is rewarded as sentiment, and labels by wheels"
        )


def _check_mix(config: ConfigDict) -> None:
    for name, entry in config.data.mixture.items():
        where = f"{MIX}.{name}"
        if not isinstance(entry, ConfigDict):
            raise ConfigError(f"{where} is {entry!r}; expected data_set(...)")
        _check_keys(entry, affectgpt_qwen25_7b.data_set(""), where)
        if not entry.source:
            raise ConfigError(f"{where}.source is empty; name records, or 'demo'")
        if not 0 < entry.weight < float("inf"):
            raise ConfigError(f"{where}.weight is {entry.weight}; expected a number over 0")
        if not 0 < entry.share <= 1:
            raise ConfigError(f"{where}.share is {entry.share}; expected a share in (0, 1]")
        _check_label(f"{where}.label", entry.label or config.label)
        _check_input(f"{where}.input", entry.input or config.input)
    if config.data.mixture and config.data.train:
        raise ConfigError(
            f"config.data.train={config.data.train!r} and {MIX} both name training sets; use one"
        )


def _check_label(where: str, label: str) -> None:
    try:
        parse_label(label)
    except PromptError as error:
        raise ConfigError(f"{where}: {error}") from None


def _check_input(where: str, name: str) -> None:
    if name not in INPUT_MODES:
        raise ConfigError(f"{where} is {name!r}; expected one of {sorted(INPUT_MODES)}")


def _get(config: ConfigDict, key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


def _check_keys(found: ConfigDict, schema: ConfigDict, where: str) -> None:
    if where == MIX:
        return
    for key in found:
        if key not in schema:
            raise _unknown_key(where, key, schema)
    for key, default in schema.items():
        if key not in found:
            raise ConfigError(f"{where}.{key} is missing; the paper's recipe has {_plain(default)}")
        value = found[key]
        if isinstance(default, ConfigDict) and isinstance(value, ConfigDict):
            _check_keys(value, default, f"{where}.{key}")
        elif type(value) is not type(default):
            raise ConfigError(
                f"{where}.{key} is {_plain(value)}, of type {type(value).__name__}; "
                f"expected {type(default).__name__}, as in {_plain(default)}"
            )
        # A config file can say what no flag can, and 1e999 is infinite to Python.
        elif type(value) is float and not math.isfinite(value):
            raise ConfigError(f"{where}.{key} is {value}; expected a finite number")
        elif type(value) is int and abs(value) > MAX_COUNT:
            raise ConfigError(f"{where}.{key} is {shorten(value)}; at most {MAX_COUNT:,} is taken")


def _plain(value: Any) -> str:
    """In one line; a ConfigDict shows itself in many."""
    return repr(value.to_dict() if isinstance(value, ConfigDict) else value)


def save_config(config: ConfigDict, workdir: Path) -> None:
    """Write the config of a run to `workdir/config.json`, unless it resumes one."""
    path = workdir / "config.json"
    if not (saved_steps(workdir) and path.exists()):
        write_json(path, json.loads(config.to_json()))


def saved_steps(workdir: Path) -> list[int]:
    """The steps of the checkpoints that a workdir has."""
    folder = workdir / "checkpoints"
    return [int(entry.name) for entry in folder.glob("*") if entry.name.isdigit()]


def check_same_run(config: ConfigDict, workdir: Path) -> None:
    """Compare the config with that of the run that it would resume, `workdir/config.json`.

    A run that saved no checkpoint, such as one that a wrong setting stopped, has nothing to resume.

    Raises:
        ConfigError: the workdir holds a run with other settings, of which the message names the
            first, or one that is further than this one is to go.
    """
    path = workdir / "config.json"
    saved = saved_steps(workdir)
    if not (saved and path.exists()):
        return
    mine = dict(_leaves(json.loads(config.to_json())))
    theirs = dict(_leaves(read_json(path, dict[str, Any], error=ConfigError)))
    if config.optimizer.learning_rate == config.optimizer.final_learning_rate:
        theirs["steps"] = mine["steps"]  # a constant rate does not depend on the run's length
    if SECTIONS.keys() & config.keys():
        theirs["batch_size"] = mine["batch_size"]  # follows from the section and the devices
    for key in sorted(mine.keys() | theirs.keys()):
        free = any(f"{key}.".startswith(f"{prefix}.") for prefix in FREE_ON_RESUME)
        if not free and mine.get(key) != theirs.get(key):
            raise ConfigError(
                f"{workdir} holds a run with config.{key}={theirs.get(key)!r}, but now it is "
                f"{mine.get(key)!r}; use another --workdir, or the same settings to resume"
            )
    if max(saved) > config.steps:
        raise ConfigError(
            f"{workdir} holds a run of {max(saved)} steps, but config.steps is {config.steps}; "
            "name at least as many, or use another --workdir"
        )


def described(config: ConfigDict) -> dict[str, str]:
    """Every key of a config, as "config.KEY", and its value, as text."""
    return {f"config.{key}": repr(value) for key, value in _leaves(config.to_dict())}


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
