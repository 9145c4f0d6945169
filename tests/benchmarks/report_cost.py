"""What a report costs: `python tests/benchmarks/report_cost.py --json`.

The report of a run with `--trials` made-up trials: `write_seconds` to gather and write it, `megabytes` on the
disk; and in headless Chromium, from the file and with the network off, `ready_seconds` from the request until
the front is drawn and answers, and `scroll_seconds` until every other chart is drawn as well. Medians over
`--repeats`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from figures import run
from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1]))
import chromium
from report_runs import made_up_run

from search.report import write_report


def measure(options: argparse.Namespace) -> Mapping[str, object]:
    """Write the report, and open it."""
    ready, scrolled = [], []
    with tempfile.TemporaryDirectory() as directory:
        made = made_up_run(Path(directory) / "toy", options.trials)
        start = time.perf_counter()
        path = write_report(made).path
        written = time.perf_counter() - start
        size = path.stat().st_size
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium.EXECUTABLE, args=chromium.ARGUMENTS)
            for _ in range(options.repeats):
                context = browser.new_context(viewport={"width": 1280, "height": 800})
                context.set_offline(True)
                page = context.new_page()
                start = time.perf_counter()
                page.goto(path.as_uri(), wait_until="commit")
                page.wait_for_function("document.documentElement.dataset.ready")
                page.locator("#front-table tbody tr").first.click()
                ready.append(time.perf_counter() - start)
                start = time.perf_counter()
                for chart in ("course", "parallel", "importance"):
                    page.locator(f"#{chart}-chart").scroll_into_view_if_needed()
                    page.wait_for_selector(f"#{chart}-chart svg")
                scrolled.append(time.perf_counter() - start)
                context.close()
            browser.close()
    return {
        "trials": options.trials,
        "write_seconds": round(written, 2),
        "megabytes": round(size / 1e6, 2),
        "ready_seconds": round(statistics.median(ready), 2),
        "scroll_seconds": round(statistics.median(scrolled), 2),
    }


if __name__ == "__main__":
    run(__doc__, measure, trials=1000, repeats=5)
