"""Errors that name their cause."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user asked for cannot be done; the message is one sentence that says what would work.

    The command prints it without a traceback and exits with code 2.
    """


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Half a sentence for an unknown name: the nearest allowed one, if any is close, and all of them."""
    options = sorted(allowed)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}allowed: {', '.join(options)}"
