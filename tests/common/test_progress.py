"""The live line, under clocks and terminals made for the test."""

import io
import time

import pytest
from terminals import FakeClock, Terminal

from affectgpt_jax.common.progress import Counter, Elapsed, LiveLine, duration


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    return Terminal()


def test_a_file_gets_a_line_each_interval_and_the_last_one(clock):
    stream = io.StringIO()
    with LiveLine(stream=stream, interval_s=10.0, clock=clock) as line:
        for step in range(1, 36):
            line.show(lambda step=step: [f"step {step}", "of 35"], last=step == 35)
            clock.advance(1.0)
    shown = stream.getvalue().splitlines()
    assert shown == [f"step {step}  of 35" for step in (1, 11, 21, 31, 35)]


def test_a_terminal_shows_one_line_that_moves_on(terminal, clock):
    line = LiveLine(stream=terminal, clock=clock)
    line.show(lambda: ["step 1", "and much more"])
    assert terminal.rows() == ["step 1  and much more"]
    clock.advance(1.0)
    line.show(lambda: ["step 2"])
    assert terminal.rows() == ["step 2"]
    line.close()
    line.close()
    assert terminal.rows() == ["step 2", ""]


def test_a_terminal_is_redrawn_at_most_five_times_a_second(terminal, clock):
    line = LiveLine(stream=terminal, clock=clock)
    for step in range(1, 65):
        line.show(lambda step=step: [f"step {step}"])
        clock.advance(1 / 64)
    assert terminal.getvalue().count("\r") == 5
    line.show(lambda: ["step 65"], last=True)
    assert terminal.rows() == ["step 65"]


def test_messages_stand_above_the_live_line(terminal, clock):
    with LiveLine(stream=terminal, clock=clock) as line:
        line.line("compiling")
        line.show(lambda: ["step 1"])
        line.line("saved")
        assert terminal.rows() == ["compiling", "saved", "step 1"]
        clock.advance(1.0)
        line.show(lambda: ["step 2"])
    assert terminal.rows() == ["compiling", "saved", "step 2", ""]


def test_messages_in_a_file_are_plain_lines(clock):
    stream = io.StringIO()
    with LiveLine(stream=stream, clock=clock) as line:
        line.show(lambda: ["step 1"])
        line.line("saved")
    assert stream.getvalue() == "step 1\nsaved\n"


def test_a_narrow_terminal_gets_a_line_that_does_not_wrap(terminal, clock, monkeypatch):
    for columns, shown in ((25, "step 1  loss 2  ETA 0:30"), (20, "step 1  ETA 0:30"), (5, "step")):
        monkeypatch.setenv("COLUMNS", str(columns))
        line = LiveLine(stream=terminal, clock=clock)
        line.show(lambda: ["step 1", "loss 2", "ETA 0:30"])
        assert terminal.rows()[-1] == shown
        line.close()


def test_fields_are_made_only_for_lines_that_are_shown(clock):
    made = []
    line = LiveLine(stream=io.StringIO(), clock=clock)
    for step in range(10):
        line.show(lambda step=step: made.append(step) or ["x"])
    assert made == [0]


def test_text_from_outside_stays_in_its_line(terminal, clock):
    line = LiveLine(stream=terminal, clock=clock)
    line.line("a\nb\x1b[2J\rc")
    line.show(lambda: ["d\re"])
    assert terminal.rows() == [r"a\nb\x1b[2J\rc", r"d\re"]


def test_nothing_is_written_where_it_is_not_enabled(terminal, clock):
    with LiveLine(stream=terminal, enabled=False, clock=clock) as line:
        line.line("message")
        line.show(lambda: pytest.fail("not shown"), last=True)
    assert terminal.getvalue() == ""


