"""Ctrl-C and SIGTERM as something to look at."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from search.interruption import Interruption, sigterm_interrupts

SIGNALS = [signal.SIGINT, signal.SIGTERM]


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.1)  # Python runs the handler between two instructions


@pytest.mark.parametrize("number", SIGNALS)
def test_once_it_is_listened_for_the_first_is_noted_and_the_second_interrupts(number: int) -> None:
    with Interruption() as interrupted:
        interrupted.listen()
        assert not interrupted.is_set()
        send(number)
        assert interrupted.is_set()
        with pytest.raises(KeyboardInterrupt):
            send(number)


@pytest.mark.parametrize("number", SIGNALS)
def test_before_that_the_first_interrupts(number: int) -> None:
    """As while a cluster is joined, which may take a minute and is not looked at."""
    with Interruption(), pytest.raises(KeyboardInterrupt):
        send(number)


def test_sigterm_interrupts_as_ctrl_c_does() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), sigterm_interrupts():
        send(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_it_does_so_where_ray_has_taken_the_signal() -> None:
    with pytest.raises(KeyboardInterrupt), sigterm_interrupts():
        sys.exit(signal.SIGTERM)
    with pytest.raises(SystemExit), sigterm_interrupts():
        sys.exit(3)


def test_handlers_are_as_before_afterwards() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with Interruption() as interrupted:
        interrupted.listen()
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
