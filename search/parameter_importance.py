"""Which choices of a search decide what it measures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import optuna
from optuna.distributions import FloatDistribution
from optuna.importance import FanovaImportanceEvaluator
from optuna.trial import create_trial

from search.trial_types import TrialResult

FEWEST = 12
"""Complete trials below which nothing can be told."""

MOST = 256
"""Trials that are looked at, evenly spread over the search: trees grow with them, and say no more."""

TREES = 32


def choices(result: TrialResult) -> dict[str, float]:
    """What a trial chose, by name: the share kept of every group, coefficients of metrics, options.

    Shares as natural logarithms, as the search draws them.
    """
    found = {
        f"share {group}": math.log(max(1.0 - ratio, 1e-6)) for group, ratio in result.plan.ratios.items()
    }
    for name, value in result.plan.coefficients.items():
        if isinstance(value, Mapping):
            found |= {f"weight {name} {metric}": weight for metric, weight in value.items()}
        else:
            found[f"weight {name}"] = float(value)
    return {**found, **{f"option {name}": float(value) for name, value in result.options.items()}}


def parameter_importance(results: Sequence[TrialResult], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """For every measurement, how much of its variance each choice explains: fANOVA over a random forest.

    After Hutter, Hoos and Leyton-Brown (2014), as Optuna has it. Measurements that span sizes, `parameters`
    and `macs`, are looked at as logarithms.

    Args:
        results: of a search; those that are not complete say nothing.
        names: measurements.

    Returns:
        Measurement -> choice -> share in [0, 1], largest first; empty where nothing can be told: too few
        trials, or none differs. Choices that never differ are left out.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    complete = [result for result in results if result.complete]
    chosen = (
        [complete[i] for i in np.unique(np.linspace(0, len(complete) - 1, MOST).astype(int))]
        if complete
        else []
    )
    if len(chosen) < FEWEST:
        return {}
    rows = [choices(result) for result in chosen]
    columns = {name: np.array([row.get(name, math.nan) for row in rows]) for name in rows[0]}
    varied = {
        name: column for name, column in columns.items() if np.isfinite(column).all() and np.ptp(column) > 0
    }
    distributions = {
        name: FloatDistribution(float(column.min()), float(column.max())) for name, column in varied.items()
    }
    found = {}
    for name in names:
        values = np.array([_value(result, name) for result in chosen])
        known = np.isfinite(values)
        if not varied or known.sum() < FEWEST or np.ptp(values[known]) == 0:
            continue
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
        study.add_trials(
            create_trial(
                value=float(values[i]),
                params={parameter: float(column[i]) for parameter, column in varied.items()},
                distributions=dict(distributions),
            )
            for i in np.flatnonzero(known)
        )
        evaluator = FanovaImportanceEvaluator(n_trees=TREES, max_depth=16, seed=0)
        found[name] = dict(evaluator.evaluate(study))
    return found


def _value(result: TrialResult, name: str) -> float:
    value = result.measurement(name)
    if value is None or (name in ("parameters", "macs") and value <= 0):
        return math.nan
    return math.log(value) if name in ("parameters", "macs") else value
