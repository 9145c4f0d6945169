"""The README says what is so."""

from __future__ import annotations

import re
from pathlib import Path

import components
from agents.agent import agent_class
from search.config import load_experiment, parse_experiment

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_agent_that_it_shows_is_the_one_that_is_tested() -> None:
    example = (ROOT / "tests" / "example_agent.py").read_text(encoding="utf-8")
    assert example in blocks("python")
    assert len(example.splitlines()) <= 60


def test_its_experiment_is_valid_and_is_the_shipped_one_but_for_its_constraint() -> None:
    (text,) = blocks("yaml")
    shown = parse_experiment(text, source="README.md")
    shipped = load_experiment("autoencoder")
    agent = agent_class("autoencoder")
    assert agent(shown.agent.options).options == agent(shipped.agent.options).options
    assert shown.pruning == shipped.pruning
    assert shown.base == shipped.base
    assert shown.resources == shipped.resources
    assert shown.wandb == shipped.wandb
    assert shown.search.model_copy(update={"constraints": ()}) == shipped.search


def test_its_use_of_the_core_runs() -> None:
    import torch
    from torch import nn

    (text,) = [block for block in blocks("python") if block.startswith("import components")]
    model = nn.Sequential()
    model.add_module("encoder", nn.Sequential(nn.Linear(6, 8), nn.ELU(), nn.Linear(8, 4)))
    model.add_module("decoder", nn.Sequential(nn.Linear(4, 8), nn.ELU(), nn.Linear(8, 6)))
    names = {"model": model, "x": torch.randn(2, 6)}
    exec(text, names)
    state = names["state"]
    assert isinstance(state, dict)
    assert state["encoder.0.weight"].shape == (4, 6)
    assert state["decoder.0.weight"].shape == (4, 2)


def test_every_metric_is_in_its_table() -> None:
    table = README[README.index("| metric |") : README.index("The definitions are")]
    for metric in components.importance.METRICS:
        assert f"`{metric}`" in table
