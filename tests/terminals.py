"""Clocks and terminals that tests make and move."""

import io


class FakeClock:
    """A clock that moves only when told to."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds


class Terminal(io.StringIO):
    """A stream that says it is a terminal, and knows what one would show."""

    def isatty(self) -> bool:
        return True

    def rows(self) -> list[str]:
        return [self._row(line) for line in self.getvalue().split("\n")]

    @staticmethod
    def _row(line: str) -> str:
        row = ""
        for written in line.split("\r"):
            row = written + row[len(written) :]
        return row.rstrip()
