"""The form of OpenAI's chat completions, as far as it can be asked about a clip.

A request has one message, of parts: a clip, and the question about it.

    {"type": "record", "name": "demo-test-00000"}                 a record of the run, or
    {"type": "clip", "id": "..."}                                 a clip that was uploaded, or
    {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,..."}}
    {"type": "input_audio", "input_audio": {"data": "...", "format": "wav"}}
    {"type": "subtitle", "text": "I am fine."}                    what is said in it
    {"type": "text", "text": "ovlabel"}                           a label type, or any question

What a request asks for and this model has not is refused, not left out.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import re
from typing import Any, Literal, TypedDict

from affectgpt_jax.common.errors import UserError
from affectgpt_jax.common.json import check_type, parse_json
from affectgpt_jax.inference import Answer


class RequestError(UserError, ValueError):
    """A request that cannot be answered.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """A question about a clip.

    Attributes:
        model: by which the client knows the run; "" where it names none.
        record: a name of one of the run's records, or None.
        clip: id of a clip that was uploaded, or None.
        files: of a clip that came with the request: bytes, by what they are, "video" or "audio";
            empty where a record or an uploaded clip is named, of which there is one otherwise.
        subtitle: what is said; None is what the record has.
        question: a label type or any text; None is for the server to choose.
        max_new_tokens: of the answer; None is the server's limit.
        seed: of sampling; None is the server's.
        stream: whether the answer comes in pieces.
        usage: whether a stream ends with the count of tokens.
    """

    model: str
    record: str | None
    clip: str | None
    files: dict[str, bytes] = dataclasses.field(repr=False)
    subtitle: str | None
    question: str | None
    max_new_tokens: int | None
    seed: int | None
    stream: bool
    usage: bool


class _Sampling(TypedDict):
    """How a server writes, of which requests may say the same."""

    temperature: float
    top_p: float


class _StreamOptions(TypedDict, total=False):
    include_usage: bool


class _Message(TypedDict):
    role: Literal["user"]
    content: str | list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class _Request:
    """The keys that a request may have; those after `seed` only with the values here."""

    messages: list[_Message]
    model: str = ""
    stream: bool = False
    stream_options: _StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    n: Literal[1] | None = None
    # Notes of the client's, which change no answer.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None


class _Record(TypedDict):
    type: Literal["record"]
    name: str


class _Clip(TypedDict):
    type: Literal["clip"]
    id: str


class _Text(TypedDict):
    type: Literal["text", "subtitle"]
    text: str


class _Url(TypedDict):
    url: str


class _Video(TypedDict):
    type: Literal["video_url"]
    video_url: _Url


class _Sound(TypedDict):
    data: str
    format: str  # which the file says itself


class _Audio(TypedDict):
    type: Literal["input_audio"]
    input_audio: _Sound


_PARTS = {
    "record": _Record,
    "clip": _Clip,
    "subtitle": _Text,
    "text": _Text,
    "video_url": _Video,
    "input_audio": _Audio,
}
# Characters of a text: far more than any prompt has room for, and read in no time.
MAX_TEXT = 100_000
_DATA_URL = re.compile(r"data:[a-z]+/[\w.+-]{1,40}(?:;[\w=.+-]{1,60}){0,3};base64,")


def parse_request(body: bytes, sampling: _Sampling) -> ChatRequest:
    """A request out of its JSON.

    Args:
        body: of the request.
        sampling: how the server writes; a request cannot have it write otherwise.

    Raises:
        RequestError: anything else than a question about one clip.
    """
    found = parse_json(body, "the request", _Request, error=RequestError)
    for key, mine in sampling.items():
        asked = getattr(found, key)
        if asked is not None and asked != mine:
            raise RequestError(
                f"{key} is {asked:g}, but this server writes with {mine:g}; leave it out, or start "
                f"the server with --{key.replace('_', '-')}={asked:g}"
            )
    limits = {found.max_tokens, found.max_completion_tokens} - {None}
    if len(limits) > 1 or any(limit < 1 for limit in limits):
        raise RequestError("max_completion_tokens must be one number, 1 or more")
    if found.seed is not None and not 0 <= found.seed < 2**32:
        raise RequestError(f"seed is {found.seed}; expected 0 to 4294967295")
    if len(found.messages) != 1:
        raise RequestError(
            f"there are {len(found.messages)} messages; this model answers one question about a "
            "clip and knows no conversation: send one message, of the role user"
        )
    [message] = found.messages
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return ChatRequest(
        model=found.model,
        **_clip_and_question(parts),
        max_new_tokens=next(iter(limits), None),
        seed=found.seed,
        stream=found.stream,
        usage=bool((found.stream_options or {}).get("include_usage")),
    )


