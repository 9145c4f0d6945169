"""What a search should do: a strict, typed, frozen reading of an experiment's YAML.

Every key is optional but `agent.kind`. Whatever cannot be meant is refused with one sentence: unknown keys
(the nearest is named), wrong types, numbers out of range, keys given twice.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    field_validator,
    model_validator,
)

from components.errors import UserError, nearest
from components.schedule import PruningSchedule
from components.tracker import DECAY, EVERY, SNAPSHOTS, Tracking
from search import experiment_yaml
from search.config_errors import Fault, sentence, shown
from search.constraints import Constraint, parse_all, written
from search.given_mixtures import Mixing, Separation
from search.measured import SIZES

if TYPE_CHECKING:
    from agents.agent import Objective

Metric = Literal[
    "l1", "l2", "gradient", "taylor", "fisher", "gate_fisher", "bayesian", "reconstruction", "random"
]
Sampler = Literal["tpe", "nsga2", "gp", "random", "qmc", "grid", "gradient"]

SamplerChoice = Literal["auto", "tpe", "nsga2", "gp", "random", "qmc", "grid", "gradient"]

PLANNED: tuple[Sampler, ...] = ("grid", "gradient")
"""Samplers that plan all trials of the budget together, so that it cannot change when a search goes on."""

GP_TRIALS = 256
"""Up to so many trials `sampler: auto` is `gp`; with more `tpe`, which proposes in a fraction of the time."""

COSTS = {
    "parameters": "parameters",
    "macs": "multiply-accumulates",
    "latency_median_ms": "ms",
    "latency_p99_ms": "ms",
}
"""Objectives that every agent has, lower better, with their units; its performance is one more."""

PERFORMANCES = {"autoencoder": "reconstruction_error", "tdmpc": "return"}
"""What the agents that come with the package call their performance, by kind."""

REPORTED = {
    "tdmpc": (
        "return_standard_error",
        "worst_return",
        "stability",
        "stability_low",
        "stability_high",
        "lyapunov_decrease",
        "lyapunov_decrease_low",
        "lyapunov_decrease_high",
    )
}
"""Kind of agent -> what its evaluation reports besides, of those that come with the package: what
`agents.agent.measurements` gives, known before the agent is imported."""

MEASURED = (*SIZES, "latency_median_ms", "latency_p99_ms")
"""What every trial can measure, so that constraints may name it, objective or not."""


def _parse_constraints(value: object) -> object:
    return parse_all(value) if isinstance(value, Mapping) else value


@dataclass(frozen=True)
class OptionBounds:
    """A whole-number option of the agent that the search chooses, such as `samples: [32, 256]`.

    Attributes:
        name: of the option.
        low, high: the least and the most it may become, 1 <= low < high.
    """

    name: str
    low: int
    high: int

    @staticmethod
    def parse(name: str, bounds: object) -> OptionBounds:
        """Bounds as in a YAML file.

        Raises:
            Fault: not two whole numbers, or not in order; `name` is the fault's key.
        """
        match bounds:
            case [int(low), int(high)] if bool not in (type(low), type(high)) and 1 <= low < high:
                return OptionBounds(name, low, high)
        reason = "it must be two whole numbers, [low, high] with 1 <= low < high, such as [32, 256]"
        raise Fault(reason, key=name, value=shown(bounds))


def _parse_options(value: object) -> object:
    if isinstance(value, Mapping):
        return tuple(OptionBounds.parse(str(name), bounds) for name, bounds in value.items())
    return value


def _write_options(options: tuple[OptionBounds, ...]) -> dict[str, list[int]]:
    return {option.name: [option.low, option.high] for option in options}


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    twice = [value for value in values if values.count(value) > 1]
    if twice:
        raise Fault(f"it lists {twice[0]!r} twice", value=shown(values))
    return values


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


Constraints = Annotated[tuple[Constraint, ...], BeforeValidator(_parse_constraints), PlainSerializer(written)]


SearchedOptions = Annotated[
    tuple[OptionBounds, ...], BeforeValidator(_parse_options), PlainSerializer(_write_options)
]


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True
    )

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, data: object) -> object:
        """A section whose every key is commented out reads as null in YAML."""
        return {} if data is None else data


class AgentConfig(_Section):
    """Which agent, with its own options; the agent validates those.

    Attributes:
        kind: a built-in agent such as `autoencoder`, or a user's own as `my_package.my_module:MyAgent`.
    """

    model_config = ConfigDict(extra="allow")

    kind: str = Field(min_length=1)

    @property
    def options(self) -> dict[str, Any]:
        """Everything under `agent` but `kind`: a copy, JSON-able."""
        return copy.deepcopy(self.model_extra or {})

    @model_validator(mode="after")
    def _plain_options(self) -> AgentConfig:
        for path, value in _leaves(self.model_extra or {}, ""):
            if isinstance(value, float) and not math.isfinite(value):
                raise Fault("it must be a finite number", key=path, value=shown(value))
            if value is not None and not isinstance(value, bool | int | float | str):
                raise Fault("it must be text, a number, a list or a mapping", key=path, value=shown(value))
        return self


class ImportanceConfig(_Section):
    """How closely importance is followed while the base trains. A step is an update of the agent.

    Attributes:
        every: track every so-many-th step, >= 1; tracking all of them costs TD-MPC a fifth of its training on
            a CPU, and an autoencoder a quarter.
        decay: of the running averages, per tracked step, in [0, 1): they remember about
            `every` / (1 - `decay`) steps. What is gathered at the end is what trials prune by.
        snapshots: about how many of the scores to keep over the training, >= 1: up to twice as many, and
            fewer of a training that is shorter than 8 · `every` · `snapshots` steps.
        interval: steps from one snapshot to the next, >= `every`, from the first to the last step; null
            spreads `snapshots` of them.
    """

    every: int = Field(EVERY, ge=1)
    decay: float = Field(DECAY, ge=0, lt=1)
    snapshots: int = Field(SNAPSHOTS, ge=1)
    interval: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _interval_of_tracked_steps(self) -> ImportanceConfig:
        if self.interval is not None and self.interval < self.every:
            reason = f"a snapshot is of a tracked step, and every {self.every}th is: make every no larger"
            raise Fault(reason, key="interval", value=str(self.interval))
        return self

    @property
    def tracking(self) -> Tracking:
        """The same, as a tracker takes it."""
        return Tracking(self.every, self.decay, self.snapshots, self.interval)


class BaseAgentConfig(_Section):
    """How the base is made: the trained, unpruned agent.

    Attributes:
        mode: `shared` trains it once for all trials; `per_trial` trains one inside every trial.
        seed: of its training, >= 0.
        importance: how closely importance is followed along the way.
    """

    mode: Literal["shared", "per_trial"] = "shared"
    seed: int = Field(0, ge=0)
    importance: ImportanceConfig = ImportanceConfig()


class FineTuneConfig(_Section):
    """Gradient steps after the closed-form repair.

    Attributes:
        method: one that the agent has; null is its first.
        updates: gradient steps, >= 0; 0 leaves the reconstructed model as it is.
    """

    method: str | None = None
    updates: int = Field(150, ge=0)


class ScheduleConfig(_Section):
    """Whether channels go at once, before fine-tuning, or step by step while the agent is fine-tuned.

    Where every trial trains its own base (`base: {mode: per_trial}`), step by step means during that training
    from scratch, and everything is counted in its steps (of TD-MPC, environment steps); else in updates of
    the fine-tuning.

    Attributes:
        kind: `one_shot`, or how the removed share grows: `cosine`, slow at both ends, or `cubic`, fast at
            first (`components.schedule`).
        start: steps before anything is removed, >= 0.
        end: steps after which the last is removed; null is two thirds of them all.
        interval: steps between two removals, >= 1; null makes ten.
        smoothing: how much of its old scores a metric keeps when channels are scored anew, in [0, 1).
        reconstruction: refit by `pruning.reconstruction` at every step, not only slice.
    """

    kind: Literal["one_shot", "cosine", "cubic"] = "one_shot"
    start: int = Field(0, ge=0)
    end: int | None = Field(None, ge=0)
    interval: int | None = Field(None, ge=1)
    smoothing: float = Field(0.5, ge=0, lt=1)
    reconstruction: bool = True

    @model_validator(mode="before")
    @classmethod
    def _kind_alone(cls, data: object) -> object:
        """`schedule: cosine` is short for `schedule: {kind: cosine}`."""
        return {"kind": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _nothing_to_schedule(self) -> ScheduleConfig:
        fields = type(self).model_fields
        idle = [name for name in fields if getattr(self, name) != fields[name].default]
        if self.kind == "one_shot" and idle:
            reason = "is for the kinds 'cosine' and 'cubic', and the kind is 'one_shot'"
            raise Fault(reason, key=idle[0], value=shown(getattr(self, idle[0])))
        return self

    def over(self, steps: int, counted: str) -> PruningSchedule | None:
        """The schedule over a training of so many steps; None where everything goes at once.

        Args:
            steps: of the whole training.
            counted: what they are, for messages: `updates of fine-tuning`.

        Raises:
            UserError: it ends after the training, or before it starts.
        """
        if self.kind == "one_shot":
            return None
        if self.start > steps:
            raise UserError(
                f"pruning.schedule starts after {self.start} steps and the training ends after {steps} "
                f"{counted}: let it start sooner"
            )
        end = max(self.start, 2 * steps // 3) if self.end is None else self.end
        if end > steps:
            raise UserError(
                f"pruning.schedule ends after {end} steps and the training after {steps} {counted}: let it "
                f"end after at most {steps}"
            )
        if end < self.start:
            raise UserError(
                f"pruning.schedule starts after {self.start} steps and ends after {end}: let it start sooner "
                "or end later"
            )
        interval = max(1, (end - self.start) // 10) if self.interval is None else self.interval
        return PruningSchedule(self.kind, self.start, end, interval)


class PruningConfig(_Section):
    """What a trial does to the base.

    Attributes:
        metrics: importance metrics to mix; each one alone is an anchor trial unless coefficients are `equal`.
        coefficients: `equal` mixes all metrics alike and searches ratios alone; `shared` searches one mixture
            for all groups, `per_component` one for every component, `per_group` one for every group. A
            mapping such as `{latent: {l2: 1, fisher: 2}}` gives those of a group, a component or `coupling`
            (all coupling groups), and the rest shares what is searched.
        coefficients_force: search separate coefficients even below 10 trials a dimension.
        max_ratio: largest share of a group to remove, in (0, 1).
        ranking: `group` keeps the best channels of every group, as many as its ratio says; `isomorphic` lets
            groups that are built alike share one ratio, and their channels compete with one another.
        round_to: widths are multiples of it, such as 8, which hardware likes; groups that are no wider stay
            whole.
        schedule: at once, or step by step while the agent is fine-tuned or trained.
        reconstruction: closed-form repair: `sequential`, layer after layer on repaired inputs; `gram`, from
            cached statistics of the base; or `none`.
        fine_tune: gradient steps after it.
    """

    metrics: Annotated[tuple[Metric, ...], BeforeValidator(_as_tuple)] = Field(
        ("l2", "fisher", "reconstruction"), min_length=1
    )
    coefficients: Mixing = "shared"
    coefficients_force: bool = False
    max_ratio: float = Field(0.98, gt=0, lt=1)
    ranking: Literal["group", "isomorphic"] = "group"
    round_to: int = Field(1, ge=1)
    schedule: ScheduleConfig = ScheduleConfig()
    reconstruction: Literal["none", "gram", "sequential"] = "sequential"
    fine_tune: FineTuneConfig = FineTuneConfig()

    @property
    def mixtures(self) -> Separation | dict[str, dict[str, float]]:
        """Who mixes with whom, as `SearchSpace.build` takes it."""
        if isinstance(self.coefficients, str):
            return self.coefficients
        return {mixture.key: dict(mixture.weights) for mixture in self.coefficients}

    @field_validator("metrics")
    @classmethod
    def _distinct_metrics(cls, metrics: tuple[Metric, ...]) -> tuple[Metric, ...]:
        return _distinct(metrics)


class EarlyStoppingConfig(_Section):
    """Early stopping of trials while they are fine-tuned, after MO-ASHA (arXiv 2106.12639).

    At every rung a trial is ranked by its size and its rung loss against all that have reached that rung, by
    non-dominated sorting, and stopped unless it is among the best; never on the first front, and at the
    first rung not on the second either.

    Attributes:
        rungs: how many, 1 to 20, at shares of the updates that grow by equal factors from `first` towards 1.
        reduction: η > 1: at every rung one trial in so many goes on, of those that are not safe; 3 or 4 are
            usual.
        first: share of the updates before the first rung, in [0.2, 1): earlier losses say little of the end.
    """

    rungs: int = Field(3, ge=1, le=20)
    reduction: float = Field(3, gt=1)
    first: float = Field(0.2, ge=0.2, lt=1)

    def rungs_of(self, updates: int) -> tuple[int, ...]:
        """After how many of the updates the rungs are, rounded up: 3 from 0.2 at 20, 34.2 and 58.5 %."""
        shares = (self.first ** ((self.rungs - rung) / self.rungs) for rung in range(self.rungs))
        return tuple(math.ceil(round(share * updates, 9)) for share in shares)


class GridConfig(_Section):
    """How fine a grid is; what is null follows from the budget.

    Attributes:
        coefficients: mixing coefficients are multiples of 1 over this, >= 1: with 1 all are pure metrics.
        ratios: how many kept shares, >= 2, log-spaced from the smallest to 1.
    """

    coefficients: int | None = Field(None, ge=1)
    ratios: int | None = Field(None, ge=2)


class SearchConfig(_Section):
    """How to search.

    Attributes:
        trials: the budget, >= 1, anchors and failures included.
        sampler: `auto` is what finds most with so many trials. `tpe` proposes in 5 to 40 ms at any number of
            trials; `gp` takes 0.2 to 1.5 s, growing with the trials, and finds much more with few. `qmc` is
            quasi-random: it fills the space more evenly than `random`. `grid` tries mixtures times ratios
            that all groups share; `gradient` finds both for every size by descent on soft masks, before the
            first trial, and needs a shared base. These two plan all trials together.
        grid: how fine the grid of `sampler: grid` is; null leaves that to the budget.
        objectives: two or more give a front; null means `parameters` and the agent's performance. Names are
            `parameters`, `macs`, `latency_median_ms`, `latency_p99_ms` and the agent's for its performance.
        constraints: bounds that feasible trials meet, such as `{retention: ">= 0.5, <= 0.9"}`, on whatever a
            trial can measure, objective or not: `parameters`, `size_ratio`, `macs`, `retention`, latencies,
            the performance, and what else the agent's evaluation reports, such as TD-MPC's `stability`.
        options: whole-number options of the agent to choose for every trial, with bounds, such as
            `{samples: [32, 256]}`: those that change how it acts and not its shapes; the agent says which.
        seed: of all proposals and trials, >= 0.
        concurrency: trials at a time, >= 1; null fills the resources. With 1, a search repeats bit for bit.
        anchors: start with the dense model, uniform ratios and, where coefficients are searched, every pure
            metric.
        ratios_first: so many trials, from the first, `gp` and `tpe` search ratios alone and mix all metrics
            alike; then they search coefficients as well. null is 32, and 0 where separate coefficients are
            asked for: `per_component` or `per_group`.
        hours: after which no further trial begins, > 0; those that run are waited for, and the front is made
            as ever. Counts from the first trial of this start, so a resumed search has them anew. null for no
            limit.
        trial_timeout: seconds after which a trial that is still running is stopped and failed, > 0; null for
            no limit.
        retries: how often a trial is run again whose worker was lost, >= 0: killed, out of memory, or gone
            with its machine. A trial that fails by itself is never run again.
        warm_start: a run, by its path or its name in the directory of this one, from whose trials the sampler
            learns before it proposes; it has to have pruned the same groups and measured the same objectives.
            null for none.
        early_stopping: of trials whose fine-tuning does not promise a place on the front; null stops none.
    """

    trials: int = Field(64, ge=1)
    sampler: SamplerChoice = "auto"
    grid: GridConfig | None = None
    objectives: Annotated[tuple[str, ...] | None, BeforeValidator(_as_tuple)] = Field(None, min_length=1)
    constraints: Constraints = ()
    options: SearchedOptions = ()
    seed: int = Field(0, ge=0)
    concurrency: int | None = Field(None, ge=1)
    anchors: bool = True
    ratios_first: int | None = Field(None, ge=0)
    hours: float | None = Field(None, gt=0)
    trial_timeout: float | None = Field(None, gt=0)
    retries: int = Field(2, ge=0)
    warm_start: str | None = Field(None, min_length=1)
    early_stopping: EarlyStoppingConfig | None = None

    @property
    def chosen_sampler(self) -> Sampler:
        """The sampler, where the experiment leaves the choice: see `tests/benchmarks/samplers.py`."""
        if self.sampler != "auto":
            return self.sampler
        return "gp" if self.trials <= GP_TRIALS else "tpe"

    @model_validator(mode="after")
    def _grid_of_grid(self) -> SearchConfig:
        if self.grid is not None and self.sampler != "grid":
            raise Fault(f"is for the sampler 'grid', and the sampler is {self.sampler!r}", key="grid")
        return self

    @field_validator("objectives")
    @classmethod
    def _distinct_objectives(cls, objectives: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if objectives is None else _distinct(objectives)


class ResourcesConfig(_Section):
    """What one trial occupies.

    Attributes:
        cpus: > 0; a fraction shares a core.
        gpus: >= 0, a fraction shares a GPU; `auto` shares the GPUs there are among the trials, as far as
            their memory goes, going by what training the base took of its own; for GPUs that are smaller
            than that one, give a number.
    """

    cpus: float = Field(1, gt=0)
    gpus: Literal["auto"] | float = "auto"

    @property
    def given_gpus(self) -> float | None:
        """GPUs of a trial; None shares those there are."""
        return None if self.gpus == "auto" else self.gpus

    @field_validator("gpus", mode="before")
    @classmethod
    def _auto_or_number(cls, gpus: object) -> object:
        number = isinstance(gpus, int | float) and not isinstance(gpus, bool) and 0 <= gpus < math.inf
        if gpus != "auto" and not number:
            raise Fault("it must be 'auto' or a number, at least 0", value=shown(gpus))
        return gpus


class WandbConfig(_Section):
    """Weights & Biases.

    Attributes:
        mode: `auto` is online where a key is configured and offline elsewhere.
        project: the project that runs go to.
        entity: user or team; null is the account's default.
        trial_runs: >= 0; a search of more trials than this has a run for itself and for the trials of its
            front only.
    """

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = Field("prunefront", min_length=1, max_length=128)
    entity: str | None = None
    trial_runs: int = Field(500, ge=0)

    @field_validator("project", "entity")
    @classmethod
    def _speakable(cls, name: str | None) -> str | None:
        if name is not None and (found := sorted(set(name) & set("/\\#?%:"))):
            raise Fault(f"it must not contain {found[0]!r}", value=shown(name))
        return name


class ExperimentConfig(_Section):
    """A whole experiment; immutable, and equal to what its YAML reads back as.

    Attributes:
        name: of the run directory, the Optuna study and the W&B group: letters, digits, `.`, `-` and `_`.
        storage: URL of a PostgreSQL database for the Optuna study, `postgresql://user@host/database`; null
            keeps it in the run directory. A password is better left to PGPASSWORD or ~/.pgpass: of one that
            is given here no copy is stored.
    """

    name: str = Field("experiment", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
    agent: AgentConfig
    base: BaseAgentConfig = BaseAgentConfig()
    pruning: PruningConfig = PruningConfig()
    search: SearchConfig = SearchConfig()
    resources: ResourcesConfig = ResourcesConfig()
    wandb: WandbConfig = WandbConfig()
    storage: str | None = None

    @field_validator("storage")
    @classmethod
    def _postgresql(cls, storage: str | None) -> str | None:
        if storage is not None and not re.match(r"postgres(ql)?(\+psycopg)?://[^/]", storage):
            reason = "it must be the URL of a PostgreSQL database, such as 'postgresql://user@host/database'"
            raise Fault(reason, value=f"'{storage.partition(':')[0]}:…'")
        return storage

    @model_validator(mode="after")
    def _known_measurements(self) -> ExperimentConfig:
        # What a user's own agent calls its performance is known to it alone: see `resolve_objectives`.
        if ":" not in self.agent.kind:
            search, kind = self.search, self.agent.kind
            performance = PERFORMANCES.get(kind)
            performances = PERFORMANCES.values() if performance is None else (performance,)
            reported = REPORTED.get(kind, ())
            _check_measurements(search.objectives or (), search.constraints, performances, reported)
        return self

    @property
    def has_trained_base(self) -> bool:
        """Whether a base is trained before the first trial.

        Where trials train their own and prune it on the way, none of theirs is ever whole: they are compared
        with a dense one that is trained once.
        """
        return self.base.mode == "shared" or self.pruning.schedule.kind != "one_shot"

    @model_validator(mode="after")
    def _base_for_gradient(self) -> ExperimentConfig:
        if self.search.sampler == "gradient" and self.base.mode != "shared":
            reason = "it needs a trained base before the first trial: set base.mode to 'shared'"
            raise Fault(reason, key="search.sampler", value="'gradient'")
        return self

    @model_validator(mode="after")
    def _room_for_rungs(self) -> ExperimentConfig:
        stopping, updates = self.search.early_stopping, self.pruning.fine_tune.updates
        if stopping is not None:
            rungs = (*stopping.rungs_of(updates), updates)
            if len(set(rungs)) < len(rungs):
                reason = f"has {stopping.rungs} rungs, for which {updates} updates of fine-tuning are too few"
                raise Fault(reason, key="search.early_stopping")
        return self

    def to_yaml(self) -> str:
        """The resolved experiment, every key written out; `parse_experiment` reads it back equal."""
        return experiment_yaml.dump(self.model_dump(mode="python"))

    def without_secrets(self) -> ExperimentConfig:
        """The same without a password, to be stored and shown."""
        if self.storage is None:
            return self
        from search.study_database import without_password

        return self.model_copy(update={"storage": without_password(self.storage)})


def shipped_experiments() -> tuple[str, ...]:
    """The names of the experiments that come with the package, sorted."""
    entries = (entry.name for entry in files("search").joinpath("experiments").iterdir())
    return tuple(sorted(name.removesuffix(".yaml") for name in entries if name.endswith(".yaml")))


def load_experiment(name_or_path: str, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """The experiment of a shipped name or of a YAML file, with `key.path=value` overrides applied in order.

    Whatever has a path separator or ends in `.yaml` or `.yml` is a file; an experiment without a `name` takes
    the file's. Override values are YAML: `search.trials=200`, `pruning.metrics=[l2, fisher]`.

    Raises:
        UserError: naming the file and key, the offending value, what is allowed and the nearest key.
    """
    text, source, stem = _read(name_or_path)
    return parse_experiment(text, source=source, name=stem, overrides=overrides)


def parse_experiment(
    text: str, *, source: str = "experiment", name: str | None = None, overrides: Sequence[str] = ()
) -> ExperimentConfig:
    """The experiment that a YAML text describes; `source` is what messages call it, `name` its default name.

    Raises:
        UserError: as `load_experiment`.
    """
    data = experiment_yaml.parse(text, source)
    if data is None:
        raise UserError(
            f"{source} is empty: it must be a mapping with at least 'agent: {{kind: autoencoder}}'"
        )
    if not isinstance(data, dict):
        raise UserError(
            f"{source} is {shown(data)}: it must be a mapping with keys such as 'agent' and 'search'"
        )
    if name is not None:
        data.setdefault("name", re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip("._-")[:128] or "experiment")
    origins: dict[tuple[str, ...], str] = {}
    for override in overrides:
        path, value = _parse_override(override)
        _assign(data, path, value, override)
        secret = path == ("storage",)  # it may hold a password
        origins[path] = "--set storage" if secret else f"--set {override}"
    try:
        return ExperimentConfig.model_validate(data)
    except ValidationError as error:
        raise UserError(sentence(error, ExperimentConfig, source, origins)) from None


def resolve_objectives(
    names: Sequence[str] | None,
    constraints: Sequence[Constraint],
    performance: Objective,
    reported: Collection[str] = (),
) -> tuple[Objective, ...]:
    """The objectives of a search with direction and unit, once the agent's own is known.

    Args:
        names: as configured; None means `parameters` and the agent's performance.
        constraints: checked as well: each must name something that a trial measures.
        performance: the agent's.
        reported: what else the agent's evaluation reports.

    Raises:
        UserError: an objective or constraint names nothing that this agent's trials measure.
    """
    from agents.agent import Objective

    chosen = tuple(names) if names is not None else ("parameters", performance.name)
    try:
        _check_measurements(chosen, constraints, (performance.name,), reported)
    except Fault as fault:
        raise UserError(f"{fault.key} {fault}") from None
    return tuple(
        performance if name == performance.name else Objective(name, "minimize", COSTS[name])
        for name in chosen
    )


def _check_measurements(
    objectives: Sequence[str],
    constraints: Sequence[Constraint],
    performances: Collection[str],
    reported: Collection[str],
) -> None:
    """Refuse names of what trials do not measure.

    Raises:
        Fault: with the whole key path.
    """
    for name in objectives:
        if name not in COSTS and name not in performances:
            allowed = nearest(name, [*COSTS, *performances])
            raise Fault(f"has the unknown objective {name!r}: {allowed}", key="search.objectives")
    measured = {*MEASURED, *performances, *reported}
    for constraint in constraints:
        if constraint.name not in measured:
            allowed = nearest(constraint.name, measured)
            raise Fault(f"is not measured: {allowed}", key=f"search.constraints.{constraint.name}")


def changes(before: ExperimentConfig, after: ExperimentConfig) -> dict[str, tuple[Any, Any]]:
    """The keys whose values differ, as `search.trials`, with both values; a key that one lacks is None."""
    old = _by_key(before.without_secrets().model_dump(mode="json"))
    new = _by_key(after.without_secrets().model_dump(mode="json"))
    return {
        key: (old.get(key), new.get(key))
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    }


def _by_key(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as a flat one, lists whole."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, Mapping):
            flat |= _by_key(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _leaves(entry, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            yield from _leaves(entry, f"{path}.{index}")
    else:
        yield path, value


def _read(name_or_path: str) -> tuple[str, str, str]:
    """Text, what to call it, and the name it gives an experiment that has none."""
    is_path = "/" in name_or_path or "\\" in name_or_path or name_or_path.endswith((".yaml", ".yml"))
    if not is_path:
        if name_or_path not in shipped_experiments():
            raise UserError(
                f"unknown experiment {name_or_path!r}: {nearest(name_or_path, shipped_experiments())}; "
                "a file is given by its path, such as ./mine.yaml"
            )
        resource = files("search").joinpath("experiments", f"{name_or_path}.yaml")
        return resource.read_text(encoding="utf-8"), f"experiment {name_or_path}", name_or_path
    path = Path(name_or_path)
    try:
        return path.read_text(encoding="utf-8"), str(path), path.stem
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a YAML text: it is not UTF-8") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = error.strerror if isinstance(error, OSError) else None
        raise UserError(f"experiment {path} cannot be read: {reason or error}") from None


def _parse_override(override: str) -> tuple[tuple[str, ...], Any]:
    key, equals, text = override.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(path):
        raise UserError(f"--set {override}: it must be key=value, such as search.trials=200")
    if text.lstrip().startswith(">="):  # a constraint, not the folded text that YAML would take it for
        return path, text.strip()
    return path, experiment_yaml.parse(text, f"--set {override}")


def _assign(data: dict[str, Any], path: tuple[str, ...], value: Any, override: str) -> None:
    """Set a value in a fresh, nested mapping; missing sections are made."""
    section = data
    for depth, part in enumerate(path[:-1], start=1):
        entry = section.get(part)
        if entry is None:
            entry = section[part] = {}
        if not isinstance(entry, dict):
            parent = ".".join(path[:depth])
            raise UserError(f"--set {override}: {parent} is {shown(entry)}, which has no keys of its own")
        section = entry
    section[path[-1]] = value
