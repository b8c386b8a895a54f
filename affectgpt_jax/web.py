"""The page and the API of `affectgpt serve`: a Starlette application around a `live.Engine`.

Nothing is served but the three files of the page, which lie in memory, and what is said here of
records and clips. Requests of other hosts' pages are refused, and so are names that lead here by
DNS alone.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import io
import ipaddress
import secrets
import tempfile
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from affectgpt_jax import asking
from affectgpt_jax.chat_api import (
    ChatRequest,
    Reply,
    RequestError,
    error_body,
    event,
    parse_request,
)
from affectgpt_jax.common.errors import UserError
from affectgpt_jax.common.text import brief, shorten
from affectgpt_jax.data.records import Record, Records
from affectgpt_jax.evaluation.lexicon import LEVELS, WHEELS, Lexicon, Source
from affectgpt_jax.live import Busy, Engine, Failed, OutOfTime, Prompt, Stopped, Update
from affectgpt_jax.models.generate import Sampling
from affectgpt_jax.restore import Run

ASSETS = Path(__file__).parent / "assets" / "serve"
# By path: file and type.
PAGE = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
}
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
# Of a request without a file.
SMALL_BODY = 2**20
# Larger ones that are read or decoded at a time; each may be in memory.
FILES_AT_ONCE = 4
# Between two looks whether a client is still there.
POLL_S = 1.0
# Uploaded clips whose features are kept, to be asked again.
CLIPS_KEPT = 32
RECORDS_SHOWN = 100
# Columns of the picture of a feature.
COLUMNS = 96


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one client may take.

    Attributes:
        upload_bytes: of a file.
        timeout_s: of a request, from its first byte to the end of its answer.
    """

    upload_bytes: int
    timeout_s: float


@dataclasses.dataclass(frozen=True, eq=False)
class Seen:
    """What an extractor made of a file.

    Attributes:
        record: None where nothing of it can be used.
        notes: what is missing, and why; or why there is no record.
        facts: of the file, for people: name and value.
        pictures: by feature, what the encoder was given: `[N, H, W, 3]` uint8.
        sound: the same: `[N, samples]` float32; None without sound.
    """

    record: Record | None
    notes: Sequence[str] = ()
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    pictures: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    sound: np.ndarray | None = None


# From a clip's name and its files, by what they are ("video", "audio"), to what is in them. It ends
# soon, with any error, when the event is set.
Look = Callable[[str, Mapping[str, Path], threading.Event], Seen]

Result = TypeVar("Result")


