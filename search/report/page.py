"""The page of a report: one HTML file with style, script, the charts' library and the content inside."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from typing import Any

ASSETS = files("search.report") / "assets"


def render(content: Mapping[str, Any]) -> str:
    """The page that shows a report's content, as `search.report.content.gather` makes it."""
    # "</script" would end the element that the content is in, "<!--<script" would make it swallow the next.
    data = json.dumps(content, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    data = data.replace("<", "\\u003c")
    parts = {
        "title": escape(str(content["experiment"])),
        "style": _text("report.css"),
        "content": data,
        "library": base64.b64encode((ASSETS / "echarts.min.js.gz").read_bytes()).decode("ascii"),
        "script": _text("report.js"),
    }
    page = _text("report.html")
    # One pass: what is put in is not looked at again.
    pieces = page.split("{{")
    found = [pieces[0]]
    for piece in pieces[1:]:
        name, _, rest = piece.partition("}}")
        found += [parts[name], rest]
    return "".join(found)


def _text(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")
