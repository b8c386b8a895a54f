"""A web page and an API that ask a trained run about clips.

    affectgpt serve --workdir runs/demo
    affectgpt serve --workdir runs/mine --port 8080 --batch-size 32

The page shows a record of the run, or a video or sound that is dropped on it; the answer as it is
written, its labels on emotion wheels, and the truth where there is one. Files can be dropped where
the run's records were made by affectgpt extract, whose encoders are then loaded too.

Scripts ask /v1/chat/completions, in the form of OpenAI's API: docs/serving.md has examples. Answers
are those of affectgpt predict. All requests share a batch: one that comes late joins those that are
being answered.

By default only this machine can connect. There is no password: with another --host, whoever reaches
that address can ask, and can have files decoded here.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import ipaddress
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from affectgpt_jax import cli
from affectgpt_jax.common.errors import UserError
from affectgpt_jax.common.progress import QUIET_S, Elapsed
from affectgpt_jax.common.text import say

from .clips import Clip
from .encoders import MISSING, EncoderError
from .settings import add_encoder_flags

# What runs a model is imported where it is used: processes that decode read this file as well, and
# stay small.
if TYPE_CHECKING:
    import uvicorn

    from affectgpt_jax.data.records import Records
    from affectgpt_jax.live import LiveAnswers
    from affectgpt_jax.restore import Run
    from affectgpt_jax.web import Look, Seen, Service

    from .extractor import Extraction, Extractor

# Answers at a time.
ROWS = 8
MIB = 2**20
# After Ctrl-C, what is being sent has so long to end.
GRACE_S = 3
# More are told to come later; a process may have 1,024 files open.
CONNECTIONS = 512


class ServeError(UserError, RuntimeError):
    """A server that cannot be started."""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        SystemExit: after printing the help, or one sentence about what is wrong.
    """
    from affectgpt_jax import asking, restore

    parser = cli.make_parser("affectgpt serve", __doc__)
    add = parser.add_argument
    restore.add_run_flags(parser)
    add("--step", type=int, metavar="N", help="of the checkpoint; default: the best on validation")
    add("--records", metavar="DIR", help="clips, as config.data.test; default: that of the run")
    add("--lexicon", metavar="DIR", help="of the emotion wheels; default: the shipped ones")
    add("--host", default="127.0.0.1", help="address to listen on; default: this machine alone")
    add("--port", type=int, default=8000, metavar="N", help="default: 8000; 0 takes a free one")
    add(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="by which the server may be asked, beside addresses and localhost; repeatable",
    )
    add(
        "--batch-size",
        type=int,
        default=ROWS,
        metavar="N",
        help=f"answers at a time; default: {ROWS}",
    )
    asking.add_sampling_flags(parser)
    add = parser.add_argument_group("limits").add_argument
    add("--max-new-tokens", type=int, metavar="N", help="of an answer; default: the run's")
    add(
        "--max-prompt-tokens",
        type=int,
        metavar="N",
        help="of clip, subtitle and question; default: config.max_tokens of the run",
    )
    add("--max-upload", type=int, default=100, metavar="MIB", help="of a file; default: 100")
    add("--max-seconds", type=float, default=60, metavar="S", help="of a clip; default: 60")
    add("--queue", type=int, default=64, metavar="N", help="requests that may wait; default: 64")
    add("--timeout", type=float, default=300, metavar="S", help="of a whole request; default: 300")
    add = parser.add_argument_group("files that are dropped").add_argument
    add("--no-upload", action="store_true", help="none; no encoders are loaded")
    add_encoder_flags(add)
    arguments = restore.parse_run_flags(parser, argv)
    names = ("step", "batch_size", "max_new_tokens", "max_prompt_tokens", "max_upload", "queue")
    asking.check_least_one(parser, arguments, *names)
    for name in ("max_seconds", "timeout"):
        if not getattr(arguments, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be over 0")
    if not 0 <= arguments.port < 2**16:
        parser.error(f"--port is {arguments.port}; expected 0 to 65535")
    if arguments.no_upload and names_encoders(arguments):
        parser.error(
            "--no-upload loads no encoders; leave out --video, --audio, --face-detector, "
            "--trained-on"
        )
    asking.check_sampling_flags(parser, arguments)
    return arguments


def serve(arguments: argparse.Namespace) -> None:
    """Load a run and answer requests until Ctrl-C.

    Raises:
        UserError: before any weights are read: a package, an address, a run or clips that cannot be
            used.
        KeyboardInterrupt: at the end.
    """
    for package in ("starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise ServeError(
                f"the package {package} is missing: pip install 'affectgpt-jax[serve]'"
            )
    with contextlib.closing(listen(arguments.host, arguments.port)) as listening:
        with contextlib.ExitStack() as stack:
            service = make_service(arguments, stack)
            listen_until_interrupted(service, [arguments.host, *arguments.allow_host], listening)


def listen(host: str, port: int) -> socket.socket:
    """A socket that holds an address, so that nobody else takes it while weights are read.

    Raises:
        ServeError: it is in use, or not one of this machine.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        holding = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ServeError(f"--host={host}: {error.strerror or error}") from None
    try:
        holding.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holding.bind(address)
    except OSError as error:
        holding.close()
        raise ServeError(
            f"port {port} of {host}: {error.strerror}; name another --port, or 0 for a free one"
        ) from None
    return holding


def make_service(arguments: argparse.Namespace, stack: contextlib.ExitStack) -> Service:
    """What is served, with the model running and warm.

    Args:
        arguments: of `parse_arguments`.
        stack: which ends the model.

    Raises:
        UserError: as `serve`.
    """
    # What serves is an extra, which the help does without.
    from affectgpt_jax import asking, restore, web
    from affectgpt_jax.evaluation.lexicon import load_lexicon, read_source
    from affectgpt_jax.live import Engine

    lexicon, source = load_lexicon(arguments.lexicon), read_source(arguments.lexicon)
    run = restore.open_from_flags(arguments)
    how, why_not = files_of(run, arguments)
    say(f"files can be dropped: {how.encoder_names}" if how else f"note: {why_not}")
    if how and not arguments.records and not asking.has_test_set(run):
        if run.config.data.test:
            say(f"note: the test set of the run, {run.config.data.test}, is not here: files alone")
        clips: Records = how.as_records([])
    else:
        clips = asking.open_clips(run, arguments.records)
    asking.report_missing(run, clips)
    say(f"{run.title}; input {run.processor.mode.name}; {len(clips):,} records")
    run = run.with_weights()
    look = None
    if how:
        from .decoding import LIMIT_S
        from .extractor import Extractor

        with Elapsed("reading the encoders", stream=sys.stderr, quiet_s=QUIET_S):
            limits = arguments.max_seconds, min(arguments.timeout, LIMIT_S)
            look = look_with(Extractor(how, 1, *limits))
    live = make_live(run, clips, arguments)
    with Elapsed("compiling", stream=sys.stderr, quiet_s=QUIET_S):
        live.warm_up()
    lengths = ", ".join(map(str, live.lengths))
    say(f"warm: {live.rows} answers at a time, prompts of {lengths} tokens; no more to compile")
    engine = Engine(live, queue=arguments.queue, timeout_s=arguments.timeout)
    stack.callback(engine.stop)
    return web.Service(
        run,
        clips,
        engine,
        sampling=arguments.sampling,
        seed=arguments.seed,
        lexicon=lexicon,
        source=source,
        limits=web.Limits(arguments.max_upload * MIB, arguments.timeout),
        look=look,
        why_not=why_not,
    )


def make_live(run: Run, clips: Records, arguments: argparse.Namespace) -> LiveAnswers:
    """What writes answers, before it is warm."""
    from affectgpt_jax import asking
    from affectgpt_jax.data.packing import round_up
    from affectgpt_jax.data.pipeline import feature_shapes
    from affectgpt_jax.live import LiveAnswers

    most = arguments.max_prompt_tokens or run.config.max_tokens
    generator = asking.generator_from_flags(run, clips, arguments)
    return LiveAnswers(
        generator,
        run.trainable,
        rows=arguments.batch_size,
        lengths={int(round_up(most >> i)) for i in range(run.config.num_buckets)},
        shapes=feature_shapes(run.processor.features, [clips]),
    )


# --- files --------------------------------------------------------------------------------------


def names_encoders(arguments: argparse.Namespace) -> bool:
    """Whether the command line says by what files are extracted, so that failing at it is wrong."""
    named = arguments.video, arguments.audio, arguments.face_detector, arguments.trained_on
    return any(named)


def files_of(run: Run, arguments: argparse.Namespace) -> tuple[Extraction | None, str]:
    """How files become clips of the run; or else a sentence that says why they cannot.

    Raises:
        UserError: encoders that were named, and cannot be used.
    """
    if arguments.no_upload:
        return None, "files cannot be dropped: the server was started with --no-upload"
    try:
        from .extractor import extraction_of

        how = extraction_of(
            run,
            arguments.trained_on,
            encoders={"video": arguments.video, "audio": arguments.audio},
            face_detector=arguments.face_detector,
            device=arguments.device,
            download=arguments.download,
        )
    except ModuleNotFoundError as error:
        why = MISSING.format(error.name)
        if names_encoders(arguments):
            raise EncoderError(why) from None
    except UserError as error:
        if names_encoders(arguments):
            raise
        why = str(error)
    else:
        for remark in how.remarks():
            say(f"note: {remark}")
        return how, ""
    return None, f"files cannot be dropped: {why}"


def look_with(extractor: Extractor) -> Look:
    """What reads a file for the page: `web.Look`."""
    from affectgpt_jax.web import Seen

    def look(name: str, files: Mapping[str, Path], stop: threading.Event) -> Seen:
        [found] = extractor([Clip(name, **files)], stop=stop)
        notes = [found.reason] if found.problems else []
        if found.silent:
            notes.append("its sound is silence")
        inputs = dict(found.inputs)
        sound = inputs.pop("audio", None)
        return Seen(found.record, notes, _facts(found.facts), inputs, sound)

    return look


def _facts(facts: Mapping[str, Any]) -> dict[str, str]:
    """What people want to know of a file."""
    from .faces import SEARCHED

    found = {}
    if facts.get("seconds"):
        found["length"] = f"{facts['seconds']:.1f} s"
    if facts.get("width"):
        found["size"] = f"{facts['width']} x {facts['height']}, {facts['frames']} frames"
    if "faces" in facts:
        found["faces"] = f"in {facts['faces']} of {min(SEARCHED, facts['frames'])} frames"
    return found


# --- the server ---------------------------------------------------------------------------------


def listen_until_interrupted(
    service: Service, hosts: Sequence[str], listening: socket.socket
) -> None:
    """Answer requests until Ctrl-C.

    Args:
        service: what is served.
        hosts: as for `web.make_app`.
        listening: the socket.

    Raises:
        KeyboardInterrupt: then.
    """
    server = make_server(service, hosts)
    host, port, *_ = listening.getsockname()
    if not ipaddress.ip_address(host).is_loopback:
        say(
            f"note: {host} is no loopback address: whoever reaches it can ask this run, without a "
            "password or encryption"
        )
    listening.listen()  # who reads the next line may connect at once
    shown = f"[{host}]" if ":" in host else host
    say(f"http://{shown}:{port} (Ctrl-C ends it)")
    server.run(sockets=[listening])


def make_server(service: Service, hosts: Sequence[str]) -> uvicorn.Server:
    """A server, at whose end answers that are being written end first."""
    import uvicorn

    from affectgpt_jax.web import make_app

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            service.begin_close()
            await super().shutdown(sockets)

    config = uvicorn.Config(
        make_app(service, hosts),
        http="h11",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=GRACE_S,
    )
    return Server(config)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; see `cli.exit_on_error`."""
    with cli.exit_on_error(
        interrupted="ended",
        out_of_memory="pass a smaller --batch-size, or --device cpu for the encoders",
    ):
        arguments = parse_arguments(argv)
        from affectgpt_jax.restore import set_up_process

        set_up_process()
        serve(arguments)


if __name__ == "__main__":
    from affectgpt_jax import cpu
    from affectgpt_jax.training.checkpoints import silence_threads

    silence_threads()
    cpu.keep_freed_memory()
    main()