def test_a_counter_says_how_fast_it_goes_and_when_it_ends(clock):
    stream = io.StringIO()
    count = Counter("answers", "step 3", stream=stream, interval_s=10.0, clock=clock)
    for done in (400, 430, 460, 1_000):  # 400 were there before
        count(done, 1_000)
        clock.advance(10.0)
    assert stream.getvalue().splitlines() == [
        "step 3: 400 of 1,000 answers",
        "step 3: 430 of 1,000 answers  3/s  ETA 3:10",
        "step 3: 460 of 1,000 answers  3/s  ETA 3:00",
        "step 3: 1,000 of 1,000 answers  20/s",
    ]


def test_a_counter_moves_below_its_last_line(terminal, clock):
    count = Counter("clips", stream=terminal, clock=clock)
    count(0, 2)
    count(2, 2)
    assert terminal.rows() == ["2 of 2 clips", ""]


def test_a_counter_counts_again_after_its_end(clock):
    stream = io.StringIO()
    count = Counter("replies", stream=stream, interval_s=10.0, clock=clock)
    for _ in range(2):
        for done in (0, 1, 2):
            count(done, 2)
            clock.advance(0.5)
    assert stream.getvalue().splitlines() == ["0 of 2 replies", "2 of 2 replies  2/s"] * 2


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00"), (59.2, "1:00"), (3_599.5, "1:00:00"), (-1, "0:00")]
)
def test_durations_are_rounded_up(seconds, shown):
    assert duration(seconds) == shown


def test_a_file_learns_of_silent_work_at_its_start_and_at_its_end(clock):
    stream = io.StringIO()
    with Elapsed("compiling", stream=stream, clock=clock) as elapsed:
        assert stream.getvalue() == "compiling ...\n"
        clock.advance(61.27)
        elapsed.note = "1 from the cache"
    assert stream.getvalue() == "compiling ...\ncompiling: 61.3 s, 1 from the cache\n"


def test_a_terminal_counts_the_seconds_of_silent_work(terminal, clock):
    with Elapsed("compiling", stream=terminal, clock=clock, every_s=0.001):
        clock.advance(61.0)
        until = time.monotonic() + 10
        while terminal.rows() != ["compiling  1:01"] and time.monotonic() < until:
            time.sleep(0.001)
        assert terminal.rows() == ["compiling  1:01"]
    assert terminal.rows() == ["compiling: 61.0 s", ""]


def test_silent_work_that_fails_claims_no_end(terminal, clock):
    for stream in (io.StringIO(), terminal):
        with pytest.raises(RuntimeError), Elapsed("compiling", stream=stream, clock=clock):
            raise RuntimeError
        assert "compiling:" not in stream.getvalue()
    assert terminal.rows() == [""]


def test_processes_but_the_first_are_silent(clock):
    stream = io.StringIO()
    with Elapsed("compiling", stream=stream, clock=clock, enabled=False):
        pass
    assert stream.getvalue() == ""


@pytest.mark.parametrize("interactive", [False, True])
def test_work_that_is_soon_done_says_nothing(interactive, terminal, clock):
    stream = terminal if interactive else io.StringIO()
    with Elapsed("hashing", stream=stream, clock=clock, quiet_s=60.0):
        clock.advance(59.0)
    assert stream.getvalue() == ""
    with Elapsed("hashing", stream=stream, clock=clock, quiet_s=60.0):
        clock.advance(61.0)
    assert stream.getvalue() == "hashing: 61.0 s\n"


def test_work_that_takes_longer_is_named_while_it_goes_on(clock):
    stream = io.StringIO()
    with Elapsed("hashing", stream=stream, clock=clock, quiet_s=0.001):
        while not stream.getvalue():
            time.sleep(0.001)
        assert stream.getvalue() == "hashing ...\n"


def test_an_interruption_leaves_nothing_of_the_line(terminal, clock):
    with pytest.raises(KeyboardInterrupt):
        with Elapsed("compiling", stream=terminal, clock=clock, every_s=0.001):
            while not terminal.getvalue():
                time.sleep(0.001)
            raise KeyboardInterrupt
    assert terminal.rows() == [""]
