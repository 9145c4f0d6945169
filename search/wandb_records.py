"""What Weights & Biases gets of a search, as plain rows: no wandb here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level, names joined with `/`, as are parts that dots separate.

    W&B's workspaces take a dot in a name for nesting.
    """
    result: dict[str, Any] = {}
    for key, value in config.items():
        name = prefix + str(key).replace(".", "/")
        if isinstance(value, Mapping):
            result |= flat(value, name + "/")
        else:
            result[name] = value
    return result


def trial_run(record: Record) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """What W&B gets of a trial: its configuration, the rows of its history, and its summary; all flat.

    The last row has the measurements, the ones before it the performance and the rung losses along
    fine-tuning. What a stopped or failed trial did not measure is left out.
    """
    config = {
        "trial": record["trial"],
        "origin": record["origin"],
        "seed": record["seed"],
        **flat(record["ratios"], "ratio/"),
        **flat(record["coefficients"], "coefficient/"),
        **flat(record.get("options") or {}, "option/"),
    }
    rungs = [
        *((updates, "performance", value) for updates, value in record.get("rungs") or ()),
        *((updates, "rung_loss", value) for updates, value in record.get("rung_losses") or ()),
    ]
    rows: list[dict[str, Any]] = [
        {"fine_tune/updates": updates, f"fine_tune/{name}": value} for updates, name, value in sorted(rungs)
    ]
    measured = {
        **{name: record.get(name) for name in ("parameters", "size_ratio", "macs", "retention")},
        **flat(record.get("latencies") or {}),
        **flat(record["objectives"]),
        **flat(record["performance"], "performance/"),
    }
    measured = {name: value for name, value in measured.items() if value is not None}
    if measured:
        rows.append(measured)
    summary = {
        "status": record["status"],
        "reason": record["reason"],
        "updates": record.get("updates"),
        **flat(record["component_sizes"], "size/"),
        **flat(record["widths"], "width/"),
        **flat(record["timings"], "seconds/"),
        **flat(record.get("usage") or {}, "usage/"),
        **flat(record.get("fine_tuning") or {}, "fine_tuning/"),
        "repaired_by": record.get("repaired_by") or None,
        **{name: record.get(name) for name in ("host", "started", "finished")},
    }
    return config, rows, {name: value for name, value in summary.items() if value is not None}


def front_table(front: Sequence[Record]) -> tuple[list[str], list[list[Any]]]:
    """The front as columns and rows: every number, text or truth value of its trials, flattened."""
    rows = [
        {name: value for name, value in flat(trial).items() if isinstance(value, bool | int | float | str)}
        for trial in front
    ]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return columns, [[row.get(name) for name in columns] for row in rows]


def importance_table(importance: Record) -> tuple[list[str], list[list[Any]]]:
    """The importance of groups over training, as a report has it, as columns and rows.

    `value` is the binary logarithm of how much a channel of the group counted, over the average channel.
    """
    rows = [
        [metric, group, step, value]
        for metric, found in importance.get("metrics", {}).items()
        for group, values in zip(found["groups"], found["values"], strict=True)
        for step, value in zip(importance["steps"], values, strict=True)
        if value is not None
    ]
    return ["metric", "group", "step", "value"], rows
