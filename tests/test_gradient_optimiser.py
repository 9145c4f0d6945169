"""The optimiser `gradient`: the soft loss falls, sizes shrink along λ, trials keep what the masks promise."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from serial_search import EXPERIMENT, finish, make_ready
from torch import Tensor, nn
from torch.nn import functional
from toy_agents import Toy

from components.choosing import choose, kept_count
from components.errors import UserError
from components.mixing import mix
from components.pruning import prune
from components.size import parameter_count
from search import gradient_optimiser
from search.base import Base
from search.checked_experiment import CheckedExperiment, check
from search.config import parse_experiment
from search.gradient_optimiser import SoftAgent, sweep, sweep_points, sweep_steps
from search.gradient_sweep import GradientSweep, SweepPoint, read_sweep
from search.prepared_base import PreparedBase, prepare

pytestmark = pytest.mark.usefixtures("one_thread")

POINTS = 6


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for the toy."""
    monkeypatch.setattr(gradient_optimiser, "STEPS", 120)


@cache
def checked(*overrides: str) -> CheckedExperiment:
    config = parse_experiment(EXPERIMENT, name="toy", overrides=overrides)
    return check(config, Path("nowhere"), may_exist=True)


@cache
def trained() -> Base:
    """Followed as closely as when the bounds below were set: it trains for few updates."""
    return checked("agent.hidden=40", "base.importance.every=16").train_base()


@cache
def swept(coefficients: str = "shared") -> tuple[CheckedExperiment, PreparedBase, tuple[SweepPoint, ...]]:
    own = ("pruning.coefficients_force=true", f"pruning.coefficients={coefficients}")
    experiment = checked("agent.hidden=40", "pruning.max_ratio=0.9", *own)
    dense = prepare(trained())
    return experiment, dense, tuple(sweep(dense, experiment.space, POINTS))


every_mixture = pytest.mark.parametrize(
    "coefficients", ["equal", "shared", "per_component", "per_group", "{latent: {l2: 1, fisher: 2}}"]
)


@every_mixture
def test_the_soft_loss_falls(coefficients: str) -> None:
    experiment, dense, points = swept(coefficients)
    soft = SoftAgent(dense, experiment.space)
    with torch.no_grad():
        masks = soft.masks(1.0)
        task, size = float(soft.loss(masks)), float(soft.model.expected_size(masks))
    assert size == pytest.approx(1.0)
    assert all(point.after < 1.01 * (task + point.weight * size) for point in points)
    assert points[-1].after < 0.5 * (task + points[-1].weight * size)
    assert all(point.after < 1.05 * point.before for point in points)  # annealing may cost a little
    assert sum(point.after < point.before for point in points) >= POINTS - 2
    assert points[-1].losses[-1] < points[-1].losses[0]


@every_mixture
def test_a_sweep_goes_from_nearly_everything_to_the_least_and_loses_ever_more(coefficients: str) -> None:
    experiment, _, points = swept(coefficients)
    weights = np.array([point.weight for point in points])
    assert np.allclose(np.diff(np.log(weights)), np.log(weights[1] / weights[0]))
    sizes = [point.size for point in points]
    assert sizes[0] > 0.5
    assert sizes[-1] < 0.25
    assert all(later <= 1.05 * earlier for earlier, later in pairwise(sizes))
    assert points[-1].task_loss > points[0].task_loss
    assert len({experiment.space.decision(experiment.space.to_plan(p.params)) for p in points}) >= POINTS - 2


@every_mixture
def test_points_lie_in_the_space_and_their_weights_on_the_simplex(coefficients: str) -> None:
    experiment, _, points = swept(coefficients)
    space = experiment.space
    for point in points:
        assert space.holds(point.params)
        plan = space.to_plan(point.params)
        for group, ratio in plan.ratios.items():
            assert 0.0 <= ratio <= 0.9 + 1e-12
            assert kept_count(space.sizes[group], ratio) >= 1
        for key, weights in space.mixtures.weights(plan).items():
            assert sum(weights) == pytest.approx(1.0, abs=1e-12)
            assert min(weights) >= 0
            if key in space.mixtures.given:
                assert weights == list(space.mixtures.given[key].values())


