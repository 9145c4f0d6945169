"""Multi-objective early stopping: which trials are worth the rest of their fine-tuning.

Asynchronous successive halving over several objectives, after MO-ASHA (Schmucker, Donini, Zafar, Salinas and
Archambeau, 2021, arXiv 2106.12639), in its stopping form: a trial that reaches a rung is judged at once,
against all that reached it before, and either goes on or is stopped; none ever waits for another. Two guards
are added, because what is known at a rung only foreshadows the end: see `MultiObjectiveHalving`.

NumPy alone; the cluster translates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from search import pareto
from search.pareto import Direction

if TYPE_CHECKING:
    from agents.agent import Objective
    from search.trial_types import TrialResult

SAFE_RANKS = (1, 0)
"""The worst non-dominated rank that is never stopped, counted from 0: at a trial's first rung its second
front, as little is known there yet; at every later one its first."""

SIZES = ("parameters", "macs")
"""Objectives that are known before fine-tuning."""


class MultiObjectiveHalving:
    """Successive halving on non-dominated ranks, in numbers alone.

    At every rung, of the trials that have reached it, the best 1 / `reduction` (rounded up) go on: those of
    the best ranks of non-dominated sorting and, of the rank at the cut, those with the most room around them
    (`pareto.crowding_distances`), ties included. Whatever these say, a trial goes on that

    - is on the first front of the rung or, at the first rung that it reaches, on the second, or
    - is not dominated there by any trial of the front of those that have finished. Until one has, none is
      stopped.

    A trial whose values are not finite is stopped, and others are not ranked against it.

    What it decides depends on neither the order of the objectives nor that in which the others arrived, and
    an objective may as well be negated and turned round. Not thread-safe.

    Args:
        directions: of the objectives that are known at a rung.
        outcomes: directions of the objectives that are known at the end.
        reduction: η > 1: one in so many goes on.
        logarithmic: which objectives of a rung, never 0, have ratios for distances; none by default.

    Raises:
        ValueError: the reduction is not above 1, or `logarithmic` has another length than `directions`.
    """

    def __init__(
        self,
        directions: Sequence[Direction],
        outcomes: Sequence[Direction],
        reduction: float,
        logarithmic: Sequence[bool] | None = None,
    ) -> None:
        if not reduction > 1:
            raise ValueError(f"reduction must be above 1, got {reduction}")
        self._directions = tuple(directions)
        self._outcomes = tuple(outcomes)
        self._reduction = reduction
        self._logarithmic = np.array(logarithmic or [False] * len(self._directions), dtype=np.bool_)
        if len(self._logarithmic) != len(self._directions):
            raise ValueError(f"{len(self._logarithmic)} scales do not fit {len(self._directions)} objectives")
        self._rungs: dict[int, dict[int, tuple[float, ...]]] = {}  # rung -> trial -> objectives known there
        self._decisions: dict[tuple[int, int], bool] = {}  # (trial, rung) -> whether it goes on
        self._judged: set[int] = set()  # trials that have been judged at a rung
        self._front: dict[int, tuple[float, ...]] = {}  # trials of the front of the finished -> outcome

    def report(self, trial: int, rung: int, values: Sequence[float]) -> bool:
        """Whether a trial that has reached a rung goes on.

        Reported again, as by a trial that is run again, it gets the answer that it got.

        Args:
            trial: its number.
            rung: any number that identifies the rung.
            values: the objectives known there.

        Raises:
            ValueError: not as many values as directions.
        """
        if (trial, rung) not in self._decisions:
            self.record(trial, rung, values)
            self._decisions[trial, rung] = self._goes_on(trial, rung)
            self._judged.add(trial)
        return self._decisions[trial, rung]

    def record(self, trial: int, rung: int, values: Sequence[float]) -> None:
        """Let others be ranked against a trial at a rung, without judging it; what is not finite is ignored.

        Raises:
            ValueError: not as many values as directions.
        """
        if len(values) != len(self._directions):
            raise ValueError(f"{len(values)} values do not fit {len(self._directions)} objectives")
        if all(math.isfinite(value) for value in values):
            self._rungs.setdefault(rung, {}).setdefault(trial, tuple(float(value) for value in values))

    def finish(self, trial: int, outcome: Sequence[float]) -> None:
        """Take in what a trial that ran to its end achieved.

        Raises:
            ValueError: an outcome is not finite, or there are not as many as directions.
        """
        members = {**self._front, trial: tuple(float(value) for value in outcome)}
        efficient = pareto.non_dominated(list(members.values()), self._outcomes)
        self._front = {
            number: reached
            for (number, reached), stays in zip(members.items(), efficient, strict=True)
            if stays
        }

    def _goes_on(self, trial: int, rung: int) -> bool:
        reached = self._rungs.get(rung, {})
        if trial not in reached:
            return False
        place = list(reached).index(trial)
        values = np.array(list(reached.values()))  # (trials, objectives)
        rank = pareto.ranks(values, self._directions)
        if rank[place] <= SAFE_RANKS[trial in self._judged] or self._is_open(trial, reached):
            return True
        peers = np.flatnonzero(rank == rank[place])
        room = pareto.crowding_distances(self._on_scale(values[peers]))
        ahead = int((rank < rank[place]).sum()) + int((room > room[peers == place]).sum())
        return ahead < math.ceil(len(values) / self._reduction)

    def _is_open(self, trial: int, reached: Mapping[int, tuple[float, ...]]) -> bool:
        """Whether no trial of the front of the finished was better when it was where this one is."""
        rivals = [reached[number] for number in self._front if number in reached and number != trial]
        if not rivals:
            return True
        return bool(pareto.non_dominated([reached[trial], *rivals], self._directions)[0])

    def _on_scale(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        scaled = values.copy()
        scaled[:, self._logarithmic] = np.log(np.abs(values[:, self._logarithmic]))
        return scaled


class EarlyStopping:
    """Early stopping of the trials of a search, on their sizes and their rung losses: lower is better.

    The sizes are `parameters` and `macs`, those of them that are objectives, or `parameters` where neither
    is. The rung loss stands for the performance, which is measured only at the end.

    Args:
        objectives: of the search.
        reduction: η > 1: at every rung one trial in so many goes on.
        feasible: whether a complete trial meets the constraints of the search: others are not on its front,
            and no trial is stopped that was worse at its rung than such ones alone.
    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        reduction: float,
        feasible: Callable[[TrialResult], bool] = lambda result: True,
    ) -> None:
        self._feasible = feasible
        self._objectives = tuple(objective.name for objective in objectives)
        self._sizes = [name for name in self._objectives if name in SIZES] or [SIZES[0]]
        self._halving = MultiObjectiveHalving(
            directions=["minimize"] * (len(self._sizes) + 1),
            outcomes=[objective.direction for objective in objectives],
            reduction=reduction,
            logarithmic=[True] * len(self._sizes) + [False],
        )

    def goes_on(self, report: TrialResult) -> bool:
        """Whether the trial that reports from its latest rung is worth going on with."""
        updates, loss = report.rung_losses[-1]
        return self._halving.report(report.number, updates, self._known(report, loss))

    def finish(self, result: TrialResult) -> None:
        """Learn what became of a trial; those that were stopped or failed say nothing more."""
        if result.complete and self._feasible(result):
            self._halving.finish(result.number, [result.objectives[name] for name in self._objectives])

    def replay(self, results: Iterable[TrialResult]) -> None:
        """Learn from earlier results of the same search, their rungs included."""
        for result in results:
            for updates, loss in result.rung_losses:
                self._halving.record(result.number, updates, self._known(result, loss))
            self.finish(result)

    def _known(self, result: TrialResult, loss: float) -> list[float]:
        sizes = [result.measurement(name) for name in self._sizes]
        return [*(math.nan if size is None else size for size in sizes), loss]
