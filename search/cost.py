"""What a search costs: a prediction from one measured trial of each size. Arithmetic only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Stages = Mapping[str, float]
"""Stage of a trial -> seconds, in the order of the trial."""

START_SECONDS = 10.0
"""To start the command, Ray and its workers on an idle machine; to join a running cluster takes less."""

FRONT_SHARE = 0.35
"""Share of the trials that is assumed to end on the front, all of which are measured on test data."""


@dataclass(frozen=True)
class MeasuredTrials:
    """What trials cost, by the size of the model; the same at every size where only one was measured.

    Attributes:
        smallest, middle, largest: stages of a trial.
        set_up: what a worker needs once, before its first trial, seconds.
        test: to measure a trial of the front on test data, seconds.
        by_threads: CPU threads -> seconds of the middle trial; those of the experiment included.
        threads: of the experiment.
    """

    smallest: Stages
    middle: Stages
    largest: Stages
    set_up: float
    test: float
    by_threads: Mapping[int, float]
    threads: int

    @property
    def mean(self) -> dict[str, float]:
        """Stage -> seconds of a trial on average.

        Kept shares are log-uniform, and the size of a model adds up over many groups: Simpson's rule over the
        three sizes weighs the middle one most.
        """
        stages = dict.fromkeys([*self.middle, *self.smallest, *self.largest])
        return {
            stage: (
                self.smallest.get(stage, 0.0) + 4 * self.middle.get(stage, 0.0) + self.largest.get(stage, 0.0)
            )
            / 6
            for stage in stages
        }

    def trial_seconds(self, threads: int) -> float:
        """Seconds of a trial on average, with so many of the measured numbers of threads."""
        return sum(self.mean.values()) * self.by_threads[threads] / self.by_threads[self.threads]


@dataclass(frozen=True)
class Setting:
    """Resources of a search.

    Attributes:
        at_once: trials at a time.
        cpus: of a trial.
        threads: CPU threads of a trial.
        here: whether this machine has them.
    """

    at_once: int
    cpus: float
    threads: int
    here: bool

    @property
    def total_cpus(self) -> float:
        """CPUs that all trials together occupy."""
        return self.at_once * self.cpus


@dataclass(frozen=True)
class SearchCost:
    """What a search takes with certain resources, in seconds of wall time.

    Attributes:
        setting: the resources.
        start: of the cluster and of its workers.
        train: training the base; None where it is not known.
        trials: all trials, proposals included.
        test: measuring the front on test data.
        limit: what decides how long the trials take: `trials`, or `proposals`, which one process makes.
    """

    setting: Setting
    start: float
    train: float | None
    trials: float
    test: float
    limit: str

    @property
    def total(self) -> float:
        """All of it; without the training where that is not known."""
        return self.start + (self.train or 0.0) + self.trials + self.test


def settings_of(cpus: float, threads: Sequence[int], trials: int, cores: int, own: int) -> list[Setting]:
    """Resources to predict for: 1, 2, 4 ... trials at a time, here and on clusters up to 8 times as large.

    Args:
        cpus: of a trial, as the experiment has it.
        threads: CPU threads of a trial that were measured, those of the experiment first.
        trials: of the search; never more at a time.
        cores: of this machine.
        own: as many trials as a search runs at a time here; always among the settings.
    """
    settings = []
    for number in threads:
        share = cpus if number == threads[0] else float(number)
        counts = {2**power for power in range(12) if 2**power * share <= (8 if share == cpus else 1) * cores}
        if share == cpus:
            counts |= {1, own}
        for count in sorted(count for count in counts if count <= trials):
            settings.append(Setting(count, share, number, here=count * share <= cores))
    return settings


def predict(
    setting: Setting,
    measured: MeasuredTrials,
    *,
    trials: int,
    propose: float,
    train: float | None,
    cores: int,
    train_each: float = 0.0,
    testers: int = 1,
) -> SearchCost:
    """What a search takes with certain resources.

    Trials run side by side. Proposals come one at a time from the driver, each when a worker has become free,
    which waits for it; and the driver shares this machine's cores with the trials that run here.

    Args:
        setting: the resources.
        measured: what trials cost.
        trials: of the search.
        propose: seconds of all proposals together.
        train: seconds of training a base before the first trial; None where it is not known.
        cores: of this machine.
        train_each: seconds of training in every trial.
        testers: processes that measure the front side by side.
    """
    one = measured.trial_seconds(setting.threads) + train_each
    side_by_side = (trials * one + propose) / setting.at_once
    # The CPUs that there are have to do all of the work, the driver's too.
    available = cores if setting.here else setting.total_cpus + 1
    work = (trials * one * setting.threads + propose) / available
    wall = max(side_by_side, work, propose)
    return SearchCost(
        setting,
        start=START_SECONDS + measured.set_up,
        train=train,
        trials=wall,
        test=measured.test * max(1, round(FRONT_SHARE * trials)) / testers,
        limit="proposals" if wall == propose else "trials",
    )
