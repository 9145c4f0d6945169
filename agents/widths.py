"""Check the widths that an agent is to be built from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from components.errors import UserError, nearest


def complete(widths: Mapping[str, Any] | None, dense: Mapping[str, int], agent: str) -> dict[str, int]:
    """Widths in the dense ones' order; None takes the dense ones.

    Raises:
        UserError: groups are missing or unknown, or a size is not between 1 and the dense one.
    """
    if widths is None:
        return dict(dense)
    for name in widths:
        if name not in dense:
            raise UserError(f"the {agent} has no group {name!r}: {nearest(name, dense)}")
    for name, most in dense.items():
        size = widths.get(name)
        if size is None:
            raise UserError(f"the widths lack the {agent}'s group {name!r}, which has up to {most} channels")
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= most:
            raise UserError(
                f"the width of group {name!r} is {size!r}: it must be a whole number from 1 to {most}"
            )
    return {name: int(widths[name]) for name in dense}
