"""`report.html`: everything about a search in one file that any browser opens, without a network.

`content` gathers what is shown, as plain numbers; `page` puts it into HTML beside the script that draws it.
The charts are Apache ECharts, of which `assets/README.md` says how the part in use was made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search.durable_files import write_text
from search.report.content import gather
from search.report.page import render
from search.run_directory import RunDirectory

REPORT = "report.html"
"""Its name in a run directory."""


@dataclass(frozen=True)
class Report:
    """A report that was written.

    Attributes:
        path: of the file.
        content: what it shows, as `gather` makes it.
    """

    path: Path
    content: Mapping[str, Any]


def write_report(run: RunDirectory) -> Report:
    """Write the report of a search as it stands into its run directory.

    Raises:
        UserError: no trial was completed, or a file of the run is damaged.
        OSError: it cannot be written.
    """
    content = gather(run)
    path = run.path / REPORT
    write_text(path, render(content))
    return Report(path, content)
