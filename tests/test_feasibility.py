"""Possible models against building and counting by hand; constraints against every model that there is."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_agents
from serial_search import EXPERIMENT, make_ready
from toy_agents import INPUTS, Toy

from components.errors import UserError
from search.base import train_base
from search.checked_experiment import CheckedExperiment, check
from search.config import parse_experiment
from search.constraints import Constraint, parse_all
from search.feasibility import ORDERED, PossibleModel, possible_models, require_reachable
from search.measurement import decision_macs
from search.stability import STABILITIES
from search.trial import run_trial
from search.trial_types import TrialSpec

GROUPS = ("encoder.0", "latent", "decoder.0")


def checked(*overrides: str) -> CheckedExperiment:
    return check(parse_experiment(EXPERIMENT, name="toy", overrides=overrides), Path("nowhere"))


def models_of(experiment: CheckedExperiment) -> tuple[PossibleModel, ...]:
    return possible_models(experiment.config.agent.kind, experiment.agent, experiment.space)


def counted(hidden: int, latent: int, second: int) -> int:
    """Parameters of the toy, layer by layer."""
    layers = [(INPUTS, hidden), (hidden, latent), (latent, second), (second, INPUTS)]
    return sum(inputs * outputs + outputs for inputs, outputs in layers)


@pytest.mark.parametrize("max_ratio", [0.5, 0.9, 0.98])
def test_models_are_those_of_a_trial_with_their_plan(max_ratio: float) -> None:
    experiment = checked(f"pruning.max_ratio={max_ratio}", "agent.hidden=40", "agent.updates=20")
    for model in models_of(experiment):
        assert model.parameters == counted(*(model.widths[group] for group in GROUPS))
        assert model.macs == model.parameters - sum(model.widths.values()) - INPUTS  # no biases
        assert model.size_ratio == model.parameters / counted(40, 5, 40)
    smallest, middle, largest = models_of(experiment)
    assert [smallest.widths[g] for g in GROUPS] == [max(1, round((1 - max_ratio) * n)) for n in (40, 5, 40)]
    share = (1 - max_ratio) ** 0.5
    assert [middle.widths[g] for g in GROUPS] == [max(1, round(share * n)) for n in (40, 5, 40)]
    assert largest.size_ratio == 1.0


def test_a_trial_with_the_plan_of_a_model_makes_it(tmp_path) -> None:
    ready = make_ready(tmp_path / "toy", "agent.hidden=20")
    experiment = checked("agent.hidden=20")
    for model in models_of(experiment):
        spec = TrialSpec(
            0, model.plan(["l2", "fisher"]), "", 0, ready.checked.trial_settings(), model.options
        )
        result = run_trial(spec, ready.base)
        assert result.complete, result.reason
        assert dict(result.widths) == dict(model.widths)
        assert (result.parameters, result.macs) == (model.parameters, model.macs)


def test_searched_options_are_at_their_bounds() -> None:
    kind, options = "agent.kind=toy_agents:Repeating", "search.options={passes: [1, 9]}"
    smallest, middle, largest = models_of(checked(kind, options))
    assert [dict(model.options) for model in (smallest, middle, largest)] == [
        {"passes": 1},
        {"passes": 3},
        {"passes": 9},
    ]
    assert largest.macs == 9 * (largest.parameters - sum(largest.widths.values()) - INPUTS)


def every_model(experiment: CheckedExperiment) -> list[dict[str, float]]:
    """All that the toy's search can make, measured by building each."""
    least = models_of(experiment)[0].widths
    found = []
    full = counted(*(experiment.space.sizes[group] for group in GROUPS))
    for widths in itertools.product(*(range(least[g], experiment.space.sizes[g] + 1) for g in GROUPS)):
        agent = Toy(experiment.agent.options, dict(zip(GROUPS, widths, strict=True)), experiment.agent.data())
        parameters = sum(p.numel() for p in agent.model.parameters())
        found.append(
            {"parameters": parameters, "size_ratio": parameters / full, "macs": decision_macs(agent)}
        )
    return found


def test_constraints_are_refused_exactly_where_no_model_meets_them() -> None:
    experiment = checked("agent.hidden=5", "agent.latent=3", "pruning.max_ratio=0.6")
    smallest, _, largest = models_of(experiment)
    models = every_model(experiment)
    for name in ("parameters", "size_ratio", "macs"):
        values = sorted({model[name] for model in models})
        bounds = [values[0], values[-1], values[0] - 1e-6, values[-1] + 1e-6, values[1], 0.0, 1e9, -1.0]
        for operator, bound in itertools.product((">=", "<="), bounds):
            constraint = Constraint(name, operator, bound)
            reachable = any(constraint.violation(model[name]) <= 0 for model in models)
            expected = (
                nullcontext() if reachable else pytest.raises(UserError, match=f"constraints.{name} is")
            )
            with expected:
                require_reachable([constraint], smallest, largest, Toy.performance)


def test_the_bound_that_is_named_can_be_met() -> None:
    smallest, _, largest = models_of(checked())
    for name, operator, bound in [("parameters", "<=", 1.0), ("size_ratio", "<=", 1e-9), ("macs", ">=", 1e9)]:
        with pytest.raises(UserError) as refused:
            require_reachable([Constraint(name, operator, bound)], smallest, largest, Toy.performance)
        named = float(str(refused.value).split()[-1].replace(",", ""))
        require_reachable([Constraint(name, operator, named)], smallest, largest, Toy.performance)


