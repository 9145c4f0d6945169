"""TD-MPC's update, which computes all decisions at once, against the plain one, step by step.

Its golden figures are written anew by `python tests/test_tdmpc_learning.py --regenerate`.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plain_tdmpc import Plain
from tdmpc_cases import (
    ACTION,
    EVEN,
    OBSERVATION,
    UNEQUAL_TWINS,
    WIDTHS,
    batch,
    experience_of,
    normal,
    numbers_of_update,
    options,
    plan_noise,
    settings,
    update_noise,
    world,
)

from agents.tdmpc.learning import LARGEST_LOSS, TARGETS, Learner, finite
from agents.tdmpc.planner import Planner
from agents.tdmpc.world_model import with_noise

UPDATES, ROWS = 5, 16
GOLDEN = Path(__file__).parent / "golden" / "tdmpc.json"

pytestmark = pytest.mark.usefixtures("one_thread")


class Gradients:
    """A tracker that notes the norm of every component's gradient after a backward pass."""

    def __init__(self, model):
        self.model, self.norms = model, []

    def is_due(self, loss="model"):
        return True

    def capture(self, loss="model"):
        return nullcontext()

    def update(self, loss="model"):
        norms = {}
        for name, component in self.model.named_children():
            gradients = [p.grad.flatten() for p in component.parameters() if p.grad is not None]
            if gradients:
                norms[name] = float(torch.cat(gradients).norm())
        self.norms.append((loss, norms))


def assert_close(ours, plain, atol=1e-10):
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=atol)


def assert_equal_updates(chosen, widths=EVEN, reward_scale=1.0, changed=lambda given: given):
    """Over consecutive updates; the largest losses and the gradients' norms that were met."""
    model = world(widths)
    # A LayerNorm of one channel lets no gradient through but rounding errors, which Adam magnifies.
    atol = 1e-8 if widths["q1.0"] == 1 else 1e-10
    plain = Plain(model.state_dict(), numbers_of_update(chosen))
    learner, gradients = Learner(model, chosen), Gradients(model)
    met = []
    for number in range(UPDATES):
        given = changed(batch(chosen.horizon, ROWS, number, reward_scale))
        noise = update_noise(chosen.horizon, ROWS, number)
        losses = learner.update(given, noise, number, gradients)
        wanted = plain.update(experience_of(given), noise.targets, noise.policy)
        for name, value in wanted.items():
            assert_close(getattr(losses, name), value)
        for (name, ours), theirs in zip(model.named_parameters(), plain.model.parameters(), strict=True):
            assert_close(ours.detach(), theirs.detach(), atol)
            if name.partition(".")[0] in TARGETS:
                assert_close(learner.target[name], plain.target.get_parameter(name).detach())
        for section, moments in plain.moments().items():
            assert moments.keys() == learner.moments()[section].keys()
            for name, moment in moments.items():
                assert_close(learner.moments()[section][name], moment)
        met.append(losses)
    assert finite(met[-1])
    return met, gradients.norms


@pytest.mark.parametrize("horizon", [1, 3, 5])
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_learns_as_the_plain_update(widths, horizon):
    assert_equal_updates(options(horizon=horizon), widths)


@pytest.mark.parametrize(
    "changed",
    [
        {"rho": 0.25, "discount": 0.5},
        {"rho": 1.0, "target_every": 1, "target_rate": 0.5},
        {"rho": 0.0},
        {"target_every": 3, "target_rate": 1.0},
        {"consistency_weight": 0.3, "reward_weight": 2.0, "value_weight": 1.5},
        {"learning_rate": 0.05},
        {"min_std": 0.4},
    ],
    ids=str,
)
def test_learns_as_the_plain_update_whatever_the_options(changed):
    assert_equal_updates(options(**changed), UNEQUAL_TWINS)


def test_clips_gradients_as_the_plain_update():
    chosen = options(gradient_clip=1e-3)
    _, norms = assert_equal_updates(chosen)
    for _, components in norms:
        assert sum(norm**2 for norm in components.values()) ** 0.5 > 10 * chosen.gradient_clip


def test_limits_losses_and_priorities_as_the_plain_update():
    """Some subtrajectories lie above the limit, others below."""

    def half_as_large(given):
        rewards = given.rewards.clone()
        rewards[:, ::2] *= 1e4
        return replace(given, rewards=rewards)

    met, _ = assert_equal_updates(options(), changed=half_as_large)
    assert met[0].reward > LARGEST_LOSS
    assert met[0].priorities.max() == LARGEST_LOSS
    assert met[0].priorities.min() < LARGEST_LOSS


