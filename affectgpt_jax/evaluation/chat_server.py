"""Any server that speaks OpenAI's chat completions: vLLM, llama.cpp, Ollama, OpenAI itself.

The `openai` client (the extra `affectgpt-jax[openai]`) sends the requests.
"""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from affectgpt_jax.common.errors import UserError
from affectgpt_jax.common.text import shorten

_RESUME = "what was answered before is kept, and the same command goes on from there"


class ChatError(UserError, RuntimeError):
    """A server that gives no reply: one sentence that says what it did instead."""


class ChatServer:
    """A model behind a server, asked greedily.

    The client repeats a request on lost connections, timeouts, rate limits (HTTP 429) and server
    errors (5xx), after the pause that the server asks for (at most two minutes), or after growing
    pauses. It follows no redirect, because that would send the API key to another host.

    Args:
        base_url: up to and without `/chat/completions`, e.g. "http://localhost:8000/v1".
        model: the name that the server knows it by.
        api_key: sent as a bearer token, and shown nowhere; "" sends none.
        concurrency: requests under way at a time.
        timeout_s: for the server to say something.
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
        parts = urllib.parse.urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ChatError(f"{base_url!r} is no address; expected one as http://localhost:8000/v1")
        if parts.username or parts.password:
            raise ChatError("the server's address holds a password; leave it out, and pass a key")
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
        self._model, self._key, self._max_tokens = model, api_key, max_tokens
        self._concurrency, self._attempts = concurrency, attempts
        self._client = openai.OpenAI(
            base_url=self._url,
            # Without a key here, the client would send the one of the environment.
            api_key=api_key or "none",
            timeout=timeout_s,
            max_retries=attempts - 1,
            http_client=openai.DefaultHttpxClient(follow_redirects=False),
        )
        self.identity = f"{model} at {self._url}, greedy, {max_tokens} tokens"

    def answer(self, messages: Sequence[str]) -> Iterator[tuple[int, str]]:
        """Yield the number and the reply of each message, in the order in which they come.

        Raises:
            ChatError: no reply to one of them, after all attempts or because none would help;
                what came before has been yielded.
        """
        pool = ThreadPoolExecutor(self._concurrency, thread_name_prefix="chat")
        try:
            numbers = {pool.submit(self._reply, m): n for n, m in enumerate(messages)}
            for future in as_completed(numbers):
                yield numbers[future], future.result()
        finally:
            # Requests that wait for a thread are dropped; those under way end by themselves.
            pool.shutdown(wait=False, cancel_futures=True)

    def _reply(self, message: str) -> str:
        """One reply; the client has repeated the request where that can help.

        Raises:
            ChatError: there is none.
        """
        try:
            response = self._client.chat.completions.with_raw_response.create(
                model=self._model,
                messages=[{"role": "user", "content": message}],
                temperature=0,
                max_tokens=self._max_tokens,
                extra_headers={} if self._key else {"Authorization": self._openai.Omit()},
            )
            text = response.text
        except self._openai.APIStatusError as error:
            raise self._error(_refusal(error.response)) from None
        except self._openai.APIConnectionError as error:
            late = isinstance(error, self._openai.APITimeoutError)
            reason = str(error.__cause__ or error) or type(error.__cause__).__name__
            raise self._error(
                f"{'no answer in time' if late else 'no connection'} ({reason}), "
                f"{self._attempts} times; {_RESUME}"
            ) from None
        try:
            content = json.loads(text)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            content = None
        if not isinstance(content, str):
            raise self._error(
                f"an answer without choices[0].message.content: {shorten(text)}; is it a server of "
                "chat completions?"
            )
        return content

    def _error(self, sentence: str) -> ChatError:
        """An error without the key, which servers like to repeat."""
        sentence = " ".join(f"{self._url}: {sentence}".split())
        return ChatError(sentence.replace(self._key, "***") if self._key else sentence)


def _refusal(response: Any) -> str:
    """What an HTTP status means, with the server's own words."""
    try:
        detail = json.loads(response.text)["error"]["message"]
    except (ValueError, LookupError, TypeError):
        detail = response.text
    what = f"HTTP {response.status_code} {shorten(detail, 200) if detail else ''}".rstrip()
    if response.status_code in (401, 403):
        return f"{what}; is the API key right?"
    if wait := response.headers.get("Retry-After"):
        return f"{what}; the server asks for a pause of {wait[:40]} s; {_RESUME}"
    return f"{what}; {_RESUME}" if response.status_code >= 500 else what