def are_nearly_tied(scores: Tensor, chosen: Tensor) -> bool:
    """Whether the chosen channels' scores span less than a fifth of the mean gap from those above to below.

    A narrow mask goes from 0.99 to 0.01 over 2 ln(99) of its widths: 0.18 of that gap.
    """
    own = scores[chosen]
    if len(own) <= 1:
        return True
    above, below = scores[scores > own.max()], scores[scores < own.min()]
    top = float(above.min()) if len(above) else float(own.max())
    bottom = float(below.max()) if len(below) else float(own.min())
    gaps = len(own) - 1 + bool(len(above)) + bool(len(below))
    return float(own.max() - own.min()) < 0.2 * (top - bottom) / gaps


@every_mixture
def test_trials_keep_exactly_the_channels_whose_masks_are_above_one_half(coefficients: str) -> None:
    experiment, dense, points = swept(coefficients)
    space = experiment.space
    soft = SoftAgent(dense, space)
    for point in points:
        soft.load(point.params)
        with torch.no_grad():
            masks = soft.masks(1.0)
        keep = choose(dense.graph, dense.scores, space.to_plan(point.params))
        for group, mask in keep.items():
            assert torch.equal(masks[group] > 0.5, mask), group
        with torch.no_grad():
            assert float(soft.loss(masks)) == pytest.approx(point.task_loss, rel=1e-3, abs=1e-6)
            assert float(soft.model.expected_size(masks)) == pytest.approx(point.size, abs=1e-6)
        # Every mask is 0 or 1, but for the channel on which the threshold may lie and near ties with it.
        between = {group: (mask > 0.01) & (mask < 0.99) for group, mask in masks.items()}
        for group in dense.graph.groups:
            scores = {metric: dense.scores[metric][group.name] for metric in space.metrics}
            mixed = mix(scores, space.to_plan(point.params).coefficients_of(group))
            assert are_nearly_tied(mixed, between[group.name]), group.name
        small = prune(dense.graph, dense.states["model"], keep)
        least, most = (
            float(soft.model.expected_size({g: m.double() for g, m in binary.items()}))
            for binary in (
                {group: (masks[group] > 0.5) & ~channels for group, channels in between.items()},
                {group: (masks[group] > 0.5) | channels for group, channels in between.items()},
            )
        )
        assert least <= parameter_count(small) / dense.base.parameters <= most + 1e-9
        assert least - 0.01 <= point.size <= most + 0.01


def test_the_same_base_gives_the_same_sweep() -> None:
    experiment, dense, points = swept()
    torch.manual_seed(99)  # nothing may come from the global generator
    assert tuple(sweep(dense, experiment.space, POINTS)) == points


def test_mixing_follows_the_loss() -> None:
    """Half of the channels are dead. One metric knows which, one is noise: the mixture moves to the first."""
    experiment, _, _ = swept()
    generator = torch.Generator().manual_seed(3)
    model = {name: array.copy() for name, array in trained().states["model"].items()}
    dead = torch.randperm(40, generator=generator)[:20]
    model["encoder.2.weight"][:, dead] = 0.0
    model["decoder.2.weight"][:, dead] = 0.0
    noise = {name: torch.rand(size, generator=generator) for name, size in trained().widths.items()}
    truth = {name: values.clone() for name, values in noise.items()}
    for name in ("encoder.0", "decoder.0"):
        noise[name] = noise[name][torch.randperm(40, generator=generator)]
        truth[name] += 1.0
        truth[name][dead] -= 1.0
    dense = replace(
        prepare(replace(trained(), states={"model": model})), scores={"l2": noise, "fisher": truth}
    )
    points = sweep(dense, experiment.space, POINTS)
    weights = [experiment.space.to_plan(point.params).coefficients["fisher"] for point in points]
    assert max(weights) > 0.8  # type: ignore[type-var]


