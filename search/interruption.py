"""Ctrl-C and SIGTERM, as something to look at instead of an exception at any line."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Inside the block SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    except SystemExit as error:
        if error.code != signal.SIGTERM:
            raise
        raise KeyboardInterrupt from None  # Ray's handler, which it sets while it starts
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


class Interruption:
    """Ctrl-C or SIGTERM, once; another interrupts as usual. Signal handlers are as before afterwards.

    Until somebody says by `listen` that it is looked at, the first one interrupts as well.
    """

    def __init__(self) -> None:
        self._event = threading.Event()
        self._heard = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            names = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
            self._before = {name: signal.getsignal(name) for name in names}
            self._install()
        return self

    def __exit__(self, *exception: object) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def listen(self) -> None:
        """From now on `is_set` is looked at. Again after Ray was started, which takes SIGTERM for itself."""
        self._heard = True
        self._install()

    def _install(self) -> None:
        if self._before:
            signal.signal(signal.SIGINT, self._on_signal)
            signal.signal(signal.SIGTERM, self._on_signal)

    def is_set(self) -> bool:
        """Whether it has come."""
        return self._event.is_set()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._event.is_set() or not self._heard:
            raise KeyboardInterrupt
        self._event.set()