def test_learns_as_the_plain_update_where_every_loss_is_above_the_limit():
    met, norms = assert_equal_updates(options(), reward_scale=1e6)
    assert met[0].reward > 1e9
    _, of_model = norms[0]
    assert of_model["reward"] == of_model["q1"] == 0.0


def test_terminated_transitions_and_weights_matter():
    """The comparison above would not notice if both sides left them out."""
    chosen = options()
    given, noise = batch(chosen.horizon, ROWS, 0), update_noise(chosen.horizon, ROWS, 0)
    assert 0 < given.terminated.mean() < 1

    def after(changed):
        model = world(EVEN)
        losses = Learner(model, chosen).update(changed, noise, 0)
        return float(losses.value), model.q1[0].weight.detach().clone()

    value, weight = after(given)
    other_value, _ = after(replace(given, terminated=torch.zeros_like(given.terminated)))
    assert value != pytest.approx(other_value, rel=1e-3)
    same_value, other_weight = after(replace(given, weights=given.weights.flip(0)))
    assert value == pytest.approx(same_value)
    assert (weight - other_weight).abs().max() > 1e-6


def test_what_is_tracked_changes_nothing_and_is_told_of_every_step():
    """Steps that are not looked at take another way, which on a GPU is a recorded one."""
    chosen = options()

    class Every(Gradients):
        def __init__(self, model, every):
            super().__init__(model)
            self.every, self.told, self.captured = every, [], []

        def is_due(self, loss="model"):
            return self.told.count(loss) % self.every == 0

        def capture(self, loss="model"):
            self.captured.append((loss, self.told.count(loss)))
            return nullcontext()

        def update(self, loss="model"):
            self.told.append(loss)

    found = {}
    for every in (1, 3):
        model = world(EVEN)
        learner, tracker = Learner(model, chosen), Every(model, every)
        for number in range(7):
            given, noise = batch(chosen.horizon, ROWS, number), update_noise(chosen.horizon, ROWS, number)
            learner.update(given, noise, number, tracker)
        assert tracker.told == ["model", "policy"] * 7
        assert tracker.captured == [(loss, n) for n in range(0, 7, every) for loss in ("model", "policy")]
        found[every] = {**model.state_dict(), **learner.target}
    assert all(torch.equal(value, found[3][name]) for name, value in found[1].items())


def test_each_optimizer_moves_its_own_parameters():
    chosen, model = options(), world(EVEN)
    gradients = Gradients(model)
    noise = update_noise(chosen.horizon, ROWS, 0)
    Learner(model, chosen).update(batch(chosen.horizon, ROWS, 0), noise, 0, gradients)
    assert [loss for loss, _ in gradients.norms] == ["model", "policy"]
    assert set(gradients.norms[0][1]) == {"encoder", "dynamics", "reward", "q1", "q2"}
    assert set(gradients.norms[1][1]) == {"policy"}


def test_goes_on_from_the_target_and_the_moments_of_a_learner():
    chosen = options()

    def continued(stopped):
        model = world(EVEN)
        learner = Learner(model, chosen)
        for number in range(4):
            if stopped and number == 2:
                other = world(EVEN, seed=1)
                other.load_state_dict(model.state_dict())
                learner = Learner(
                    other, chosen, target=learner.target, moments=learner.moments(), adam_steps=2
                )
                model = other
            given, noise = batch(chosen.horizon, ROWS, number), update_noise(chosen.horizon, ROWS, number)
            learner.update(given, noise, number)
        return {**model.state_dict(), **{f"target {n}": p for n, p in learner.target.items()}}

    at_once, stopped = continued(False), continued(True)
    assert all(torch.equal(at_once[name], stopped[name]) for name in at_once)


def test_the_policys_noise_is_truncated_and_lets_the_gradient_through():
    means = torch.tensor([0.0, 0.95, -0.95, 0.5], requires_grad=True)
    actions = with_noise(means, torch.tensor([2.0, 0.2, -0.2, 0.1]))
    assert actions.tolist() == pytest.approx([0.3, 1 - 1e-6, -1 + 1e-6, 0.6])
    actions.sum().backward()
    assert means.grad is not None
    assert means.grad.tolist() == [1.0] * 4


# --- precision -------------------------------------------------------------------------------------------


def in_single_precision(horizon, number):
    """A batch and the noise of its update."""
    given, noise = batch(horizon, ROWS, number), update_noise(horizon, ROWS, number)
    floats = {name: value.float() for name, value in vars(given).items() if name != "indices"}
    noise = replace(noise, targets=noise.targets.float(), policy=noise.policy.float())
    return replace(given, **floats), noise