def test_progress_is_told_to_the_end() -> None:
    experiment, dense, _ = swept()
    told: list[tuple[int, int]] = []
    sweep(dense, experiment.space, 3, lambda done, total, note: told.append((done, total)))
    assert told == [(step + 1, sweep_steps(3)) for step in range(sweep_steps(3))]
    assert sweep(dense, experiment.space, 0) == []


def test_groups_that_share_their_ratio_share_that() -> None:
    experiment, dense, _ = swept()
    space = experiment.space
    tied = replace(space, keeps={**space.keeps, "decoder.0": "keep/encoder.0"})
    tied = replace(tied, dimensions=tuple(d for d in space.dimensions if d.name != "keep/decoder.0"))
    for point in sweep(dense, tied, 3):
        assert "keep/decoder.0" not in point.params
        soft = SoftAgent(dense, tied)
        soft.load(point.params)
        masks = soft.masks(1.0)
        counts = [int((masks[group] > 0.5).sum()) for group in ("encoder.0", "decoder.0")]
        assert counts[0] == counts[1] == kept_count(40, 1.0 - point.params["keep/encoder.0"])


def test_the_budget_bounds_the_sweep() -> None:
    assert [sweep_points(trials) for trials in (-3, 0, 5, 10_000)] == [0, 0, 5, 128]


