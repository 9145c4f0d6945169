"""Commands as the user can paste them."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path


def command_name(name: str = "prunefront") -> str:
    """How to call a command of this environment: by name if the shell finds it, else by its path."""
    beside = Path(sys.executable).with_name(name)
    found = shutil.which(name)
    if (found and Path(found) == beside) or not beside.exists():
        return name
    return os.path.relpath(beside)
