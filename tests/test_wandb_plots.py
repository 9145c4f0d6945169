"""Charts for W&B: what is drawn, and where."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from search import pareto
from search.wandb_plots import PLOTTED, Tried, front_plot, importance_plot, matters_plot, ranks_plot


def drawn(figure: Any) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """(name, mode) -> points."""
    content = json.loads(json.dumps(figure.to_plotly_json()))  # it is what W&B stores
    return {
        (trace["name"], trace["mode"]): list(zip(trace["x"], trace["y"], strict=True))
        for trace in content["data"]
    }


def members(trials: list[Tried]) -> list[dict[str, Any]]:
    return [
        {"trial": number, "parameters": round(1000 * size), "size_ratio": size, "retention": retention}
        for number, _, size, retention in trials
    ]


@pytest.mark.parametrize("seed", range(5))
def test_every_trial_is_drawn_once(seed: int) -> None:
    random = np.random.default_rng(seed)
    tried: list[Tried] = [
        (n, "anchor: uniform 50 %" if n < 4 else "tpe", *map(float, random.random(2))) for n in range(40)
    ]
    values = np.array([trial[2:] for trial in tried])
    front = {int(n) for n in pareto.front(values, ["minimize", "maximize"])}
    found = drawn(front_plot(members([trial for trial in tried if trial[0] in front]), tried))
    assert set(found["front", "markers"]) == {trial[2:] for trial in tried if trial[0] in front}
    assert set(found["baselines", "markers"]) == {trial[2:] for trial in tried[:4]}
    assert set(found["other trials", "markers"]) == {
        trial[2:] for trial in tried[4:] if trial[0] not in front
    }
    assert found["base", "markers"] == [(1.0, 1.0)]
    assert found["front", "lines"] == sorted(found["front", "markers"])


def test_the_line_leaves_out_what_only_a_third_objective_keeps() -> None:
    trials: list[Tried] = [(0, "tpe", 0.1, 0.5), (1, "tpe", 0.2, 0.4), (2, "tpe", 0.2, 0.7)]
    found = drawn(front_plot(members(trials), trials))
    assert found["front", "lines"] == [(0.1, 0.5), (0.2, 0.7)]
    assert len(found["front", "markers"]) == 3


def test_a_large_search_is_thinned_but_not_its_front_or_baselines() -> None:
    count = 3 * PLOTTED + 7
    tried: list[Tried] = [(n, "anchor: dense" if n < 9 else "tpe", 0.5, 0.5) for n in range(count)]
    found = drawn(front_plot(members(tried[-20:]), tried))
    assert PLOTTED / 2 < len(found["other trials", "markers"]) <= PLOTTED
    assert len(found["front", "markers"]) == 20
    assert len(found["baselines", "markers"]) == 9


def test_an_empty_front_is_drawn() -> None:
    assert drawn(front_plot([], []))["front", "lines"] == []


def test_importance_is_a_heat_map_for_each_metric() -> None:
    metrics = {
        "fisher": {"groups": ["latent", "encoder.0"], "values": [[0.5, 3.0], [-0.5, None]]},
        "taylor": {"groups": ["latent"], "values": [[0.0, 1.0]]},
    }
    figure = importance_plot({"steps": [10, 20], "metrics": metrics})
    assert figure is not None
    content = json.loads(json.dumps(figure.to_plotly_json()))
    assert [trace["z"] for trace in content["data"]] == [found["values"] for found in metrics.values()]
    assert [trace["y"] for trace in content["data"]] == [found["groups"] for found in metrics.values()]
    assert [trace["x"] for trace in content["data"]] == [[10, 20], [10, 20]]
    assert [title["text"] for title in content["layout"]["annotations"]] == list(metrics)
    scale = content["layout"]["coloraxis"]
    assert (scale["cmin"], scale["cmax"]) == (-3.0, 3.0), "no difference is white"
    assert importance_plot({}) is None


def test_ranks_are_a_line_for_each_group_in_each_metric() -> None:
    metrics = {
        "fisher": {"groups": ["latent", "encoder.0"], "ranks": [[1.0, 2.0], [2.0, None]]},
        "taylor": {"groups": ["latent", "encoder.0"], "ranks": [[1.5, 1.0], [1.5, 2.0]]},
    }
    figure = ranks_plot({"steps": [10, 20], "metrics": metrics})
    assert figure is not None
    content = json.loads(json.dumps(figure.to_plotly_json()))
    assert [(trace["name"], trace["x"], trace["y"]) for trace in content["data"]] == [
        (group, [10, 20], ranks)
        for found in metrics.values()
        for group, ranks in zip(found["groups"], found["ranks"], strict=True)
    ]
    assert [trace["showlegend"] for trace in content["data"]] == [True, True, False, False]
    assert {content["layout"][axis]["autorange"] for axis in ("yaxis", "yaxis2")} == {"reversed"}
    assert (
        ranks_plot({"steps": [10], "metrics": {"fisher": {"groups": ["latent"], "values": [[1.0]]}}}) is None
    )
    assert ranks_plot({}) is None


def test_what_matters_is_a_bar_for_each_choice() -> None:
    shares = {"parameters": {"share latent": 0.75}, "retention": {"share latent": 0.25, "weight l2": 0.5}}
    figure = matters_plot(shares)
    assert figure is not None
    content = json.loads(json.dumps(figure.to_plotly_json()))
    bars = {trace["name"]: dict(zip(trace["y"], trace["x"], strict=True)) for trace in content["data"]}
    assert bars == {
        "parameters": {"weight l2": 0.0, "share latent": 0.75},
        "retention": {"weight l2": 0.5, "share latent": 0.25},
    }
    assert content["data"][0]["y"][-1] == "share latent", "what matters most is on top"
    assert matters_plot({"retention": {}}) is None
    assert matters_plot({}) is None
