"""Errors that name their cause."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user asked for cannot be done; the message is one sentence that says what would work.

    The command prints it without a traceback and exits with code 2.
    """


def text_of(error: BaseException) -> str:
    """What an exception says, as text that any file can hold: names of files may have bytes that are none."""
    return str(error).encode("utf-8", "backslashreplace").decode()


LONGEST_LIST = 50
"""Of more names than these, only the nearest few are listed."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Half a sentence for an unknown name: the nearest allowed one, if any is close, and all of them.

    Where there are very many, the five nearest.
    """
    options = sorted(allowed)
    if len(options) > LONGEST_LIST:
        close = difflib.get_close_matches(name, options, n=5, cutoff=0.5)
        few = ", ".join(repr(option) for option in close or options[:5])
        return f"did you mean one of {few}?" if close else f"allowed: {few} and {len(options) - 5} others"
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}allowed: {', '.join(options)}"
