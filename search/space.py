"""The search space: from pruning groups and a few settings to dimensions, plans and anchors.

One dimension `keep/<group>` for each group's kept share, log-uniform in [1 - max_ratio, 1], and where several
metrics are mixed one dimension `mix/<metric>` (or `mix/<key>/<metric>`: see `Mixtures`) for each coordinate u
in [0, 1]; `components.mixing.simplex` turns those into coefficients. Where options of the agent are searched,
one dimension `option/<name>` for each, a whole number, log-uniform between its bounds. Groups of one channel
are not searched: one channel always stays.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from components.choosing import kept_count
from components.dependency import Group
from components.errors import UserError, nearest
from components.mixing import simplex
from components.plan import PruningPlan
from search.mixtures import Mixtures

if TYPE_CHECKING:
    from search.given_mixtures import Separation

UNIFORM_RATIOS = (0.50, 0.75, 0.90, 0.96)
"""Pruning ratios of the anchors that treat every group alike."""

PURE_RATIO = 0.90
"""Pruning ratio of the anchors that use one metric alone."""

TRIALS_PER_DIMENSION = 10
"""What a search with coefficients per component or group needs, unless it is forced."""

Params = dict[str, float]
"""A value for every dimension, by name."""


@dataclass(frozen=True)
class Dimension:
    """One number that the sampler chooses in [low, high]; uniform in its logarithm where `log`."""

    name: str
    low: float
    high: float
    log: bool
    whole: bool = False

    def at(self, share: float) -> float:
        """The value below which the dimension has a share in [0, 1) of its values."""
        top = self.high + 1 if self.whole else self.high
        value = self.low * (top / self.low) ** share if self.log else self.low + share * (top - self.low)
        return min(float(math.floor(value)) if self.whole else value, self.high)


@dataclass(frozen=True)
class OptionRange:
    """A whole-number option of the agent that is searched.

    Attributes:
        low, high: what it may become, 1 <= low < high.
        own: what the agent itself has; anchors take that, clipped to the bounds.
    """

    low: int
    high: int
    own: int

    def clip(self, value: int) -> int:
        """The nearest value between the bounds."""
        return min(max(value, self.low), self.high)


@dataclass(frozen=True)
class Anchor:
    """A trial that every search starts with, so that its front is never worse than the obvious.

    Attributes:
        label: `dense`, `uniform 50 %`, `pure l2` ...
        params: exact; `SearchSpace.to_plan` makes the plan of them.
    """

    label: str
    params: Params


@dataclass(frozen=True)
class SearchSpace:
    """What a search may choose; made by `SearchSpace.build`.

    Attributes:
        dimensions: kept shares in the order of the groups, then mixing coordinates, then options.
        sizes: group -> channels, all groups.
        keeps: searched group -> the dimension of its kept share; several groups may share one.
        mixtures: of the importance metrics.
        max_ratio: the largest share of a group that may be removed.
        options: searched option of the agent -> its range.
        round_to: widths are multiples of it: see `components.choosing.kept_count`.
    """

    dimensions: tuple[Dimension, ...]
    sizes: Mapping[str, int]
    keeps: Mapping[str, str]
    mixtures: Mixtures
    max_ratio: float
    options: Mapping[str, OptionRange] = field(default_factory=dict)
    round_to: int = 1

    @staticmethod
    def build(
        groups: Iterable[Group],
        *,
        metrics: Sequence[str],
        max_ratio: float,
        coefficients: Separation | Mapping[str, Mapping[str, float]] = "shared",
        trials: int,
        force: bool = False,
        shared: Mapping[str, str] | None = None,
        options: Mapping[str, OptionRange] | None = None,
        round_to: int = 1,
    ) -> SearchSpace:
        """The space of a model's groups.

        Args:
            groups: all groups of the model.
            metrics: importance metrics to mix, at least one.
            max_ratio: in (0, 1).
            coefficients: as `Mixtures.build` takes them.
            trials: the budget, which bounds the dimensions that `per_component` and `per_group` may have.
            force: accept these with fewer than 10 trials a dimension.
            shared: group -> key; groups with one key share one kept share, and a group that is not named has
                its own name for key: `{"q2.0": "q1.0"}` ties the second Q function to the first.
            options: options of the agent to search, by name.
            round_to: widths are multiples of it; groups that are no wider are not searched.

        Raises:
            UserError: no group can be pruned, `shared` names a group that does not exist, coefficients are
                refused by `Mixtures.build`, or the budget is too small for them.
        """
        groups, shared, options = tuple(groups), shared or {}, dict(options or {})
        sizes = {group.name: group.size for group in groups}
        for name in shared:
            if name not in sizes:
                raise UserError(
                    f"the model has no pruning group {name!r} to share a ratio: {nearest(name, sizes)}"
                )
        keeps = {name: f"keep/{shared.get(name, name)}" for name, size in sizes.items() if size > round_to}
        if not keeps:
            raise UserError(
                f"there is nothing to prune: none of the model's {len(sizes)} groups has "
                + ("two channels" if round_to == 1 else f"more than {round_to} channels, pruning.round_to")
            )
        low = 1.0 - max_ratio
        dimensions = [Dimension(name, low, 1.0, log=True) for name in dict.fromkeys(keeps.values())]

        mixtures = Mixtures.build(groups, metrics, coefficients)
        dimensions += [
            Dimension(mixtures.prefix(key) + metric, 0.0, 1.0, False)
            for key in mixtures.searched
            for metric in metrics
        ]
        dimensions += [
            Dimension(f"option/{name}", bounds.low, bounds.high, log=True, whole=True)
            for name, bounds in options.items()
        ]
        needed = TRIALS_PER_DIMENSION * len(dimensions)
        if len(mixtures.searched) > 1 and trials < needed and not force:
            raise UserError(
                f"pruning.coefficients {coefficients!r} makes {len(dimensions)} dimensions, which need "
                f"search.trials of at least {needed}, not {trials}: use more, use 'shared', or set "
                "pruning.coefficients_force to true"
            )
        return SearchSpace(tuple(dimensions), sizes, keeps, mixtures, max_ratio, options, round_to)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The importance metrics that are mixed."""
        return self.mixtures.metrics

    def holds(self, params: Mapping[str, float]) -> bool:
        """Whether these are values for all dimensions and no others, each inside its bounds."""
        bounds = {dimension.name: (dimension.low, dimension.high) for dimension in self.dimensions}
        return params.keys() == bounds.keys() and all(
            bounds[name][0] <= value <= bounds[name][1] for name, value in params.items()
        )

    def to_plan(self, params: Mapping[str, float]) -> PruningPlan:
        """The plan of one point of the space: every group's ratio and the coefficients that params mean.

        Raises:
            KeyError: a dimension has no value.
            UserError: a value makes no valid plan.
        """
        ratios = {
            group: 1.0 - params[self.keeps[group]] if group in self.keeps else 0.0 for group in self.sizes
        }
        weights = {key: self._mix(params, self.mixtures.prefix(key)) for key in self.mixtures.searched}
        return PruningPlan(self.mixtures.coefficients(weights), ratios)

    def to_options(self, params: Mapping[str, float]) -> dict[str, int]:
        """The searched options of one point of the space.

        Raises:
            KeyError: a dimension has no value.
        """
        return {name: int(params[f"option/{name}"]) for name in self.options}

    def params_of(self, plan: PruningPlan, options: Mapping[str, int] | None = None) -> Params:
        """A point whose plan is the given one, up to rounding: the inverse of `to_plan` and `to_options`.

        Coefficients leave the scale of the -log u open; it is set so that they average 1, as they do for
        uniform u. Ratios beyond `max_ratio` are clipped to it, options to their bounds; an option that is not
        given is the agent's own.

        Raises:
            UserError: the plan mixes otherwise than this search.
        """
        params: Params = {}
        for group, dimension in self.keeps.items():
            share = 1.0 - plan.ratios.get(group, 0.0)
            params.setdefault(dimension, min(max(share, 1.0 - self.max_ratio), 1.0))
        chosen = self._chosen(options)
        params |= {f"option/{name}": bounds.clip(chosen[name]) for name, bounds in self.options.items()}
        weights = self.mixtures.weights(plan)
        for key in self.mixtures.searched:
            params |= self.coordinates(key, weights[key])
        return params

    def anchors(
        self, uniform_ratios: Sequence[float] = UNIFORM_RATIOS, pure_ratio: float = PURE_RATIO
    ) -> tuple[Anchor, ...]:
        """The trials to start with: everything kept; uniform ratios, mixed equally; each metric alone.

        Ratios beyond `max_ratio` become `max_ratio`; anchors with the same plan are proposed once, under the
        first label.
        """
        equal = dict.fromkeys(self.metrics, 1.0)
        candidates = [Anchor("dense", self._uniform(0.0, equal))]
        for wish in uniform_ratios:
            ratio = min(wish, self.max_ratio)
            candidates.append(Anchor(f"uniform {100 * ratio:g} %", self._uniform(ratio, equal)))
        for metric in self.metrics:
            pure = {name: float(name == metric) for name in self.metrics}
            candidates.append(Anchor(f"pure {metric}", self._uniform(min(pure_ratio, self.max_ratio), pure)))
        distinct: dict[str, Anchor] = {}
        for anchor in candidates:
            distinct.setdefault(self.to_plan(anchor.params).to_json(), anchor)
        return tuple(distinct.values())

    def decision(self, plan: PruningPlan, options: Mapping[str, int] | None = None) -> tuple[object, ...]:
        """What a trial decides: kept channels per group, searched options and, unless everything is kept, the
        coefficients.

        Hashable; trials with equal decisions make equal agents but for their seeds.
        """
        kept = tuple(
            kept_count(size, plan.ratios.get(group, 0.0), self.round_to) for group, size in self.sizes.items()
        )
        decided = (*kept, *self._chosen(options).values())
        if kept == tuple(self.sizes.values()):
            return decided
        return (*decided, *map(tuple, self.mixtures.weights(plan).values()))

    def decision_at(self, params: Params) -> tuple[object, ...]:
        """What a trial at a point of the space decides."""
        return self.decision(self.to_plan(params), self.to_options(params))

    def coordinates(self, key: str, weights: Sequence[float]) -> Params:
        """The coordinates of a searched mixture with these weights of the metrics, up to rounding."""
        named = (self.mixtures.prefix(key) + metric for metric in self.metrics)
        return dict(zip(named, _coordinates(weights), strict=True))

    def mixed_equally(self) -> Params:
        """The coordinates of all searched mixtures where every metric counts alike."""
        return self._mixed(dict.fromkeys(self.metrics, 1.0))

    def own_options(self) -> Params:
        """What options are at where nobody chooses them: as the agent has them, within the bounds."""
        return {f"option/{name}": bounds.clip(bounds.own) for name, bounds in self.options.items()}

    def _chosen(self, options: Mapping[str, int] | None) -> dict[str, int]:
        """Every searched option's value, the agent's own where none is given."""
        return {name: (options or {}).get(name, bounds.own) for name, bounds in self.options.items()}

    def _mix(self, params: Mapping[str, float], prefix: str) -> dict[str, float]:
        """Coefficients from the coordinates with a prefix."""
        weights = simplex([params[prefix + metric] for metric in self.metrics])
        return dict(zip(self.metrics, weights, strict=True))

    def _uniform(self, ratio: float, weights: Mapping[str, float]) -> Params:
        """All groups alike, one mixture everywhere, the agent's own options."""
        shares = dict.fromkeys(self.keeps.values(), 1.0 - ratio)
        return {**shares, **self._mixed(weights), **self.own_options()}

    def _mixed(self, weights: Mapping[str, float]) -> Params:
        """The coordinates of all searched mixtures, each with these weights."""
        params: Params = {}
        for key in self.mixtures.searched:
            params |= self.coordinates(key, [weights[metric] for metric in self.metrics])
        return params


def _coordinates(weights: Sequence[float]) -> list[float]:
    """Coordinates u in [0, 1] with weights ∝ (-log u)³, scaled so that -log u averages 1; 1 for weight 0."""
    roots = [math.cbrt(weight) for weight in weights]
    scale = len(roots) / math.fsum(roots)
    return [math.exp(-scale * root) for root in roots]