def test_sizes_that_exclude_one_another_are_refused() -> None:
    smallest, _, largest = models_of(checked())

    def together(parameters: str, ratio: str) -> None:
        bounds = [*Constraint.parse("parameters", parameters), *Constraint.parse("size_ratio", ratio)]
        require_reachable(bounds, smallest, largest, Toy.performance)

    full = largest.parameters
    together(f"<= {full // 2}", ">= 0.4")
    together(f">= {full // 2}", "<= 0.6")
    together(f"<= {full // 2}", "<= 0.3")
    with pytest.raises(UserError, match="which no trial can meet together"):
        together(f"<= {full // 2}", ">= 0.6")
    with pytest.raises(UserError, match="which no trial can meet together"):
        together(f">= {full // 2}", "<= 0.4")


def test_sizes_with_two_bounds_each_are_refused_only_where_they_exclude_one_another() -> None:
    smallest, _, largest = models_of(checked())
    full = largest.parameters

    def together(parameters: str, ratio: str) -> None:
        bounds = parse_all({"parameters": parameters, "size_ratio": ratio})
        require_reachable(bounds, smallest, largest, Toy.performance)

    together(f">= {full // 4}, <= {full // 2}", ">= 0.3, <= 0.6")
    for ratio in (">= 0.6, <= 0.9", ">= 0.17, <= 0.2"):
        with pytest.raises(UserError, match="which no trial can meet together"):
            together(f">= {full // 4}, <= {full // 2}", ratio)


@pytest.mark.parametrize(("smaller", "larger"), ORDERED)
def test_bounds_on_what_is_never_above_another_are_refused_where_they_cross(smaller, larger) -> None:
    smallest, _, largest = models_of(checked())

    def together(low: str, high: str) -> None:
        bounds = parse_all({larger: high, smaller: low})
        require_reachable(bounds, smallest, largest, Toy.performance)

    together(">= 0.5", "<= 0.5")
    together("<= 0.6", ">= 0.5")
    together("<= 0.4", "<= 0.5")
    with pytest.raises(UserError) as refused:
        together(">= 0.6", "<= 0.5")
    assert str(refused.value) == (
        f"search.constraints.{smaller} is '>= 0.6' and search.constraints.{larger} '<= 0.5', which no trial "
        f"can meet together: {smaller} is never above {larger}"
    )


@pytest.mark.parametrize("name", STABILITIES)
def test_a_share_lies_between_0_and_1(name: str) -> None:
    smallest, _, largest = models_of(checked())
    for text in (">= 1.0", "<= 0.0"):
        require_reachable(Constraint.parse(name, text), smallest, largest, Toy.performance)
    for text, words in ((">= 1.5", "never above 1"), ("<= -0.5", "never below 0")):
        with pytest.raises(UserError, match=f"search.constraints.{name} is .*{words}"):
            require_reachable(Constraint.parse(name, text), smallest, largest, Toy.performance)


@pytest.mark.parametrize("kind", ["Toy", "Scoring"])
def test_retention_and_performance_that_exclude_one_another_are_refused(kind) -> None:
    base = train_base(f"toy_agents:{kind}", {}, seed=0, metrics=("l2",))
    performance = getattr(toy_agents, kind).performance
    smallest, _, largest = models_of(checked())
    reachable = np.linspace(base.trivial["validation"], base.performance["validation"], 21)
    for share, other, kept, reached in itertools.product((0.25, 0.75), (0.5,), (">=", "<="), (">=", "<=")):
        bound = base.trivial["validation"] * (1 - other) + base.performance["validation"] * other
        bounds = [Constraint("retention", kept, share), Constraint(performance.name, reached, bound)]
        met = any(
            bounds[0].violation(base.retention(value)) <= 0 and bounds[1].violation(value) <= 0
            for value in reachable
        )
        words = f"search.constraints.{performance.name} is .* together: .* is a retention of 0.5$"
        with nullcontext() if met else pytest.raises(UserError, match=words):
            require_reachable(bounds, smallest, largest, performance, base)
        require_reachable(bounds, smallest, largest, performance)  # before there is a base, nobody knows


def test_retention_and_errors_have_limits_as_far_as_they_are_known(tmp_path) -> None:
    ready = make_ready(tmp_path / "toy")
    smallest, _, largest = models_of(checked())
    perfect = ready.base.retention(0.0)

    def check_one(name: str, text: str, base=None) -> None:
        require_reachable(Constraint.parse(name, text), smallest, largest, Toy.performance, base)

    check_one("retention", ">= 5")  # nothing is known before the base is trained
    check_one("retention", f">= {perfect}", ready.base)
    check_one("retention", "<= -3", ready.base)
    check_one("reconstruction_error", "<= 0")
    for name, text, base in [
        ("retention", f">= {perfect + 1e-3}", ready.base),
        ("reconstruction_error", "<= -0.1", None),
        ("latency_p99_ms", "<= -1", None),
    ]:
        with pytest.raises(UserError, match=f"search.constraints.{name} is .*, which no trial can meet"):
            check_one(name, text, base)
    untrained = replace(ready.base, performance={})
    check_one("retention", ">= 5", untrained)


def test_possible_models_leave_the_agent_as_it_was() -> None:
    experiment = checked()
    before = {name: tensor.clone() for name, tensor in experiment.agent.model.state_dict().items()}
    models_of(experiment)
    for name, tensor in experiment.agent.model.state_dict().items():
        assert torch.equal(tensor, before[name])
