"""Ask a trained run about videos: what does the person feel, and why?

    affectgpt describe talk.mp4 --workdir runs/mine
    affectgpt describe talk.mp4 --workdir runs/mine \\
        --subtitle "I am fine." --show pictures
    affectgpt describe recordings voice.wav --workdir runs/mine \\
        --subtitles recordings --out answers.jsonl

Every file is decoded, searched for faces and encoded as the clips were that the run was trained on,
by the encoders that its records name; then it is asked as `affectgpt predict` asks. Nothing is
written unless it is asked for. Files NAME.mp4 and NAME.wav of one folder are pictures and sound of
one clip; of folders, all videos and sounds below count.

A clip that lacks a modality, as a recording of sound alone does, is answered without it, and a note
says why. Of a clip that cannot be read at all a line says so; the others are answered, and the exit
status is 1. With --json a line of JSON per clip comes to the standard output, with --out into a
file:

    {"name", "files", "subtitle", "answers", "features", "missing", "facts",
     "refused"}

where answers are as predict has them, features those that the run was given, missing the reasons
for others, facts those of the files (frames, faces among the frames that were searched, width,
height, seconds, whether all sound is silence), and refused why there are no answers, or "".

Folders of thousands of clips are better extracted once (affectgpt extract) and asked about by
predict, which both go on where they stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from affectgpt_jax import cli
from affectgpt_jax.common.errors import UserError
from affectgpt_jax.common.files import path_below
from affectgpt_jax.common.progress import QUIET_S, Counter, Elapsed
from affectgpt_jax.common.text import json_line, one_line, print_lines, say

from .clips import ClipError, named_clips
from .encoders import MISSING, PRECISIONS, EncoderError
from .settings import add_encoder_flags

# What runs a model is imported where it is used: processes that decode read this file as well, and
# stay small.


class DescribeError(UserError, RuntimeError):
    """An output that cannot be written, or clips without an answer."""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        SystemExit: after printing the help, or one sentence about what is wrong.
    """
    from affectgpt_jax import asking, restore

    parser = cli.make_parser("affectgpt describe", __doc__)
    add = parser.add_argument
    add("files", nargs="+", type=_path, metavar="FILE", help="videos, sounds, or folders of them")
    restore.add_run_flags(parser)
    add("--step", type=int, metavar="N", help="of the checkpoint; default: the best on validation")
    said = parser.add_mutually_exclusive_group()
    said.add_argument("--subtitle", metavar="TEXT", help="what is said in the one clip")
    said.add_argument(
        "--subtitles",
        type=_path,
        metavar="PLACE",
        help="a CSV file with columns name and subtitle, or a folder of NAME.srt, .vtt or .txt",
    )
    add_encoder_flags(add)
    add("--faces", type=_path, metavar="DIR", help="OpenFace's arrays NAME.npy; default: detect")
    precisions = PRECISIONS["cuda"]
    add("--precision", choices=precisions, help="of the encoders; default: as for the records")
    add("--workers", type=int, metavar="N", help="processes that decode ahead; default: one a core")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--json", action="store_true", help="a line of JSON per clip")
    where.add_argument("--out", type=_path, metavar="FILE", help="the same into a file, a new one")
    add("--show", type=_path, metavar="DIR", help="a picture per clip: frames, faces and sound")
    add("--verbose", action="store_true", help="say what was found in each clip")
    asking.add_answer_flags(parser)
    arguments = restore.parse_run_flags(parser, argv)
    asking.check_least_one(parser, arguments, "step", "workers")
    asking.check_answer_flags(parser, arguments)
    return arguments


def _path(text: str) -> Path:
    return Path(text).expanduser()


