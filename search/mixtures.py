"""Who mixes with whom: one mixture of the metrics for all groups, or separate ones, searched or given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from components.dependency import Group
from components.errors import UserError, nearest
from components.plan import OTHERS, Coefficients, PruningPlan, check_weights, component_key, mixture_of

if TYPE_CHECKING:
    from search.given_mixtures import Separation

ALL = ""
"""The key of the one mixture that serves all groups."""


@dataclass(frozen=True)
class Mixtures:
    """The mixtures of a search; made by `Mixtures.build`.

    Attributes:
        metrics: what is mixed.
        keys: of the mixtures, as plans have them: groups, components, `coupling`, `others`; or `ALL` alone.
        searched: those of them that are searched: all that matter, but for those that are given; none where
            there is one metric.
        given: key -> metric -> weight of the mixtures that are the same in every trial; weights sum to 1.
    """

    metrics: tuple[str, ...]
    keys: tuple[str, ...]
    searched: tuple[str, ...]
    given: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @staticmethod
    def build(
        groups: Sequence[Group],
        metrics: Sequence[str],
        coefficients: Separation | Mapping[str, Mapping[str, float]],
    ) -> Mixtures:
        """The mixtures of a model's groups.

        Args:
            groups: all groups of the model.
            metrics: importance metrics to mix, at least one.
            coefficients: `equal`, all metrics alike; `shared` by all groups; `per_component`, one mixture for
                every component and one for coupling groups; `per_group`; or those of some groups, components,
                `coupling` or `others`, which all remaining groups then share a searched mixture beside.

        Raises:
            UserError: coefficients are given for what the model does not have or of what is not among the
                metrics, they mix nothing, or a group is named like a component that it is no part of.
        """
        given: dict[str, dict[str, float]] = {}
        match coefficients:
            case "shared":
                keys: tuple[str, ...] = (ALL,)
            case "equal":
                keys, given = (ALL,), {ALL: dict.fromkeys(metrics, 1.0 / len(metrics))}
            case "per_component" | "per_group" if len(metrics) == 1:
                keys = (ALL,)
            case "per_component":
                keys = tuple(dict.fromkeys(component_key(group) for group in groups))
            case "per_group":
                keys = tuple(group.name for group in groups)
            case _:
                given = {
                    key: _weights(key, weights, groups, metrics) for key, weights in coefficients.items()
                }
                used = {mixture_of(group, given.keys()) for group in groups}
                if idle := [key for key in given if key not in used]:
                    raise UserError(
                        f"pruning.coefficients has {idle[0]!r}, and every group that it could be for has "
                        "coefficients of its own: leave it out"
                    )
                keys = (*given, *([OTHERS] if None in used else []))
        if coefficients == "per_component":
            for group in groups:
                if len(keys) > 1 and mixture_of(group, keys) != component_key(group):
                    raise UserError(
                        f"group {group.name!r} is named like a component that it is no part of, so that "
                        "coefficients per component cannot be told from its own: rename the component"
                    )
        pruned = {ALL if keys == (ALL,) else mixture_of(group, keys) for group in groups if group.size > 1}
        searched = tuple(key for key in keys if key in pruned and key not in given and len(metrics) > 1)
        return Mixtures(tuple(metrics), keys, searched, given)

    @property
    def are_separate(self) -> bool:
        """False where one mixture serves all groups."""
        return self.keys != (ALL,)

    @staticmethod
    def prefix(key: str) -> str:
        """What the names of a mixture's dimensions begin with."""
        return f"mix/{key}/" if key else "mix/"

    def coefficients(self, weights: Mapping[str, Mapping[str, float]]) -> Coefficients:
        """A plan's coefficients from those of the searched mixtures; others are as given, or equal."""
        equal = dict.fromkeys(self.metrics, 1.0 / len(self.metrics))
        whole = {key: {**weights, **self.given}.get(key, equal) for key in self.keys}
        return whole if self.are_separate else whole[ALL]

    def weights(self, plan: PruningPlan) -> dict[str, list[float]]:
        """Key -> the weights of the metrics that a plan has there.

        Raises:
            UserError: the plan mixes otherwise than this search.
        """
        if plan.is_shared == self.are_separate:
            expected = f"coefficients for {self.keys[0]!r}" if self.are_separate else "shared coefficients"
            raise UserError(f"the plan does not fit this search: it has no {expected}")
        found = {}
        for key in self.keys:
            weights = plan.coefficients.get(key) if key else plan.coefficients
            if weights is None:
                raise UserError(f"the plan does not fit this search: it has no coefficients for {key!r}")
            by_metric = cast(Mapping[str, float], weights)
            found[key] = [float(by_metric.get(metric, 0.0)) for metric in self.metrics]
            if key in self.given and found[key] != list(self.given[key].values()):
                place = f" for {key!r}" if key else ": pruning.coefficients is 'equal' here"
                raise UserError(f"the plan does not fit this search, it mixes otherwise{place}")
        return found


def _weights(
    key: str, weights: Mapping[str, float], groups: Sequence[Group], metrics: Sequence[str]
) -> dict[str, float]:
    """Given coefficients, for all metrics, summing to 1."""
    known = dict.fromkeys([group.name for group in groups])
    known |= dict.fromkeys(component_key(group) for group in groups)
    if key not in known and key != OTHERS:
        raise UserError(
            f"pruning.coefficients has {key!r}, which is neither a group nor a component of the model: "
            f"{nearest(key, [*known, OTHERS])}"
        )
    for metric in weights:
        if metric not in metrics:
            raise UserError(
                f"pruning.coefficients has {metric!r} for {key!r}, which is not among pruning.metrics: "
                f"{nearest(metric, metrics)}"
            )
    try:
        check_weights(weights, f" of {key!r}")
    except UserError as error:
        raise UserError(f"pruning.coefficients: {error}") from None
    total = sum(weights.values())
    return {metric: weights.get(metric, 0.0) / total for metric in metrics}
