"""What an experiment says under `pruning.coefficients`: who mixes with whom, or what groups mix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, PlainSerializer

from components.errors import nearest
from search.config_errors import Fault, shown

Separation = Literal["equal", "shared", "per_component", "per_group"]
"""Who mixes with whom, where that is one word."""


@dataclass(frozen=True)
class GivenMixture:
    """Mixing coefficients that are not searched, such as `latent: {l2: 1, fisher: 2}`.

    Attributes:
        key: whose: a group, a component, `coupling` or `others`.
        weights: (metric, weight), weights >= 0; only their proportions matter.
    """

    key: str
    weights: tuple[tuple[str, float], ...]

    @staticmethod
    def parse(key: str, weights: object) -> GivenMixture:
        """The mixture that YAML writes as `key: {metric: weight}`.

        Raises:
            Fault: it is no mapping of metrics to numbers; `key` is the fault's key.
        """
        if isinstance(weights, Mapping) and weights:
            numbers = [(str(name), value) for name, value in weights.items()]
            if all(isinstance(value, int | float) and type(value) is not bool for _, value in numbers):
                return GivenMixture(key, tuple((name, float(value)) for name, value in numbers))
        reason = "it must be a mapping of metrics to weights, such as {l2: 1, fisher: 2}"
        raise Fault(reason, key=key, value=shown(weights))


def _parse_coefficients(value: object) -> object:
    if isinstance(value, Mapping):
        if not value:
            raise Fault("it must name a group or component, such as {latent: {l2: 1}}", value="{}")
        return tuple(GivenMixture.parse(str(key), weights) for key, weights in value.items())
    choices = get_args(Separation)
    if isinstance(value, str) and value not in choices:
        raise Fault(f"{nearest(value, choices)}, or the coefficients of groups", value=shown(value))
    if not isinstance(value, str | tuple):
        reason = f"allowed: {', '.join(choices)}, or a mapping such as {{latent: {{l2: 1}}}}"
        raise Fault(reason, value=shown(value))
    return value


def _write_coefficients(value: str | tuple[GivenMixture, ...]) -> str | dict[str, dict[str, float]]:
    return value if isinstance(value, str) else {mixture.key: dict(mixture.weights) for mixture in value}


Mixing = Annotated[
    Separation | tuple[GivenMixture, ...],
    BeforeValidator(_parse_coefficients),
    PlainSerializer(_write_coefficients),
]