def describe(arguments: argparse.Namespace) -> None:
    """Answer every question about every clip.

    Raises:
        DescribeError: a clip that cannot be read; all others have been answered.
        UserError: before any weights are read: a run, files, a question or an output that cannot
            be used.
    """
    from affectgpt_jax import asking
    from affectgpt_jax.data.records import Record
    from affectgpt_jax.evaluation.lexicon import load_lexicon
    from affectgpt_jax.evaluation.rewards import Wheels
    from affectgpt_jax.outcomes import prompt_length
    from affectgpt_jax.restore import open_from_flags

    from .extractor import Extractor, extraction_of
    from .subtitles import SIDECARS

    asking.check_questions(arguments.question or (), arguments.consensus)
    wheels = Wheels(load_lexicon(arguments.lexicon)) if arguments.consensus else None
    if arguments.out and arguments.out.exists():
        raise DescribeError(f"--out={arguments.out} exists already; name another file")
    named = named_clips(arguments.files, arguments.faces)
    clips = named.clips
    if arguments.subtitles and arguments.subtitles.is_dir():
        other = [name for name in named.other if Path(name).suffix.lower() not in SIDECARS]
        named = dataclasses.replace(named, other=other)
    for remark in named.remarks():
        say(f"note: {remark}")
    subtitles = subtitles_of(arguments, [clip.name for clip in clips])
    if arguments.show:
        pictures = {c.name: path_below(arguments.show, f"{c.name}.png") for c in clips}
    run = open_from_flags(arguments)
    how = extraction_of(
        run,
        arguments.trained_on,
        encoders={"video": arguments.video, "audio": arguments.audio},
        face_detector=arguments.face_detector,
        device=arguments.device,
        precision=arguments.precision,
        download=arguments.download,
    )
    say(f"{run.title}; input {run.processor.mode.name}; {how.encoder_names}")
    for remark in how.remarks(any(clip.faces for clip in clips)):
        say(f"note: {remark}")
    default = asking.AGREEABLE if wheels else asking.DEFAULT_QUESTIONS
    questions = asking.choose_questions(run, arguments.question, default)
    without = [clip.name for clip in clips if not subtitles.get(clip.name)]
    if run.processor.mode.text and without:
        say(f"note: {len(without):,} of {len(clips):,} clips have no subtitle (--subtitle)")
    # Trouble with a question shows now, not after the encoders.
    unseen = how.as_records(
        [Record(name=c.name, subtitle=subtitles.get(c.name, ""), features={}) for c in clips]
    )
    longest = prompt_length(run.processor, questions, [unseen])
    size = min(arguments.batch_size or run.config.generate.batch_size, len(clips))
    refused, done = [], 0
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open_outputs(arguments.out, arguments.show))
        run = run.with_weights()
        with Elapsed("reading the encoders", stream=sys.stderr, quiet_s=QUIET_S):
            extractor = Extractor(how, arguments.workers)
        generator = asking.generator_from_flags(
            run,
            unseen,
            arguments,
            questions=len(questions),
            group=arguments.consensus or 1,
            # Clips come a few at a time, for which one program is compiled.
            prompt_length=longest if len(clips) > 1 else None,
        )
        count = stack.enter_context(Counter("clips", stream=sys.stderr, enabled=len(clips) > size))
        found = stack.enter_context(contextlib.closing(extractor(clips, subtitles)))
        while done < len(clips):
            with Elapsed("extracting", stream=sys.stderr, quiet_s=QUIET_S):
                part = [next(found) for _ in range(min(size, len(clips) - done))]
            for extracted in part:
                report(extracted, arguments.verbose)
                if arguments.show and extracted.inputs:
                    draw(pictures[extracted.clip.name], extracted)
            records = [extracted.record for extracted in part if extracted.record]
            refused += [extracted.clip.name for extracted in part if not extracted.record]
            asked = how.as_records(records)
            if arguments.json or file:
                answers: dict[str, list[Any]] = {}
                if records:
                    for name, question, answer in asking.ask(
                        run, generator, asked, questions, wheels, ()
                    ):
                        line = asking.as_dict(run, name, question, answer)
                        answers.setdefault(name, []).append(line)
                for extracted in part:
                    line = as_dict(extracted, answers.get(extracted.clip.name, []))
                    print(json_line(asking.to_json(line)), file=file, flush=True)
            elif records:
                asking.show(run, generator, asked, questions, wheels)
            done += len(part)
            count(done, len(clips))
    if refused:
        more = f" and {len(refused) - 1:,} more" if len(refused) > 1 else ""
        raise DescribeError(
            f"{one_line(refused[0])}{more} of {len(clips):,} clips: not answered, as said above"
        )


