"""What is shown while a search runs, on a terminal and in a log file."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from search.progress import (
    SearchProgress,
    SearchStatus,
    TrainingProgress,
    duration,
    status_line,
    training_line,
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain_console() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=80)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_status_in_one_line() -> None:
    status = SearchStatus(12, 64, 1, 5, 0.51234, 34.56, 90.4, "trial 3: out of memory")
    assert status_line(status) == (
        "trials 12/64, 1 failed, front 5, hypervolume 0.512, 34.6 trials/min, 1 min 30 s left"
    )
    stopped = SearchStatus(30, 64, failed=1, front_size=5, stopped=12)
    assert status_line(stopped) == "trials 30/64, 12 stopped early, 1 failed, front 5"
    assert status_line(SearchStatus(0, 64)) == "trials 0/64, front 0"
    finished = SearchStatus(64, 64, 0, 9, 0.6, 30.0, 0.0)
    assert status_line(finished) == "trials 64/64, front 9, hypervolume 0.600, 30 trials/min"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (3599, "59 min 59 s"),
        (7800, "2 h 10 min"),
        (-1, "0 s"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_rate_and_time_left_count_from_the_first_result() -> None:
    clock = Clock()
    with SearchProgress(11, plain_console(), clock) as progress:
        clock.now += 50  # the cluster starts
        progress.update(finished=1, failed=0, front_size=1, hypervolume=0.1)
        assert progress.status.per_minute is None
        clock.now += 4
        progress.update(finished=3, failed=0, front_size=2, hypervolume=0.2)
        assert progress.status.per_minute == 30
        assert progress.status.seconds_left == 16


def test_a_log_file_gets_a_line_every_few_seconds_and_the_last_state() -> None:
    clock, console = Clock(), plain_console()
    with SearchProgress(1000, console, clock) as progress:
        for finished in range(1, 101):
            clock.now += 0.2
            failure = "trial 7: [red]nan[/red]" if finished >= 7 else None
            progress.update(
                finished=finished,
                failed=int(finished >= 7),
                front_size=1,
                hypervolume=0.5,
                last_failure=failure,
            )
    lines = written(console).splitlines()
    assert len(lines) == 4
    assert lines[-1].startswith(
        "trials 100/1000, 1 failed, front 1, hypervolume 0.500, 300 trials/min, 3 min 0 s"
    )
    assert lines[-1].endswith("; last failure: trial 7: [red]nan[/red]")


def test_a_terminal_shows_a_bar_and_the_last_failure() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with SearchProgress(4, console) as progress:
        progress.update(finished=4, failed=1, front_size=2, hypervolume=0.5, last_failure="trial 2: it broke")
    assert "━" in written(console)
    assert "trials 4/4, 1 failed, front 2" in written(console)
    assert "last failure: trial 2: it broke" in written(console)


def test_training_in_one_line() -> None:
    assert (
        training_line("base", 1200, 3000, 6.0, "loss 0.013") == "base: 1200/3000 (40 %), loss 0.013, 9 s left"
    )
    assert training_line("base", 0, 3000, 0.0) == "base: 0/3000 (0 %)"
    assert training_line("base", 10, 10, 3.0) == "base: 10/10 (100 %)"


def test_training_progress_is_what_agents_call() -> None:
    clock, console = Clock(), plain_console()
    with TrainingProgress("base", console, clock) as progress:
        for done in range(1, 31):
            clock.now += 1
            progress(done, 30, f"loss {1 / done:.2f}")
    lines = written(console).splitlines()
    assert lines[0] == "base: 5/30 (17 %), loss 0.20, 25 s left"
    assert lines[-1] == "base: 30/30 (100 %), loss 0.03"
    assert len(lines) == 6


def test_what_was_done_before_says_nothing_of_the_speed() -> None:
    clock, console = Clock(), plain_console()
    with TrainingProgress("base", console, clock) as progress:
        for done in range(21, 31):
            clock.now += 6
            progress(done, 30, "")
    assert written(console).splitlines()[:2] == ["base: 21/30 (70 %)", "base: 22/30 (73 %), 48 s left"]


def test_nothing_is_printed_for_nothing() -> None:
    console = plain_console()
    with TrainingProgress("base", console):
        pass
    assert written(console) == ""
