"""Any server that speaks OpenAI's chat completions: vLLM, llama.cpp, Ollama, OpenAI itself.

The `openai` client (the extra `affectgpt-jax[openai]`) sends the requests. A message is text, or
a list of parts as the protocol has them: `{"type": "image_url", "image_url": {"url": ...}}`.
"""

from __future__ import annotations

import dataclasses
import importlib
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, TypedDict

from affectgpt_jax.common.errors import ReadError
from affectgpt_jax.common.json import parse_json
from affectgpt_jax.common.secret import Secret
from affectgpt_jax.common.text import shorten
from affectgpt_jax.evaluation.extract import ChatError, NoWords, spoken

# Of a reply, and of an error's text that is looked at.
MAX_REPLY_BYTES = 16 * 2**20
MAX_ERROR_CHARACTERS = 2**16
_RESUME = "what was answered before is kept, and the same command goes on from there"


class ChatRefusal(ChatError):
    """A server that refuses one message, and may answer others."""


# Of a message; or what makes it, called by the thread that asks, since media fill the memory. It
# raises a `ChatRefusal` where there is nothing to ask.
Content = str | Sequence[dict[str, Any]]
Message = Content | Callable[[], Content]
# The statuses by which a server refuses a message for what is in it.
REFUSED = (400, 413, 415, 422)


@dataclasses.dataclass(frozen=True)
class Reply:
    """A reply and how it ended.

    Attributes:
        text: of the model, with what it thought; "" where it said nothing.
        finish: what the server says why it ended, such as "stop", or "length" for a reply that
            was cut off; "" where it does not say.
        tokens: of message and reply, as the server counts them; 0 where it does not.
    """

    text: str
    finish: str
    tokens: int


def words_of(
    replies: Iterable[tuple[int, Reply | ChatRefusal]],
) -> Iterator[tuple[int, str | NoWords]]:
    """Number and words of each reply, as `extract.Chat.answer` has them."""
    for number, reply in replies:
        if isinstance(reply, ChatRefusal):
            yield number, NoWords(refusal=str(reply))
        else:
            yield number, reply.text if spoken(reply.text) else NoWords(reply.finish)


class _Unread(Exception):
    """A reply that is not read to its end; the text says why."""


class _Message(TypedDict):
    content: str | None  # null where a model has only thought, or refuses


class _OptionalFields(TypedDict, total=False):
    finish_reason: str | None


class _Choice(_OptionalFields):
    message: _Message


class _Usage(TypedDict, total=False):
    total_tokens: int


class _OptionalUsage(TypedDict, total=False):
    usage: _Usage | None


class _Reply(_OptionalUsage):
    """What is read of a reply."""

    choices: list[_Choice]


class _Reason(TypedDict):
    message: str


class _Refusal(TypedDict):
    """What is read of an error."""

    error: _Reason


