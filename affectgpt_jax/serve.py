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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from affectgpt_jax import asking, cli, cpu
from affectgpt_jax.common.errors import UserError
from affectgpt_jax.common.progress import QUIET_S, Elapsed
from affectgpt_jax.common.text import print_lines, say
from affectgpt_jax.data.packing import round_up
from affectgpt_jax.data.pipeline import feature_shapes
from affectgpt_jax.evaluation.lexicon import load_lexicon, read_source
from affectgpt_jax.live import Engine, LiveAnswers
from affectgpt_jax.restore import (
    OUT_OF_MEMORY,
    Run,
    add_allow_other,
    add_merge_lora,
    open_run,
    set_up_process,
)
from affectgpt_jax.training.checkpoints import silence_threads

# Answers at a time; a request waits for the slowest prompt of those that join with it.
ROWS = 8
MIB = 2**20
# After Ctrl-C, what is being sent has so long to end.
GRACE_S = 3


class ServeError(UserError, RuntimeError):
    """A server that cannot be started."""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        SystemExit: after printing the help, or one sentence about what is wrong.
    """
    parser = cli.make_parser("affectgpt serve", __doc__)
    add = parser.add_argument
    add(
        "--workdir",
        required=True,
        type=lambda text: Path(text).expanduser(),
        metavar="RUN",
        help="directory of a training run",
    )
    add("--step", type=int, metavar="N", help="of the checkpoint; default: the best on validation")
    add("--config.llm", dest="llm", default="", metavar="DIR", help="where the base is now")
    add("--config.mesh", dest="mesh", default="", metavar="MESH", help="devices, if not the run's")
    add_merge_lora(parser)
    add_allow_other(parser, ["prompts"])
    add("--records", metavar="DIR", help="clips, as config.data.test; default: that of the run")
    add("--lexicon", metavar="DIR", help="of the emotion wheels; default: the shipped ones")
    add("--host", default="127.0.0.1", help="address to listen on; default: this machine alone")
    add("--port", type=int, default=8000, help="default: 8000; 0 takes a free one")
    add(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name by which the server is asked, beside addresses and localhost; repeatable",
    )
    add("--temperature", type=float, default=0.0, metavar="T", help="default: 0, no sampling")
    add("--top-p", type=float, default=1.0, metavar="P", help="share to sample from; default: 1")
    add("--repetition-penalty", type=float, default=1.0, metavar="X", help="default: 1, none")
    add("--seed", type=int, default=0, help="of sampling, where a request has none; default: 0")
    add("--batch-size", type=int, default=ROWS, metavar="N", help=f"answers at a time; {ROWS}")
    limits = parser.add_argument_group("limits")
    add = limits.add_argument
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
    add("--timeout", type=float, default=300, metavar="S", help="of a request; default: 300")
    encoders = parser.add_argument_group("encoders of files that are dropped")
    add = encoders.add_argument
    for kind, what in (("video", "faces and frames"), ("audio", "sound")):
        text = f"where the weights for {what} are; default: where they were, or the hub's cache"
        add(f"--{kind}", metavar="DIR", help=text)
    add("--device", choices=("cpu", "cuda"), help="of the encoders; default: as for the records")
    add("--download", action="store_true", help="get encoders that are not in the hub's cache")
    add("--no-upload", action="store_true", help="records only; loads no encoders")
    arguments = parser.parse_args(argv)
    names = ("step", "batch_size", "max_new_tokens", "max_prompt_tokens", "max_upload", "queue")
    asking.check_least_one(parser, arguments, *names)
    for name in ("max_seconds", "timeout"):
        if not getattr(arguments, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be over 0")
    if not 0 <= arguments.port < 2**16:
        parser.error(f"--port is {arguments.port}; expected 0 to 65535")
    asking.check_sampling(parser, arguments)
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
    # What serves is an extra, which the help does without.
    from affectgpt_jax import web

    with contextlib.closing(listen(arguments.host, arguments.port)) as listening:
        lexicon, source = load_lexicon(arguments.lexicon), read_source(arguments.lexicon)
        run = open_run(
            arguments.workdir,
            arguments.step,
            llm=arguments.llm,
            mesh=arguments.mesh,
            merge_lora=arguments.merge_lora,
            allow_other=arguments.allow_other,
        )
        clips = asking.open_clips(run, arguments.records)
        asking.report_missing(run, clips)
        look, why_not = None, "this server was started with --no-upload"
        run = run.with_weights()
        engine = start_engine(run, clips, arguments)
        try:
            service = web.Service(
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
            listen_until_interrupted(web.make_app(service, arguments.allow_host), listening, engine)
        finally:
            engine.stop()


def listen(host: str, port: int) -> socket.socket:
    """A socket that holds an address, so that others cannot take it while weights are read.

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
            f"{host}, port {port}: {error.strerror}; name another --port, or 0 for a free one"
        ) from None
    return holding


def start_engine(run: Run, clips: asking.Records, arguments: argparse.Namespace) -> Engine:
    """The running model, all of whose programs are compiled."""
    most = int(round_up(arguments.max_prompt_tokens or run.config.max_tokens))
    lengths = sorted({int(round_up(most >> i)) for i in range(run.config.num_buckets)})
    generator = asking.make_generator(
        run,
        clips,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
        sampling=arguments.sampling,
        seed=arguments.seed,
    )
    live = LiveAnswers(
        generator,
        run.trainable,
        rows=arguments.batch_size,
        lengths=lengths,
        shapes=feature_shapes(run.processor.features, [clips]),
    )
    with Elapsed(f"compiling for {live.rows} answers at a time", stream=sys.stderr, quiet_s=QUIET_S):
        live.warm_up()
    sizes = ", ".join(map(str, lengths))
    say(f"warm: {live.rows} answers at a time; prompts of {sizes} tokens; nothing more compiles")
    return Engine(live, queue=arguments.queue, timeout_s=arguments.timeout)
