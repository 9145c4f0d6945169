"""A search without Ray: one trial after the other, in this process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from search.base import Base
    from search.checked_experiment import CheckedExperiment
    from search.study import Study
    from search.trial_types import TrialResult, TrialSpec


def trials_of(
    checked: CheckedExperiment, base: Base, count: int, seed: int, study: Study | None = None
) -> Iterator[tuple[TrialSpec, TrialResult]]:
    """Ask, run and tell so many trials.

    Args:
        checked: the experiment.
        base: what is pruned.
        count: of trials.
        seed: of the proposals' global generators.
        study: what proposes; None is the experiment's own.
    """
    from search.determinism import deterministic
    from search.trial import run_trial

    study = study or checked.new_study()
    for number in range(count):
        with deterministic(seed, 1):
            proposal = study.ask(number)
        spec = checked.specify(number, proposal)
        result = run_trial(spec, base)
        study.tell(result)
        yield spec, result
    study.close()
