"""What scripts and notebooks call: `from affectgpt_jax import run_training, load_run`.

    config = get_config("demo", steps=120)
    result = run_training(config, "runs/demo")
    run = load_run("runs/demo")
    for answer in ask_clips(run, "ovlabel", first=3):
        print(answer["name"], answer["labels"])
    report = evaluate_run(run, max_clips=64)
    print(report.sets[0].fixed.score.values)
    files = "runs/demo/predictions.jsonl", "runs/demo/truth.csv"
    print(score_files("words", *files)[0].score.values)

Each function does what the command of its name does, with the same checks, and says the same while
it works. What a user can mend is a `UserError`. Modules are imported when a function needs them:
`score_files` loads no JAX.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from affectgpt_jax.common.errors import UserError
from affectgpt_jax.common.text import print_lines

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from affectgpt_jax.asking import ClipAnswer
    from affectgpt_jax.evaluation.results import Result
    from affectgpt_jax.evaluation.summary import Report
    from affectgpt_jax.restore import Run

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

Place = str | PathLike[str]


def get_config(name: Place = "demo", /, **overrides: Any) -> ConfigDict:
    """A config by its file or the name of a shipped one, as `--config` takes it.

    Args:
        name: such as "demo", "affectgpt_qwen25_7b:192" or a path.
        overrides: other values for its keys; those in groups as in
            `**{"optimizer.learning_rate": 1e-3}`.

    Raises:
        ConfigError: an unknown file, key, type or value, in one sentence.
    """
    from affectgpt_jax.config import load_config_file

    return load_config_file(str(name), overrides)


def run_training(
    config: ConfigDict,
    workdir: Place,
    *,
    fallback: bool = False,
    allow_other: Collection[str] = (),
    download: bool = False,
) -> dict[str, Any]:
    """Train, or resume what the workdir holds, and score the held-out clips.

    In a notebook, interrupting the cell saves and ends the run; the same call goes on.

    Args:
        config: of the run, as `get_config` returns it.
        workdir: its directory.
        fallback: go on from an older checkpoint where the newest is damaged.
        allow_other: of "prompts" and "lexicon": go on though it is another one than the run had.
        download: get what is the hub's and not in the hub's cache.

    Returns:
        What `result.json` in the workdir holds.

    Raises:
        UserError: what `affectgpt train` would end with.
        KeyboardInterrupt: it was interrupted, and has saved what it had.
    """
    from affectgpt_jax import config as configs
    from affectgpt_jax import train
    from affectgpt_jax.restore import download_models, set_up_process
    from affectgpt_jax.training.checkpoints import check_path
    from affectgpt_jax.training.stopping import Stopped, lock_workdir

    configs.validate(config)
    if download:
        download_models(config)
    set_up_process()
    place = Path(workdir).expanduser()
    check_path(place)
    with lock_workdir(place):
        try:
            return train.train(config, place, fallback=fallback, allow_other=allow_other)
        except Stopped:
            raise KeyboardInterrupt(f"stopped after saving; {place} goes on from there") from None


def load_run(
    workdir: Place,
    step: int | None = None,
    *,
    llm: Place = "",
    mesh: str = "",
    merge_lora: str = "",
    allow_other: Collection[str] = (),
    download: bool = False,
) -> Run:
    """A trained run, ready to be asked; it may still be training.

    Args:
        workdir: of the run.
        step: of the checkpoint; the best on validation if None.
        llm: the base, if not where the run's config says.
        mesh: devices, if not the run's.
        merge_lora: instead of the run's `generate.merge_lora`.
        allow_other: "prompts": use the run though they are others than it was trained with.
        download: get a base of the hub's that is not in the hub's cache.

    Raises:
        UserError: a workdir without a run, another base, no such or a damaged checkpoint.
    """
    from affectgpt_jax import restore

    restore.set_up_process()
    place = Path(workdir).expanduser()
    how = {"mesh": mesh, "merge_lora": merge_lora, "download": download}
    run = restore.open_run(place, step, llm=str(llm), allow_other=allow_other, **how)
    return run.with_weights()


def load_checkpoint(
    checkpoint: Place,
    config: ConfigDict | None = None,
    *,
    llm: Place = "",
    mesh: str = "",
    merge_lora: str = "",
    download: bool = False,
) -> Run:
    """Trained weights without a training, ready to be asked, as `--checkpoint` takes them.

    Args:
        checkpoint: a `.pth` of the PyTorch release, a PEFT adapter's directory, a run that was
            exported, or one of these on the hub, as "OWNER/NAME" or "hf:OWNER/NAME/FILE".
        config: that a `.pth` or an adapter belongs to, as `get_config` returns it; with the
            prompts that it was trained on. An exported run has its own.
        llm: the base, if not where the config says.
        mesh: devices, if not the config's.
        merge_lora: instead of the config's `generate.merge_lora`.
        download: get what is the hub's and not in the hub's cache.

    Raises:
        UserError: no checkpoint, one that does not fit the config, no base.
    """
    from affectgpt_jax import restore

    restore.set_up_process()
    how = {"mesh": mesh, "merge_lora": merge_lora, "download": download}
    return restore.open_checkpoint(str(checkpoint), config, llm=str(llm), **how).with_weights()


def ask_clips(
    run: Run,
    question: str,
    *,
    records: Place | None = None,
    names: str | Sequence[str] | None = None,
    first: int | None = None,
    max_new_tokens: int | None = None,
    batch_size: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
) -> list[ClipAnswer]:
    """Ask a question about clips, as `affectgpt predict` does.

    Args:
        run: of `load_run` or `load_checkpoint`.
        question: a label type, such as "ovlabel" or "description", or any text.
        records: a record directory; the run's test set if None.
        names: of clips, or of one; all if None.
        first: so many clips instead of names.
        max_new_tokens, batch_size: the run's if None.
        temperature, top_p, repetition_penalty: of sampling; a temperature of 0 does not sample.
        seed: of sampling.

    Returns:
        The answers in the order of the clips.

    Raises:
        UserError: clips, a question or settings that cannot be used.
    """
    from affectgpt_jax import asking
    from affectgpt_jax.models.generate import Sampling

    try:
        sampling = Sampling(temperature, top_p, repetition_penalty)
    except ValueError as error:
        raise asking.PredictError(str(error)) from None
    for what, value in (
        ("first", first),
        ("max_new_tokens", max_new_tokens),
        ("batch_size", batch_size),
    ):
        if value is not None and value < 1:
            raise asking.PredictError(f"{what} is {value}; expected 1 or more")
    asking.check_seed(seed)
    names = [names] if isinstance(names, str) else names
    if names is not None and (first is not None or not len(names)):
        raise asking.PredictError("names is to hold names of clips, and first to be None beside it")
    if names is not None and len(set(names)) < len(names):
        raise asking.PredictError("names has a clip twice")
    asking.check_questions([question])
    place = None if records is None else str(records)
    clips = asking.choose_clips(asking.open_clips(run, place), names, first)
    generator = asking.make_generator(
        run,
        clips,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        sampling=sampling,
        seed=seed,
    )
    answers = generator.answer(run.trainable, clips, question)
    return [
        asking.as_dict(run, entry.name, question, answer)
        for entry, answer in zip(clips.index, answers.each, strict=True)
    ]


def evaluate_run(
    run: Run,
    *,
    sets: Mapping[str, Place] | None = None,
    question: str | None = None,
    steps: Sequence[int | Literal["best", "all"]] = ("best",),
    max_clips: int | None = None,
    lexicon: Place | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    out: Place | None = None,
) -> Report:
    """Answers, labels, scores and a report of a run, as `affectgpt evaluate` makes them.

    Args:
        run: of `load_run` or `load_checkpoint`.
        sets: record directories by NAME or NAME:TASK; the run's own test set if None.
        question: a label type; the first that the run was trained on if None.
        steps: checkpoints by number, "best" or "all".
        max_clips: the first so many of each set.
        lexicon: directory of the official emotion wheels; the shipped ones if None.
        bootstrap: resamples of the intervals; 0 makes none.
        seed: of resampling and of the examples.
        out: where everything is written; `evaluate` in the run's workdir if None; to be named of
            a checkpoint outside a run.

    Raises:
        UserError: what `affectgpt evaluate` would end with.
    """
    from affectgpt_jax import evaluate

    place = "workdir" if run.has_workdir else "checkpoint"
    argv = [f"--{place}={run.workdir}", f"--bootstrap={bootstrap}", f"--seed={seed}"]
    argv += [f"--set={name}={place}" for name, place in (sets or {}).items()]
    given = {"question": question, "max-clips": max_clips, "lexicon": lexicon, "out": out}
    argv += [f"--{flag}={value}" for flag, value in given.items() if value is not None]
    arguments = evaluate.parse_arguments([*argv, "--steps", *map(str, steps)])
    report, _ = evaluate.evaluate_run(run, arguments, lambda text: print_lines([text]))
    return report


def score_files(
    task: Literal["fine", "basic", "sentiment", "words", "preference"],
    predictions: Place | Sequence[Place],
    truth: Place,
    *,
    lexicon: Place | None = None,
    level: Literal[1, 2] = 1,
    missing: Literal["error", "empty"] = "error",
    allow_pickle: bool = False,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Sequence[Result]:
    """The scores of prediction files, as `affectgpt score` computes them; loads no JAX.

    Args:
        task: what the truth is, and how it counts.
        predictions: a file, or one for each checkpoint of a run, the fixed one last.
        truth: the truth file.
        lexicon: directory of the official emotion wheels; the shipped ones if None.
        level: of the wheels.
        missing: "error" stops at clips without a prediction, "empty" scores them as empty.
        allow_pickle: whether pickled plain values of npz files are read.
        bootstrap: resamples of the intervals; 0 makes none.
        seed: of the resampling.

    Returns:
        A result for each prediction file.

    Raises:
        UserError: files that cannot be used, or give no score.
    """
    from affectgpt_jax import score

    files = [predictions] if isinstance(predictions, (str, PathLike)) else predictions
    argv = [f"--task={task}", f"--truth={truth}", f"--missing={missing}"]
    argv += [f"--level={level}"] if level != 1 else []
    argv += [f"--bootstrap={bootstrap}", f"--seed={seed}"]
    argv += [f"--lexicon={lexicon}"] if lexicon is not None else []
    argv += ["--allow-pickle"] if allow_pickle else []
    arguments = score.parse_arguments([*argv, "--predictions", *map(str, files)])
    results, _ = score.score_files(arguments)
    return results
