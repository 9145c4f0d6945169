"""Whether importance shifts during training: `python tests/benchmarks/importance_shift.py --json`.

The claim of arXiv 2601.19794, on the shipped experiment `cartpole` or another: what counts early in the
training of a base is not what counts at its end. `--runs DIR ...` reads bases that are stored, one for each
seed; without it, `--seeds` of them are trained with the experiment's settings, some minutes each, and
importance tracked in every step (`--set base.importance.every=24` is the default of experiments).

For every metric and 10, 25, 50 and 90 % of the training against its end, mean and 95 % interval over the
bases:

- `groups`: rank correlation of the groups' relative importance; null where a metric does not compare groups.
- `moved`: share of the groups whose rank is another one at the end.
- `channels`: rank correlation of channels inside groups, averaged by the groups' sizes.
- `top_10`, `top_25`, `top_50`: how many of the top channels of a group are on top at the end. Chance is 0.10,
  0.25, 0.50; 90 % of the training is the yardstick: so late, little is left to shift.

`coupling` is the relative importance of channels of coupling groups at 10 % and at the end.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from figures import run
from fronts import interval

from components.plan import COUPLING
from search.base_files import save_base
from search.checked_experiment import check
from search.config import load_experiment
from search.importance_course import EARLY, ImportanceCourse
from search.run_directory import RunDirectory
from search.stored_importance import read_course

CLOSELY = ("base.importance.every=1",)


def trained(experiment: str, seed: int, overrides: Sequence[str]) -> ImportanceCourse:
    """The course of a base that is trained now."""
    with tempfile.TemporaryDirectory() as place:
        directory = RunDirectory(Path(place))
        config = load_experiment(experiment, [*CLOSELY, *overrides, f"base.seed={seed}"])
        base = check(config, directory.path, may_exist=True).train_base()
        print(f"seed {seed}: {base.training_seconds:.0f} s, {dict(base.performance)}", file=sys.stderr)
        save_base(base, directory.base)
        return read_course(directory)


def figures_of(course: ImportanceCourse, metric: str) -> dict[str, dict[str, float | None]]:
    """Share of the training -> figure -> value, of one base."""
    found: dict[str, dict[str, float | None]] = {}
    compares = course.compares_groups(metric)
    ranks = course.ranks(metric)
    for share in EARLY:
        shift = course.shift(metric, share)
        if shift is None:
            raise SystemExit(f"a base has no snapshot before its end at {share:.0%} of the training")
        moved = float(np.mean(ranks[:, course.nearest(share)] != ranks[:, -1]))
        found[f"{share:.0%}"] = {
            "groups": shift.groups,
            "moved": moved if compares else None,
            "channels": shift.mean_channels,
            **{f"top_{100 * top:.0f}": value for top, value in shift.mean_overlap.items()},
        }
    return found


def measure(options: argparse.Namespace) -> Mapping[str, object]:
    """Of all bases."""
    if options.runs:
        courses = [read_course(RunDirectory(path)) for path in options.runs]
    else:
        seeds = range(options.first, options.first + options.seeds)
        courses = [trained(options.experiment, seed, options.overrides) for seed in seeds]
    figures: dict[str, object] = {
        "bases": len(courses),
        "steps": [int(course.steps[-1]) for course in courses],
        "groups": len(courses[0].groups),
    }
    for metric in courses[0].metrics:
        by_base = [figures_of(course, metric) for course in courses]
        figures[metric] = {
            share: {name: over_bases([one[share][name] for one in by_base]) for name in row}
            for share, row in by_base[0].items()
        }
        if all(course.compares_groups(metric) and COUPLING in course.kinds for course in courses):
            relative = [course.relative(metric, course.kinds[COUPLING]) for course in courses]
            figures[f"coupling_{metric}"] = {
                "10%": interval([float(r[c.nearest(0.1)]) for r, c in zip(relative, courses, strict=True)]),
                "end": interval([float(values[-1]) for values in relative]),
            }
    return figures


def over_bases(values: Sequence[float | None]) -> dict[str, float] | None:
    """Mean and interval of what every base has."""
    known = [value for value in values if value is not None]
    return interval(known) if len(known) == len(values) else None


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=Path, nargs="+", metavar="DIR", help="directories that hold a base/")
    parser.add_argument("--experiment", default="cartpole", help="to train bases of; default: cartpole")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")


if __name__ == "__main__":
    run(__doc__, measure, _configure, seeds=3, first=100)