def learnt(precision, widths):
    chosen = options()
    model = world(widths, scale=0.4).float()
    learner = Learner(model, chosen, precision=precision)
    found = []
    for number in range(UPDATES):
        given, noise = in_single_precision(chosen.horizon, number)
        found.append(learner.update(given, noise, number))
    return model, learner, found


@pytest.mark.parametrize("widths", [EVEN, UNEQUAL_TWINS])
def test_bfloat16_learns_nearly_the_same(widths):
    model, learner, low = learnt(torch.bfloat16, widths)
    _, _, exact = learnt(None, widths)
    for ours, wanted in zip(low, exact, strict=True):
        for name in ("consistency", "reward", "value", "policy"):
            value = getattr(ours, name)
            assert value.dtype == torch.float32
            assert float(value) == pytest.approx(float(getattr(wanted, name)), rel=0.03, abs=0.01)
        torch.testing.assert_close(ours.priorities, wanted.priorities, rtol=0.1, atol=0.1)
    assert float(low[0].reward) != float(exact[0].reward)
    kept = [*model.parameters(), *learner.target.values(), *learner.moments()["adam_square"].values()]
    assert {tensor.dtype for tensor in kept} == {torch.float32}


def test_under_autocast_last_layers_and_the_encoder_keep_their_precision():
    model = world(EVEN).float()
    with torch.no_grad():
        for head in (model.dynamics, model.reward, model.q1, model.policy):
            head[-1].weight.zero_()
            head[-1].bias.fill_(1.001953125)  # lies between two numbers of bfloat16
    observations = normal(7, OBSERVATION, seed=1).float()
    latents = model.encode(observations)
    both = torch.cat([latents, normal(7, ACTION, seed=2).float()], dim=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for head in (model.dynamics, model.reward, model.q1):
            assert head(both).unique().tolist() == [1.001953125]
        assert model.policy(latents).unique().tolist() == [1.001953125]
        assert torch.equal(model.encode(observations), latents)


def test_under_autocast_the_targets_encoder_keeps_its_precision():
    chosen, model = options(), world(EVEN).float()
    learner = Learner(model, chosen, precision=torch.bfloat16)
    given, noise = in_single_precision(chosen.horizon, 0)
    following = given.observations[1:]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        slow, _ = learner._targets(given, following, noise)
    expected = model.encode(following.flatten(0, 1))  # of which the target is still a copy
    assert torch.equal(slow.flatten(0, 1), expected)


# --- golden ----------------------------------------------------------------------------------------------


def golden_figures():
    """What a tiny model learns and then plans, everything random from fixed seeds; in float64."""
    chosen, model = options(), world(EVEN, seed=3)
    learner, gradients, found = Learner(model, chosen), Gradients(model), []
    for number in range(UPDATES):
        given, noise = batch(chosen.horizon, ROWS, number), update_noise(chosen.horizon, ROWS, number)
        losses = learner.update(given, noise, number, gradients)
        found.append({name: getattr(losses, name) for name in ("consistency", "reward", "value", "policy")})
    planner, means, actions = Planner(model, settings()), None, []
    for decision in range(4):
        observations = normal(2, OBSERVATION, seed=decision)
        noise = plan_noise(settings(), 2, seed=decision)
        action, means = planner.decide(observations, means, noise, explore=decision == 3)
        actions.append(action.tolist())
    assert means is not None
    return {
        "losses": [{name: float(value) for name, value in losses.items()} for losses in found],
        "gradient_norms": [norms for _, norms in gradients.norms],
        "target": {name: float(tensor.norm()) for name, tensor in learner.target.items()},
        "actions": actions,
        "means": means.tolist(),
    }


def leaves(figures, place=""):
    """Place -> number, of nested lists and dictionaries."""
    if isinstance(figures, int | float):
        return {place: float(figures)}
    pairs = figures.items() if isinstance(figures, dict) else enumerate(figures)
    return {key: value for name, part in pairs for key, value in leaves(part, f"{place}/{name}").items()}


def test_the_figures_of_a_tiny_agent_stay_what_they_were():
    """A change that means to move them writes them anew, as the head of this file says."""
    stored = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert leaves(golden_figures()) == pytest.approx(leaves(stored), rel=1e-6, abs=1e-9)


if __name__ == "__main__":
    if sys.argv[1:] != ["--regenerate"]:
        sys.exit(__doc__)
    torch.set_num_threads(1)
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(golden_figures(), indent=2) + "\n", encoding="utf-8")
