"""What to prune and by which scores: the plan of a trial."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, cast

from components.dependency import Group
from components.errors import UserError, nearest

COUPLING = "coupling"
"""The key of the coefficients of coupling groups, where they have some of their own."""

OTHERS = "others"
"""The key of the coefficients of all groups that no other key covers."""

Coefficients = Mapping[str, float] | Mapping[str, Mapping[str, float]]
"""`{metric: weight}` for all groups, or `{key: {metric: weight}}`: see `mixture_of` for the keys."""


def mixture_of(group: Group, keys: Collection[str]) -> str | None:
    """Which of the keys of separate coefficients are a group's; None if it has none.

    The group's own name comes before its component (`coupling` for a coupling group), that before `others`.
    """
    wishes = (group.name, component_key(group), OTHERS)
    return next((key for key in wishes if key in keys), None)


def component_key(group: Group) -> str:
    """The key of a group's coefficients where these are per component: its component, or `coupling`."""
    return COUPLING if group.is_coupling else next(iter(group.components), "")


@dataclass(frozen=True)
class PruningPlan:
    """How to score channels and how many of them to remove.

    Attributes:
        coefficients: the weight of each importance metric, >= 0 and not all zero; only their proportions
            matter. Shared by all groups, `{metric: weight}`, or separate, `{key: {metric: weight}}`, where a
            key is the name of a group, a component, `"coupling"` for all coupling groups, or `"others"`; the
            first of these that is there counts.
        ratios: the share of each group's channels to remove, in [0, 1), by group name; a group that is not
            named keeps all its channels.

    The mappings are not copied: do not change them afterwards.

    Raises:
        UserError: a weight that is negative, not finite or not a number, weights that are all zero, or a
            ratio outside [0, 1).
    """

    coefficients: Coefficients
    ratios: Mapping[str, float]

    def __post_init__(self) -> None:
        if not self.coefficients:
            raise UserError("the plan has no mixing coefficients: give at least one metric a positive weight")
        if not self.is_shared:
            for key, weights in self.coefficients.items():
                if not isinstance(weights, Mapping):
                    raise UserError(
                        f"coefficients are either shared or separate, not both: {key!r} has {weights!r}"
                    )
                check_weights(weights, f" of {key!r}")
        else:
            check_weights(cast(Mapping[str, float], self.coefficients), "")
        for group, ratio in self.ratios.items():
            if not is_number(ratio) or not 0.0 <= ratio < 1.0:
                raise UserError(f"the pruning ratio of group {group!r} has to be in [0, 1), not {ratio!r}")

    @property
    def is_shared(self) -> bool:
        """True where all groups have the same coefficients; false where they have keys."""
        return not any(isinstance(value, Mapping) for value in self.coefficients.values())

    def coefficients_of(self, group: Group) -> Mapping[str, float]:
        """The weights that score one group.

        Raises:
            UserError: the coefficients are separate, and none of the keys is the group's.
        """
        if self.is_shared:
            return cast(Mapping[str, float], self.coefficients)
        key = mixture_of(group, self.coefficients.keys())
        if key is None:
            wish = component_key(group)
            raise UserError(
                f"the plan has no coefficients for {wish!r}, which group {group.name!r} needs: "
                f"{nearest(wish, self.coefficients)}"
            )
        return cast(Mapping[str, float], self.coefficients[key])

    def to_json(self) -> str:
        """As one line of JSON; floats survive the round trip exactly."""
        return json.dumps({"coefficients": self.coefficients, "ratios": self.ratios}, default=dict)

    @classmethod
    def from_json(cls, text: str) -> PruningPlan:
        """The inverse of `to_json`.

        Raises:
            UserError: the text is not the JSON of a plan, or the plan is not valid.
        """
        try:
            fields: Any = json.loads(text)
            coefficients, ratios = fields["coefficients"], fields["ratios"]
        except (ValueError, KeyError, TypeError):
            raise UserError("a pruning plan has to be JSON with 'coefficients' and 'ratios'") from None
        if not isinstance(coefficients, dict) or not isinstance(ratios, dict):
            raise UserError("the 'coefficients' and 'ratios' of a pruning plan have to be JSON objects")
        return cls(coefficients=coefficients, ratios=ratios)


def check_weights(weights: Mapping[str, float], where: str = "") -> None:
    """Refuse coefficients that mix nothing; `where` is what messages add, such as ` of 'latent'`.

    Raises:
        UserError: a weight that is negative, not finite or not a number, or weights that are all zero.
    """
    for metric, weight in weights.items():
        if not is_number(weight) or not math.isfinite(weight) or weight < 0:
            raise UserError(
                f"the coefficient of metric {metric!r}{where} has to be finite and >= 0, not {weight!r}"
            )
    if not any(weight > 0 for weight in weights.values()):
        raise UserError(
            f"the mixing coefficients{where} are all zero: give at least one metric a positive weight"
        )


def is_number(value: object) -> bool:
    """Whether a value is a number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)
