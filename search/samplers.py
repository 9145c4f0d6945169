"""Optuna's samplers, made to fit a search whose space is known and never changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import GPSampler, TPESampler
from optuna.trial import FrozenTrial

Space = Mapping[str, BaseDistribution]
"""Name of a parameter -> its distribution."""


class _KnownSpace:
    """What samplers search together, said instead of being found anew among all trials at every proposal."""

    def __init__(self, space: Space, **more: Any) -> None:
        super().__init__(**more)
        # In the order in which Optuna has it, on which what is drawn depends.
        self._known = {name: space[name] for name in sorted(space) if not space[name].single()}

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return dict(self._known)


class ParzenEstimators(_KnownSpace, TPESampler):
    """TPE over all parameters together.

    Args:
        space: what is searched.
    """


class GaussianProcesses(_KnownSpace, GPSampler):
    """Gaussian processes that are fitted to further trials besides those of the study.

    Args:
        space: what is searched.
        further: trials with values, and constraints where the study's have some.
    """

    def __init__(self, space: Space, further: list[FrozenTrial], **more: Any) -> None:
        super().__init__(space, **more)
        self._further = further

    def _sample_relative_impl(
        self,
        study: optuna.Study,
        completed_trials: list[FrozenTrial],
        running_trials: list[FrozenTrial],
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        known = [*completed_trials, *self._further]
        return super()._sample_relative_impl(study, known, running_trials, search_space)
