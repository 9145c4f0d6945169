"""Which models a search can make, and whether its constraints leave any: seen before a trial is run.

The extremes are built for real. Size and cost grow with every kept channel, so that whatever lies between the
smallest and the largest possible model is all that there is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from agents.agent import Agent, Objective, agent_class
from components.choosing import kept_count
from components.errors import UserError
from components.plan import PruningPlan
from components.size import parameter_count
from search.constraints import Constraint
from search.measurement import LATENCIES, decision_macs
from search.space import SearchSpace
from search.stability import STABILITIES

if TYPE_CHECKING:
    from search.base import Base

Name = Literal["smallest", "middle", "largest"]

NEVER_NEGATIVE = frozenset({"reconstruction_error", "return_standard_error", *LATENCIES, *STABILITIES})
"""Measurements that cannot be below 0."""

ORDERED = (
    ("latency_median_ms", "latency_p99_ms"),
    ("stability_low", "stability"),
    ("stability", "stability_high"),
    ("stability_low", "stability_high"),
    ("lyapunov_decrease_low", "lyapunov_decrease"),
    ("lyapunov_decrease", "lyapunov_decrease_high"),
    ("lyapunov_decrease_low", "lyapunov_decrease_high"),
    ("worst_return", "return"),
)
"""Measurements of which the first is never above the second."""


@dataclass(frozen=True)
class PossibleModel:
    """A model that a search can make.

    Attributes:
        name: `smallest`, every kept share at its least; `middle`, at the middle of its logarithm; `largest`,
            nothing removed. Searched options likewise.
        kept_share: of every searched group, before it is rounded to channels.
        widths: group -> channels, all groups.
        options: searched options of the agent, and their values.
        parameters: as a trial counts them.
        size_ratio: `parameters` over those of the base.
        macs: multiply-accumulates of one decision.
    """

    name: Name
    kept_share: float
    widths: Mapping[str, int]
    options: Mapping[str, int]
    parameters: int
    size_ratio: float
    macs: int

    def plan(self, metrics: Iterable[str]) -> PruningPlan:
        """The plan of a trial that makes this model, its metrics mixed equally."""
        return PruningPlan(dict.fromkeys(metrics, 1.0), dict.fromkeys(self.widths, 1.0 - self.kept_share))


def possible_models(kind: str, agent: Agent, space: SearchSpace) -> tuple[PossibleModel, ...]:
    """The smallest, the middle and the largest model of a search, built and measured.

    Args:
        kind: of the agent.
        agent: unpruned.
        space: what is searched.
    """
    return tuple(_possible(name, kind, agent, space) for name in ("smallest", "middle", "largest"))


def require_reachable(
    constraints: Sequence[Constraint],
    smallest: PossibleModel,
    largest: PossibleModel,
    performance: Objective,
    base: Base | None = None,
) -> None:
    """Refuse constraints that no trial can meet, as far as that can be known beforehand.

    Sizes and multiply-accumulates lie between those of the smallest and the largest model; errors are never
    below 0, so that retention has a limit too once the base is trained. Each constraint is looked at alone,
    and `parameters` and `size_ratio`, retention and performance, and measurements that are `ORDERED` together
    as well; what models of a limited size can achieve is not known.

    Args:
        constraints: of the search.
        smallest, largest: of its possible models.
        performance: what the agent measures.
        base: trained; None where it is not.

    Raises:
        UserError: naming the constraint, its bound and the nearest value that can be reached.
    """
    ranges = _ranges(smallest, largest, performance, base)
    for constraint in constraints:
        least, most, what = ranges.get(constraint.name, (-math.inf, math.inf, ("", "")))
        nearest = most if constraint.operator == ">=" else least
        if constraint.violation(nearest) > 0:
            limit = "at most" if constraint.operator == ">=" else "at least"
            raise UserError(
                f"search.constraints.{constraint.name} is '{constraint}', which no trial can meet: "
                f"{what[constraint.operator == '>='].format(_shown(nearest))}, so the bound must be {limit} "
                f"{_shown(nearest, constraint.operator)}"
            )
    _require_compatible_sizes(constraints, largest.parameters)
    _require_order(constraints)
    if base is not None and base.trained:
        _require_compatible_performance(constraints, performance, base)


def _possible(name: Name, kind: str, agent: Agent, space: SearchSpace) -> PossibleModel:
    least = 1.0 - space.max_ratio
    share = {"smallest": least, "middle": math.sqrt(least), "largest": 1.0}[name]
    options = {
        option: {
            "smallest": bounds.low,
            "middle": bounds.clip(round(math.sqrt(bounds.low * bounds.high))),
            "largest": bounds.high,
        }[name]
        for option, bounds in space.options.items()
    }
    widths = {
        group: kept_count(size, 1.0 - share, space.round_to) if group in space.keeps else size
        for group, size in space.sizes.items()
    }
    model = agent_class(kind)({**agent.options, **options}, widths, agent.data())
    parameters = parameter_count(model.model)
    ratio = parameters / parameter_count(agent.model)
    return PossibleModel(name, share, widths, options, parameters, ratio, decision_macs(model))


def _ranges(
    smallest: PossibleModel, largest: PossibleModel, performance: Objective, base: Base | None
) -> dict[str, tuple[float, float, tuple[str, str]]]:
    """Measurement -> least, most, and half a sentence on either."""
    ranges: dict[str, tuple[float, float, tuple[str, str]]] = {}
    sizes = {"parameters": "{} parameters", "size_ratio": "size ratio {}", "macs": "{} MACs of a decision"}
    for measurement, amount in sizes.items():
        called = (f"the smallest possible model has {amount}", f"the largest possible model has {amount}")
        ranges[measurement] = (getattr(smallest, measurement), getattr(largest, measurement), called)
    for measurement in NEVER_NEGATIVE:
        most = 1.0 if measurement in STABILITIES else math.inf
        words = measurement.replace("_", " ")
        ranges[measurement] = (0.0, most, (f"{words} is never below {{}}", f"{words} is never above {{}}"))
    if base is not None and base.trained and performance.name in NEVER_NEGATIVE:
        most = base.retention(0.0)
        called = ("", f"with a {performance.name.replace('_', ' ')} of 0, retention is {{}}")
        ranges["retention"] = (-math.inf, most, called)
    return ranges


def _require_compatible_sizes(constraints: Sequence[Constraint], base_parameters: int) -> None:
    """Refuse bounds on `parameters` and `size_ratio` that exclude one another."""
    for parameters, ratio in _pairs(constraints, "parameters", "size_ratio"):
        implied = ratio.bound * base_parameters
        upper, lower = (
            (parameters.bound, implied) if parameters.operator == "<=" else (implied, parameters.bound)
        )
        if parameters.operator != ratio.operator and lower > upper:
            raise UserError(
                f"search.constraints.parameters is '{parameters}' and search.constraints.size_ratio "
                f"'{ratio}', which no trial can meet together: that size ratio is {implied:,.1f} parameters"
            )


def _require_compatible_performance(
    constraints: Sequence[Constraint], performance: Objective, base: Base
) -> None:
    """Refuse bounds on retention and on the performance that it is of that exclude one another."""
    flipped = {">=": "<=", "<=": ">="} if performance.direction == "minimize" else {">=": ">=", "<=": "<="}
    for reached, kept in _pairs(constraints, performance.name, "retention"):
        implied, operator = base.retention(reached.bound), flipped[reached.operator]
        low, high = (kept.bound, implied) if operator == "<=" else (implied, kept.bound)
        if operator != kept.operator and low > high:
            raise UserError(
                f"search.constraints.{performance.name} is '{reached}' and search.constraints.retention "
                f"'{kept}', which no trial can meet together: a {performance.name.replace('_', ' ')} of "
                f"{_shown(reached.bound)} is a retention of {implied:.5g}"
            )


def _require_order(constraints: Sequence[Constraint]) -> None:
    """Refuse a lower bound on what is never above something whose upper bound is less."""
    for smaller, larger in ORDERED:
        for low, high in _pairs(constraints, smaller, larger):
            if low.operator == ">=" and high.operator == "<=" and low.bound > high.bound:
                raise UserError(
                    f"search.constraints.{smaller} is '{low}' and search.constraints.{larger} '{high}', "
                    f"which no trial can meet together: {smaller} is never above {larger}"
                )


def _pairs(constraints: Sequence[Constraint], first: str, second: str) -> list[tuple[Constraint, Constraint]]:
    """Every bound on one measurement with every one on another."""
    return [
        (one, other)
        for one in constraints
        if one.name == first
        for other in constraints
        if other.name == second
    ]


def _shown(value: float, operator: str = "") -> str:
    """A number in full if it is whole, else to five digits, rounded so that a bound of it can be met."""
    if value == int(value):
        return f"{int(value):,}"
    if not operator:
        return f"{value:.5g}"
    scale = 10.0 ** (4 - math.floor(math.log10(abs(value))))
    rounded = (math.floor if operator == ">=" else math.ceil)(value * scale) / scale
    return f"{rounded:.5g}"
