"""One line about work that is under way, for terminals and for logs."""

from __future__ import annotations

import math
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Self, TextIO

from affectgpt_jax.common.text import one_line

# Reading and hashing that takes no longer, as the demo's, is not worth a line.
QUIET_S = 2.0


class LiveLine:
    """A line that is kept up to date, and messages above it.

    On a terminal the line is rewritten in place, at most five times a second. Elsewhere (a file,
    CI) a plain line is printed at most every `interval_s`. Text passes through `one_line`.

    Args:
        stream: where to write; standard output if None.
        interval_s: s between two plain lines.
        enabled: False writes nothing, as on all processes but the main one.
        in_place: whether to rewrite the line; None asks whether the stream is a terminal.
        clock: seconds, from any origin.
    """

    def __init__(
        self,
        *,
        stream: TextIO | None = None,
        interval_s: float = 10.0,
        enabled: bool = True,
        in_place: bool | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._enabled = enabled
        self._clock = clock
        self._in_place = enabled and (self._stream.isatty() if in_place is None else in_place)
        self._interval_s = 0.2 if self._in_place else interval_s
        self._drawn_s = -math.inf
        self._live = ""

    def show(self, fields: Callable[[], Sequence[str]], last: bool = False) -> None:
        """Show the state of the work, if it is time to.

        Args:
            fields: returns the parts of the line; called only if they are shown.
            last: the work is done, so that the line is shown in any case.
        """
        now_s = self._clock()
        if not self._enabled or not (last or now_s - self._drawn_s >= self._interval_s):
            return
        self._drawn_s = now_s
        parts = [one_line(part) for part in fields()]
        if self._in_place:
            self._rewrite(_fit(parts, shutil.get_terminal_size().columns - 1))
        else:
            self._print("  ".join(parts) + "\n")

    def line(self, text: str) -> None:
        """Print a message of its own, above the live line where there is one."""
        if not self._enabled:
            return
        erase = f"\r{' ' * len(self._live)}\r" if self._live else ""
        self._print(f"{erase}{one_line(text)}\n{self._live}")

    def close(self) -> None:
        """Leave the live line as it is and move below it; a second call does nothing."""
        if self._live:
            self._print("\n")
            self._live = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _rewrite(self, text: str) -> None:
        # Padded to cover the rest of a longer line before it.
        self._print("\r" + text.ljust(len(self._live)))
        self._live = text

    def _print(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


class Counter(LiveLine):
    """How much of the work is done, how fast it goes, and how long the rest will take.

    ```
    with Counter("answers") as count:
        for done in range(total + 1):
            count(done, total)  # "120 of 600 answers  3.2/s  ETA 2:30"
    ```

    Args:
        unit: what is counted.
        what: stands before the numbers.
        options: of `LiveLine`.
    """

    def __init__(self, unit: str, what: str = "", **options) -> None:
        super().__init__(**options)
        self._unit, self._what = unit, f"{what}: " if what else ""
        self._first: tuple[int, float] | None = None

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` are done; what the first call names was done before.

        With the last one the line ends, and another call begins to count anew.
        """
        if self._first is None:
            self._first = done, self._clock()
            self._drawn_s = -math.inf
        self.show(lambda: self._fields(done, total), last=done == total)
        if done == total:
            self.close()
            self._first = None

    def _fields(self, done: int, total: int) -> list[str]:
        fields = [f"{self._what}{done:,} of {total:,} {self._unit}"]
        first, start_s = self._first
        seconds = self._clock() - start_s
        if done > first and seconds > 0:
            rate = (done - first) / seconds
            fields.append(f"{rate:.3g}/s")
            if done < total:
                fields.append(f"ETA {duration((total - done) / rate)}")
        return fields


class Elapsed(LiveLine):
    """The time that work takes which says nothing itself, such as a compilation.

    ```
    with Elapsed("compiling 2 programs") as elapsed:
        ...
        elapsed.note = "1 from the cache"
    ```

    On a terminal a line counts the seconds; elsewhere a line is printed at the start. The last one
    reads "compiling 2 programs: 34.2 s, 1 from the cache"; it is left out after an error.

    Args:
        what: is done.
        every_s: s between two looks at the clock, on a terminal.
        quiet_s: work that takes no longer than this says nothing.
        options: of `LiveLine`.
    """

    def __init__(
        self, what: str, every_s: float = 1.0, quiet_s: float = 0.0, **options: Any
    ) -> None:
        super().__init__(**options)
        self._what, self._every_s, self._quiet_s, self.note = what, every_s, quiet_s, ""
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._count, daemon=True)

    def __enter__(self) -> Self:
        self._start_s = self._clock()
        if self._in_place or self._quiet_s:
            self._thread.start()
        else:
            self.line(f"{self._what} ...")
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._done.set()
        if self._thread.ident is not None:
            self._thread.join()
        seconds = self._clock() - self._start_s
        if self._live:
            self._print(f"\r{' ' * len(self._live)}\r")
            self._live = ""
        if error is None and seconds >= self._quiet_s:
            note = f", {self.note}" if self.note else ""
            self.line(f"{self._what}: {seconds:.1f} s{note}")

    def _count(self) -> None:
        """Redraw the line until the work is done."""
        if self._done.wait(self._quiet_s):
            return
        if not self._in_place:
            self.line(f"{self._what} ...")
            return
        while True:
            fields = self._what, duration(self._clock() - self._start_s)
            self.show(lambda fields=fields: fields, last=True)
            if self._done.wait(self._every_s):
                return


def duration(seconds: float) -> str:
    """Seconds as `m:ss` or `h:mm:ss`, rounded up."""
    minutes, seconds = divmod(math.ceil(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _fit(fields: Sequence[str], width: int) -> str:
    """Join fields; where too wide for one row, drop them from the last but one backwards.

    A line that wraps cannot be rewritten in place, and the ETA at the end is worth most.
    """
    fields = list(fields)
    while len("  ".join(fields)) > width and len(fields) > 1:
        del fields[-2 if len(fields) > 2 else -1]
    return "  ".join(fields)[:width]
