"""What is sent to the machines of a cluster, which need not have it installed."""

from __future__ import annotations

from pathlib import Path

import agents
import components
from agents.agent import source_of


def own_code(kind: str | None = None) -> list[Path]:
    """Directories of packages and single modules: ours, and that of an agent of the user's own.

    Args:
        kind: of the agent; None for none.
    """
    packages = [Path(components.__file__).parent, Path(agents.__file__).parent, Path(__file__).parent]
    mine = None if kind is None else source_of(kind)
    return packages if mine is None else [*packages, mine]
