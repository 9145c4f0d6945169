"""What `doctor` found, as people read it in a terminal, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from search.doctor import Check, Examined
from search.front_table import plain_table

STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}


def check_table(examined: Examined) -> Table:
    """One line per check; what to do stands below what is wrong."""
    table = plain_table(examined.name)
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("found", overflow="fold")
    for check in examined.checks:
        table.add_row(check.name, Text(check.status, STYLES[check.status]), _found(check))
    return table


def verdict(machines: Sequence[Examined]) -> str:
    """What it all comes to, in one sentence."""
    problems = sum(machine.problems for machine in machines)
    ill = [machine.name for machine in machines if machine.problems]
    if not problems:
        return "Ready: a search can run here." if len(machines) == 1 else "Ready: a search can run there."
    count = "1 problem" if problems == 1 else f"{problems} problems"
    where = f" on {', '.join(ill)}" if len(machines) > 1 else ""
    return f"{count}{where}: see what to do above."


def to_json(machines: Sequence[Examined]) -> dict[str, Any]:
    """Everything, JSON-able."""
    return {
        "ready": not any(machine.problems for machine in machines),
        "machines": [asdict(machine) for machine in machines],
    }


def _found(check: Check) -> Text:
    text = Text(check.found)
    if check.mend:
        text.append(f"\n→ {check.mend}", style="italic")
    return text
