"""Charts of a search for Weights & Biases, as Plotly figures, which it draws itself: no wandb here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from search.wandb_records import Record

Tried: TypeAlias = tuple[int, str, float, float]
"""A complete trial: its number, who proposed it, its size over the base's, its retention."""

PLOTTED = 2000
"""Trials beside the front that are drawn at most; of more, every second or third and so on."""

_BASELINE = "anchor: "
_BLUE, _ORANGE, _GREY, _BLACK = "#1f6feb", "#d1690e", "#9aa0a6", "#202124"
_MANY = (_BLUE, _ORANGE, "#15803d", "#7c3aed", "#be185d", "#0e7490", "#a16207", _BLACK)
_DASHES = ("solid", "dash", "dot")


def front_plot(front: Sequence[Record], tried: Sequence[Tried]) -> Figure:
    """Retention against size: the front and its line, what it dominates, the base, and the baselines.

    Args:
        front: a mapping with `trial`, `size_ratio`, `retention` and `parameters` per trial.
        tried: all complete trials. Those that every search begins with, one ratio for all groups or one
            metric alone, are its baselines.
    """
    from plotly.graph_objects import Figure

    members = {trial["trial"] for trial in front}
    baselines = [trial for trial in tried if trial[1].startswith(_BASELINE)]
    others = [trial for trial in tried if trial[0] not in members and not trial[1].startswith(_BASELINE)]
    others = others[:: max(1, -(-len(others) // PLOTTED))]
    line = _frontier([(trial["size_ratio"], trial["retention"]) for trial in front])
    figure = Figure(layout=_layout("Retention against size", "parameters, share of the base's", "retention"))
    figure.update_xaxes(type="log", tickformat="~%", dtick="D2")  # ticks at 1, 2, 5, 10 ...
    figure.add_scatter(
        name="other trials",
        mode="markers",
        marker={"color": _GREY, "opacity": 0.45, "size": 6},
        **_points(others),
    )
    figure.add_scatter(
        name="baselines",
        mode="markers",
        marker={"color": _ORANGE, "symbol": "diamond-open", "size": 9},
        **_points(baselines),
    )
    figure.add_scatter(
        name="front",
        mode="lines",
        line={"color": _BLUE, "shape": "hv", "width": 2},
        hoverinfo="skip",
        showlegend=False,
        x=[size for size, _ in line],
        y=[retention for _, retention in line],
    )
    figure.add_scatter(
        name="front",
        mode="markers",
        marker={"color": _BLUE, "size": 9},
        x=[trial["size_ratio"] for trial in front],
        y=[trial["retention"] for trial in front],
        text=[f"trial {trial['trial']}<br>{trial['parameters']:,} parameters" for trial in front],
        hovertemplate=_HOVER,
    )
    figure.add_scatter(
        name="base",
        mode="markers",
        marker={"color": _BLACK, "symbol": "star", "size": 12},
        x=[1.0],
        y=[1.0],
        text=["the base"],
        hovertemplate=_HOVER,
    )
    return figure


def _one_below_the_other(metrics: Mapping[str, Any]) -> Figure:
    """An empty chart for each metric, all over the same training steps."""
    from plotly.subplots import make_subplots

    return make_subplots(
        rows=len(metrics),
        cols=1,
        shared_xaxes=True,
        subplot_titles=list(metrics),
        vertical_spacing=min(0.08, 0.3 / len(metrics)),
    )


def importance_plot(importance: Record) -> Figure | None:
    """A heat map for each metric: groups by steps of the training; None where nothing is known.

    Args:
        importance: as a report has it: `steps`, and `metrics`, each with `groups` and `values` by group and
            step: the binary logarithm of how much a channel counted, over the average channel.
    """
    metrics: Mapping[str, Mapping[str, Any]] = importance.get("metrics") or {}
    if not metrics:
        return None
    figure = _one_below_the_other(metrics)
    known = [
        abs(value)
        for found in metrics.values()
        for row in found["values"]
        for value in row
        if value is not None
    ]
    for row, found in enumerate(metrics.values(), start=1):
        figure.add_heatmap(
            x=list(importance["steps"]),
            y=list(found["groups"]),
            z=[list(values) for values in found["values"]],
            coloraxis="coloraxis",
            hovertemplate="%{y}<br>step %{x}: 2<sup>%{z:.2f}</sup> × the average channel<extra></extra>",
            row=row,
            col=1,
        )
    most = max(known, default=1.0) or 1.0
    groups = sum(len(found["groups"]) for found in metrics.values())
    figure.update_layout(
        **_layout("Importance of groups over training"),
        coloraxis={
            "colorscale": "RdBu",
            "cmin": -most,
            "cmax": most,
            "colorbar": {"title": {"text": "log2"}},
        },
        height=160 + 24 * groups + 60 * len(metrics),
    )
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_xaxes(title_text="training step", row=len(metrics), col=1)
    return figure


def ranks_plot(importance: Record) -> Figure | None:
    """Lines for each metric: ranks of groups over the training, 1 on top; None where nothing is known.

    Args:
        importance: as a report has it: `steps`, and `metrics`, each with `groups` and their `ranks` by step.
    """
    metrics = {name: found for name, found in (importance.get("metrics") or {}).items() if found.get("ranks")}
    if not metrics:
        return None
    figure = _one_below_the_other(metrics)
    for row, found in enumerate(metrics.values(), start=1):
        for place, (group, ranks) in enumerate(zip(found["groups"], found["ranks"], strict=True)):
            figure.add_scatter(
                name=group,
                legendgroup=group,
                showlegend=row == 1,
                mode="lines+markers",
                line={
                    "color": _MANY[place % len(_MANY)],
                    "dash": _DASHES[place // len(_MANY) % len(_DASHES)],
                },
                x=list(importance["steps"]),
                y=list(ranks),
                hovertemplate=f"{group}<br>step %{{x}}: rank %{{y}}<extra></extra>",
                row=row,
                col=1,
            )
    groups = max(len(found["groups"]) for found in metrics.values())
    figure.update_layout(
        **_layout("Ranks of groups over training"), height=160 + (60 + 22 * groups) * len(metrics)
    )
    figure.update_yaxes(autorange="reversed", tickformat="d", title_text="rank")
    figure.update_xaxes(title_text="training step", row=len(metrics), col=1)
    return figure


def matters_plot(matters: Mapping[str, Mapping[str, float]]) -> Figure | None:
    """Bars: how much of each measurement every choice explains; None where nothing is known.

    Args:
        matters: measurement -> choice -> share, 0 to 1.
    """
    names = [name for name, shares in matters.items() if shares]
    if not names:
        return None
    from plotly.graph_objects import Figure

    choices = dict.fromkeys(choice for shares in matters.values() for choice in shares)
    order = sorted(choices, key=lambda choice: sum(matters[name].get(choice, 0.0) for name in names))
    figure = Figure(layout=_layout("What matters", "share of what is explained", ""))
    for name in names:
        figure.add_bar(
            name=name, orientation="h", x=[matters[name].get(choice, 0.0) for choice in order], y=order
        )
    figure.update_layout(height=160 + 18 * len(order) * len(names), bargroupgap=0.1)
    figure.update_xaxes(tickformat="~%")
    figure.update_yaxes(automargin=True)
    return figure


_HOVER = "%{text}<br>%{x:.3%} of the base's size<br>retention %{y:.3f}<extra></extra>"


def _points(trials: Sequence[Tried]) -> dict[str, Any]:
    return {
        "x": [size for _, _, size, _ in trials],
        "y": [retention for _, _, _, retention in trials],
        "text": [f"trial {number}<br>{origin}" for number, origin, _, _ in trials],
        "hovertemplate": _HOVER,
    }


def _frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of the points, smallest first, those that retain more than every smaller one.

    A front of three objectives has others.
    """
    found: list[tuple[float, float]] = []
    for size, retention in sorted(points, key=lambda point: (point[0], -point[1])):
        if not found or retention > found[-1][1]:
            found.append((size, retention))
    return found


def _layout(title: str, x: str | None = None, y: str | None = None) -> dict[str, Any]:
    axes = {} if x is None else {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}
    return {
        **axes,
        "title": {"text": title},
        "template": "none",
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        "margin": {"l": 80, "r": 20, "t": 80, "b": 60},
    }
