"""`report.html`: everything about a search in one file that any browser opens, without a network.

`content` gathers what is shown, as plain numbers; `page` puts it into HTML beside the script that draws it.
The charts are Apache ECharts, of which `assets/README.md` says how the part in use was made.
"""

from __future__ import annotations

from pathlib import Path

from search.durable_files import write_text
from search.report.content import gather
from search.report.page import render
from search.run_directory import RunDirectory


def write_report(run: RunDirectory) -> Path:
    """Write the report of a search as it stands into its run directory; returns where it is.

    Raises:
        UserError: no trial was completed, or a file of the run is damaged.
        OSError: it cannot be written.
    """
    path = run.path / "report.html"
    write_text(path, render(gather(run)))
    return path
