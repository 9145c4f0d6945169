"""What a search would do and cost, as people read it in a terminal, and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.table import Table

from search.cost import FRONT_SHARE, START_SECONDS, SearchCost
from search.front import percent
from search.front_table import plain_table
from search.outline import Outline
from search.profile import Prediction


def component_table(plan: Outline) -> Table:
    """Parameters and multiply-accumulates of every component."""
    table = plain_table("Components of the base")
    for heading in ("component", "parameters", "", "MACs of a decision", ""):
        table.add_column(heading, justify="left" if heading == "component" else "right", no_wrap=True)
    parameters = sum(component.parameters for component in plan.components)
    macs = sum(component.macs for component in plan.components)
    for component in plan.components:
        table.add_row(
            component.name if component.parameters else f"{component.name} (no weights)",
            f"{component.parameters:,}",
            _share(component.parameters, parameters),
            f"{component.macs:,}",
            _share(component.macs, macs),
        )
    table.add_section()
    table.add_row("all", f"{parameters:,}", "", f"{macs:,}", "")
    return table


def group_table(plan: Outline) -> Table:
    """Pruning groups, what they cut, and which share a ratio."""
    table = plain_table(f"Pruning groups; {plan.dimensions} dimensions to search")
    table.add_column("group", no_wrap=True)
    table.add_column("channels", justify="right", no_wrap=True)
    table.add_column("kept at least", justify="right", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    table.add_column("ratio shared with")
    for group in plan.groups:
        kind = "coupling: " if len(group.components) > 1 else "component-specific: "
        table.add_row(
            group.name,
            f"{group.channels:,}",
            f"{group.least:,}" if group.searched else "not searched",
            _shortened(kind + ", ".join(group.components), 44),
            ", ".join(group.shares_with),
        )
    return table


def model_table(plan: Outline) -> Table:
    """The smallest, the middle and the largest possible model."""
    table = plain_table("Possible models")
    table.add_column("model", no_wrap=True)
    for heading in ("kept of every group", "parameters", "size", "MACs of a decision"):
        table.add_column(heading, justify="right", no_wrap=True)
    options = list(plan.models[0].options)
    for name in options:
        table.add_column(name.replace("_", " "), justify="right")
    for model in plan.models:
        table.add_row(
            model.name,
            percent(model.kept_share),
            f"{model.parameters:,}",
            percent(model.size_ratio),
            f"{model.macs:,}",
            *(str(model.options[name]) for name in options),
        )
    return table


def stage_table(prediction: Prediction, trials: int) -> Table:
    """Seconds of a trial by stage and size, and of all trials; empty where no trial was measured."""
    where = "" if prediction.device == "cpu" else " on the GPU"
    table = plain_table(f"Seconds of a trial{where}")
    table.add_column("stage", no_wrap=True)
    for heading in ("smallest", "middle", "largest", "mean", f"{trials:,} trials"):
        table.add_column(heading, justify="right", no_wrap=True)
    measured = prediction.measured
    if measured is None:
        return table
    sizes = (measured.smallest, measured.middle, measured.largest, measured.mean)
    seconds = prediction.train_each
    if seconds != 0:
        alike = "?" if seconds is None else f"{seconds:.3g}"
        table.add_row("train", *[alike] * 4, "?" if seconds is None else about(trials * seconds))
    for stage, mean in measured.mean.items():
        row = [f"{stages.get(stage, 0.0):.3f}" for stages in sizes]
        table.add_row(stage.replace("_", "-"), *row, about(trials * mean))
    table.add_section()
    totals = [sum(stages.values()) for stages in sizes]
    table.add_row("all", *(f"{total:.3f}" for total in totals), about(trials * totals[-1]))
    return table


def cost_table(prediction: Prediction, trials: int) -> Table:
    """What the whole search takes with different resources; what it does here by itself comes first."""
    table = plain_table(f"Predicted time of the search, {trials:,} trials")
    for heading in ("at a time", "CPUs each", "start", "base", "trials", "test", "all"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("limited by", no_wrap=True)
    table.add_column("where", no_wrap=True)
    for place, cost in enumerate(prediction.costs):
        whole = about(cost.total)
        elsewhere = "here" if cost.setting.here else f"{cost.setting.total_cpus:g} CPUs"
        table.add_row(
            f"{cost.setting.at_once}",
            f"{cost.setting.cpus:g}",
            about(cost.start),
            "?" if cost.train is None else about(cost.train),
            about(cost.trials),
            about(cost.test),
            f"{whole} + base" if cost.train is None else whole,
            cost.limit,
            "as configured" if place == 0 else elsewhere,
        )
    return table


def basis_lines(plan: Outline, prediction: Prediction) -> list[str]:
    """What the prediction rests on, one sentence each."""
    training = prediction.training
    seconds = "" if training.seconds is None else f"{about(training.seconds)}, "
    each = ""
    if prediction.train_each != 0:
        each = " first, and again in every trial" if prediction.trained_first else " in every trial"
    lines = (
        [f"Base: {seconds}{training.basis}{each}."] if training.seconds != 0 else ["Base: already trained."]
    )
    lines.append(
        f"Proposals: {plan.sampler} takes {about(prediction.propose)} for all "
        f"{plan.trials:,} of them, one after the other."
    )
    if prediction.measured is not None:
        lines.append(
            f"Start: {START_SECONDS:g} s for the command and Ray, {prediction.measured.set_up:.1f} s "
            f"more for a worker's first trial. Test: {prediction.measured.test:.2g} s for each trial of the "
            f"front, taken to be {percent(FRONT_SHARE)} of all."
        )
    return [*lines, *prediction.notes]


def about(seconds: float) -> str:
    """Seconds to two digits: `4.2 s`, `85 s`, `3.1 min`, `12 min`, `3.5 h`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 597:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def to_json(plan: Outline, prediction: Prediction) -> dict[str, Any]:
    """Everything, JSON-able; seconds, parameters, multiply-accumulates."""
    content = {**asdict(plan), "prediction": asdict(prediction)}
    measured = prediction.measured
    if measured is not None:
        content["prediction"]["measured"]["mean"] = measured.mean
    content["prediction"]["costs"] = [_cost(cost) for cost in prediction.costs]
    return content


def _cost(cost: SearchCost) -> dict[str, Any]:
    return {**asdict(cost), "total": cost.total}


def _share(part: int, whole: int) -> str:
    return percent(part / whole) if whole else ""


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