@contextlib.contextmanager
def open_outputs(out: Path | None, show: Path | None) -> Iterator[IO[str] | None]:
    """The file of `--out`, a new one, and the folder of `--show`.

    What stays of the file are its whole lines; without one it goes, so that the same command can be
    run again.

    Raises:
        DescribeError: one of them cannot be written to.
    """
    try:
        if show:
            show.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=show):
                pass
        # Whole lines are there already when somebody ends it.
        file = open(out, "x", encoding="utf-8") if out else None
    except OSError as error:
        flag, expected = f"--show={show}", "a folder that can be written to"
        if error.filename == str(out):
            flag, expected = f"--out={out}", "a new file in a folder that can be written to"
        raise DescribeError(
            f"{flag} cannot be written to ({error.strerror}); expected {expected}"
        ) from None
    try:
        yield file
    finally:
        if file:
            # Each line was flushed: what is left to write is what could not be written, as on a
            # full disk, which may have taken a part of it.
            with contextlib.suppress(OSError):
                file.close()
            with contextlib.suppress(FileNotFoundError):
                if whole := out.read_bytes().rfind(b"\n") + 1:
                    os.truncate(out, whole)
                else:
                    out.unlink()


def subtitles_of(arguments: argparse.Namespace, names: Sequence[str]) -> Mapping[str, str]:
    """The subtitles of clips, of those that have one.

    Raises:
        UserError: one text for several clips, or a place without any subtitle of theirs.
    """
    from .subtitles import read_subtitles

    if arguments.subtitle is not None:
        if len(names) > 1:
            raise ClipError(
                f"--subtitle is for one clip, and there are {len(names):,}; give --subtitles a CSV "
                "file, or a folder of NAME.srt, .vtt or .txt"
            )
        return {names[0]: arguments.subtitle}
    if arguments.subtitles is None:
        return {}
    found, how = read_subtitles(arguments.subtitles, names)
    if how:
        say(f"subtitles: {how}")
    return found


def report(extracted: Any, verbose: bool) -> None:
    """Say what was found in a clip, as far as it is trouble or asked for."""
    name = extracted.clip.name
    if not extracted.record:
        say(f"{name}: not answered: {extracted.reason}")
    elif extracted.problems:
        say(f"note: {name}: {extracted.reason}; answered without")
    if extracted.silent:
        say(f"note: {name}: its sound is silence")
    if verbose:
        print_lines([f"{name}: {', '.join(facts(extracted)) or 'nothing found'}"], sys.stderr)


def facts(extracted: Any) -> Iterator[str]:
    """What was found in a clip, in words."""
    known = extracted.facts
    if "frames" in known:
        yield f"{known['frames']:,} frames of {known['width']} x {known['height']}"
    if "faces" in known:
        from .faces import SEARCHED

        # Of arrays there may be any number.
        of = f" of {min(SEARCHED, known['frames'])}" if extracted.clip.faces is None else ""
        yield f"a face in {known['faces']:,}{of} searched frames"
    if "seconds" in known:
        yield f"{known['seconds']:.2f} s"
    if given := ", ".join(extracted.inputs):
        yield f"given: {given}"
    if extracted.record:
        yield f"subtitle: {extracted.record.subtitle or 'none'}"


def as_dict(extracted: Any, answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A line of the output; the module's docstring says what the keys mean."""
    clip, record = extracted.clip, extracted.record
    files = {"video": clip.video, "audio": clip.audio, "faces": clip.faces}
    return {
        "name": clip.name,
        "files": {kind: str(path) for kind, path in files.items() if path},
        "subtitle": record.subtitle if record else "",
        "answers": [{k: v for k, v in answer.items() if k != "name"} for answer in answers],
        "features": list(record.features) if record else [],
        "missing": dict(extracted.problems),
        "facts": {**extracted.facts, "silent": extracted.silent},
        "refused": "" if record else extracted.reason,
    }


def draw(path: Path, extracted: Any) -> None:
    """Write the picture of a clip."""
    from .picture import draw_clip

    lines = [one_line(line) for line in [", ".join(facts(extracted))]]
    draw_clip(path, extracted.clip, extracted.inputs, extracted.problems, lines)
    say(f"{path}: what the run was given")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; see `cli.exit_on_error`."""
    out: Path | None = None
    with cli.exit_on_error(
        out_of_memory="pass a smaller --batch-size, or --device cpu for the encoders",
        os_error=lambda error: cli.describe_os_error(error, out),
    ):
        try:
            arguments = parse_arguments(argv)
            out = arguments.out
            from affectgpt_jax.restore import set_up_process

            set_up_process()
            describe(arguments)
        except ModuleNotFoundError as error:
            raise EncoderError(MISSING.format(error.name)) from None


if __name__ == "__main__":
    from affectgpt_jax import cpu
    from affectgpt_jax.training.checkpoints import silence_threads

    silence_threads()
    cpu.keep_freed_memory()
    main()
