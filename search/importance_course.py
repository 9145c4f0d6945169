"""How importance moved while a base was trained: groups, components, kinds of group, metrics. NumPy alone.

**Relative importance**, of any set of channels at one snapshot, is the mean score of its channels over the
mean score of all channels of the model by the same metric: 1 counts as much as the average channel, 2 twice
as much. The quotient makes metrics of different units comparable, makes groups of different width comparable,
and takes out what grows or shrinks for all channels at once as losses fall. A metric by which every group has
the same mean by definition, or the same through the whole training, says nothing of groups against one
another: see `compares_groups`.

**Ranks** are of groups, 1 for the one whose channels count most. How much an order has changed is Spearman's
rank correlation; where it is not defined, as of scores that are all equal, it is None and left out of means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from components.choosing import kept_count
from components.plan import COUPLING

Floats = NDArray[np.float64]

EARLY = (0.1, 0.25, 0.5, 0.9)
"""Shares of the training whose scores are held against the last. The last of them is a yardstick: so late,
little is left to shift, and what differs is noise of the statistics for the most part, of those at least
whose averages remember less than a tenth of the training."""

TOP = (0.1, 0.25, 0.5)
"""Shares of a group's channels, those of the highest scores, whose overlap is measured: what stays there of
early choices decides whether pruning by them would have been the same."""

SPECIFIC = "component-specific"
"""What all groups that lie in one component are called together."""

STANDS_STILL = 1e-3
"""A binary logarithm of relative importance that moves by less says nothing."""


@dataclass(frozen=True)
class CourseGroup:
    """A pruning group.

    Attributes:
        name: of the group.
        components: that it touches, in the model's order; empty where that is not known.
        channels: how many it has.
    """

    name: str
    components: tuple[str, ...]
    channels: int

    @property
    def is_coupling(self) -> bool:
        """True where the group touches more than one component."""
        return len(self.components) > 1

    @property
    def part(self) -> str:
        """Its component, or `coupling`; empty where that is not known."""
        return COUPLING if self.is_coupling else next(iter(self.components), "")


@dataclass(frozen=True)
class Shift:
    """How an early snapshot's order by one metric differs from the last one's.

    Attributes:
        share: of the training, as it was asked for.
        step: of the snapshot nearest to it.
        groups: rank correlation of the groups' relative importance; None where the metric does not compare
            them.
        channels: group -> rank correlation of its channels.
        overlap: share of channels -> group -> how many of the channels that are on top early are so late, as
            a share; of random choices it would be the share of channels. None where all channels are on top.
        mean_channels: the mean of `channels`, by the groups' sizes.
        mean_overlap: the mean of `overlap`, by the groups' sizes.
    """

    share: float
    step: int
    groups: float | None
    channels: Mapping[str, float | None]
    overlap: Mapping[float, Mapping[str, float | None]]
    mean_channels: float | None
    mean_overlap: Mapping[float, float | None]


@dataclass(frozen=True, eq=False)
class ImportanceCourse:
    """The scores of every channel along a training, and what follows from them.

    Attributes:
        steps: `(s,)`, s >= 1: after how many training steps each snapshot was taken; increasing.
        groups: in the model's order.
        scores: metric -> group -> `(s, channels)`, >= 0, of the metrics that were tracked.
        final: metric -> group -> `(channels,)`: scores at the end by metrics that were not.
    """

    steps: NDArray[np.int64]
    groups: tuple[CourseGroup, ...]
    scores: Mapping[str, Mapping[str, Floats]]
    final: Mapping[str, Mapping[str, Floats]]

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those that were tracked."""
        return tuple(self.scores)

    @cached_property
    def parts(self) -> dict[str, tuple[CourseGroup, ...]]:
        """Component, or `coupling` -> its groups; empty where the components are not known."""
        names = dict.fromkeys(group.part for group in self.groups if group.part)
        return {name: tuple(g for g in self.groups if g.part == name) for name in names}

    @cached_property
    def kinds(self) -> dict[str, tuple[CourseGroup, ...]]:
        """`component-specific` and `coupling` -> their groups, of those that there are."""
        specific = tuple(group for group in self.groups if len(group.components) == 1)
        coupling = tuple(group for group in self.groups if group.is_coupling)
        return {name: found for name, found in ((SPECIFIC, specific), (COUPLING, coupling)) if found}

    def thinned(self, most: int) -> ImportanceCourse:
        """The same with at most so many snapshots, evenly chosen, the first and the last among them."""
        kept = np.unique(np.linspace(0, len(self.steps) - 1, most).astype(int))
        scores = {m: {group: s[kept] for group, s in found.items()} for m, found in self.scores.items()}
        return replace(self, steps=self.steps[kept], scores=scores)

    def nearest(self, share: float) -> int:
        """The place of the snapshot nearest to a share of the training; of two, the earlier."""
        return int(np.abs(self.steps - share * self.steps[-1]).argmin())

    def relative(self, metric: str, groups: Sequence[CourseGroup]) -> Floats:
        """`(s,)`: the relative importance of the channels of some groups; NaN where all channels have 0."""
        every = np.concatenate([self.scores[metric][group.name] for group in self.groups], axis=1)
        some = np.concatenate([self.scores[metric][group.name] for group in groups], axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(some.mean(axis=1) / every.mean(axis=1), dtype=np.float64)

    def share(self, metric: str, groups: Sequence[CourseGroup]) -> Floats:
        """`(s,)`: what the channels of some groups have of the sum of all scores; NaN where that is 0."""
        channels = sum(group.channels for group in groups) / sum(group.channels for group in self.groups)
        return self.relative(metric, groups) * channels

    def by_group(self, metric: str) -> Floats:
        """`(groups, s)`: the relative importance of every group."""
        return np.stack([self.relative(metric, [group]) for group in self.groups])

    def compares_groups(self, metric: str) -> bool:
        """Whether groups differ by a metric, and move: not where it divides every layer by its mean."""
        with np.errstate(divide="ignore"):
            logs = np.log2(self.by_group(metric))
        logs = logs[:, np.isfinite(logs).all(axis=0)]  # (groups, snapshots that are known)
        if not logs.size or np.abs(logs).max() < STANDS_STILL:
            return False
        return logs.shape[1] == 1 or float(np.ptp(logs, axis=1).max()) >= STANDS_STILL

    def ranks(self, metric: str) -> Floats:
        """`(groups, s)`: 1 for the most important group, means of ranks where several are equal; NaN where
        importance is not known."""
        values = self.by_group(metric)
        return np.stack(
            [_ranks(-column) if np.isfinite(column).all() else column * np.nan for column in values.T], axis=1
        )

    def shift(self, metric: str, share: float) -> Shift | None:
        """From the snapshot nearest to a share of the training to the last; None where that is the last."""
        early = self.nearest(share)
        if early == len(self.steps) - 1:
            return None
        pairs = {name: (scores[early], scores[-1]) for name, scores in self.scores[metric].items()}
        means = self.by_group(metric)
        channels = {group.name: spearman(*pairs[group.name]) for group in self.groups}
        overlap = {
            top: {group.name: _overlap(*pairs[group.name], top) for group in self.groups} for top in TOP
        }
        return Shift(
            share=share,
            step=int(self.steps[early]),
            groups=spearman(means[:, early], means[:, -1]) if self.compares_groups(metric) else None,
            channels=channels,
            overlap=overlap,
            mean_channels=self._mean(channels),
            mean_overlap={top: self._mean(found) for top, found in overlap.items()},
        )

    def shifts(self, metric: str) -> tuple[Shift, ...]:
        """One for each of `EARLY` that is before the last snapshot."""
        found = (self.shift(metric, share) for share in EARLY)
        return tuple(shift for shift in found if shift is not None)

    @cached_property
    def agreement(self) -> dict[str, dict[str, float | None]]:
        """Metric -> metric -> rank correlation at the end, of the channels inside every group, averaged over
        the groups by their sizes.

        Inside groups, since that is where metrics decide: what stays of a group is not held against others.
        """
        last = {metric: {g: s[-1] for g, s in found.items()} for metric, found in self.scores.items()}
        last |= {metric: dict(found) for metric, found in self.final.items()}
        return {
            one: {
                other: self._mean({g.name: spearman(of_one[g.name], of_other[g.name]) for g in self.groups})
                for other, of_other in last.items()
            }
            for one, of_one in last.items()
        }

    def _mean(self, by_group: Mapping[str, float | None]) -> float | None:
        """The mean over groups by their sizes; None where no group has a value."""
        sizes = {group.name: group.channels for group in self.groups}
        known = {group: value for group, value in by_group.items() if value is not None}
        total = sum(sizes[group] for group in known)
        return sum(value * sizes[group] for group, value in known.items()) / total if total else None


def spearman(one: Floats, other: Floats) -> float | None:
    """Spearman's rank correlation of two series of one length, equal values sharing the mean of their ranks.

    None where it is not defined: fewer than two values, all of one series equal, or one that is not finite.
    """
    if len(one) < 2 or not (np.isfinite(one).all() and np.isfinite(other).all()):
        return None
    first, second = (ranks - ranks.mean() for ranks in (_ranks(one), _ranks(other)))
    length = float(np.sqrt((first @ first) * (second @ second)))
    return None if length == 0.0 else max(-1.0, min(1.0, float(first @ second) / length))


def _ranks(values: Floats) -> Floats:
    """1 for the smallest; equal values share the mean of their ranks."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts - 1) / 2)[place], dtype=np.float64)


def _overlap(early: Floats, late: Floats, share: float) -> float | None:
    """How much of the top share of channels is the same in both, in [0, 1], chosen as pruning chooses.

    None where there is nothing to choose: all channels are on top, all scores equal, or some not finite.
    """
    count = kept_count(len(early), 1.0 - share)
    if count == len(early) or any(not np.isfinite(s).all() or np.ptp(s) == 0 for s in (early, late)):
        return None
    first, second = (set(np.argsort(-scores, kind="stable")[:count].tolist()) for scores in (early, late))
    return len(first & second) / count
