"""Which choices of a search decide what it measures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import FloatDistribution
from optuna.importance import FanovaImportanceEvaluator
from optuna.trial import create_trial
from sklearn.ensemble import RandomForestRegressor

from search.trial_types import TrialResult

FEWEST = 20
"""Trials below which nothing can be told."""

MOST = 256
"""Trials that are looked at, evenly spread over the search: trees grow with them, and say no more."""

TREES = 32

LEAST_EXPLAINED = 0.2
"""The share of the variance that a forest has to foretell of trials it has not seen, or nothing is said."""


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


def parameter_importance(results: Sequence[TrialResult], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """For every measurement, how much of its variance each choice explains: fANOVA over a random forest.

    After Hutter, Hoos and Leyton-Brown (2014), as Optuna has it. The shares are of what the forest makes of
    the measurement, so that a measurement is left out where the forest cannot foretell it for trials that it
    has not seen, and where it only repeats another one before it, as retention does the performance.
    Measurements that span sizes, `parameters` and `macs`, are looked at as logarithms.

    Args:
        results: of a search; those that are not complete say nothing.
        names: measurements.

    Returns:
        Measurement -> `foretold`, the share of the variance that is foretold of unseen trials (R² out of
        bag), and `shares`: choice -> share in [0, 1], largest first. Choices that never differ are left out.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    complete = [result for result in results if result.complete]
    if len(complete) < FEWEST:
        return {}
    chosen = [complete[i] for i in np.unique(np.linspace(0, len(complete) - 1, MOST).astype(int))]
    rows = [choices(result) for result in chosen]
    everywhere = [name for name in rows[0] if all(name in row for row in rows)]
    columns = {name: np.array([row[name] for row in rows]) for name in everywhere}
    varied = {name: column for name, column in columns.items() if np.ptp(column) > 0}
    found: dict[str, dict[str, Any]] = {}
    seen: list[NDArray[np.float64]] = []
    for name in names:
        values = np.array([_value(result, name) for result in chosen])
        known = np.isfinite(values)
        if not varied or known.sum() < FEWEST or np.ptp(values[known]) == 0:
            continue
        # Trees take differences below a fixed bound for none.
        values = (values - values[known].mean()) / values[known].std()
        if any(_is_line(values, other) for other in seen):
            continue
        seen.append(values)
        explained = _explanation({choice: column[known] for choice, column in varied.items()}, values[known])
        if explained["foretold"] >= LEAST_EXPLAINED:
            found[name] = explained
    return found


def _explanation(columns: Mapping[str, NDArray[np.float64]], values: NDArray[np.float64]) -> dict[str, Any]:
    """What a forest makes of standardised values."""
    columns = {name: column for name, column in columns.items() if np.ptp(column) > 0}
    forest = RandomForestRegressor(3 * TREES, bootstrap=True, oob_score=True, random_state=0)
    forest.fit(np.column_stack(list(columns.values())), values)
    foretold = max(0.0, float(forest.oob_score_))
    if foretold < LEAST_EXPLAINED:
        return {"foretold": round(foretold, 3), "shares": {}}
    distributions = {
        name: FloatDistribution(float(column.min()), float(column.max())) for name, column in columns.items()
    }
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    study.add_trials(
        create_trial(
            value=float(value),
            params={name: float(column[i]) for name, column in columns.items()},
            distributions=dict(distributions),
        )
        for i, value in enumerate(values)
    )
    shares = FanovaImportanceEvaluator(n_trees=TREES, max_depth=16, seed=0).evaluate(study)
    return {
        "foretold": round(foretold, 3),
        "shares": {name: round(float(share), 4) for name, share in shares.items()},
    }


def _is_line(values: NDArray[np.float64], other: NDArray[np.float64]) -> bool:
    """Whether standardised values are others, or their negatives."""
    both = np.isfinite(values) & np.isfinite(other)
    return bool(both.sum() > 2) and abs(float(np.corrcoef(values[both], other[both])[0, 1])) > 1 - 1e-6


def _value(result: TrialResult, name: str) -> float:
    value = result.measurement(name)
    if value is None or (name in ("parameters", "macs") and value <= 0):
        return math.nan
    return math.log(value) if name in ("parameters", "macs") else value
