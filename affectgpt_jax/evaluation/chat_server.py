"""Any server that speaks OpenAI's chat completions: vLLM, llama.cpp, Ollama, OpenAI itself.

POST {base_url}/chat/completions   {"model", "messages", "temperature", "max_tokens"}
"""

from __future__ import annotations

import email.utils
import http.client
import json
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from affectgpt_jax.common.errors import UserError
from affectgpt_jax.common.text import shorten

FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 120.0
LARGEST_REPLY = 2**23  # bytes
# Trouble that passes, by HTTP status: timeouts, rate limits, a server that is busy or starting.
PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 529)


class ChatError(UserError, RuntimeError):
    """A server that gives no reply: one sentence that says what it did instead."""


class _Passing(Exception):
    """Trouble after which asking again may help.

    Args:
        what: it is.
        wait_s: how long the server wants to be left alone, if it said so.
    """

    def __init__(self, what: str, wait_s: float | None = None):
        super().__init__(what)
        self.wait_s = wait_s


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Fail instead: urllib would hand the API key to whatever host a server names."""

    def redirect_request(self, *_: object) -> None:
        return None


class ChatServer:
    """A model behind a server, asked greedily.

    Replies are retried with growing pauses, or after the pause that the server asks for, on lost
    connections, timeouts, damaged replies and the statuses in `PASSING`.

    Args:
        base_url: up to and without `/chat/completions`, e.g. "http://localhost:8000/v1".
        model: the name that the server knows it by.
        api_key: sent as a bearer token, and shown nowhere; "" sends none.
        concurrency: requests under way at a time.
        timeout_s: for the server to say something.
        attempts: to get one reply.
        max_tokens: of a reply.
        sleep: waits so many s; by default until the asking is given up, if that comes first.

    Raises:
        ChatError: an address or key that cannot be used.
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
        sleep: Callable[[float], object] | None = None,
    ):
        parts = urllib.parse.urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ChatError(f"{base_url!r} is no address; expected one as http://localhost:8000/v1")
        if parts.username or parts.password:
            raise ChatError("the server's address holds a password; leave it out, and pass a key")
        if api_key and not (api_key.isascii() and api_key.isprintable() and " " not in api_key):
            raise ChatError("the API key holds a character that no key has; is it quoted or cut?")
        self._url = base_url.rstrip("/") + "/chat/completions"
        self._model, self._key, self._max_tokens = model, api_key, max_tokens
        self._concurrency, self._timeout_s, self._attempts = concurrency, timeout_s, attempts
        self._lock, self._not_before = threading.Lock(), 0.0
        self._stopped = threading.Event()
        self._sleep = sleep or self._stopped.wait
        self._opener = urllib.request.build_opener(_NoRedirect)
        self.identity = f"{model} at {base_url.rstrip('/')}, greedy, {max_tokens} tokens"

    def answer(self, messages: Sequence[str]) -> Iterator[tuple[int, str]]:
        """Yield the number and the reply of each message, in the order in which they come.

        Raises:
            ChatError: no reply to one of them, after all attempts or because none would help;
                what came before has been yielded.
        """
        self._stopped.clear()
        pool = ThreadPoolExecutor(self._concurrency, thread_name_prefix="chat")
        try:
            numbers = {pool.submit(self._reply, m): n for n, m in enumerate(messages)}
            for future in as_completed(numbers):
                yield numbers[future], future.result()
        finally:
            # What waits is given up at once; what is under way, when the server has answered.
            self._stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _reply(self, message: str) -> str:
        """One reply, with retries.

        Raises:
            ChatError: there is none.
        """
        wait_s, attempt = FIRST_WAIT_S, 0
        while True:
            attempt += 1
            self._hold_off()
            try:
                return self._request(message)
            except _Passing as trouble:
                if attempt >= self._attempts or self._stopped.is_set():
                    raise ChatError(
                        f"{self._url}: {trouble}, {attempt} times; what was answered before is "
                        "kept, and the same command goes on from there"
                    ) from None
                if trouble.wait_s is not None:
                    self._leave_alone(trouble.wait_s)
                else:
                    # Spread out, so that all workers do not come back in the same moment.
                    self._sleep(wait_s * random.uniform(0.5, 1.0))
                    wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    def _leave_alone(self, wait_s: float) -> None:
        """Keep all workers off the server for as long as it asks.

        Raises:
            ChatError: that is too long to wait.
        """
        if wait_s > LONGEST_WAIT_S:
            raise ChatError(
                f"{self._url} asks to be left alone for {wait_s:.0f} s; run the same command again "
                "then: what was answered before is kept"
            )
        with self._lock:
            self._not_before = max(self._not_before, time.monotonic() + wait_s)

    def _hold_off(self) -> None:
        with self._lock:
            wait_s = self._not_before - time.monotonic()
        if wait_s > 0:
            self._sleep(wait_s)

    def _request(self, message: str) -> str:
        """One attempt.

        Raises:
            _Passing, ChatError: trouble after which asking again may help, or will not.
        """
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": message}],
            "temperature": 0,
            "max_tokens": self._max_tokens,
        }
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._url, json.dumps(body).encode(), headers)
        try:
            with self._opener.open(request, timeout=self._timeout_s) as response:
                data = response.read(LARGEST_REPLY + 1)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error) from None
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            reason = getattr(error, "reason", error)
            what = "no answer in time" if isinstance(reason, TimeoutError) else "no connection"
            raise _Passing(self._public(f"{what} ({reason or type(error).__name__})")) from None
        if len(data) > LARGEST_REPLY:
            raise ChatError(f"{self._url} answered with more than {LARGEST_REPLY} bytes")
        try:
            answer = json.loads(data)
        except ValueError:
            raise _Passing(f"a damaged reply of {len(data)} bytes") from None
        try:
            content = answer["choices"][0]["message"]["content"]
        except (LookupError, TypeError):
            content = None
        if not isinstance(content, str):
            raise ChatError(
                f"{self._url} answered without choices[0].message.content: "
                f"{self._public(shorten(answer))}; is it a chat completions server?"
            )
        return content

    def _refused(self, error: urllib.error.HTTPError) -> Exception:
        """What an HTTP error amounts to."""
        try:
            detail = error.read(LARGEST_REPLY).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            detail = ""
        try:
            detail = json.loads(detail)["error"]["message"]
        except (ValueError, LookupError, TypeError):
            pass
        what = f"HTTP {error.code} {self._public(shorten(detail, 200) if detail else error.reason)}"
        if error.code in PASSING:
            return _Passing(what, _seconds(error.headers.get("Retry-After")))
        if error.code in (401, 403):
            what += "; is the API key right?"
        return ChatError(f"{self._url}: {what}")

    def _public(self, text: str) -> str:
        """A text without the key, which servers like to repeat."""
        return text.replace(self._key, "***") if self._key else text


def _seconds(retry_after: str | None) -> float | None:
    """Seconds out of a Retry-After header (RFC 9110), which has seconds or a date."""
    if retry_after is None:
        return None
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return None
