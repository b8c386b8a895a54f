"""Processes that take turns at one device.

Each side of a comparison is a process of its own: memory is counted by process, no library meets
threads or allocators of the other, and where the device has no room for both, a side can leave
between its turns.

A worker is `python -m benchmarks.turns MODULE:CLASS JSON`. It builds `CLASS(**JSON)` and serves
calls: one line of JSON on standard input, `[method, arguments]`, is answered by one line on
standard output, `{"value": ...}` or `{"error": ...}`. What libraries print goes to standard error.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self, TypeVar

from affectgpt_jax.common.errors import UserError

T = TypeVar("T")


class TurnError(UserError, RuntimeError):
    """A side of a comparison that failed."""


class Side:
    """The parent's end of a worker, which starts with the first call.

    Args:
        name: what messages call it.
        target: "MODULE:CLASS".
        arguments: of the class, as JSON holds them.
        environment: variables beside this process's own.
    """

    def __init__(
        self,
        name: str,
        target: str,
        arguments: Mapping[str, Any],
        environment: Mapping[str, str] | None = None,
    ):
        self.name = name
        self._command = [sys.executable, "-m", "benchmarks.turns", target, json.dumps(arguments)]
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen | None = None

    def send(self, method: str, **arguments: Any) -> None:
        """Ask for a call, whose value `receive` waits for."""
        if self._process is None:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=self._environment,
            )
        with contextlib.suppress(BrokenPipeError):  # it has ended, as `receive` finds out
            print(json.dumps([method, arguments]), file=self._process.stdin, flush=True)

    def receive(self) -> Any:
        """The value of the call that was sent.

        Raises:
            TurnError: the method failed, or the worker ended.
        """
        answer = self._process.stdout.readline()
        if not answer:
            raise TurnError(f"{self.name}: its process ended with status {self._process.wait()}")
        found = json.loads(answer)
        if "error" in found:
            raise TurnError(f"{self.name}: {found['error']}")
        return found["value"]

    def call(self, method: str, **arguments: Any) -> Any:
        """What a method of the worker's object returns; raises as `receive`."""
        self.send(method, **arguments)
        return self.receive()

    def leave(self, kill: bool = False) -> None:
        """End the worker, which frees the device; the next call starts another."""
        if self._process is None:
            return
        if kill:
            self._process.kill()
        with contextlib.suppress(BrokenPipeError):  # half a line may still wait to be sent
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave(kill=True)


def alternate(names: Iterable[T], turns: int) -> Iterator[tuple[int, T]]:
    """Turn and name: all names in every turn, every other turn from last to first.

    So nobody always runs on what the one before has warmed.
    """
    names = list(names)
    for turn in range(turns):
        for name in names[:: 1 if turn % 2 == 0 else -1]:
            yield turn, name


def serve(target: str, arguments: Mapping[str, Any]) -> None:
    """Serve one object until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module, _, name = target.partition(":")
    served = None
    for line in sys.stdin:
        method, given = json.loads(line)
        try:
            if served is None:
                served = getattr(importlib.import_module(module), name)(**arguments)
            answer = {"value": getattr(served, method)(**given)}
        except Exception as error:
            # The traceback for whoever looks, one sentence for the parent.
            sys.excepthook(type(error), error, error.__traceback__)
            first = (str(error).splitlines() or [""])[0]
            answer = {"error": f"{type(error).__name__}: {first}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    from affectgpt_jax.cpu import keep_freed_memory

    keep_freed_memory()  # on both sides
    serve(sys.argv[1], json.loads(sys.argv[2]))
