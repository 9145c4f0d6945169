"""Every method beside the others: `python tests/benchmarks/methods.py --json --into DIR`.

All get the same base, the same number of trials, the same repair and the same evaluation; what is best at a
size is chosen on validation data and reported on test data, or on fresh seeds. Methods:

- `uniform_METRIC`: one pruning ratio for all groups, kept shares log-spaced, one importance metric;
- `torch_pruning`: its group-norm pruner, one ratio for all groups, on a plain forward pass (autoencoder only:
  it traces one call, and an agent whose networks meet in several is beyond it);
- `random`: random ratios and coefficients;
- `grid`, `gradient`: the coefficient optimisers;
- `optuna`: the experiment's own sampler, as shipped: ratios first, then coefficients as well;
- `optuna_ratios`, `optuna_shared`, `optuna_per_component`, `optuna_per_group`: the same over ratios alone,
  with equal coefficients, and over ratios and coefficients from the beginning;
- `optuna_isomorphic`: as `optuna_shared`, hidden layers that are built alike competing with one another;
- `optuna_cosine`, `optuna_cubic`: as `optuna_shared`, pruned step by step during fine-tuning;
- `greedy`: the `reconstruction` metric and closed-form repair alone, no gradient step;
- `scratch`: small dense agents, all widths scaled alike, trained from scratch as long as the base.

Where `NAME+none` stands, nothing is reconstructed. `--methods` picks some, `FEW` is what TD-MPC is compared
by. Hypervolume is the mean over log size in [0.5 %, 100 %] of the retention chosen at or below that size,
clipped to [0, 1]; `smallest_retaining_95` the size of the smallest agent that retains 0.95 on validation
data, 1 where none does, and `its_test_retention` what it retains on test data.

The budget counts trials. Besides, `gradient` computes its sweep, and of the trials of `optuna_*` the first
are the anchors that its searches start with. Gradual trials keep the fine-tuned agent as it is; all others
keep the better of what was repaired and what was fine-tuned.

Intervals are 95 % (Student's t) over the base seeds. What is finished is kept in `--into`, and a run that was
stopped goes on there. `--table` prints the table of the README from what is there.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from figures import run
from fronts import Point, chosen_retention, hypervolumes, interval, shares
from searches import trials_of

if TYPE_CHECKING:
    from agents.agent import Agent
    from search.base import Base
    from search.checked_experiment import CheckedExperiment
    from search.study import Study
    from search.trial_types import TrialResult

METRICS = ("l1", "l2", "gradient", "taylor", "fisher", "gate_fisher", "bayesian", "reconstruction", "random")
THRESHOLDS = (0.01, 0.02, 0.05, 0.10)
SCRATCH_LEARNING_RATE = 1e-2
"""What suits small autoencoders best."""

TOGETHER = "search.ratios_first=0"
"""Ratios and coefficients are searched together from the beginning."""

SEARCHED: Mapping[str, tuple[str, ...]] = {
    "random": ("search.sampler=random", "search.anchors=false"),
    "grid": ("search.sampler=grid", "search.anchors=false"),
    "gradient": ("search.sampler=gradient", "search.anchors=false"),
    "optuna": (),
    "optuna_ratios": ("pruning.coefficients=equal",),
    "optuna_shared": (TOGETHER,),
    "optuna_per_component": (
        TOGETHER,
        "pruning.coefficients=per_component",
        "pruning.coefficients_force=true",
    ),
    "optuna_per_group": (TOGETHER, "pruning.coefficients=per_group", "pruning.coefficients_force=true"),
    "optuna_isomorphic": (TOGETHER, "pruning.ranking=isomorphic"),
    "optuna_cosine": (TOGETHER, "pruning.schedule=cosine"),
    "optuna_cubic": (TOGETHER, "pruning.schedule=cubic"),
}
"""Method -> how it changes the experiment."""

GRADUAL = ("optuna_cosine", "optuna_cubic")
PAIRED = (*(f"uniform_{metric}" for metric in METRICS), *(name for name in SEARCHED if name not in GRADUAL))
ALL = (
    *(name + suffix for name in PAIRED for suffix in ("", "+none")),
    *GRADUAL,
    "torch_pruning+none",
    "greedy",
    "scratch",
)
FEW = (
    "uniform_l2",
    "random",
    "grid",
    "gradient",
    "optuna_ratios",
    "optuna_shared",
    "optuna_per_component",
)


class Seed:
    """All methods on one base seed.

    Args:
        experiment: name or YAML file.
        overrides: as the command's `--set`.
        seed: of the base and of every search.
        points: trials of every method.
        into: directory of this seed.
    """

    def __init__(self, experiment: str, overrides: Sequence[str], seed: int, points: int, into: Path) -> None:
        from search.base import train_base
        from search.base_files import load_base, save_base
        from search.config import load_experiment
        from search.prepared_base import prepare

        self._experiment, self._seed, self._points, self._into = experiment, seed, points, into
        self._overrides = [
            *(f"base.seed={seed}", f"search.seed={seed}", f"search.trials={points}"),
            *overrides,
        ]
        config = load_experiment(experiment, self._overrides)
        settled = json.dumps([points, config.to_yaml()])
        into.mkdir(parents=True, exist_ok=True)
        noted = into / "settings.json"
        if noted.exists() and noted.read_text() != settled:
            raise SystemExit(f"{into} holds results of other settings: delete it, or choose another --into")
        noted.write_text(settled)
        self._kind = config.agent.kind
        if not (into / "base" / "metrics.json").exists():
            new = train_base(self._kind, config.agent.options, seed=seed, metrics=METRICS)
            save_base(new, into / "base")
        self._base: Base = load_base(into / "base")
        self._dense = prepare(self._base)

    def run(self, method: str) -> None:
        """Run a method, unless it was run before, and keep its points."""
        kept = self._into / f"{method}.json"
        if kept.exists():
            return
        start = time.perf_counter()
        points = [point for point in self._points_of(method) if point is not None]
        kept.write_text(json.dumps([vars(point) for point in points]))
        took = time.perf_counter() - start
        print(f"seed {self._seed}: {method} took {took:.0f} s", file=sys.stderr, flush=True)

    def _points_of(self, method: str) -> list[Point | None]:
        name, _, reconstruction = method.partition("+")
        overrides = [f"pruning.reconstruction={reconstruction}"] if reconstruction else []
        if name in SEARCHED:
            return self._searched([*SEARCHED[name], *overrides])
        if name == "greedy":
            return self._uniform("reconstruction", ["pruning.fine_tune.updates=0"])
        if name == "scratch":
            return [self._from_scratch(number, share) for number, share in enumerate(self._shares)]
        if name == "torch_pruning":
            return [self._torch_pruned(number, share) for number, share in enumerate(self._shares)]
        return self._uniform(name.removeprefix("uniform_"), overrides)

    @property
    def _shares(self) -> list[float]:
        return shares(self._points, 1 - self._checked([]).config.pruning.max_ratio)

    def _checked(self, overrides: Sequence[str]) -> CheckedExperiment:
        from search.checked_experiment import check
        from search.config import load_experiment

        config = load_experiment(self._experiment, [*self._overrides, *overrides])
        return check(config, self._into / "nowhere", may_exist=True)

    def _searched(self, overrides: Sequence[str]) -> list[Point | None]:
        checked = self._checked(overrides)
        trials = trials_of(checked, self._base, self._points, self._seed, self._study(checked))
        return [self._point(result) for _, result in trials]

    def _study(self, checked: CheckedExperiment) -> Study:
        """The study of a search; where the sampler is `gradient`, with its sweep."""
        from search.determinism import deterministic
        from search.gradient_optimiser import sweep, sweep_points
        from search.gradient_sweep import GradientSweep

        if checked.config.search.chosen_sampler != "gradient":
            return checked.new_study()
        count = sweep_points(self._points - checked.anchors)
        with deterministic(self._seed, 1):
            points = sweep(self._dense, checked.space, count)
        return checked.new_study(None, GradientSweep(points, checked.space, checked.anchors))

    def _uniform(self, metric: str, overrides: Sequence[str]) -> list[Point | None]:
        from components.plan import PruningPlan
        from search.trial import run_trial
        from search.trial_types import TrialSpec, trial_seed

        settings = self._checked([*overrides, f"pruning.metrics=[{metric}]"]).trial_settings()
        return [
            self._point(
                run_trial(
                    TrialSpec(
                        number,
                        PruningPlan({metric: 1.0}, dict.fromkeys(self._base.widths, 1.0 - share)),
                        "uniform",
                        trial_seed(self._seed, number),
                        settings,
                    ),
                    self._base,
                )
            )
            for number, share in enumerate(self._shares)
        ]

    def _from_scratch(self, number: int, share: float) -> Point | None:
        from agents.agent import agent_class
        from search.arrays import to_tensors
        from search.determinism import deterministic
        from search.trial_types import trial_seed

        widths = {group: max(1, round(share * size)) for group, size in self._base.widths.items()}
        options = dict(self._base.options)
        if self._kind == "autoencoder":
            options["learning_rate"] = SCRATCH_LEARNING_RATE
        seed = trial_seed(self._seed, number)
        with deterministic(seed, 1):
            agent = agent_class(self._kind)(options, widths, to_tensors(self._base.data))
            agent.train(seed, None, lambda done, total, note: None)
            return self._measured(agent)

    def _torch_pruned(self, number: int, share: float) -> Point | None:
        """Pruned by Torch-Pruning at one ratio for all, then fine-tuned as every trial is."""
        import torch_pruning

        from search.arrays import to_tensors
        from search.determinism import deterministic
        from search.trial_types import trial_seed

        settings = self._checked([]).trial_settings()
        seed = trial_seed(self._seed, number)
        with deterministic(seed, 1):
            whole = self._dense.build(self._base.widths)
            # The optimizer's moments lose the same channels: each is held by a model of its own.
            models = {}
            for section, state in self._base.states.items():
                models[section] = copy.deepcopy(whole.model)
                models[section].load_state_dict(to_tensors(state))
            pruner = torch_pruning.pruner.GroupNormPruner(
                models["model"],
                whole.example_inputs(2),
                importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
                pruning_ratio=1.0 - share,
                ignored_layers=[list(models["model"].modules())[-1]],
            )
            mirrors = {
                section: torch_pruning.DependencyGraph().build_dependency(model, whole.example_inputs(2))
                for section, model in models.items()
                if section != "model"
            }
            names = {module: name for name, module in models["model"].named_modules()}
            for group in pruner.step(interactive=True):
                dependency, indices = group[0]
                for section, mirror in mirrors.items():
                    layer = models[section].get_submodule(names[dependency.target.module])
                    mirror.get_pruning_group(layer, dependency.handler, indices).prune()
                group.prune()
            state = models["model"].state_dict()
            widths = {
                group.name: next(
                    len(state[member.parameter])
                    for member in group.members
                    if member.axis == 0 and not member.consumes
                )
                for group in self._dense.graph.groups
            }
            agent = self._dense.build(widths)
            agent.load_states({section: dict(model.state_dict()) for section, model in models.items()})
            before = self._measured(agent)
            agent.fine_tune(
                settings.fine_tune_method or agent.fine_tune_methods[0],
                settings.fine_tune_updates,
                seed,
                lambda done, total, note: None,
            )
            found = [point for point in (before, self._measured(agent)) if point is not None]
            return max(found, key=lambda point: point.validation, default=None)

    def _point(self, result: TrialResult) -> Point | None:
        from search.arrays import to_tensors
        from search.determinism import deterministic

        if not result.complete or result.state is None:
            print(f"seed {self._seed}: {result.origin}: {result.reason}", file=sys.stderr, flush=True)
            return None
        agent = self._dense.build(result.widths, result.options)
        agent.load_states({"model": to_tensors(result.state)})
        with deterministic(0, 1):
            test = agent.evaluate("test")[agent.performance.name]
        return Point(
            float(result.size_ratio or 0), float(result.retention or 0), self._base.retention(test, "test")
        )

    def _measured(self, agent: Agent) -> Point | None:
        from components.size import parameter_count

        reached = [agent.evaluate(split)[agent.performance.name] for split in ("validation", "test")]
        if not np.isfinite(reached).all():
            return None
        size = parameter_count(agent.model) / self._base.parameters
        return Point(size, self._base.retention(reached[0]), self._base.retention(reached[1], "test"))


def run_seed(arguments: tuple[str, int, int, tuple[str, ...], tuple[str, ...], Path]) -> None:
    """The chosen methods on one base seed, in a process of its own with one thread."""
    experiment, seed, points, overrides, methods, into = arguments
    import torch

    torch.set_num_threads(1)
    one = Seed(experiment, overrides, seed, points, into / f"seed_{seed}")
    for method in methods:
        one.run(method)


def measure(options: argparse.Namespace) -> Mapping[str, object]:
    """Run what has not been run, and summarise what there is."""
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    methods = FEW if options.methods == ["FEW"] else tuple(options.methods or ALL)
    if not options.table:
        jobs = [
            (options.experiment, seed, options.points, tuple(options.set), methods, options.into)
            for seed in seeds
        ]
        with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
            list(pool.map(run_seed, jobs))
    figures = summary(options.into, list(seeds), methods)
    if options.table:
        print(table(figures))
        raise SystemExit(0)
    return figures


def summary(into: Path, seeds: Sequence[int], methods: Sequence[str]) -> dict[str, object]:
    """Method -> its figures, of the methods that all seeds have."""
    found: dict[str, object] = {}
    for method in methods:
        files = [into / f"seed_{seed}" / f"{method}.json" for seed in seeds]
        if not all(file.exists() for file in files):
            continue
        by_seed = [[Point(**point) for point in json.loads(file.read_text())] for file in files]
        found[method] = {
            "hypervolume": interval([hypervolumes(points)["log"] for points in by_seed]),
            **{
                f"retention_at_{100 * size:g}%": interval(
                    [float(chosen_retention(points, np.array([size]))[0]) for points in by_seed]
                )
                for size in THRESHOLDS
            },
            "smallest_retaining_95": interval([smallest_retaining(p, 0.95).size_ratio for p in by_seed]),
            "its_test_retention": interval([smallest_retaining(p, 0.95).test for p in by_seed]),
        }
    return {"seeds": len(seeds), "methods": found}


def smallest_retaining(points: Sequence[Point], least: float) -> Point:
    """The smallest agent that retains so much on validation data; the base where none does."""
    good = [point for point in points if point.validation >= least]
    return min(good, key=lambda point: point.size_ratio, default=Point(1.0, 1.0, 1.0))


def table(figures: Mapping[str, object]) -> str:
    """The methods as a table of Markdown, best hypervolume first."""
    lines = [
        "| method | hypervolume | ≤ 1 % | ≤ 2 % | ≤ 5 % | ≤ 10 % | smallest validated ≥ 95 % | its test |",
        "|---|---|---|---|---|---|---|---|",
    ]
    methods = figures["methods"]
    assert isinstance(methods, dict)
    for method, of in sorted(methods.items(), key=lambda item: -item[1]["hypervolume"]["mean"]):
        smallest, its = of["smallest_retaining_95"], of["its_test_retention"]
        columns = [f"{value['mean']:.3f} ± {value['ci95']:.3f}" for value in list(of.values())[:-2]]
        columns.append(f"{100 * smallest['mean']:.1f} ± {100 * smallest['ci95']:.1f} %")
        columns.append(f"{its['mean']:.3f}")
        name, _, reconstruction = method.partition("+")
        lines.append(
            " | ".join([f"| `{name}`{', no reconstruction' if reconstruction else ''}", *columns]) + " |"
        )
    return "\n".join(lines)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What to run, and where to keep it."""
    parser.add_argument("--experiment", default="autoencoder", help="name or YAML file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change the experiment"
    )
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="default: all; FEW is seven of them")
    parser.add_argument("--into", type=Path, required=True, help="keeps what is finished")
    parser.add_argument("--table", action="store_true", help="run nothing, print a table of Markdown")


if __name__ == "__main__":
    # The shipped experiments were settled on seeds below 100.
    run(__doc__, measure, add_options, seeds=5, first_seed=100, points=64, processes=os.cpu_count())
