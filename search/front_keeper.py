"""Keeps a run directory up to date while trials finish: records, the current front and its bundles."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence

from agents.agent import Objective, Progress, unwatched
from components import UserError
from search.base import retention
from search.bundle import add_test_measurements, save_bundle
from search.constraints import Constraint
from search.front import Front, Remeasured, build_front, front_results
from search.measurement import LATENCIES
from search.prepared_base import PreparedBase
from search.remeasurement import Candidate, latencies, performances_on_test
from search.run_directory import RunDirectory
from search.trial_types import TrialResult


class FrontKeeper:
    """The driver's memory of a search; every finished trial goes through `record`.

    Args:
        run: where everything is written.
        dense: what trials are pruned from, on the CPU.
        objectives, constraints: what makes the front.
        threads: CPU threads of a trial.

    Attributes:
        results: all that have finished, without their states.
        members: those on the front now.
        unmeasured: member -> why it could not be measured when the search was over.
    """

    def __init__(
        self,
        run: RunDirectory,
        dense: PreparedBase,
        objectives: Sequence[Objective],
        constraints: Sequence[Constraint],
        threads: int,
    ) -> None:
        self._run = run
        self._dense = dense
        self._objectives = tuple(objectives)
        self._constraints = tuple(constraints)
        self._threads = threads
        self.results: list[TrialResult] = []
        self.members: list[TrialResult] = []
        self.unmeasured: dict[int, str] = {}

    def record(self, result: TrialResult) -> None:
        """Store a finished trial for good, and a bundle of it if it is on the front now.

        In this order, so that a crash at any point loses nothing: the bundle, whose state exists nowhere
        else; the record, by which the trial has finished; front.json; and only then the removal of bundles
        that have left the front. What a crash leaves undone, `restore` does.
        """
        slim = result.light()
        # A dominated trial never comes back, so only the present members can stay.
        candidates = [*self.members, slim] if result.complete else self.members
        members = front_results(candidates, self._objectives, self._constraints)
        joins = slim in members
        if joins:
            save_bundle(self._run.bundle(result.number), self._dense, result, self._threads)
        self._run.append_trial(result)
        self.results.append(slim)
        if not joins:
            return
        self.members = members
        self._run.write_front(self.front().to_json())
        self._run.remove_bundles_but(member.number for member in members)

    def restore(self, results: Sequence[TrialResult]) -> None:
        """Take in the trials of an earlier search in this directory, and make the rest of it agree with them.

        Raises:
            UserError: a trial of the front has no bundle any more.
        """
        self.results = [result.light() for result in results]
        complete = [result for result in self.results if result.complete]
        self.members = front_results(complete, self._objectives, self._constraints)
        lost = sorted({member.number for member in self.members} - self._run.bundles())
        if lost:
            raise UserError(
                f"{self._run.models} has no bundle of trial {lost[0]}, which is on the front: restore it, or "
                "start a search of its own with --name"
            )
        self._run.remove_bundles_but(member.number for member in self.members)
        if complete:
            self._run.write_front(self.front().to_json())

    def front(self, remeasured: Mapping[int, Remeasured] | None = None) -> Front:
        """The present front."""
        return build_front(
            self._run.path.name,
            self._objectives,
            self._dense.agent.performance.name,
            self._dense.base,
            self.members,
            remeasured,
            self._constraints,
        )

    def finish(self, measure_again: bool, progress: Progress = unwatched) -> Front:
        """Write the final front, if a trial was completed.

        Args:
            measure_again: measure the front's bundles on test data, and latencies one by one on this machine.
            progress: is told how many have been measured.
        """
        remeasured = self._measure_again(progress) if measure_again and self.members else {}
        for number, again in remeasured.items():
            add_test_measurements(self._run.bundle(number), self._dense.agent.performance.name, again)
        front = self.front(remeasured)
        if any(result.complete for result in self.results):
            self._run.write_front(front.to_json())
        return front

    def _measure_again(self, progress: Progress) -> dict[int, Remeasured]:
        slowest_first = sorted(self.members, key=lambda member: member.macs or 0, reverse=True)
        candidates = {
            member.number: Candidate(
                member.number, str(self._run.bundle(member.number)), member.seed, self._threads
            )
            for member in slowest_first
        }
        data = self._dense.agent.data()
        found = performances_on_test([*candidates.values()], data, progress)
        self.unmeasured = {number: reason for number, reason in found.items() if isinstance(reason, str)}
        performances = {number: value for number, value in found.items() if isinstance(value, float)}
        named = {objective.name for objective in self._objectives}
        timed = LATENCIES & (named | {constraint.name for constraint in self._constraints})
        trivial = self._dense.base.trivial["test"]
        return {
            member.number: Remeasured(
                performance=performances[member.number],
                retention=retention(performances[member.number], member.base_performance["test"], trivial),
                latencies=latencies(candidates[member.number], data) if timed else {},
                host=platform.node(),
            )
            for member in self.members
            if member.number in performances
        }