class ChatServer:
    """A model behind a server, asked greedily.

    The client repeats a request on lost connections, timeouts, rate limits (HTTP 429) and server
    errors (5xx), after the pause that the server asks for (at most two minutes), or after growing
    pauses. It follows no redirect, because that would send the API key to another host.

    Args:
        base_url: up to and without `/chat/completions`, e.g. "http://localhost:8000/v1".
        model: the name that the server knows it by. Servers that call theirs the same are taken to
            have the same one.
        api_key: sent as a bearer token, and shown nowhere, in no form; "" sends none.
        concurrency: requests under way at a time.
        timeout_s: for the server to say something, and to end its reply.
        attempts: to get one reply.
        max_tokens: of a reply.

    Raises:
        ChatError: an address or key that cannot be used, or no `openai` package.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str = "",
        concurrency: int = 8,
        timeout_s: float = 120.0,
        attempts: int = 6,
        max_tokens: int = 512,
    ):
        self._secret = Secret(api_key)
        _check_address(base_url, self._secret)
        if api_key and not (api_key.isascii() and api_key.isprintable() and " " not in api_key):
            raise ChatError("the API key holds a character that no key has; is it quoted or cut?")
        try:
            import openai
        except ImportError:
            raise ChatError(
                "asking a chat server needs the package openai; install affectgpt-jax[openai]"
            ) from None
        self._openai = openai
        self._url = base_url.rstrip("/")
        self._model, self._max_tokens, self._has_key = model, max_tokens, bool(api_key)
        self._concurrency, self._attempts = concurrency, attempts
        self._client = openai.OpenAI(
            base_url=self._url,
            # Without a key here, the client would send the one of the environment.
            api_key=api_key or "none",
            timeout=timeout_s,
            max_retries=attempts - 1,
            http_client=openai.DefaultHttpxClient(
                follow_redirects=False,
                headers={"Accept-Encoding": "identity"},
                event_hooks={"response": [lambda response: _bound(response, timeout_s)]},
            ),
        )
        # Not where it runs: a job that goes on upon another node, and shards that ask servers of
        # their own, find what was answered before.
        self.identity = f"{model}, greedy, {max_tokens} tokens"

    def answer(self, messages: Sequence[str]) -> Iterator[tuple[int, str | NoWords]]:
        """Yield the number and the reply of each message, in the order in which they come.

        Raises:
            ChatError: no reply to one of them, after all attempts or because none would help, but
                for a single message that is refused; what came before has been yielded.
        """
        return words_of(self.replies(messages))

    def replies(self, messages: Sequence[Message]) -> Iterator[tuple[int, Reply | ChatRefusal]]:
        """Yield number and reply, or how it is refused, of each message, in the order of arrival.

        Raises:
            ChatError: as `answer`.
        """
        pool = ThreadPoolExecutor(self._concurrency, thread_name_prefix="chat")
        try:
            numbers = {pool.submit(self._reply, m): n for n, m in enumerate(messages)}
            for future in as_completed(numbers):
                yield numbers[future], future.result()
        finally:
            # Requests that wait for a thread are dropped; those under way end by themselves.
            pool.shutdown(wait=False, cancel_futures=True)

    def _reply(self, message: Message) -> Reply | ChatRefusal:
        """One reply; the client has repeated the request where that can help.

        Raises:
            ChatError: there is none, and others will get none either.
        """
        try:
            content = message() if callable(message) else message
        except ChatRefusal as refusal:
            return refusal
        try:
            response = self._client.chat.completions.with_raw_response.create(
                model=self._model,
                messages=[{"role": "user", "content": content}],
                temperature=0,
                max_tokens=self._max_tokens,
                extra_headers={} if self._has_key else {"Authorization": self._openai.Omit()},
            )
            data = response.content
        except _Unread as error:
            raise self._error(f"{error}; is it a server of chat completions?") from None
        except self._openai.APIStatusError as error:
            refusal = self._error(self._refusal(error.response))
            if error.response.status_code in REFUSED:
                return ChatRefusal(str(refusal))
            raise refusal from None
        except self._openai.APIConnectionError as error:
            late = isinstance(error, self._openai.APITimeoutError)
            reason = str(error.__cause__ or error) or type(error.__cause__).__name__
            raise self._error(
                f"{'no answer in time' if late else 'no connection'} "
                f"({self._secret.mask(reason)[:200]}), "
                f"{self._attempts} times; {_RESUME}"
            ) from None
        return self._content(data)

    def _content(self, data: bytes) -> Reply:
        """What a reply says.

        Raises:
            ChatError: it is no reply of chat completions.
        """
        try:
            reply = parse_json(data, "the reply", _Reply)
            choice = reply["choices"][0]
        except (ReadError, IndexError):
            shown = self._shown(data.decode(errors="replace"), 80)
            raise self._error(
                f"an answer without choices[0].message.content: {shown}; is it a server of chat "
                "completions?"
            ) from None
        reason = self._shown(choice.get("finish_reason") or "", 40).strip("'")
        tokens = (reply.get("usage") or {}).get("total_tokens", 0)
        return Reply(choice["message"]["content"] or "", reason, tokens)

    def _error(self, sentence: str) -> ChatError:
        """An error without the key, which servers like to repeat."""
        return ChatError(self._secret.mask(" ".join(f"{self._url}: {sentence}".split())))

    def _shown(self, text: str, limit: int) -> str:
        """The beginning of a server's words. Masked first: half a key would not be known."""
        return shorten(self._secret.mask(text[:MAX_ERROR_CHARACTERS]), limit)

    def _refusal(self, response: Any) -> str:
        """What an HTTP status means, with the server's own words."""
        try:
            detail = parse_json(response.content, "the error", _Refusal)["error"]["message"]
        except ReadError:
            detail = response.text
        what = f"HTTP {response.status_code} {self._shown(detail, 200) if detail else ''}".rstrip()
        if response.status_code in (401, 403):
            return f"{what}; is the API key right?"
        if wait := response.headers.get("Retry-After"):
            return f"{what}; the server asks for a pause of {wait[:40]} s; {_RESUME}"
        return f"{what}; {_RESUME}" if response.status_code >= 500 else what


def _check_address(url: str, key: Secret) -> None:
    """Refuse an address that cannot be used, or holds a secret; the message does not repeat it."""
    try:
        parts = urllib.parse.urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number, brackets that do not match
        raise ChatError("the server's address is none; expected http://localhost:8000/v1") from None
    if "@" in url:
        raise ChatError("the server's address holds a password; leave it out, and pass a key")
    if "?" in url or "#" in url:
        raise ChatError(
            "the server's address has a part behind ? or #, which may hold a key; leave it out, "
            "and pass the key by --api-key-env"
        )
    if key.within(url):
        raise ChatError("the server's address holds the API key; leave it out of the address")
    if not usable:
        raise ChatError(f"{shorten(url)} is no address; expected one as http://localhost:8000/v1")


def _bound(response: Any, timeout_s: float) -> None:
    """Let a reply be no larger than `MAX_REPLY_BYTES`, and end in time.

    Args:
        response: of `httpx`, before its body is read.
        timeout_s: for the body.
    """
    # openai brings httpx, or a fork of it under another name.
    httpx = importlib.import_module(type(response).__module__.partition(".")[0])
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise _Unread("the reply is compressed, which was not asked for")
    response.encoding = "utf-8"  # JSON's; the reply may name one that decodes to no text
    body, deadline = response.stream, time.monotonic() + timeout_s

    class Bounded(httpx.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            size = 0
            for chunk in body:
                size += len(chunk)
                if size > MAX_REPLY_BYTES:
                    raise _Unread(f"the reply is larger than {MAX_REPLY_BYTES:,} bytes")
                if time.monotonic() > deadline:
                    raise _Unread(f"the reply does not end within {timeout_s:g} s")
                yield chunk

        def close(self) -> None:
            body.close()

    response.stream = Bounded()
