"""The report in a real browser, from a file, with the network off: drawn, hovered, clicked, dark, printed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import chromium
import pytest
from report_runs import made_up_run

from search.report import write_report

api = pytest.importorskip("playwright.sync_api")
if chromium.EXECUTABLE is None:
    pytest.skip("there is no Chromium", allow_module_level=True)

pytestmark = pytest.mark.slow
TRIALS = 40


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(made_up_run(tmp_path_factory.mktemp("runs") / "toy", TRIALS)).path


@pytest.fixture(scope="module")
def browser() -> Iterator[api.Browser]:
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium.EXECUTABLE, args=chromium.ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: api.Browser, report: Path) -> Iterator:
    """A function that opens the report; whatever the page complains of fails the test."""
    complaints: list[str] = []
    contexts = []

    def opener(width: int = 1280, height: int = 800, scheme: str = "light") -> api.Page:
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        context.set_offline(True)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda asked: asked.url.startswith("file:") or complaints.append(asked.url))
        page.goto(report.as_uri())
        page.wait_for_function("document.documentElement.dataset.ready")
        return page

    yield opener
    for context in contexts:
        context.close()
    assert complaints == []


def content_of(report: Path) -> dict:
    page = report.read_text(encoding="utf-8")
    return json.loads(page.split('<script id="content" type="application/json">')[1].split("</script>")[0])


DRAWN = """() => Object.fromEntries(charts.map((chart) => [
    chart.getDom().id.replace("-chart", ""),
    Object.fromEntries(chart.getOption().series.map((one) => [one.name ?? "", one.data.length])),
]))"""
"""How many things every series of every chart has."""


def scroll_through(page: api.Page) -> None:
    for share in range(11):
        page.evaluate(f"scrollTo(0, document.body.scrollHeight * {share / 10})")
        page.wait_for_timeout(50)


def hover(page: api.Page, size: float, retention: float) -> tuple[float, float]:
    """Move the mouse to a point of the front's chart until its tooltip is there; where that was.

    Where ECharts has drawn a point is known to the chart alone, and on a busy machine it may still be drawing
    it elsewhere, after the row that was clicked has changed the page.
    """
    for _ in range(20):
        left, top = page.evaluate(
            """([x, y]) => {
                const chart = charts[0];
                const [left, top] = chart.convertToPixel({ xAxisIndex: 0, yAxisIndex: 0 }, [x, y]);
                const box = chart.getDom().getBoundingClientRect();
                return [box.left + left, box.top + top];
            }""",
            [size, retention],
        )
        page.mouse.move(0, 0)
        page.mouse.move(left, top)
        try:
            page.wait_for_function(
                "document.querySelector('#front-chart').innerText.includes('Trial')", timeout=3000
            )
        except api.TimeoutError:
            continue
        return left, top
    raise AssertionError("there is no tooltip where the chart says that it has drawn the trial")


def svg_of(page: api.Page, chart: str) -> str:
    return page.locator(f"#{chart}-chart svg").inner_html()


def wait_until_redrawn(page: api.Page, chart: str, before: str) -> None:
    """Wait until a chart no longer shows `before`: ECharts draws in one of the page's next frames."""
    page.wait_for_function(
        "([id, before]) => document.querySelector(`#${id}-chart svg`).innerHTML !== before",
        arg=[chart, before],
    )


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_every_chart_is_drawn_and_nothing_is_wider_than_the_screen(opened, report, width, height) -> None:
    page = opened(width, height)
    scroll_through(page)
    content = content_of(report)
    complete = content["trials"]["status"].count("complete")
    drawn = page.evaluate(DRAWN)
    assert drawn["front"]["front"] == len(content["front"]["trial"])
    assert (
        drawn["front"]["dominated"] + drawn["front"]["front"] + drawn["front"].get("baselines", 0) == complete
    )
    assert drawn["course"] == {"": TRIALS}
    assert drawn["parallel"] == {"": complete}
    importance = content["importance"]
    metric = next(iter(importance["metrics"].values()))
    assert drawn["importance"] == {"": sum(value is not None for row in metric["values"] for value in row)}
    steps = len(importance["steps"])
    assert drawn["ranks"] == dict.fromkeys(metric["groups"], steps)
    assert drawn["parts"] == dict.fromkeys(metric["parts"], steps)
    assert set(metric["parts"]) >= {"coupling", "component-specific", "encoder"}
    assert drawn["agreement"] == {"": len(importance["agreement"]["metrics"]) ** 2}
    rows = sum(len(shifts) for shifts in importance["shifts"].values())
    assert page.locator("#shifts tbody tr").count() == rows > 0
    # As many marks are really there as the chart was given.
    assert page.locator("#front-chart svg path").count() > complete
    assert page.locator("#importance-chart svg path").count() > drawn["importance"][""]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("#warning").is_hidden()


