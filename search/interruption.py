"""Ctrl-C and SIGTERM, as something to look at instead of an exception at any line."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


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