class Blunt(Toy):
    """Its latent has unit length: an operator across channels that no mask reaches."""

    def program(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        latent = model["encoder"](inputs["observations"])
        return {"latent": latent, "reconstruction": model["decoder"](functional.normalize(latent, dim=-1))}


class Silent(Toy):
    """Its program keeps no gradients."""

    def program(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        outputs = super().program(model, inputs)
        return outputs if inputs["observations"].shape[0] > 8 else {n: o.detach() for n, o in outputs.items()}


class Judge(Toy):
    """It judges its outputs itself."""

    def task_loss(self, outputs: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
        return 7.0 * (outputs["reconstruction"] - inputs["observations"]).square().mean()


@pytest.mark.parametrize(
    ("kind", "words"), [("Blunt", "masked model is not that of the sliced one"), ("Silent", "no gradients")]
)
def test_what_soft_masks_cannot_follow_is_refused(kind: str, words: str, monkeypatch: Any) -> None:
    experiment = checked(f"agent.kind=test_gradient_optimiser:{kind}", "agent.updates=20")
    monkeypatch.setattr(Toy, "trivial", lambda self, split: 1e9)
    dense = prepare(experiment.train_base())
    with pytest.raises(UserError, match=f"'gradient' cannot follow test_gradient.*{words}") as raised:
        sweep(dense, experiment.space, 3)
    assert "\n" not in str(raised.value)


def test_an_agent_may_judge_its_outputs_itself() -> None:
    experiment = checked("agent.kind=test_gradient_optimiser:Judge")
    dense = prepare(experiment.train_base())
    soft = SoftAgent(dense, experiment.space)
    inputs = dense.calibration["observations"][:512]
    with torch.no_grad():
        loss = float(soft.loss({name: torch.ones(size) for name, size in dense.graph.widths.items()}))
    error = (dense.agent.act(inputs).detach() - inputs).square().mean()
    assert loss == pytest.approx(7 * float(error), rel=1e-5)


# --- as proposals ------------------------------------------------------------------------------------------


def test_every_point_is_proposed_once_the_ends_first(tmp_path: Path) -> None:
    experiment, _, points = swept()
    proposals = GradientSweep(points, experiment.space, first=7)
    found = [proposals.propose(number) for number in range(7, 7 + POINTS)]
    assert sorted(map(str, found)) == sorted(str(point.params) for point in points)
    assert found[:2] == [points[0].params, points[-1].params]
    assert proposals.propose(6) is None
    assert proposals.propose(7 + POINTS) is None
    proposals.write(tmp_path / "gradient.json")
    assert read_sweep(tmp_path / "gradient.json") == list(points)


@pytest.mark.parametrize("text", ["", "{}", '{"points": [3]}', '{"points": [{"weight": 1}]}', "[]"])
def test_a_damaged_sweep_is_made_again(text: str, tmp_path: Path) -> None:
    (tmp_path / "gradient.json").write_text(text)
    assert read_sweep(tmp_path / "gradient.json") is None
    assert read_sweep(tmp_path / "nothing.json") is None


def test_points_that_decide_the_same_make_one_trial_and_no_anchors(tmp_path: Path) -> None:
    ready = make_ready(
        tmp_path / "toy", "search.sampler=gradient", "search.trials=40", "pruning.metrics=[l2]"
    )
    space, anchors = ready.checked.space, ready.checked.anchors
    finish(ready)
    points = json.loads((tmp_path / "toy" / "gradient.json").read_text())["points"]
    own = {point["trial"]: point["params"] for point in points if point["trial"] is not None}
    results = {result.number: result for result in ready.keeper.results}
    assert 3 < len(own) < len(points) == 40 - anchors
    assert sorted(own) == list(range(anchors, anchors + len(own)))
    for number, params in own.items():
        assert results[number].origin == "gradient"
        assert results[number].plan == space.to_plan(params)
    assert all(results[number].origin != "gradient" for number in results if number not in own)
    decided = {space.decision(result.plan) for result in results.values()}
    assert all(space.decision(space.to_plan(point["params"])) in decided for point in points)


def test_a_search_by_gradient_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    options = ("search.sampler=gradient", "search.trials=11")
    ready = make_ready(tmp_path / "toy", *options)
    anchors = ready.checked.anchors
    finish(ready)
    results = ready.keeper.results
    assert [result.origin for result in results[anchors:]] == ["gradient"] * (11 - anchors)
    stored = (tmp_path / "toy" / "gradient.json").read_text()
    assert [point["trial"] for point in json.loads(stored)["points"]] == [7, 9, 10, 8]

    again = make_ready(tmp_path / "toy", *options, resume=True)
    for number, made in enumerate([None, *results[anchors:]], start=anchors - 1):
        study = again.checked.new_study(optimiser=again.plan())
        study.replay(results[:number])
        assert made is None or study.ask(number).plan == made.plan
    again.run.release()
    assert (tmp_path / "toy" / "gradient.json").read_text() == stored


@pytest.mark.parametrize(
    ("sampler", "changed", "words"),
    [
        ("grid", "search.trials=20", "by 'grid', which plans all its trials together: search.trials was 14"),
        ("gradient", "search.trials=20", "search.trials was 14 and is now 20"),
        ("tpe", "search.sampler=grid", "search.sampler was 'tpe' and is now 'grid'"),
        ("grid", "search.grid={ratios: 3}", "search.grid"),
    ],
)
def test_what_is_planned_together_goes_on_as_planned(
    sampler: str, changed: str, words: str, tmp_path: Path
) -> None:
    options = (f"search.sampler={sampler}", "search.trials=14")
    make_ready(tmp_path / "toy", *options).run.release()
    with pytest.raises(UserError, match="take that back, or go on with another sampler") as raised:
        make_ready(tmp_path / "toy", *options, changed, resume=True)
    assert words in str(raised.value)
    free = ("search.sampler=qmc", "search.trials=30")
    make_ready(tmp_path / "toy", *free, resume=True).run.release()


def test_a_sweep_needs_a_base_before_the_first_trial() -> None:
    message = "search.sampler is 'gradient': it needs a trained base before the first trial"
    with pytest.raises(UserError, match=message):
        checked("search.sampler=gradient", "base.mode=per_trial")