def _clip_and_question(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The clip and the question of a message, as `ChatRequest` has them."""
    by_type: dict[str, list[Any]] = {}
    for number, part in enumerate(parts):
        where = f"messages[0].content[{number}]"
        kind = part.get("type")
        if not isinstance(kind, str) or kind not in _PARTS:
            known = ", ".join(_PARTS)
            raise RequestError(f"{where}: type is {str(kind)[:40]!r}; expected one of {known}")
        checked = check_type(part, _PARTS[kind], where, error=RequestError)
        by_type.setdefault(kind, []).append(checked)
    for kind, found in by_type.items():
        if any(not _is_text(part.get("text", "")) for part in found):
            raise RequestError(f"a part of type {kind!r} holds half of a character")
        if (longest := max(len(part.get("text", "")) for part in found)) > MAX_TEXT:
            raise RequestError(
                f"a part of type {kind!r} has {longest:,} characters, over the limit of "
                f"{MAX_TEXT:,}; shorten it"
            )
        if len(found) > 1:
            raise RequestError(f"there are {len(found)} parts of type {kind!r}; give one")
    one = {kind: found for kind, [found] in by_type.items()}
    files = {}
    if video := one.get("video_url"):
        files["video"] = _from_url(video["video_url"]["url"])
    if audio := one.get("input_audio"):
        files["audio"] = _from_base64(audio["input_audio"]["data"], "input_audio.data")
    places = [kind for kind in ("record", "clip") if kind in one] + ["a file"] * bool(files)
    if len(places) != 1:
        raise RequestError(
            f"the message names {' and '.join(places) or 'no clip'}; expected one clip: a part of "
            "type record, clip, video_url or input_audio"
        )
    return {
        "record": one["record"]["name"] if "record" in one else None,
        "clip": one["clip"]["id"] if "clip" in one else None,
        "files": files,
        "subtitle": one["subtitle"]["text"] if "subtitle" in one else None,
        "question": one["text"]["text"].strip() or None if "text" in one else None,
    }


def _is_text(text: str) -> bool:
    """Whether it can be written as UTF-8, unlike what JSON's escapes allow."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _from_url(url: str) -> bytes:
    if not (head := _DATA_URL.match(url[:400])):
        raise RequestError(
            f"video_url begins with {url[:24]!r}; expected data:video/mp4;base64,...: this server "
            "fetches nothing"
        )
    return _from_base64(url[head.end() :], "video_url")


def _from_base64(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(f"{where} is not base64") from None


# --- answers ------------------------------------------------------------------------------------


class Reply:
    """The answer to one request, in the form of the API.

    Args:
        number: what tells it from others.
        model: the run's name.
        created: seconds since 1970.
        prompt_tokens: of the prompt.
    """

    def __init__(self, number: str, model: str, created: int, prompt_tokens: int):
        self._head = {"id": f"chatcmpl-{number}", "created": created, "model": model}
        self._prompt_tokens = prompt_tokens
        self._sent = 0

    def whole(self, answer: Answer, extra: dict[str, Any]) -> dict[str, Any]:
        """The complete answer; `extra` is what this model says beyond the form."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "finish_reason": _finish(answer),
            "logprobs": None,
        }
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": self._usage(answer),
            "affectgpt": extra,
        }

    def begin(self) -> dict[str, Any]:
        """The first piece of a stream."""
        return self._chunk([_piece({"role": "assistant", "content": ""})])

    def piece(self, answer: Answer) -> dict[str, Any] | None:
        """What an answer has more than before; None if nothing."""
        new, self._sent = answer.text[self._sent :], len(answer.text)
        return self._chunk([_piece({"content": new})]) if new else None

    def end(self, answer: Answer, extra: dict[str, Any]) -> dict[str, Any]:
        """Why a stream ends; `extra` as for `whole`."""
        return self._chunk([_piece({}, _finish(answer))]) | {"affectgpt": extra}

    def count(self, answer: Answer) -> dict[str, Any]:
        """The count of tokens, for those who ask for it."""
        return self._chunk([]) | {"usage": self._usage(answer)}

    def _usage(self, answer: Answer) -> dict[str, int]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": answer.tokens,
            "total_tokens": self._prompt_tokens + answer.tokens,
        }

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", "choices": choices}


def _piece(delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}


def _finish(answer: Answer) -> str:
    return "length" if answer.cut else "stop"


def event(value: dict[str, Any] | str) -> bytes:
    """A server-sent event; a text is sent as it is."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"data: {text}\n\n".encode()


def error_body(message: str, status: int) -> dict[str, Any]:
    """An error in the form of the API."""
    kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}