class Service:
    """What the routes share.

    Args:
        run: with its weights.
        clips: that can be asked about by name.
        engine: answers.
        sampling: of the engine.
        seed: of sampling, where a request has none.
        lexicon, source: of the emotion wheels, compiled and as their files have them.
        limits: of requests.
        look: reads files; None where that is not possible.
        why_not: a sentence for people about that; "" where it is possible.
    """

    def __init__(
        self,
        run: Run,
        clips: Records,
        engine: Engine,
        *,
        sampling: Sampling,
        seed: int,
        lexicon: Lexicon,
        source: Source,
        limits: Limits,
        look: Look | None = None,
        why_not: str = "",
    ) -> None:
        self.run, self.clips, self.engine, self.limits = run, clips, engine, limits
        self.model = run.workdir.resolve().name
        self._sampling, self._seed, self._lexicon = sampling, seed, lexicon
        self._look = look
        self._numbers = {entry.name: number for number, entry in enumerate(clips.index)}
        self._uploaded: OrderedDict[str, Record] = OrderedDict()
        self._files = 0
        self._looks: set[threading.Event] = set()  # by which those under way can be ended
        # One at a time: encoders are not for several threads, and take all cores.
        self._looking = ThreadPoolExecutor(1, thread_name_prefix="look")
        # Of long texts it takes a while, in which other requests go on.
        self._prompting = ThreadPoolExecutor(1, thread_name_prefix="prompt")
        self._folder = tempfile.TemporaryDirectory(prefix="affectgpt-serve-")
        trained = run.label_types
        defaults = [kind for kind in asking.DEFAULT_QUESTIONS if kind in trained]
        self._about = {
            "model": self.model,
            "step": run.step_name(run.step),
            "reads": [*run.processor.mode.features, *["subtitle"] * run.processor.mode.text],
            "reads_subtitles": run.processor.mode.text,
            "records": len(clips),
            "questions": list(trained),
            "asked": defaults or list(trained[:1]),
            "can_upload": look is not None,
            # Where the run lies is nobody's business but of those who started the server.
            "why_not": why_not.replace(str(run.workdir), self.model),
            "upload_bytes": limits.upload_bytes,
            "max_new_tokens": engine.live.max_new_tokens,
            "lexicon": lexicon.identity.name,
            "wheels": [_tree(rows) for rows in source.wheels],
        }

    def begin_close(self) -> None:
        """End all answers and the reading of files, without waiting for it."""
        self.engine.begin_stop()
        for stop in self._looks:
            stop.set()

    def close(self) -> None:
        """Remove what was uploaded."""
        self.begin_close()
        self._looking.shutdown(cancel_futures=True)
        self._prompting.shutdown(wait=False, cancel_futures=True)
        self._folder.cleanup()

    # --- the page -------------------------------------------------------------------------------

    async def about(self, request: Request) -> Response:
        return JSONResponse(self._about)

    async def records(self, request: Request) -> Response:
        """Names that hold `contains`, the first of them."""
        part = request.query_params.get("contains", "").strip().lower()
        found = [name for name in self._numbers if part in name.lower()]
        return JSONResponse({"total": len(found), "names": found[:RECORDS_SHOWN]})

    async def record(self, request: Request) -> Response:
        """What is known of a record, but for the values of its features, of which a picture is."""
        record = self._record(request.query_params.get("name", ""))
        labels = list(record.labels) or [record.emotion] * bool(record.emotion)
        truth = {
            "emotion": record.emotion,
            "labels": list(record.labels),
            "description": record.description,
            "valence": record.valence,
            "places": self._places(labels),
        }
        known = {"name": record.name, "subtitle": record.subtitle, "truth": truth}
        return JSONResponse(known | {"features": _strips(record)})

    async def upload(self, request: Request) -> Response:
        """A file becomes a clip, which can be asked about by its id for a while."""
        kind = request.headers.get("content-type", "").partition("/")[0]
        if kind not in ("video", "audio"):
            raise RequestError(
                "content-type must be that of the file, such as video/mp4 or audio/wav", 415
            )
        until = self._deadline()
        with self._room_for_file():
            body = await self._body(request, self.limits.upload_bytes, until)
            seen = await self._seen(request, {kind: body}, until)
        clip = secrets.token_urlsafe(16)
        self._uploaded[clip] = seen.record
        while len(self._uploaded) > CLIPS_KEPT:
            self._uploaded.popitem(last=False)
        pictures = {name: [_data_url(p) for p in found] for name, found in seen.pictures.items()}
        sound = None if seen.sound is None else _envelopes(seen.sound)
        shown = {"notes": list(seen.notes), "facts": dict(seen.facts)}
        shown |= {"pictures": pictures, "sound": sound, "features": _strips(seen.record)}
        return JSONResponse({"clip": clip} | shown)

    # --- the API --------------------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        model = {"id": self.model, "object": "model", "created": 0, "owned_by": "affectgpt_jax"}
        return JSONResponse({"object": "list", "data": [model]})

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def chat(self, request: Request) -> Response:
        """Answer a question, see `chat_api`."""
        until = self._deadline()
        length = request.headers.get("content-length", "")
        small = length.isdecimal() and int(length) <= SMALL_BODY
        with contextlib.nullcontext() if small else self._room_for_file():
            # Base64 has four characters for three bytes.
            most = SMALL_BODY + (self.limits.upload_bytes * 4 // 3 if self._look else 0)
            # A body in chunks has any length, whatever the header says.
            body = await self._body(request, SMALL_BODY if small else most, until)
            sampling = {"temperature": self._sampling.temperature, "top_p": self._sampling.top_p}
            asked = await asyncio.to_thread(parse_request, body, sampling)
            if asked.model not in ("", self.model):
                raise RequestError(
                    f"there is no model {shorten(asked.model)}; this server has {self.model!r}", 404
                )
            record = await self._asked_about(request, asked, until)
        if asked.subtitle is not None:
            record = dataclasses.replace(record, subtitle=asked.subtitle)
        question = asked.question or self._about["asked"][0]
        try:
            asking.check_questions([question])
        except asking.PredictError as error:
            raise RequestError(str(error).removeprefix("--question=")) from None
        seed = self._seed if asked.seed is None else asked.seed
        prompt = await asyncio.get_running_loop().run_in_executor(
            self._prompting,
            *(self.engine.live.prompt, record, question, asked.max_new_tokens, seed),
        )
        # What sends a stream hears by itself that the client leaves.
        updates = self._ask(prompt, until, None if asked.stream else request)
        reply = Reply(secrets.token_hex(12), self.model, int(time.time()), len(prompt.example))
        if asked.stream:
            pieces = self._stream(updates, reply, prompt, asked.usage)
            return StreamingResponse(pieces, media_type="text/event-stream")
        async with contextlib.aclosing(updates):
            async for update in updates:
                if update.complete:
                    extra = self._extra(prompt, update)
                    return JSONResponse(reply.whole(update.answer, extra))
        raise AssertionError("an engine tells the end of every answer")

    async def _stream(
        self, updates: AsyncIterator[Update], reply: Reply, prompt: Prompt, usage: bool
    ) -> AsyncIterator[bytes]:
        yield event(reply.begin())
        try:
            async with contextlib.aclosing(updates):
                async for update in updates:
                    if piece := reply.piece(update.answer):
                        yield event(piece)
                    if update.complete:
                        yield event(reply.end(update.answer, self._extra(prompt, update)))
                        if usage:
                            yield event(reply.count(update.answer))
        except Exception as error:  # the status is sent; what is left is to say it here
            message, status = message_and_status(error)
            if status == 500 and not isinstance(error, Failed):  # which is printed
                traceback.print_exc()
            yield event(error_body(message, status))
        yield event("[DONE]")

    def _ask(self, prompt: Prompt, until: float, request: Request | None) -> AsyncIterator[Update]:
        """Put a prompt into the queue; what comes of it.

        Args:
            prompt: what is asked.
            until: of the request, see `_deadline`.
            request: whose client is asked whether it is still there.

        Raises:
            Busy, Stopped: now; the iterator raises what ends the answer, or `ClientDisconnect`.
        """
        loop, inbox = asyncio.get_running_loop(), asyncio.Queue()

        def tell(update: Update | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(inbox.put_nowait, update)

        ticket = self.engine.submit(prompt, tell, until - loop.time())

        async def updates() -> AsyncIterator[Update]:
            try:
                while True:
                    update = await _while_there(request, inbox.get())
                    if isinstance(update, Exception):
                        raise update
                    yield update
                    if update.complete:
                        return
            finally:
                self.engine.drop(ticket)

        return updates()

    def _extra(self, prompt: Prompt, update: Update) -> dict[str, Any]:
        """What an answer is beyond its text."""
        line = asking.as_dict(self.run, prompt.record.name, prompt.question, update.answer)
        return {k: v for k, v in line.items() if k != "text"} | {
            "places": self._places(line["labels"] or ())
        }

    # --- clips ----------------------------------------------------------------------------------

    def _record(self, name: str) -> Record:
        if name not in self._numbers:
            raise RequestError(f"none of the {len(self.clips):,} records is {shorten(name)}", 404)
        return self.clips[self._numbers[name]]

    async def _asked_about(self, request: Request, asked: ChatRequest, until: float) -> Record:
        if asked.record is not None:
            return self._record(asked.record)
        if asked.clip is None:
            return (await self._seen(request, asked.files, until)).record
        if asked.clip not in self._uploaded:
            raise RequestError(
                f"there is no clip {shorten(asked.clip)} any more; send it anew", 404
            )
        self._uploaded.move_to_end(asked.clip)
        return self._uploaded[asked.clip]

    @contextlib.contextmanager
    def _room_for_file(self) -> Iterator[None]:
        if self._files >= FILES_AT_ONCE:
            raise Busy(f"{FILES_AT_ONCE} files are being read, which is the limit; send it later")
        self._files += 1
        try:
            yield
        finally:
            self._files -= 1

    def _deadline(self) -> float:
        """Of a request that comes now, by the clock of the loop."""
        return asyncio.get_running_loop().time() + self.limits.timeout_s

    async def _body(self, request: Request, limit: int, until: float) -> bytes:
        too_large = RequestError(f"the body is over the limit of {limit:,} bytes", 413)
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout_at(until):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise too_large
        except TimeoutError:
            raise OutOfTime(
                f"the body was not here after {self.limits.timeout_s:g} s, which is the limit"
            ) from None
        return bytes(body)

    async def _seen(self, request: Request, files: Mapping[str, bytes], until: float) -> Seen:
        """What is in the files of a clip, which lie on the disk as long as it is read.

        Raises:
            RequestError: nothing that can be used, or files cannot be read here.
            OutOfTime, ClientDisconnect, Stopped: nobody reads on when one of them is raised.
        """
        if self._look is None:
            raise RequestError(self._about["why_not"])
        for kind, content in files.items():
            if len(content) > self.limits.upload_bytes:
                raise RequestError(
                    f"the {kind} has {len(content):,} bytes, over the limit of "
                    f"{self.limits.upload_bytes:,}",
                    413,
                )
        # What is sampled depends on the clip's name, so that the same file has the same answer.
        name, stop = "uploaded", threading.Event()

        def look() -> Seen:
            if stop.is_set():
                raise Stopped("the server is ending")
            with tempfile.TemporaryDirectory(dir=self._folder.name) as folder:
                paths = {}
                for kind, content in files.items():
                    paths[kind] = Path(folder, kind)
                    paths[kind].write_bytes(content)
                return self._look(name, paths, stop)

        self._looks.add(stop)
        job = self._looking.submit(look)
        try:
            async with asyncio.timeout_at(until):
                seen = await _while_there(request, asyncio.wrap_future(job))
        except TimeoutError:
            raise OutOfTime(
                f"the file was not decoded after {self.limits.timeout_s:g} s, which is the limit"
            ) from None
        except Exception:
            if stop.is_set():
                raise Stopped("the server is ending; send it again when it is back") from None
            raise
        finally:
            stop.set()
            self._looks.discard(stop)
            # Another file may come when nothing of this one is read any more.
            await asyncio.gather(asyncio.wrap_future(job), return_exceptions=True)
        if seen.record is None:
            raise RequestError(f"the file cannot be used: {'; '.join(seen.notes)}", 422)
        return seen

    def _places(self, labels: Collection[str]) -> list[dict[str, Any]]:
        """Where labels stand: on each wheel its labels of level 1 and 2, or null."""
        return [
            {
                "label": label,
                "wheels": [
                    [self._lexicon.label(label, wheel, level) for level in LEVELS]
                    for wheel in range(1, WHEELS + 1)
                ],
            }
            for label in labels
        ]


async def _while_there(request: Request | None, awaited: Awaitable[Result]) -> Result:
    """What is awaited, as long as the client of a request, if there is one, has not left.

    Raises:
        ClientDisconnect: it has, and what was awaited is cancelled.
    """
    task = asyncio.ensure_future(awaited)
    try:
        while not (await asyncio.wait([task], timeout=POLL_S))[0]:
            if request is not None and await request.is_disconnected():
                raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()


def _tree(rows: Sequence[tuple[str, str, str]]) -> list[dict[str, Any]]:
    """The labels of level 1 of a wheel, and those of level 2 of each, in the file's order."""
    tree: dict[str, dict[str, None]] = {}
    for outer, middle, _ in rows:
        tree.setdefault(outer, {})[middle] = None
    return [{"name": name, "parts": [p for p in parts if p]} for name, parts in tree.items()]


def _strips(record: Record) -> dict[str, Any]:
    """A picture of every feature: bytes `[T, columns]` in base64, the larger the brighter."""
    found = {}
    for name, values in record.features.items():
        values = np.asarray(values, np.float32)
        parts = np.array_split(values, min(COLUMNS, values.shape[1]), axis=1)
        image = np.stack([part.mean(axis=1) for part in parts], axis=1)
        low, high = np.percentile(image, (2, 98))
        image = (255 * np.clip((image - low) / max(high - low, 1e-6), 0, 1)).astype(np.uint8)
        found[name] = {
            "shape": list(values.shape),
            "columns": image.shape[1],
            "pixels": base64.b64encode(image.tobytes()).decode(),
        }
    return found


def _envelopes(sound: np.ndarray, points: int = 120) -> list[list[float]]:
    """The loudest sample of each part of each window, 0 to 1."""
    parts = np.abs(sound[:, : sound.shape[1] // points * points]).reshape(len(sound), points, -1)
    return np.round(np.minimum(parts.max(axis=2), 1), 3).tolist()


def _data_url(pixels: np.ndarray) -> str:
    """A picture `[H, W, 3]` uint8 as a URL that holds it."""
    from PIL import Image  # with what decodes

    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, "JPEG", quality=80)
        return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


# --- the application ----------------------------------------------------------------------------


def message_and_status(error: Exception) -> tuple[str, int]:
    """What a client is told of an error: a sentence, and a status of HTTP."""
    match error:
        case RequestError():
            return brief(error, 1000), error.status
        case Busy():
            return str(error), 429
        case Stopped():
            return str(error), 503
        case OutOfTime():
            return str(error), 504
        case Failed():
            return str(error), 500
        case UserError():
            return brief(error, 1000), 400
        case HTTPException():
            return error.detail, error.status_code
        case ClientDisconnect():
            return "the client has left", 400
    return "this request failed in the server, which has printed why", 500


class Guard:
    """Around the application: who may ask, and what every response forbids.

    A page of another site can have a browser send requests to this address, and by a name of its
    own that leads here (DNS rebinding) could read what comes back. So a request must name this
    server as its host, and if it comes from a page, this one's.

    Args:
        app: the application.
        hosts: names by which this server is reached, beside addresses and localhost.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str]) -> None:
        self._app, self._hosts = app, {"localhost", *(name.lower() for name in hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        if refusal := self._refusal(Headers(scope=scope)):
            response = JSONResponse(error_body(refusal, 403), 403)
            await response(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)

    def _refusal(self, headers: Headers) -> str:
        host = headers.get("host", "")
        if not self._is_known(host):
            return (
                f"this server is not known as {shorten(host)}; ask it by its address, or start it "
                "with --allow-host NAME"
            )
        origin = headers.get("origin")
        if origin is not None and _netloc(origin) != host.lower():
            return f"pages of {shorten(origin)} may not ask this server"
        return ""

    def _is_known(self, host: str) -> bool:
        try:
            parts = urlsplit(f"//{host}")
        except ValueError:
            return False
        if parts.netloc != host or parts.username is not None:
            return False
        name = parts.hostname or ""
        if name in self._hosts:
            return True
        try:
            ipaddress.ip_address(name)  # which no name server can point elsewhere
        except ValueError:
            return False
        return True


def _netloc(origin: str) -> str | None:
    """The host of an origin, in lower case; None where it is none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


def make_app(service: Service, hosts: Collection[str] = ()) -> ASGIApp:
    """The application.

    Args:
        service: what it serves; closed when the application ends.
        hosts: names by which it is reached, beside addresses and localhost.
    """
    files = {path: (ASSETS / name).read_bytes() for path, (name, _) in PAGE.items()}

    async def page(request: Request) -> Response:
        path = request.scope["path"]
        return Response(files[path], media_type=PAGE[path][1])

    async def refuse(request: Request, error: Exception) -> Response:
        message, status = message_and_status(error)
        headers = {"retry-after": "1"} if status == 429 else {}
        return JSONResponse(error_body(message, status), status, headers)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        service.close()

    routes = [
        *(Route(path, page) for path in PAGE),
        Route("/about", service.about),
        Route("/records", service.records),
        Route("/record", service.record),
        Route("/clips", service.upload, methods=["POST"]),
        Route("/health", service.health),
        Route("/v1/models", service.models),
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
    ]
    app = Starlette(
        routes=routes,
        exception_handlers={
            kind: refuse for kind in (UserError, HTTPException, ClientDisconnect, Exception)
        },
        lifespan=lifespan,
    )
    return Guard(app, hosts)  # around all of it: what answers to an error is Starlette's outermost