def test_a_point_that_is_clicked_is_shown_beside_the_chart(opened, report) -> None:
    page = opened()
    content = content_of(report)
    front = content["front"]["trial"]
    row = page.locator("#front-table tbody tr").nth(len(front) - 1)
    row.click()
    assert page.locator("#detail h3").inner_text() == f"Trial {front[-1]}"
    assert row.get_attribute("aria-current") == "true"
    index = content["trials"]["number"].index(front[0])
    page.evaluate("document.getElementById('front-chart').scrollIntoView()")
    place = hover(page, 100 * content["trials"]["size_ratio"][index], content["trials"]["retention"][index])
    assert f"Trial {front[0]}" in page.locator("#front-chart").inner_text()
    page.mouse.click(*place)
    assert page.locator("#detail h3").inner_text() == f"Trial {front[0]}"
    widths = page.locator("#detail .bars").first.inner_text()
    for group, kept in zip(content["trials"]["groups"], content["trials"]["widths"][index], strict=True):
        assert f"{group}\n{kept} / {content['base']['widths'][group]}" in widths
    command = page.locator("#detail code").inner_text()
    assert command == f"prunefront select {content['path']} --trial {front[0]} --out trial-{front[0]}"


def test_the_table_is_usable_by_keyboard(opened, report) -> None:
    page = opened()
    front = content_of(report)["front"]["trial"]
    page.locator("#front-table tbody tr").nth(1).focus()
    page.keyboard.press("Enter")
    assert page.locator("#detail h3").inner_text() == f"Trial {front[1]}"


def test_switches_redraw(opened) -> None:
    page = opened()
    for chart, switch in (
        ("front", "#front-linear"),
        ("front", "#front-test"),
        ("course", "input[value=seconds]"),
    ):
        scroll_through(page)
        before = svg_of(page, chart)
        page.locator(switch).click()
        wait_until_redrawn(page, chart, before)


def test_the_metric_is_chosen_for_all_charts_that_have_one(opened, report) -> None:
    page = opened()
    scroll_through(page)
    metrics = content_of(report)["importance"]["metrics"]
    chosen = list(metrics)[-1]
    page.locator("#importance-metric").select_option(chosen)
    found = page.evaluate(
        "() => Object.fromEntries(charts.map((chart) => [chart.getDom().id, chart.getOption().series]))"
    )
    ranks = {one["name"]: [value for _, value in one["data"]] for one in found["ranks-chart"]}
    assert ranks == dict(zip(metrics[chosen]["groups"], metrics[chosen]["ranks"], strict=True))
    parts = {one["name"]: [value for _, value in one["data"]] for one in found["parts-chart"]}
    assert parts == metrics[chosen]["parts"]


def test_dark_follows_the_reader_and_paper_is_light(opened) -> None:
    page = opened(scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(ground) == "rgb(18, 23, 30)"
    dark = svg_of(page, "front")
    page.emulate_media(color_scheme="light")
    page.wait_for_function(f"{ground} === 'rgb(255, 255, 255)'")
    wait_until_redrawn(page, "front", dark)
    light = svg_of(page, "front")
    page.emulate_media(color_scheme="dark")
    wait_until_redrawn(page, "front", light)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(ground) == "rgb(255, 255, 255)"
    for chart in ("front", "course", "parallel", "importance", "ranks", "parts", "agreement"):
        assert page.locator(f"#{chart}-chart svg path").count() > 3, f"{chart} is drawn for the paper too"
        box, drawing = (page.locator(f"#{chart}-chart {inner}").first.bounding_box() for inner in ("", "svg"))
        assert drawing["width"] <= box["width"] + 1 <= 702, f"{chart} is as wide as the paper"
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(ground) == "rgb(18, 23, 30)"
