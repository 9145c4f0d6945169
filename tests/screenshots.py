"""The pictures of the README, from a real run: `python tests/screenshots.py runs/autoencoder docs`."""

from __future__ import annotations

import sys
from pathlib import Path

import chromium
from playwright.sync_api import sync_playwright

from search.report import write_report
from search.run_directory import RunDirectory

if __name__ == "__main__":
    run, pictures = Path(sys.argv[1]), Path(sys.argv[2])
    pictures.mkdir(exist_ok=True)
    report = write_report(RunDirectory.open(run)).path.resolve()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium.EXECUTABLE, args=chromium.ARGUMENTS)
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.goto(report.as_uri())
        page.wait_for_function("document.documentElement.dataset.ready")
        page.screenshot(path=pictures / "report.png")
        page.locator("#front-chart").screenshot(path=pictures / "front.png")
        browser.close()
